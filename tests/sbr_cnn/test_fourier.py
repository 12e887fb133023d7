"""Convolution over frequencies against torch's own, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from sbr_cnn import fourier, roi_convs
from sbr_cnn.fourier import fourier_conv2d, fourier_gain
from sbr_cnn.roi_convs import RoIConv2d

# Map, kernel, padding: all the shapes of the thesis, and odd ones.
SHAPES = [
    ((7, 7), (7, 7), (3, 3)),
    ((14, 14), (7, 7), (3, 3)),
    ((7, 7), (5, 5), (2, 2)),
    ((7, 7), (7, 3), (1, 1)),
    ((3, 7), (3, 7), (3, 3)),
    ((14, 14), (3, 3), (1, 1)),
    ((6, 9), (3, 5), (0, 4)),
    ((5, 4), (1, 1), (0, 0)),
    ((7, 7), (7, 7), (0, 0)),
]


def assert_same(outputs, references) -> None:
    for output, reference in zip(outputs, references, strict=True):
        # Rounding of fp32 (1.2e-7) through sums of some thousand products.
        scale = reference.abs().max().item()
        torch.testing.assert_close(output, reference, rtol=0, atol=2e-5 * max(scale, 1e-3))


@pytest.mark.parametrize(("size", "kernel", "padding"), SHAPES)
@pytest.mark.parametrize("maps", [1, 5, 300])  # below and above a chunk
def test_equals_conv2d(size, kernel, padding, maps):
    x = torch.randn(maps, 6, *size, requires_grad=True)
    weight = torch.randn(10, 6, *kernel, requires_grad=True)
    bias = torch.randn(10, requires_grad=True)
    reference = F.conv2d(x, weight, bias, padding=padding)
    output = fourier_conv2d(x, weight, bias, padding)
    assert output.shape == reference.shape
    assert_same([output], [reference])
    noise = torch.randn_like(reference)
    assert_same(
        torch.autograd.grad(output, [x, weight, bias], noise),
        torch.autograd.grad(reference, [x, weight, bias], noise),
    )


def test_chunks_do_not_show(monkeypatch):
    x, weight, bias = torch.randn(7, 4, 7, 7), torch.randn(4, 4, 7, 7), torch.randn(4)
    whole = fourier_conv2d(x, weight, bias, (3, 3))
    monkeypatch.setattr(fourier, "CHUNK", 3)
    torch.testing.assert_close(fourier_conv2d(x, weight, bias, (3, 3)), whole)


def test_strided_input_and_gradient():
    x = torch.randn(4, 7, 7, 6).permute(0, 3, 1, 2).requires_grad_()
    weight = torch.randn(6, 5, 7, 7).transpose(0, 1).requires_grad_()
    output = fourier_conv2d(x, weight, torch.zeros(5), (3, 3))
    reference = F.conv2d(x, weight, padding=3)
    noise = torch.randn(4, 7, 7, 5).permute(0, 3, 1, 2)
    assert_same([output], [reference])
    assert_same(
        torch.autograd.grad(output, [x, weight], noise),
        torch.autograd.grad(reference, [x, weight], noise),
    )


def test_only_what_needs_a_gradient_gets_one():
    x, weight, bias = torch.randn(2, 4, 7, 7), torch.randn(4, 4, 7, 7), torch.randn(4)
    fourier_conv2d(x, weight.requires_grad_(), bias, (3, 3)).sum().backward()
    assert x.grad is None and weight.grad is not None and bias.grad is None
    assert not fourier_conv2d(x, weight.detach(), bias, (3, 3)).requires_grad


def test_no_maps():
    x = torch.zeros(0, 4, 7, 7, requires_grad=True)
    weight = torch.randn(6, 4, 7, 7, requires_grad=True)
    output = fourier_conv2d(x, weight, torch.randn(6), (3, 3))
    assert output.shape == (0, 6, 7, 7)
    output.sum().backward()
    assert not weight.grad.any() and x.grad.shape == x.shape


def test_gain_of_a_7x7_kernel():
    # Direct: 49 * 49 multiplications a channel pair. Over 10 * 10 frequencies, of which 4 are real
    # and 48 pairs conjugate: 4 + 48 * 4, and to get there and back 100 * 49 for every channel of
    # either side (and of the kernel, per map).
    x, weight = torch.empty(1000, 256, 7, 7), torch.empty(256, 256, 7, 7)
    transforms = 100 * 49 * (1 / 256 + 1 / 256 + 1 / 1000)
    expected = 2401 / (4 + 48 * 4 + transforms)
    assert fourier_gain(x, weight, (3, 3)) == pytest.approx(expected)


@pytest.mark.parametrize("kernel", [1, 7])
def test_roi_conv_chooses_by_the_gain(kernel, monkeypatch):
    used = []
    monkeypatch.setattr(
        roi_convs,
        "fourier_conv2d",
        lambda *args: used.append(args) or fourier.fourier_conv2d(*args),
    )
    conv = RoIConv2d(64, 64, kernel, padding=kernel // 2)
    x = torch.randn(64, 64, 7, 7)
    output = conv(x)
    assert bool(used) == (kernel == 7)
    reference = F.conv2d(x, conv.weight, conv.bias, padding=kernel // 2)
    assert_same([output], [reference])
    used.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    conv.double()(x.double())
    assert not used  # other types go to conv2d


def test_what_records_operators_sees_a_convolution():
    conv = RoIConv2d(64, 64, 7, padding=3)
    x = torch.randn(64, 64, 7, 7)
    with torch.no_grad():
        traced = torch.jit.trace(conv, x)
        expected = F.conv2d(x[:5], conv.weight, conv.bias, padding=3)
        torch.testing.assert_close(traced(x[:5]), expected)


def test_the_matrices_do_not_remember_a_default_device():
    x, weight = torch.randn(2, 4, 11, 5), torch.randn(4, 4, 3, 3)  # a shape of its own
    with torch.device("meta"):
        fourier_conv2d(x, weight, torch.zeros(4), (1, 1))
    output = fourier_conv2d(x, weight, torch.zeros(4), (1, 1))
    assert_same([output], [F.conv2d(x, weight, padding=1)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_roi_conv_on_a_gpu_is_conv2d(monkeypatch):
    monkeypatch.setattr(roi_convs, "fourier_conv2d", None)
    conv = RoIConv2d(64, 64, 7, padding=3).cuda()
    x = torch.randn(64, 64, 7, 7, device="cuda")
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=3))
