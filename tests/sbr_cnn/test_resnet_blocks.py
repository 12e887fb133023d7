"""The blocks of the ResNet on their own: global context and deformable convolution."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sbr_cnn.resnet import DeformConv2d, GlobalContextBlock

# ---- Global context ----


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_global_context_is_its_formula(ratio, randomize):
    block = randomize(GlobalContextBlock(16, ratio))
    x = torch.randn(2, 16, 5, 7)
    score = torch.einsum("c,nchw->nhw", block.attention.weight[0, :, 0, 0], x)
    score = (score + block.attention.bias).exp()
    weights = score / score.sum((1, 2), keepdim=True)
    context = torch.einsum("nhw,nchw->nc", weights, x)
    inner = context @ block.reduce.weight[:, :, 0, 0].T + block.reduce.bias
    assert inner.shape[1] == 16 * ratio
    centered = inner - inner.mean(1, keepdim=True)
    normal = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
    normal = normal * block.norm.weight.flatten() + block.norm.bias.flatten()
    added = normal.clamp(min=0) @ block.expand.weight[:, :, 0, 0].T + block.expand.bias
    assert (normal > 0).any() and (normal < 0).any()  # the ReLU matters
    torch.testing.assert_close(block(x), x + added[:, :, None, None])


def test_new_global_context_is_the_identity():
    block, x = GlobalContextBlock(8, 0.25), torch.randn(2, 8, 5, 7)
    assert torch.equal(block(x), x)
    assert block.attention.weight.any() and not block.attention.bias.any()
    assert block.reduce.weight.any()


def test_global_context_starts_with_kaimings_variance():
    weight = GlobalContextBlock(4096, 1 / 4096).attention.weight
    assert weight.std().item() == pytest.approx((2 / 4096) ** 0.5, rel=0.05)  # gain 2, fan-in C


def test_gradients_of_global_context(randomize):
    block, x = GlobalContextBlock(16, 0.5), torch.randn(2, 16, 5, 7)
    block(x).square().sum().backward()
    reached = {name for name, p in block.named_parameters() if p.grad.any()}
    assert reached == {"expand.weight", "expand.bias"}  # the rest is behind its zeros
    randomize(block).zero_grad()
    block(x).square().sum().backward()
    grads = {name: p.grad.abs().max().item() for name, p in block.named_parameters()}
    # The softmax does not see a constant.
    assert grads.pop("attention.bias") == pytest.approx(0, abs=1e-3)
    assert min(grads.values()) > 0.01


def test_global_context_without_inner_channels():
    with pytest.raises(ValueError, match=r"MODEL.GC_BLOCK.RATIO 0.1 of 8 channels.*0.125"):
        GlobalContextBlock(8, 0.1)


# ---- Deformable convolution ----

geometries = pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])


@geometries
def test_new_deformable_convolution_is_the_plain_one(stride, dilation):
    kwargs = {"stride": stride, "padding": dilation, "dilation": dilation}
    conv, x = DeformConv2d(4, 6, 3, bias=False, **kwargs), torch.randn(2, 4, 9, 12)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, **kwargs))


@geometries
def test_whole_offsets_move_the_kernels_positions(stride, dilation):
    """Every position by its own offset, (y, x): a plain convolution with a wider kernel."""
    conv = DeformConv2d(4, 6, 3, stride=stride, padding=dilation, dilation=dilation, norm=nn.ReLU())
    offsets = torch.randint(-2, 3, (3, 3, 2))
    with torch.no_grad():
        conv.offset.bias.copy_(offsets.flatten())
        wide = torch.zeros(6, 4, 9, 9)
        for y in range(3):
            for x in range(3):
                dy, dx = offsets[y, x].tolist()
                wide[:, :, 4 + dilation * (y - 1) + dy, 4 + dilation * (x - 1) + dx] += conv.weight[
                    :, :, y, x
                ]
    x = torch.randn(2, 4, 9, 12)
    expected = F.conv2d(x, wide, conv.bias, stride=stride, padding=4).relu()
    torch.testing.assert_close(conv(x), expected)


def test_one_pixel_down_is_the_shifted_convolution():
    conv, x = DeformConv2d(4, 6, 3, padding=1, bias=False), torch.randn(1, 4, 9, 12)
    with torch.no_grad():
        conv.offset.bias[0::2] = 1  # y
    shifted = F.conv2d(F.pad(x, (1, 1, 0, 2)), conv.weight)  # rows 0 to 10 for rows -1 to 9
    torch.testing.assert_close(conv(x), shifted)


def test_part_of_a_pixel_is_interpolated():
    conv, x = DeformConv2d(4, 6, 3, padding=1, bias=False), torch.randn(1, 4, 9, 12)
    outputs = []
    for right in (0.0, 1.0, 0.25):
        with torch.no_grad():
            conv.offset.bias[1::2] = right
        outputs.append(conv(x))
    torch.testing.assert_close(outputs[2], 0.75 * outputs[0] + 0.25 * outputs[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_offsets_keep_their_precision(dtype):
    """Rows of 1 and -1: where the kernel's middle lies 8.02 rows below, 1 - 2 * 0.02."""
    conv = DeformConv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(3)[1].outer(torch.eye(3)[1]).view(1, 1, 3, 3))
        conv.offset.bias[0::2] = 8.02  # 8 in bf16
    x = (1 - 2 * (torch.arange(16.0) % 2)).view(1, 1, 16, 1).expand(1, 1, 16, 4)
    with torch.autocast("cpu", dtype=dtype):
        out = conv(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out[0, 0, 0].float(), torch.full((4,), 0.96), atol=0.003, rtol=0)
