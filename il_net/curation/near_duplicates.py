"""Pictures that look alike, found by a perceptual hash: recompressed, resized, a little brighter.

The hash keeps the signs of a picture's coarse waves: which of the lowest frequencies of its cosine
transform are above their median (the idea is known as pHash). Tried on photos of blood cells and of
leaves on plain ground: JPEG at quality 30 or a third of the size moved at most 4 of the 143 bits;
two photos of one field of view differ in 10, all others among 292 and among 380 in 20 and more.

N and M pictures.
"""

import cv2
import numpy as np

SIDE = 64  # pixels that the transform sees, along either side
_WAVES = 12  # along either side, of which the first, the mean, says nothing
NUM_BITS = _WAVES**2 - 1
MAX_DIFFERENT_BITS = 12
_BLOCK = (256, 8192)  # pairs at once: 8 MB, which fits a processor's cache


def perceptual_hash(gray: np.ndarray) -> np.ndarray | None:
    """Hash of a picture.

    Args:
        gray: (H, W) uint8; `SIDE` pixels along either side say all that the hash can use.

    Returns:
        (143,) bool; None for a picture without content, which would look like any other such.
    """
    small = cv2.resize(gray, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < 1:
        return None
    waves = cv2.dct(small)[:_WAVES, :_WAVES].ravel()[1:]
    return waves > np.median(waves)


def find_twins(
    hashes: np.ndarray, others: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """For each picture the one of the other set that looks most like it.

    All are compared with all, as a product of matrices: 80,000 with 20,000 take about 5 s of one
    core, whatever they show. (Buckets by parts of the hash overflow where pictures resemble each
    other, as photos of one kind of thing do: they took longer, and must miss some pairs.)

    Args:
        hashes: (N, 143) bool.
        others: (M, 143) bool; None compares each with those before it.

    Returns:
        (N,) int64: the row of `others`, the first of the nearest; -1 where all differ in more than
        `MAX_DIFFERENT_BITS` bits. (N,) int64: in how many bits it differs.
    """
    among_themselves = others is None
    if others is None:
        others = hashes
    # A product of signs counts the bits that agree less those that differ.
    signs, other_signs = (np.where(bits, 1, -1).astype(np.float32) for bits in (hashes, others))
    twins = np.full(len(signs), -1, dtype=np.int64)
    agreement = np.full(len(signs), NUM_BITS - 2 * MAX_DIFFERENT_BITS - 1, dtype=np.float32)
    for start in range(0, len(signs), _BLOCK[0]):
        rows = slice(start, start + _BLOCK[0])
        last = min(rows.stop, len(signs)) if among_themselves else len(other_signs)
        for other in range(0, last, _BLOCK[1]):
            found = signs[rows] @ other_signs[other : min(other + _BLOCK[1], last)].T
            if among_themselves:
                # Not itself, and each pair once: only with pictures before the row's own.
                later = found[:, max(start - other, 0) :]
                later[np.tri(*later.shape, min(start - other, 0) - 1) == 0] = -NUM_BITS
            nearer = start + np.flatnonzero(found.max(axis=1) > agreement[rows])
            agreement[nearer] = found[nearer - start].max(axis=1)
            twins[nearer] = other + found[nearer - start].argmax(axis=1)
    return twins, ((NUM_BITS - agreement) / 2).astype(np.int64)
