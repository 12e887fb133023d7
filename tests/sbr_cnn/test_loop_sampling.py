"""Matching, sampling and refinement between the training loops (methods 4.2 and 4.3)."""

import math
from typing import NamedTuple

import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from sbr_cnn.schedule import Loop

SIZE = (96, 128)  # of the pictures that conftest.py makes
BACKGROUND = 3  # with three classes
# Everything is sampled: no draw decides what a test sees.
TAKE_ALL = (
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1000),
    *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
)


def one_loop(iou: float = 0.5) -> Loop:
    return Loop(number=1, pair="a", iou=iou, loss_weight=1.0)


def one_target(boxes: list[list[float]], classes: list[int]) -> Instances:
    target = Instances(SIZE)
    target.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    target.gt_classes = torch.tensor(classes, dtype=torch.long)
    return target


def rows(boxes: Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, boxes.tolist()))


@pytest.mark.usefixtures("storage")
class TestLabelAndSample:
    @pytest.mark.parametrize("tenths", [5, 6, 7, 8])
    def test_iou_at_the_threshold_is_positive(self, tenths, make_loops):
        """Inside a 10 x 10 box, one of height h has IoU h / 10."""
        heads = make_loops("a", *TAKE_ALL)
        target = one_target([[0, 0, 10, 10]], [2])
        candidates = Boxes(
            torch.tensor([[0, 0, 10, float(tenths)], [0, 0, 10, tenths - 0.01], [0, 0, 10, 9.9]])
        )
        (sample,) = heads.label_and_sample([candidates], [target], one_loop(tenths / 10))
        heights = sample.proposal_boxes.tensor[:, 3].tolist()
        classes = dict(zip(heights, sample.gt_classes.tolist(), strict=True))
        below = torch.tensor(tenths - 0.01).item()
        just_inside = torch.tensor(9.9).item()
        assert classes == {10: 2, tenths: 2, just_inside: 2, below: BACKGROUND}

    def test_no_low_quality_matches(self, make_loops):
        """The best box of a ground truth is still background below the threshold."""
        heads = make_loops("a", *TAKE_ALL, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False)
        target = one_target([[0, 0, 10, 10]], [1])
        (sample,) = heads.label_and_sample(
            [Boxes(torch.tensor([[0.0, 0.0, 10.0, 4.0]]))], [target], one_loop()
        )
        assert sample.gt_classes.tolist() == [BACKGROUND]
        assert not sample.is_gt.any()

    def test_ground_truth_joins_the_candidates(self, make_loops, make_boxes):
        heads = make_loops("a", *TAKE_ALL)
        target = one_target([[10, 10, 40, 40], [50, 20, 90, 80]], [2, 0])
        # The second candidate equals a ground truth and is none.
        candidates = Boxes.cat([make_boxes(5), target.gt_boxes[1]])
        (sample,) = heads.label_and_sample([candidates], [target], one_loop())
        assert rows(sample.proposal_boxes.tensor) == rows(
            torch.cat([candidates.tensor, target.gt_boxes.tensor])
        )
        assert rows(sample.proposal_boxes[sample.is_gt].tensor) == rows(target.gt_boxes.tensor)
        positive = sample[sample.gt_classes < BACKGROUND]
        best = pairwise_iou(target.gt_boxes, positive.proposal_boxes).max(dim=0)
        assert (best.values >= 0.5).all()
        assert torch.equal(positive.gt_index, best.indices)
        assert torch.equal(positive.gt_classes, target.gt_classes[best.indices])
        assert torch.equal(positive.gt_boxes.tensor, target.gt_boxes.tensor[best.indices])
        negative = sample[sample.gt_classes == BACKGROUND]
        assert len(negative) and (
            pairwise_iou(target.gt_boxes, negative.proposal_boxes).max(dim=0).values < 0.5
        ).all()

    def test_counts(self, make_loops):
        """16 boxes of which at most a quarter is positive; negatives fill the rest."""
        heads = make_loops("a")
        target = one_target([[10, 10, 70, 70]], [1])
        near = Boxes(target.gt_boxes.tensor + torch.rand(30, 4))
        far = Boxes(torch.tensor([[80.0, 10.0, 100.0, 30.0]]) + torch.rand(60, 4))
        for candidates, expected in [
            (Boxes.cat([near, far]), (4, 12)),
            (Boxes.cat([near[:2], far]), (3, 13)),  # two near ones and the ground truth
            (Boxes.cat([near, far[:5]]), (4, 5)),
            (far[:5], (1, 5)),
        ]:
            (sample,) = heads.label_and_sample([candidates], [target], one_loop())
            positive = int((sample.gt_classes == 1).sum())
            negative = int((sample.gt_classes == BACKGROUND).sum())
            assert (positive, negative) == expected
            assert len(sample) == sum(expected)
            assert (sample.gt_classes[:positive] == 1).all()  # positives come first

    def test_samples_are_drawn_anew(self, make_loops, make_boxes):
        heads = make_loops("a")
        target, candidates = one_target([[10, 10, 70, 70]], [1]), make_boxes(60)
        (first,), (second,) = (
            heads.label_and_sample([candidates], [target], one_loop()) for _ in range(2)
        )
        assert rows(first.proposal_boxes.tensor) != rows(second.proposal_boxes.tensor)

    def test_without_ground_truth_all_is_background(self, make_loops, make_boxes):
        heads = make_loops("a")
        candidates = make_boxes(6)
        (sample,) = heads.label_and_sample([candidates], [one_target([], [])], one_loop())
        assert sample.gt_classes.tolist() == [BACKGROUND] * 6
        assert not sample.is_gt.any()
        assert len(sample.gt_boxes) == 6
        assert rows(sample.proposal_boxes.tensor) == rows(candidates.tensor)


