"""Attention blocks for RoI features: the non-local block and the query/relative-position attention.

Thesis sections 2.1 and 2.3.3: Wang et al., "Non-local Neural Networks" (embedded Gaussian), and
the type "0100" of Zhu et al., "An Empirical Study of Spatial Attention Mechanisms".

Shape shorthand: R RoIs, C channels, D inner channels, H and W the RoI's height and width, h heads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .roi_convs import RoIConv2d, roi_conv2d


class NonLocal2d(nn.Module):
    """Embedded-Gaussian non-local block whose four convolutions have a free kernel size.

    ``out = x + conv_out(softmax(theta(x)^T phi(x) / sqrt(D)) g(x))`` with D = C / 2. The output
    convolution starts at zero, so a new block is the identity. No normalisation, no activation.

    Differs from the original block: the kernel of every convolution is ``kernel_size`` (1 or 7
    in the thesis), not always 1.

    Args:
        channels: C, even.
        kernel_size: side of all four kernels; odd, padded to keep H and W.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        if channels % 2 or kernel_size % 2 == 0:
            raise ValueError(
                f"NonLocal2d needs an even number of channels and an odd kernel, "
                f"got channels={channels}, kernel_size={kernel_size}"
            )
        inner = channels // 2
        padding = kernel_size // 2
        # These three hold the parameters under their names; forward runs them as one.
        self.theta = nn.Conv2d(channels, inner, kernel_size, padding=padding)
        self.phi = nn.Conv2d(channels, inner, kernel_size, padding=padding)
        self.g = nn.Conv2d(channels, inner, kernel_size, padding=padding)
        self.conv_out = RoIConv2d(inner, channels, kernel_size, padding=padding)
        for conv in (self.theta, self.phi, self.g):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (R, C, H, W) to the same shape."""
        height, width = x.shape[-2:]
        # Three convolutions of the same map in one pass: (R, 3 * D, H, W).
        convs = (self.theta, self.phi, self.g)
        weight, bias = (torch.cat([getattr(c, name) for c in convs]) for name in ("weight", "bias"))
        embedded = roi_conv2d(x, weight, bias, self.theta.padding)
        # One attention head over the H*W positions, (R, 1, H*W, D); fused kernels want D innermost.
        embedded = embedded.contiguous(memory_format=torch.channels_last)
        parts = embedded.permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)
        query, key, value = parts.chunk(3, dim=3)
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended.squeeze(1).transpose(1, 2).unflatten(2, (height, width))
        return x + self.conv_out(attended)


class RelativePositionAttention(nn.Module):
    """Attention from the query's content and the relative position of query and key.

    ``energy(y, x, y', x') = q(y, x) . ex(x, x') + q(y, x) . ey(y, y')`` with keys and values on
    every second row and column, softmax over all (y', x') together, no 1/sqrt(d); the result
    is projected, scaled by a learned scalar that starts at 0 and added to the input.

    The energy is a sum of a row and a column term, so the joint softmax is the product of two
    small ones; that is how it is computed (the tests compare it with the joint form).

    Args:
        channels: C.
        num_heads: h; each head has ``channels // num_heads`` channels.
    """

    KEY_STRIDE = 2
    NUM_WAVELENGTHS = 64
    EMBEDDING_WIDTH = 256  # sets the wavelengths 1000^(4k/256)

    def __init__(self, channels: int, num_heads: int = 6) -> None:
        super().__init__()
        if not 1 <= num_heads <= channels:
            raise ValueError(
                f"MODEL.GROIE.ATTENTION_HEADS are 1 to {channels}, the channels of the features; "
                f"got {num_heads}"
            )
        self.num_heads = num_heads
        inner = channels // num_heads * num_heads
        position_width = 2 * self.NUM_WAVELENGTHS
        self.query = nn.Conv2d(channels, inner, 1, bias=False)
        self.value = nn.Conv2d(channels, inner, 1, bias=False)
        self.position_x = nn.Linear(position_width, inner, bias=False)
        self.position_y = nn.Linear(position_width, inner, bias=False)
        self.project = nn.Conv2d(inner, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))
        for layer in (self.query, self.value, self.position_x, self.position_y, self.project):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.zeros_(self.project.bias)

    def position_embedding(self, size: int, device: torch.device) -> Tensor:
        """Sines and cosines of the offsets ``i - 2 j``: (size, ceil(size / 2), 128)."""
        queries = torch.arange(size, device=device, dtype=torch.float32)
        keys = torch.arange(0, size, self.KEY_STRIDE, device=device, dtype=torch.float32)
        offset = queries[:, None] - keys[None, :]
        step = torch.arange(self.NUM_WAVELENGTHS, device=device, dtype=torch.float32)
        wavelengths = torch.pow(1000.0, 4.0 / self.EMBEDDING_WIDTH * step)
        angle = offset[:, :, None] / wavelengths
        return torch.cat([angle.sin(), angle.cos()], dim=2)

    def _axis_energy(self, query: Tensor, linear: nn.Linear, equation: str, size: int) -> Tensor:
        positions = self.position_embedding(size, query.device).to(linear.weight.dtype)
        embedded = linear(positions) / math.sqrt(2)
        heads = embedded.unflatten(2, (self.num_heads, -1))  # (size, keys, h, d)
        return torch.einsum(equation, query, heads.to(query.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (R, C, H, W) to the same shape."""
        height, width = x.shape[-2:]
        query = self.query(x).unflatten(1, (self.num_heads, -1))  # (R, h, d, H, W)
        keys = x[:, :, :: self.KEY_STRIDE, :: self.KEY_STRIDE]
        value = self.value(keys).unflatten(1, (self.num_heads, -1))  # (R, h, d, H', W')
        # The keys come first: torch's softmax over a short last axis takes several times longer.
        rows = self._axis_energy(query, self.position_y, "rndyx,yknd->krnyx", height).softmax(0)
        columns = self._axis_energy(query, self.position_x, "rndyx,xknd->krnyx", width).softmax(0)
        # softmax over (y', x') of a(y') + b(x') is softmax(a) softmax(b): (H', W', R, h, H, W).
        weights = rows.unsqueeze(1) * columns.unsqueeze(0)
        weights = weights.flatten(0, 1).flatten(-2).movedim(0, -2).to(value.dtype)
        attended = (value.flatten(-2) @ weights).unflatten(-1, (height, width))  # (R, h, d, H, W)
        return x + self.gamma * self.project(attended.flatten(1, 2))
