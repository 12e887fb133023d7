"""The command line: files, summary and mistakes; the numbers are tested in test_statistics."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

REPO = Path(__file__).parents[2]
TABLES = {"instances_per_category", "categories_in_image", "instances_in_image", "instance_size"}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line; returns what it prints."""
    path = REPO / "tools" / "dataset_stats.py"
    spec = importlib.util.spec_from_file_location("dataset_stats_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["dataset_stats.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def data(tmp_path):
    """train.json: 4 images of 100 x 100, three leaves of 40 %, one rust of 1 %, one crowd;
    val.json: 2 images, one rust, no leaf class."""

    def box(image: int, category: int, side: int, **more: int) -> dict:
        return {"image_id": image, "category_id": category, "bbox": [0, 0, side, side], **more}

    def write(name: str, count: int, boxes: list[dict], names: list[str]) -> None:
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100}
                for i in range(count)
            ],
            "annotations": [{"id": i, **b} for i, b in enumerate(boxes, 1)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    leaves = [{**box(0, 1, 40), "bbox": [0, 0, 80, 50]} for _ in range(2)]
    others = [{**box(1, 1, 40), "bbox": [0, 0, 80, 50]}, box(0, 2, 10), box(2, 2, 90, iscrowd=1)]
    write("train", 4, leaves + others, ["leaf", "rust"])
    write("val", 2, [box(0, 1, 10)], ["rust"])
    return tmp_path


def lines(printed: str) -> dict[str, str]:
    """What follows the name in every line of the summary."""
    found = {}
    for line in printed.splitlines():
        name, _, values = line.strip().partition("   ")
        found[name] = " ".join(values.split())
    return found


def read(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.reader(f))


def test_files_and_summary(run, data):
    out = data / "new" / "out"
    printed = run("--json", data / "train.json", data / "val.json", "--output", out)
    assert {p.name for p in out.iterdir()} == {f"{t}.{e}" for t in TABLES for e in ("csv", "png")}
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            image.verify()
            assert image.format == "PNG"
    assert read(out / "instances_per_category.csv") == [
        ["category", "train", "val", "train share", "val share"],
        ["leaf", "3", "0", "0.750000", "0.000000"],
        ["rust", "1", "1", "0.250000", "1.000000"],
    ]
    assert read(out / "instances_in_image.csv")[1:] == [
        ["0", "2", "1", "0.500000", "0.500000"],
        ["1", "1", "1", "0.250000", "0.500000"],
        ["2", "0", "0", "0.000000", "0.000000"],
        ["3", "1", "0", "0.250000", "0.000000"],
    ]
    found = lines(printed)
    assert found["images"] == "4 2"
    assert found["without instances"] == "2 ( 50.0%) 1 ( 50.0%)"
    assert found["instances"] == "4 1"
    assert found["in an image, median"] == "0.5 0.5"
    assert found["in an image, most"] == "3 1"
    assert found["crowds, not counted here"] == "1 0"
    assert found["box up to 0.050 of image"] == "1 ( 25.0%) 1 (100.0%)"
    assert found["small, under 32 x 32 px"] == "1 ( 25.0%) 1 (100.0%)"
    assert found["medium, under 96 x 96 px"] == "3 ( 75.0%) 0 ( 0.0%)"
    assert found["leaf"] == "3 ( 75.0%) 0 ( 0.0%)"
    assert found["rust"] == "1 ( 25.0%) 1 (100.0%)"
    # A share of 5 % is never called 0.05 %.
    assert "0.05 %" not in printed and "0.05%" not in printed


def test_containers_and_bins(run, data):
    printed = run(
        *("--json", data / "train.json", "--names", "all", "--output", data / "out"),
        *("--containers", "leaf", "--bins", 0.25),
    )
    # 80 x 50 of 100 x 100 are 0.4, 10 x 10 are 0.01.
    sizes = {"": [1, 3, 0, 0], "_containers": [0, 3, 0, 0], "_contents": [1, 0, 0, 0]}
    for ending, counts in sizes.items():
        table = read(data / "out" / f"instance_size{ending}.csv")
        assert table[0][1] == "all"
        assert [row[0] for row in table[1:]] == ["0.250", "0.500", "0.750", "1.000"]
        assert [int(row[1]) for row in table[1:]] == counts
    found = lines(printed)
    assert found["box up to 0.250 of image"] == "1 ( 25.0%)"
    assert (found["containers"], found["contents"]) == ("0 ( 0.0%)", "1 (100.0%)")


def test_same_input_same_output(run, data):
    for name in ("a", "b"):
        run("--json", data / "train.json", data / "val.json", "--output", data / name)
    for path in (data / "a").iterdir():
        assert path.read_bytes() == (data / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "gone.json"], r"there is no file .*gone\.json"),
        (["--json", "broken.json"], r"broken\.json is not JSON"),
        (["--json", "train.json", "--names", "a", "b"], "--names: 2 names for 1 files"),
        (["--json", "train.json", "val.json", "--names", "a", "a"], r"--names: .* \['a'\]"),
        (["--json", "train.json", "train.json", "--names", "a", "b"], "a file is named twice"),
        (["--json", "train.json", "--containers", "lead"], r"--containers: no file has \['lead'\]"),
        (["--json", "train.json", "--bins", "5"], r"--bins is the width .* got 5"),
        (["--json", "bad.json"], r"bad\.json: .*unknown category ids: 9"),
    ],
)
def test_mistakes_are_told_without_traceback(run, data, monkeypatch, arguments, message):
    monkeypatch.chdir(data)
    content = json.loads((data / "train.json").read_text())
    content["annotations"][0]["category_id"] = 9
    (data / "bad.json").write_text(json.dumps(content))
    (data / "broken.json").write_text('{"images": [')
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(*arguments, "--output", data / "out")
    assert not (data / "out").exists()


@pytest.mark.parametrize("output", ["train.json", "train.json/deep"])
def test_output_is_checked_first(run, data, output):
    with pytest.raises(SystemExit, match=r"^error: --output: .*train\.json is a file"):
        run("--json", "gone.json", "--output", data / output)


def test_a_picture_that_cannot_be_written(run, data):
    (data / "out" / "instance_size.png").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"^error: .*instance_size\.png"):
        run("--json", data / "train.json", "--output", data / "out")
