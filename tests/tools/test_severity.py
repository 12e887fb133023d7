"""The command line of the severity report."""

import csv
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest

pytest.importorskip("detectron2")

REPO = Path(__file__).parents[2]
CATEGORIES = [{"id": i, "name": n} for i, n in enumerate(("leaf", "black rot", "rust"), start=1)]
IMAGES = [{"id": i, "file_name": f"{i}.jpg", "height": 10, "width": 20} for i in (1, 2)]


def square(image_id: int, category_id: int, columns: int, **fields: object) -> dict:
    """An object that fills the first columns of the image, 10 pixels each."""
    pixels = np.zeros((10, 20), np.uint8, order="F")
    pixels[:, :columns] = 1
    rle = mask_util.encode(pixels)
    mask = {"size": [10, 20], "counts": rle["counts"].decode()}
    box = [0, 0, columns, 10]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "segmentation": mask,
            **fields}  # fmt: skip


# Image 1: 20 % rust, 30 % predicted. Image 2: a leaf whose prediction is not sure enough.
TRUTH = [square(1, 1, 10, id=1), square(1, 3, 2, id=2), square(2, 1, 10, id=3)]
FOUND = [
    square(1, 1, 10, score=0.9),
    square(1, 3, 3, score=0.8),
    square(1, 3, 9, score=0.1),
    square(2, 1, 10, score=0.2),
]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path) -> Callable[..., str]:
    """Run the command line in a folder with truth.json, results.json and detections.json."""
    spec = importlib.util.spec_from_file_location("severity_tool", REPO / "tools" / "severity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    document = {"images": IMAGES, "categories": CATEGORIES}
    numbered = [{"id": i, **record} for i, record in enumerate(FOUND, start=1)]
    for name, content in (
        ("truth.json", {**document, "annotations": TRUTH}),
        ("results.json", FOUND),
        ("detections.json", {**document, "annotations": numbered}),
        ("boxes.json", [{**record, "segmentation": []} for record in FOUND]),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, output: str = "out/severity.csv") -> str:
        words = ["severity.py", *map(str, arguments), "--output", output]
        monkeypatch.setattr("sys.argv", words)
        module.main()
        return capsys.readouterr().out

    return call


def written(tmp_path: Path) -> list[dict]:
    with (tmp_path / "out" / "severity.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("predictions", ["results.json", "detections.json"])
def test_against_truth(run, tmp_path, predictions):
    printed = run("--json", "truth.json", "--predictions", predictions, "--group", "leaf=rust")
    first, second = written(tmp_path)
    assert first == {
        "image_id": "1", "file_name": "1.jpg", "container": "leaf", "content": "rust",
        "truth": "0.2", "predicted": "0.3", "error": "0.1",
    }  # fmt: skip
    assert (second["truth"], second["predicted"], second["error"]) == ("0.0", "", "")
    row = next(line for line in printed.splitlines() if "rust" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["leaf", "rust", "1", "30.00", "20.00", "10.00", "1", "10.00"]
    assert "images left out because their leaf was not found: 1" in printed
    assert "nan" not in printed.lower()


def test_without_truth(run, tmp_path):
    printed = run("--predictions", "detections.json", "--group", "leaf=rust,black rot")
    rows = written(tmp_path)
    assert [(r["content"], r["truth"], r["predicted"]) for r in rows] == [
        ("rust", "", "0.3"), ("black rot", "", "0.0"), ("rust", "", ""), ("black rot", "", ""),
    ]  # fmt: skip
    assert "truth" not in printed
    assert "images without leaf: 1" in printed


def test_two_groups_and_another_score(run, tmp_path):
    run(
        *("--predictions", "detections.json", "--min-score", 0.1),
        *("--group", "leaf=rust", "--group", "rust=black rot"),
    )
    assert [(r["container"], r["predicted"]) for r in written(tmp_path)] == [
        ("leaf", "0.9"), ("rust", "0.0"), ("leaf", "0.0"), ("rust", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--predictions", "gone.json", "--group", "leaf=rust"), "no file gone.json"),
        (("--predictions", "results.json", "--group", "leaf=rust"), "give the truth"),
        (("--predictions", "detections.json", "--group", "leaf"), "--group is .* got 'leaf'"),
        (("--predictions", "detections.json", "--group", "leaf=rust,"), "--group is"),
        (("--predictions", "detections.json", "--group", "leaf=ruts"), "did you mean 'rust'"),
        (
            ("--predictions", "boxes.json", "--json", "truth.json", "--group", "leaf=rust"),
            r"boxes.json: annotation 1 \(image 1\): masks are needed here",
        ),
    ],
)
def test_mistakes_are_told_without_traceback(run, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(*arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", [".", "truth.json/severity.csv"])
def test_output_is_checked_first(run, output):
    with pytest.raises(SystemExit, match=r"^error: --output: .*(is a folder|is a file)"):
        run("--predictions", "gone.json", "--group", "leaf=rust", output=output)


def test_help_explains_the_table(run, capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert '"affected" counts the pictures' in text and '"error of affected" is' in text
    assert "--contents" not in text
