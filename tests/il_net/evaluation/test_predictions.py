"""Truth and predictions from files: both forms, matching, masks, and what must be refused."""

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest

from il_net.evaluation.file_names import match_names
from il_net.evaluation.predictions import read_predictions, read_truth

TRUTH = {
    "images": [
        {"id": 7, "file_name": "images/a.jpg", "height": 10, "width": 20},
        {"id": 3, "file_name": "images/b.jpg", "height": 10, "width": 20},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 4], "iscrowd": 0},
        {"id": 2, "image_id": 3, "category_id": 4, "bbox": [0, 0, 5, 5], "iscrowd": 1},
    ],
    "categories": [{"id": 9, "name": "rust"}, {"id": 4, "name": "leaf"}],
}
RESULTS = [
    {"image_id": 7, "category_id": 4, "bbox": [0, 0, 2, 2], "score": 0.25},
    {"image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 1, "iscrowd": 1},
    {"image_id": 7, "category_id": 9, "bbox": [5, 5, 2, 2], "score": 0.5},
]
# As tools/predict.py writes it: ids of its own, names below its --input, the model's classes.
DOCUMENT = {
    "images": [
        {"id": 1, "file_name": "b.jpg", "height": 10, "width": 20},
        {"id": 2, "file_name": "c.jpg", "height": 33, "width": 44},
        {"id": 3, "file_name": "a.jpg", "height": 10, "width": 20},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.9},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.8},
        {"id": 3, "image_id": 3, "category_id": 3, "bbox": [0, 0, 2, 2], "score": 0.7},
        {"id": 4, "image_id": 3, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.6},
    ],
    "categories": [
        {"id": 1, "name": "miner"}, {"id": 2, "name": "rust"}, {"id": 3, "name": "leaf"},
    ],
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write something as JSON, or text as it is; returns the file."""

    def call(data: object, name: str = "p.json") -> Path:
        text = data if isinstance(data, str) else json.dumps(data)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return call


@pytest.fixture
def truth(write):
    return read_truth(write(TRUTH, "t.json"), masks=False)


def changed(data: object, *path: object, **fields: object) -> object:
    """A copy with other fields in the record at a path; None takes a field away."""
    data = copy.deepcopy(data)
    record = data
    for key in path:
        record = record[key]
    for key, value in fields.items():
        record.pop(key) if value is None else record.update({key: value})
    return data


# --- what is read ---


def test_truth(truth):
    assert truth.classes == ("leaf", "rust")  # by id: 4, 9
    assert [(i.image_id, i.file_name) for i in truth.images] == [
        (7, "images/a.jpg"),
        (3, "images/b.jpg"),
    ]
    empty, two = (image.objects for image in truth.images)
    assert empty.shapes.shape == (0, 4)
    assert two.classes.tolist() == [1, 0]
    assert two.shapes.tolist() == [[1, 2, 3, 4], [0, 0, 5, 5]]
    assert two.crowd.tolist() == [False, True]
    assert two.scores.tolist() == [1, 1]


def test_results_list(truth, write):
    found = read_predictions(write(RESULTS), truth, masks=False)
    assert (found.classes, found.category_ids) == (truth.classes, truth.category_ids)
    first, second = (image.objects for image in found.images)
    assert first.classes.tolist() == [0, 1]
    assert first.scores.tolist() == [0.25, 0.5]
    assert first.shapes.tolist() == [[0, 0, 2, 2], [5, 5, 2, 2]]
    assert second.classes.tolist() == [1]
    assert not second.crowd.any()


def test_empty_results_list(truth, write):
    found = read_predictions(write(" \n []"), truth, masks=False)
    assert [len(image.objects.classes) for image in found.images] == [0, 0]


def test_document_is_matched_by_names(truth, write, caplog):
    with caplog.at_level(logging.WARNING):
        found = read_predictions(write(DOCUMENT), truth, masks=False)
    assert found.classes == ("leaf", "rust", "miner")
    assert [image.image_id for image in found.images] == [7, 3]
    first, second = (image.objects for image in found.images)
    assert first.classes.tolist() == [0, 2]
    assert first.scores.tolist() == [0.7, 0.6]
    assert second.classes.tolist() == [1]
    assert second.scores.tolist() == [0.9]
    assert "1 of the 3 images of" in caplog.text
    assert "not in the truth and left out" in caplog.text


def test_image_that_was_never_predicted_is_told(truth, write, caplog):
    only_b = {**DOCUMENT, "images": DOCUMENT["images"][:1]}
    only_b["annotations"] = DOCUMENT["annotations"][:1]
    with caplog.at_level(logging.WARNING):
        found = read_predictions(write(only_b), truth, masks=False)
    assert [len(image.objects.classes) for image in found.images] == [0, 1]
    assert "1 of the 2 images of the truth are not in" in caplog.text


def test_document_without_truth(write):
    found = read_predictions(write(DOCUMENT), None, masks=False)
    assert found.classes == ("miner", "rust", "leaf")
    assert [image.file_name for image in found.images] == ["b.jpg", "c.jpg", "a.jpg"]
    assert [len(image.objects.classes) for image in found.images] == [1, 1, 2]


# --- file names ---


def test_names_match_by_their_tails():
    found = ["b.jpg", "x/y/sub/a.jpg", "film.mp4#3", "./c.jpg", r"in\d.jpg"]
    truth = ["sub/a.jpg", "images/b.jpg", "other/a.jpg", "c.jpg", "in/d.jpg", "e.jpg"]
    assert match_names(found, truth, "p.json") == {1: 0, 0: 1, 3: 2 + 1, 4: 4}


def test_an_equal_name_goes_first():
    assert match_names(["a.jpg", "v/a.jpg"], ["a.jpg", "v/a.jpg"], "") == {0: 0, 1: 1}


@pytest.mark.parametrize(
    ("found", "truth", "message"),
    [
        (["a.jpg"], ["v/a.jpg", "w/a.jpg"], r"p: a.jpg can't be told .*\['v/a.jpg', 'w/a.jpg'\]"),
        (["v/a.jpg", "w/a.jpg"], ["a.jpg"], r"w/a.jpg can't be told .*\['v/a.jpg'\] is taken"),
        (["v/a.jpg", "x.jpg"], ["w/a.jpg"], r"no image is in the truth; .*'x.jpg'.*'w/a.jpg'"),
    ],
)
def test_names_that_do_not_match(found, truth, message):
    with pytest.raises(ValueError, match=message):
        match_names(found, truth, "p")


# --- what is refused ---


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "p.json is not JSON"),
        ('[{"image_id": 7', "p.json is not JSON"),
        ("7", "holds a JSON int"),
        pytest.param("[" * 100_000, "p.json is nested too deeply", id="deep"),
        pytest.param("[" + "9" * 5000 + "]", "p.json is not JSON: .*digits", id="digits"),
        ("\ufeff[]", "p.json is not JSON: .*byte order mark"),
        (changed(RESULTS, 1, bbox=[10**400, 1, 2, 3]), "not four finite numbers .*: annotation 2"),
        ({"images": []}, "has a list 'annotations'"),
        ([3], r"annotations without 'id', .*annotations\[0\]"),
        (changed(RESULTS, 1, image_id=99), "not in the file: annotation 2 .image 99."),
        (changed(RESULTS, 1, image_id=None), r"annotations\[1\]"),
        (changed(RESULTS, 0, category_id=5), "unknown category ids: 5 in annotation 1 .image 7."),
        (changed(RESULTS, 2, score=None), "without a 'score'.*truth file.*: annotation 3"),
        (changed(RESULTS, 2, score=float("nan")), "'score' from 0 to 1"),
        (changed(RESULTS, 2, score=50), "'score' from 0 to 1"),
        (changed(RESULTS, 2, score="high"), "'score' from 0 to 1"),
        (changed(RESULTS, 2, score=True), "'score' from 0 to 1"),
        (changed(RESULTS, 1, bbox=[1, 2, 3]), "not four finite numbers .*: annotation 2"),
        (changed(RESULTS, 1, bbox=[1, 2, float("inf"), 4]), "not four finite numbers"),
        (changed(RESULTS, 1, bbox=[1, 2, -3, 4]), "negative size .*: annotation 2"),
        (changed(DOCUMENT, "images", 0, height=20, width=10), "b.jpg is 20 x 10 .*truth 10 x 20"),
        (changed(DOCUMENT, "images", 0, width=None), r"images\[0\]"),
        (changed(DOCUMENT, "categories", 0, name="rust"), "names used twice: 'rust'"),
        (changed(DOCUMENT, "annotations", 0, category_id=7), "unknown category ids"),
        (TRUTH, "without a 'score'"),
    ],
)
def test_malformed_predictions(data, message, truth, write):
    path = write(data)
    with pytest.raises(ValueError, match=message) as error:
        read_predictions(path, truth, masks=False)
    assert "p.json" in str(error.value)


def test_missing_files(tmp_path, truth):
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.json"):
        read_predictions(tmp_path / "gone.json", truth, masks=False)
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.json"):
        read_truth(tmp_path / "gone.json", masks=False)


def test_results_list_needs_the_truth(write):
    with pytest.raises(ValueError, match=r"p.json is a COCO results list, .* give the truth"):
        read_predictions(write(RESULTS), None, masks=False)


@pytest.mark.parametrize("segmentation", [None, [], {}])
def test_boxes_only_are_refused_where_masks_are_needed(segmentation, write):
    data = changed(TRUTH, "annotations", 0, segmentation=segmentation or [])
    with pytest.raises(ValueError, match=r"t.json: annotation 1 \(image 3\): masks are needed"):
        read_truth(write(data, "t.json"), masks=True)


# --- masks ---

GOOD = mask_util.encode(np.asfortranarray(np.eye(10, 20, dtype=np.uint8)))["counts"].decode()


def test_masks_of_a_file(write):
    square = [[0, 0, 4, 0, 4, 4, 0, 4]]
    data = changed(TRUTH, "annotations", 0, segmentation=square)
    data = changed(data, "annotations", 1, segmentation={"size": [10, 20], "counts": [0, 200]})
    truth = read_truth(write(data, "t.json"), masks=True)
    shapes = truth.images[1].objects.shapes
    assert [int(mask_util.area(mask)) for mask in shapes] == [16, 200]
    assert truth.images[0].objects.shapes == []
    results = [{**RESULTS[1], "segmentation": {"size": [10, 20], "counts": GOOD}}]
    found = read_predictions(write(results), truth, masks=True)
    assert int(mask_util.area(found.images[1].objects.shapes[0])) == 10
    kept = found.images[1].objects.select(np.array([False]))
    assert kept.shapes == []
