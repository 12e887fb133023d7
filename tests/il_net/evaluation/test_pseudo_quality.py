"""Pseudo labels against true ones: IoUs and counts that can be worked out on paper."""

import json
import random

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.structures import Boxes, Instances

from il_net.evaluation.pseudo_quality import PseudoQuality, append_summary, match

# Ten by ten; a box of its upper h rows has an IoU of h / 10 with it.
WHOLE = [0, 0, 10, 10]


def rows(h: float) -> list[float]:
    return [0, 0, 10, h]


def labels(*boxes: tuple[list[float], int], size: tuple[int, int] = (100, 100)) -> Instances:
    """Instances of (box, class) pairs."""
    found = Instances(size)
    found.gt_boxes = Boxes(torch.tensor([box for box, _ in boxes]).float().reshape(-1, 4))
    found.gt_classes = torch.tensor([label for _, label in boxes], dtype=torch.int64)
    return found


def compare(pseudo: list, truth: list, num_classes: int = 3) -> dict:
    quality = PseudoQuality(num_classes)
    quality.add(labels(*pseudo), labels(*truth))
    return quality.summary()


def bins(**counts: int) -> list[int]:
    """Ten bins with ``b3=2``: two in [0.3, 0.4)."""
    return [counts.get(f"b{i}", 0) for i in range(10)]


# ---- one image ----


@pytest.mark.parametrize(
    ("h", "bin_", "found"),
    [
        *((0.5, 0, False), (1, 1, False), (2, 2, False), (3, 3, False), (4.99, 4, False)),
        # A bound belongs to the bin above it, and 0.5 is found.
        *((5, 5, True), (6, 6, True), (7, 7, True), (8, 8, True), (9, 9, True), (10, 9, True)),
    ],
)
def test_bins_and_the_threshold(h, bin_, found):
    summary = compare([(rows(h), 1)], [(WHOLE, 1)])
    for view, share in (("pseudo", "precision"), ("truth", "recall")):
        assert summary[view]["iou_histogram"] == bins(**{f"b{bin_}": 1}), view
        assert summary[view][share] == float(found), view
        assert summary[view]["no_overlap"] == 0, view
        assert summary[view]["wrong_class"] == bins(), view


def test_a_missed_object_is_no_bad_pseudo_box():
    """As it is in the thesis' count: the second truth is missed, the pseudo box is perfect."""
    summary = compare([(WHOLE, 0)], [(WHOLE, 0), ([50, 50, 60, 60], 2)])
    assert summary["pseudo"]["iou_histogram"] == bins(b9=1)
    assert summary["pseudo"]["precision"] == 1
    assert summary["truth"]["iou_histogram"] == bins(b0=1, b9=1)
    assert summary["truth"]["no_overlap"] == 1
    assert summary["truth"]["recall"] == 0.5
    assert summary["truth"]["class_recall"] == [1.0, None, 0.0]
    assert summary["truth"]["class_boxes"] == [1, 0, 1]


def test_an_invented_box_is_no_missed_object_and_no_class_error():
    summary = compare([(WHOLE, 0), ([50, 50, 60, 60], 2)], [(WHOLE, 0)])
    assert summary["pseudo"]["precision"] == 0.5
    assert summary["pseudo"]["no_overlap"] == 1
    assert summary["pseudo"]["iou_histogram"] == bins(b0=1, b9=1)
    assert summary["pseudo"]["wrong_class"] == bins()
    # In the first bin nothing overlaps anything: no share.
    assert summary["pseudo"]["wrong_class_share"] == [None] * 9 + [0.0]
    assert summary["pseudo"]["class_precision"] == [1.0, None, 0.0]
    assert summary["truth"]["recall"] == 1


def test_wrong_class_is_counted_where_the_box_is():
    summary = compare([(rows(7), 0), (rows(2), 1), (rows(2), 0)], [(WHOLE, 1)])
    pseudo, truth = summary["pseudo"], summary["truth"]
    assert pseudo["iou_histogram"] == bins(b2=2, b7=1)
    assert pseudo["wrong_class"] == bins(b2=1, b7=1)
    assert pseudo["wrong_class_share"] == [None, None, 0.5, *[None] * 4, 1.0, None, None]
    assert pseudo["precision"] == 0
    # The truth's best box is the one of 0.7, of another class; its own class is not near enough.
    assert (truth["iou_histogram"], truth["wrong_class"]) == (bins(b7=1), bins(b7=1))
    assert truth["recall"] == 0


def test_boxes_that_overlap_nothing_do_not_dilute_the_share_of_wrong_classes():
    elsewhere = [([50, 50, 60, 60], 0)] * 3
    summary = compare([(rows(0.5), 0), *elsewhere], [(WHOLE, 1)])
    assert summary["pseudo"]["iou_histogram"] == bins(b0=4)
    assert summary["pseudo"]["wrong_class_share"][0] == 1.0


