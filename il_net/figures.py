"""The look of all figures: one style, one colour for a class wherever it appears."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart; black is for text.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
DPI = 150
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    # Names of classes and files are shown as they are: a "$" starts no formula.
    "text.parse_math": False,
}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, written to `path` at the end.

    It has no window and touches no global state of matplotlib.

    Args:
        path: the file, its ending decides on the format; its folder is made.
        width, height: inches.
    """
    with mpl.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name by its place in the list; from the ninth on they repeat."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def shorten(text: str, length: int) -> str:
    """The text on one line of at most `length` characters, the end replaced by an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
