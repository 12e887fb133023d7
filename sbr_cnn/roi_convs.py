"""Convolutions with large kernels on small RoI maps, with the initialisation of the thesis' code.

Thesis sections 2.1.3, 2.3.4 and 2.3.5. Shape shorthand: R RoIs, C channels.
"""

from fvcore.nn.weight_init import c2_msra_fill
from torch import nn


def conv_relu(
    channels: int, out: int, kernel: int | tuple[int, int], padding: int | None = None
) -> nn.Sequential:
    """Convolution with bias (Kaiming-normal, fan out) and ReLU; by default S is kept."""
    if padding is None:
        padding = kernel // 2
    conv = nn.Conv2d(channels, out, kernel, padding=padding)
    c2_msra_fill(conv)
    return nn.Sequential(conv, nn.ReLU())


def rectangular_pair(channels: int, middle: int, out: int) -> list[nn.Sequential]:
    """(7 high, 3 wide) then (3, 7) convolution, each with ReLU; a 7x7 map becomes 3x7, then 7x7.

    Differs from the thesis' text (padding 3, then 1): all published configs pad 1, then 3, which
    is also what its reported speed fits.
    """
    return [conv_relu(channels, middle, (7, 3), 1), conv_relu(middle, out, (3, 7), 3)]
