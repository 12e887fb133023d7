"""Pictures of the tables of `statistics`: bars of one colour for every split.

Thesis Figures 2.20-2.22 and 2.28-2.30. Every function writes one picture and returns it.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures import colours, figure, shorten
from .statistics import Table

MOST_CATEGORIES = 100
MOST_BARS = 40
TAIL = 0.01  # at most this share of a split's images is left to the last bar of a long tail
_NAME_LENGTH = 40
_WIDTH = 10.0
_GROUP = 0.8  # of the space of a row, for the bars of all splits
# Points of space along the axis that a number beside a bar needs, lying and standing.
_LYING, _STANDING = 15, 8
_LETTERS = 110  # below the axis
_NUMBER = {"fontsize": 7, "padding": 2}


def category_figure(path: Path, table: Table) -> Figure:
    """Shares of the classes, the most frequent first; of more than 100 classes the first 100."""
    order = np.argsort(-table.shares.sum(axis=1), kind="stable")
    shown = order[:MOST_CATEGORIES]
    title = "Instances per category"
    if len(shown) < len(order):
        rest = table.counts[order[MOST_CATEGORIES:]].sum() / max(1, table.counts.sum())
        title += (
            f"\nthe {len(shown)} most frequent of {len(order)}; the others have {rest:.1%} "
            "of the instances"
        )
    splits, few = len(table.splits), len(shown) * len(table.splits) <= MOST_BARS
    space = 0.12 + 0.16 * splits if few else max(0.2, 0.07 * splits)  # inches for a row
    with figure(path, _WIDTH, 1.2 + space * max(len(shown), 3)) as drawn:
        axes = drawn.subplots()
        shares = 100 * table.shares[shown]
        for i, (offset, name, colour) in enumerate(_bars(table)):
            bars = axes.barh(
                np.arange(len(shown)) + offset, shares[:, i], _GROUP / splits, color=colour
            )
            bars.set_label(name)
            if few:
                numbers = zip(table.counts[shown, i], shares[:, i], strict=True)
                axes.bar_label(bars, [f"{n} ({share:.1f} %)" for n, share in numbers], **_NUMBER)
        names = [shorten(table.rows[i], _NAME_LENGTH) for i in shown]
        axes.set_yticks(range(len(shown)), names, fontsize=10 if few else 8)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.margins(x=0.12 if few else 0.02)
        axes.set_xlabel("share of the split's instances (%)")
        axes.set_title(title)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower right")
    return drawn


def count_figure(path: Path, title: str, table: Table) -> Figure:
    """Shares of the images by an exact count; a long tail is drawn as one bar, the title says so.

    Args:
        path: the file.
        title: what is counted.
        table: rows 0, 1, 2, ...
    """
    short, note = shorten_tail(table)
    with figure(path, _WIDTH, 4.2) as drawn:
        axes = drawn.subplots()
        _upright(axes, short, "share of the split's images (%)")
        axes.set_xlabel(table.label)
        axes.set_title(f"{title}\n{note}" if note else title)
        axes.legend(loc="upper right")
    return drawn


def size_figure(path: Path, tables: Mapping[str, Table]) -> Figure:
    """Shares of the instances by size, one panel for every group of classes.

    Args:
        path: the file.
        tables: of the same bins, under the titles of the panels.
    """
    with figure(path, _WIDTH, 0.6 + 3.2 * len(tables)) as drawn:
        panels = drawn.subplots(len(tables), squeeze=False)[:, 0]
        for axes, (title, table) in zip(panels, tables.items(), strict=True):
            _upright(axes, table, "share of the instances (%)")
            axes.set_title(title)
            axes.legend(loc="upper right")
        panels[-1].set_xlabel("area of the box / area of the image, upper edge of the bin")
    return drawn


def shorten_tail(table: Table) -> tuple[Table, str]:
    """A table of exact counts with at most 42 rows, and a note on what was put together.

    Images above what 99 % of each split's images have are put in the last row; if the others still
    span more than 40 counts, several make a row. 0 stays by itself.

    Args:
        table: rows 0, 1, 2, ...

    Returns:
        the same table and "" where the counts end at 40 or before.
    """
    highest = len(table.rows) - 1
    if highest <= MOST_BARS:
        return table, ""
    covered = np.cumsum(table.shares, axis=0) >= 1 - TAIL
    common = int(np.argmax(covered | (table.counts.sum(axis=0) == 0), axis=0).max())
    step = max(1, ceil(common / MOST_BARS))
    starts = list(range(1, common + 1, step))
    rows = ["0", *(f"{i}–{i + step - 1}" if step > 1 else str(i) for i in starts)]
    rest = 1 + step * len(starts)  # the first count of the tail
    starts = [0, *starts]
    if rest <= highest:
        rows.append(f"{rest}+")
        starts.append(rest)
    counts = np.add.reduceat(table.counts, starts, axis=0)
    note = [f"bars span {step} counts"] if step > 1 else []
    if rest <= highest:
        tail = f"{rest} to {highest}" if rest < highest else str(rest)
        images = counts[-1].sum()
        note.append(f"the last bar: {images} of {counts.sum()} images, with {tail}")
    return Table(table.label, table.unit, tuple(rows), table.splits, counts), "; ".join(note)


def _upright(axes: Axes, table: Table, ylabel: str) -> None:
    """Bars of the shares of every row, with numbers where there is room."""
    rows, splits = len(table.rows), len(table.splits)
    points = 72 * 0.9 * _WIDTH * _GROUP / max(rows * splits, 8)  # along the axis, for a bar
    for i, (offset, name, colour) in enumerate(_bars(table)):
        shares = 100 * table.shares[:, i]
        bars = axes.bar(np.arange(rows) + offset, shares, _GROUP / splits, color=colour)
        bars.set_label(name)
        if points >= _STANDING:
            numbers = [f"{share:.1f}" if share >= 0.05 else "" for share in shares]
            axes.bar_label(bars, numbers, rotation=0 if points >= _LYING else 90, **_NUMBER)
    longest = max(map(len, table.rows))
    axes.set_xticks(
        range(rows), table.rows, fontsize=8, rotation=90 if longest * rows > _LETTERS else 0
    )
    # A bar that is alone keeps the width that it has among eight.
    axes.set_xlim(-0.6, max(rows, 8 / splits) - 0.4)
    axes.margins(y=0.14)  # for the numbers
    axes.set_ylabel(ylabel)
    axes.grid(axis="y")
    axes.tick_params(axis="x", length=0)


def _bars(table: Table) -> Sequence[tuple[float, str, str]]:
    """Place within a row, legend and colour of every split."""
    thickness = _GROUP / len(table.splits)
    bars = []
    for i, (name, colour) in enumerate(colours(table.splits).items()):
        legend = f"{shorten(name, _NAME_LENGTH)} ({table.counts[:, i].sum()} {table.unit})"
        bars.append(((i + 0.5) * thickness - _GROUP / 2, legend, colour))
    return bars
