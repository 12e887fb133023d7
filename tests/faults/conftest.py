"""Faults that are injected into real runs, and the account of them at the end."""

from collections.abc import Callable

import pytest

# Command lines on a small data set, as in the end-to-end tests.
from tests.e2e.conftest import config, datasets, elsewhere, run  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(__file__.removesuffix("conftest.py")):
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def injected(record_property: Callable) -> Callable[[int], None]:
    """``injected(20)``: so many faults were injected; they are survived if the test passes."""
    return lambda number: record_property("faults", number)


def pytest_terminal_summary(terminalreporter) -> None:
    """The last line of the suite: faults injected, survived, data lost."""
    counts = {"passed": 0, "failed": 0}
    for outcome in counts:
        for report in terminalreporter.stats.get(outcome, ()):
            if report.when == "call":
                counts[outcome] += sum(n for name, n in report.user_properties if name == "faults")
    if total := sum(counts.values()):
        survived = counts["passed"]
        terminalreporter.write_line(
            f"faults injected: {total}, survived: {survived}, data lost: {total - survived}"
        )
