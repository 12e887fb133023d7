"""Convolutions with large kernels on small RoI maps, with the initialisation of the thesis' code.

Thesis sections 2.1.3, 2.3.4 and 2.3.5. Shape shorthand: R RoIs, C channels.
"""

import torch
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn
from torch.nn import functional as F

from .fourier import fourier_conv2d, fourier_gain

# From this many times fewer multiplications the frequency domain was faster (docs/benchmarks.md).
MIN_GAIN = 2.0


def has_cpu_path(x: Tensor) -> bool:
    """Whether the operators for fp32 on the CPU (``fourier``, ``roi_align``) take ``x``.

    What records operators (tracing, exporting, compiling) gets those that it knows.
    """
    recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()
    autocast = torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and x.dtype == torch.float32 and not (autocast or recorded)


def roi_conv2d(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
    """``F.conv2d`` with stride 1; in fp32 on the CPU over frequencies where that is faster."""
    if has_cpu_path(x) and fourier_gain(x, weight, padding) >= MIN_GAIN:
        return fourier_conv2d(x, weight, bias, padding)
    return F.conv2d(x, weight, bias, padding=padding)


class RoIConv2d(nn.Conv2d):
    """``nn.Conv2d`` with stride 1 and zero padding, computed by :func:`roi_conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, h, w) to (R, out_channels, h', w')."""
        return roi_conv2d(x, self.weight, self.bias, self.padding)


def conv_relu(
    channels: int, out: int, kernel: int | tuple[int, int], padding: int | None = None
) -> nn.Sequential:
    """Convolution with bias (Kaiming-normal, fan out) and ReLU; by default S is kept."""
    if padding is None:
        padding = kernel // 2
    conv = RoIConv2d(channels, out, kernel, padding=padding)
    c2_msra_fill(conv)
    return nn.Sequential(conv, nn.ReLU(inplace=True))


def rectangular_pair(channels: int, middle: int, out: int) -> list[nn.Sequential]:
    """(7 high, 3 wide) then (3, 7) convolution, each with ReLU; a 7x7 map becomes 3x7, then 7x7.

    Differs from the thesis' text (padding 3, then 1): all published configs pad 1, then 3, which
    is also what its reported speed fits.
    """
    return [conv_relu(channels, middle, (7, 3), 1), conv_relu(middle, out, (3, 7), 3)]
