"""The command line of the converter: report, strictness, real data there and back, a large file."""

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

REPO = Path(__file__).parents[2]
COFFEE = REPO.parent / "shared" / "data" / "coffee_leaf"
TOOL = REPO / "tools" / "label_studio_to_coco.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line; returns what it prints."""
    spec = importlib.util.spec_from_file_location("label_studio_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["label_studio_to_coco.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return call


def region(number: int, label: str, points: list, size=(200, 100)) -> dict:
    return {
        "id": f"r{number}",
        "type": "polygonlabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": size[0],
        "original_height": size[1],
        "image_rotation": 0,
        "value": {"points": points, "closed": True, "polygonlabels": [label]},
    }


def task(number: int, image: str, regions: list) -> dict:
    annotation = {"id": number, "result": regions, "was_cancelled": False, "ground_truth": False}
    return {"id": number, "data": {"image": image}, "annotations": [annotation]}


TRIANGLE = [[10, 10], [60, 10], [60, 60]]


@pytest.fixture
def data(tmp_path):
    """An export of one picture with a sound region and one that reaches out."""
    (tmp_path / "p").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "p" / "a.jpg")
    regions = [
        region(1, "rust", TRIANGLE),
        region(2, "leaf", [[-10, 10], [60, 10], [60, 60]]),
    ]
    export = [task(1, "/data/upload/1/1a2b3c4d-a.jpg", regions)]
    (tmp_path / "export.json").write_text(json.dumps(export))
    return tmp_path


def arguments(folder: Path, *more: object) -> list:
    paths = {"--input": "export.json", "--images": "p", "--output": "out/clean.json"}
    return [*(x for key, name in paths.items() for x in (key, folder / name)), *more]


def test_report_and_file(run, data):
    printed = run(*arguments(data))
    assert (
        "warning: 1 regions that reach out of their picture (cut off): region 'r2' of task 1"
        in (printed)
    )
    assert "note: 1 pictures found without the prefix" in printed
    assert "JSON export: 1 pictures, 2 annotations, 2 classes" in printed
    assert "1 'leaf': 1" in printed
    clean = json.loads((data / "out" / "clean.json").read_text())
    assert list(clean) == ["info", "licenses", "images", "annotations", "categories"]
    assert str(data) not in json.dumps(clean)


def test_strict_writes_nothing(run, data, capsys):
    with pytest.raises(SystemExit, match=r"error: --strict: 1 kinds of problem"):
        run(*arguments(data, "--strict"))
    assert "error: 1 regions that reach out of their picture" in capsys.readouterr().out
    assert not (data / "out").exists()
    sound = [task(1, "a.jpg", [region(1, "rust", TRIANGLE)])]
    (data / "export.json").write_text(json.dumps(sound))
    run(*arguments(data, "--strict"))
    assert (data / "out" / "clean.json").exists()


def test_options(run, data):
    (data / "table.json").write_text(json.dumps({"leaf": 6, "rust": 13}))
    run(*arguments(data, "--categories", data / "table.json"))
    clean = json.loads((data / "out" / "clean.json").read_text())
    assert [a["category_id"] for a in clean["annotations"]] == [13, 6]
    run(*arguments(data, "--first-id", 0, "--ignore-labels", "leaf", "other"))
    clean = json.loads((data / "out" / "clean.json").read_text())
    assert clean["categories"] == [{"id": 0, "name": "rust"}]
    assert len(clean["annotations"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: (d / "export.json").write_text('[{"id": 1'),
            r"error: .*export\.json is not JSON",
        ),
        (lambda d: (d / "export.json").unlink(), "error: there is no file"),
        (lambda d: (d / "p").rename(d / "q"), "error: there is no image folder"),
        (lambda d: (d / "p" / "a.jpg").unlink(), "error: none of the 1 pictures .* --images"),
    ],
)
def test_mistakes_are_one_line(run, data, change, message):
    change(data)
    with pytest.raises(SystemExit, match=message) as caught:
        run(*arguments(data))
    assert "\n" not in str(caught.value)
    assert not (data / "out").exists()


def test_the_export_is_not_overwritten(run, data):
    with pytest.raises(SystemExit, match="--output: .* is the export itself"):
        run(*arguments(data)[:-1], data / "export.json")
    with pytest.raises(SystemExit, match="--output: .* is a folder; name a file"):
        run(*arguments(data)[:-1], data / "p")
    with pytest.raises(SystemExit, match="--output: .* can't be written, because .* is a file"):
        run(*arguments(data)[:-1], data / "export.json" / "clean.json")


