"""What every kind of Label Studio export is read into, and the account of what was changed.

Coordinates are fractions of the picture's width and height: Label Studio stores percent, which
stays right when the picture is turned upright or resized.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...data.report import Findings, Problem, Severity
from ..polygons import rectangle_corners

# A shape may reach out of its picture, but further than this its numbers are no fractions.
_LARGEST_FRACTION = 100.0


@dataclass(frozen=True)
class Choices:
    """What to take from an export.

    Args:
        annotations: of several for one picture, "best" takes the ground truth, else the latest;
            "all" takes the regions of all.
        several_labels: of a region with several, "first" or "each", as an object of its own.
        label_from: names of the controls whose labels count; empty: all controls that label
            shapes.
        ignore_labels: regions with these labels are left out.
        image_key: the field of a task that names the picture; empty: "image", or the only one that
            looks like a picture.
        table: class ids by name, which then must have every label; None numbers the labels
            alphabetically.
        first_id: where that starts; None is 1, but keeps the ids of a COCO export.
    """

    annotations: str = "best"
    several_labels: str = "first"
    label_from: tuple[str, ...] = ()
    ignore_labels: tuple[str, ...] = ()
    image_key: str = ""
    table: Mapping[str, int] | None = None
    first_id: int | None = None

    def wanted_labels(self, region: "Region") -> tuple[str, ...]:
        """The labels of a region that are not to be ignored."""
        return tuple(name for name in region.labels if name not in self.ignore_labels)

    def labels_of(self, region: "Region") -> tuple[str, ...]:
        """The labels of a region that are to become objects."""
        wanted = self.wanted_labels(region)
        return wanted if self.several_labels == "each" else wanted[:1]


@dataclass(frozen=True)
class Region:
    """One labelled shape, as outlines or as a rectangle.

    Args:
        name: for reports.
        labels: in the order they were given.
        rings: (P, 2) each, in fractions of width and height.
        rectangle: x, y, width, height in fractions, degrees clockwise about (x, y).
    """

    name: str
    labels: tuple[str, ...]
    rings: tuple[np.ndarray, ...] = ()
    rectangle: tuple[float, float, float, float, float] | None = None

    @property
    def is_upright(self) -> bool:
        """Whether it is a rectangle that a box describes wholly."""
        return self.rectangle is not None and self.rectangle[4] % 90 == 0

    def outline(self, width: int, height: int) -> tuple[np.ndarray, ...]:
        """Its rings in pixels of a picture of that size."""
        if self.rectangle is None:
            return tuple(ring * (width, height) for ring in self.rings)
        x, y, w, h, degrees = self.rectangle
        return (rectangle_corners(x * width, y * height, w * width, h * height, degrees),)


@dataclass(frozen=True)
class LabeledPicture:
    """One person's work on one picture.

    Args:
        task: id of the task, None if the export has none that lasts.
        references: how the export names the picture, in the order to try.
        regions: shapes; none means that there is nothing to label.
        size: width and height of the picture according to the export.
        rank: the largest is the best of one picture.
        lost: whether there were regions that could not be read.
    """

    task: Any
    references: tuple[str, ...]
    regions: tuple[Region, ...]
    size: tuple[float, float] | None
    rank: tuple
    lost: bool = False


@dataclass
class Account:
    """Collects, by kind, what was mended or dropped, and counts what is only worth knowing."""

    cases: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    notes: Counter = field(default_factory=Counter)
    num_changes: int = 0

    def change(self, kind: str, consequence: str, case: str) -> None:
        """A case that loses or alters something; `--strict` refuses it."""
        self.cases.setdefault((kind, consequence), []).append(case)
        self.num_changes += 1

    def note(self, kind: str, count: int = 1) -> None:
        """Cases in which a rule of the conversion was followed and nothing is lost."""
        self.notes[kind] += count

    def problems(self, severity: Severity) -> list[Problem]:
        """One record for each kind of change, in the order in which they were met."""
        findings = Findings()
        for (kind, consequence), cases in self.cases.items():
            findings.add(kind, cases, severity=severity, consequence=consequence)
        return findings.problems


def fractions(values: Any, scale: Sequence[float]) -> np.ndarray | None:
    """Pairs of numbers from JSON as (P, 2) fractions of `scale`; None if they are no such pairs."""
    if not isinstance(values, list) or not scale[0] or not scale[1]:
        return None
    for pair in values:
        if not isinstance(pair, list) or len(pair) != 2:
            return None
        for value, full in zip(pair, scale, strict=True):
            # `not <=`: NaN compares false; an int too large for a float still compares.
            if type(value) not in (int, float) or not abs(value) <= _LARGEST_FRACTION * full:
                return None
    return np.array(values, dtype=np.float64).reshape(-1, 2) / scale


def quoted(text: Any) -> str:
    """Text from an export in one line of a report: no control characters, not endless."""
    if isinstance(text, str) and text.startswith("data:"):
        return "a data URL"
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:37]}...{shown[-40:]}"
