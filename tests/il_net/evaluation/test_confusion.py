"""The confusion matrix: hand-computed cases, brute force, COCO's own matching, and the picture."""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from il_net.evaluation.confusion import MATCHINGS, confusion_matrix, row_shares
from il_net.evaluation.confusion_figure import draw_confusion
from il_net.evaluation.predictions import (
    LabeledImage,
    Labels,
    Objects,
    read_predictions,
    read_truth,
)

DATA = Path(__file__).parents[4] / "shared" / "data"
SIDE = 40
A, B, C, BACKGROUND = 0, 1, 2, -1


def make_labels(*images: list[tuple], masks: bool = False, classes: int = 3) -> Labels:
    """Images of (class, box, score, crowd), the last two optional; boxes x, y, width, height."""
    labeled = []
    for i, rows in enumerate(images, start=1):
        rows = [(*row, 1.0, False)[:4] if len(row) < 3 else (*row, False)[:4] for row in rows]
        shapes = np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4)
        objects = Objects(
            np.array([row[0] for row in rows], dtype=np.int64),
            [box_mask(*box) for box in shapes.astype(int)] if masks else shapes,
            np.array([row[2] for row in rows], dtype=np.float64),
            np.array([row[3] for row in rows], dtype=bool),
        )
        labeled.append(LabeledImage(i, f"{i}.jpg", SIDE, SIDE, objects))
    names = tuple("abcdefgh"[:classes])
    return Labels(names, tuple(range(1, classes + 1)), tuple(labeled))


def box_mask(x: int, y: int, width: int, height: int) -> dict:
    pixels = np.zeros((SIDE, SIDE), np.uint8, order="F")
    pixels[y : y + height, x : x + width] = 1
    return mask_util.encode(pixels)


def entries(**cells: int) -> np.ndarray:
    """A 4 x 4 matrix from cells such as ab=1: truth a, predicted b; z is the background."""
    counts = np.zeros((4, 4), np.int64)
    for name, count in cells.items():
        counts["abcz".index(name[0]), "abcz".index(name[1])] = count
    return counts


# --- hand-computed ---
# IoU of two 10 x 10 boxes side by side with an offset of d: (10 - d) / (10 + d); d = 2: 8/12 =
# 0.667, d = 3: 7/13 = 0.538, d = 4: 6/14 = 0.429.

TRUE_A, TRUE_B = (A, (0, 0, 10, 10)), (B, (2, 0, 10, 10))


@pytest.mark.parametrize("masks", [False, True])
def test_one_detection_over_two_true_objects(masks):
    """A detection of `a` on the place of `a`: IoU 1 with `a`, 0.667 with `b`."""
    truth = make_labels([TRUE_A, TRUE_B], masks=masks)
    found = make_labels([(A, (0, 0, 10, 10), 0.9)], masks=masks)
    # It counts for both; `b` has no detection of its own class, so it is missed as well.
    expected = entries(aa=1, ba=1, bz=1)
    assert np.array_equal(confusion_matrix(truth, found), expected)
    expected = entries(aa=1, bz=1)
    assert np.array_equal(confusion_matrix(truth, found, matching="one-to-one"), expected)


def test_two_detections_of_one_true_object():
    """`a` found twice, and once as `b`."""
    truth = make_labels([TRUE_A])
    found = make_labels(
        [(A, (1, 0, 10, 10), 0.8), (A, (0, 0, 10, 10), 0.7), (B, (0, 0, 10, 10), 0.9)]
    )
    assert np.array_equal(confusion_matrix(truth, found), entries(aa=2, ab=1))
    # The surer of the two is the one found, though `b` is surer still; nothing is left for others.
    expected = entries(aa=1, za=1, zb=1)
    assert np.array_equal(confusion_matrix(truth, found, matching="one-to-one"), expected)