class Call(NamedTuple):
    boxes: list[Boxes]
    loop: Loop
    sample: list[Instances]


@pytest.fixture
def record(monkeypatch):
    """``record(heads)``: the calls of ``label_and_sample`` and the predicted deltas, in order."""

    def start(heads) -> tuple[list[Call], list[tuple[str, Tensor]]]:
        calls: list[Call] = []
        deltas: list[tuple[str, Tensor]] = []
        original = heads.label_and_sample

        def spy(boxes, targets, loop):
            sample = original(boxes, targets, loop)
            calls.append(Call(boxes, loop, sample))
            return sample

        monkeypatch.setattr(heads, "label_and_sample", spy)
        for letter, pair in heads.pairs.items():
            pair.box_predictor.register_forward_hook(
                lambda _, __, out, letter=letter: deltas.append((letter, out[1].detach()))
            )
        return calls, deltas

    return start


def decode(box: list[float], delta: list[float], weights: tuple[float, ...]) -> list[float]:
    """The box coder in plain arithmetic, and the clip to the picture."""
    x1, y1, x2, y2 = box
    dx, dy, dw, dh = (d / w for d, w in zip(delta, weights, strict=True))
    width, height = x2 - x1, y2 - y1
    x, y = x1 + width / 2 + dx * width, y1 + height / 2 + dy * height
    width, height = width * math.exp(dw), height * math.exp(dh)
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    limits = [SIZE[1], SIZE[0]] * 2
    return [min(max(c, 0), limit) for c, limit in zip(corners, limits, strict=True)]


def refine_by_hand(
    sample: list[Instances], deltas: Tensor, weights: tuple[float, ...]
) -> list[Tensor]:
    """Per image the decoded boxes of the whole sample without what was ground truth."""
    refined = []
    for image, image_deltas in zip(sample, deltas.split([len(s) for s in sample]), strict=True):
        moved = [
            decode(box, delta, weights)
            for box, delta, is_gt in zip(
                image.proposal_boxes.tensor.tolist(),
                image_deltas.tolist(),
                image.is_gt.tolist(),
                strict=True,
            )
            if not is_gt
        ]
        refined.append(torch.tensor(moved).view(-1, 4))
    return refined


@pytest.fixture
def make_moving(make_loops):
    """Looped heads whose deltas move the boxes by some pixels, differently in either pair."""

    def make(order: str, *opts):
        heads = make_loops(order, *opts)
        for pair in heads.pairs.values():
            torch.nn.init.normal_(pair.box_predictor.bbox_pred.bias, std=0.5)
            torch.nn.init.normal_(pair.box_predictor.bbox_pred.weight, std=0.2)
        return heads

    return make


