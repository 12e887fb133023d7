"""Layers and loss of Grid R-CNN's grid branch (methods 9.5)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sbr_cnn.grid_head import GridHead, NeighborFusion, grid_loss
from sbr_cnn.grid_targets import decode_boxes, grid_targets, neighbors


@pytest.fixture
def make_head() -> Callable[..., GridHead]:
    """``make_head(point_dim=8, ...)``: a small grid branch."""

    def make(**kwargs) -> GridHead:
        small = {"channels": 8, "resolution": 14, "num_conv": 2, "point_dim": 8}
        return GridHead(**{**small, **kwargs})

    return make


# ---- fusion ----


def test_fusion_with_identities_sums_over_neighbors(make_head):
    head = make_head(point_dim=4)
    with torch.no_grad():
        for fusion in (head.first_order, head.second_order):
            fusion.depthwise.weight.zero_()[:, :, 2, 2] = 1
            fusion.pointwise.weight.copy_(torch.eye(4).repeat(24, 1)[..., None, None])
    adjacency = torch.zeros(9, 9)
    for point in range(9):
        adjacency[point, neighbors(point)] = 1
    # f' = (1 + A) f; f'' = f + A f' = (1 + A + A A) f.
    mixing = torch.eye(9) + adjacency + adjacency @ adjacency
    points = torch.randn(2, 9, 4, 7, 7)
    torch.testing.assert_close(head.fuse(points), torch.einsum("pq,rqdhw->rpdhw", mixing, points))


def test_every_pair_of_neighbors_has_its_own_convolutions(randomize):
    fusion = randomize(NeighborFusion(8))
    points = torch.randn(3, 9, 8, 7, 7)
    out, pair = fusion(points), 0
    for point in range(9):
        expected = torch.zeros(3, 8, 7, 7)
        for source in neighbors(point):
            own = slice(8 * pair, 8 * pair + 8)
            x = F.conv2d(
                points[:, source],
                fusion.depthwise.weight[own],
                fusion.depthwise.bias[own],
                padding=2,
                groups=8,
            )
            expected += F.conv2d(x, fusion.pointwise.weight[own], fusion.pointwise.bias[own])
            pair += 1
        torch.testing.assert_close(out[:, point], expected, rtol=1e-4, atol=1e-5)
    assert fusion.depthwise.weight.shape == (8 * pair, 1, 5, 5)
    assert fusion.pointwise.weight.shape == (8 * pair, 8, 1, 1)


# ---- layers ----


def test_point_features_by_formula(make_head, randomize):
    head = randomize(make_head())
    x = torch.randn(2, 8, 14, 14)
    expected = x
    for stride, conv in zip((2, 1), head.convs, strict=True):
        expected = F.conv2d(expected, conv.weight, conv.bias, stride=stride, padding=1)
        expected = F.group_norm(expected, 36, conv.norm.weight, conv.norm.bias).relu()
    out = head.point_features(x)
    assert out.shape == (2, 9, 8, 7, 7)
    torch.testing.assert_close(out.flatten(1, 2), expected)


def test_heat_maps_are_made_for_each_point_alone(make_head, randomize):
    head = randomize(make_head())
    points = torch.randn(2, 9, 8, 7, 7)
    out = head.heat_maps(points)
    assert out.shape == (2, 9, 28, 28)
    for i in range(9):
        own = slice(8 * i, 8 * i + 8)
        x = F.conv_transpose2d(
            points[:, i], head.deconv.weight[own], head.deconv.bias[own], stride=2, padding=1
        )
        x = (x - x.mean((1, 2, 3), keepdim=True)) / (
            x.var((1, 2, 3), unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        norm = head.deconv_norm
        x = (x * norm.weight[own, None, None] + norm.bias[own, None, None]).relu()
        x = F.conv_transpose2d(
            x, head.predictor.weight[own], head.predictor.bias[i : i + 1], stride=2, padding=1
        )
        torch.testing.assert_close(out[:, i], x[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("resolution", "channels", "point_dim"), [(14, 5, 4), (8, 16, 12)])
def test_other_sizes(make_head, resolution, channels, point_dim):
    head = make_head(resolution=resolution, channels=channels, point_dim=point_dim)
    out = head(torch.randn(3, channels, resolution, resolution))
    assert out.shape == (3, 9, 2 * resolution, 2 * resolution)
    assert head.heat_map_side == 2 * resolution
    assert head(torch.zeros(0, channels, resolution, resolution)).shape == (0, *out.shape[1:])


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("resolution", 7, "POOLER_RESOLUTION"),
        ("resolution", 0, "POOLER_RESOLUTION"),
        ("point_dim", 6, "POINT_DIM"),
        ("point_dim", 0, "POINT_DIM"),
        ("num_conv", 0, "NUM_CONV"),
    ],
)
def test_numbers_that_do_not_fit(make_head, name, value, key):
    with pytest.raises(ValueError, match=rf"MODEL\.ROI_GRID_HEAD\.{key} .*got {value}"):
        make_head(**{name: value})


def test_initialisation(make_head):
    head = make_head(point_dim=64, channels=16, num_conv=2)
    # Kaiming-normal, fan-out: outputs of one layer times kernel area.
    kaiming = {"convs.0": 576 * 9, "convs.1": 576 * 9}
    for fusion in ("first_order", "second_order"):
        kaiming |= {f"{fusion}.depthwise": 64 * 25, f"{fusion}.pointwise": 64}
    expected = {name: math.sqrt(2 / fan_out) for name, fan_out in kaiming.items()}
    expected |= {"deconv": 0.001, "predictor": 0.001}
    for name, std in expected.items():
        layer = head.get_submodule(name)
        draws = layer.weight.numel()
        assert layer.weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * draws)), name
        if name != "predictor":
            assert not layer.bias.any(), name
    assert head.predictor.bias.sigmoid().tolist() == pytest.approx([0.01] * 9)


def test_parameters():
    with torch.device("meta"):
        head = GridHead(channels=256, resolution=14)
    width = 9 * 64
    convs = (256 * 9 + 1) * width + 7 * (width * 9 + 1) * width + 8 * 2 * width  # with GroupNorm
    pair = (25 + 1) * 64 + (64 + 1) * 64
    deconvs = (64 * 16 + 1) * width + 2 * width + (64 * 16 + 1) * 9
    expected = convs + 2 * 24 * pair + deconvs
    assert expected == 22_242_816 + 279_552 + 600_777
    assert sum(p.numel() for p in head.parameters()) == expected


# ---- loss ----


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> float:
    p = logits.double().sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean().item()


def test_loss_is_the_sum_of_fused_and_unfused(make_head, randomize):
    head = randomize(make_head())
    x = torch.randn(3, 8, 14, 14)
    targets = (torch.rand(3, 9, 28, 28) > 0.9).float()
    points = head.point_features(x)
    fused, unfused = head(x), head.heat_maps(points)
    torch.testing.assert_close(fused, head.heat_maps(head.fuse(points)))
    assert not torch.allclose(fused, unfused, atol=0.1)
    expected = binary_cross_entropy(fused, targets) + binary_cross_entropy(unfused, targets)
    assert head.loss(x, targets).item() == pytest.approx(expected, rel=1e-5)


def test_loss_of_half_logits_is_fp32():
    logits, targets = 5 * torch.randn(2, 9, 8, 8), (torch.rand(2, 9, 8, 8) > 0.9).float()
    loss = grid_loss(logits.bfloat16(), targets)
    assert loss.dtype == torch.float32
    exact = binary_cross_entropy(logits.bfloat16(), targets)
    assert loss.item() == pytest.approx(exact, rel=1e-5)


def test_loss_of_no_boxes_keeps_the_graph(make_head):
    head = make_head()
    loss = head.loss(torch.zeros(0, 8, 14, 14), torch.zeros(0, 9, 28, 28))
    assert loss.item() == 0
    loss.backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_the_branch_learns_to_find_boxes(make_head):
    """Five boxes off by up to a fifth of their size: learned to within two cells."""
    head, x = make_head(), torch.randn(5, 8, 14, 14)
    size = 20 + torch.rand(5, 2) * 20
    boxes = torch.cat([torch.zeros(5, 2), size], dim=1)
    gt = boxes + (torch.rand(5, 4) - 0.5) * 0.4 * size.repeat(1, 2)
    targets, cell = grid_targets(boxes, gt, 28), size.repeat(1, 2) / 28
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        (15 * head.loss(x, targets)).backward()
        optimizer.step()
    # A disc's cells are equal: the peak is up to a cell from its centre, which rounds by half.
    error = (decode_boxes(head(x).detach(), boxes) - gt).abs() / cell
    assert ((boxes - gt).abs() / cell).max() > 4
    assert error.max() < 2
