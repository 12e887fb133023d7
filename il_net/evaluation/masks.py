"""COCO segmentations as compressed run lengths (RLE), checked before pycocotools reads them.

Its C code counts on well-formed input: run lengths that do not fill the image make it loop without
end, and four numbers where a polygon should be are read as a box.
"""

from typing import Any

import numpy as np
import pycocotools.mask as mask_util

# {"size": [height, width], "counts": bytes}, what pycocotools computes with.
Rle = dict[str, Any]

# Beyond any picture; a polygon costs memory by its length, and NaN is not below it.
_FARTHEST_PX = 1e6
_MAX_CHARS = 12  # of one run length, 5 bits each


def to_rle(segmentation: Any, height: int, width: int) -> Rle:
    """One object's mask.

    Args:
        segmentation: a list of polygons [x, y, x, y, ...] in pixels, or run lengths with ``size``
            and ``counts``, compressed or a list of numbers.
        height, width: of the image.

    Raises:
        ValueError: there is no mask, or it is malformed or of another size; says what was found.
    """
    if not segmentation:
        raise ValueError("it has no mask (no 'segmentation')")
    if isinstance(segmentation, list):
        for polygon in segmentation:
            _check_polygon(polygon)
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if not isinstance(segmentation, dict) or {"size", "counts"} - segmentation.keys():
        raise ValueError("its 'segmentation' is neither a list of polygons nor run lengths")
    if segmentation["size"] not in ([height, width], (height, width)):
        raise ValueError(
            f"its mask is of size {segmentation['size']} (height, width), its image of "
            f"{[height, width]}"
        )
    counts = segmentation["counts"]
    if isinstance(counts, str):
        counts = counts.encode()
    runs = _decompress(counts) if isinstance(counts, bytes) else np.asarray(counts)
    if runs.ndim != 1 or runs.dtype.kind != "i" or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"its run lengths do not fill the {height} x {width} pixels of its image")
    if isinstance(counts, list):
        return mask_util.frPyObjects(segmentation, height, width)
    return {"size": [height, width], "counts": counts}


def _check_polygon(polygon: Any) -> None:
    """Three points or more, at finite places not too far away."""
    try:
        points = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if (
        points.ndim != 1
        or len(points) < 6
        or len(points) % 2
        or not (np.abs(points) < _FARTHEST_PX).all()
    ):
        raise ValueError(
            "a polygon of its 'segmentation' is no list [x, y, x, y, ...] of three or more points"
        )


def _decompress(counts: bytes) -> np.ndarray:
    """(runs,) int64 lengths behind COCO's compressed string; empty if it is none.

    Characters from 48 on carry 5 bits, low ones first, and a flag that more follow; from the fourth
    run on, the number is the difference to the last run but one.
    """
    chars = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(chars & 0x20 == 0)
    if not len(ends) or ends[-1] != len(chars) - 1 or chars.min() < 0 or chars.max() > 63:
        return np.empty(0, np.int64)
    lengths = np.diff(ends, prepend=-1)
    if lengths.max() > _MAX_CHARS:
        return np.empty(0, np.int64)
    starts = ends - lengths + 1
    place = np.arange(len(chars)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((chars & 0x1F) << (5 * place), starts)
    runs -= np.where(chars[ends] & 0x10, 1 << (5 * lengths), 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs
