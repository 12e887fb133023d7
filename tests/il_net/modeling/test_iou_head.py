"""The IoU branch: sizes from the facts, its loss against plain loops in double precision."""

import math

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor

from il_net.config import load_config
from il_net.modeling.iou_head import IoUHead, decoded_ious

CODER_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
CODER = Box2BoxTransform(CODER_WEIGHTS)
K, D = 3, 6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_head(*, agnostic: bool = False, num_classes: int = K, **kwargs) -> IoUHead:
    delta_dim = 4 if agnostic else 4 * num_classes
    dims = {"feature_dim": D, "delta_dim": delta_dim, "num_classes": num_classes, "hidden_dim": 5}
    return IoUHead(**{**dims, **kwargs})


def make_boxes(count: int) -> Tensor:
    start = torch.rand(count, 2) * 60
    return torch.cat([start, start + 10 + torch.rand(count, 2) * 30], dim=1)


# ---- architecture ----


@pytest.mark.parametrize(
    ("inputs", "width", "parameters"),
    [
        (("feature",), 1024, 1_132_625),
        (("feature", "logits"), 1105, 1_215_569),
        (("feature", "logits", "deltas"), 1425, 1_543_249),
    ],
)
def test_sizes_for_coco(inputs, width, parameters):
    cfg = load_config("", ["MODEL.ROI_IOU_HEAD.INPUTS", str(inputs)])
    with torch.device("meta"):
        head = IoUHead(cfg, feature_dim=1024, delta_dim=320)
    assert head.layers[0].in_features == width
    assert head.layers[2].out_features == 81
    assert sum(p.numel() for p in head.parameters()) == parameters


def test_initialisation():
    head = make_head(feature_dim=500, hidden_dim=500, num_classes=200)
    for layer in (head.layers[0], head.layers[2]):
        assert layer.weight.mean().item() == pytest.approx(0, abs=2e-4)
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert layer.bias.abs().sum() == 0


@pytest.mark.parametrize("activation", ["elu", "none"])
@pytest.mark.parametrize("inputs", [("feature",), ("deltas", "feature"), ("feature", "logits")])
def test_forward_is_two_layers_over_what_it_reads(inputs, activation):
    head = make_head(inputs=inputs, activation=activation)
    for parameter in head.parameters():
        parameter.data.normal_()
    given = {
        "feature": torch.randn(4, D),
        "logits": torch.randn(4, K + 1),
        "deltas": torch.randn(4, 4 * K),
    }
    # Always in this order, whatever the order of the key's value.
    x = torch.cat([value for name, value in given.items() if name in inputs], dim=1)
    first, _, last = head.layers
    hidden = x @ first.weight.T + first.bias
    if activation == "elu":
        hidden = torch.where(hidden > 0, hidden, hidden.exp() - 1)
    expected = hidden @ last.weight.T + last.bias
    torch.testing.assert_close(head(*given.values()), expected)


def test_nothing_it_reads_is_detached():
    given = [torch.randn(4, width, requires_grad=True) for width in (D, K + 1, 4 * K)]
    make_head()(*given).sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in given)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["INPUTS", "('logits',)"], "INPUTS"),
        (["INPUTS", "('feature', 'scores')"], "INPUTS.*scores"),
        (["INPUTS", "('feature', 'feature')"], "INPUTS"),
        (["ACTIVATION", "relu"], "ACTIVATION.*elu.*relu"),
        (["LOSS", "bce"], "LOSS.*focal.*bce"),
        (["TRAIN_THRESH", "1.0"], "TRAIN_THRESH"),
        (["FOCAL_GAMMA", "-1.0"], "FOCAL_GAMMA"),
    ],
)
def test_a_wrong_key_is_named(opts, message):
    cfg = load_config("", [f"MODEL.ROI_IOU_HEAD.{opts[0]}", opts[1]])
    with pytest.raises(ValueError, match=f"MODEL.ROI_IOU_HEAD.{message}"):
        IoUHead(cfg, feature_dim=D, delta_dim=4)


