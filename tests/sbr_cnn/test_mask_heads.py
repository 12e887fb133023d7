"""The looped mask head, its targets and its loss (methods 5.1 and 5.2)."""

import math

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_mask_head
from detectron2.structures import BitMasks, Boxes, PolygonMasks
from torch import Tensor, nn
from torch.nn import functional as F

from sbr_cnn.mask_heads import LoopMaskHead, crop_masks, mask_loss, select_class


@pytest.fixture
def make_head(make_config):
    """``make_head(KEY, VALUE, ...)``: a LoopMaskHead with 8 channels, 2 convolutions, 3 classes."""

    def make(*opts) -> LoopMaskHead:
        return build_mask_head(make_config(*opts), ShapeSpec(channels=8, height=14, width=14))

    return make


# ---- targets ----


def test_bitmask_targets_are_detectron2s(make_targets, make_boxes):
    masks = make_targets(5)[0].gt_masks
    boxes = make_boxes(40)
    boxes.tensor[0] += torch.tensor([-20.0, -10.0, 30.0, 40.0])  # beyond the picture
    index = torch.randint(5, (40,))
    out = crop_masks(masks, boxes, index, 28)
    expected = masks[index].crop_and_resize(boxes.tensor, 28)
    assert 0.01 < out.mean() < 0.99
    assert out.dtype == torch.float32
    assert torch.equal(out, expected.float())


def test_bitmask_targets_by_hand():
    pixels = torch.zeros(2, 40, 60, dtype=torch.bool)
    pixels[0, :, :30] = True  # left half
    pixels[1, 10:, :] = True  # all but the upper quarter
    boxes = Boxes(
        torch.tensor([[0.0, 0.0, 60.0, 40.0], [2.0, 0.0, 58.0, 40.0], [30.0, 0.0, 58.0, 28.0]])
    )
    out = crop_masks(BitMasks(pixels), boxes, torch.tensor([0, 1, 0]), 28)
    left = torch.zeros(28, 28)
    left[:, :14] = 1
    lower = torch.zeros(28, 28)
    lower[7:] = 1
    assert torch.equal(out, torch.stack([left, lower, torch.zeros(28, 28)]))


def test_targets_ignore_autocast(make_targets, make_boxes):
    masks, boxes, index = make_targets(3)[0].gt_masks, make_boxes(20), torch.randint(3, (20,))
    exact = crop_masks(masks, boxes, index, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(crop_masks(masks, boxes, index, 28), exact)


def test_polygon_targets():
    square = np.array([10, 10, 40, 10, 40, 40, 10, 40], dtype=np.float64)
    far = np.array([70, 70, 90, 70, 90, 90, 70, 90], dtype=np.float64)
    masks = PolygonMasks([[far], [square]])
    boxes = Boxes(torch.tensor([[10.0, 10.0, 40.0, 40.0], [10.0, 10.0, 70.0, 40.0]]))
    out = crop_masks(masks, boxes, torch.tensor([1, 1]), 28)
    half = torch.zeros(28, 28)
    half[:, :14] = 1
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.stack([torch.ones(28, 28), half]))
    assert crop_masks(masks, Boxes(torch.zeros(0, 4)), torch.zeros(0).long(), 28).shape[0] == 0


# ---- loss ----


def binary_cross_entropy(logits: Tensor, classes: Tensor, targets: Tensor) -> float:
    terms = []
    for logit, c, target in zip(logits.tolist(), classes.tolist(), targets.tolist(), strict=True):
        channel = logit[c] if len(logit) > 1 else logit[0]
        for row, target_row in zip(channel, target, strict=True):
            for value, truth in zip(row, target_row, strict=True):
                probability = 1 / (1 + math.exp(-value))
                terms.append(-math.log(probability if truth else 1 - probability))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_mask_loss_by_hand(num_channels):
    logits = torch.randn(4, num_channels, 5, 5)
    targets = (torch.rand(4, 5, 5) > 0.4).float()
    classes = torch.tensor([2, 0, 1, 2])
    expected = binary_cross_entropy(logits, classes, targets)
    assert mask_loss(logits, classes, targets).item() == pytest.approx(expected, rel=1e-5)


def test_mask_loss_without_positives_keeps_the_graph(make_head):
    head = make_head()
    logits = head.logits(head.iterate(torch.zeros(0, 8, 14, 14), None))
    loss = mask_loss(logits, torch.zeros(0, dtype=torch.long), logits.new_zeros(0))
    assert loss.item() == 0
    loss.backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_mask_loss_is_fp32_for_half_logits():
    logits = torch.randn(2, 3, 4, 4)
    classes, targets = torch.tensor([0, 1]), torch.ones(2, 4, 4)
    half = mask_loss(logits.bfloat16(), classes, targets)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(mask_loss(logits, classes, targets).item(), rel=0.01)