def test_wrong_class_alone():
    truth, found = make_labels([TRUE_A]), make_labels([(C, (0, 0, 10, 10), 0.5)])
    assert np.array_equal(confusion_matrix(truth, found), entries(ac=1, az=1))
    expected = entries(ac=1)
    assert np.array_equal(confusion_matrix(truth, found, matching="one-to-one"), expected)


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("masks", [False, True])
def test_bounds_belong_to_what_counts(matching, masks):
    """IoU 0.5 (a half of the box, 50 / 100) and score 0.3 just count; less does not."""
    truth = make_labels([TRUE_A], masks=masks)
    half, less = (0, 0, 5, 10), (0, 0, 7, 7)
    for box, score, expected in [
        (half, 0.3, entries(aa=1)),
        (half, 0.29, entries(az=1)),
        (less, 0.3, entries(za=1, az=1)),
    ]:
        found = make_labels([(A, box, score)], masks=masks)
        assert np.array_equal(confusion_matrix(truth, found, matching=matching), expected)
    found = make_labels([(A, half, 0.3)], masks=masks)
    counts = confusion_matrix(truth, found, matching=matching, min_iou=0.4, min_score=0.31)
    assert np.array_equal(counts, entries(az=1))


def test_masks_and_boxes_differ():
    """Two triangles of one square: their boxes are equal, their masks share the diagonal alone."""
    upper = np.triu(np.ones((SIDE, SIDE), np.uint8)).astype(np.uint8, order="F")
    box = np.array([[0, 0, SIDE, SIDE]], dtype=np.float64)
    shapes = [[mask_util.encode(upper)], [mask_util.encode(np.asfortranarray(upper.T))]]

    def labels(shape) -> Labels:
        objects = Objects(np.array([A]), shape, np.ones(1), np.zeros(1, dtype=bool))
        return Labels(("a", "b", "c"), (1, 2, 3), (LabeledImage(1, "", SIDE, SIDE, objects),))

    assert np.array_equal(confusion_matrix(labels(box), labels(box)), entries(aa=1))
    by_mask = confusion_matrix(labels(shapes[0]), labels(shapes[1]))
    assert np.array_equal(by_mask, entries(az=1, za=1))


@pytest.mark.parametrize("matching", MATCHINGS)
def test_crowds(matching):
    """A crowd of `a`, 20 x 20; a detection lies in it with half of its area."""
    truth = make_labels([(A, (0, 0, 20, 20), 1.0, True), (B, (30, 30, 9, 9))])
    found = make_labels(
        [
            (A, (5, 5, 4, 4), 0.9),  # inside: nowhere
            (A, (15, 5, 10, 10), 0.9),  # half inside: nowhere
            (A, (16, 5, 10, 10), 0.9),  # 40 % inside: made up
            (C, (5, 5, 4, 4), 0.9),  # of another class: made up
            (B, (30, 30, 9, 9), 0.9),
        ]
    )
    expected = entries(za=1, zc=1, bb=1)
    assert np.array_equal(confusion_matrix(truth, found, matching=matching), expected)


def test_true_object_in_a_crowd_goes_before_it():
    truth = make_labels([(A, (0, 0, 20, 20), 1.0, True), (A, (5, 5, 4, 4)), (B, (12, 12, 4, 4))])
    found = make_labels([(A, (5, 5, 4, 4), 0.9), (A, (12, 12, 4, 4), 0.9)])
    # By the thesis' rule, the second overlaps a true object; as in COCO, the crowd takes it.
    assert np.array_equal(confusion_matrix(truth, found), entries(aa=1, ba=1, bz=1))
    expected = entries(aa=1, bz=1)
    assert np.array_equal(confusion_matrix(truth, found, matching="one-to-one"), expected)


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("masks", [False, True])
def test_nothing_predicted_and_nothing_true(matching, masks):
    objects, nothing = [(A, (0, 0, 9, 9), 0.9), (B, (9, 9, 9, 9), 0.9)], []
    truth = make_labels(objects, nothing, nothing, masks=masks)
    found = make_labels(nothing, [objects[0]], nothing, masks=masks)
    counts = confusion_matrix(truth, found, matching=matching)
    assert np.array_equal(counts, entries(az=1, bz=1, za=1))


@pytest.mark.parametrize("matching", MATCHINGS)
def test_boxes_without_area_overlap_nothing(matching):
    flat = [(A, (3, 3, 0, 5))]
    counts = confusion_matrix(make_labels(flat), make_labels(flat), matching=matching)
    assert np.array_equal(counts, entries(az=1, za=1))