def test_every_key_is_read():
    cfg = load_config("", [])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    node = cfg.MODEL.ROI_IOU_HEAD
    node.HIDDEN_DIM, node.LOSS, node.TRAIN_THRESH, node.FOCAL_GAMMA = 7, "smooth_l1", 0.6, 2.0
    head = IoUHead(cfg, feature_dim=D, delta_dim=4)
    assert (head.layers[0].in_features, head.layers[0].out_features) == (D + 3 + 4, 7)
    assert (head.loss_kind, head.threshold, head.focal_gamma) == ("smooth_l1", 0.6, 2.0)


# ---- target ----


def decode(deltas: list[float], box: list[float]) -> list[float]:
    """Faster R-CNN's decoding with the clamp of log(1000 / 16), for one box."""
    dx, dy, dw, dh = (d / w for d, w in zip(deltas, CODER_WEIGHTS, strict=True))
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = (box[0] + box[2]) / 2 + dx * width, (box[1] + box[3]) / 2 + dy * height
    limit = math.log(1000 / 16)
    width, height = width * math.exp(min(dw, limit)), height * math.exp(min(dh, limit))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def box_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (both - width * height)


def test_ious_of_hand_made_boxes():
    box = [10.0, 10.0, 30.0, 20.0]  # 20 x 10
    deltas = torch.zeros(4, 8)  # two classes
    deltas[1, 4] = 5.0  # class 1 moves by 5 / 10 of its width: 10
    deltas[2, 4:] = 5.0  # not the class of this box
    deltas[3, 2] = 5 * math.log(2)  # class 0 doubles its width: [0, 10, 40, 20]
    gt_boxes = torch.tensor([[10.0, 10.0, 30.0, 18.0], box, box, [0.0, 10.0, 40.0, 20.0]])
    classes = torch.tensor([0, 1, 0, 0])
    ious = decoded_ious(deltas, torch.tensor([box] * 4), gt_boxes, classes, CODER)
    # 160 of 200; 100 of 300; the same; the same.
    torch.testing.assert_close(ious, torch.tensor([0.8, 1 / 3, 1.0, 1.0]))


@pytest.mark.parametrize("agnostic", [False, True])
def test_ious_equal_a_loop(agnostic):
    count = 50
    deltas = 2 * torch.randn(count, 4 if agnostic else 4 * K)
    deltas[0] = 100.0  # clamped
    proposals, gt_boxes = make_boxes(count), make_boxes(count)
    classes = torch.randint(K, (count,))
    ious = decoded_ious(deltas, proposals, gt_boxes, classes, CODER)
    for i, true in enumerate(classes.tolist()):
        own = deltas[i] if agnostic else deltas[i, 4 * true : 4 * true + 4]
        box = decode(own.tolist(), proposals[i].tolist())
        assert ious[i].item() == pytest.approx(box_iou(box, gt_boxes[i].tolist()), abs=1e-5)


def test_no_gradient_passes_the_target_and_bf16_deltas_are_decoded_in_fp32():
    deltas = torch.randn(5, 4 * K, requires_grad=True)
    given = (make_boxes(5), make_boxes(5), torch.tensor([0, 1, 2, 3, 3]), CODER)
    assert not decoded_ious(deltas, *given).requires_grad
    half = deltas.detach().bfloat16()
    torch.testing.assert_close(
        decoded_ious(half, *given), decoded_ious(half.float(), *given), rtol=0, atol=0
    )


def test_empty_boxes_of_background_give_a_number():
    zeros = torch.zeros(2, 4)
    ious = decoded_ious(zeros, zeros, zeros, torch.tensor([1, 1]), CODER)
    assert ious.tolist() == [0.0, 0.0]


# ---- loss ----


