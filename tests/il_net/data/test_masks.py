"""Masks as run lengths: random ones keep their pixels, broken ones are refused."""

import numpy as np
import pycocotools.mask as mask_util
import pytest

from il_net.data.masks import to_rle


def test_random_masks_keep_their_pixels():
    """pycocotools' encoding of masks of all densities, also from numbers and with text counts."""
    rng = np.random.default_rng(1)
    for density in (0, 0.001, 0.03, 0.5, 0.97, 1):
        for height, width in ((1, 1), (7, 13), (90, 300)):
            pixels = (rng.random((height, width)) < density).astype(np.uint8)
            rle = mask_util.encode(np.asfortranarray(pixels))
            flat = pixels.ravel(order="F")
            runs = np.diff([0, *np.flatnonzero(np.diff(flat)) + 1, flat.size]).tolist()
            runs = [0, *runs] if flat[0] else runs
            for counts in (rle["counts"], rle["counts"].decode(), runs):
                mask = to_rle({"size": [height, width], "counts": counts}, height, width)
                assert np.array_equal(mask_util.decode(mask), pixels)


def test_polygons():
    """Two separate squares of 4 x 4 and 3 x 3 pixels, one of them half outside the image."""
    squares = [[1, 1, 5, 1, 5, 5, 1, 5], [18.5, 2, 21.5, 2, 21.5, 5, 18.5, 5]]
    mask = to_rle(squares, 10, 20)
    assert mask_util.area(mask) == pytest.approx(16 + 1.5 * 3, abs=1.5)
    assert mask["size"] == [10, 20]


GOOD = mask_util.encode(np.asfortranarray(np.eye(10, 20, dtype=np.uint8)))["counts"].decode()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "no mask"),
        ([[1, 2, 3, 4]], "no list"),  # pycocotools takes it for a box
        ([[1, 2, 3, 4, 5, 6, 7]], "no list"),
        ([[1, 2, 3, float("nan"), 5, 6]], "no list"),
        ([[1, 2, 3, 4, 5, 1e9]], "no list"),
        ([[1, 2, 3, 4, 5, 10**400]], "no list"),
        ([["a", 2, 3, 4, 5, 6]], "no list"),
        ([[[1, 2], [3, 4], [5, 6]]], "no list"),
        ([7], "no list"),
        ("abc", "neither a list"),
        ({"counts": GOOD}, "neither a list"),
        ({"size": [20, 10], "counts": GOOD}, r"size \[20, 10\] .*, its image of \[10, 20\]"),
        ({"size": [10, 20], "counts": GOOD[:-4]}, "do not fill"),  # pycocotools never returns
        ({"size": [10, 20], "counts": GOOD + "1"}, "do not fill"),
        ({"size": [10, 20], "counts": ""}, "do not fill"),
        ({"size": [10, 20], "counts": "ü"}, "do not fill"),
        ({"size": [10, 20], "counts": "o" * 30 + "1"}, "do not fill"),
        ({"size": [10, 20], "counts": [100, 99]}, "do not fill"),
        ({"size": [10, 20], "counts": [300, -100]}, "do not fill"),
        ({"size": [10, 20], "counts": [100.5, 99.5]}, "do not fill"),
        ({"size": [10, 20], "counts": 200}, "do not fill"),
        ({"size": [10, 20], "counts": [5, float("inf"), 5]}, "do not fill"),
        ({"size": [10, 20], "counts": [2**62] * 4 + [200]}, "do not fill"),  # 200 in 64 bits
        ({"size": [10, 20], "counts": [10**400]}, "do not fill"),
        ({"size": [10, 20], "counts": [[100], [50, 50]]}, "do not fill"),
        ({"size": 200, "counts": GOOD}, "is of size 200"),
    ],
)
def test_malformed_masks(segmentation, message):
    with pytest.raises(ValueError, match=message):
        to_rle(segmentation, 10, 20)


def test_masks_of_more_pixels_than_pycocotools_counts():
    with pytest.raises(ValueError, match="too large"):
        to_rle({"size": [2**20, 2**20], "counts": [2**40]}, 2**20, 2**20)
