"""Disease severity: hand-computed cases, brute force on pixels, and what is missing."""

import csv
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest

from il_net.evaluation.predictions import LabeledImage, Labels, Objects, read_truth
from il_net.evaluation.severity import (
    CoveredShare,
    Group,
    measure,
    summarize,
    write_severities,
)

DATA = Path(__file__).parents[4] / "shared" / "data"
CLASSES = ("leaf", "rust", "miner", "grape", "rot")
HEIGHT, WIDTH = 10, 20
LEAF = Group("leaf", ("rust", "miner"))


def rectangle(x: int, y: int, width: int, height: int) -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=bool)
    pixels[y : y + height, x : x + width] = True
    return pixels


def make_labels(*images: list[tuple]) -> Labels:
    """Images of (class name, mask (H, W) or box x, y, width, height, score = 1)."""
    labeled = []
    for i, rows in enumerate(images, start=1):
        masks = [row[1] if isinstance(row[1], np.ndarray) else rectangle(*row[1]) for row in rows]
        objects = Objects(
            np.array([CLASSES.index(row[0]) for row in rows], dtype=np.int64),
            [mask_util.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks],
            np.array([row[2] if len(row) > 2 else 1.0 for row in rows]),
            np.zeros(len(rows), dtype=bool),
        )
        labeled.append(LabeledImage(i, f"{i}.jpg", HEIGHT, WIDTH, objects))
    return Labels(CLASSES, (1, 2, 3, 4, 5), tuple(labeled))


def shares(rows: list[CoveredShare]) -> dict[str, tuple]:
    return {row.content: (row.truth, row.predicted) for row in rows}


def test_hand_computed():
    """A leaf of 10 x 10 = 100 pixels.

    Truth: two spots of 4 x 5 = 20 that share 2 x 5 = 10: 30 of 100. Prediction: the leaf in two
    parts of 6 x 10 that share 2 x 10, so 100 pixels; one spot of 4 x 4 = 16 of which 2 x 4 = 8 lie
    outside: 8 of 100. The miner is predicted with 5 pixels and not there.
    """
    truth = make_labels([("leaf", (0, 0, 10, 10)), ("rust", (0, 0, 4, 5)), ("rust", (2, 0, 4, 5))])
    found = make_labels(
        [
            ("leaf", (0, 0, 6, 10)),
            ("leaf", (4, 0, 6, 10)),
            ("rust", (8, 0, 4, 4)),
            ("miner", (0, 9, 5, 1)),
        ]
    )
    rows = measure([LEAF], truth, found)
    assert shares(rows) == {"rust": (0.3, 0.08), "miner": (0.0, 0.05)}
    assert [row.error for row in rows] == pytest.approx([0.22, 0.05])
    assert (rows[0].image_id, rows[0].file_name, rows[0].container) == (1, "1.jpg", "leaf")


def test_only_sure_detections_count():
    truth = make_labels([("leaf", (0, 0, 10, 10)), ("rust", (0, 0, 1, 10))])
    found = make_labels(
        [("leaf", (0, 0, 10, 10), 0.5), ("rust", (0, 0, 2, 10), 0.5), ("rust", (5, 0, 5, 10), 0.49)]
    )
    assert shares(measure([LEAF], truth, found))["rust"] == (0.1, 0.2)
    assert shares(measure([LEAF], truth, found, min_score=0.4))["rust"] == (0.1, 0.7)
    assert shares(measure([LEAF], truth, found, min_score=0.6))["rust"] == (0.1, None)


def test_missing_containers_and_means():
    leaf, rust = ("leaf", (0, 0, 10, 10)), ("rust", (0, 0, 2, 10))  # 20 %
    more = ("rust", (0, 0, 5, 10))  # 50 %
    truth = make_labels([leaf, rust], [leaf], [leaf, rust], [], [])
    found = make_labels([leaf, more], [leaf, rust], [rust], [leaf, rust], [rust])
    rows = measure([LEAF], truth, found)
    assert len(rows) == 10  # five images, two contents
    rust_rows = [row for row in rows if row.content == "rust"]
    assert [(r.truth, r.predicted) for r in rust_rows] == [
        (0.2, 0.5), (0.0, 0.2), (0.2, None), (None, 0.2), (None, None),
    ]  # fmt: skip
    summary, other = summarize(rows, with_truth=True)
    assert (summary.container, summary.content) == ("leaf", "rust")
    assert (summary.images, summary.affected) == (2, 1)
    assert summary.truth == pytest.approx(0.1)  # (0.2 + 0) / 2
    assert summary.predicted == pytest.approx(0.35)  # (0.5 + 0.2) / 2
    assert summary.error == pytest.approx(0.25)  # (0.3 + 0.2) / 2
    assert summary.affected_error == pytest.approx(0.3)
    assert (summary.missed, summary.made_up, summary.without) == (1, 1, 1)
    assert (other.content, other.images, other.affected) == ("miner", 2, 0)
    assert (other.error, other.affected_error) == (0, None)


