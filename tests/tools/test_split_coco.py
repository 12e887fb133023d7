"""tools/split_coco.py: both commands from the command line, and a run that reads its file."""

import importlib.util
import json
import shlex
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
    path = REPO / "tools" / "split_coco.py"
    spec = importlib.util.spec_from_file_location("split_coco_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["split_coco.py", *map(str, arguments)])
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
            {"id": i, "file_name": f"{i}.jpg", "width": 20, "height": 10, "plant": f"p{i // 5}"}
            for i in range(1, 66)
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


def rows(printed: str) -> list[list[str]]:
    return [line.split() for line in printed.splitlines()]


# --- train-val ---


def split(run, data, *options: object) -> tuple[dict, dict, str]:
    """train.json, val.json and the printed text."""
    arguments = ("--json", data / "train.json", "--output", data / "parts", *options)
    printed = run("train-val", *arguments)
    parts = [json.loads((data / "parts" / f"{p}.json").read_text()) for p in ("train", "val")]
    return (*parts, printed)


def ids_of(part: dict) -> set[int]:
    return {image["id"] for image in part["images"]}


def test_train_and_val(run, data):
    train, val, printed = split(run, data, "--fraction", 0.8, "--seed", 7)
    assert (len(train["images"]), len(val["images"])) == (52, 13)
    assert ids_of(train) | ids_of(val) == set(range(1, 66))
    assert len(train["annotations"]) + len(val["annotations"]) == 60
    for part in (train, val):
        assert {a["image_id"] for a in part["annotations"]} <= ids_of(part)
        assert [c["name"] for c in part["categories"]] == ["leaf", "rust"]
        origin = part["info"]["split"]
        assert (origin["fraction"], origin["seed"]) == (0.8, 7)
        command = shlex.split(origin["command"])
        assert command[:4] == ["split_coco.py", "train-val", "--json", str(data / "train.json")]
    assert [p["info"]["split"]["part"] for p in (train, val)] == ["train", "val"]
    assert "52 of 65 images in train, 52 asked for" in printed
    counts = [sum(a["category_id"] == 2 for a in p["annotations"]) for p in (train, val)]
    rust = next(row for row in rows(printed) if row[0] == "rust")
    assert (rust[1], rust[2], rust[5], rust[6]) == (
        *(str(counts[0]), f"{10 * counts[0]:.1f}"),
        *(str(counts[1]), f"{10 * counts[1]:.1f}"),
    )
    # The command in the file makes the same files again; another seed makes others.
    texts = [(data / "parts" / f"{p}.json").read_bytes() for p in ("train", "val")]
    run(*command[1:])
    assert [(data / "parts" / f"{p}.json").read_bytes() for p in ("train", "val")] == texts
    assert ids_of(split(run, data, "--fraction", 0.8, "--seed", 8)[0]) != ids_of(train)


def test_stratified_parts(run, data):
    for seed in (1, 2, 3):
        options = ("--fraction", 0.8, "--seed", seed, "--stratified", "--drop-empty")
        train, val, printed = split(run, data, *options)
        assert "dropped 5 of 65 images: no annotations" in printed
        assert ["leaf", "40", "80.0", "%", "40", "10", "20.0", "%", "10"] in rows(printed)
        assert ["rust", "8", "80.0", "%", "8", "2", "20.0", "%", "2"] in rows(printed)
        assert ids_of(train) | ids_of(val) == set(range(1, 61))


@pytest.mark.parametrize(
    ("option", "key", "groups"),
    [
        (("--group-by", "plant"), lambda image: image["plant"], 14),
        (("--group-regex", r"^(\d)\d*"), lambda image: image["file_name"][0], 9),
        (("--group-regex", r"\d\."), lambda image: image["file_name"][-5], 10),
    ],
)
@pytest.mark.parametrize("stratified", [(), ("--stratified",)])
def test_groups_stay_together(run, data, option, key, groups, stratified):
    options = ("--fraction", 0.8, "--seed", 1, *option, *stratified)
    train, val, printed = split(run, data, *options)
    sides = [{key(image) for image in part["images"]} for part in (train, val)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0]) + len(sides[1]) == groups
    if groups == 14:
        # Plants of 4, of 1 and twelve times of 5 images: 51 = 10 * 5 + 1 is nearest to 52.
        assert "51 of 65 images in train, 52 asked for" in printed
        assert len(train["images"]) == 51


