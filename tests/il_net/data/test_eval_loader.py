"""The images of an evaluation: those that cannot be read are left out, counted and told."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from PIL import Image

from il_net.config import add_il_net_config
from il_net.data.eval_loader import EvalLoader, build_eval_loader

GOOD = (0, 2, 3)


@pytest.fixture
def build(clean_catalogs, tmp_path) -> Callable[..., EvalLoader]:
    """Five images of 40 x 20 px: number 1 is no image, number 4 is of another size."""
    records = []
    for i in range(5):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (20, 40) if i == 4 else (40, 20), (i, i, i)).save(path)
        records.append({"file_name": str(path), "image_id": i, "height": 20, "width": 40})
    (tmp_path / "1.png").write_text("no image")
    DatasetCatalog.register("five", lambda: [{**r, "annotations": [{}]} for r in records])

    def build(limit: int, *options: object) -> EvalLoader:
        cfg = get_cfg()
        add_il_net_config(cfg)
        cfg.INPUT.MIN_SIZE_TEST = 10
        cfg.DATALOADER.MAX_UNREADABLE, cfg.DATALOADER.NUM_WORKERS = limit, 0
        cfg.merge_from_list(list(options))
        return build_eval_loader(cfg, "five")

    return build


@pytest.mark.parametrize("workers", [0, 2])
def test_readable_images_come_in_order_at_test_size(build, caplog, tmp_path, workers):
    caplog.set_level(logging.WARNING, "il_net")
    loader = build(2, "DATALOADER.NUM_WORKERS", workers)
    assert len(loader) == 5
    batches = list(loader)
    assert [sample["image_id"] for (sample,) in batches] == list(GOOD)
    for (sample,) in batches:
        # The short side becomes 10 px; the colour is the image's number.
        assert torch.equal(sample["image"], torch.full((3, 10, 20), sample["image_id"]).byte())
        assert (sample["height"], sample["width"]) == (20, 40)
        assert "annotations" not in sample
    *each, both = caplog.messages
    assert both == "2 images could not be read: the metrics count them as missed"
    for i, text in zip((1, 4), each, strict=True):
        assert text.startswith(f"{tmp_path / f'{i}.png'} cannot be used: ")
        assert "It is scored as one in which nothing was found" in text
    assert "(2 skipped so far, DATALOADER.MAX_UNREADABLE is 2)" in caplog.messages[1]


@pytest.mark.parametrize(("limit", "read"), [(1, [0, 2, 3]), (0, [0])])
def test_one_more_than_the_limit_stops_at_once(build, limit, read):
    seen = []
    with pytest.raises(SystemExit) as e:
        for (sample,) in build(limit):
            seen.append(sample["image_id"])
    assert seen == read
    message = f"error: unreadable images: {limit + 1}, but DATALOADER.MAX_UNREADABLE is {limit}: "
    assert str(e.value).startswith(message)
    assert "1.png cannot be used" in str(e.value)


def test_none_can_be_read(build, tmp_path):
    for i in GOOD:
        Path(tmp_path, f"{i}.png").unlink()
    with pytest.raises(SystemExit, match=r"^error: none of the images can be read: .*0\.png"):
        list(build(100))


def test_what_other_processes_could_not_read_counts(build, monkeypatch, caplog):
    """Every process stops, after all have read; the main one tells of all."""
    caplog.set_level(logging.WARNING, "il_net")
    others = ({"x.png": "x.png cannot be used: broken"}, 7)
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, others])
    seen = []
    with pytest.raises(SystemExit, match=r"unreadable images: 3, .*MAX_UNREADABLE is 2.*x\.png"):
        for (sample,) in build(2):
            seen.append(sample["image_id"])
    assert seen == list(GOOD)
    caplog.clear()
    assert len(list(build(3))) == 3
    assert caplog.messages[2].startswith("x.png cannot be used: broken")
    # A share of which nothing can be read is no reason to stop, nor is one without images.
    monkeypatch.setattr(comm, "all_gather", lambda mine: [(mine[0], 0), others])
    assert len(list(build(3))) == 3
    monkeypatch.setattr(comm, "all_gather", lambda mine: [(mine[0], 0), ({}, 0)])
    with pytest.raises(SystemExit, match="none of the images can be read"):
        list(build(3))


def test_very_long_images_keep_a_pixel(build, tmp_path):
    """Detectron2 would make 1 px of 4000 : 1 at a longest side of 1333 a third of one: none."""
    Image.new("RGB", (4000, 1)).save(tmp_path / "0.png")
    DatasetCatalog.pop("five")
    record = {"file_name": str(tmp_path / "0.png"), "image_id": 0, "height": 1, "width": 4000}
    DatasetCatalog.register("five", lambda: [record])
    ((sample,),) = build(0, "INPUT.MAX_SIZE_TEST", 1333)
    assert sample["image"].shape == (3, 1, 1333)
