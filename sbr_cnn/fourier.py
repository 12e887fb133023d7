"""Convolution of small maps with large kernels in the frequency domain.

A 7x7 kernel on a 7x7 map touches every pixel from every pixel: 2401 multiplications a channel pair.
A discrete Fourier transform of 10x10 points holds the same result in 60 complex numbers, 240
multiplications. The transforms are so short that they are matrix products. Used by the FCC,
non-local and GRoIE modules (thesis sections 2.3.3 to 2.3.5) on the CPU.

Shape shorthand: R maps, C input and O output channels, F frequencies.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Maps transformed at a time: their frequencies stay in a core's cache.
CHUNK = 128


class Transforms(NamedTuple):
    """Real matrices of the transforms; the first 2 is the real and the imaginary part.

    Attributes:
        image: (2, F, h * w), map to frequencies.
        kernel: (2, F, kh * kw), kernel to frequencies, turned round for a correlation.
        inverse: (2, F, oh * ow), frequencies back to the output's pixels.
        output_size: oh, ow.
    """

    image: Tensor
    kernel: Tensor
    inverse: Tensor
    output_size: tuple[int, int]


def fourier_conv2d(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """What ``F.conv2d(x, weight, padding=padding)`` gives, to fp32 rounding.

    Args:
        x: (R, C, h, w) fp32.
        weight: (O, C, kh, kw) fp32.
        padding: zeros above and below, left and right; less than the kernel's side.

    Returns:
        (R, O, h + 2 padding - kh + 1, w + 2 padding - kw + 1).
    """
    return _FourierConv2d.apply(x, weight, padding)


def fourier_gain(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> float:
    """How many times fewer multiplications the frequency domain takes; arguments as above."""
    maps, channels, height, width = x.shape
    out, _, *kernel = weight.shape
    (rows, points_y), (cols, points_x) = (
        (n + 2 * p - k + 1, n + p) for n, k, p in zip((height, width), kernel, padding, strict=True)
    )
    numbers = 2 * points_y * (points_x // 2 + 1)
    direct = maps * channels * out * kernel[0] * kernel[1] * rows * cols
    transforms = maps * (channels * height * width + out * rows * cols)
    transforms += channels * out * kernel[0] * kernel[1]
    return direct / max(numbers * (2 * maps * channels * out + transforms), 1)


class _FourierConv2d(torch.autograd.Function):
    """Frequencies are not kept for the backward pass: making them again costs less than memory."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        transforms = _transforms(tuple(x.shape[2:]), tuple(weight.shape[2:]), padding)
        real, imaginary = _kernel_frequencies(weight, transforms)
        output = x.new_empty(len(x), len(weight), *transforms.output_size)
        for part, result in zip(x.split(CHUNK), output.split(CHUNK), strict=True):
            maps = _analyse(part, transforms.image)
            product = _multiply(maps, real, imaginary)
            _synthesise(product, transforms.inverse, result)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Each step of forward is linear and real: backward applies the transposed matrices.
        x, weight = ctx.saved_tensors
        transforms = _transforms(tuple(x.shape[2:]), tuple(weight.shape[2:]), ctx.padding)
        real, imaginary = _kernel_frequencies(weight, transforms)
        real, imaginary = real.transpose(1, 2), -imaginary.transpose(1, 2)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        frequencies = transforms.image.shape[1]
        grad_kernel = x.new_zeros(2, frequencies, x.shape[1], len(weight))
        chunks = range(0, len(x), CHUNK)
        for part in (slice(start, start + CHUNK) for start in chunks):
            grads = _analyse(grad_output[part], transforms.inverse)
            if needs_x:
                product = _multiply(grads, real, imaginary)
                _synthesise(product, transforms.image, grad_x[part])
            if needs_weight:
                maps = _analyse(x[part], transforms.image).transpose(2, 3)
                grad_kernel[0].baddbmm_(maps[0], grads[0]).baddbmm_(maps[1], grads[1])
                grad_kernel[1].baddbmm_(maps[0], grads[1]).baddbmm_(maps[1], grads[0], alpha=-1)
        grad_weight = None
        if needs_weight:
            pixels = grad_kernel.flatten(2).flatten(0, 1).t() @ transforms.kernel.flatten(0, 1)
            grad_weight = pixels.view(x.shape[1], *weight.shape[:1], *weight.shape[2:])
            grad_weight = grad_weight.transpose(0, 1).contiguous()
        return grad_x, grad_weight, None


