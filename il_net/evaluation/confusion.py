"""Confusion matrix of detections: which class is taken for which, what is missed or made up.

Thesis Fig. 2.25. Rows are the truth, columns the prediction, the last of each is the background.

Shape shorthand: P detections and T true objects of one image, K classes.
"""

import numpy as np
import pycocotools.mask as mask_util

from .predictions import Labels, Objects

MATCHINGS = ("thesis", "one-to-one")


def confusion_matrix(
    truth: Labels,
    predictions: Labels,
    *,
    min_score: float = 0.3,
    min_iou: float = 0.5,
    matching: str = "thesis",
) -> np.ndarray:
    """Counts over all images.

    ``thesis`` (of the authors' tool): every true object that a detection overlaps counts for it in
    [its class, detected class], so one may count several times; a detection that overlaps none
    counts in [background, detected class], and a true object that no detection of its own class
    overlaps in [its class, background], also where one of another class did.

    ``one-to-one``: every detection and every true object counts once. Within each class, detections
    take true objects as in COCO's evaluation: by falling score, each the free one with the highest
    IoU; so the diagonal holds COCO's true positives at this score and IoU. Detections left over
    take true objects left over of other classes in the same way; the rest is background.

    Crowds (``iscrowd``) are no true objects. A detection that matches no true object (one-to-one:
    of its class) and lies in a crowd of its class counts nowhere, as in COCO's evaluation; the
    share of its area there is to be ``min_iou``.

    Args:
        truth: the images' true objects.
        predictions: detections in the same images in the same order, as
            :func:`.predictions.read_predictions` returns them; of K classes.
        min_score: detections below it are left out.
        min_iou: overlaps from here on count, in (0, 1].
        matching: one of ``MATCHINGS``.

    Returns:
        (K + 1, K + 1) int64.

    Raises:
        ValueError: a threshold out of its range or an unknown matching.
    """
    if not 0 <= min_score <= 1:
        raise ValueError(f"the lowest score is from 0 to 1, got {min_score}")
    if not 0 < min_iou <= 1:
        raise ValueError(f"the lowest IoU is above 0 and up to 1, got {min_iou}")
    if matching not in MATCHINGS:
        raise ValueError(f"the matching is one of {', '.join(MATCHINGS)}, got {matching!r}")
    rule = _count_overlaps if matching == "thesis" else _count_pairs
    counts = np.zeros((len(predictions.classes) + 1,) * 2, dtype=np.int64)
    for true, detected in zip(truth.images, predictions.images, strict=True):
        kept = detected.objects.select(detected.objects.scores >= min_score)
        # COCO's own tolerance: equal masks may have an IoU of slightly less than 1.
        rule(counts, true.objects, kept, min(min_iou, 1 - 1e-10))
    return counts


def row_shares(counts: np.ndarray) -> np.ndarray:
    """Each row divided by its sum, (K + 1, K + 1) float64; an empty row stays 0."""
    sums = counts.sum(axis=1, keepdims=True)
    return counts / np.maximum(sums, 1)


def _count_overlaps(counts: np.ndarray, truth: Objects, detected: Objects, min_iou: float) -> None:
    """Add one image to ``counts`` by the thesis' rule."""
    ious, in_crowd, classes = _overlaps(truth, detected, min_iou)
    hits = ious > 0
    which, true = np.nonzero(hits)
    np.add.at(counts, (classes[true], detected.classes[which]), 1)
    alone = ~hits.any(axis=1) & ~in_crowd
    np.add.at(counts, (-1, detected.classes[alone]), 1)
    found = (hits & (detected.classes[:, None] == classes)).any(axis=0)
    np.add.at(counts, (classes[~found], -1), 1)


def _count_pairs(counts: np.ndarray, truth: Objects, detected: Objects, min_iou: float) -> None:
    """Add one image to ``counts``, every object once."""
    ious, in_crowd, classes = _overlaps(truth, detected, min_iou)
    order = np.argsort(-detected.scores, kind="stable")
    taken = _take(np.where(detected.classes[:, None] == classes, ious, 0), order)
    left = (taken < 0) & ~in_crowd
    free = np.ones(len(classes), dtype=bool)
    free[taken[taken >= 0]] = False
    others = _take(np.where(left[:, None] & free, ious, 0), order)
    taken = np.where(left, others, taken)
    paired = taken >= 0
    np.add.at(counts, (classes[taken[paired]], detected.classes[paired]), 1)
    np.add.at(counts, (-1, detected.classes[left & ~paired]), 1)
    free[taken[paired]] = False
    np.add.at(counts, (classes[free], -1), 1)


def _overlaps(
    truth: Objects, detected: Objects, min_iou: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Overlaps with the true objects and with crowds.

    Returns:
        (P, T) IoU, 0 where it is below ``min_iou``; (P,) bool, whether a detection lies in a crowd
        of its class; (T,) classes of the true objects, without crowds.
    """
    # With a crowd, pycocotools divides by the detection's area; without objects, it returns [].
    ious = mask_util.iou(detected.shapes, truth.shapes, truth.crowd.astype(np.uint8))
    ious = np.asarray(ious, dtype=np.float64).reshape(len(detected.classes), len(truth.classes))
    ious = np.where(ious >= min_iou, ious, 0)  # also without the NaN of two empty boxes
    same = detected.classes[:, None] == truth.classes
    in_crowd = ((ious > 0) & same & truth.crowd).any(axis=1)
    return ious[:, ~truth.crowd], in_crowd, truth.classes[~truth.crowd]


def _take(ious: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(P,) the true object that each detection takes, in this order; -1 for none.

    Args:
        ious: (P, T), 0 for pairs that must not be.
    """
    ious = ious.copy()
    taken = np.full(len(ious), -1)
    for i in order[ious.any(axis=1)[order]]:
        best = ious[i].argmax()
        if ious[i, best] > 0:
            taken[i] = best
            ious[:, best] = 0
    return taken
