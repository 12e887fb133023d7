"""Records of what a check of a dataset found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_OFFENDERS = 5


@dataclass(frozen=True)
class Problem:
    """One kind of mistake: how often it occurs, its first cases, and what comes of it.

    Without cases it is a statement about the file as a whole.
    """

    kind: str
    count: int
    offenders: tuple[str, ...]
    fatal: bool
    consequence: str = ""

    def __str__(self) -> str:
        level = "error" if self.fatal else "warning"
        if not self.offenders:
            return f"{level}: {self.kind}"
        more = ", ..." if self.count > len(self.offenders) else ""
        consequence = f" ({self.consequence})" if self.consequence else ""
        named = ", ".join(self.offenders)
        return f"{level}: {self.count} {self.kind}{consequence}: {named}{more}"


@dataclass(frozen=True)
class Report:
    """What `validate_coco` found in one file; the counts are those of well-formed records."""

    json_file: str
    image_root: str
    num_images: int = 0
    num_annotations: int = 0
    num_categories: int = 0
    num_crowd: int = 0
    num_images_without_annotations: int = 0
    problems: tuple[Problem, ...] = ()

    @property
    def fatal(self) -> tuple[Problem, ...]:
        """Problems that must stop a run."""
        return tuple(p for p in self.problems if p.fatal)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Problems that training survives."""
        return tuple(p for p in self.problems if not p.fatal)

    def summary(self) -> str:
        """The whole report as text: one line of counts, then one line per kind of problem."""
        head = (
            f"{self.json_file}: {self.num_images} images "
            f"({self.num_images_without_annotations} without annotations), "
            f"{self.num_annotations} annotations ({self.num_crowd} crowd), "
            f"{self.num_categories} categories, images in {self.image_root}"
        )
        return "\n".join([head, *(f"  {p}" for p in (*self.fatal, *self.warnings))])


class Findings:
    """Collects problems while one file is read."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(
        self, kind: str, offenders: Sequence[str], *, fatal: bool = True, consequence: str = ""
    ) -> None:
        """Add one kind with all its cases; nothing is added when there is none."""
        if offenders:
            first = tuple(offenders[:NUM_OFFENDERS])
            self.problems.append(Problem(kind, len(offenders), first, fatal, consequence))

    def state(self, kind: str) -> None:
        """Add a fatal fact about the file as a whole."""
        self.problems.append(Problem(kind, 1, (), fatal=True))

    def add_rows(
        self,
        kind: str,
        rows: np.ndarray,
        name: Callable[[int], str],
        *,
        fatal: bool,
        consequence: str,
    ) -> None:
        """As `add`, from row numbers of which only the first few are turned into text."""
        if len(rows):
            first = tuple(name(int(row)) for row in rows[:NUM_OFFENDERS])
            self.problems.append(Problem(kind, len(rows), first, fatal, consequence))