def test_rows_are_divided_and_empty_ones_stay_zero():
    shares = row_shares(entries(aa=3, az=1, zb=2))
    assert shares.tolist() == [[0.75, 0, 0, 0.25], [0] * 4, [0] * 4, [0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_score": 1.5}, "lowest score is from 0 to 1, got 1.5"),
        ({"min_score": float("nan")}, "lowest score"),
        ({"min_iou": 0}, "lowest IoU is above 0 and up to 1, got 0"),
        ({"matching": "best"}, "one of thesis, one-to-one, got 'best'"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(make_labels([]), make_labels([]), **wrong)


# --- against other computations ---


def iou(a: tuple, b: tuple) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def random_images(rng: np.random.Generator, count: int, whole: bool) -> list[list[tuple]]:
    """Boxes crowded enough to overlap; whole numbers hit IoU bounds exactly."""
    images = []
    for _ in range(count):
        rows = []
        for _ in range(rng.integers(0, 12)):
            numbers = [*rng.uniform(0, 12, 2), *rng.uniform(6, 16, 2)]
            box = tuple(int(v) if whole else float(v) for v in numbers)
            rows.append((int(rng.integers(3)), box, float(rng.random())))
        images.append(rows)
    return images


def brute_thesis(truth: list[tuple], found: list[tuple]) -> np.ndarray:
    """The rule of the authors' tool, word by word."""
    counts = np.zeros((4, 4), np.int64)
    hit = [False] * len(truth)
    for category, box, _ in found:
        overlapped = [t for t, row in enumerate(truth) if iou(row[1], box) >= 0.5]
        for t in overlapped:
            counts[truth[t][0], category] += 1
            hit[t] = hit[t] or truth[t][0] == category
        if not overlapped:
            counts[3, category] += 1
    for t, row in enumerate(truth):
        if not hit[t]:
            counts[row[0], 3] += 1
    return counts


def brute_one_to_one(truth: list[tuple], found: list[tuple]) -> np.ndarray:
    counts = np.zeros((4, 4), np.int64)
    free_truth, free_found = (
        list(range(len(truth))),
        sorted(range(len(found)), key=lambda d: -found[d][2]),
    )
    for same_class in (True, False):
        for d in list(free_found):
            ious = [
                (iou(truth[t][1], found[d][1]), -t)
                for t in free_truth
                if not same_class or truth[t][0] == found[d][0]
            ]
            if ious and max(ious)[0] >= 0.5:
                t = -max(ious)[1]
                counts[truth[t][0], found[d][0]] += 1
                free_truth.remove(t)
                free_found.remove(d)
    for t in free_truth:
        counts[truth[t][0], 3] += 1
    for d in free_found:
        counts[3, found[d][0]] += 1
    return counts


@pytest.mark.parametrize(
    ("matching", "brute"), [("thesis", brute_thesis), ("one-to-one", brute_one_to_one)]
)
@pytest.mark.parametrize("masks", [False, True])
def test_random_boxes_against_brute_force(matching, brute, masks):
    rng = np.random.default_rng(5)
    truth, found = (random_images(rng, 400, whole=True) for _ in range(2))
    counts = confusion_matrix(
        make_labels(*truth, masks=masks),
        make_labels(*found, masks=masks),
        min_score=0.2,
        matching=matching,
    )
    kept = [[row for row in rows if row[2] >= 0.2] for rows in found]
    expected = sum(brute(t, f) for t, f in zip(truth, kept, strict=True))
    assert np.array_equal(counts, expected)
    assert (counts[:3] > 10).all(), "not a case with every kind of confusion"


def test_one_to_one_counts_everything_once():
    rng = np.random.default_rng(6)
    truth, found = random_images(rng, 60, whole=False), random_images(rng, 60, whole=False)
    counts = confusion_matrix(
        make_labels(*truth), make_labels(*found), min_score=0, matching="one-to-one"
    )
    for category in range(3):
        total = sum(row[0] == category for rows in truth for row in rows)
        assert counts[category].sum() == total
        total = sum(row[0] == category for rows in found for row in rows)
        assert counts[:, category].sum() == total


def test_diagonal_is_cocos_true_positives():
    """pycocotools' matching at IoU 0.5, with crowds, of what has a score of 0.3 or more."""
    rng = np.random.default_rng(7)
    truth = random_images(rng, 300, whole=False)
    truth = [[(*row, rng.random() < 0.2) for row in rows] for rows in truth]
    found = random_images(rng, 300, whole=False)
    counts = confusion_matrix(make_labels(*truth), make_labels(*found), matching="one-to-one")

    def records(images: list[list[tuple]]) -> list[dict]:
        return [
            {"image_id": i, "category_id": row[0] + 1, "bbox": list(row[1]), "score": row[2]}
            for i, rows in enumerate(images, start=1)
            for row in rows
        ]

    flags = [row[3] for rows in truth for row in rows]
    annotations = [
        {**r, "id": n, "iscrowd": int(flag), "area": r["bbox"][2] * r["bbox"][3]}
        for n, (r, flag) in enumerate(zip(records(truth), flags, strict=True), start=1)
    ]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(1, 301)],
        "annotations": annotations,
        "categories": [{"id": i} for i in (1, 2, 3)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        results = coco.loadRes([r for r in records(found) if r["score"] >= 0.3])
        evaluation = COCOeval(coco, results, "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.evaluate()
    positives, made_up = np.zeros(3, int), np.zeros(3, int)
    for image in filter(None, evaluation.evalImgs):
        counted = ~image["dtIgnore"][0].astype(bool)
        matched = image["dtMatches"][0] > 0
        positives[image["category_id"] - 1] += (matched & counted).sum()
        made_up[image["category_id"] - 1] += (~matched & counted).sum()
    assert positives.min() > 10
    assert np.array_equal(np.diag(counts)[:3], positives)
    # What COCO calls false positive is here another class' object or the background.
    assert np.array_equal(counts[:, :3].sum(axis=0) - np.diag(counts)[:3], made_up)


@pytest.mark.parametrize("masks", [False, True])
def test_real_truth_as_its_own_prediction(masks, tmp_path):
    json_file = DATA / "coffee_leaf" / "annotations" / "instances_val.json"
    if not json_file.is_file():
        pytest.skip("needs the public data set coffee_leaf in ../shared/data beside the repository")
    truth = read_truth(json_file, masks=masks)
    counts = confusion_matrix(truth, truth, matching="one-to-one")
    # Instances of leaf, miner, rust, phoma, cercospora: the README of the data set.
    assert np.array_equal(counts, np.diag([42, 19, 111, 36, 1, 0]))
    (tmp_path / "none.json").write_text("[]")
    nothing = read_predictions(tmp_path / "none.json", truth, masks=masks)
    counts = confusion_matrix(truth, nothing)
    assert counts[:, -1].tolist() == [42, 19, 111, 36, 1, 0]
    assert counts.sum() == 209


# --- the picture ---


def picture(path: Path, counts: np.ndarray, classes: list[str]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion(path, counts, classes, "title\nof two lines")
    return np.asarray(Image.open(path).convert("L"), dtype=int)


def test_picture(tmp_path):
    """An empty row, names with TeX signs and very long ones; darker where the share is higher."""
    names = ["leaf $x", "a_very " * 20, "Skirt/Dresses (ü)"]
    diagonal = picture(tmp_path / "new" / "a.png", entries(aa=9, cc=1, zb=1), names)
    assert min(diagonal.shape) > 500
    assert diagonal.min() < 60
    missed = picture(tmp_path / "b.png", entries(az=9, cz=1, zb=1), names)
    assert missed.shape == diagonal.shape
    dark = [np.argwhere(p < 60).mean(axis=0) for p in (diagonal, missed)]
    assert dark[1][1] > dark[0][1] + 20  # the last column is to the right of the diagonal


@pytest.mark.parametrize("count", [1, 20, 170])
def test_picture_of_few_and_many_classes(count, tmp_path):
    counts = np.eye(count + 1, dtype=np.int64)
    counts[-1] = 0
    pixels = picture(tmp_path / "a.png", counts, [f"class {i}" for i in range(count)])
    assert max(pixels.shape) < 4500
    assert (pixels < 60).sum() > 1000
