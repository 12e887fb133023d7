"""Images that cannot be read are replaced, counted and told; a dead worker is explained."""

import logging
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from PIL import Image
from torch.utils.data import DataLoader

from il_net.config import add_il_net_config
from il_net.data import robust
from il_net.data.mapper import UnreadableImage
from il_net.data.robust import CheckedLoader, MappedImages, UnreadableImages, probe_headers

BAD = {1, 4}
NUM = 8


def make_records(count: int = NUM, wide: tuple = ()) -> list[dict]:
    return [
        {"file_name": f"{i}.png", "width": 20 if i in wide else 10, "height": 15}
        for i in range(count)
    ]


def make_mapper(bad: set):
    """The sample's image is the number of its record; files of `bad` cannot be read."""

    def map_record(record: dict, position: int) -> dict:
        number = int(record["file_name"].split(".")[0])
        if number in bad:
            raise UnreadableImage(f"{number}.png cannot be used: broken")
        return {"image": number, "position": position}

    return map_record


def make_images(bad: set = frozenset(BAD), limit: int = NUM, seed: int = 0, **options):
    return MappedImages(make_records(**options), make_mapper(bad), seed=seed, limit=limit)


# --- replacements ---


def test_a_readable_image_is_left_alone():
    images = make_images()
    assert images[5, 0, None] == {"image": 0, "position": 5}
    assert images[3] == {"image": 3, "position": 3}
    assert len(images) == NUM
    assert [record["file_name"] for record in images] == [f"{i}.png" for i in range(NUM)]


def test_replacements_follow_from_seed_and_position_alone():
    positions = range(200)

    def draw(seed: int, index: int) -> list[int]:
        images = make_images(seed=seed)
        return [images[position, index, None]["image"] for position in positions]

    drawn = draw(0, 1)
    assert draw(0, 1) == drawn
    assert draw(0, 4) == drawn  # the same order of others, both without 1 and 4
    assert draw(1, 1) != drawn
    counts = np.bincount(drawn, minlength=NUM)
    assert counts[[1, 4]].tolist() == [0, 0]
    # 200 draws of 6: 33 each, with a standard deviation of 5.
    assert counts[[0, 2, 3, 5, 6, 7]].min() > 10


def test_sample_tells_what_was_skipped():
    sample = make_images()[0, 1, None]
    told = sample["skipped_images"]
    assert told["1.png"] == "1.png cannot be used: broken"
    assert set(told) <= {"1.png", "4.png"}


def test_replacements_have_the_wanted_shape_while_there_are_any():
    wide = (0, 1, 2)
    for position in range(30):
        images = make_images(bad={1}, wide=wide)
        assert images[position, 1, True]["image"] in {0, 2}
        images = make_images(bad={5}, wide=wide)
        assert images[position, 5, False]["image"] in {3, 4, 6, 7}
        images = make_images(bad={0, 1, 2}, wide=wide)
        assert images[position, 1, True]["image"] > 2


def test_a_sample_tries_no_more_images_than_the_limit():
    tried = []

    def fail(record: dict, position: int) -> dict:
        tried.append(record["file_name"])
        raise UnreadableImage("broken")

    sample = MappedImages(make_records(50), fail, seed=0, limit=3)[0]
    assert len(tried) == len(set(tried)) == 4  # one more than allowed is what stops the run
    assert "image" not in sample
    assert set(sample["skipped_images"]) == set(tried)


# --- the account ---


def take(account: UnreadableImages, images: MappedImages, *indices: int) -> list[int]:
    return [sample["image"] for sample in account.take([images[i] for i in indices])]


def test_each_image_is_counted_and_told_once(caplog):
    caplog.set_level(logging.WARNING)
    account, images = UnreadableImages(2), make_images()
    for _ in range(5):
        for index in range(NUM):
            assert take(account, images, index)[0] not in BAD
    assert set(account.skipped) == {"1.png", "4.png"}
    assert len(caplog.messages) == 2
    assert all("DATALOADER.MAX_UNREADABLE is 2" in text for text in caplog.messages)
    assert "skipped_images" not in account.take([images[1]])[0]


def test_one_more_than_the_limit_stops():
    account, images = UnreadableImages(1), make_images(limit=1)
    with pytest.raises(SystemExit) as e:
        take(account, images, 1, 4)
    for part in (
        "unreadable images: 2, ",
        "DATALOADER.MAX_UNREADABLE is 1",
        "1.png",
        "4.png",
        "raise",
    ):
        assert part in str(e.value)
    with pytest.raises(SystemExit, match=r"unreadable images: 1, .*MAX_UNREADABLE is 0"):
        take(UnreadableImages(0), make_images(limit=0), 1)


