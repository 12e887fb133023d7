"""Focal losses against arithmetic in double precision; weights by name."""

import math

import pytest

pytest.importorskip("detectron2")

import torch
from torch.nn import functional as F

from il_net.modeling.losses import focal_binary, focal_cross_entropy, weigh

GAMMAS = (0.0, 0.5, 1.5, 2.0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def focal(entropy: float, gamma: float) -> float:
    return (1 - math.exp(-entropy)) ** gamma * entropy


def binary_entropy(logit: float, target: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


# ---- cross-entropy ----


@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_cross_entropy_is_the_mean_over_rois(gamma):
    logits, classes = 3 * torch.randn(7, 4), torch.tensor([0, 1, 2, 3, 3, 0, 2])
    expected = 0.0
    for row, true in zip(logits.double().tolist(), classes.tolist(), strict=True):
        total = sum(math.exp(value) for value in row)
        expected += focal(-math.log(math.exp(row[true]) / total), gamma) / 7
    loss = focal_cross_entropy(logits, classes, gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_two_equal_logits_by_hand():
    # p = 1/2, CE = ln 2, (1/2)^1.5 = 0.353553.
    loss = focal_cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, 1]), 1.5)
    assert loss.item() == pytest.approx(0.3535534 * 0.6931472, rel=1e-6)


def test_gamma_zero_is_cross_entropy():
    logits, classes = torch.randn(9, 5), torch.randint(5, (9,))
    torch.testing.assert_close(
        focal_cross_entropy(logits, classes, 0.0), F.cross_entropy(logits, classes)
    )


@pytest.mark.parametrize("gamma", GAMMAS)
def test_without_rois_it_is_zero_and_connected(gamma):
    layer = torch.nn.Linear(3, 4)
    loss = focal_cross_entropy(layer(torch.zeros(0, 3)), torch.zeros(0, dtype=torch.int64), gamma)
    loss.backward()
    assert loss.item() == 0
    assert layer.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("gamma", GAMMAS)
def test_certain_rois_have_finite_gradients(gamma):
    logits = torch.tensor([[200.0, 0.0], [-200.0, 0.0]], requires_grad=True)
    focal_cross_entropy(logits, torch.tensor([0, 0]), gamma).backward()
    assert logits.grad[0].tolist() == [0.0, 0.0]
    # The wrong one: p = 0, so that the loss is its distance, half of it for two RoIs.
    assert logits.grad[1].tolist() == pytest.approx([-0.5, 0.5])


def test_gradient_is_the_slope():
    logits, classes, step = torch.randn(4, 3), torch.tensor([0, 1, 2, 2]), 1e-2
    logits.requires_grad_()
    focal_cross_entropy(logits, classes, 1.5).backward()
    for i in range(4):
        for j in range(3):
            moved = torch.zeros(4, 3)
            moved[i, j] = step
            up, down = (focal_cross_entropy(logits + s * moved, classes, 1.5) for s in (1, -1))
            slope = ((up - down) / (2 * step)).item()
            assert logits.grad[i, j].item() == pytest.approx(slope, abs=1e-4)


def test_bf16_logits_are_taken_to_fp32_first():
    logits, classes = torch.randn(6, 4).bfloat16(), torch.randint(4, (6,))
    loss = focal_cross_entropy(logits, classes, 1.5)
    assert loss.dtype == torch.float32
    assert loss == focal_cross_entropy(logits.float(), classes, 1.5)


# ---- binary cross-entropy ----


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("targets", [[0.0, 1.0, 1.0, 0.0], [0.1, 0.8, 0.55, 1.0]])
def test_focal_binary_of_each_element(gamma, targets):
    logits = [-1.0, 2.0, -3.0, 0.5]
    expected = [focal(binary_entropy(x, t), gamma) for x, t in zip(logits, targets, strict=True)]
    losses = focal_binary(torch.tensor(logits), torch.tensor(targets), gamma)
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=1e-7)