def test_select_class():
    logits = torch.arange(2 * 3).float().view(2, 3, 1, 1)
    assert select_class(logits, torch.tensor([2, 0])).flatten().tolist() == [2, 3]
    assert select_class(logits[:, 1:2], torch.tensor([2, 0])).flatten().tolist() == [1, 4]
    assert select_class(logits[:0], torch.zeros(0, dtype=torch.long)).shape == (0, 1, 1)


# ---- head ----


def iterate_by_formula(head: LoopMaskHead, x: Tensor, previous: Tensor) -> Tensor:
    """m = convs(x + relu(C1 m_previous)), 3x3 with padding 1 and ReLU after each."""
    x = x + F.conv2d(previous, head.conv_res.weight, head.conv_res.bias).relu()
    for conv in head.conv_norm_relus:
        assert conv.weight.shape[2:] == (3, 3)
        x = F.conv2d(x, conv.weight, conv.bias, padding=1).relu()
    return x


def test_first_iteration_adds_the_relu_of_c1s_bias(make_head, randomize):
    head = randomize(make_head())
    x = torch.randn(3, 8, 14, 14)
    out = head.iterate(x, None)
    torch.testing.assert_close(out, iterate_by_formula(head, x, torch.zeros(3, 8, 14, 14)))
    shifted = x + head.conv_res.bias.clamp(min=0).view(1, 8, 1, 1)
    assert not torch.allclose(shifted, x)
    with torch.no_grad():
        head.conv_res.bias.zero_()
    torch.testing.assert_close(head.iterate(shifted, None), out)


def test_iterations_chain(make_head, randomize):
    head = randomize(make_head())
    x = torch.randn(3, 8, 14, 14)
    features, expected = None, torch.zeros(3, 8, 14, 14)
    for _ in range(3):
        features = head.iterate(x, features)
        expected = iterate_by_formula(head, x, expected)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_logits_are_deconvolution_then_1x1(make_head, randomize):
    head = randomize(make_head())
    m = torch.randn(2, 8, 14, 14)
    upsampled = F.conv_transpose2d(m, head.deconv.weight, head.deconv.bias, stride=2).relu()
    expected = F.conv2d(upsampled, head.predictor.weight, head.predictor.bias)
    assert head.logits(m).shape == (2, 3, 28, 28)
    torch.testing.assert_close(head.logits(m), expected)


@pytest.mark.parametrize("agnostic", ["False", "True"])
def test_logits_of_one_class_are_among_those_of_all(make_head, randomize, agnostic):
    head = randomize(make_head("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", agnostic))
    features, classes = torch.randn(5, 8, 14, 14), torch.tensor([2, 0, 1, 2, 2])
    expected = select_class(head.logits(features), classes)
    torch.testing.assert_close(head.class_logits(features, classes), expected)
    assert head.class_logits(features[:0], classes[:0]).shape == (0, 28, 28)


def test_layers_is_one_iteration(make_head, randomize):
    head = randomize(make_head())
    x = torch.randn(2, 8, 14, 14)
    torch.testing.assert_close(head.layers(x), head.logits(head.iterate(x, None)))


def test_c1_stays_in_the_graph_of_a_single_iteration(make_head, randomize):
    """DDP wants a gradient for C1's weight even where C1 only sees zeros."""
    head = randomize(make_head())
    head.logits(head.iterate(torch.randn(2, 8, 14, 14), None)).square().sum().backward()
    assert head.conv_res.weight.grad is not None and not head.conv_res.weight.grad.any()
    assert head.conv_res.bias.grad.any()


def test_initialisation_is_kaiming_normal_with_zero_bias(make_head):
    head = make_head("MODEL.ROI_MASK_HEAD.CONV_DIM", 128)
    # Fan-out: outputs times kernel area. C1 maps the 128 channels back to the 8 of the input.
    expected = {"conv_res": 8, "predictor": 3, "mask_fcn1": 128 * 9, "mask_fcn2": 128 * 9}
    for name, fan_out in expected.items():
        layer = getattr(head, name)
        draws = layer.weight.numel()  # at least 384: standard error of the deviation 3.6 %
        assert layer.weight.std().item() == pytest.approx(
            math.sqrt(2 / fan_out), rel=4 / math.sqrt(2 * draws)
        ), name
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name


def test_c1_costs_65792_parameters_at_256_channels(make_config):
    cfg = make_config(
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", 256, "MODEL.ROI_MASK_HEAD.NUM_CONV", 4),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 80),
    )

    def count(name: str) -> int:
        cfg.MODEL.ROI_MASK_HEAD.NAME = name
        with torch.device("meta"):
            head: nn.Module = build_mask_head(cfg, ShapeSpec(channels=256, height=14, width=14))
        return sum(parameter.numel() for parameter in head.parameters())

    assert count("MaskRCNNConvUpsampleHead") == 2_643_280  # methods 1.4
    assert count("LoopMaskHead") == 2_643_280 + 65_792
