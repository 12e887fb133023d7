"""Grid R-CNN's grid branch: from pooled features to one heat map per grid point.

Host of rows 3 and 4 of thesis Table 2.5 (section 2.1); Grid R-CNN (arXiv 1811.12030) in the form
of the thesis' code.

Shape shorthand: R boxes of all images, C channels, P = 9 grid points, D features per point, S the
pooled side (14), M = 2S the side of a heat map (28).
"""

import math

import torch
from detectron2.layers import Conv2d
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn
from torch.nn import functional as F

from .grid_targets import NUM_POINTS, neighbors

NORM_GROUPS = 4 * NUM_POINTS  # four per grid point: 36


class NeighborFusion(nn.Module):
    """What every grid point hears from its neighbours: the sum of their transformed features.

    Each of the 24 directed pairs of neighbours has its own 5x5 depth-wise and 1x1 convolution.
    All pairs run as one grouped convolution each.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        heard = [neighbors(point) for point in range(NUM_POINTS)]
        self.counts = [len(points) for points in heard]
        self.sources = [source for points in heard for source in points]
        num_pairs = len(self.sources)
        channels = num_pairs * width
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, groups=num_pairs)
        for conv in (self.depthwise, self.pointwise):
            # Kaiming-normal, fan-out, of one pair; c2_msra_fill would count all pairs' outputs.
            fan_out = width * conv.weight[0, 0].numel()
            nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
            nn.init.zeros_(conv.bias)

    def forward(self, points: Tensor) -> Tensor:
        """(R, P, D, H, W) to the same shape."""
        pairs = self.depthwise(points[:, self.sources].flatten(1, 2))
        pairs = self.pointwise(pairs).unflatten(1, (len(self.sources), -1))
        return torch.stack([p.sum(dim=1) for p in pairs.split(self.counts, dim=1)], dim=1)


class GridHead(nn.Module):
    """Heat maps of the grid points from pooled features, one map per point for all classes.

    Convolutions with GroupNorm, the first with stride 2, give D features to each point. Two
    rounds add what neighbours tell: f' = f + T1(f), then f'' = f + T2(f'). Two grouped
    deconvolutions make the heat maps, in training also those of f (unfused) by the same layers.

    Decisions, as the published code where the paper leaves it open: the second round adds to f, not
    to f'; no activation between or after the two convolutions of a pair; fused and unfused heat
    maps count alike in the loss.

    Args:
        channels: of the pooled features.
        resolution: S, even.
        num_conv: convolutions, at least 1.
        point_dim: D, a multiple of 4 (GroupNorm has four groups per point).

    Raises:
        ValueError: one of the numbers does not fit.
    """

    def __init__(
        self, *, channels: int, resolution: int, num_conv: int = 8, point_dim: int = 64
    ) -> None:
        super().__init__()
        if resolution < 2 or resolution % 2:
            raise ValueError(
                f"MODEL.ROI_GRID_HEAD.POOLER_RESOLUTION is even and positive, got {resolution}"
            )
        if point_dim < 4 or point_dim % 4:
            raise ValueError(
                f"MODEL.ROI_GRID_HEAD.POINT_DIM is a positive multiple of 4, got {point_dim}"
            )
        if num_conv < 1:
            raise ValueError(f"MODEL.ROI_GRID_HEAD.NUM_CONV is at least 1, got {num_conv}")
        self.heat_map_side = 2 * resolution
        width = NUM_POINTS * point_dim
        convs = [
            Conv2d(
                channels if i == 0 else width,
                width,
                3,
                stride=2 if i == 0 else 1,
                padding=1,
                norm=nn.GroupNorm(NORM_GROUPS, width),
                activation=F.relu,
            )
            for i in range(num_conv)
        ]
        for conv in convs:
            c2_msra_fill(conv)
        self.convs = nn.Sequential(*convs)
        self.first_order = NeighborFusion(point_dim)
        self.second_order = NeighborFusion(point_dim)
        self.deconv = nn.ConvTranspose2d(width, width, 4, 2, padding=1, groups=NUM_POINTS)
        self.deconv_norm = nn.GroupNorm(NUM_POINTS, width)
        self.predictor = nn.ConvTranspose2d(width, NUM_POINTS, 4, 2, padding=1, groups=NUM_POINTS)
        for deconv in (self.deconv, self.predictor):
            nn.init.normal_(deconv.weight, std=0.001)
            nn.init.zeros_(deconv.bias)
        # Every cell starts with a probability of 0.01: nearly all are negative.
        nn.init.constant_(self.predictor.bias, -math.log(99))

    def point_features(self, x: Tensor) -> Tensor:
        """Pooled features (R, C, S, S) to f: (R, P, D, S/2, S/2)."""
        return self.convs(x).unflatten(1, (NUM_POINTS, -1))

    def fuse(self, points: Tensor) -> Tensor:
        """f to f'': (R, P, D, S/2, S/2)."""
        return points + self.second_order(points + self.first_order(points))

    def heat_maps(self, points: Tensor) -> Tensor:
        """f or f'' to logits (R, P, M, M)."""
        return self.predictor(F.relu(self.deconv_norm(self.deconv(points.flatten(1, 2)))))

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features (R, C, S, S) to fused logits (R, P, M, M)."""
        return self.heat_maps(self.fuse(self.point_features(x)))

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Sum of the fused and the unfused heat maps' losses, not yet weighted.

        Args:
            x: (R, C, S, S).
            targets: (R, P, M, M) of zeros and ones.
        """
        points = self.point_features(x)
        return sum(grid_loss(self.heat_maps(p), targets) for p in (self.fuse(points), points))


def grid_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy over all cells of all heat maps, in float32.

    Args:
        logits: (R, P, M, M).
        targets: the same shape, zeros and ones.

    Returns:
        A scalar; zero and still connected to the graph when R is 0.
    """
    if len(logits) == 0:
        return logits.float().sum() * 0.0
    return F.binary_cross_entropy_with_logits(logits.float(), targets)
