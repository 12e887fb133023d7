"""The records of a COCO file are those of Detectron2's own loader."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import pycocotools.mask as mask_util
from detectron2.data.datasets import load_coco_json

from il_net.data.coco_records import coco_records

DATA = Path(__file__).parents[4] / "shared" / "data"
IDS = {1: 1, 4: 4, 7: 7}
TRIANGLE, LINE, ODD = [1, 1, 5, 1.5, 5, 6], [1, 1, 5, 1], [1, 1, 5, 1, 5, 6, 7]


def rle(compressed: bool) -> dict:
    mask = np.zeros((8, 9), dtype=np.uint8)
    mask[2:5, 3:7] = 1
    if compressed:
        encoded = mask_util.encode(np.asfortranarray(mask))
        return {"size": [8, 9], "counts": encoded["counts"].decode()}
    # Column by column: 3 columns of 8 and 2 pixels are outside, then 4 times 3 inside.
    return {"size": [8, 9], "counts": [26, 3, 5, 3, 5, 3, 5, 3, 8 * 2 + 3]}


SEGMENTATIONS = {
    "polygon": [TRIANGLE],
    "some polygons too short": [LINE, TRIANGLE, ODD],
    "all polygons too short": [LINE, ODD],
    "empty": [],
    "null": None,
    "RLE": rle(False),
    "compressed RLE": rle(True),
    "no polygons in the list": [[]],
}


def annotation(number: int, image_id: int | str, **fields: object) -> dict:
    box = [number % 5, 2, 3.5, 4]
    own = {"id": number, "image_id": image_id, "category_id": 4, "bbox": box, "area": 14.0}
    return {**own, "iscrowd": 0, **fields}


def make(annotations: list[dict], image_ids: tuple = (30, 2, 11)) -> dict:
    return {
        "info": {},
        "images": [
            {"id": i, "file_name": f"sub/{i}.jpg", "width": 9, "height": 8, "license": 1}
            for i in image_ids
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in IDS],
    }


def both(tmp_path: Path, data: dict) -> tuple[list[dict], list[dict]]:
    json_file = tmp_path / "data.json"
    json_file.write_text(json.dumps(data))
    expected = load_coco_json(str(json_file), "root")
    return coco_records(copy.deepcopy(data), str(json_file), "root", IDS), expected


@pytest.mark.parametrize("kind", SEGMENTATIONS)
@pytest.mark.parametrize("crowd", [0, 1])
def test_segmentations(tmp_path, kind, crowd):
    first = annotation(1, 2, segmentation=SEGMENTATIONS[kind], iscrowd=crowd)
    ours, expected = both(tmp_path, make([first, annotation(2, 2)]))
    assert ours == expected
    kept = [a.get("segmentation") for r in ours for a in r["annotations"]]
    assert len(kept) == (1 if kind in ("all polygons too short", "no polygons in the list") else 2)


def test_a_file_of_everything(tmp_path):
    """Ids in any order, fields that are missing, annotations of another image, no annotations."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(1, 300):
        kind = list(SEGMENTATIONS)[number % len(SEGMENTATIONS)]
        own = annotation(
            number, int(rng.choice([30, 2, 11, 999])), category_id=int(rng.choice([1, 7]))
        )
        own["segmentation"] = SEGMENTATIONS[kind]
        if number % 3 == 0:
            own["keypoints"] = [[], [1, 2, 2, 3.5, 4, 0]][number % 2]
        for field in ("segmentation", "iscrowd", "area", "bbox"):
            if rng.random() < 0.2:
                del own[field]
        if rng.random() < 0.2:
            own["ignore"] = 0
        found.append(own)
    rng.shuffle(found)
    ours, expected = both(tmp_path, make(found, (30, 2, 11, 5)))
    assert ours == expected
    assert [r["image_id"] for r in ours] == [2, 5, 11, 30]
    assert ours[1]["annotations"] == []
    assert [list(r) for r in ours] == [list(r) for r in expected]


def test_ids_that_are_strings_and_lists_that_are_missing(tmp_path):
    ours, expected = both(tmp_path, make([annotation(1, "b")], ("b", "a")))
    assert ours == expected
    data = make([])
    del data["annotations"]
    ours, expected = both(tmp_path, data)
    assert ours == expected
    assert len(ours) == 3


def test_category_ids_become_classes():
    data = make([annotation(1, 2, category_id=7), annotation(2, 2, category_id=1)])
    records = coco_records(data, "data.json", "root", {1: 0, 7: 1})
    assert [a["category_id"] for a in records[0]["annotations"]] == [1, 0]
    assert [a["category_id"] for a in data["annotations"]] == [7, 1]  # the file's are left alone


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([annotation(1, 2, ignore=1)], "image 2 has 'ignore' set"),
        ([annotation(1, 11, bbox=[])], "image 11 has an empty 'bbox'"),
        ([annotation(1, 2, category_id=5)], r"image 2 has category_id 5, known are \[1, 4, 7\]"),
        (
            [annotation(n, 2) for n in (1, 3, 7)] + [annotation(n, 11) for n in (3, 1)],
            r"2 annotation ids are used twice: \[1, 3\]",
        ),
    ],
)
def test_what_detectron2_refuses_is_named(annotations, message):
    with pytest.raises(ValueError, match=rf"my\.json: .*{message}"):
        coco_records(make(annotations), "my.json", "root", IDS)


def test_minival_may_use_ids_twice(tmp_path):
    """As Detectron2 lets COCO's own faulty files pass, by their name."""
    data = make([annotation(1, 2), annotation(1, 11)])
    json_file = tmp_path / "minival.json"
    json_file.write_text(json.dumps(data))
    assert coco_records(data, str(json_file), "root", IDS) == load_coco_json(str(json_file), "root")


@pytest.mark.parametrize("name", ["coffee_leaf", "bccd"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_data(name, split):
    json_file = DATA / name / "annotations" / f"instances_{split}.json"
    if not json_file.is_file():
        pytest.skip(f"needs the public data set {name} in ../shared/data beside the repository")
    data = json.loads(json_file.read_text())
    ids = {c["id"]: c["id"] for c in data["categories"]}
    expected = load_coco_json(str(json_file), "images")
    assert coco_records(data, str(json_file), "images", ids) == expected
