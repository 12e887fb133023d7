"""Every mistake that can be mended safely is mended, counted, and gone; the others stay."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from il_net.curation.image_checks import Picture
from il_net.curation.inspection import inspect_coco
from il_net.curation.mend import mend
from il_net.data.coco_file import write_coco

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]  # 20 x 20
NAN = float("nan")
PICTURES = {"a.png": Picture((100, 50)), "b.png": Picture((100, 50))}


def good_coco() -> dict:
    """Two images of 100 x 50 px; a polygon, a box and an RLE mask."""
    rle = {"size": [50, 100], "counts": [100, 400, 4500]}  # columns 2 to 9
    return {
        "info": {"year": 2023},
        "images": [
            {"id": 1, "file_name": "a.png", "width": 100, "height": 50, "plant": "x"},
            {"id": 2, "file_name": "b.png", "width": 100, "height": 50},
        ],
        "annotations": [
            {"id": 5, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400,
             "iscrowd": 0, "segmentation": [SQUARE], "score": 0.5},
            {"id": 6, "image_id": 2, "category_id": 1, "bbox": [50, 20, 10, 5], "area": 50,
             "iscrowd": 0, "segmentation": []},
            {"id": 7, "image_id": 2, "category_id": 1, "bbox": [2, 0, 8, 50], "area": 400,
             "iscrowd": 1, "segmentation": rle},
        ],
        "categories": [{"id": 1, "name": "leaf"}],
    }  # fmt: skip


def edit(**changes: object) -> dict:
    """The good file with other fields of the first annotation; None removes one."""
    data = good_coco()
    for key, value in changes.items():
        data["annotations"][0][key] = value
        if value is None:
            del data["annotations"][0][key]
    return data


def mended(data: dict, pictures: dict | None = None) -> tuple[dict, list[str]]:
    before = json.dumps(data)
    result, done = mend(data, PICTURES if pictures is None else pictures)
    assert json.dumps(data) == before  # untouched
    return result, done


def test_good_file_stays_as_it_is():
    assert mended(good_coco()) == (good_coco(), [])


def box_of(points: list) -> list[float]:
    points = np.reshape(points, (-1, 2))
    return [*points.min(axis=0).tolist(), *np.ptp(points, axis=0).tolist()]


@pytest.mark.parametrize(
    ("segmentation", "box", "area"),
    [  # x from 80 to 120: the right half lies outside
        ([[80, 10, 120, 10, 120, 30, 80, 30]], [80, 10, 20, 20], 400),
        ([[-10, -10, 10, -10, 10, 10, -10, 10]], [0, 0, 10, 10], 100),
        ([SQUARE, [1, 2, 3]], [10, 10, 20, 20], 400),
        ([SQUARE, [1, 1, 2, 2, 3, 3]], [10, 10, 20, 20], 400),
        ([SQUARE, [*SQUARE[:-1], NAN]], [10, 10, 20, 20], 400),
        ([SQUARE, [80, 10, 120, 10, 120, 30, 80, 30]], [10, 10, 90, 20], 800),
        (SQUARE, [10, 10, 20, 20], 400),
    ],
)
def test_outlines_are_mended_with_box_and_area(segmentation, box, area):
    result, done = mended(edit(segmentation=segmentation, bbox=[10, 10, 20, 20], area=None))
    a = result["annotations"][0]
    assert a["bbox"] == pytest.approx(box)
    assert a["area"] == pytest.approx(area)
    assert box_of(sum(a["segmentation"], [])) == pytest.approx(box)
    assert len(done) == 2 and done[0].startswith("1 ")
    assert (a["id"], a["score"]) == (5, 0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {"segmentation": [[200, 10, 220, 10, 220, 30]]},
        {"segmentation": [[1, 2, 3]]},
        {"segmentation": [], "bbox": [10, 10, 0, 5]},
        {"segmentation": [], "bbox": [200, 10, 5, 5]},
        {"segmentation": [], "bbox": [1, 2, 3, NAN]},
        {"segmentation": [], "bbox": [1, 2, 3]},
        {"segmentation": None, "bbox": None},
        {"image_id": 99},
        {"image_id": None},
    ],
)
def test_what_nothing_is_left_of_is_dropped(changes):
    result, done = mended(edit(**changes))
    assert [a["id"] for a in result["annotations"]] == [6, 7]
    assert len(done) == 1 and done[0].startswith("1 ") and "dropped" in done[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"segmentation": [], "bbox": [90, 10, 20, 20]}, ([90, 10, 10, 20], 200)),
        ({"segmentation": [], "bbox": [-5, -5, 20, 20]}, ([0, 0, 15, 15], 225)),
        ({"segmentation": [], "area": None}, ([10, 10, 20, 20], 400)),
        ({"bbox": [0, 0, 0, 0]}, ([10, 10, 20, 20], 400)),
        ({"bbox": None}, ([10, 10, 20, 20], 400)),
        ({"bbox": [300, 10, 20, 20]}, ([10, 10, 20, 20], 400)),
        ({"area": 0}, ([10, 10, 20, 20], 400)),
        ({"area": NAN}, ([10, 10, 20, 20], 400)),
        ({"area": "400"}, ([10, 10, 20, 20], 400)),
        ({"area": 4000}, ([10, 10, 20, 20], 400)),
        ({"iscrowd": None}, ([10, 10, 20, 20], 400)),
    ],
)
def test_boxes_areas_and_iscrowd(changes, expected):
    result, done = mended(edit(**changes))
    a = result["annotations"][0]
    assert (a["bbox"], a["area"], a["iscrowd"]) == (*expected, 0)
    assert done and mended(result) == (result, [])


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [50, 100], "counts": [5, float("inf"), 5]},
        {"size": [50, 100], "counts": [-5, 5005]},
        {"size": [50, 100], "counts": "zzzzzz"},
        {"size": [50, 100], "counts": [5, 5, 5]},
        {"size": [2**20, 2**20], "counts": [2**40]},
    ],
)
def test_broken_rle_masks_stay_for_the_report(rle):
    data = edit(segmentation=rle)
    assert mended(data) == (data, [])
    no_area = edit(segmentation=rle, area=None)
    assert mended(no_area) == (no_area, [])


def test_numbers_of_many_digits_are_mended_or_left():
    huge = 10**400
    assert mended(edit(area=huge))[0] == good_coco()
    assert mended(edit(bbox=[huge, 0, 1, 1]))[0] == good_coco()
    data = good_coco()
    data["images"][0]["width"] = huge
    assert mended(data)[0] == good_coco()


def test_area_of_an_rle_mask_is_that_of_its_pixels():
    data = good_coco()
    del data["annotations"][2]["area"]
    assert mended(data)[0]["annotations"][2]["area"] == 400


@pytest.mark.parametrize("ids", [[0, 6, 7], [5, 5, 7], [5, None, 7]])
def test_ids_begin_at_one(ids):
    data = good_coco()
    for a, number in zip(data["annotations"], ids, strict=True):
        a["id"] = number
    result, done = mended(data)
    assert [a["id"] for a in result["annotations"]] == [1, 2, 3]
    assert done == ["3 annotations numbered anew, from 1"]


def test_repeats_go_unless_their_outlines_differ():
    data = good_coco()
    first = data["annotations"][0]
    data["annotations"] += [
        {**first, "id": 8, "area": 400.0},
        {**first, "id": 9, "segmentation": [[10, 10, 30, 10, 30, 30, 20, 30, 10, 30]]},
        {**first, "id": 10, "category_id": 2},
    ]
    result, done = mended(data)
    assert [a["id"] for a in result["annotations"]] == [5, 6, 7, 9, 10]
    assert done == ["1 annotations that repeat another one: dropped"]


def test_entries_of_one_file_are_merged():
    data = good_coco()
    data["images"].append({**data["images"][0], "id": 3, "file_name": "./a.png"})
    data["annotations"][0]["image_id"] = 3
    result, done = mended(data)
    assert result["images"] == good_coco()["images"]
    assert [a["image_id"] for a in result["annotations"]] == [1, 2, 2]
    assert done == ["1 images listed again: merged with the first entry of their file"]


def test_entries_of_one_file_that_may_differ_are_left():
    """Boxes of a smaller copy must not be moved, nor two people's objects be put together."""
    smaller = good_coco()
    smaller["images"].append({"id": 3, "file_name": "a.png", "width": 50, "height": 25})
    smaller["annotations"][0].update(image_id=3, bbox=[5, 5, 10, 10], area=100, segmentation=[])
    assert mended(smaller) == (smaller, [])
    twice = good_coco()
    twice["images"].append({**twice["images"][0], "id": 3})
    twice["annotations"].append({**twice["annotations"][0], "id": 8, "image_id": 3})
    assert mended(twice) == (twice, [])
    # An entry that has taken over objects is one with objects.
    twice["images"].insert(0, {**twice["images"][0], "id": 4})
    result, done = mended(twice)
    assert [i["id"] for i in result["images"]] == [4, 2, 3]
    assert [a["image_id"] for a in result["annotations"]] == [4, 2, 2, 3]
    assert len(done) == 1


