"""Convolution of small maps with large kernels in the frequency domain.

A 7x7 kernel on a 7x7 map touches every pixel from every pixel: 2401 multiplications a channel pair.
A discrete Fourier transform of 10x10 points holds the same result in 4 real and 48 complex numbers,
196 multiplications. The transforms are so short that they are matrix products. Used by the FCC,
non-local and GRoIE modules (thesis sections 2.3.3 to 2.3.5) on the CPU.

Shape shorthand: R maps, C input and O output channels, N points of the transform (rows times
columns), F frequencies. The maps are real, so of two frequencies that are conjugate one is kept: F
real parts, first those of frequencies that are their own conjugate and so have no imaginary part,
then the imaginary parts of the others, N numbers in all.
"""

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Maps transformed at a time: their frequencies stay in a core's cache.
CHUNK = 128


class Transforms(NamedTuple):
    """Real matrices of the transforms, rows in the order of the frequencies above.

    Attributes:
        image: (N, h * w), map to frequencies.
        kernel: (N, kh * kw), kernel to frequencies, turned round for a correlation.
        inverse: (N, oh * ow), frequencies back to the output's pixels.
        output_size: oh, ow.
        num_frequencies: F.
    """

    image: Tensor
    kernel: Tensor
    inverse: Tensor
    output_size: tuple[int, int]
    num_frequencies: int


