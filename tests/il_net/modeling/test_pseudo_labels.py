"""Pseudo labels of hand-made detections, and against a plain loop."""

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.structures import BitMasks, Boxes, Instances

from il_net.modeling.pseudo_labels import make_pseudo_labels, pseudo_label_statistics

SIZE = (40, 60)  # height, width


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_detections(
    boxes: list[list[float]], scores: list[float], classes: list[int] | None = None, **fields
) -> Instances:
    found = Instances(SIZE)
    found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    found.scores = torch.tensor(scores)
    found.pred_classes = torch.tensor(classes or [0] * len(scores), dtype=torch.int64)
    for name, value in fields.items():
        found.set(name, value)
    return found


def label(*detections: Instances, **changes) -> list[Instances]:
    options = {"score_thresh": 0.7, "min_side": 2.0, "max_per_image": 100, "with_masks": False}
    return make_pseudo_labels(list(detections), **{**options, **changes})


BOX = [5.0, 5.0, 25.0, 15.0]


def test_fields_and_the_strict_threshold():
    boxes = [[0.0, 0.0, 9.0, 9.0], BOX, [1.0, 2.0, 30.0, 40.0]]
    found = make_detections(boxes, [0.9, 0.7, 0.71], [2, 1, 0], iou_scores=torch.rand(3))
    (one,) = label(found)
    assert one.image_size == SIZE
    assert one.gt_boxes.tensor.tolist() == [boxes[0], boxes[2]]
    assert one.gt_classes.tolist() == [2, 0]
    assert one.scores.tolist() == pytest.approx([0.9, 0.71])
    torch.testing.assert_close(one.iou_scores, found.iou_scores[[0, 2]])
    assert set(one.get_fields()) == {"gt_boxes", "gt_classes", "scores", "iou_scores"}


@pytest.mark.parametrize(
    ("box", "min_side", "kept"),
    [
        ([5.0, 5.0, 7.0, 25.0], 2.0, True),  # exactly the minimum
        ([5.0, 5.0, 6.75, 25.0], 2.0, False),  # narrow
        ([5.0, 5.0, 25.0, 6.75], 2.0, False),  # low
        ([5.0, 5.0, 6.0, 6.0], 1.0, True),  # one pixel
        ([5.0, 5.0, 6.0, 6.0], 0.0, True),
        ([5.0, 5.0, 5.0, 25.0], 0.0, False),  # no width: it could not be encoded
        ([5.0, 5.0, 25.0, 5.0], 0.0, False),
    ],
)
def test_small_boxes_are_dropped(box, min_side, kept):
    (one,) = label(make_detections([box], [0.9]), min_side=min_side)
    assert len(one) == kept


def test_the_best_are_kept_after_the_small_ones_are_dropped():
    boxes = [[0.0, 0.0, 1.0, 1.0], BOX, BOX, BOX]
    found = make_detections(boxes, [0.99, 0.8, 0.95, 0.9], [0, 1, 2, 3])
    (one,) = label(found, max_per_image=2)
    assert one.gt_classes.tolist() == [2, 3]


def test_equals_a_loop():
    for _ in range(20):
        count = int(torch.randint(30, ()))
        start = torch.rand(count, 2) * 30
        boxes = torch.cat([start, start + 6 * torch.rand(count, 2)], dim=1)
        found = make_detections(
            boxes.tolist(), torch.rand(count).tolist(), list(range(count)) or None
        )
        (one,) = label(found, score_thresh=0.4, min_side=2.0, max_per_image=5)
        expected = []
        for i in range(count):
            x1, y1, x2, y2 = boxes[i].tolist()
            if found.scores[i] > 0.4 and x2 - x1 >= 2 and y2 - y1 >= 2:
                expected.append((found.scores[i].item(), i))
        best = [i for _, i in sorted(expected, reverse=True)[:5]]
        assert one.gt_classes.tolist() == best
        assert one.gt_boxes.tensor.tolist() == boxes[best].tolist()


