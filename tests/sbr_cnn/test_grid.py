"""Grid R-CNN's RoI heads: classification only, then location by grid points (methods 9.5)."""

from collections.abc import Callable

import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn
from torch.nn import functional as F

from sbr_cnn.grid import GridROIHeads
from sbr_cnn.grid_targets import decode_boxes, grid_targets

SIZE = (96, 128)


@pytest.fixture
def make_grid(make_heads) -> Callable[..., GridROIHeads]:
    """``make_grid(KEY, VALUE, ...)``: small heads with the test settings of the YAML file."""

    def make(*opts) -> GridROIHeads:
        return make_heads(
            *("MODEL.MASK_ON", False),
            *("MODEL.ROI_HEADS.NAME", "GridROIHeads"),
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.03),
            *("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.3),
            *("MODEL.ROI_GRID_HEAD.POOLER_SAMPLING_RATIO", 2),
            *("MODEL.ROI_GRID_HEAD.NUM_CONV", 2),
            *("MODEL.ROI_GRID_HEAD.POINT_DIM", 8),
            *opts,
        )

    return make


@pytest.fixture
def make_sample(make_proposals, make_targets) -> Callable[..., tuple]:
    """``make_sample(3, 0)``: proposals and that many ground-truth boxes for each picture.

    One more proposal overlaps every box well.
    """

    def make(*counts: int) -> tuple[list[Instances], list[Instances]]:
        targets, proposals = make_targets(*counts), make_proposals(*[20] * len(counts))
        near = [
            Instances(
                SIZE,
                proposal_boxes=Boxes(t.gt_boxes.tensor + torch.tensor([1.0, -1.0, 2.0, 1.0])),
                objectness_logits=torch.zeros(len(t)),
            )
            for t in targets
        ]
        return [Instances.cat(pair) for pair in zip(proposals, near, strict=True)], targets

    return make


def record_pooled(heads: GridROIHeads) -> list[list[Boxes]]:
    """The list to which every later call of the grid extractor appends its boxes."""
    seen: list[list[Boxes]] = []
    heads.grid_pooler.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    return seen


# ---- classification ----


def test_there_is_nothing_that_regresses_boxes(make_grid, make_sample, train_step):
    heads = make_grid()
    assert {name for name, _ in heads.box_predictor.named_parameters()} == {
        "cls_score.weight",
        "cls_score.bias",
    }
    assert set(train_step(heads, *make_sample(2, 1))) == {"loss_cls", "loss_grid"}


def test_classification_loss(make_grid, make_proposals, storage):
    predictor = make_grid().box_predictor
    x = torch.randn(5, 16)
    (sample,) = make_proposals(5)
    sample.gt_classes = torch.tensor([0, 3, 2, 3, 1])  # 3 is background
    with torch.no_grad():
        predictor.cls_score.weight.normal_()
    losses = predictor.losses(predictor(x), [sample])
    scores = x @ predictor.cls_score.weight.T + predictor.cls_score.bias
    expected = F.cross_entropy(scores, sample.gt_classes)
    assert {name: loss.item() for name, loss in losses.items()} == {
        "loss_cls": pytest.approx(expected.item())
    }


def test_proposals_are_the_candidates_of_every_class(make_grid):
    """NMS at 0.3 within a class, none between classes; scores from 0.03; boxes not moved."""
    predictor = make_grid().box_predictor
    boxes = Boxes(
        torch.tensor([[10.0, 10, 50, 50], [10, 30, 50, 66], [60, 10, 100, 50], [60, 62, 100, 90]])
    )
    assert pairwise_iou(boxes[0], boxes[1]).item() == pytest.approx(5 / 14)
    probabilities = torch.tensor(
        [
            [0.50, 0.30, 0.020, 0.180],  # two classes
            [0.40, 0.20, 0.040, 0.360],  # loses both to the first, has the third class
            [0.01, 0.60, 0.020, 0.370],
            [0.01, 0.01, 0.025, 0.955],  # none
        ]
    )
    predictions = (probabilities.log(), torch.zeros(4, 4))
    (found,), _ = predictor.inference(predictions, [Instances(SIZE, proposal_boxes=boxes)])
    rows = zip(
        found.pred_classes.tolist(),
        [round(score, 4) for score in found.scores.tolist()],
        found.pred_boxes.tensor.tolist(),
        strict=True,
    )
    expected = [(1, 0.6, 2), (0, 0.5, 0), (1, 0.3, 0), (2, 0.04, 1)]
    assert list(rows) == [(c, score, boxes.tensor[i].tolist()) for c, score, i in expected]


