"""Prediction without a trained model: inputs, colours, COCO records, and what is written where."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from il_net.config import load_config
from il_net.predict import Predictor, class_colors, draw, find_inputs, read_frames, to_coco

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/predict.py as a module."""
    spec = importlib.util.spec_from_file_location("predict_tool", REPO / "tools" / "predict.py")
    module = sys.modules["predict_tool"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["predict_tool"]


class Probe(nn.Module):
    """Remembers its input; finds one box of class 1 in the whole picture's top left quarter."""

    def forward(self, inputs: list[dict]) -> list[dict]:
        (self.seen,) = inputs
        height, width = self.seen["height"], self.seen["width"]
        found = Instances((height, width))
        found.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, width / 2, height / 2]]))
        found.scores = torch.tensor([0.75])
        found.pred_classes = torch.tensor([1])
        masks = torch.zeros(1, height, width, dtype=torch.bool)
        masks[:, : height // 2, : width // 2] = True
        found.pred_masks = masks
        return [{"instances": found}]


def make_predictor(side: int = 50, channels: str = "RGB") -> tuple[Predictor, Probe]:
    cfg = load_config("", ["INPUT.FORMAT", channels, "INPUT.MIN_SIZE_TEST", str(side)])
    probe = Probe()
    return Predictor(cfg, probe), probe


# ---- the model's input ----


@pytest.mark.parametrize(("channels", "expected"), [("RGB", [30, 20, 10]), ("BGR", [10, 20, 30])])
def test_channels_are_in_the_order_of_the_configuration(channels, expected):
    predictor, probe = make_predictor(channels=channels)
    predictor(np.full((50, 60, 3), (10, 20, 30), np.uint8))  # blue, green, red
    assert probe.seen["image"][:, 0, 0].tolist() == expected


def test_picture_is_resized_by_its_short_side_and_its_size_is_told():
    predictor, probe = make_predictor(side=50)
    instances = predictor(np.zeros((100, 160, 3), np.uint8))
    assert probe.seen["image"].shape == (3, 50, 80)
    assert (probe.seen["height"], probe.seen["width"]) == (100, 160)
    assert instances.pred_boxes.tensor.tolist() == [[0, 0, 80, 50]]
    assert not probe.training


# ---- COCO records ----


def test_coco_record():
    predictor, _ = make_predictor()
    (record,) = to_coco(predictor(np.zeros((40, 60, 3), np.uint8)), image_id=7)
    assert record["image_id"] == 7
    assert record["category_id"] == 2  # class index 1
    assert record["bbox"] == [0, 0, 30, 20]  # x, y, width, height
    assert record["score"] == 0.75
    assert record["area"] == 600
    mask = coco_mask.decode(record["segmentation"])
    assert mask.shape == (40, 60)
    assert mask[:20, :30].all()
    assert mask.sum() == 600
    json.dumps(record)


def test_coco_record_has_the_masks_own_score_where_there_is_one():
    predictor, _ = make_predictor()
    instances = predictor(np.zeros((40, 60, 3), np.uint8))
    (record,) = to_coco(instances, image_id=7)
    assert "mask_score" not in record
    instances.mask_scores = torch.tensor([0.375])
    (record,) = to_coco(instances, image_id=7)
    assert (record["score"], record["mask_score"]) == (0.75, 0.375)
    json.dumps(record)


def test_coco_record_without_masks_and_without_detections():
    instances = Instances((10, 20))
    instances.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
    instances.scores = torch.tensor([0.5])
    instances.pred_classes = torch.tensor([0])
    (record,) = to_coco(instances, image_id=1)
    assert record["area"] == 18
    assert "segmentation" not in record
    assert to_coco(instances[:0], image_id=1) == []


# ---- inputs ----


OUT = Path("not there")


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("b.JPG", "a.png", "sub/c.jpeg", "sub/film.MP4", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def names(paths: list[Path], root: Path) -> list[str]:
    return [p.relative_to(root).as_posix() for p in paths]


def test_folder_gives_pictures_and_videos_to_the_bottom(folder):
    found = names(find_inputs(str(folder), OUT), folder)
    assert found == ["a.png", "b.JPG", "sub/c.jpeg", "sub/film.MP4"]


def test_single_file_and_glob(folder, monkeypatch):
    assert names(find_inputs(str(folder / "a.png"), OUT), folder) == ["a.png"]
    assert names(find_inputs(str(folder / "*.png"), OUT), folder) == ["a.png"]
    assert names(find_inputs(str(folder / "**" / "*.jpeg"), OUT), folder) == ["sub/c.jpeg"]
    monkeypatch.chdir(folder)
    assert [p.as_posix() for p in find_inputs("sub/*.jpeg", OUT)] == ["sub/c.jpeg"]


def test_glob_over_everything_leaves_out_what_is_no_picture(folder):
    assert "notes.txt" not in names(find_inputs(str(folder / "*"), OUT), folder)


@pytest.mark.parametrize("pattern", ["gone.png", "*.gif", "empty"])
def test_nothing_there(folder, pattern):
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="--input"):
        find_inputs(str(folder / pattern), OUT)


def test_file_that_is_no_video(folder):
    with pytest.raises(ValueError, match="film.MP4"):
        list(read_frames(folder / "sub" / "film.MP4"))


# ---- drawing ----


def test_colours_differ_and_stay():
    colors = class_colors(20)
    assert colors.shape == (20, 3)
    assert len({tuple(c) for c in colors.tolist()}) == 20
    assert np.array_equal(colors[:5], class_colors(5))  # a class keeps its colour
    distances = np.abs(colors[1:].astype(int) - colors[:-1]).sum(axis=1)
    assert distances.min() > 60  # neighbours are easy to tell apart
    assert class_colors(0).shape == (0, 3)


def test_drawing_keeps_size_and_channel_order():
    predictor, _ = make_predictor()
    image = np.zeros((100, 120, 3), np.uint8)
    image[:, :, 0] = 200  # blue
    drawn = draw(image, predictor(image), ["leaf", "spot"])
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert np.abs(drawn[60:, 70:].astype(int) - image[60:, 70:]).max() <= 3  # outside the box
    assert np.abs(drawn[:40, :50].astype(int) - image[:40, :50]).mean() > 10  # inside


# ---- what is written ----


def write(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((40, 60, 3), value, np.uint8))
    return path


def make_writer(tool: ModuleType, output: Path):
    output.mkdir(exist_ok=True)
    return tool.Writer(make_predictor()[0], ["leaf", "spot"], output, 0.5)


def test_pictures_of_one_name_do_not_overwrite_each_other(tool, tmp_path):
    """leaf.jpg and leaf.png of one folder are two pictures."""
    writer = make_writer(tool, tmp_path / "out")
    for name in ("leaf.jpg", "leaf.png"):
        writer.picture(write(tmp_path / name), Path(name))
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_pictures_of_a_name_with_dots_do_not_overwrite_each_other(tool, tmp_path):
    writer = make_writer(tool, tmp_path / "out")
    for name in ("leaf.1.png", "leaf.2.png"):
        writer.picture(write(tmp_path / name), Path(name))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"leaf.1.png", "leaf.2.png"}


