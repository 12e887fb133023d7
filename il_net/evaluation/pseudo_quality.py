"""How good pseudo labels are, where the true labels of the "unlabelled" images are known.

Thesis section 2.4.3, Fig. 2.14. The thesis counts by true box, where an object that was missed
looks like a bad pseudo box; here are both views, by pseudo box and by true box.

Shape shorthand: P pseudo boxes and T true boxes of one image, N boxes of one view, K classes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

BINS = 10
# A pseudo box of the right class with at least this IoU has found its object.
FOUND_IOU = 0.5
# The upper ends of all bins but the last; written out, as multiples of 0.1 would not be exact.
_EDGES = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])


@dataclass(frozen=True)
class Match:
    """Boxes of one image compared with the others.

    Attributes:
        classes: (N,) int64, their own.
        iou: (N,) highest IoU with any of the others, 0 without others.
        wrong_class: (N,) bool, whether that best one is of another class. Where several overlap
            alike, one of the right class is the best; what overlaps nothing has no best one.
        found: (N,) bool, whether one of the same class has an IoU of ``FOUND_IOU`` or more.
    """

    classes: Tensor
    iou: Tensor
    wrong_class: Tensor
    found: Tensor


def match(
    boxes: Tensor, classes: Tensor, other_boxes: Tensor, other_classes: Tensor
) -> tuple[Match, Match]:
    """Compare two sets of boxes of one image, each with the other.

    Args:
        boxes, other_boxes: (P, 4) and (T, 4), x1, y1, x2, y2 in one frame.
        classes, other_classes: (P,) and (T,) int64.

    Returns:
        The P boxes matched with the T, and the T with the P. One box may serve several.
    """
    ious = pairwise_iou(Boxes(boxes), Boxes(other_boxes))
    same = classes[:, None] == other_classes[None, :]
    return _best(ious, same, classes), _best(ious.T, same.T, other_classes)


def _best(ious: Tensor, same: Tensor, classes: Tensor) -> Match:
    if not ious.shape[1]:  # nothing to take the maximum of
        ious, same = ious.new_zeros(len(ious), 1), same.new_zeros(len(same), 1)
    iou = ious.amax(dim=1)
    right = ((ious == iou[:, None]) & same).any(dim=1)
    found = ((ious >= FOUND_IOU) & same).any(dim=1)
    return Match(classes, iou, ~right & (iou > 0), found)


class View:
    """Sums of the ``Match`` of many images.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.wrong_class = torch.zeros(BINS, dtype=torch.int64)
        self.no_overlap = 0
        self.count = torch.zeros(num_classes, dtype=torch.int64)
        self.found = torch.zeros(num_classes, dtype=torch.int64)

    def add(self, matched: Match) -> None:
        """Count the boxes of one image, on the CPU."""
        bins = torch.bucketize(matched.iou, _EDGES, right=True)
        self.histogram += torch.bincount(bins, minlength=BINS)
        self.wrong_class += torch.bincount(bins[matched.wrong_class], minlength=BINS)
        self.no_overlap += int((matched.iou == 0).sum())
        self.count += torch.bincount(matched.classes, minlength=len(self.count))
        found = matched.classes[matched.found]
        self.found += torch.bincount(found, minlength=len(self.found))

    def summary(self, share: str) -> dict:
        """Numbers as plain Python; see :meth:`PseudoQuality.summary`."""
        overlapping = self.histogram.clone()
        overlapping[0] -= self.no_overlap
        return {
            "boxes": int(self.count.sum()),
            share: _share(int(self.found.sum()), int(self.count.sum())),
            "iou_histogram": self.histogram.tolist(),
            "no_overlap": self.no_overlap,
            "wrong_class": self.wrong_class.tolist(),
            "wrong_class_share": _shares(self.wrong_class, overlapping),
            "class_boxes": self.count.tolist(),
            f"class_{share}": _shares(self.found, self.count),
        }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _shares(parts: Tensor, wholes: Tensor) -> list[float | None]:
    return [_share(p, w) for p, w in zip(parts.tolist(), wholes.tolist(), strict=True)]


class PseudoQuality:
    """Compares pseudo labels with true ones, image by image.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self.images = 0
        self._pseudo, self._truth = View(num_classes), View(num_classes)

    def add(self, pseudo: Instances, truth: Instances) -> None:
        """Count one image.

        Args:
            pseudo, truth: ``gt_boxes`` and ``gt_classes`` in the frame of the same image, on any
                device; without crowds.

        Raises:
            ValueError: the two are of images of different sizes.
        """
        if pseudo.image_size != truth.image_size:
            raise ValueError(
                f"Pseudo labels of an image of {pseudo.image_size} can't be compared with true "
                f"ones of {truth.image_size}"
            )
        by_pseudo, by_truth = match(
            pseudo.gt_boxes.tensor.float().cpu(),
            pseudo.gt_classes.cpu(),
            truth.gt_boxes.tensor.float().cpu(),
            truth.gt_classes.cpu(),
        )
        self.images += 1
        self._pseudo.add(by_pseudo)
        self._truth.add(by_truth)

    def summary(self) -> dict:
        """All images so far.

        Returns:
            ``images``; ``pseudo`` by pseudo box with ``precision``, and ``truth`` by true box with
            ``recall``: the share that has one of the same class with an IoU of 0.5 or more. Both
            hold ``boxes``, ``iou_histogram``: how many have their highest IoU in each tenth, a
            bound belonging to the bin above it; ``no_overlap``: how many of the first bin overlap
            nothing; ``wrong_class``: how many of each bin have their highest IoU with another
            class, and ``wrong_class_share``: of those that overlap something; and by class
            ``class_boxes`` and ``class_precision`` or ``class_recall``. None is a share of
            nothing.
        """
        return {
            "images": self.images,
            "pseudo": self._pseudo.summary("precision"),
            "truth": self._truth.summary("recall"),
        }


def append_summary(
    path: Path, iteration: int, quality: PseudoQuality, classes: Sequence[str]
) -> None:
    """Add one line of JSON to a file, so that it shows how pseudo labels change in training.

    Args:
        path: the file; made with its folder where it is not there.
        iteration: steps done.
        quality: the comparisons since the last line.
        classes: names of the K classes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {"iteration": iteration, **quality.summary(), "classes": list(classes)}
    with path.open("a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