# ---- location ----


class FixedPoints(nn.Module):
    """A grid head that finds every border at the same place of its window, for every box."""

    def __init__(self, left: int, top: int, right: int, bottom: int) -> None:
        super().__init__()
        self.rows, self.columns = (top, 0, bottom), (left, 0, right)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.full((len(x), 9, 28, 28), -5.0)
        for point in range(9):
            logits[:, point, self.rows[point // 3], self.columns[point % 3]] = 5.0
        return logits


def test_detections_are_moved_and_clipped(make_grid, randomize, make_proposals, detect):
    heads = randomize(make_grid())
    seen = record_pooled(heads)
    heads.grid_head = FixedPoints(10, 12, 20, 18)
    detections = detect(heads, make_proposals(30, 0, 20))
    (candidates,) = seen
    assert [len(d) for d in detections] == [len(boxes) for boxes in candidates]
    assert len(detections[0]) > 3 and len(detections[1]) == 0 and len(detections[2]) > 3
    for detection, boxes in zip(detections, candidates, strict=True):
        x1, y1, x2, y2 = boxes.tensor.unbind(dim=1)
        # Window 0 begins half a size before the box, window 28 a size later; 28 cells a size.
        expected = [
            x1 + (x2 - x1) * (-0.5 + 10.5 / 28),
            y1 + (y2 - y1) * (-0.5 + 12.5 / 28),
            x1 + (x2 - x1) * (0.5 + 20.5 / 28),
            y1 + (y2 - y1) * (0.5 + 18.5 / 28),
        ]
        limits = [128.0, 96.0, 128.0, 96.0]
        clipped = [e.clamp(min=0, max=limit) for e, limit in zip(expected, limits, strict=True)]
        assert any((e != c).any() for e, c in zip(expected, clipped, strict=True)) or not len(boxes)
        torch.testing.assert_close(detection.pred_boxes.tensor, torch.stack(clipped, dim=1))
        assert detection.pred_boxes.nonempty().all()
        assert (detection.scores > 0.03).all()


def test_detections_use_fused_heat_maps(make_grid, randomize, make_maps, make_proposals, detect):
    heads = randomize(make_grid())
    seen, maps = record_pooled(heads), make_maps(1)
    (detection,) = detect(heads, make_proposals(30), maps)
    (boxes,) = seen[0]
    with torch.no_grad():
        x = heads.grid_pooler(list(maps.values()), [boxes])
        head = heads.grid_head
        fused = head.heat_maps(head.fuse(head.point_features(x)))
    expected = Boxes(decode_boxes(fused, boxes.tensor))
    expected.clip(SIZE)
    torch.testing.assert_close(detection.pred_boxes.tensor, expected.tensor)


def test_no_detections(make_grid, make_proposals, detect):
    # At the start all three classes and the background are about equal: 0.25 each.
    heads = make_grid("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.9)
    for found in (detect(heads, make_proposals(5, 5)), detect(heads, make_proposals(0, 0))):
        assert [tuple(d.pred_boxes.tensor.shape) for d in found] == [(0, 4), (0, 4)]


# ---- training ----


def capture_targets(heads: GridROIHeads, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The list to which every later loss of the grid branch appends its targets."""
    seen: list[Tensor] = []
    loss = heads.grid_head.loss
    monkeypatch.setattr(
        heads.grid_head, "loss", lambda x, targets: (seen.append(targets), loss(x, targets))[1]
    )
    return seen


@pytest.mark.parametrize("jitter", [0.0, 0.15])
def test_positives_train_on_their_ground_truth(
    make_grid, make_sample, train_step, monkeypatch, jitter
):
    heads = make_grid("MODEL.ROI_GRID_HEAD.JITTER", jitter)
    pooled, targets = record_pooled(heads), capture_targets(heads, monkeypatch)
    proposals, truth = make_sample(2, 0, 2)
    for i in (0, 2):  # far apart, so that it shows which of them a jittered box belongs to
        truth[i].gt_boxes = Boxes(torch.tensor([[10.0, 10, 40, 44], [70, 50, 110, 90]]) + i)
    train_step(heads, proposals, truth)
    assert len(pooled[0][0]) >= 2 and len(pooled[0][1]) == 0 and len(pooled[0][2]) >= 2
    at = 0
    for boxes, proposal, gt in zip(pooled[0], proposals, truth, strict=True):
        if not len(boxes):
            continue
        candidates = Boxes.cat([gt.gt_boxes, proposal.proposal_boxes]).tensor
        distance = (boxes.tensor[:, None] - candidates).abs().amax(dim=2).amin(dim=1)
        assert (distance < 1e-3).all() if jitter == 0 else (distance > 1e-3).all()
        # The discs are those of the ground truth that overlaps most.
        index = pairwise_iou(boxes, gt.gt_boxes).argmax(dim=1)
        expected = grid_targets(boxes.tensor, gt.gt_boxes.tensor[index], 28)
        assert torch.equal(targets[0][at : at + len(boxes)], expected)
        at += len(boxes)
    assert at == len(targets[0])


def test_at_most_so_many_positives(make_grid, make_sample, train_step):
    heads = make_grid("MODEL.ROI_GRID_HEAD.MAX_POSITIVES", 5, "MODEL.ROI_GRID_HEAD.JITTER", 0.0)
    pooled = record_pooled(heads)
    proposals, truth = make_sample(2, 2)
    counts = []
    for _ in range(20):
        train_step(heads, proposals, truth)
        counts.append([len(boxes) for boxes in pooled[-1]])
    # Four or more positives in either picture: five are drawn from all of them together.
    assert {sum(count) for count in counts} == {5}
    assert len({tuple(count) for count in counts}) > 1


def test_loss_weight(make_grid, make_sample, make_maps, train_step):
    sample, maps = make_sample(2, 1), make_maps(2)
    losses = []
    for weight in (1.0, 15.0):
        torch.manual_seed(3)
        heads = make_grid("MODEL.ROI_GRID_HEAD.LOSS_WEIGHT", weight)
        losses.append(train_step(heads, *sample, maps)["loss_grid"].item())
    assert losses[0] > 0
    assert losses[1] == pytest.approx(15 * losses[0], rel=1e-5)
    assert make_grid().loss_weight == 15


def gradients(heads: nn.Module, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    sum(losses.values()).backward()
    return {name: p.grad for name, p in heads.named_parameters() if p.requires_grad}


GROIE = ("MODEL.ROI_BOX_HEAD.EXTRACTOR", "groie", "MODEL.ROI_GRID_HEAD.EXTRACTOR", "groie")


@pytest.mark.parametrize("opts", [(), (*GROIE, "MODEL.GROIE.POST", "attention")])
def test_every_parameter_gets_a_gradient(make_grid, make_sample, train_step, randomize, opts):
    heads = randomize(make_grid(*opts))
    grads = gradients(heads, train_step(heads, *make_sample(3, 2)))
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []
    assert any(name.startswith("grid_pooler") for name in grads) == bool(opts)


@pytest.mark.parametrize("opts", [(), GROIE])
def test_without_positives_the_graph_stays(make_grid, make_sample, train_step, opts):
    heads = make_grid(*opts)
    losses = train_step(heads, *make_sample(0, 0))
    assert losses["loss_grid"].item() == 0
    assert losses["loss_cls"].item() > 0
    grads = gradients(heads, losses)
    assert [name for name, grad in grads.items() if grad is None] == []
    assert not any(grad.any() for name, grad in grads.items() if name.startswith("grid"))


def test_autocast(make_grid, make_sample, make_maps, train_step, detect, randomize):
    heads, maps, sample = randomize(make_grid()), make_maps(2), make_sample(3, 2)
    torch.manual_seed(5)
    exact = train_step(heads, *sample, maps)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = train_step(heads, *sample, maps)
        empty = train_step(heads, *make_sample(0, 0), maps)
        detections = detect(heads, sample[0], maps)
    for name, loss in half.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05)
    assert empty["loss_grid"].item() == 0 and empty["loss_grid"].dtype == torch.float32
    for detection in detections:
        assert len(detection) > 0
        assert detection.pred_boxes.tensor.dtype == torch.float32
        assert detection.pred_boxes.nonempty().all()