def test_several_groups_do_not_mix():
    objects = [
        ("leaf", (0, 0, 10, 10)),
        ("grape", (10, 0, 10, 5)),
        ("rust", (0, 0, 1, 10)),
        ("rot", (10, 0, 5, 5)),
    ]
    rows = measure([Group("leaf", ("rust",)), Group("grape", ("rot",))], None, make_labels(objects))
    assert [(r.container, r.content, r.predicted) for r in rows] == [
        ("leaf", "rust", 0.1),
        ("grape", "rot", 0.5),
    ]


def test_without_truth():
    found = make_labels([("leaf", (0, 0, 10, 10)), ("rust", (0, 0, 1, 10))], [])
    rows = measure([LEAF], None, found)
    assert [(r.truth, r.error) for r in rows] == [(None, None)] * 4
    summary, _ = summarize(rows, with_truth=False)
    assert (summary.images, summary.predicted, summary.without) == (1, 0.1, 1)
    assert (summary.truth, summary.error, summary.missed, summary.made_up) == (None, None, 0, 0)


def test_container_of_an_empty_mask_is_none():
    found = make_labels([("leaf", (0, 0, 0, 0)), ("rust", (0, 0, 1, 10))])
    assert shares(measure([LEAF], None, found))["rust"] == (None, None)


def test_random_masks_against_pixels():
    rng = np.random.default_rng(3)
    images = [
        [
            (CLASSES[rng.integers(5)], rng.random((HEIGHT, WIDTH)) < rng.uniform(0.1, 0.6))
            for _ in range(rng.integers(0, 12))
        ]
        for _ in range(50)
    ]
    groups = [LEAF, Group("grape", ("rot",))]
    rows = iter(measure(groups, None, make_labels(*images)))
    for image in images:
        for group in groups:
            area = union(image, group.container)
            for content in group.contents:
                expected = None
                if area.any():
                    expected = (union(image, content) & area).sum() / area.sum()
                assert next(rows).predicted == pytest.approx(expected)


def union(image: list[tuple], name: str) -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for category, mask in image:
        if category == name:
            pixels |= mask
    return pixels


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([Group("leave", ("rust",))], r"there is no class 'leave' \(did you mean 'leaf'\?\)"),
        ([Group("leaf", ("rust", "mildew"))], "there is no class 'mildew'; there are"),
        ([Group("leaf", ("leaf",))], "'leaf' can't be a content of itself"),
        ([Group("leaf", ("rust", "rust"))], "different contents"),
        ([Group("leaf", ())], "'leaf' needs one or more"),
        ([LEAF, LEAF], "a container is given twice"),
    ],
)
def test_wrong_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        measure(groups, None, make_labels([]))


def test_wrong_score():
    with pytest.raises(ValueError, match="from 0 to 1, got 50"):
        measure([LEAF], None, make_labels([]), min_score=50)


def test_file(tmp_path):
    rows = [
        CoveredShare(7, 'a,"b".jpg', "leaf", "rust", 0.5, 0.123456789),
        CoveredShare(8, "ü.jpg", "leaf", "rust", 0.0, None),
    ]
    write_severities(tmp_path / "new" / "s.csv", rows)
    text = (tmp_path / "new" / "s.csv").read_text(encoding="utf-8")
    assert list(csv.reader(text.splitlines())) == [
        ["image_id", "file_name", "container", "content", "truth", "predicted", "error"],
        ["7", 'a,"b".jpg', "leaf", "rust", "0.5", "0.123457", "0.376543"],
        ["8", "ü.jpg", "leaf", "rust", "0.0", "", ""],
    ]


def test_real_truth_as_its_own_prediction():
    json_file = DATA / "coffee_leaf" / "annotations" / "instances_val.json"
    if not json_file.is_file():
        pytest.skip("needs the public data set coffee_leaf in ../shared/data beside the repository")
    truth = read_truth(json_file, masks=True)
    rows = measure([Group("leaf", ("miner", "rust", "phoma", "cercospora"))], truth, truth)
    assert len(rows) == 42 * 4
    assert all(row.error == 0 for row in rows)
    summaries = summarize(rows, with_truth=True)
    # The README of the data set: every leaf has one stress at most, 10 of 42 have no spot.
    assert sum(s.affected for s in summaries) == 32
    assert all(s.images == 42 and s.error == 0 and 0 < s.truth < 0.1 for s in summaries)
