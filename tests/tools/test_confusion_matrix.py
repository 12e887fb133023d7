"""The command line of the confusion matrix: from files, and from a model that is a stub."""

import csv
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import yaml

pytest.importorskip("detectron2")

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

REPO = Path(__file__).parents[2]
CATEGORIES = [{"id": 4, "name": "leaf"}, {"id": 9, "name": "rust"}, {"id": 11, "name": "a, b"}]


def record(image_id: int, category_id: int, x: int, **fields: object) -> dict:
    """An object of 10 x 10 pixels; 8 or more pixels further right it is another place."""
    polygon = [[x, 0, x + 10, 0, x + 10, 10, x, 10]]
    return {"image_id": image_id, "category_id": category_id, "bbox": [x, 0, 10, 10], "area": 100,
            "segmentation": polygon, **fields}  # fmt: skip


TRUTH = {
    "images": [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 40} for i in (1, 2)],
    "annotations": [
        record(1, 4, 0, id=1, iscrowd=0),
        record(1, 9, 20, id=2, iscrowd=0),
        record(2, 4, 0, id=3, iscrowd=0),
    ],
    "categories": CATEGORIES,
}
# Image 1: the leaf is found twice, rust is taken for a leaf. Image 2: rust where nothing is, and
# the leaf, not sure enough.
FOUND = [
    record(1, 4, 0, score=0.9),
    record(1, 4, 1, score=0.8),
    record(1, 4, 20, score=0.7),
    record(2, 9, 25, score=0.6),
    record(2, 4, 0, score=0.2),
]
HEADER = ["truth \\ predicted", "leaf", "rust", "a, b", "background"]
THESIS = [
    ["leaf", "2", "0", "0", "1"],
    ["rust", "1", "0", "0", "1"],
    ["a, b", "0", "0", "0", "0"],
    ["background", "0", "1", "0", "0"],
]
ONE_TO_ONE = [
    ["leaf", "1", "0", "0", "1"],
    ["rust", "1", "0", "0", "0"],
    ["a, b", "0", "0", "0", "0"],
    ["background", "1", "1", "0", "0"],
]


@pytest.fixture
def tool() -> ModuleType:
    """tools/confusion_matrix.py as a module."""
    path = REPO / "tools" / "confusion_matrix.py"
    spec = importlib.util.spec_from_file_location("confusion_matrix_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, monkeypatch, capsys, tmp_path) -> Callable[..., str]:
    """Run the command line in a folder with truth.json and results.json; returns what it prints."""
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    (tmp_path / "results.json").write_text(json.dumps(FOUND))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, output: str = "out") -> str:
        words = ["confusion_matrix.py", "--output", output, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        tool.main()
        return capsys.readouterr().out

    return call


FILES = ("--json", "truth.json", "--predictions", "results.json")


def table(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), THESIS),
        (("--masks",), THESIS),
        (("--matching", "one-to-one"), ONE_TO_ONE),
        (("--matching", "one-to-one", "--masks"), ONE_TO_ONE),
    ],
)
def test_from_files(run, tmp_path, options, expected):
    printed = run(*FILES, *options)
    assert table(tmp_path / "out" / "confusion_counts.csv") == [HEADER, *expected]
    picture = cv2.imread(str(tmp_path / "out" / "confusion_matrix.png"))
    assert min(picture.shape[:2]) > 400
    assert "3 true objects and 4 detections in 2 images" in printed
    assert "classes without truth, whose rows are empty: a, b" in printed


def test_shares(run, tmp_path):
    run(*FILES)
    assert table(tmp_path / "out" / "confusion_shares.csv") == [
        HEADER,
        ["leaf", "0.666667", "0.0", "0.0", "0.333333"],
        ["rust", "0.5", "0.0", "0.0", "0.5"],
        ["a, b", "", "", "", ""],
        ["background", "0.0", "1.0", "0.0", "0.0"],
    ]


def test_thresholds_are_used(run, tmp_path):
    # Without a lowest score, the leaf of image 2 is found; 9 of 11 pixels are an IoU of 0.82.
    run(*FILES, "--min-score", 0, "--iou", 0.9)
    counts = table(tmp_path / "out" / "confusion_counts.csv")
    assert counts[1] == ["leaf", "2", "0", "0", "0"]
    assert counts[4] == ["background", "1", "1", "0", "0"]


def test_output_is_deterministic(run, tmp_path):
    run(*FILES, output="a")
    run(*FILES, output="b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json", "gone.json", "--predictions", "results.json"), "no file gone.json"),
        ((*FILES[:3], "truth.json"), "truth.json: 3 detections without a 'score'"),
        ((*FILES, "--iou", 0), "lowest IoU is above 0"),
        ((*FILES, "--min-score", 30), "lowest score is from 0 to 1"),
        (("--config-file", "gone.yaml"), "--config-file.* gone.yaml"),
        (("--config-file", "", "MODEL.ROI_HEADS.NUM_CLASSES", 3), "DATASETS.TEST is empty"),
    ],
)
def test_mistakes_are_told_without_traceback(run, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(*arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        FILES[:2],
        ("--config-file", "", *FILES[2:]),
        (*FILES, "MODEL.WEIGHTS", "w"),
        ("--predictions", "results.json"),
        (*FILES, "--config-file", ""),
    ],
)
def test_arguments_that_do_not_go_together(run, arguments):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2


@pytest.mark.parametrize("output", ["truth.json", "truth.json/deep"])
def test_output_is_checked_first(run, output):
    with pytest.raises(SystemExit, match=r"^error: --output: .*truth\.json is a file"):
        run("--json", "gone.json", *FILES[2:], output=output)


