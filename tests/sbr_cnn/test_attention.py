"""Both attention blocks against their formulas written out (methods 2.4 and 3)."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbr_cnn.attention import NonLocal2d, RelativePositionAttention


def non_local_reference(block: NonLocal2d, x: Tensor, padding: int) -> Tensor:
    theta, phi, g = (
        F.conv2d(x, conv.weight, conv.bias, padding=padding)
        for conv in (block.theta, block.phi, block.g)
    )
    energy = torch.einsum("rchw,rcyx->rhwyx", theta, phi) / math.sqrt(x.shape[1] / 2)
    weights = energy.flatten(3).softmax(dim=3).view_as(energy)
    attended = torch.einsum("rhwyx,rcyx->rchw", weights, g)
    return x + F.conv2d(attended, block.conv_out.weight, block.conv_out.bias, padding=padding)


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (7, 3)])
@pytest.mark.parametrize("size", [(7, 7), (6, 9)])
def test_non_local_equals_its_formula(kernel, padding, size, randomize):
    block = randomize(NonLocal2d(8, kernel), gain=1.5)  # large enough that the softmax is uneven
    x = torch.randn(3, 8, *size)
    torch.testing.assert_close(
        block(x), non_local_reference(block, x, padding), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kernel", [1, 7])
def test_non_local_starts_as_the_identity(kernel):
    x = torch.randn(2, 8, 7, 7)
    assert torch.equal(NonLocal2d(8, kernel)(x), x)


def test_non_local_initialisation():
    block = NonLocal2d(32, 7)
    for conv in (block.theta, block.phi, block.g):
        # 32 * 16 * 49 = 25,088 normal draws: the standard error of the deviation is 0.45 %.
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.03)
        assert abs(conv.weight.mean().item()) < 5e-4
        assert not conv.bias.any()
    assert not block.conv_out.weight.any()
    assert not block.conv_out.bias.any()


@pytest.mark.parametrize(("channels", "kernel"), [(7, 1), (8, 2)])
def test_non_local_rejects_odd_width_and_even_kernel(channels, kernel):
    with pytest.raises(ValueError, match=f"channels={channels}, kernel_size={kernel}"):
        NonLocal2d(channels, kernel)


def embed(offset: int) -> list[float]:
    """64 sines, then 64 cosines, of an offset over the wavelengths 1000^(4k/256)."""
    angles = [offset / 1000 ** (4 * k / 256) for k in range(64)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def embed_axis(size: int, linear: nn.Linear, heads: int) -> Tensor:
    """(queries, keys, heads, width of a head) for query i and key j at position 2j."""
    table = torch.tensor(
        [[embed(i - 2 * j) for j in range(math.ceil(size / 2))] for i in range(size)]
    )
    mapped = torch.einsum("ijp,op->ijo", table, linear.weight) / math.sqrt(2)
    return mapped.reshape(*mapped.shape[:2], heads, -1)


def attention_reference(block: RelativePositionAttention, x: Tensor, heads: int) -> Tensor:
    """The joint softmax over all (y', x'), as methods 2.4 states it: no separation by axis."""
    rois, channels, height, width = x.shape
    inner = channels // heads * heads
    query = torch.einsum("rchw,dc->rdhw", x, block.query.weight[:, :, 0, 0])
    query = query.reshape(rois, heads, inner // heads, height, width)
    keys = x[:, :, range(0, height, 2)][:, :, :, range(0, width, 2)]
    value = torch.einsum("rchw,dc->rdhw", keys, block.value.weight[:, :, 0, 0])
    value = value.reshape(rois, heads, inner // heads, *keys.shape[2:])
    ex = embed_axis(width, block.position_x, heads)
    ey = embed_axis(height, block.position_y, heads)
    energy = torch.einsum("rndyx,xknd->rnyxk", query, ex)[..., None, :]
    energy = energy + torch.einsum("rndyx,yknd->rnyxk", query, ey)[..., :, None]
    weights = energy.flatten(4).softmax(dim=4).view_as(energy)  # (R, h, y, x, y', x')
    attended = torch.einsum("rnyxjk,rndjk->rndyx", weights, value).reshape(
        rois, inner, height, width
    )
    out = torch.einsum("rdhw,cd->rchw", attended, block.project.weight[:, :, 0, 0])
    return x + block.gamma * (out + block.project.bias[:, None, None])


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (6, 9)])
@pytest.mark.parametrize(("channels", "heads"), [(14, 6), (8, 2)])
def test_relative_attention_equals_the_joint_softmax(size, channels, heads, randomize):
    block = randomize(RelativePositionAttention(channels, heads), gain=2.0)
    x = torch.randn(2, channels, *size)
    with torch.no_grad():
        block.gamma.fill_(0.7)
        out, expected = block(x), attention_reference(block, x, heads)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, x, atol=0.1)  # the attention does something


def test_relative_attention_has_six_heads_of_42_at_256_channels():
    block = RelativePositionAttention(256)
    assert block.query.weight.shape == block.value.weight.shape == (252, 256, 1, 1)
    assert block.position_x.weight.shape == block.position_y.weight.shape == (252, 128)
    assert block.project.weight.shape == (256, 252, 1, 1)
    for layer in (block.query, block.value, block.position_x, block.position_y):
        assert layer.bias is None
    assert block.num_heads == 6


def test_relative_attention_starts_as_the_identity():
    block = RelativePositionAttention(16)
    assert block.gamma.item() == 0
    x = torch.randn(2, 16, 7, 7)
    assert torch.equal(block(x), x)


def test_relative_attention_initialisation():
    block = RelativePositionAttention(256)
    for layer in (block.query, block.value, block.position_x, block.position_y, block.project):
        fan_in = layer.weight[0].numel()
        bound = math.sqrt(3 / fan_in)  # Kaiming-uniform with a = 1
        assert layer.weight.abs().max().item() <= bound
        # A uniform law's deviation is bound / sqrt(3); at least 32,256 draws, so well within 2 %.
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not block.project.bias.any()


@pytest.mark.parametrize(
    "block",
    [NonLocal2d(8, 1), NonLocal2d(8, 7), RelativePositionAttention(8)],
    ids=["non_local_1", "non_local_7", "attention"],
)
def test_zero_rois_keep_the_graph(block):
    out = block(torch.zeros(0, 8, 7, 7))
    assert out.shape == (0, 8, 7, 7)
    out.sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("heads", [0, 9])
def test_attention_needs_a_channel_per_head(heads):
    with pytest.raises(ValueError, match=rf"ATTENTION_HEADS are 1 to 8.*got {heads}"):
        RelativePositionAttention(8, heads)


def test_attention_in_double_precision(randomize):
    block = randomize(RelativePositionAttention(12, 6))
    x = torch.randn(2, 12, 7, 7)
    torch.testing.assert_close(block.double()(x.double()).float(), block.float()(x))
