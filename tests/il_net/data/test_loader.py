"""Two endless streams: every image once an epoch, the same batches however they are made."""

import gc
import itertools
import json
import multiprocessing
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from PIL import Image

from il_net.config import add_il_net_config
from il_net.data import robust
from il_net.data.datasets import register_datasets
from il_net.data.loader import (
    ImageStream,
    SemiBatch,
    SemiLoader,
    build_labeled_loader,
    build_semi_loader,
    share_workers,
)
from il_net.data.mapper import SemiMapper, read_size
from il_net.data.shared_records import PackedRecords

WIDE, TALL = (24, 16), (16, 24)


def write_pictures(folder: Path, sizes: list[tuple[int, int]]) -> list[str]:
    """0.png, 1.png, ... of (width, height), with noise."""
    folder.mkdir()
    names = []
    for i, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        names.append(f"{i}.png")
    return names


def make_data(root: Path, labeled: list, unlabeled: list) -> None:
    """A COCO set of ids 100, 101, ... with a box each, and a bare folder."""
    names = write_pictures(root / "l", labeled)
    data = {
        "images": [
            {"id": 100 + i, "file_name": name, "width": width, "height": height}
            for i, (name, (width, height)) in enumerate(zip(names, labeled, strict=True))
        ],
        "annotations": [
            {"id": i + 1, "image_id": 100 + i, "category_id": 1, "bbox": [2, 3, 8, 9], "iscrowd": 0}
            for i in range(len(names))
        ],
        "categories": [{"id": 1, "name": "leaf"}],
    }
    (root / "train.json").write_text(json.dumps(data))
    if unlabeled:
        write_pictures(root / "u", unlabeled)


@pytest.fixture
def make_cfg(clean_catalogs, tmp_path):
    def make(labeled: list, unlabeled: list, *opts: object) -> CfgNode:
        make_data(tmp_path, labeled, unlabeled)
        cfg = get_cfg()
        add_il_net_config(cfg)
        cfg.MODEL.DEVICE, cfg.MODEL.MASK_ON = "cpu", False
        cfg.DATASETS.REGISTER = [
            {"name": "train", "type": "coco", "json": "train.json", "images": "l"}
        ]
        cfg.DATASETS.TRAIN = ("train",)
        if unlabeled:
            cfg.DATASETS.REGISTER.append({"name": "u", "type": "images", "images": "u"})
            cfg.DATASETS.UNLABELED = ("u",)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
        cfg.INPUT.MIN_SIZE_TRAIN = (16, 20)
        cfg.SEED, cfg.DATALOADER.NUM_WORKERS = 5, 0
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH_UNLABELED = 2, 2
        cfg.SEMISUP.BURN_IN_ITERS = 0
        cfg.merge_from_list(list(opts))
        register_datasets(cfg)
        return cfg

    return make


def take(loader: SemiLoader, count: int) -> list[SemiBatch]:
    return list(itertools.islice(loader, count))


def describe(batches: list[SemiBatch]) -> list:
    """Everything that a model could see, comparable."""
    return [
        [
            (
                r["file_name"],
                r["image"].numpy().tobytes(),
                r["strong_image"].numpy().tobytes(),
                r["instances"].gt_boxes.tensor.tolist() if "instances" in r else None,
            )
            for r in (*batch.labeled, *batch.unlabeled)
        ]
        for batch in batches
    ]


def ids(samples: list[dict]) -> list:
    return [sample["image_id"] for sample in samples]


def pretend_rank(monkeypatch, rank: int, processes: int) -> None:
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)


MIXED = [WIDE, TALL, WIDE, WIDE, TALL, WIDE, WIDE]


# --- what a batch holds ---


def test_labeled_and_unlabeled_samples(make_cfg):
    loader = build_semi_loader(make_cfg(MIXED, MIXED[:3]))
    assert loader.split.labeled == tuple(range(100, 107))
    for batch in take(loader, 4):
        assert len(batch.labeled) == len(batch.unlabeled) == 2
        for sample in (*batch.labeled, *batch.unlabeled):
            assert sample["image"].shape == sample["strong_image"].shape
            assert sample["image"].dtype == torch.uint8
        assert all(len(s["instances"]) == 1 for s in batch.labeled)
        assert all("instances" not in s and "annotations" not in s for s in batch.unlabeled)


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 3), (1, 4), (4, 1)])
def test_every_image_once_an_epoch_in_both_streams(make_cfg, labeled, unlabeled):
    sizes = {"SOLVER.IMS_PER_BATCH": labeled, "SOLVER.IMS_PER_BATCH_UNLABELED": unlabeled}
    opts = [x for pair in sizes.items() for x in pair]
    cfg = make_cfg([WIDE] * 4, [WIDE] * 12, "DATALOADER.ASPECT_RATIO_GROUPING", False, *opts)
    batches = take(build_semi_loader(cfg), 24)
    for group, size, count in (("labeled", labeled, 4), ("unlabeled", unlabeled, 12)):
        drawn = [i for b in batches for i in ids(getattr(b, group))]
        assert len(drawn) == 24 * size  # nothing is dropped
        epochs = [tuple(drawn[i : i + count]) for i in range(0, len(drawn), count)]
        assert {len(set(epoch)) for epoch in epochs} == {count}
        # Each epoch has an order of its own: 4! = 24, so that a repeat among them may happen.
        assert len(set(epochs)) > len(epochs) / 2


