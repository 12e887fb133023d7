"""The command line that finds everything wrong: one mistake after another, and real data."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

pytest.importorskip("detectron2")  # lists the pictures of folders without labels

from il_net.data.coco_file import read_coco, write_coco

REPO = Path(__file__).parents[2]
DATA = REPO.parent / "shared" / "data"
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line; returns the exit code and what it prints."""
    path = REPO / "tools" / "check_dataset.py"
    spec = importlib.util.spec_from_file_location("check_dataset_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["check_dataset.py", *map(str, arguments)])
        return module.main(), capsys.readouterr().out

    return call


def draw(path: Path, seed: int, size: tuple[int, int] = (100, 50)) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def coco(first: int) -> dict:
    """Two images, each with an object of either class."""
    images = [
        {"id": i, "file_name": f"{i}.png", "width": 100, "height": 50} for i in (first, first + 1)
    ]
    annotations = [
        {
            "id": 1 + k, "image_id": first + k // 2, "category_id": 1 + k % 2, "iscrowd": 0,
            "bbox": [10, 10, 20, 20], "area": 400, "segmentation": [SQUARE],
        }
        for k in range(4)
    ]  # fmt: skip
    categories = [{"id": 1, "name": "leaf"}, {"id": 2, "name": "rust"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two clean files, a.json and b.json, of four pictures; the folder is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    for i in range(1, 5):
        draw(tmp_path / "p" / f"{i}.png", i)
    write_coco("a.json", coco(1))
    write_coco("b.json", coco(3))
    return tmp_path


BOTH = ("--json", "a.json", "b.json", "--images", "p")


def change(name: str, edit: Callable[[dict], object]) -> None:
    data = json.loads(Path(name).read_text())
    edit(data)
    Path(name).write_text(json.dumps(data))


def test_clean_files(run, data):
    code, printed = run(*BOTH)
    assert code == 0
    assert printed.splitlines() == [
        *(
            f"{name}.json: 2 images (0 without annotations), 4 annotations (0 crowd), 2 "
            "categories, images in p"
            for name in "ab"
        ),
        "Compared:",
        "  nothing found",
        "errors: 0, warnings: 0, notes: 0",
    ]


def first_annotation(**changes: object) -> Callable[[dict], object]:
    return lambda data: data["annotations"][0].update(changes)


def first_image(**changes: object) -> Callable[[dict], object]:
    return lambda data: data["images"][0].update(changes)


def relabel(data: dict) -> None:
    for a in data["annotations"]:
        a["category_id"] = 1


def sideways(data: dict) -> None:
    exif = Image.Exif()
    exif[274] = 6
    with Image.open("p/1.png") as image:
        image.save("p/1.png", exif=exif)


MISTAKES = {
    "unreadable": (lambda d: Path("p/1.png").write_bytes(b""), 4, "1 images that can't be read"),
    "EXIF": (sideways, 4, "1 images recorded with their size before EXIF rotation"),
    "size": (first_image(width=99), 4, "1 images of another size than recorded"),
    "missing": (first_image(file_name="x.png"), 4, "1 image files missing"),
    "outside folder": (first_image(file_name="../a.png"), 4, "1 file names that leave"),
    "box outside": (first_annotation(bbox=[90, 10, 20, 20]), 3, "1 boxes partly outside"),
    "box empty": (first_annotation(bbox=[10, 10, 0, 20]), 3, "1 boxes of zero size"),
    "box NaN": (first_annotation(bbox=[10, 10, float("nan"), 20]), 4, "1 boxes that are not four"),
    "box wrong": (first_annotation(bbox=[0, 0, 40, 40]), 3, "1 boxes that are not those of"),
    "area wrong": (first_annotation(area=900), 3, "1 areas that are not those of the polygons"),
    "area zero": (first_annotation(area=0), 3, "1 annotations whose 'area' is not above 0"),
    "area": (lambda d: d["annotations"][0].pop("area"), 4, "1 annotations without a number 'area'"),
    "iscrowd": (lambda d: d["annotations"][0].pop("iscrowd"), 4, "without 'iscrowd'"),
    "polygon outside": (
        first_annotation(segmentation=[[*SQUARE, -2, 20]]), 3, "1 polygons that leave the image",
    ),
    "polygon short": (
        first_annotation(segmentation=[SQUARE, [1, 1, 2, 2]]), 3, "fewer than three points",
    ),
    "polygon odd": (
        first_annotation(segmentation=[SQUARE, SQUARE[1:]]), 3, "1 polygons with an odd number",
    ),
    "polygon NaN": (
        first_annotation(segmentation=[[*SQUARE[1:], float("nan")]]), 4, "1 segmentations that",
    ),
    "polygon empty": (
        first_annotation(segmentation=[SQUARE, [1, 1, 2, 2, 3, 3]]), 3, "1 polygons without area",
    ),
    "no polygon": (first_annotation(segmentation=[]), 3, "1 objects without 'segmentation'"),
    "file twice": (
        lambda d: d["images"].append({**d["images"][0], "id": 9}), 3,
        "1 files listed as several images",
    ),
    "object twice": (
        lambda d: d["annotations"].append({**d["annotations"][0], "id": 9}), 3,
        "1 annotations that repeat another one's image, class and box",
    ),
    "id 0": (first_annotation(id=0), 3, "1 annotations with id 0"),
    "category 0": (
        lambda d: d["categories"].append({"id": 0, "name": "x"}), 3, "1 categories with id 0",
    ),
    "category absent": (lambda d: d["categories"].append({"id": 3, "name": "x"}), 3,
        "1 categories that some files lack: 'x' is not in b.json"),
    "category unused": (lambda d: d["categories"].append({"id": 3, "name": "x"}), 3,
        "1 categories without objects: 'x'"),
    "category id": (lambda d: d["categories"][0].update(name="rust") or
        d["categories"][1].update(name="leaf"), 4,
        "name 'leaf' has id 2 in a.json, 1 in b.json"),
    "class": (relabel, 3, "1 classes that some files have no objects of (it can't be learned "
        "there, or not scored): 'rust' in a.json"),
    "box huge": (first_annotation(bbox=[10**400, 0, 1, 1]), 4, "1 boxes that are not four"),
    "area huge": (first_annotation(area=10**400), 4, "1 annotations without a number 'area'"),
    "size huge": (first_image(width=10**400), 4, "1 images without 'id', 'file_name' and pos"),
    "RLE broken": (
        first_annotation(segmentation={"size": [50, 100], "counts": [5, 5, 5]}), 4,
        "1 segmentations that are neither lists",
    ),
    "crossing": (
        first_annotation(segmentation=[[10, 10, 30, 30, 30, 10, 10, 30]], area=200), 0,
        "note: 1 objects whose outline crosses or touches itself",
    ),
    "copy": (
        lambda d: shutil.copy("p/2.png", "p/1.png"), 0,
        "note: 1 images that look like another one of the file (a split may part them, unless it "
        "keeps groups together): 2.png like 1.png (0 of 143 bits differ)",
    ),
    "same file": (
        first_image(file_name="./3.png"), 3, "1 files of b.json that are in a.json too",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_found(run, data, case):
    edit, code, expected = MISTAKES[case]
    change("a.json", edit)
    found, printed = run(*BOTH)
    assert expected in printed
    assert found == code


def test_no_json_at_all(run, data):
    Path("a.json").write_text('{"images": [')
    code, printed = run(*BOTH)
    assert code == 4 and "a.json is not JSON" in printed


def test_near_duplicates_on_either_side(run, data):
    with Image.open("p/2.png") as image:
        image.resize((77, 39)).convert("RGB").save("p/copy.jpg", quality=60)
    change("b.json", first_image(file_name="copy.jpg", width=77, height=39))
    code, printed = run(*BOTH)
    assert code == 3
    assert "1 images of b.json that look like one of a.json" in printed
    assert "copy.jpg like 2.png (" in printed
    assert run(*BOTH, "--no-pixels")[0] == 0


def test_folder_without_labels(run, data):
    code, printed = run("--images", "p")
    assert (code, printed) == (0, "p: 4 images without labels\nerrors: 0, warnings: 0, notes: 0\n")
    (data / "u" / "deep").mkdir(parents=True)
    draw(data / "u" / "deep" / "new.jpg", 9, (200, 100))
    draw(data / "u" / "copy.jpg", 4, (200, 100))
    (data / "u" / "broken.jpg").write_bytes(b"x")
    code, printed = run("--json", "a.json", "b.json", "--images", "p", "p", "u")
    assert code == 4
    assert "u: 3 images without labels" in printed
    assert "1 images that can't be read: broken.jpg: not an image" in printed
    assert "1 images of u that look like one of b.json" in printed
    assert "look like one of a.json" not in printed
    # Nothing is scored with pictures that have no labels.
    assert "(of a train file: nothing new to learn; of a val file: scores get too good)" in printed
    assert "an image on both sides of a split" not in printed


def test_fix_writes_copies_and_reports_what_is_left(run, data):
    change("a.json", first_annotation(id=0, bbox=[0, 0, 0, 0]))
    change("b.json", first_image(file_name="gone.png"))
    originals = [Path(name).read_text() for name in ("a.json", "b.json")]
    code, printed = run(*BOTH, "--fix", "out")
    assert code == 4
    assert "4 annotations numbered anew, from 1" in printed
    assert "b.json mended: nothing to do" in printed
    left = printed.split("Left for you:")[1]
    assert left.count("error:") == 1 and "warning:" not in left
    assert "1 image files missing from p: gone.png" in left
    assert [Path(name).read_text() for name in ("a.json", "b.json")] == originals
    assert read_coco("out/a.json") == coco(1)
    assert run("--json", "out/a.json", "--images", "p")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json", "x.json", "--images", "p"), "--json: there is no file x.json"),
        (("--json", "a.json", "--images", "x"), "--images: there is no folder x"),
        (("--json", "a.json", "a.json", "--images", "p"), "--json: a file is given twice"),
        (("--images", "p", "p"), "--images: a folder is given twice"),
        (("--images", "empty"), "there is no image in empty"),
        (("--images", "p", "--fix", "out"), "--fix mends files: give them with --json"),
        ((*BOTH, "--fix", "."), "--fix: a.json would replace an original"),
        (
            (*BOTH, "--fix", "bad.json"),
            "--fix: bad.json/a.json can't be written, because bad.json is a file",
        ),
        (("--json", "bad.json", "--images", "p", "--fix", "out"), "--fix: bad.json is not JSON"),
        (
            ("--json", "a.json", "b.json", "c.json", "--images", "p", "p"),
            "--images: give one folder for all 3 files of --json, or one for each; got 2",
        ),
        (
            ("--json", "a.json", "sub/a.json", "--images", "p", "--fix", "out"),
            "--fix: files of one name",
        ),
        (
            ("--json", "odd.json", "--images", "p", "--fix", "out"),
            "--fix: odd.json: 'annotations[0]' can't be written: Out of range float values are not",
        ),
    ],
)
def test_mistakes_in_the_call(run, data, arguments, message):
    for name in ("sub", "empty"):
        (data / name).mkdir()
    for name in ("c.json", "sub/a.json", "odd.json"):
        write_coco(name, coco(1))
    change("odd.json", first_annotation(score=float("nan")))
    Path("bad.json").write_text("[")
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert str(error.value).startswith(f"error: {message}")
    assert not list(data.rglob("*.partial"))


def test_real_data_is_clean(run):
    """But for the blood cells' pair that the README names."""
    found = {}
    for name in ("bccd", "coffee_leaf"):
        files = [DATA / name / "annotations" / f"instances_{s}.json" for s in ("train", "val")]
        if not all(map(Path.is_file, files)):
            pytest.skip(f"needs the public data set {name} in ../shared/data beside the repository")
        found[name] = run("--json", *files, "--images", DATA / name / "images")
    code, printed = found["coffee_leaf"]
    assert code == 0 and "errors: 0, warnings: 0, notes: 2" in printed
    for split in ("train", "val"):
        file = DATA / "coffee_leaf" / "annotations" / f"instances_{split}.json"
        outlines = [a["segmentation"] for a in json.loads(file.read_text())["annotations"]]
        rings = [[np.reshape(ring, (-1, 2)) for ring in outline] for outline in outlines]
        crossing = sum(not all(shapely.Polygon(r).is_valid for r in own) for own in rings)
        assert crossing >= 2 and f"note: {crossing} objects whose outline crosses" in printed
    code, printed = found["bccd"]
    assert code == 3 and "errors: 0, warnings: 1, notes: 0" in printed
    assert "BloodImage_00037.jpg like BloodImage_00038.jpg" in printed