WEIGHTS = {"a": (10.0, 10.0, 5.0, 5.0), "b": (20.0, 20.0, 10.0, 10.0)}


def test_the_boxes_of_every_step(make_moving, record, train_step, make_proposals, make_targets):
    """Loop t: box sample, then a mask sample of the refined boxes at the same IoU; loop t + 1
    starts from the refined boxes, not from the mask sample. Small samples, so that they differ."""
    heads = make_moving("ab")
    calls, deltas = record(heads)
    proposals, targets = make_proposals(60, 50), make_targets(3, 2)
    train_step(heads, proposals, targets)

    assert [call.loop.number for call in calls] == [1, 1, 2, 2]
    assert [call.loop.iou for call in calls] == [0.5, 0.5, 0.6, 0.6]
    assert [letter for letter, _ in deltas] == ["a", "b"]
    for given, proposal in zip(calls[0].boxes, proposals, strict=True):
        assert torch.equal(given.tensor, proposal.proposal_boxes.tensor)
    for loop, letter in enumerate("ab"):
        box, mask = calls[2 * loop], calls[2 * loop + 1]
        assert sum(int(s.is_gt.sum()) for s in box.sample) > 0
        expected = refine_by_hand(box.sample, deltas[loop][1], WEIGHTS[letter])
        for refined, image, by_hand in zip(mask.boxes, box.sample, expected, strict=True):
            assert len(refined) == len(image) - int(image.is_gt.sum())
            torch.testing.assert_close(refined.tensor, by_hand, rtol=1e-4, atol=1e-3)
            assert not refined.tensor.requires_grad
    _, first_mask, second_box, _ = calls
    for start, refined, sampled in zip(
        second_box.boxes, first_mask.boxes, first_mask.sample, strict=True
    ):
        assert torch.equal(start.tensor, refined.tensor)
        assert rows(start.tensor) != rows(sampled.proposal_boxes.tensor)


@pytest.mark.parametrize("interleaved", [True, False])
def test_ground_truth_joins_every_sample_once(
    interleaved, make_moving, record, train_step, make_proposals, make_targets
):
    heads = make_moving("aaa", *TAKE_ALL, "MODEL.ROI_LOOP_HEAD.INTERLEAVED", interleaved)
    calls, _ = record(heads)
    targets = make_targets(3, 2)
    train_step(heads, make_proposals(10, 20), targets)
    expected = [1, 1, 2, 2, 3, 3] if interleaved else [1, 2, 3]
    assert [call.loop.number for call in calls] == expected
    for call in calls:
        # Were the ground truth of the loop before still there, the numbers would grow.
        assert [len(sample) for sample in call.sample] == [10 + 3, 20 + 2]
        for sample, target in zip(call.sample, targets, strict=True):
            assert rows(sample.proposal_boxes[sample.is_gt].tensor) == rows(target.gt_boxes.tensor)


@pytest.mark.parametrize("interleaved", [True, False])
def test_masks_train_on_the_sample_that_the_key_says(
    interleaved, make_moving, record, train_step, make_proposals, make_targets
):
    heads = make_moving("a", "MODEL.ROI_LOOP_HEAD.INTERLEAVED", interleaved)
    calls, _ = record(heads)
    pooled: list[list[Boxes]] = []
    heads.pairs["a"].mask_pooler.register_forward_pre_hook(lambda _, args: pooled.append(args[1]))
    train_step(heads, make_proposals(40, 40), make_targets(3, 2))
    assert len(calls) == (2 if interleaved else 1)
    for boxes, sample in zip(pooled[0], calls[-1].sample, strict=True):
        positive = sample.proposal_boxes[sample.gt_classes < BACKGROUND]
        assert len(positive) and torch.equal(boxes.tensor, positive.tensor)


def test_boxes_without_masks_are_not_sampled_twice(
    make_moving, record, train_step, make_proposals, make_targets
):
    heads = make_moving("aa", "MODEL.MASK_ON", False)
    calls, _ = record(heads)
    train_step(heads, make_proposals(10, 10), make_targets(2, 2))
    assert [call.loop.number for call in calls] == [1, 2]
