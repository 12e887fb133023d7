"""Upgraded box predictors: the filter and the score cut against plain loops, and real RoI heads."""

import copy
import math
import re
from collections.abc import Iterator

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_roi_heads
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.rotated_fast_rcnn import RotatedFastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from il_net.config import load_config
from il_net.modeling.box_predictor import (
    ILNetOutputLayers,
    filter_counts,
    score_cut,
    upgrade_predictors,
)
from il_net.modeling.pseudo_labels import make_pseudo_labels
from sbr_cnn import add_sbr_cnn_config

SIZE = (96, 128)
K, D = 3, 16
LEVELS = ("p2", "p3", "p4", "p5")
TINY = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.ROI_HEADS.IN_FEATURES", str(list(LEVELS))),
    *("MODEL.ROI_HEADS.NUM_CLASSES", str(K)),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    *("MODEL.ROI_BOX_HEAD.NUM_FC", "1"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", str(D)),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "7"),
    *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "2"),
    *("MODEL.ROI_IOU_HEAD.HIDDEN_DIM", "8"),
]
STOCK = ["SEMISUP.FOCAL_GAMMA", "0.0"]
BRANCH = ["MODEL.ROI_IOU_HEAD.ENABLED", "True"]
AGNOSTIC = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]


@pytest.fixture(autouse=True)
def _seed_and_one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_config(*opts: str) -> CfgNode:
    return load_config("", [*TINY, *opts], add_sbr_cnn_config)


def make_stock(*opts: str) -> FastRCNNOutputLayers:
    predictor = FastRCNNOutputLayers(make_config(*opts), ShapeSpec(channels=D))
    nn.init.normal_(predictor.cls_score.weight)
    nn.init.normal_(predictor.bbox_pred.weight)
    return predictor


def make_predictor(*opts: str) -> ILNetOutputLayers:
    predictor = make_stock(*opts)
    upgrade_predictors(predictor, make_config(*opts))
    if predictor.iou_head is not None:
        for parameter in predictor.iou_head.parameters():
            nn.init.normal_(parameter, std=0.3)
    return predictor


def make_boxes(count: int) -> Boxes:
    start = torch.rand(count, 2) * torch.tensor([90.0, 60.0])
    return Boxes(torch.cat([start, start + 8 + torch.rand(count, 2) * 24], dim=1))


def make_proposals(*counts: int) -> list[Instances]:
    return [
        Instances(SIZE, proposal_boxes=make_boxes(n), objectness_logits=torch.zeros(n))
        for n in counts
    ]


def make_sample(*counts: int, num_classes: int = K) -> list[Instances]:
    """Proposals matched with random ground truth that lies close to them."""
    sample = make_proposals(*counts)
    for image in sample:
        image.gt_boxes = Boxes(image.proposal_boxes.tensor + torch.rand(len(image), 4))
        image.gt_classes = torch.randint(num_classes + 1, (len(image),))
    return sample


def make_predictions(num_rois: int, *, num_classes: int = K, deltas: int = 1) -> tuple[Tensor, ...]:
    """Random class logits, deltas of so many classes and IoU logits."""
    return (
        2 * torch.randn(num_rois, num_classes + 1),
        torch.randn(num_rois, 4 * deltas),
        2 * torch.randn(num_rois, num_classes + 1),
    )


def train(predictor: nn.Module, x: Tensor, sample: list[Instances]) -> dict[str, Tensor]:
    with EventStorage():
        return predictor.losses(predictor(x), sample)


# ---- upgrade ----


