"""Records of what a check of a dataset found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

NUM_OFFENDERS = 5


class Severity(IntEnum):
    """A note is worth knowing, training survives a warning, an error must stop a run."""

    NOTE = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True)
class Problem:
    """One kind of mistake: how often it occurs, its first cases, and what comes of it.

    Without cases it is a statement about the file as a whole.
    """

    kind: str
    count: int
    offenders: tuple[str, ...]
    severity: Severity
    consequence: str = ""

    @property
    def fatal(self) -> bool:
        """Whether it must stop a run."""
        return self.severity is Severity.ERROR

    def __str__(self) -> str:
        level = self.severity.name.lower()
        if not self.offenders:
            return f"{level}: {self.kind}"
        more = ", ..." if self.count > len(self.offenders) else ""
        consequence = f" ({self.consequence})" if self.consequence else ""
        named = ", ".join(self.offenders)
        return f"{level}: {self.count} {self.kind}{consequence}: {named}{more}"


@dataclass(frozen=True)
class Report:
    """What was found in one COCO file, or, without a `json_file`, in a folder of images.

    The counts are those of well-formed records.
    """

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
        return tuple(p for p in self.problems if p.severity is Severity.WARNING)

    def summary(self) -> str:
        """The whole report as text: one line of counts, then one line per kind of problem.

        The worst come first.
        """
        if not self.json_file:
            head = f"{self.image_root}: {self.num_images} images without labels"
            return "\n".join([head, *describe(self.problems)])
        head = (
            f"{self.json_file}: {self.num_images} images "
            f"({self.num_images_without_annotations} without annotations), "
            f"{self.num_annotations} annotations ({self.num_crowd} crowd), "
            f"{self.num_categories} categories, images in {self.image_root}"
        )
        return "\n".join([head, *describe(self.problems)])


def describe(problems: Sequence[Problem]) -> list[str]:
    """One indented line per kind of problem, the worst first."""
    return [f"  {p}" for p in sorted(problems, key=lambda p: -p.severity)]


class Findings:
    """Collects problems while one file is read."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(
        self,
        kind: str,
        offenders: Sequence[str],
        *,
        severity: Severity = Severity.ERROR,
        consequence: str = "",
    ) -> None:
        """Add one kind with all its cases; nothing is added when there is none."""
        if offenders:
            first = tuple(offenders[:NUM_OFFENDERS])
            self.problems.append(Problem(kind, len(offenders), first, severity, consequence))

    def state(self, kind: str) -> None:
        """Add a fatal fact about the file as a whole."""
        self.problems.append(Problem(kind, 1, (), Severity.ERROR))

    def raise_fatal(self, source: str) -> None:
        """Stop if anything is fatal.

        Args:
            source: what the problems are of, for the message.

        Raises:
            ValueError: names all fatal problems.
        """
        fatal = [str(p).removeprefix("error: ") for p in self.problems if p.fatal]
        if fatal:
            raise ValueError(f"{source}: {'; '.join(fatal)}")

    def add_rows(
        self,
        kind: str,
        rows: np.ndarray,
        name: Callable[[int], str],
        *,
        severity: Severity,
        consequence: str = "",
    ) -> None:
        """As `add`, from row numbers of which only the first few are turned into text."""
        if len(rows):
            first = tuple(name(int(row)) for row in rows[:NUM_OFFENDERS])
            self.problems.append(Problem(kind, len(rows), first, severity, consequence))