def _analyse(maps: Tensor, matrix: Tensor) -> Tensor:
    """(R, C, a, b) and (2, F, a * b) to the frequencies (2, F, R, C)."""
    flat = maps.reshape(-1, matrix.shape[2])
    return (matrix.flatten(0, 1) @ flat.t()).view(*matrix.shape[:2], *maps.shape[:2])


def _multiply(maps: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """Complex product per frequency: (2, F, R, C) with twice (F, C, O) to (2, F, R, O)."""
    product = maps.new_empty(*maps.shape[:3], real.shape[2])
    torch.bmm(maps[0], real, out=product[0]).baddbmm_(maps[1], imaginary, alpha=-1)
    torch.bmm(maps[0], imaginary, out=product[1]).baddbmm_(maps[1], real)
    return product


def _synthesise(frequencies: Tensor, matrix: Tensor, result: Tensor) -> None:
    """(2, F, R, C) and (2, F, a * b) into ``result``, contiguous (R, C, a, b)."""
    flat = frequencies.flatten(2).flatten(0, 1)
    torch.mm(flat.t(), matrix.flatten(0, 1), out=result.view(-1, matrix.shape[2]))


def _kernel_frequencies(weight: Tensor, transforms: Transforms) -> tuple[Tensor, Tensor]:
    """Real and imaginary part, each (F, C, O)."""
    flat = weight.transpose(0, 1).reshape(-1, weight[0, 0].numel())
    frequencies = transforms.kernel.flatten(0, 1) @ flat.t()
    return frequencies.view(*transforms.kernel.shape[:2], weight.shape[1], len(weight)).unbind(0)


@lru_cache(maxsize=64)
def _transforms(
    size: tuple[int, int], kernel: tuple[int, int], padding: tuple[int, int]
) -> Transforms:
    """The matrices of one shape of map and kernel."""
    # Circular convolution over size + padding points: what wraps around lies outside the output.
    points = [n + p for n, p in zip(size, padding, strict=True)]
    output = tuple(n + 2 * p - k + 1 for n, k, p in zip(size, kernel, padding, strict=True))
    # The input is real: half of the frequencies of the last axis say all, each counted twice.
    halves = (points[0], points[1] // 2 + 1)
    image, turned, inverse = [], [], []
    for n, k, p, out, total, kept in zip(
        size, kernel, padding, output, points, halves, strict=True
    ):
        image.append(_waves(kept, _axis(n), -total))
        turned.append(_waves(kept, k - 1 - _axis(k), -total))
        inverse.append(_waves(kept, k - 1 - p + _axis(out), total) / total)
    twice = torch.full((halves[1], 1), 2.0, dtype=torch.float64, device="cpu")
    twice[0] = 1
    if points[1] % 2 == 0:
        twice[-1] = 1
    inverse[1] = inverse[1] * twice
    spectrum = _both_axes(*inverse)
    spectrum[1].neg_()  # the real part of a product takes minus the imaginary parts'
    return Transforms(
        _both_axes(*image).float(), _both_axes(*turned).float(), spectrum.float(), output
    )


def _axis(count: int) -> Tensor:
    """0 to count - 1, whatever the default device and type: the matrices are kept for later."""
    return torch.arange(count, dtype=torch.float64, device="cpu")


def _waves(count: int, positions: Tensor, period: int) -> Tensor:
    """exp(2 pi i f x / period) of frequencies f < count at positions x: (count, positions)."""
    angles = 2 * math.pi / period * _axis(count)[:, None] * positions
    return torch.complex(angles.cos(), angles.sin())


def _both_axes(rows: Tensor, cols: Tensor) -> Tensor:
    """(Fy, a) and (Fx, b) complex to (2, Fy * Fx, a * b), real and imaginary part."""
    product = torch.einsum("fa,gb->fgab", rows, cols).flatten(2).flatten(0, 1)
    return torch.stack([product.real, product.imag])