def test_grouping_keeps_shapes_together_and_drops_nothing(make_cfg):
    cfg = make_cfg(MIXED, MIXED, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.IMS_PER_BATCH_UNLABELED", 3)
    batches = take(build_semi_loader(cfg), 70)
    for group, size in (("labeled", 4), ("unlabeled", 3)):
        counts = Counter()
        for batch in batches:
            samples = getattr(batch, group)
            assert len(samples) == size
            assert len({s["width"] > s["height"] for s in samples}) == 1
            counts.update(ids(samples))
        # 7 images in 70 batches: 10 times each per image of a batch. At most size - 1 of a kind
        # wait for their batch to fill, and the last epoch may not be over.
        assert all(abs(count - 10 * size) <= size for count in counts.values())
        assert len(counts) == 7


def test_without_grouping_shapes_mix(make_cfg):
    cfg = make_cfg(MIXED, MIXED, "DATALOADER.ASPECT_RATIO_GROUPING", False)
    batches = take(build_semi_loader(cfg), 20)
    assert any(len({s["width"] > s["height"] for s in b.labeled}) == 2 for b in batches)
    assert any(len({s["width"] > s["height"] for s in b.unlabeled}) == 2 for b in batches)


def test_one_image(make_cfg):
    batches = take(build_semi_loader(make_cfg([WIDE], [TALL])), 5)
    assert [ids(b.labeled) for b in batches] == [[100, 100]] * 5
    assert [ids(b.unlabeled) for b in batches] == [["0.png", "0.png"]] * 5
    views = {s["strong_image"].numpy().tobytes() for b in batches for s in b.unlabeled}
    assert len(views) == 10


def test_split_of_the_training_set(make_cfg):
    loader = build_semi_loader(make_cfg([WIDE] * 10, [], "DATASETS.SPLIT.PERCENT", 40.0))
    batches = take(loader, 12)
    labeled = {i for b in batches for i in ids(b.labeled)}
    unlabeled = {i for b in batches for i in ids(b.unlabeled)}
    assert labeled == set(loader.split.labeled)
    assert unlabeled == set(loader.split.unlabeled)
    assert len(labeled) == 4
    assert labeled | unlabeled == set(range(100, 110))


# --- the same whatever makes them ---


def test_batches_do_not_depend_on_workers(make_cfg):
    cfg = make_cfg(MIXED, MIXED, "SEMISUP.BURN_IN_ITERS", 2)
    described = []
    for workers in (0, 1, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        described.append(describe(take(build_semi_loader(cfg), 6)))
    assert described[1:] == described[:1] * 2
    assert len({sample[2] for batch in described[0] for sample in batch}) == 2 * 2 + 4 * 4
    cfg.SEED = 6
    assert describe(take(build_semi_loader(cfg), 6)) != described[0]


def test_workers_end_with_the_iterator(make_cfg):
    cfg = make_cfg(MIXED, MIXED, "SEMISUP.BURN_IN_ITERS", 1, "DATALOADER.NUM_WORKERS", 2)
    before = set(multiprocessing.active_children())
    batches = iter(build_semi_loader(cfg))
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2  # all for the labelled
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    gc.collect()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize(
    ("total", "batches", "shares"),
    [
        (0, (2, 2), (0, 0)),
        (1, (4, 1), (1, 0)),
        (1, (1, 4), (0, 1)),
        (2, (1, 9), (1, 1)),
        (2, (9, 1), (1, 1)),
        (4, (1, 1), (2, 2)),
        (10, (1, 4), (2, 8)),
        (4, (100, 1), (3, 1)),
    ],
)
def test_sharing_workers(total, batches, shares):
    assert share_workers(total, *batches) == shares


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resumed_run_sees_what_the_uninterrupted_one_would(make_cfg, workers, accumulate):
    burn_in = 2
    cfg = make_cfg(
        *(MIXED, MIXED, "SEMISUP.BURN_IN_ITERS", burn_in, "SOLVER.ACCUMULATE", accumulate),
        *("SOLVER.IMS_PER_BATCH_UNLABELED", 3, "DATALOADER.NUM_WORKERS", workers),
    )
    whole = describe(take(build_semi_loader(cfg), 5 * accumulate))
    sizes = [len(batch) for batch in whole]
    assert sizes == [2] * burn_in * accumulate + [5] * 3 * accumulate
    for start in (1, burn_in, 4):  # in burn-in, at its end, after it
        loader = build_semi_loader(cfg)
        batches = iter(loader)
        loader.start_iter = start  # set after iter(), before the first batch
        rest = [next(batches) for _ in range((5 - start) * accumulate)]
        assert describe(rest) == whole[start * accumulate :]


def test_iterating_again_starts_again(make_cfg):
    loader = build_semi_loader(make_cfg(MIXED, MIXED, "SEMISUP.BURN_IN_ITERS", 1))
    first = describe(take(loader, 4))
    assert describe(take(loader, 4)) == first
    loader.start_iter = 2
    assert describe(take(loader, 2)) == first[2:]
    # Two at a time do not disturb each other.
    loader.start_iter = 0
    both = list(itertools.islice(zip(loader, loader, strict=False), 3))
    assert describe([a for a, _ in both]) == describe([b for _, b in both]) == first[:3]


def test_processes_share_each_batch(make_cfg, monkeypatch):
    cfg = make_cfg(MIXED, MIXED, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.IMS_PER_BATCH_UNLABELED", 2)
    alone = take(build_semi_loader(cfg), 10)
    monkeypatch.setattr(comm, "all_gather", lambda data: [data])
    for rank in (0, 1):
        pretend_rank(monkeypatch, rank, 2)
        shares = take(build_semi_loader(cfg), 10)
        expected = [SemiBatch(b.labeled[rank::2], b.unlabeled[rank::2]) for b in alone]
        assert describe(shares) == describe(expected)
        assert all(len(b.labeled) == 2 and len(b.unlabeled) == 1 for b in shares)


def test_processes_share_an_epoch_without_overlap(make_cfg, monkeypatch):
    cfg = make_cfg([WIDE] * 6, [], "SOLVER.IMS_PER_BATCH", 2)
    cfg.SOLVER.IMS_PER_BATCH_UNLABELED = 0
    monkeypatch.setattr(comm, "all_gather", lambda data: [data])
    seen = []
    for rank in (0, 1):
        pretend_rank(monkeypatch, rank, 2)
        seen.append([i for b in take(build_semi_loader(cfg), 3) for i in ids(b.labeled)])
    assert sorted(seen[0] + seen[1]) == list(range(100, 106))


def test_random_seed_is_shared(make_cfg, monkeypatch):
    cfg = make_cfg(MIXED, MIXED)
    fixed = describe(take(build_semi_loader(cfg), 3))
    cfg.SEED = -1
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 5)
    assert describe(take(build_semi_loader(cfg), 3)) == fixed
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 77)
    assert describe(take(build_semi_loader(cfg), 3)) != fixed


@pytest.mark.parametrize("workers", [0, 2])
def test_models_own_draws_are_not_touched(make_cfg, workers):
    cfg = make_cfg(MIXED, MIXED, "DATALOADER.NUM_WORKERS", workers)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    take(build_semi_loader(cfg), 2)
    assert torch.equal(torch.rand(3), expected)


# --- reading ---


def test_unlabeled_images_are_not_touched_before_burn_in_ends(make_cfg, monkeypatch):
    cfg = make_cfg(MIXED, MIXED, "SEMISUP.BURN_IN_ITERS", 3)
    reads, sizes = [], []
    mapper, size = SemiMapper.__call__, read_size

    def read(self, record, position):
        reads.append((self.group, record["image_id"]))
        return mapper(self, record, position)

    monkeypatch.setattr(SemiMapper, "__call__", read)
    monkeypatch.setattr(robust, "read_size", lambda f: (sizes.append(f), size(f))[1])
    loader = build_semi_loader(cfg)
    assert len(sizes) == 7  # one look at the headers, for a warning
    sizes.clear()
    batches = iter(loader)
    for _ in range(3):
        assert next(batches).unlabeled == []
    assert {group for group, _ in reads} == {"labeled"}
    assert len(reads) == 6
    assert sizes == []
    assert len(next(batches).unlabeled) == 2
    assert len(reads) == 10
    # Headers are read once, when it is their turn; the COCO file has the others.
    assert 2 <= len(sizes) <= 3
    for _ in range(40):
        next(batches)
    assert len(sizes) == len(set(sizes)) == 7
    # A resume passes over batches without reading their pictures.
    reads.clear()
    loader.start_iter = 30
    take(loader, 1)
    assert len(reads) == 4


def test_training_on_labeled_images_alone(make_cfg):
    cfg = make_cfg(MIXED, MIXED, "SOLVER.IMS_PER_BATCH_UNLABELED", 0)
    cfg.SEMISUP.BURN_IN_ITERS = 1
    batches = take(build_semi_loader(cfg), 4)
    assert all(len(b.labeled) == 2 and b.unlabeled == [] for b in batches)
    cfg.SOLVER.IMS_PER_BATCH_UNLABELED, cfg.SEMISUP.BURN_IN_ITERS = 2, 4
    assert describe(take(build_semi_loader(cfg), 4)) == describe(batches)


def test_gray_and_turned_pictures_in_a_bare_folder(make_cfg, tmp_path):
    cfg = make_cfg([WIDE], [WIDE])
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("L", WIDE, 90).save(tmp_path / "u" / "1.jpg", exif=exif)
    Image.new("L", WIDE, 90).save(tmp_path / "u" / "2.jpg")
    for batch in take(build_semi_loader(cfg), 12):
        wide = {s["image_id"] != "1.jpg" for s in batch.unlabeled}
        assert len(wide) == 1
        assert all(
            (s["width"], s["height"]) == (WIDE if wide == {True} else TALL) for s in batch.unlabeled
        )
        assert all((s["image"].shape[2] > s["image"].shape[1]) in wide for s in batch.unlabeled)


@pytest.mark.parametrize("grouping", [False, True])
def test_unreadable_pictures_are_replaced_and_told_once(make_cfg, tmp_path, caplog, grouping):
    cfg = make_cfg(MIXED, MIXED, "DATALOADER.ASPECT_RATIO_GROUPING", grouping)
    (tmp_path / "l" / "1.png").unlink()  # tall
    (tmp_path / "u" / "2.png").write_bytes(b"broken")  # wide
    described = []
    for workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        caplog.clear()
        described.append(describe(take(build_semi_loader(cfg), 14)))
        told = [r.getMessage() for r in caplog.records if "takes its place" in r.getMessage()]
        assert len(told) == 2  # 14 batches of 2 pass over either stream four times
        assert {Path(text.split()[0]).name for text in told} == {"1.png", "2.png"}
    assert described[0] == described[1]
    names = [Path(sample[0]) for batch in described[0] for sample in batch]
    assert all(len(batch) == 4 for batch in described[0])
    assert tmp_path / "l" / "1.png" not in names
    assert tmp_path / "u" / "2.png" not in names
    for start in (3, 9):
        loader = build_semi_loader(cfg)
        loader.start_iter = start
        assert describe(take(loader, 14 - start)) == described[0][start:]


def test_a_replacement_has_the_shape_of_its_batch(make_cfg, tmp_path):
    cfg = make_cfg(MIXED, MIXED)  # 1 and 4 are tall
    (tmp_path / "l" / "1.png").unlink()
    (tmp_path / "l" / "6.png").unlink()
    for batch in take(build_semi_loader(cfg), 21):
        assert len({s["width"] > s["height"] for s in batch.labeled}) == 1


def test_the_last_of_its_shape_is_replaced_by_another(make_cfg, tmp_path):
    cfg = make_cfg([WIDE, WIDE, TALL], [WIDE])
    (tmp_path / "l" / "2.png").unlink()
    drawn = {i for b in take(build_semi_loader(cfg), 9) for i in ids(b.labeled)}
    assert drawn == {100, 101}


def test_too_many_unreadable_pictures_stop_at_the_same_step(make_cfg, tmp_path):
    cfg = make_cfg([WIDE] * 8, [WIDE] * 8, "DATALOADER.MAX_UNREADABLE", 2)
    for name in ("l/1", "l/3", "u/5"):  # two of a group are allowed, three in both are not
        (tmp_path / f"{name}.png").write_bytes(b"broken")
    counts = []
    for workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        counts.append(0)
        with pytest.raises(SystemExit) as e:
            for _ in build_semi_loader(cfg):
                counts[-1] += 1
        traceback.clear_frames(e.tb)  # ends the workers now, not with some later garbage
        message = str(e.value)
        assert message.startswith(
            "error: unreadable images: 3, but DATALOADER.MAX_UNREADABLE is 2: "
        )
        assert all(message.count(f"{name}.png") == 1 for name in ("l/1", "l/3", "u/5"))
    # 8 images in batches of 2; the shape of u/5 is not known, and it waits for another such.
    assert counts[0] == counts[1] < 8


def test_nothing_but_unreadable_pictures(make_cfg, tmp_path):
    cfg = make_cfg([WIDE] * 2, [WIDE] * 3)
    for i in range(2):
        (tmp_path / "l" / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(SystemExit, match=r"none of the images can be read: .*png cannot be used"):
        take(build_semi_loader(cfg), 1)
    for i in range(3):
        (tmp_path / "u" / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"DATASETS\.UNLABELED: none of 3 images .*u/0\.png"):
        build_semi_loader(cfg)
    cfg.SOLVER.IMS_PER_BATCH_UNLABELED = 0
    build_semi_loader(cfg)


def test_unusable_labels_stop_with_the_files_name(make_cfg, monkeypatch):
    cfg = make_cfg([WIDE], [WIDE])
    read, wrong = PackedRecords.__getitem__, {"annotations": [{"bbox": [1, 2]}]}
    monkeypatch.setattr(PackedRecords, "__getitem__", lambda self, i: {**read(self, i), **wrong})
    with pytest.raises(SystemExit, match=r"error: .*l/0\.png cannot be used: KeyError"):
        take(build_semi_loader(cfg), 1)


# --- the plain loader ---


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_plain_loader_skips_as_well(make_cfg, tmp_path, caplog, grouping, sampler):
    cfg = make_cfg(MIXED, [], "DATALOADER.ASPECT_RATIO_GROUPING", grouping)
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    (tmp_path / "l" / "3.png").write_bytes(b"broken")
    found = []
    for workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        caplog.clear()
        torch.manual_seed(2)
        drawn = list(itertools.islice(build_labeled_loader(cfg), 14))
        assert all(len(batch) == 2 for batch in drawn)
        found.append({i for batch in drawn for i in ids(batch)})
        told = [r for r in caplog.records if "takes its place" in r.getMessage()]
        assert len(told) == 1
    assert found[0] == found[1] == {100, 101, 102, 104, 105, 106}


def test_plain_loader_is_detectron2s(make_cfg):
    """The same samples in the same order, for a seed."""
    cfg = make_cfg(MIXED, [])
    batches = []
    for build in (build_detection_train_loader, build_labeled_loader):
        seed_all_rng(7)
        batches.append(list(itertools.islice(build(cfg), 6)))
    for one, other in zip(*(itertools.chain(*b) for b in batches), strict=True):
        assert one["file_name"] == other["file_name"]
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)


# --- what cannot work ---


@pytest.mark.parametrize("key", ["IMS_PER_BATCH", "IMS_PER_BATCH_UNLABELED"])
def test_batches_that_cannot_be_shared(make_cfg, monkeypatch, key):
    cfg = make_cfg([WIDE], [WIDE])
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for size in (3, -2):
        cfg.SOLVER.IMS_PER_BATCH = cfg.SOLVER.IMS_PER_BATCH_UNLABELED = 2
        cfg.SOLVER[key] = size
        with pytest.raises(ValueError, match=rf"SOLVER\.{key} {size} .* multiple of .*, 2"):
            build_semi_loader(cfg)
    cfg.SOLVER.IMS_PER_BATCH = 0
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH 0 "):
        build_semi_loader(cfg)


def test_nothing_unlabeled(make_cfg):
    cfg = make_cfg([WIDE] * 2, [])
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH_UNLABELED is 2.*no unlabelled") as e:
        build_semi_loader(cfg)
    assert e.match(r"DATASETS\.UNLABELED.*DATASETS\.SPLIT\.PERCENT")
    cfg.SOLVER.IMS_PER_BATCH_UNLABELED = 0
    assert len(take(build_semi_loader(cfg), 2)) == 2


def test_wrong_accumulation(make_cfg):
    cfg = make_cfg([WIDE], [WIDE], "SOLVER.ACCUMULATE", 0)
    with pytest.raises(ValueError, match=r"SOLVER\.ACCUMULATE must be at least 1, got 0"):
        build_semi_loader(cfg)


def test_processes_with_different_images(make_cfg, monkeypatch):
    cfg = make_cfg([WIDE], [WIDE])
    monkeypatch.setattr(comm, "all_gather", lambda data: [data, "another"])
    with pytest.raises(ValueError, match="processes found different images.*same files"):
        build_semi_loader(cfg)


def test_records_are_kept_as_bytes(make_cfg):
    """One array: reference counts of Python objects would copy it into every worker."""
    stream: ImageStream = build_semi_loader(make_cfg([WIDE] * 3, [WIDE])).labeled
    assert stream._images._records.data.dtype == np.uint8