def test_mistakes_of_train_val(run, data):
    arguments = ["train-val", "--json", data / "train.json", "--seed", 1, "--output", data / "out"]
    with pytest.raises(SystemExit, match="error: --fraction must be above 0 and below 1"):
        run(*arguments, "--fraction", 80)
    with pytest.raises(SystemExit, match=r"error: --group-by leaf: .*None in image 1 \(1\.jpg\)"):
        run(*arguments, "--fraction", 0.8, "--group-by", "leaf")
    with pytest.raises(SystemExit, match=r"error: --output: .*train\.json would be overwritten"):
        run(*arguments[:-1], data / "p" / "..", "--fraction", 0.8)
    with pytest.raises(SystemExit, match=r"error: --output: .*train\.json is a file"):
        run(*arguments[:-1], data / "train.json", "--fraction", 0.8)
    with pytest.raises(SystemExit, match=r"error: --output: .*train\.json is a file"):
        run(*arguments[:-1], data / "train.json" / "deep", "--fraction", 0.8)
    (data / "taken" / "val.json").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"error: --output: .*val\.json is a folder"):
        run(*arguments[:-1], data / "taken", "--fraction", 0.8)
    with pytest.raises(SystemExit, match=r"error: there is no file gone\.json"):
        run("train-val", "--json", "gone.json", *arguments[3:], "--fraction", 0.8)
    assert not (data / "out").exists()


# --- labeled ---


def test_file_of_several_lists(run, data):
    printed = run(
        *("labeled", "--json", data / "train.json", "--percent", 5, 10, 50, "--seed", 1, 2),
        *("--output", data / "out" / "split.json"),
    )
    assert "10 %, seed 2: 6 of 60 images" in printed
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
    everything = [row for row in rows(printed) if row[0] == "all"]
    assert [(row[1], row[4], row[5], row[8]) for row in everything] == [
        (str(n), str(n), str(60 - n), str(60 - n)) for n in (3, 3, 6, 6, 30, 30)
    ]


def test_json_and_configuration_agree_and_a_run_reads_the_file(run, data):
    common = ("--percent", 20, "--seed", 3, "--output")
    from_json = run("labeled", "--json", data / "train.json", *common, data / "a.json")
    from_config = run("labeled", "--config-file", data / "config.yaml", *common, data / "b.json")
    assert from_json.splitlines()[:-1] == from_config.splitlines()[:-1]
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
    printed = run("labeled", *common, "--stratified")
    lists = json.loads((data / "s.json").read_text())["labeled"]
    assert [sum(i <= 10 for i in lists[p]["1"]) for p in ("10.0", "50.0")] == [1, 5]
    assert ["rust", "1", "10.0", "%", "1", "9", "90.0", "%", "9"] in rows(printed)
    assert ["leaf", "25", "50.0", "%", "25", "25", "50.0", "%", "25"] in rows(printed)
    run("labeled", *common, "--nested")
    lists = json.loads((data / "s.json").read_text())["labeled"]
    assert set(lists["10.0"]["1"]) < set(lists["50.0"]["1"])


@pytest.mark.parametrize("counts", ["zzzzzz", [5, 5, 5], [-5, 205], 3])
def test_masks_do_not_matter(run, data, counts):
    """Whose objects are where is enough; Detectron2's reader stumbles on broken masks."""
    common = ("--percent", 20, "--seed", 3, "--output")
    content = json.loads((data / "train.json").read_text())
    expected = run("labeled", "--json", data / "train.json", *common, data / "a.json")
    content["annotations"][0]["segmentation"] = {"size": [10, 20], "counts": counts}
    content["annotations"].append({**content["annotations"][0], "id": 99, "image_id": 61})
    content["annotations"][-1]["iscrowd"] = 1
    (data / "train.json").write_text(json.dumps(content))
    printed = run("labeled", "--json", data / "train.json", *common, data / "b.json")
    assert printed.splitlines()[:-1] == expected.splitlines()[:-1]
    assert (data / "a.json").read_text() == (data / "b.json").read_text()


def test_mistakes_of_labeled(run, data):
    output = ("--output", data / "s.json")
    with pytest.raises(SystemExit, match=r"error: there is no file gone\.json"):
        run("labeled", "--json", "gone.json", "--percent", 10, *output)
    with pytest.raises(SystemExit, match=r"error: --percent must be above 0"):
        run("labeled", "--json", data / "train.json", "--percent", 0, *output)
    with pytest.raises(SystemExit, match=r"error: --output: .* is a folder; name a file"):
        run("labeled", "--json", data / "train.json", "--percent", 10, "--output", data / "p")
    with pytest.raises(SystemExit, match=r"error: --output: .*train\.json is a file"):
        run(
            *("labeled", "--json", "gone.json", "--percent", 10),
            *("--output", data / "train.json" / "s.json"),
        )
    content = json.loads((data / "train.json").read_text())
    (data / "bare.json").write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(SystemExit, match=r"error: --json: no image of .*bare\.json has annot"):
        run("labeled", "--json", data / "bare.json", "--percent", 10, *output)
    assert not (data / "s.json").exists()
