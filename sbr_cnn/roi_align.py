"""RoIAlign as a weighted sum of pixel vectors, for the CPU.

torchvision's operator gathers the numbers of every channel one by one, and its backward pass is
single-threaded. The same sums as an embedding bag over the pixels run along the channels, on all
cores, in about a third of the time or less (docs/benchmarks.md).

Shape shorthand: N images, R boxes, C channels, S the pooled side, n samples of a bin along an axis.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

# Terms of all the sums: 12 bytes each until the backward pass, 52 at its peak (0.4 GiB). With more
# torchvision's operator, which stores none.
MAX_TERMS = 2**23


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
        feature: (N, C, H, W) fp32; fastest where the channels are innermost in memory.
        rois: (R, 5): index of the image, x1, y1, x2, y2 in the image's pixels; get no gradient.
        output_size: S.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: n; 0: as many as the bin has pixels, rounded up.
        aligned: shift by half a pixel; without it boxes are at least one feature pixel.

    Returns:
        (R, C, S, S), its channels innermost in memory.
    """
    images, channels, height, width = feature.shape
    rois = rois.detach()
    start, end = (rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)).split(2, dim=1)
    extent = end - start if aligned else (end - start).clamp(min=1)
    if sampling_ratio > 0:
        per_bin = torch.full_like(extent, sampling_ratio)
    else:
        per_bin = (extent / output_size).ceil().clamp(min=0)
    terms = (2 * output_size * per_bin).prod(dim=1).sum().item()
    if not 0 < terms <= MAX_TERMS:
        return roi_align(feature, rois, output_size, spatial_scale, sampling_ratio, aligned)
    # Boxes with the same n along x and y together.
    kinds, kind_of_box = per_bin.unique(dim=0, return_inverse=True)
    order = kind_of_box.argsort(stable=True)
    counts = kind_of_box.bincount().tolist()
    pixels, weights, lengths = [], [], []
    for index, (per_col, per_row) in zip(order.split(counts), kinds.int().tolist(), strict=True):
        (x, y), (box_width, box_height) = start[index].unbind(1), extent[index].unbind(1)
        rows, row_weights = _samples(y, box_height, output_size, per_row, height)
        cols, col_weights = _samples(x, box_width, output_size, per_col, width)
        rows = rows + (rois[index, 0].long() * height)[:, None, None]
        # Every row of a bin with every column of it: (R, S, 1, 2 n, 1) and (R, 1, S, 1, 2 n).
        pixels.append((rows[:, :, None, :, None] * width + cols[:, None, :, None, :]).flatten())
        weights.append(
            (row_weights[:, :, None, :, None] * col_weights[:, None, :, None, :]).flatten()
        )
        lengths.append(start.new_full((len(index) * output_size**2,), 4 * per_row * per_col))
    offsets = torch.cat(lengths).long().cumsum(0)
    pooled = F.embedding_bag(
        torch.cat(pixels),
        # Not `reshape` alone: with one image it gives a view whose vectors lie scattered.
        feature.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(0, 2),
        F.pad(offsets, (1, 0)),
        per_sample_weights=torch.cat(weights),
        mode="sum",
        include_last_offset=True,
    )
    pooled = pooled.view(len(rois), output_size, output_size, channels)
    if len(kinds) > 1:
        pooled = pooled[order.argsort()]
    return pooled.permute(0, 3, 1, 2)


def _samples(
    start: Tensor, extent: Tensor, bins: int, per_bin: int, size: int
) -> tuple[Tensor, Tensor]:
    """The two neighbours of every sample along one axis and how much each counts.

    Args:
        start, extent: (R,) of the boxes, in feature pixels.
        bins: S.
        per_bin: n, evenly spaced.
        size: of the feature map along the axis.

    Returns:
        (R, S, 2 n) pixel indices and weights; the weights of a bin add up to 1, less what lies
        more than a pixel outside the map.
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
    shape = (len(start), bins, 2 * per_bin)
    return pixels.view(shape), weights.view(shape)