@pytest.mark.parametrize("agnostic", [[], AGNOSTIC])
def test_stock_heads_compute_what_they_did(agnostic):
    stock = make_stock(*STOCK, *agnostic)
    ours = copy.deepcopy(stock)
    upgrade_predictors(ours, make_config(*STOCK, *agnostic))
    x, sample = torch.randn(12, D), make_sample(7, 0, 5)
    expected, losses = train(stock, x, sample), train(ours, x, sample)
    assert losses == expected  # bit by bit
    assert expected["loss_cls"] > 0
    assert expected["loss_box_reg"] > 0
    for one, other in zip(stock(x), ours(x), strict=True):
        assert torch.equal(one, other)
    ours_found, ours_rows = ours.inference(ours(x), sample)
    found, rows = stock.inference(stock(x), sample)
    for a, b, i, j in zip(found, ours_found, rows, ours_rows, strict=True):
        assert set(b.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(i, j)


def test_modules_names_and_weights_stay():
    heads = nn.ModuleDict({"box": make_stock(), "other": nn.Linear(2, 2)})
    predictor, before = heads["box"], dict(heads.named_parameters())
    upgrade_predictors(heads, make_config(*BRANCH))
    assert heads["box"] is predictor
    assert type(predictor) is ILNetOutputLayers
    after = dict(heads.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name for name in after if name not in before} == {
        f"box.iou_head.layers.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert heads.state_dict().keys() == after.keys()


def test_the_branch_is_made_on_the_predictors_device():
    predictor = make_stock().to("meta")
    upgrade_predictors(predictor, make_config(*BRANCH))
    assert all(p.device.type == "meta" for p in predictor.parameters())


class Scaled(FastRCNNOutputLayers):
    """A predictor with a change of its own."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return 2 * scores, deltas


def test_a_subclass_keeps_what_it_overrides():
    predictor = Scaled(make_config(), ShapeSpec(channels=D))
    nn.init.normal_(predictor.cls_score.weight)
    upgrade_predictors(predictor, make_config(*BRANCH))
    assert isinstance(predictor, Scaled)
    assert isinstance(predictor, ILNetOutputLayers)
    x = torch.randn(4, D)
    scores, deltas, ious = predictor(x)
    torch.testing.assert_close(scores, 2 * predictor.cls_score(x))
    torch.testing.assert_close(ious, predictor.iou_head(x, scores, deltas))
    assert copy.deepcopy(predictor)(x)[0].equal(scores)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SEMISUP.FOCAL_GAMMA", "-1.0"], "SEMISUP.FOCAL_GAMMA.*-1.0"),
        ([*BRANCH, "MODEL.ROI_IOU_HEAD.LOSS", "bce"], "MODEL.ROI_IOU_HEAD.LOSS"),
    ],
)
def test_a_wrong_key_is_named(opts, message):
    with pytest.raises(ValueError, match=message):
        upgrade_predictors(make_stock(), make_config(*opts))


def test_a_detector_without_box_predictor():
    upgrade_predictors(nn.Linear(2, 2), make_config(*STOCK))
    for opts in ([], [*STOCK, *BRANCH]):
        with pytest.raises(ValueError, match="SEMISUP.FOCAL_GAMMA: 0.*ROI_IOU_HEAD.ENABLED"):
            upgrade_predictors(nn.Linear(2, 2), make_config(*opts))


def test_a_classifier_by_sigmoid_is_refused():
    predictor = make_stock()
    predictor.use_sigmoid_ce = True  # as later versions of Detectron2 have it
    for opts in ([], [*STOCK, *BRANCH]):
        with pytest.raises(ValueError, match="MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE"):
            upgrade_predictors(predictor, make_config(*opts))
    upgrade_predictors(predictor, make_config(*STOCK))


def test_the_branch_needs_upright_boxes():
    rotated = ["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "(10.0, 10.0, 5.0, 5.0, 1.0)"]
    predictor = RotatedFastRCNNOutputLayers(make_config(*rotated), ShapeSpec(channels=D))
    with pytest.raises(ValueError, match="ROI_IOU_HEAD.ENABLED.*RotatedFastRCNNOutputLayers"):
        upgrade_predictors(predictor, make_config(*rotated, *BRANCH))


# ---- losses ----


def focal(entropy: float) -> float:
    return (1 - math.exp(-entropy)) ** 1.5 * entropy


def cross_entropy(row: list[float], true: int) -> float:
    return math.log(sum(math.exp(value) for value in row)) - row[true]


@pytest.mark.parametrize("weight", [{}, {"loss_cls": 0.5, "loss_box_reg": 3.0}])
def test_focal_classification_leaves_the_box_loss_alone(weight):
    ours, stock = make_predictor(), make_stock()
    stock.load_state_dict(ours.state_dict())
    ours.loss_weight = stock.loss_weight = weight
    x, sample = torch.randn(9, D), make_sample(5, 4)
    losses, expected = train(ours, x, sample), train(stock, x, sample)
    assert losses.keys() == {"loss_cls", "loss_box_reg"}
    assert losses["loss_box_reg"] == expected["loss_box_reg"]
    rows = ours(x)[0].double().tolist()
    classes = torch.cat([image.gt_classes for image in sample]).tolist()
    mean = sum(focal(cross_entropy(r, c)) for r, c in zip(rows, classes, strict=True)) / 9
    assert losses["loss_cls"].item() == pytest.approx(weight.get("loss_cls", 1.0) * mean, rel=1e-5)


@pytest.mark.parametrize("num_classes", [1, K])
@pytest.mark.parametrize("agnostic", [[], AGNOSTIC])
def test_the_iou_loss_equals_a_loop(agnostic, num_classes):
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", str(num_classes)]
    predictor = make_predictor(*BRANCH, *agnostic, *classes)
    x, sample = torch.randn(40, D), make_sample(25, 15, num_classes=num_classes)
    nn.init.normal_(predictor.bbox_pred.weight, std=0.3)  # IoUs around mu
    losses = train(predictor, x, sample)
    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_box_iou"}
    predictions = predictor(x)
    # Detectron2 decodes for the ground-truth class; its IoU is of all pairs.
    decoded = make_stock(*agnostic, *classes).predict_boxes_for_gt_classes(predictions[:2], sample)
    total, row, good = 0.0, 0, []
    for image, boxes in zip(sample, decoded, strict=True):
        ious = pairwise_iou(Boxes(boxes), image.gt_boxes)
        for i, true in enumerate(image.gt_classes.tolist()):
            if true < num_classes:
                good.append(ious[i, i].item() > 0.75)
                p = predictions[2][row, true].double().sigmoid().item()
                total += focal(-math.log(p if good[-1] else 1 - p))
            row += 1
    assert 0 < sum(good) < len(good)  # both targets occur
    assert losses["loss_box_iou"].item() == pytest.approx(total / 40, rel=1e-4)


@pytest.mark.parametrize("counts", [(0,), (0, 0), (3, 0)])
def test_no_rois_or_no_positives_reach_every_parameter(counts):
    predictor = make_predictor(*BRANCH)
    sample = make_proposals(*counts)  # without gt_boxes, as an image without ground truth has none
    for image in sample:
        image.gt_classes = torch.full((len(image),), K)
    losses = train(predictor, torch.randn(sum(counts), D), sample)
    assert losses["loss_box_iou"] == 0
    sum(losses.values()).backward()
    for name, parameter in predictor.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_under_autocast_losses_and_scores_are_fp32():
    predictor = make_predictor(*BRANCH)
    x, sample = torch.randn(12, D), make_sample(7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16), EventStorage():
        predictions = predictor(x)
        losses = predictor.losses(predictions, sample)
        detections, _ = predictor.inference(predictions, sample)
    assert all(tensor.dtype == torch.bfloat16 for tensor in predictions)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    exact = [tensor.detach().float() for tensor in predictions]
    with EventStorage():
        expected = predictor.losses(exact, sample)
    assert losses["loss_cls"] == expected["loss_cls"]
    assert losses["loss_box_iou"] == expected["loss_box_iou"]
    for found, other in zip(detections, predictor.inference(exact, sample)[0], strict=True):
        assert found.scores.dtype == found.iou_scores.dtype == torch.float32
        assert torch.equal(found.scores, other.scores)
        assert torch.equal(found.iou_scores, other.iou_scores)


# ---- filter ----


def logit(probabilities: list[list[float]]) -> Tensor:
    return torch.tensor(probabilities).logit()


def by_hand(*opts: str) -> ILNetOutputLayers:
    """Two classes, class-agnostic boxes, theta 0.5."""
    return make_predictor(
        *("MODEL.ROI_HEADS.NUM_CLASSES", "2"),
        *("MODEL.ROI_IOU_HEAD.TEST_THRESH", "0.5"),
        *(*BRANCH, *AGNOSTIC, *opts),
    )


def detect(
    predictor: ILNetOutputLayers,
    boxes: list[list[float]],
    probs: list[list[float]],
    ious: list[list[float]],
) -> Instances:
    proposals = [Instances(SIZE, proposal_boxes=Boxes(torch.tensor(boxes)))]
    predictions = (torch.tensor(probs).log(), torch.zeros(len(boxes), 4), logit(ious))
    (found,), _ = predictor.inference(predictions, proposals)
    return found


LEFT, RIGHT = [0.0, 0.0, 20.0, 20.0], [50.0, 50.0, 80.0, 80.0]


def test_a_box_is_removed_for_all_classes_by_the_score_of_its_best_one():
    # Left: best class 1, IoU score 0.5, not above theta; class 0 would have had 0.9.
    found = detect(
        by_hand(),
        [LEFT, RIGHT],
        [[0.3, 0.6, 0.1], [0.3, 0.6, 0.1]],
        [[0.9, 0.5, 0.9], [0.1, 0.51, 0.1]],
    )
    assert found.pred_boxes.tensor.tolist() == [RIGHT, RIGHT]
    assert found.pred_classes.tolist() == [1, 0]
    # Each detection has the score of its own class.
    assert found.iou_scores.tolist() == pytest.approx([0.51, 0.1])


def test_background_is_never_filtered():
    predictor = by_hand("MODEL.ROI_IOU_HEAD.TEST_THRESH", "1.0")
    found = detect(
        predictor,
        [LEFT, RIGHT],
        [[0.4, 0.1, 0.5], [0.5, 0.1, 0.4]],
        [[0.2, 0.2, 0.2], [0.99, 0.99, 0.99]],
    )
    assert found.pred_boxes.tensor.tolist() == [LEFT, LEFT]
    assert found.scores.tolist() == pytest.approx([0.4, 0.1])
    assert found.iou_scores.tolist() == pytest.approx([0.2, 0.2])


def test_the_filter_precedes_nms_and_nms_the_pseudo_label_threshold():
    near = [1.0, 0.0, 21.0, 20.0]
    given = (
        [LEFT, near],
        [[0.9, 0.05, 0.05], [0.8, 0.1, 0.1]],
        [[0.4, 0.4, 0.4], [0.6, 0.6, 0.6]],
    )

    def labels(*opts: str) -> list[list[float]]:
        found = detect(by_hand(*opts), *given)
        options = {"score_thresh": 0.7, "min_side": 2.0, "max_per_image": 100}
        (one,) = make_pseudo_labels([found], **options, with_masks=False)
        return one.gt_boxes.tensor.tolist()

    # Without the filter the better box suppresses the other.
    assert labels("MODEL.ROI_IOU_HEAD.FILTER", "False") == [LEFT]
    assert labels() == [near]


@pytest.mark.parametrize("agnostic", [[], AGNOSTIC])
@pytest.mark.parametrize("num_classes", [1, K])
@pytest.mark.parametrize("broken", [False, True])
def test_filtered_inference_equals_the_plain_one_on_what_a_loop_keeps(
    agnostic, num_classes, broken
):
    opts = [*agnostic, "MODEL.ROI_HEADS.NUM_CLASSES", str(num_classes)]
    ours, stock = make_predictor(*BRANCH, *opts), make_stock(*opts)
    proposals = make_proposals(60, 0, 40)
    predictions = make_predictions(
        100, num_classes=num_classes, deltas=1 if agnostic else num_classes
    )
    if broken:  # Detectron2 drops such rows; ours must not mistake one row for another
        predictions[0][3] = math.nan
        predictions[1][0, 1] = math.inf
        predictions[2][70] = math.nan
    found, rows = ours.inference(predictions, proposals)
    start, removed = 0, 0
    for image, detections, row in zip(proposals, found, rows, strict=True):
        part = [tensor[start : start + len(image)] for tensor in predictions]
        keep = []
        for i in range(len(image)):
            if not all(torch.isfinite(tensor[i]).all() for tensor in part):
                continue
            best = max(range(num_classes + 1), key=lambda k, i=i: part[0][i, k].item())
            if best == num_classes or 1 / (1 + math.exp(-part[2][i, best].item())) > 0.4:
                keep.append(i)
            else:
                removed += 1
        (expected,), (kept,) = stock.inference([part[0][keep], part[1][keep]], [image[keep]])
        assert torch.equal(detections.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(detections.scores, expected.scores)
        assert torch.equal(detections.pred_classes, expected.pred_classes)
        assert row.tolist() == [keep[i] for i in kept.tolist()]
        scores = part[2][row, detections.pred_classes].sigmoid()
        torch.testing.assert_close(detections.iou_scores, scores)
        start += len(image)
    assert 0 < removed < 60
    assert filter_counts(ours)["filtered_proposals"] == removed


@pytest.mark.parametrize(
    "opts", [["MODEL.ROI_IOU_HEAD.TEST_THRESH", "-0.01"], ["MODEL.ROI_IOU_HEAD.FILTER", "False"]]
)
def test_without_filter_the_detections_are_the_plain_ones(opts):
    ours, stock = make_predictor(*BRANCH, *opts), make_stock()
    proposals, predictions = make_proposals(50, 30), make_predictions(80, deltas=K)
    predictions[2][5] = -200.0  # a score of 0
    found, rows = ours.inference(predictions, proposals)
    expected, plain_rows = stock.inference(predictions[:2], proposals)
    for one, other, row, plain in zip(found, expected, rows, plain_rows, strict=True):
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(row, plain)
        assert one.has("iou_scores")
    assert filter_counts(ours) == {"filtered_proposals": 0, "filtered_candidates": 0}


def test_counts_of_the_last_inference():
    predictor = by_hand()
    assert filter_counts(predictor) == {}
    probs = [[0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.8, 0.1, 0.1]]
    ious = [[0.1] * 3, [0.1] * 3, [0.1] * 3, [0.9] * 3]
    boxes = [LEFT, RIGHT, LEFT, RIGHT]
    with score_cut(predictor, 0.7):
        for _ in range(2):
            detect(predictor, boxes, probs, ious)
    # The first and the second; only the first would have been a pseudo label.
    assert filter_counts(predictor) == {"filtered_proposals": 2, "filtered_candidates": 1}
    assert "filtered" not in predictor.state_dict()
    assert filter_counts(make_predictor()) == {}


def test_lost_iou_logits_are_an_error():
    predictor = make_predictor(*BRANCH)
    with pytest.raises(ValueError, match="MODEL.ROI_IOU_HEAD.ENABLED"):
        predictor.inference(make_predictions(4, deltas=K)[:2], make_proposals(4))


def test_boxes_and_probabilities_of_three_predictions():
    ours, stock = make_predictor(*BRANCH), make_stock()
    sample, predictions = make_sample(4, 3), make_predictions(7, deltas=K)
    for name in ("predict_boxes", "predict_boxes_for_gt_classes", "predict_probs"):
        given, expected = getattr(ours, name), getattr(stock, name)(predictions[:2], sample)
        for one, other in zip(given(predictions, sample), expected, strict=True):
            assert torch.equal(one, other)


# ---- score cut ----


@pytest.mark.parametrize("branch", [[], BRANCH])
@pytest.mark.parametrize("seed", range(10))
def test_an_early_cut_gives_the_pseudo_labels_of_a_late_one(branch, seed):
    torch.manual_seed(seed)
    predictor = make_predictor(*branch)
    proposals, predictions = make_proposals(300, 0, 200), make_predictions(500, deltas=K)
    predictions = (4 * predictions[0], 0.5 * predictions[1], predictions[2])
    predictions = predictions if branch else predictions[:2]

    def labels() -> list[Instances]:
        options = {"score_thresh": 0.7, "min_side": 2.0, "max_per_image": 100}
        found, _ = predictor.inference(predictions, proposals)
        return make_pseudo_labels(found, **options, with_masks=False)

    late = labels()
    with score_cut(predictor, 0.7):
        early = labels()
    assert len(late[0]) > 20
    for one, other in zip(late, early, strict=True):
        assert torch.equal(one.gt_boxes.tensor, other.gt_boxes.tensor)
        assert torch.equal(one.gt_classes, other.gt_classes)
        assert torch.equal(one.scores, other.scores)


def test_the_best_of_too_many_are_the_same_early_and_late():
    predictor = make_predictor("TEST.DETECTIONS_PER_IMAGE", "5")
    proposals, predictions = make_proposals(200), make_predictions(200, deltas=K)
    predictions = (8 * predictions[0], 0 * predictions[1])
    (late,), _ = predictor.inference(predictions, proposals)
    with score_cut(predictor, 0.7):
        (early,), _ = predictor.inference(predictions, proposals)
    assert len(early) == 5
    assert torch.equal(early.pred_boxes.tensor, late.pred_boxes.tensor)


def test_the_cut_is_undone_and_never_lowers():
    model = nn.ModuleList([make_predictor(), make_stock()])
    model[1].test_score_thresh = 0.8
    with pytest.raises(RuntimeError, match="stop"), score_cut(model, 0.7):
        assert [p.test_score_thresh for p in model] == [0.7, 0.8]
        raise RuntimeError("stop")
    assert [p.test_score_thresh for p in model] == [0.05, 0.8]


# ---- whole RoI heads ----


def make_heads(name: str, *opts: str) -> nn.Module:
    """Upgraded RoI heads of any kind."""
    cfg = make_config("MODEL.ROI_HEADS.NAME", name, *opts)
    shapes = {n: ShapeSpec(channels=4, stride=4 * 2**i) for i, n in enumerate(LEVELS)}
    heads = build_roi_heads(cfg, shapes)
    upgrade_predictors(heads, cfg)
    return heads


def make_input() -> tuple[ImageList, dict[str, Tensor], list[Instances], list[Instances]]:
    maps = {
        name: torch.randn(2, 4, SIZE[0] // 4 // 2**i, SIZE[1] // 4 // 2**i)
        for i, name in enumerate(LEVELS)
    }
    targets = [Instances(SIZE, gt_boxes=make_boxes(n)) for n in (3, 0)]
    for target in targets:
        target.gt_classes = torch.randint(K, (len(target),))
    return ImageList(torch.zeros(2, 3, *SIZE), [SIZE] * 2), maps, make_proposals(20, 20), targets


def run(heads: nn.Module) -> tuple[dict[str, Tensor], list[Instances]]:
    """One training step's losses, with gradients, and detections."""
    images, maps, proposals, targets = make_input()
    with EventStorage():
        _, losses = heads.train()(images, maps, copy.deepcopy(proposals), targets)
    sum(losses.values()).backward()
    with torch.no_grad():
        detections, _ = heads.eval()(images, maps, proposals)
    return losses, detections


@pytest.mark.parametrize("pred_boxes", ["False", "True"])
def test_standard_heads(pred_boxes):
    heads = make_heads(
        "StandardROIHeads", *BRANCH, "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", pred_boxes
    )
    losses, detections = run(heads)
    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_box_iou"}
    assert all(p.grad is not None for p in heads.box_predictor.iou_head.parameters())
    assert all(len(d.iou_scores) == len(d) for d in detections)


def test_cascade_heads_classify_with_focal_loss_and_refuse_the_branch():
    losses, detections = run(make_heads("CascadeROIHeads", *AGNOSTIC))
    expected = {f"{name}_stage{i}" for name in ("loss_cls", "loss_box_reg") for i in range(3)}
    assert losses.keys() == expected
    assert len(detections) == 2
    keys = "MODEL.ROI_IOU_HEAD.ENABLED.*MODEL.ROI_HEADS.NAME CascadeROIHeads"
    with pytest.raises(ValueError, match=keys):
        make_heads("CascadeROIHeads", *AGNOSTIC, *BRANCH)


def test_grid_heads_classify_with_focal_loss_and_refuse_the_branch():
    heads = make_heads("GridROIHeads")
    losses, _ = run(heads)
    assert losses.keys() == {"loss_cls", "loss_grid"}
    assert heads.box_predictor.focal_gamma == 1.5
    with pytest.raises(ValueError, match="MODEL.ROI_IOU_HEAD.ENABLED.*ClassOutputLayers"):
        make_heads("GridROIHeads", *BRANCH)


@pytest.mark.parametrize("order", ["aaa", "abc"])
def test_looped_heads(order):
    heads = make_heads("LoopROIHeads", *AGNOSTIC, *BRANCH, "MODEL.ROI_LOOP_HEAD.ORDER", order)
    losses, detections = run(heads)
    names = ("loss_cls", "loss_box_reg", "loss_box_iou")
    assert losses.keys() == {f"{name}_loop{t}" for name in names for t in (1, 2, 3)}
    trained = {name for name, p in heads.named_parameters() if "iou_head" in name}
    found = re.findall(r"pairs\.(\w)\.", " ".join(sorted(trained)))
    assert set(found) == set(order)
    assert all(p.grad is not None for n, p in heads.named_parameters() if n in trained)
    assert all(len(d.iou_scores) == len(d) for d in detections)
    assert filter_counts(heads).keys() == {"filtered_proposals", "filtered_candidates"}


def test_looped_heads_filter_by_mean_class_logits_and_the_last_loops_iou():
    heads = make_heads("LoopROIHeads", *AGNOSTIC, *BRANCH, "MODEL.ROI_LOOP_HEAD.ORDER", "aab")
    images, maps, proposals, _ = make_input()
    last = heads.pairs["b"].box_predictor
    seen: list[tuple[Tensor, ...]] = []
    for pair in heads.pairs.values():
        pair.box_predictor.register_forward_hook(lambda _, __, out: seen.append(out))
    for module in heads.modules():
        if isinstance(module, ILNetOutputLayers):
            nn.init.normal_(module.cls_score.weight)
            nn.init.normal_(module.iou_head.layers[2].bias)
    with torch.no_grad():
        detections, _ = heads.eval()(images, maps, proposals)
    mean = (sum(predictions[0] for predictions in seen) / 3).softmax(dim=1)
    best, ious = mean.argmax(dim=1), seen[2][2].sigmoid()
    removed = (best < K) & (ious[torch.arange(40), best] <= 0.4)
    assert 0 < removed.sum() < 40
    assert last.filtered[0] == removed.sum()
    assert sum(len(d) for d in detections) > 0
    for score, label, iou in zip(
        *(
            torch.cat([d.get(n) for d in detections])
            for n in ("scores", "pred_classes", "iou_scores")
        ),
        strict=True,
    ):
        row = (mean[:, label] - score).abs().argmin()
        assert mean[row, label].item() == pytest.approx(score.item())
        assert iou == ious[row, label]
