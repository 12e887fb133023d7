"""Pseudo labels against true ones in a run: which truth is found, and when lines are written."""

import json
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from il_net.config import add_il_net_config
from il_net.data.split import Split
from il_net.engine import quality
from il_net.engine.quality import PseudoLabelQuality, unlabeled_truth

NAMES = ("quality_train", "quality_more", "quality_other", "quality_bare")


def make_record(tmp_path, image_id: int, labels: bool = True) -> dict:
    path = tmp_path / f"{image_id}.png"
    Image.new("RGB", (100, 50)).save(path)
    box = {"bbox": [10, 10, 40, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    crowd = {"bbox": [0, 0, 90, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 1}
    record = {"file_name": str(path), "image_id": image_id, "height": 50, "width": 100}
    return {**record, "annotations": [box, crowd]} if labels else record


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    add_il_net_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.MIN_SIZE_TEST = 100
    cfg.DATASETS.TRAIN, cfg.DATASETS.CLASSES = (NAMES[0],), ("a", "b")
    sets = {
        NAMES[0]: ([make_record(tmp_path, i) for i in (1, 2, 3)], ["a", "b"]),
        NAMES[1]: ([make_record(tmp_path, 4), make_record(tmp_path, 5, labels=False)], ["a", "b"]),
        NAMES[2]: ([make_record(tmp_path, 6)], ["c"]),
        NAMES[3]: ([make_record(tmp_path, 7, labels=False)], []),
    }
    for name, (records, classes) in sets.items():
        DatasetCatalog.register(name, lambda records=records: records)
        MetadataCatalog.get(name).set(thing_classes=classes)
    yield cfg
    for name in NAMES:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def ids(records: list[dict]) -> list[int]:
    return [record["image_id"] for record in records]


def test_truth_of_the_split_and_of_unlabelled_sets_with_labels_of_the_same_classes(cfg):
    split = Split(NAMES[0], 33.0, 1, (2,), (1, 3))
    assert ids(unlabeled_truth(cfg, split)) == [1, 3]
    cfg.DATASETS.UNLABELED = NAMES[1:]
    assert ids(unlabeled_truth(cfg, split)) == [1, 3, 4]
    assert ids(unlabeled_truth(cfg, Split(NAMES[0], 100.0, 1, (1, 2, 3), ()))) == [4]


def test_without_any_truth_the_keys_are_named(cfg):
    cfg.DATASETS.UNLABELED = NAMES[2:]
    with pytest.raises(ValueError, match=r"DATASETS\.SPLIT\.PERCENT below 100.*UNLABELED"):
        unlabeled_truth(cfg, Split(NAMES[0], 100.0, 1, (1, 2, 3), ()))


def pseudo(records: list[dict]) -> list[Instances]:
    """The true box in the resized picture (twice the size), and one that overlaps nothing."""
    assert all("annotations" not in record for record in records)
    boxes = torch.tensor([[20.0, 20, 100, 60], [150, 70, 190, 90]])
    found = Instances((100, 200), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([1, 1]))
    return [found for _ in records]


def run(hook: PseudoLabelQuality, start: int, stop: int) -> None:
    hook.trainer = SimpleNamespace(start_iter=start, max_iter=6, iter=start)
    hook.before_train()
    for hook.trainer.iter in range(start, stop):
        hook.after_step()


def test_lines_are_written_after_burn_in_and_not_twice(cfg, tmp_path):
    model = SimpleNamespace(burned_in=False, pseudo_label=pseudo)
    records = unlabeled_truth(cfg, Split(NAMES[0], 33.0, 1, (2,), (1, 3)))
    path = tmp_path / "run" / "pseudo_quality.json"
    hook = PseudoLabelQuality(model, records, cfg, period=2, path=path)
    run(hook, 0, 3)
    assert not path.exists()
    model.burned_in = True
    run(hook, 3, 6)
    run(hook, 5, 6)  # resumed from a checkpoint of the fifth step
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [4, 6]
    for line in lines:
        assert (line["images"], line["classes"]) == (2, ["a", "b"])
        # Two of four pseudo boxes are right; the crowds are no truth that could be missed.
        assert line["pseudo"]["precision"] == 0.5 and line["truth"]["recall"] == 1.0


def test_an_image_that_cannot_be_read_is_left_out(cfg, tmp_path, caplog):
    model = SimpleNamespace(burned_in=True, pseudo_label=pseudo)
    records = unlabeled_truth(cfg, Split(NAMES[0], 33.0, 1, (2,), (1, 3)))
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    records[0] = {**records[0], "file_name": str(broken)}
    path = tmp_path / "pseudo_quality.json"
    run(PseudoLabelQuality(model, records, cfg, period=0, path=path), 5, 6)
    assert json.loads(path.read_text())["images"] == 1
    assert f"{broken} cannot be used" in caplog.text and "left out" in caplog.text


def test_a_large_set_is_drawn_from_all_of_it(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "MAX_IMAGES", 10)
    records = [{"image_id": i} for i in range(1000)]
    hook = PseudoLabelQuality(None, records, cfg, period=0, path=tmp_path / "x.json")
    drawn = ids(hook.records)
    assert len(set(drawn)) == 10 and drawn == sorted(drawn) and max(drawn) > 100
    again = PseudoLabelQuality(None, records, cfg, period=0, path=tmp_path / "x.json")
    assert ids(again.records) == drawn
