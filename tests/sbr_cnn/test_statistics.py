"""What RoI heads count in training, against counts by hand and by brute force."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from sbr_cnn.statistics import RoIStatistics

LOOPS = ("MODEL.ROI_STATISTICS_PERIOD", 5)
STANDARD = (
    *("MODEL.ROI_HEADS.NAME", "ExtractorROIHeads"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
)


def target(*boxes: list[float]) -> Instances:
    found = Instances((100, 100), gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
    found.gt_classes = torch.zeros(len(boxes), dtype=torch.long)
    return found


def test_histogram_by_hand():
    """Boxes of height 10 against one of 10 x 10: IoU 1, 0.7, 0.5, 0.05 and 0."""
    statistics = RoIStatistics(num_classes=1, period=1)
    boxes = [[0.0, 0, 10, 10], [0, 0, 7, 10], [0, 0, 5, 10], [0, 0, 0.5, 10], [50, 50, 60, 60]]
    truth = target([0.0, 0, 10, 10])
    statistics.add_proposals(2, [Boxes(torch.tensor(boxes))], [truth])
    statistics.add_proposals(2, [Boxes(torch.tensor(boxes[:1]))], [target()])  # nothing to overlap
    histogram = statistics.read()[2]["iou_histogram"]
    expected = [0] * 20
    expected[0], expected[1], expected[10], expected[14], expected[19] = 2, 1, 1, 1, 1
    assert histogram == expected
    assert statistics.read() == {}


def test_positives_and_situations():
    statistics = RoIStatistics(num_classes=3, period=1)
    sample = Instances((9, 9), gt_classes=torch.tensor([0, 2, 3, 3]))
    statistics.add_sample(1, [sample, sample])
    assert statistics.read() == {1: {"positives": 4, "sampled": 8}}
    sample.situation = torch.tensor([1, 3, -1, -1])
    statistics.add_sample(1, [sample])
    assert statistics.read()[1]["situations"] == [0, 1, 0, 1]


@pytest.mark.parametrize(("opts", "loops"), [((), [1, 2, 3]), (STANDARD, [1])])
def test_heads_count_every_proposal_once_before_the_truth_joins(
    make_heads, make_proposals, make_targets, train_step, opts, loops
):
    heads = make_heads(*LOOPS, *opts)
    proposals, targets = make_proposals(30, 7, 3), make_targets(3, 2, 0)
    best = []
    for own, truth in zip(proposals, targets, strict=True):
        for box in own.proposal_boxes.tensor.tolist():
            shares = [0.0]
            for other in truth.gt_boxes.tensor.tolist():
                wide = max(0, min(box[2], other[2]) - max(box[0], other[0]))
                high = max(0, min(box[3], other[3]) - max(box[1], other[1]))
                areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
                shares.append(wide * high / (sum(areas) - wide * high))
            best.append(max(shares))
    expected = [sum(int(iou * 20) == i for iou in best) for i in range(20)]
    train_step(heads, proposals, targets)
    counts = heads.statistics.read()
    assert list(counts) == loops
    assert counts[1]["iou_histogram"] == expected
    for loop in loops:
        # At most 16 of an image are sampled; a loop's truth is no proposal of the next.
        assert 0 < counts[loop]["positives"] < counts[loop]["sampled"] <= 3 * 16
        assert 0 < sum(counts[loop]["iou_histogram"]) <= 40


def test_losses_are_the_same_with_and_without(
    make_heads, make_proposals, make_targets, train_step, make_maps
):
    plain, counting, maps = make_heads(), make_heads(*LOOPS), make_maps(2)
    counting.load_state_dict(plain.state_dict())
    proposals, targets = make_proposals(30, 7), make_targets(3, 2)
    results = []
    for heads in (plain, counting):
        torch.manual_seed(1)
        results.append(train_step(heads, proposals, targets, maps))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(loss, results[1][name]) for name, loss in results[0].items())


def test_period_is_checked(make_heads):
    with pytest.raises(ValueError, match=r"MODEL\.ROI_STATISTICS_PERIOD is 0 \(off\) or more"):
        make_heads("MODEL.ROI_STATISTICS_PERIOD", -1)