def run(tool: ModuleType, monkeypatch, source: Path, output: Path) -> int | str | None:
    """The tool's main with a stub for the model; returns the exit code."""
    monkeypatch.setattr(tool, "Predictor", lambda cfg: make_predictor()[0])
    arguments = ["--input", str(source), "--output", str(output)]
    options = ["DATASETS.CLASSES", "('leaf', 'spot')"]
    monkeypatch.setattr(sys, "argv", ["predict.py", "--config-file", "", *arguments, *options])
    try:
        return tool.main()
    except SystemExit as error:
        return error.code


def test_input_pictures_are_not_overwritten(tool, monkeypatch, tmp_path):
    """--output equal to --input: refused, or written under other names."""
    source = write(tmp_path / "leaf.jpg")
    before = source.read_bytes()
    run(tool, monkeypatch, tmp_path, tmp_path)
    assert source.read_bytes() == before


def test_second_run_into_a_subfolder_of_the_input_finds_the_same(tool, monkeypatch, tmp_path):
    write(tmp_path / "leaf.jpg")
    for _ in range(2):
        assert run(tool, monkeypatch, tmp_path, tmp_path / "found") == 0
        content = json.loads((tmp_path / "found" / "detections.json").read_text())
        assert [image["file_name"] for image in content["images"]] == ["leaf.jpg"]


def test_glob_keeps_pictures_of_one_name_apart(tool, monkeypatch, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "in" / name / "leaf.jpg")
    assert run(tool, monkeypatch, tmp_path / "in" / "*" / "*.jpg", tmp_path / "out") == 0
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [i["file_name"] for i in content["images"]] == ["a/leaf.jpg", "b/leaf.jpg"]
    assert (tmp_path / "out" / "b" / "leaf.jpg").is_file()


def test_ids_count_over_all_pictures(tool, monkeypatch, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        write(tmp_path / "in" / name)
    assert run(tool, monkeypatch, tmp_path / "in", tmp_path / "out") == 0
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert [(a["id"], a["image_id"]) for a in content["annotations"]] == [(1, 1), (2, 2)]
    assert content["categories"] == [{"id": 1, "name": "leaf"}, {"id": 2, "name": "spot"}]


def test_exit_code_says_that_something_was_skipped(tool, monkeypatch, capsys, tmp_path):
    write(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "b.jpg").write_text("no picture")
    (tmp_path / "in" / "c.mp4").write_text("no video")
    assert run(tool, monkeypatch, tmp_path / "in", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "b.jpg" in captured.err
    assert "c.mp4" in captured.err
    counts = "1 detections in 1 pictures, 1 of them drawn (score 0.5 or more), 2 inputs skipped"
    assert counts in captured.out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.jpg", "detections.json"}
