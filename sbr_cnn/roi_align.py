"""RoIAlign as a weighted sum of pixel vectors, for training on the CPU.

torchvision's operator is single-threaded in its backward pass on the CPU, where it costs a sixth
of a training step and, with four levels per box (GRoIE, thesis section 2.1), more. The same
sums as an embedding bag over the pixels run on all cores, along the channels.

Shape shorthand: N images, R boxes, C channels, S the pooled side, P = S * samples per axis.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bag_roi_align(
    feature: Tensor,
    rois: Tensor,
    output_size: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """What ``torchvision.ops.roi_align`` gives, to fp32 rounding.

    Args:
        feature: (N, C, H, W) fp32.
        rois: (R, 5): index of the image, x1, y1, x2, y2 in the image's pixels; no gradient.
        output_size: S.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis, at least 1.
        aligned: shift by half a pixel; without it boxes are at least one feature pixel.

    Returns:
        (R, C, S, S).
    """
    images, channels, height, width = feature.shape
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    x1, y1, x2, y2 = corners.unbind(1)
    box_height, box_width = y2 - y1, x2 - x1
    if not aligned:
        box_height, box_width = box_height.clamp(min=1), box_width.clamp(min=1)
    rows, row_weights = _samples(y1, box_height, output_size, sampling_ratio, height)
    cols, col_weights = _samples(x1, box_width, output_size, sampling_ratio, width)
    rows = rows + (rois[:, 0].long() * height)[:, None, None]
    # Every row of a bin with every column of it: (R, S, 1, 2 n, 1) and (R, 1, S, 1, 2 n).
    pixels = rows[:, :, None, :, None] * width + cols[:, None, :, None, :]
    weights = row_weights[:, :, None, :, None] * col_weights[:, None, :, None, :]
    pooled = F.embedding_bag(
        pixels.flatten(3).flatten(0, 2),
        feature.permute(0, 2, 3, 1).reshape(images * height * width, channels),
        per_sample_weights=weights.flatten(3).flatten(0, 2),
        mode="sum",
    )
    return pooled.view(len(rois), output_size, output_size, channels).permute(0, 3, 1, 2)


def _samples(
    start: Tensor, extent: Tensor, bins: int, per_bin: int, size: int
) -> tuple[Tensor, Tensor]:
    """The two neighbours of every sample along one axis and how much each counts.

    Args:
        start, extent: (R,) of the boxes, in feature pixels.
        bins: S.
        per_bin: samples in a bin, evenly spaced.
        size: of the feature map along the axis.

    Returns:
        (R, S, 2 * per_bin) pixel indices and weights; the weights of a bin add up to 1, less
        what lies more than a pixel outside the map.
    """
    number = torch.arange(bins * per_bin, device=start.device)
    position = start[:, None] + (number + 0.5) * (extent[:, None] / (bins * per_bin))
    inside = (position >= -1) & (position <= size)
    position = position.clamp(min=0, max=size - 1)  # beyond the last pixel: that pixel
    low = position.floor()
    upper_share = position - low
    low = low.long()
    pixels = torch.stack([low, (low + 1).clamp(max=size - 1)], dim=2)
    weights = torch.stack([1 - upper_share, upper_share], dim=2) * inside[:, :, None] / per_bin
    return pixels.view(-1, bins, 2 * per_bin), weights.view(-1, bins, 2 * per_bin)
