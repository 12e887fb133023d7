"""Writing a split file from a COCO file or a configuration, and reading it in a run."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.data.split import make_split, train_records

REPO = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line; returns what it prints."""
    path = REPO / "tools" / "split_dataset.py"
    spec = importlib.util.spec_from_file_location("split_dataset_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["split_dataset.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def data(tmp_path, monkeypatch):
    """60 images with a box, of which 10 show class 2 and the others class 1; 5 images without."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "p").mkdir()
    box = {"bbox": [0, 0, 4, 3], "area": 12, "iscrowd": 0}
    data = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 20, "height": 10} for i in range(1, 66)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 2 if i <= 10 else 1, **box}
            for i in range(1, 61)
        ],
        "categories": [{"id": 1, "name": "leaf"}, {"id": 2, "name": "rust"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(data))
    config = {
        "DATASETS": {
            "REGISTER": [{"name": "mine", "type": "coco", "json": "train.json", "images": "p"}],
            "TRAIN": ["mine"],
        },
        "MODEL": {"ROI_HEADS": {"NUM_CLASSES": 0}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    before = set(DatasetCatalog)
    yield tmp_path
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)


def test_file_of_several_lists(run, data):
    printed = run(
        *("--json", data / "train.json", "--percent", 5, 10, 50, "--seed", 1, 2),
        *("--output", data / "out" / "split.json"),
    )
    assert "10 %: 6 of 60 images, seeds [1, 2]" in printed
    written = json.loads((data / "out" / "split.json").read_text())
    assert (written["dataset"], written["unit"], written["total"]) == ("train", "image_id", 60)
    sizes = {
        p: {s: len(ids) for s, ids in lists.items()} for p, lists in written["labeled"].items()
    }
    assert sizes == {
        "5.0": {"1": 3, "2": 3},
        "10.0": {"1": 6, "2": 6},
        "50.0": {"1": 30, "2": 30},
    }
    for lists in written["labeled"].values():
        assert lists["1"] != lists["2"]
        assert all(set(ids) <= set(range(1, 61)) for ids in lists.values())


def test_json_and_configuration_agree_and_a_run_reads_the_file(run, data):
    common = ("--percent", 20, "--seed", 3, "--output")
    run("--json", data / "train.json", *common, data / "a.json")
    run("--config-file", data / "config.yaml", *common, data / "b.json")
    a, b = (json.loads((data / name).read_text()) for name in ("a.json", "b.json"))
    assert {**a, "dataset": "mine"} == b
    opts = ["DATASETS.SPLIT.FILE", "a.json", "DATASETS.SPLIT.PERCENT", "20.0"]
    cfg = load_config(str(data / "config.yaml"), [*opts, "DATASETS.SPLIT.SEED", "3"])
    register_datasets(cfg)
    split = make_split(cfg, train_records(cfg))
    assert list(split.labeled) == a["labeled"]["20.0"]["3"]
    # Without a file, PERCENT and SEED draw the very same images.
    cfg.DATASETS.SPLIT.FILE = ""
    assert make_split(cfg, train_records(cfg)) == split


def test_stratified_and_nested(run, data):
    common = ("--json", data / "train.json", "--percent", 10, 50, "--output", data / "s.json")
    run(*common, "--stratified")
    lists = json.loads((data / "s.json").read_text())["labeled"]
    assert [sum(i <= 10 for i in lists[p]["1"]) for p in ("10.0", "50.0")] == [1, 5]
    run(*common, "--nested")
    lists = json.loads((data / "s.json").read_text())["labeled"]
    assert set(lists["10.0"]["1"]) < set(lists["50.0"]["1"])


def test_mistakes_are_told_without_traceback(run, data):
    output = ("--output", data / "s.json")
    with pytest.raises(SystemExit, match=r"error: --json: there is no file gone\.json"):
        run("--json", "gone.json", "--percent", 10, *output)
    with pytest.raises(SystemExit, match=r"error: DATASETS\.SPLIT\.PERCENT must be above 0"):
        run("--json", data / "train.json", "--percent", 0, *output)
    (data / "empty.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(SystemExit, match=r"error: --json: no image of .*empty\.json has annot"):
        run("--json", data / "empty.json", "--percent", 10, *output)
    assert not (data / "s.json").exists()