def fourier_conv2d(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
    """What ``F.conv2d(x, weight, bias, padding=padding)`` gives, to fp32 rounding.

    Args:
        x: (R, C, h, w) fp32.
        weight: (O, C, kh, kw) fp32.
        bias: (O,) fp32.
        padding: zeros above and below, left and right; less than the kernel's side.

    Returns:
        (R, O, h + 2 padding - kh + 1, w + 2 padding - kw + 1).
    """
    return _FourierConv2d.apply(x, weight, bias, padding)


def fourier_gain(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> float:
    """How many times fewer multiplications the frequency domain takes; arguments as above."""
    maps, channels, height, width = x.shape
    out, _, *kernel = weight.shape
    (rows, points_y), (cols, points_x) = (
        (n + 2 * p - k + 1, n + p) for n, k, p in zip((height, width), kernel, padding, strict=True)
    )
    points = points_y * points_x
    real = (2 - points_y % 2) * (2 - points_x % 2)
    direct = maps * channels * out * kernel[0] * kernel[1] * rows * cols
    transforms = maps * (channels * height * width + out * rows * cols)
    transforms += channels * out * kernel[0] * kernel[1]
    return direct / max((2 * points - real) * maps * channels * out + points * transforms, 1)


class _FourierConv2d(torch.autograd.Function):
    """Frequencies are not kept for the backward pass: making them again costs less than memory."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        transforms = _transforms(tuple(x.shape[2:]), tuple(weight.shape[2:]), padding)
        kernel = _kernel_frequencies(weight, transforms)
        output = x.new_empty(len(x), len(weight), *transforms.output_size)
        maps, product = (_spectra(x, c, transforms) for c in (x.shape[1], len(weight)))
        for part, result in zip(x.split(CHUNK), output.split(CHUNK), strict=True):
            few = slice(None, len(part))
            _analyse(part, transforms.image, maps[:, few])
            _multiply(maps[:, few], kernel, transforms.num_frequencies, product[:, few])
            _synthesise(product[:, few], transforms.inverse, result)
            result += bias[:, None, None]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Each step of forward is linear and real: backward applies the transposed matrices.
        x, weight = ctx.saved_tensors
        transforms = _transforms(tuple(x.shape[2:]), tuple(weight.shape[2:]), ctx.padding)
        count = transforms.num_frequencies
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        maps, grads = (_spectra(x, c, transforms) for c in (x.shape[1], len(weight)))
        if needs_x:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            turned = _kernel_frequencies(weight, transforms).transpose(1, 2)
            turned[count:].neg_()
        if needs_weight:
            grad_kernel = x.new_zeros(len(maps), x.shape[1], len(weight))
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            few = slice(None, len(x[part]))
            _analyse(grad_output[part], transforms.inverse, grads[:, few])
            if needs_weight:
                _analyse(x[part], transforms.image, maps[:, few])
                _add_correlation(grad_kernel, maps[:, few], grads[:, few], count)
            if needs_x:
                _multiply(grads[:, few], turned, count, maps[:, few])
                _synthesise(maps[:, few], transforms.image, grad_x[part])
        if needs_weight:
            pixels = grad_kernel.flatten(1).t() @ transforms.kernel
            grad_weight = pixels.view(x.shape[1], *weight.shape[:1], *weight.shape[2:])
            grad_weight = grad_weight.transpose(0, 1).contiguous()
        if needs_bias:
            grad_bias = grad_output.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None


def _spectra(x: Tensor, channels: int, transforms: Transforms) -> Tensor:
    """Room for the frequencies of a chunk of maps: (N, R or CHUNK, channels)."""
    return x.new_empty(len(transforms.image), min(len(x), CHUNK), channels)


def _analyse(maps: Tensor, matrix: Tensor, result: Tensor) -> None:
    """(R, C, a, b) and (N, a * b) into the frequencies (N, R, C)."""
    flat = maps.reshape(-1, matrix.shape[1])
    torch.mm(matrix, flat.t(), out=result.flatten(1))


def _multiply(maps: Tensor, kernel: Tensor, count: int, result: Tensor) -> None:
    """Complex product per frequency: (N, R, C) with (N, C, O) into (N, R, O); ``count`` is F."""
    own = 2 * count - len(maps)  # frequencies without an imaginary part
    real, imaginary, both = slice(count), slice(count, None), slice(own, count)
    torch.bmm(maps[real], kernel[real], out=result[real])
    result[both].baddbmm_(maps[imaginary], kernel[imaginary], alpha=-1)
    torch.bmm(maps[both], kernel[imaginary], out=result[imaginary])
    result[imaginary].baddbmm_(maps[imaginary], kernel[both])


def _add_correlation(grad_kernel: Tensor, maps: Tensor, grads: Tensor, count: int) -> None:
    """Gradient of :func:`_multiply` for the kernel: (N, R, C), (N, R, O) onto (N, C, O)."""
    own = 2 * count - len(maps)
    real, imaginary, both = slice(count), slice(count, None), slice(own, count)
    maps = maps.transpose(1, 2)
    grad_kernel[real].baddbmm_(maps[real], grads[real])
    grad_kernel[both].baddbmm_(maps[imaginary], grads[imaginary])
    grad_kernel[imaginary].baddbmm_(maps[both], grads[imaginary])
    grad_kernel[imaginary].baddbmm_(maps[imaginary], grads[both], alpha=-1)


def _synthesise(frequencies: Tensor, matrix: Tensor, result: Tensor) -> None:
    """(N, R, C) and (N, a * b) into ``result``, contiguous (R, C, a, b)."""
    torch.mm(frequencies.flatten(1).t(), matrix, out=result.view(-1, matrix.shape[1]))


def _kernel_frequencies(weight: Tensor, transforms: Transforms) -> Tensor:
    """(N, C, O)."""
    flat = weight.transpose(0, 1).reshape(-1, weight[0, 0].numel())
    return (transforms.kernel @ flat.t()).view(-1, weight.shape[1], len(weight))


@lru_cache(maxsize=64)
def _transforms(
    size: tuple[int, int], kernel: tuple[int, int], padding: tuple[int, int]
) -> Transforms:
    """The matrices of one shape of map and kernel."""
    # Circular convolution over size + padding points: what wraps around lies outside the output.
    points = [n + p for n, p in zip(size, padding, strict=True)]
    output = [n + 2 * p - k + 1 for n, k, p in zip(size, kernel, padding, strict=True)]
    turns, own = _kept_frequencies(*points)
    image = _waves(turns, own, *(_axis(n) for n in size))
    turned = _waves(turns, own, *(k - 1 - _axis(k) for k in kernel))
    starts = [k - 1 - p for k, p in zip(kernel, padding, strict=True)]
    inverse = _waves(turns, own, *(s + _axis(n) for s, n in zip(starts, output, strict=True)))
    inverse[own:] *= 2  # for their conjugates
    inverse /= points[0] * points[1]
    return Transforms(image.float(), turned.float(), inverse.float(), tuple(output), len(turns))


def _kept_frequencies(rows: int, cols: int) -> tuple[Tensor, int]:
    """One of each pair of conjugates, in turns per pixel (F, 2), and how many come first alone."""
    own, others = [], []
    for y, x in itertools.product(range(rows), range(cols)):
        conjugate = (-y % rows, -x % cols)
        if (y, x) <= conjugate:
            (own if (y, x) == conjugate else others).append((y, x))
    turns = torch.tensor([*own, *others], dtype=torch.float64, device="cpu")
    return turns / torch.tensor([rows, cols], dtype=torch.float64, device="cpu"), len(own)


def _waves(turns: Tensor, own: int, rows: Tensor, cols: Tensor) -> Tensor:
    """exp(-2 pi i (fy y + fx x)) at rows (a,) and columns (b,), real then imaginary: (N, a * b)."""
    y, x = (2 * math.pi * turns).unbind(1)
    angles = (y[:, None, None] * rows[:, None] + x[:, None, None] * cols).flatten(1)
    return torch.cat([angles.cos(), -angles[own:].sin()])


def _axis(count: int) -> Tensor:
    """0 to count - 1, whatever the default device and type: the matrices are kept for later."""
    return torch.arange(count, dtype=torch.float64, device="cpu")