# --- from a model ---


class Stub:
    """A model that sees FOUND: white pictures are image 1, black ones image 2."""

    def __init__(self, cfg: object) -> None:
        self.classes = list(cfg.DATASETS.CLASSES)

    def __call__(self, picture: np.ndarray) -> Instances:
        rows = [r for r in FOUND if r["image_id"] == (1 if picture.max() else 2)]
        height, width = picture.shape[:2]
        found = Instances((height, width))
        x = torch.tensor([float(r["bbox"][0]) for r in rows])
        found.pred_boxes = Boxes(torch.stack([x, x * 0, x + 10, x * 0 + 10], dim=1))
        found.scores = torch.tensor([r["score"] for r in rows])
        names = {c["id"]: c["name"] for c in CATEGORIES}
        found.pred_classes = torch.tensor(
            [self.classes.index(names[r["category_id"]]) for r in rows]
        )
        columns = torch.arange(width)
        inside = (columns >= x[:, None]) & (columns < x[:, None] + 10)
        found.pred_masks = inside[:, None, :] & (torch.arange(height) < 10)[:, None]
        return found


@pytest.fixture
def config(monkeypatch, tmp_path):
    """config.yaml that tests on truth.json, under a model that knows another class first."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr("il_net.evaluation.run_model.Predictor", Stub)
    (tmp_path / "p").mkdir()
    for name, value in (("1.png", 255), ("2.png", 0)):
        cv2.imwrite(str(tmp_path / "p" / name), np.full((20, 40, 3), value, np.uint8))
    entry = {"name": "mine", "type": "coco", "json": "truth.json", "images": "p"}
    classes = ["other", "leaf", "rust", "a, b"]
    content = {
        "DATASETS": {"REGISTER": [entry], "TEST": ["mine"], "CLASSES": classes},
        "MODEL": {"ROI_HEADS": {"NUM_CLASSES": 4}, "MASK_ON": True},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    before = set(DatasetCatalog)
    yield tmp_path / "config.yaml"
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)


@pytest.mark.parametrize("masks", [(), ("--masks",)])
def test_from_a_model(run, config, tmp_path, masks):
    printed = run("--config-file", config, *masks)
    found = table(tmp_path / "out" / "mine" / "confusion_counts.csv")
    # As from files, with a row and a column of the class that only the model knows.
    assert found[0] == [*HEADER[:4], "other", HEADER[4]]
    assert found.pop(4) == ["other", *"00000"]
    assert [[*row[:4], row[5]] for row in found[1:]] == THESIS
    assert "whose rows are empty: a, b, other" in printed


def test_from_a_model_with_training_sets(run, config, tmp_path):
    """The dataset then has the model's classes in the model's order."""
    content = yaml.safe_load(config.read_text())
    entry = dict(content["DATASETS"]["REGISTER"][0])
    entry.update(name="train", classes=content["DATASETS"]["CLASSES"])
    content["DATASETS"]["REGISTER"].append(entry)
    content["DATASETS"]["TRAIN"] = ["train"]
    config.write_text(yaml.safe_dump(content))
    run("--config-file", config)
    found = table(tmp_path / "out" / "mine" / "confusion_counts.csv")
    assert found[0] == [HEADER[0], "other", *HEADER[1:]]
    assert found.pop(1) == ["other", *"00000"]
    assert [[row[0], *row[2:]] for row in found[1:]] == THESIS


def test_model_whose_classes_are_unknown(run, config):
    with pytest.raises(SystemExit, match=r"DATASETS\.CLASSES is empty: use the config\.yaml"):
        run("--config-file", config, "DATASETS.CLASSES", "()")


def test_model_without_masks(run, config):
    with pytest.raises(SystemExit, match=r"--masks needs .* MODEL\.MASK_ON is False"):
        run("--config-file", config, "--masks", "MODEL.MASK_ON", "False")


def test_pictures_that_cannot_be_used(run, config, tmp_path, caplog):
    """Their objects are missed, up to a limit."""
    path = tmp_path / "p" / "2.png"
    for damage, problem in (
        (lambda: cv2.imwrite(str(path), np.zeros((40, 20, 3), np.uint8)), "is (40, 20) (height"),
        (lambda: path.write_text("no picture"), "can't be read as a picture"),
    ):
        damage()
        caplog.clear()
        run("--config-file", config)
        (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
        assert warning.startswith(f"{path} {problem}")
        assert "nothing was found (1 skipped so far, DATALOADER.MAX_UNREADABLE is 100)" in warning
        counts = table(tmp_path / "out" / "mine" / "confusion_counts.csv")
        # Of image 1 the leaf is found and rust is taken for one; of image 2 the leaf is missed.
        assert counts[1][:3] == ["leaf", "2", "0"] and counts[1][-1] == "1"
        assert counts[-1][1:] == ["0"] * 5
    with pytest.raises(SystemExit, match=r"^error: unreadable images: 1, .*2\.png can't be read"):
        run("--config-file", config, "DATALOADER.MAX_UNREADABLE", 0)
    (tmp_path / "p" / "1.png").write_text("no picture")
    with pytest.raises(SystemExit, match=r"^error: none of the images can be read: .*1\.png"):
        run("--config-file", config)
    (tmp_path / "p" / "1.png").unlink()
    with pytest.raises(SystemExit, match=r"(?s)^error: .*image files missing from .*1\.png"):
        run("--config-file", config)