def test_focal_binary_keeps_its_precision_when_nearly_certain():
    # 1 - p = 6e-6: subtracted from 1 in fp32 it would be off by a percent.
    loss = focal_binary(torch.tensor([12.0]), torch.tensor([1.0]), 1.5)
    entropy = math.log1p(math.exp(-12.0))
    expected = (-math.expm1(-entropy)) ** 1.5 * entropy
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=0)  # 9e-14


def test_focal_binary_of_far_logits_is_finite():
    logits = torch.tensor([500.0, -500.0, 500.0, -500.0], requires_grad=True)
    losses = focal_binary(logits, torch.tensor([1.0, 0.0, 0.0, 1.0]), 0.5)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0, 500.0, 500.0]
    assert logits.grad.tolist() == [0.0, 0.0, 1.0, -1.0]


def test_focal_binary_takes_bool_targets_and_bf16_logits():
    losses = focal_binary(torch.zeros(2).bfloat16(), torch.tensor([True, False]), 0.0)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([0.6931472] * 2)


# ---- weights ----

WEIGHTS = {"CLS": 2.0, "RPN_CLS": 3.0, "BOX_REG": 5.0, "RPN_LOC": 7.0, "IOU": 11.0, "MASK": 13.0}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("loss_rpn_cls", "RPN_CLS"),
        ("loss_rpn_loc", "RPN_LOC"),
        ("loss_cls", "CLS"),
        ("loss_cls_loop2", "CLS"),
        ("loss_cls_stage0", "CLS"),
        ("loss_box_reg", "BOX_REG"),
        ("loss_box_reg_loop1", "BOX_REG"),
        ("loss_box_reg_stage2", "BOX_REG"),
        ("loss_grid", "BOX_REG"),
        ("loss_box_iou", "IOU"),
        ("loss_box_iou_loop3", "IOU"),
        ("loss_mask", "MASK"),
        ("loss_mask_loop3", "MASK"),
        ("loss_mask_iou", "MASK"),
    ],
)
def test_weight_by_name(name, group):
    weighted = weigh({name: torch.tensor(1.5)}, WEIGHTS)
    assert weighted == {f"{name}_pseudo": 1.5 * WEIGHTS[group]}


@pytest.mark.parametrize("name", ["loss_keypoint", "loss_class", "loss", "cls", "loss_masks"])
def test_an_unknown_loss_is_named(name):
    with pytest.raises(ValueError, match=f"{name!r}.*SEMISUP.LOSS_WEIGHT"):
        weigh({name: torch.tensor(1.0)}, WEIGHTS)


def test_a_loss_without_weight_cannot_poison():
    losses = {
        "loss_cls": torch.tensor(1.0, requires_grad=True),
        "loss_box_reg": torch.tensor(math.inf),
        "loss_rpn_loc": torch.tensor(math.nan),
    }
    weighted = weigh(losses, {**WEIGHTS, "BOX_REG": 0.0, "RPN_LOC": 0.0}, "_x")
    assert weighted.keys() == {"loss_cls_x"}
    sum(weighted.values()).backward()
    assert losses["loss_cls"].grad == 2.0


def test_unbiased_teacher_and_the_unsupervised_regression():
    losses = {
        "loss_rpn_cls": torch.tensor(0.5),
        "loss_rpn_loc": torch.tensor(0.25),
        "loss_cls": torch.tensor(2.0),
        "loss_box_reg": torch.tensor(1.0),
    }
    beta = {weight: dict(WEIGHTS, CLS=4.0, RPN_CLS=4.0) for weight in (0.0, 1.0)}
    for weight, weights in beta.items():
        weights.update(BOX_REG=weight, RPN_LOC=weight)
    without, with_regression = (weigh(losses, weights) for weights in beta.values())
    assert without == {"loss_rpn_cls_pseudo": 2.0, "loss_cls_pseudo": 8.0}
    added = {"loss_rpn_loc_pseudo": 0.25, "loss_box_reg_pseudo": 1.0}
    assert with_regression == without | added