def test_an_id_of_two_files_is_left():
    data = good_coco()
    data["images"][1]["id"] = 1
    data["images"].append({**data["images"][0], "id": 2})
    assert mended(data) == (data, [])


def test_unreadable_images_go_with_their_annotations():
    pictures = {**PICTURES, "b.png": Picture(None, fault="not an image", is_broken=True)}
    result, done = mended(good_coco(), pictures)
    assert [i["id"] for i in result["images"]] == [1]
    assert [a["id"] for a in result["annotations"]] == [5]
    assert len(done) == 2
    # What could not be opened today is not proven to be gone for good, nor is a missing file.
    closed = {**PICTURES, "b.png": Picture(None, fault="[Errno 13] Permission denied: 'b.png'")}
    assert mended(good_coco(), closed) == (good_coco(), [])
    assert mended(good_coco(), {"a.png": Picture((100, 50))}) == (good_coco(), [])


def size_of(recorded: tuple, picture: Picture, box: list | None) -> tuple:
    """The size of an image after mending; `box` is its only object."""
    data = good_coco()
    data["images"][1]["width"], data["images"][1]["height"] = recorded
    data["annotations"] = data["annotations"][:1]
    if box:
        data["annotations"].append({**good_coco()["annotations"][1], "bbox": box})
    image = mended(data, {**PICTURES, "b.png": picture})[0]["images"][1]
    return image["width"], image["height"]