def test_images_stay_in_order_and_may_be_empty():
    empty = make_detections([], [], pred_masks=torch.zeros(0, 1, 28, 28))
    low = make_detections([BOX], [0.5], pred_masks=torch.ones(1, 1, 28, 28))
    good = make_detections([BOX], [0.9], [1], pred_masks=torch.ones(1, 1, 28, 28))
    labels = label(empty, good, low, with_masks=True)
    assert [len(one) for one in labels] == [0, 1, 0]
    for one in labels:
        assert isinstance(one.gt_masks, BitMasks)
        assert one.gt_masks.tensor.shape == (len(one), *SIZE)
        assert one.gt_masks.tensor.dtype == torch.bool
        assert one.gt_boxes.tensor.shape == (len(one), 4)
        assert one.gt_classes.dtype == torch.int64
    assert label() == []


# ---- masks ----


def test_masks_are_pasted_into_their_boxes():
    # Left half of a box of 20 x 10 pixels; then all of a box whose sides cut pixels.
    left = torch.zeros(28, 28)
    left[:, :14] = 0.9
    masks = torch.stack([left, torch.ones(28, 28)])[:, None]
    found = make_detections([BOX, [10.4, 8.6, 50.6, 33.3]], [0.9, 0.8], pred_masks=masks)
    (one,) = label(found, with_masks=True)
    expected = torch.zeros(2, *SIZE, dtype=torch.bool)
    expected[0, 5:15, 5:15] = True
    expected[1, 9:33, 10:51] = True  # the pixels whose centres are inside: 9.5 > 8.6, 33.5 > 33.3
    assert torch.equal(one.gt_masks.tensor, expected)


def test_masks_follow_their_boxes_and_stay_inside():
    count = 30
    start = torch.rand(count, 2) * torch.tensor([40.0, 20.0])
    boxes = torch.cat([start, start + 3 + torch.rand(count, 2) * 15], dim=1)
    shade = torch.rand(count)
    masks = (shade > 0.5).float()[:, None, None, None].expand(-1, 1, 28, 28)
    found = make_detections(boxes.tolist(), torch.rand(count).tolist(), pred_masks=masks)
    found.shade = shade
    (one,) = label(found, score_thresh=0.3, with_masks=True, max_per_image=10)
    assert len(one) == 10
    y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    order = found.scores.argsort(descending=True)[:10]
    for mask, i in zip(one.gt_masks.tensor, order.tolist(), strict=True):
        x1, y1, x2, y2 = boxes[i].tolist()
        inside = (x + 0.5 > x1) & (x + 0.5 < x2) & (y + 0.5 > y1) & (y + 0.5 < y2)
        assert torch.equal(mask, inside & (shade[i] > 0.5))


def test_a_probability_of_one_half_counts():
    masks = torch.stack([torch.full((28, 28), 0.5), torch.full((28, 28), 0.49)])[:, None]
    (one,) = label(make_detections([BOX, BOX], [0.9, 0.8], pred_masks=masks), with_masks=True)
    # Inside the outermost half cell, where the value fades to 0 outside of the box.
    assert one.gt_masks.tensor[0, 6:14, 6:24].all()
    assert not one.gt_masks.tensor[1].any()


def test_without_masks_none_are_made():
    found = make_detections([BOX], [0.9], pred_masks=torch.ones(1, 1, 28, 28))
    assert not label(found)[0].has("gt_masks")


# ---- statistics ----


def test_statistics_by_hand():
    labels = label(
        make_detections([BOX] * 2, [0.9, 0.8], [2, 0], iou_scores=torch.tensor([0.5, 0.75])),
        make_detections([], [], iou_scores=torch.zeros(0)),
        make_detections([BOX], [0.75], [2], iou_scores=torch.tensor([1.0])),
        make_detections([], [], iou_scores=torch.zeros(0)),
    )
    values = pseudo_label_statistics(labels, num_classes=4)
    assert all(isinstance(value, torch.Tensor) for value in values.values())
    histogram = values.pop("class_histogram")
    assert histogram.tolist() == [1, 0, 2, 0]
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        {
            "boxes_per_image": 0.75,
            "images_without_boxes": 0.5,
            "class_score": 2.45 / 3,
            "iou_score": 0.75,
        }
    )


def test_statistics_without_boxes_or_branch():
    values = pseudo_label_statistics(label(make_detections([], [])), num_classes=1)
    assert values.keys() == {"boxes_per_image", "images_without_boxes", "class_histogram"}
    assert values["boxes_per_image"] == 0
    assert values["images_without_boxes"] == 1
    assert values["class_histogram"].tolist() == [0]
    values = pseudo_label_statistics(label(make_detections([BOX], [0.9])), num_classes=1)
    assert "class_score" in values
    assert "iou_score" not in values