def test_many_files_are_not_all_named():
    text = robust.too_many([f"{i}.png" for i in range(101)], 100)
    assert "4.png; and 96 more." in text
    assert "5.png" not in text


def test_all_unreadable_but_fewer_than_the_limit():
    with pytest.raises(SystemExit, match=r"none of the images can be read: 0\.png.*and 3 more"):
        take(UnreadableImages(100), make_images(bad=set(range(NUM)), limit=100), 0)


def test_limit_of_the_configuration():
    cfg = get_cfg()
    add_il_net_config(cfg)
    assert UnreadableImages.from_config(cfg).limit == 100
    cfg.DATALOADER.MAX_UNREADABLE = -1
    with pytest.raises(ValueError, match=r"DATALOADER\.MAX_UNREADABLE must be 0 .*got -1"):
        UnreadableImages.from_config(cfg)


# --- a look at the headers ---


@pytest.fixture
def pictures(tmp_path) -> list[dict]:
    for i in range(10):
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
    return [{"file_name": str(tmp_path / f"{i}.png")} for i in range(10)]


def test_headers_are_looked_at_before_they_are_needed(pictures, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    assert probe_headers(pictures, "KEY", 2) == []
    assert caplog.messages == []
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "7.png").unlink()
    assert len(probe_headers(pictures, "KEY", 2)) == 2
    (text,) = caplog.messages
    assert text.startswith("KEY: 2 of 10 images")
    assert "3.png" in text and "7.png" in text
    with pytest.raises(ValueError, match=r"KEY: unreadable images: 2, .*MAX_UNREADABLE is 1"):
        probe_headers(pictures, "KEY", 1)
    with pytest.raises(ValueError, match=r"KEY: none of 2 images can be read"):
        probe_headers([pictures[3], pictures[7]], "KEY", 2)


def test_only_some_headers_of_many_are_looked_at(pictures, monkeypatch):
    looked = []
    monkeypatch.setattr(robust, "NUM_PROBED", 4)
    monkeypatch.setattr(robust, "read_size", lambda name: looked.append(name) or (1, 1))
    assert probe_headers(pictures, "KEY", 0) == []
    assert sorted(looked) == [pictures[i]["file_name"] for i in (0, 2, 5, 7)]


# --- workers ---


class Dying:
    """A data set whose reader ends at once, by a signal."""

    def __init__(self, how: int) -> None:
        self.how = how

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict:
        if index == 8:
            os.kill(os.getpid(), -self.how)
            time.sleep(60)
        return {"image": index}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (-signal.SIGKILL, ("was killed by SIGKILL", "memory", "DATALOADER.NUM_WORKERS")),
        (-signal.SIGFPE, ("was killed by SIGFPE", "DATALOADER.NUM_WORKERS 0")),
    ],
)
def test_a_dead_worker_is_one_error_wherever_the_main_process_is(how, words):
    loader = DataLoader(Dying(how), batch_size=2, num_workers=2, collate_fn=list)
    batches = iter(CheckedLoader(loader, "unlabelled", UnreadableImages(0)))
    start = time.monotonic()
    with pytest.raises(SystemExit) as e:
        for _ in batches:
            time.sleep(0.1)  # training
    message = str(e.value)
    assert message.startswith("error: a worker that reads unlabelled images (process ")
    assert all(word in message for word in words)
    assert "\n" not in message
    assert time.monotonic() - start < 30


def test_a_worker_that_died_before_it_was_known():
    class Started:
        def __iter__(self):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is")

    with pytest.raises(SystemExit) as e:
        iter(CheckedLoader(Started(), "labelled", UnreadableImages(0)))
    assert "reads labelled images (process 7) was killed by SIGBUS" in str(e.value)
    assert "shared memory" in str(e.value)


def test_a_worker_that_dies_while_it_sends_a_sample():
    """torch hears of it when the sample has already failed to arrive."""

    class Sending:
        def __iter__(self):
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            process.start()
            yield [{"image": 1}]
            process.kill()
            raise EOFError

    batches = iter(CheckedLoader(Sending(), "labelled", UnreadableImages(0)))
    next(batches)
    with pytest.raises(SystemExit, match=r"labelled images \(process \d+\) was killed by SIGKILL"):
        next(batches)


def test_other_errors_are_passed_on():
    class Wrong(Dying):
        def __getitem__(self, index: int) -> dict:
            raise RuntimeError("our own")

    loader = DataLoader(Wrong(0), batch_size=2, collate_fn=list)
    with pytest.raises(RuntimeError, match="our own"):
        list(CheckedLoader(loader, "labelled", UnreadableImages(0)))
