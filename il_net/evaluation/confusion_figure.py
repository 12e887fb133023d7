"""The picture of a confusion matrix, thesis Fig. 2.25, for a few classes or many."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from ..figures import COLOURS, figure, shorten
from .confusion import row_shares

BACKGROUND = "background"

# One hue from white, so that prints and any colour vision keep the order.
_COLOURMAP = LinearSegmentedColormap.from_list("shares", ["#ffffff", COLOURS[0], "#002b4a"])
_EMPTY_COLOUR = "#e8e8e8"
_MAX_NAME = 30
_MATRIX_INCHES = 20.0  # at most; 150 dots each
_CELL_INCHES = 0.6  # at most
_TITLE_INCHES = 6.0  # wide enough for a line of it
_POINTS_PER_INCH = 72
_LARGEST_FONT, _SMALLEST_FONT = 10.0, 5.0  # points


def draw_confusion(path: Path, counts: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Write the shares of each row in whole percent as a picture.

    Numbers are left out below half a percent, and where the cells are too small for any. A row
    without entries (a class without truth) is grey and says so. Differs from the thesis' figure:
    percents are rounded, not cut off.

    Args:
        path: the file; its ending decides on the format.
        counts: (K + 1, K + 1) of :func:`.confusion.confusion_matrix`.
        classes: K names.
        title: text above; may be of several lines.
    """
    size = len(classes) + 1
    cell = min(_CELL_INCHES, _MATRIX_INCHES / size)
    names = [shorten(name, _MAX_NAME) for name in (*classes, BACKGROUND)]
    label_font = min(_LARGEST_FONT, cell * _POINTS_PER_INCH * 0.75)
    # Three digits fill three quarters of a cell; letters are about 0.6 times as wide as high.
    font = min(_LARGEST_FONT, cell * _POINTS_PER_INCH * 0.4)
    margin = 0.8 + max(map(len, names)) * label_font * 0.6 / _POINTS_PER_INCH
    side = size * cell + margin
    shares = row_shares(counts)
    with figure(path, max(side + 0.6, _TITLE_INCHES), side + 0.4) as drawn:
        drawn.suptitle(title, x=0.02, ha="left", fontsize=_LARGEST_FONT + 1)
        axes = drawn.add_subplot()
        image = axes.imshow(shares, cmap=_COLOURMAP, vmin=0, vmax=1)
        _label(axes, names, counts, label_font)
        _mark_empty(axes, counts, label_font)
        if font >= _SMALLEST_FONT:
            _write_numbers(axes, shares, font)
        else:
            bar = drawn.colorbar(image, ax=axes, shrink=0.5, format=lambda v, _: f"{v:.0%}")
            bar.set_label("share of the row")
        # One pass alone misjudges the room for slanted names below square cells.
        drawn.get_layout_engine().execute(drawn)


def _label(axes: Axes, names: Sequence[str], counts: np.ndarray, font: float) -> None:
    """Class names, and lines between the cells, a heavier one before the background."""
    size = len(names)
    totals = counts.sum(axis=1)
    rows = [f"{name} ({total})" for name, total in zip(names, totals, strict=True)]
    ticks = range(size)
    axes.set_yticks(ticks, rows, fontsize=font)
    axes.set_xticks(
        ticks, names, fontsize=font, rotation=45, ha="right", rotation_mode="anchor"
    )  # fmt: skip
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth (entries of the row)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for lines in (axes.hlines, axes.vlines):
        edges = np.arange(size + 1) - 0.5
        lines(edges, -0.5, size - 0.5, color="#dddddd", linewidth=0.5)
        lines(size - 1.5, -0.5, size - 0.5, color="#555555", linewidth=1.2, zorder=2.7)


def _mark_empty(axes: Axes, counts: np.ndarray, font: float) -> None:
    size = len(counts)
    for row in np.flatnonzero(counts.sum(axis=1) == 0):
        axes.axhspan(row - 0.5, row + 0.5, color=_EMPTY_COLOUR, zorder=2.6)
        text = "no truth" if row < size - 1 else "no false detection"
        axes.text(
            *((size - 1) / 2, row, text),
            ha="center", va="center", fontsize=font, color="#555555", zorder=3,
        )  # fmt: skip


def _write_numbers(axes: Axes, shares: np.ndarray, font: float) -> None:
    for row, column in np.argwhere(shares >= 0.005):
        share = shares[row, column]
        axes.text(
            *(column, row, f"{math.floor(share * 100 + 0.5)}"),
            ha="center", va="center", fontsize=font, zorder=3, in_layout=False,
            color="white" if share > 0.4 else "black",
        )  # fmt: skip