def expected_loss(
    kind: str, logits: list[list[float]], ious: list[float], classes: list[int], mu: float
) -> float:
    num_classes, total, positives = len(logits[0]) - 1, 0.0, 0
    for row, iou, true in zip(logits, ious, classes, strict=True):
        if true == num_classes:
            continue
        positives += 1
        p = 1 / (1 + math.exp(-row[true]))
        if kind == "smooth_l1":
            total += (p - iou) ** 2 / 2  # both in [0, 1]: always the quadratic part
            continue
        target = iou if kind == "soft_focal" else float(iou > mu)
        entropy = -target * math.log(p) - (1 - target) * math.log(1 - p)
        total += (1 - math.exp(-entropy)) ** 1.5 * entropy
    return total / (positives if kind == "smooth_l1" else len(classes))


@pytest.mark.parametrize("num_classes", [1, K])
@pytest.mark.parametrize("kind", ["focal", "soft_focal", "smooth_l1"])
def test_loss_equals_a_loop(kind, num_classes):
    head = make_head(num_classes=num_classes, loss=kind, threshold=0.6)
    logits, ious = 2 * torch.randn(40, num_classes + 1), torch.rand(40)
    classes = torch.randint(num_classes + 1, (40,))
    expected = expected_loss(
        kind, logits.double().tolist(), ious.double().tolist(), classes.tolist(), 0.6
    )
    assert head.loss(logits, ious, classes).item() == pytest.approx(expected, rel=1e-5)


def test_an_iou_of_exactly_mu_is_not_above_it():
    head = make_head(threshold=0.5)
    logits = torch.full((1, K + 1), 2.0)
    at, above = (
        head.loss(logits, torch.tensor([iou]), torch.tensor([0])).item() for iou in (0.5, 0.51)
    )
    # sigmoid(2) = 0.880797: CE of a negative 2.126928, of a positive 0.126928.
    assert at == pytest.approx(0.880797**1.5 * 2.126928, rel=1e-5)
    assert above == pytest.approx((1 - 0.880797) ** 1.5 * 0.126928, rel=1e-5)


@pytest.mark.parametrize("kind", ["focal", "soft_focal", "smooth_l1"])
def test_only_the_true_classes_columns_of_positives_get_a_gradient(kind):
    logits = torch.randn(4, K + 1, requires_grad=True)
    classes = torch.tensor([1, K, 0, K])
    make_head(loss=kind).loss(logits, torch.tensor([0.9, 0.9, 0.2, 0.1]), classes).backward()
    touched = logits.grad.ne(0).nonzero().tolist()
    assert touched == [[0, 1], [2, 0]]


@pytest.mark.parametrize("kind", ["focal", "soft_focal", "smooth_l1"])
@pytest.mark.parametrize("count", [0, 4])
def test_without_positives_it_is_zero_and_connected_to_every_parameter(kind, count):
    head = make_head(loss=kind)
    logits = head(torch.randn(count, D), torch.randn(count, K + 1), torch.randn(count, 4 * K))
    loss = head.loss(logits, torch.rand(count), torch.full((count,), K))
    loss.backward()
    assert loss.item() == 0
    for parameter in head.parameters():
        assert parameter.grad.abs().sum() == 0


def test_the_background_columns_weights_do_not_move():
    head = make_head()
    given = (torch.randn(9, D), torch.randn(9, K + 1), torch.randn(9, 4 * K))
    classes = torch.tensor([0, 1, 2, 3, 3, 0, 1, 2, 3])
    head.loss(head(*given), torch.rand(9), classes).backward()
    last = head.layers[2]
    assert last.weight.grad[K].abs().sum() == last.bias.grad[K].abs() == 0
    assert (last.weight.grad[:K].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("kind", ["focal", "soft_focal", "smooth_l1"])
def test_the_loss_is_fp32_under_autocast(kind):
    head = make_head(loss=kind)
    classes, ious = torch.tensor([0, 1, K]), torch.tensor([0.9, 0.3, 0.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(torch.randn(3, D), torch.randn(3, K + 1), torch.randn(3, 4 * K))
        loss = head.loss(logits, ious, classes)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss == head.loss(logits.float(), ious, classes)
