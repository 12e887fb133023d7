"""The command line: a picture for either kind of configuration, and mistakes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from il_net.curation.preview import CELL, View
from il_net.data.synthetic import generate

REPO = Path(__file__).parents[2]
SEMI = ["MODEL.META_ARCHITECTURE", "TeacherStudentRCNN", "DATASETS.SPLIT.PERCENT", "50"]


@pytest.fixture
def tool() -> ModuleType:
    path = REPO / "tools" / "visualize_data.py"
    spec = importlib.util.spec_from_file_location("visualize_data_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, monkeypatch, capsys, tmp_path):
    """Run the command line on generated pictures; returns the grid's path."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate(tmp_path, num_images=6, image_size=(64, 96))
    entry = {"name": "mine", "type": "coco", "json": "train.json", "images": "train"}
    config = {
        "DATASETS": {"REGISTER": [entry], "TRAIN": ["mine"], "TEST": []},
        "MODEL": {"MASK_ON": True, "ROI_HEADS": {"NUM_CLASSES": 0}},
        "INPUT": {"MIN_SIZE_TRAIN": [64]},
        "SOLVER": {"IMS_PER_BATCH": 2, "IMS_PER_BATCH_UNLABELED": 2},
        "SEED": 3,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    before = set(DatasetCatalog)

    def call(*opts: str, name: str = "grid.png", count: int = 6) -> Path:
        arguments = ["--config-file", tmp_path / "config.yaml", "--output", tmp_path / name]
        arguments += ["--count", count, *opts]
        monkeypatch.setattr("sys.argv", ["visualize_data.py", *map(str, arguments)])
        tool.main()
        assert f"{count} samples" in capsys.readouterr().out
        return tmp_path / name

    yield call
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)


def check_grid(path: Path, rows: int) -> None:
    """Four columns; pictures of 96 x 64 are drawn 480 x 320, below captions of 44 pixels."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (12 + 4 * (CELL + 12), 12 + rows * (44 + 320 + 12))
        assert np.asarray(image).std() > 20


def test_grid_of_training_samples(run):
    check_grid(run(), rows=2)


def test_grid_of_weak_and_strong_views(run):
    check_grid(run(*SEMI, count=4), rows=2)


@pytest.mark.parametrize("opts", [[], SEMI])
def test_same_seed_same_picture(run, opts):
    first = run(*opts, name="a.png", count=2).read_bytes()
    assert run(*opts, name="b.png", count=2).read_bytes() == first
    assert run(*opts, "SEED", "4", name="c.png", count=2).read_bytes() != first


def test_box_is_drawn_where_it_is(tool):
    box = {"bbox": [24, 16, 72, 48], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    view = View(np.full((64, 96, 3), 255, np.uint8), [box], "name\nfacts")
    picture, caption = tool.draw(view, ["leaf", "rust"])
    assert caption == "name\nfacts"
    assert picture.shape == (320, 480, 3)
    # Five times as large: its corners are (120, 80) and (360, 240).
    colored = np.ptp(picture.astype(int), axis=2) > 60
    ys, xs = np.nonzero(colored)
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == pytest.approx((120, 80, 360, 240), abs=8)
    blue = np.full((64, 96, 3), (255, 0, 0), np.uint8)  # BGR
    plain, _ = tool.draw(View(blue, [], ""), ["leaf", "rust"])
    assert (plain == (0, 0, 255)).all()  # RGB


@pytest.mark.parametrize(
    ("opts", "arguments", "message"),
    [
        ([], {"name": "grid.txt"}, "--output is the name of a picture"),
        ([], {"count": 0}, "--count is from 1 to 100, got 0"),
        (["DATASETS.TRAIN", "[none]"], {"name": "train.json/x.png"}, "--output: .* is a file"),
        (["DATASETS.TRAIN", "[none]"], {"name": "folder.png"}, "--output: .* is a folder"),
        (["DATASETS.TRAIN", "[none]"], {}, "none"),
        ([*SEMI[:2], "DATASETS.SPLIT.PERCENT", "100"], {}, "there are no unlabelled images"),
        (["SOLVER.IMS", "1"], {}, "there is no configuration key SOLVER.IMS"),
    ],
)
def test_mistakes_are_told_without_traceback(run, tmp_path, opts, arguments, message):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(*opts, **arguments)
    assert not list(tmp_path.glob("grid*"))