def test_same_bytes_in_any_process(data):
    written = []
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, TOOL, *map(str, arguments(data))],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=REPO,
        )
        written.append((data / "out" / "clean.json").read_bytes())
    assert written[0] == written[1]


def test_perfect_detections_score_1(run, data):
    # With the ids from 0 of Label Studio's own COCO export it would be less.
    run(*arguments(data))
    truth = COCO(str(data / "out" / "clean.json"))
    detections = [{**a, "score": 0.9} for a in truth.dataset["annotations"]]
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes(detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1)


# --- real data ---


def to_label_studio(coco: dict) -> list:
    """The export that Label Studio would give of a COCO file with one polygon an object."""
    names = {c["id"]: c["name"] for c in coco["categories"]}
    regions: dict[int, list] = {image["id"]: [] for image in coco["images"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for a in coco["annotations"]:
        size = sizes[a["image_id"]]
        (ring,) = a["segmentation"]
        points = (np.array(ring).reshape(-1, 2) / size * 100).tolist()
        regions[a["image_id"]].append(region(a["id"], names[a["category_id"]], points, size))
    return [
        task(i["id"], f"/data/upload/1/0123abcd-{i['file_name']}", regions[i["id"]])
        for i in coco["images"][::-1]
    ]


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_data_there_and_back(run, tmp_path, split):
    if not COFFEE.is_dir():
        pytest.skip("needs the public data set coffee_leaf in ../shared/data beside the repository")
    coco = json.loads((COFFEE / "annotations" / f"instances_{split}.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps(to_label_studio(coco)))
    (tmp_path / "p").symlink_to(COFFEE / "images")
    table = {c["name"]: c["id"] for c in coco["categories"]}
    (tmp_path / "table.json").write_text(json.dumps(table))
    printed = run(*arguments(tmp_path, "--categories", tmp_path / "table.json"))
    back = json.loads((tmp_path / "out" / "clean.json").read_text())
    fields = ("id", "file_name", "width", "height")
    assert back["images"] == [{f: i[f] for f in fields} for i in coco["images"]]
    assert {c["name"]: c["id"] for c in back["categories"]} == table
    by_image = sorted(coco["annotations"], key=lambda a: a["image_id"])
    assert len(back["annotations"]) == len(by_image)
    mended = 0
    for old, new in zip(by_image, back["annotations"], strict=True):
        assert (new["image_id"], new["category_id"]) == (old["image_id"], old["category_id"])
        if [len(ring) for ring in new["segmentation"]] == [len(old["segmentation"][0])]:
            # 1/100 of a pixel, to which the output is rounded.
            np.testing.assert_allclose(new["segmentation"], old["segmentation"], atol=0.005001)
            # The originals' own boxes are those of drawn pixels, without thin ends.
            corners = np.array(old["segmentation"]).reshape(-1, 2)
            extent = [*corners.min(axis=0), *np.ptp(corners, axis=0)]
            np.testing.assert_allclose(new["bbox"], extent, atol=0.011)
        else:
            mended += 1
        assert mask_iou(old["segmentation"], new["segmentation"]) > 0.97
    # A few outlines of the originals cross themselves; nothing else is changed.
    told = [line for line in printed.splitlines() if line.startswith("warning")]
    assert len(told) == bool(mended)
    assert all(line.startswith(f"warning: {mended} outlines that cross") for line in told)
    assert mended < 0.01 * len(by_image)


def mask_iou(one: list, other: list, size=(384, 768)) -> float:
    rle = [mask_api.merge(mask_api.frPyObjects(rings, *size)) for rings in (one, other)]
    return float(mask_api.iou(rle[:1], rle[1:], [0])[0, 0])


# --- size ---


def test_five_thousand_regions(run, tmp_path):
    # By hand: 100,000 regions of 20 points (103 MB of JSON), 2,000 pictures: 20 s of one core and
    # 0.85 GB. A twentieth takes 1 s; slow machines have 15 times as long.
    rng = random.Random(0)
    (tmp_path / "p").mkdir()
    tasks = []
    for number in range(1, 51):
        Image.new("RGB", (64, 64)).save(tmp_path / "p" / f"{number}.png")
        regions = []
        for k in range(100):
            x, y = rng.uniform(10, 90), rng.uniform(10, 90)
            turn = [math.tau * i / 20 for i in range(20)]
            points = [[x + 8 * math.cos(t), y + 8 * math.sin(t)] for t in turn]
            regions.append(region(k, rng.choice(["leaf", "rust"]), points, (64, 64)))
        tasks.append(task(number, f"{number}.png", regions))
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    start = time.process_time()
    printed = run(*arguments(tmp_path))
    assert time.process_time() - start < 15
    assert "50 pictures, 5000 annotations" in printed