@pytest.mark.parametrize(
    ("recorded", "picture", "box", "expected"),
    [
        ((None, None), Picture((100, 50)), [50, 20, 10, 5], (100, 50)),
        ((0, 50), Picture((100, 50)), [50, 20, 10, 5], (100, 50)),
        ((100, 51), Picture((100, 50)), [50, 20, 10, 5], (100, 50)),
        ((50, 100), Picture((100, 50)), [50, 20, 10, 5], (100, 50)),  # sides mixed up
        ((50, 100), Picture((100, 50)), [20, 80, 10, 5], (50, 100)),  # the box would be outside
        ((200, 100), Picture((100, 50)), [50, 20, 10, 5], (200, 100)),  # resized since?
        ((200, 100), Picture((100, 50)), None, (100, 50)),
        ((100, 50), Picture((100, 50), orientation=6), [5, 20, 10, 5], (100, 50)),  # turned?
        ((100, 50), Picture((100, 50), orientation=6), None, (50, 100)),
        ((100, 50), Picture((100, 50), orientation=3), [5, 20, 10, 5], (100, 50)),
    ],
)
def test_sizes_from_files_where_the_coordinates_leave_no_doubt(recorded, picture, box, expected):
    assert size_of(recorded, picture, box) == expected


def test_annotations_of_a_doubtful_size_are_not_cut():
    data = good_coco()
    data["images"][0].update(width=200, height=100)
    data["annotations"][0].update(bbox=[150, 10, 300, 20], segmentation=[])
    assert mended(data) == (data, [])


def test_files_without_labels_may_lack_the_other_lists():
    data = {"images": good_coco()["images"]}
    assert mended(data)[1] == []
    for broken in ({}, {"images": 3}, {"images": [], "annotations": {}}):
        with pytest.raises(ValueError, match="a COCO file has a list"):
            mend(broken, {})


def break_all(data: dict) -> None:
    """One of everything that mending claims to mend."""
    first = data["annotations"][0]
    data["images"] += [{**data["images"][0], "id": 3}, 7]
    data["images"][1]["width"] = None
    data["annotations"] += [
        {**first, "id": 0},
        {**first, "id": 5, "segmentation": [[80, 10, 120, 10, 120, 30, 80, 30]]},
        {**first, "id": 5, "segmentation": [[10, 10, 40, 40, 40, 10, 10, 40, 30, 60]]},
        {**first, "segmentation": [SQUARE, [5, 5, 15, 5, 15, 45, 5, 45], [1, 2]]},
        {**first, "segmentation": [[1, 1, 2, 2, 3, 3]]},
        {**first, "segmentation": [], "bbox": [90, 40, 99, 99]},
        {"image_id": 9},
        5,
    ]


def test_mended_file_is_clean(tmp_path):
    """Checked again, nothing is left but what mending does not claim: objects without outline."""
    for seed, name in enumerate(PICTURES):
        noise = np.random.default_rng(seed).integers(0, 256, (50, 100, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
    data = good_coco()
    break_all(data)
    original = copy.deepcopy(data)
    write_coco(tmp_path / "broken.json", data)
    before = inspect_coco(str(tmp_path / "broken.json"), str(tmp_path), pixels=True)
    assert len(before.report.problems) >= 10
    result, done = mend(before.data, before.pictures)
    assert before.data == original and len(done) >= 8
    write_coco(tmp_path / "mended.json", result)
    after = inspect_coco(str(tmp_path / "mended.json"), str(tmp_path), pixels=True)
    assert [p.kind for p in after.report.problems] == [
        "objects without 'segmentation' beside others that have one"
    ]
    assert mend(after.data, after.pictures) == (result, [])
    assert Path(tmp_path / "broken.json").read_text() == json.dumps(original) + "\n"