def test_found_by_a_box_of_its_class_beside_a_better_one_of_another():
    summary = compare([(WHOLE, 0)], [(WHOLE, 1), (rows(5), 0)])
    assert summary["pseudo"]["wrong_class"] == bins(b9=1)
    assert summary["pseudo"]["precision"] == 1
    assert summary["truth"]["class_recall"] == [1.0, 0.0, None]


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_best_ones_that_of_the_right_class_counts(order):
    summary = compare([(rows(8), 0)], [(WHOLE, 0), (WHOLE, 1)][::order])
    assert summary["pseudo"]["wrong_class"] == bins()
    assert summary["truth"]["wrong_class"] == bins(b8=1)  # the other truth's


@pytest.mark.parametrize(
    ("pseudo", "truth"),
    [([], []), ([(WHOLE, 0)] * 2, []), ([], [(WHOLE, 0)] * 2)],
    ids=["neither", "no truth", "no pseudo"],
)
def test_images_without_boxes(pseudo, truth):
    summary = compare(pseudo, truth)
    assert summary["images"] == 1
    for view, share, boxes in (("pseudo", "precision", pseudo), ("truth", "recall", truth)):
        assert summary[view]["boxes"] == summary[view]["no_overlap"] == len(boxes)
        assert summary[view]["iou_histogram"] == bins(b0=len(boxes))
        assert summary[view][share] == (0 if boxes else None)
        assert summary[view]["wrong_class"] == bins()


def test_a_box_may_serve_several():
    by_pseudo, by_truth = match(
        torch.tensor([WHOLE, rows(6)]).float(),
        torch.tensor([0, 0]),
        torch.tensor([WHOLE]).float(),
        torch.tensor([0]),
    )
    assert by_pseudo.found.tolist() == [True, True]
    assert by_pseudo.iou.tolist() == pytest.approx([1, 0.6])
    assert (by_truth.found.tolist(), by_truth.iou.tolist()) == ([True], [1.0])


def iou(a: list[int], b: list[int]) -> float:
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def test_many_images_are_the_sum_of_loops_over_boxes():
    draw = random.Random(0)
    quality = PseudoQuality(3)
    precise = recalled = pseudos = truths = 0
    histogram = {"pseudo": [0] * 10, "truth": [0] * 10}

    def some() -> list[tuple[list[int], int]]:
        corners = [(draw.randrange(30), draw.randrange(30)) for _ in range(draw.randrange(7))]
        return [
            ([x, y, x + draw.randint(5, 25), y + draw.randint(5, 25)], draw.randrange(3))
            for x, y in corners
        ]

    for _ in range(60):
        pseudo, truth = some(), some()
        quality.add(labels(*pseudo), labels(*truth))
        pseudos, truths = pseudos + len(pseudo), truths + len(truth)
        precise += sum(any(iou(p, t) >= 0.5 and a == b for t, b in truth) for p, a in pseudo)
        recalled += sum(any(iou(p, t) >= 0.5 and a == b for p, a in pseudo) for t, b in truth)
        for view, ours, others in (("pseudo", pseudo, truth), ("truth", truth, pseudo)):
            for box, _ in ours:
                best = max((iou(box, other) for other, _ in others), default=0)
                histogram[view][min(int(best * 10 + 1e-9), 9)] += 1
    summary = quality.summary()
    assert 0 < precise < pseudos
    assert summary["images"] == 60
    assert summary["pseudo"]["precision"] == precise / pseudos
    assert summary["truth"]["recall"] == recalled / truths
    for view, count in (("pseudo", pseudos), ("truth", truths)):
        assert summary[view]["boxes"] == sum(summary[view]["class_boxes"]) == count
        assert summary[view]["iou_histogram"] == histogram[view]


def test_another_frame_is_refused():
    with pytest.raises(ValueError, match=r"\(100, 100\).*\(50, 50\)"):
        PseudoQuality(3).add(labels(), labels(size=(50, 50)))


# ---- the file ----


def test_one_line_for_each_period(tmp_path):
    path = tmp_path / "new" / "pseudo_quality.jsonl"
    first, second = PseudoQuality(2), PseudoQuality(2)
    first.add(labels((WHOLE, 0)), labels((WHOLE, 0)))
    append_summary(path, 100, first, ["leaf", "spot"])
    append_summary(path, 200, second, ["leaf", "spot"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [100, 200]
    assert lines[0]["classes"] == ["leaf", "spot"]
    assert lines[0]["pseudo"] == first.summary()["pseudo"]
    assert lines[0]["truth"]["class_recall"] == [1.0, None]
    assert (lines[1]["images"], lines[1]["truth"]["recall"]) == (0, None)
