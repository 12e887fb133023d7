"""Disease severity: how much of a container (a leaf) its contents (the diseases) cover.

Not in the thesis, but in the authors' code (``leaves_test.py``), and what LDD (section 2.5) is for.
"""

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util

from ..data.masks import Rle
from .predictions import Labels, Objects


@dataclass(frozen=True)
class Group:
    """A container class and the classes of what it contains."""

    container: str
    contents: tuple[str, ...]


@dataclass(frozen=True)
class CoveredShare:
    """One content class in one image.

    Attributes:
        image_id, file_name, container, content: where, and of what.
        truth, predicted: share of the container's area from 0 to 1, by the labels and by the
            detections; None where the image shows them no container, and for a truth that is not
            known at all.
    """

    image_id: int | str
    file_name: str
    container: str
    content: str
    truth: float | None
    predicted: float | None

    @property
    def error(self) -> float | None:
        """Absolute difference of the two, None unless both are there."""
        if self.truth is None or self.predicted is None:
            return None
        return abs(self.truth - self.predicted)


@dataclass(frozen=True)
class ClassSummary:
    """One content class over all images; means are None where there is nothing to average.

    Attributes:
        container, content: of what.
        images: that the means are over: a container in truth and prediction (without truth: in the
            prediction).
        affected: how many of them have this content in the truth.
        truth, predicted, error: means over ``images``.
        affected_error: mean error over ``affected``, not diluted by healthy images.
        missed, made_up: images with a container in the truth only, and in the prediction only.
        without: images with no container in either.
    """

    container: str
    content: str
    images: int
    affected: int
    truth: float | None
    predicted: float | None
    error: float | None
    affected_error: float | None
    missed: int
    made_up: int
    without: int


def measure(
    groups: Sequence[Group], truth: Labels | None, predictions: Labels, *, min_score: float = 0.5
) -> list[CoveredShare]:
    """The severity of every content class in every image, image by image.

    It is the area of the union of the content's masks, as far as it lies in the union of the
    container's masks, divided by the area of that union; crowds are areas like any other. A content
    that is not there is 0. Differs from the authors' tool, which counts content outside the
    container as well: such a share may exceed 1.

    Args:
        groups: which class contains which.
        truth: with masks; None without truth.
        predictions: with masks; the images of the truth in its order.
        min_score: detections below it are left out.

    Raises:
        ValueError: a class that does not exist, a group that contains itself or is given twice, or
            a score out of its range.
    """
    if not 0 <= min_score <= 1:
        raise ValueError(f"the lowest score is from 0 to 1, got {min_score}")
    _check_groups(groups, predictions.classes)
    rows = []
    for position, image in enumerate(predictions.images):
        kept = image.objects.select(image.objects.scores >= min_score)
        labels = None if truth is None else truth.images[position].objects
        for group in groups:
            predicted = _shares(kept, group, predictions.classes)
            true = predicted.fromkeys(predicted)
            if labels is not None:
                true = _shares(labels, group, predictions.classes)
            rows += [
                CoveredShare(image.image_id, image.file_name, group.container, c, true[c], share)
                for c, share in predicted.items()
            ]
    return rows


def _check_groups(groups: Sequence[Group], classes: Sequence[str]) -> None:
    for group in groups:
        for name in (group.container, *group.contents):
            if name not in classes:
                close = difflib.get_close_matches(name, classes, n=1)
                hint = f" (did you mean '{close[0]}'?)" if close else ""
                raise ValueError(f"there is no class '{name}'{hint}; there are {list(classes)}")
        if group.container in group.contents:
            raise ValueError(f"'{group.container}' can't be a content of itself")
        if not group.contents or len(set(group.contents)) < len(group.contents):
            raise ValueError(
                f"'{group.container}' needs one or more different contents, got "
                f"{list(group.contents)}"
            )
    containers = [group.container for group in groups]
    if len(set(containers)) < len(containers):
        raise ValueError(f"a container is given twice: {containers}")


def _shares(objects: Objects, group: Group, classes: Sequence[str]) -> dict[str, float | None]:
    """Content -> share of the container's area, None without container."""
    container = _union(objects, classes.index(group.container))
    area = float(mask_util.area(container)) if container else 0.0
    if not area:
        return dict.fromkeys(group.contents)
    shares: dict[str, float | None] = {}
    for name in group.contents:
        content = _union(objects, classes.index(name))
        shares[name] = 0.0
        if content:
            inside = mask_util.merge([container, content], intersect=True)
            shares[name] = float(mask_util.area(inside)) / area
    return shares


def _union(objects: Objects, category: int) -> Rle | None:
    chosen = np.flatnonzero(objects.classes == category)
    return mask_util.merge([objects.shapes[i] for i in chosen]) if len(chosen) else None


def summarize(rows: Sequence[CoveredShare], *, with_truth: bool) -> list[ClassSummary]:
    """Means by container and content, in the order of their first rows.

    Args:
        rows: of :func:`measure`.
        with_truth: whether there was any.
    """
    by_class: dict[tuple[str, str], list[CoveredShare]] = {}
    for row in rows:
        by_class.setdefault((row.container, row.content), []).append(row)
    return [_summarize(*key, found, with_truth) for key, found in by_class.items()]


def _summarize(
    container: str, content: str, rows: Sequence[CoveredShare], with_truth: bool
) -> ClassSummary:
    used = [r for r in rows if r.predicted is not None and (r.truth is not None or not with_truth)]
    affected = [r for r in used if r.truth]
    return ClassSummary(
        container,
        content,
        len(used),
        len(affected),
        _mean([r.truth for r in used]),
        _mean([r.predicted for r in used]),
        _mean([r.error for r in used]),
        _mean([r.error for r in affected]),
        missed=sum(r.truth is not None and r.predicted is None for r in rows),
        made_up=sum(with_truth and r.truth is None and r.predicted is not None for r in rows),
        without=sum(r.truth is None and r.predicted is None for r in rows),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def write_severities(path: Path, rows: Sequence[CoveredShare]) -> None:
    """A CSV file with a line per image and content class; unknown shares are empty."""
    names = ("image_id", "file_name", "container", "content", "truth", "predicted", "error")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            writer.writerow([_cell(getattr(row, name)) for name in names])


def _cell(value: str | float | None) -> str | float | None:
    return round(value, 6) if isinstance(value, float) else value
