"""COCO segmentations as compressed run lengths (RLE), checked before pycocotools reads them.

Its C code counts on well-formed input: run lengths that do not fill the image make it loop without
end, and four numbers where a polygon should be are read as a box.
"""

from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from .coco_values import is_polygon, is_side

# {"size": [height, width], "counts": bytes}, what pycocotools computes with.
Rle = dict[str, Any]

_MAX_CHARS = 12  # of one run length, 5 bits each
_MAX_PIXELS = 2**32 - 1  # of a mask: pycocotools counts in 32 bits


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
        if not all(is_polygon(p) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation):
            raise ValueError(
                "a polygon of its 'segmentation' is no list [x, y, x, y, ...] of three or more "
                "points"
            )
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if not isinstance(segmentation, dict) or {"size", "counts"} - segmentation.keys():
        raise ValueError("its 'segmentation' is neither a list of polygons nor run lengths")
    if segmentation["size"] not in ([height, width], (height, width)):
        raise ValueError(
            f"its mask is of size {segmentation['size']} (height, width), its image of "
            f"{[height, width]}"
        )
    counts, pixels = segmentation["counts"], height * width
    if pixels > _MAX_PIXELS:
        raise ValueError(f"its mask of {height} x {width} pixels is too large")
    if isinstance(counts, str):
        counts = counts.encode(errors="replace")
    if isinstance(counts, bytes):
        runs = _decompress(counts)
    else:
        whole = isinstance(counts, list) and {int}.issuperset(map(type, counts))
        # In between: a sum of larger numbers could wrap around to the right one.
        sound = whole and all(0 <= count <= pixels for count in counts)
        runs = np.array(counts if sound else [], dtype=np.int64)
    if (runs < 0).any() or (runs > pixels).any() or runs.sum() != pixels:
        raise ValueError(f"its run lengths do not fill the {height} x {width} pixels of its image")
    if isinstance(counts, list):
        return mask_util.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": counts}


def read_rle(rle: dict) -> Rle | None:
    """A mask of run lengths in the size that it names itself, if it is one."""
    size = rle.get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(map(is_side, size))):
        return None
    try:
        return to_rle(rle, *map(int, size))
    except ValueError:
        return None


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
