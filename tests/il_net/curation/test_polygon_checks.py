"""Masks that a file holds wrongly, one made-up annotation for each fault, and none too many."""

import time

import numpy as np
import pytest

from il_net.curation.polygon_checks import check_outlines, find_outline_faults
from il_net.data.report import Findings

SIZES = {1: (100, 50)}
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]  # 20 x 20
NAN, INF = float("nan"), float("inf")


def annotation(segmentation: object, box: object = (10, 10, 20, 20), area: object = 400) -> dict:
    return {
        "id": 1, "image_id": 1, "category_id": 1, "bbox": list(box), "area": area, "iscrowd": 0,
        "segmentation": segmentation,
    }  # fmt: skip


def faults_of(one: dict) -> set[str]:
    """The names of the faults that are found in a single annotation."""
    found = find_outline_faults([one], SIZES)
    return {name for name, mask in vars(found).items() if mask.tolist() == [True]}


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        ([SQUARE], set()),
        ([], set()),
        (None, set()),
        (SQUARE, {"malformed"}),  # not in a list
        ("x", {"malformed"}),
        ([[*SQUARE[:-1], NAN]], {"malformed"}),
        ([[*SQUARE[:-1], INF]], {"malformed"}),
        ([[*SQUARE[:-1], "30"]], {"malformed"}),
        ([[*SQUARE[:-1], True]], {"malformed"}),
        ([[*SQUARE[:-1], 1e300]], {"malformed"}),
        ([SQUARE, [10, 10, 30, 10]], {"short"}),
        ([SQUARE, [1, 2, 3, 4, 5, 6, 7]], {"short"}),
        ([SQUARE, []], {"short"}),
        ([SQUARE, [1, 1, 2, 2, 3, 3]], {"empty"}),
        ([SQUARE, [5, 5, 5, 5, 5, 5]], {"empty"}),
        ([[0, 10, 20, 10, 20, 30, 0, 30, -1, 20]], {"box"}),  # 1 px out is tolerated
        ([[10, 10, 30, 10, 30, 30, 10, 30, -1.5, 20]], {"outside"}),
        ([[10, 10, 30, 10, 30, 51.5, 10, 30]], {"outside"}),
        ([[10, 10, 101.5, 10, 30, 30, 10, 30]], {"outside"}),
        ({"size": [50, 100], "counts": "Xl4"}, set()),  # 8 + 28 * 32 + 4 * 1024 of background
        ({"size": [50, 100], "counts": [5000]}, set()),
        ({"size": [50.0, 100], "counts": [0, 5000]}, set()),
        ({"size": [100, 50], "counts": [5000]}, {"rle_size"}),
        ({"size": [50, 100]}, {"malformed"}),
        ({"counts": "abc"}, {"malformed"}),
        ({"size": [50, 100], "counts": "zzzzzz"}, {"malformed"}),
        ({"size": [50, 100], "counts": "\ud83d"}, {"malformed"}),
        ({"size": [50, 100], "counts": [5, 5, 5]}, {"malformed"}),
        ({"size": [50, 100], "counts": [5, INF, 5]}, {"malformed"}),
        ({"size": [50, 100], "counts": [-5, 5005]}, {"malformed"}),
        ({"size": [50, 100], "counts": [2**62] * 4 + [5000]}, {"malformed"}),  # 5000 in 64 bits
        ({"size": [50, 100], "counts": [10**400]}, {"malformed"}),
        ({"size": [50, 100], "counts": [[5000]]}, {"malformed"}),
        ({"size": [50, 100], "counts": [4999, True]}, {"malformed"}),
        ({"size": [2**20, 2**20], "counts": [2**40]}, {"malformed"}),
        ({"size": [NAN, 100], "counts": [5000]}, {"malformed"}),
        ({"size": [50.5, 100], "counts": [5000]}, {"malformed"}),
        ([[*SQUARE[:-1], 10**400]], {"malformed"}),
        ([[10, 10, 30, 30, 30, 10, 10, 30]], {"crossing", "area"}),
        ([[*SQUARE, 10, 10]], set()),  # closed by its first point once more
    ],
)
def test_fault_of_an_outline(segmentation, expected):
    assert faults_of(annotation(segmentation)) == expected


def test_figure_of_eight_has_an_area():
    """Its loops cancel in the shoelace formula: two triangles of 10 x 20 / 2 each."""
    eight = [10, 10, 30, 30, 30, 10, 10, 30]
    assert faults_of(annotation([eight], area=200)) == {"crossing"}
    assert faults_of(annotation([eight], area=350)) == {"crossing", "area"}


@pytest.mark.parametrize(
    ("box", "area", "expected"),
    [
        ((10, 10, 20, 20), 480, set()),  # the outline is 80 px long
        ((10, 10, 20, 20), 482, {"area"}),
        ((10, 10, 20, 20), 318, {"area"}),
        ((10, 10, 20, 20), 40000, {"area"}),
        ((10, 10, 20, 20), None, set()),  # missing, which is another finding
        ((8, 10, 24, 20), 400, set()),  # 2 px on either side
        ((7.5, 10, 22.5, 20), 400, {"box"}),
        ((10, 10, 20, 23), 400, {"box"}),
        ((11, 11, 21, 21), 400, set()),
        ((10, 10, 30, 30), 400, {"box"}),  # corners instead of sides
    ],
)
def test_box_and_area_against_the_polygon(box, area, expected):
    assert faults_of(annotation([SQUARE], box, area)) == expected


def test_overlap_of_parts_counts_once():
    """Two squares of 400 that share 300: a mask of 500, which the sum of 800 is not."""
    other = [15, 10, 35, 10, 35, 30, 15, 30]
    parts, box = [SQUARE, other, SQUARE], (10, 10, 25, 20)
    assert faults_of(annotation(parts, box, area=500)) == set()
    assert faults_of(annotation(parts, box, area=1500)) == {"area"}


def test_spikes_too_thin_to_draw_are_no_part_of_the_box():
    spike = [10, 10, 30, 10, 30, 20, 45, 20, 30, 20, 30, 30, 10, 30]
    assert faults_of(annotation([spike])) == {"crossing"}  # it runs back over itself


def test_positions_are_those_of_the_annotations():
    rows = [annotation([SQUARE]) for _ in range(12000)]  # more than are measured at once
    for row in (0, 5000, 11999):
        rows[row] = annotation([[1, 1, 2, 2, 3, 3]])
    assert np.flatnonzero(find_outline_faults(rows, SIZES).empty).tolist() == [0, 5000, 11999]
    assert len(find_outline_faults([], SIZES).empty) == 0


def test_findings_in_words():
    images = [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}]
    rows = [annotation([SQUARE]), annotation([]), annotation([SQUARE], area=0)]
    findings = Findings()
    check_outlines(rows, images, findings)
    assert [(p.kind.split("'")[1], p.count, p.severity.name) for p in findings.problems] == [
        ("area", 1, "WARNING"),
        ("segmentation", 1, "WARNING"),
    ]
    findings = Findings()
    check_outlines([annotation([]), annotation(None)], images, findings)
    assert findings.problems == []  # boxes only


def test_a_fifth_of_a_hundred_thousand_in_time():
    rng = np.random.default_rng(1)
    ring = (SQUARE[:2] + rng.random((60, 2)) * 10).ravel().tolist()
    rows = [annotation([ring], area=40) for _ in range(20000)]
    start = time.process_time()
    find_outline_faults(rows, SIZES)
    assert time.process_time() - start < 30  # it takes 3 s
