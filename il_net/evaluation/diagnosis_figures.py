"""Pictures of a diagnosis; each says in its title what it shows.

Thesis Figs. 2.8, 2.9, 2.11 and 2.14.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures import colours, figure

_WIDTH, _HEIGHT = 10.0, 4.4
_LINE = 110  # letters side by side in a title
_TICKS = 80  # and in the names below the bars


def anchor_figure(path: Path, without_anchor: Sequence[float], objects: int) -> Figure:
    """Which share of the objects lacks anchors of each IoU."""
    with figure(path, _WIDTH, _HEIGHT) as drawn:
        axes = drawn.subplots()
        _iou_bars(axes, {"objects": without_anchor})
        axes.set_ylim(0, 105)
        axes.set_xlabel("IoU of anchor and object")
        axes.set_ylabel("objects without such an anchor (%)")
        axes.set_title(
            f"How many of {objects} objects have no anchor of a given IoU\n"
            "a high bar on the right: few examples from which to learn precise boxes"
        )
    return drawn


def proposal_figure(path: Path, when: str, loops: Sequence[Sequence[int]]) -> Figure:
    """The IoU distribution of the boxes that enter each loop.

    Args:
        path: the file.
        when: which boxes these are, for the title.
        loops: for each loop counts per bin of IoU.
    """
    shares = [np.array(counts) / max(sum(counts), 1) for counts in loops]
    names = ["loop 1: proposals"]
    names += [f"loop {n}: refined {n - 1} x" for n in range(2, len(loops) + 1)]
    what, whole = "Boxes that enter each loop", "the loop's boxes"
    if len(loops) == 1:
        names, what, whole = ["proposals"], "Proposals", "the proposals"
    with figure(path, _WIDTH, _HEIGHT) as drawn:
        left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
        # Nearly all proposals overlap nothing well; from 0.5 on they can be positives.
        upper = [share[len(share) // 2 :] for share in shares]
        _iou_bars(left, dict(zip(names, upper, strict=True)), 0.5)
        left.set_xlabel("highest IoU with an object")
        left.set_ylabel(f"share of {whole} (%)")
        left.set_title(f"{what} {when}, by IoU from 0.5 on")
        _legend_below(left)
        # With 20 bins the last six are 0.7 and more.
        high = [100 * share[-(6 * len(share) // 20) :].sum() for share in shares]
        bars = right.barh(names, high, color=list(colours(names).values()))
        right.bar_label(bars, [f"{value:.1f} %" for value in high], padding=3)
        right.set_ylim(max(len(names), 3) - 0.5, -0.5)  # a single bar stays a bar
        right.set_xlim(0, max(1.25 * max(high), 1))
        right.set_xlabel(f"share of {whole} (%)")
        right.set_title("With an IoU of 0.7 or more")
    return drawn


def metric_figure(
    path: Path, title: str, label: str, rows: Mapping[str, Mapping[str, float]]
) -> Figure:
    """AP of boxes (and masks) over something.

    Args:
        path: the file.
        title: what the figure shows.
        label: what the groups are.
        rows: group to {"bbox": AP, "segm": AP}; NaN where there is none.
    """
    names = {"bbox": "boxes", "segm": "masks"}
    tasks = [task for task in names if any(task in row for row in rows.values())]
    palette = colours([names[task] for task in tasks])
    with figure(path, _WIDTH, _HEIGHT) as drawn:
        axes = drawn.subplots()
        width = 0.8 / max(len(tasks), 1)
        for i, task in enumerate(tasks):
            values = [row.get(task, float("nan")) for row in rows.values()]
            places = np.arange(len(rows)) + (i - (len(tasks) - 1) / 2) * width
            bars = axes.bar(places, np.nan_to_num(values), width, color=palette[names[task]])
            bars.set_label(names[task])
            texts = ["–" if np.isnan(v) else f"{v:.1f}" for v in values]
            axes.bar_label(bars, texts, padding=2, fontsize=10 if len(rows) < 9 else 8)
        room = _TICKS // max(len(rows), 1)
        axes.set_xticks(range(len(rows)), [_wrap(name, room) for name in rows])
        axes.set_ylim(0, max(axes.get_ylim()[1], 1))  # also without a number
        axes.set_xlabel(label)
        axes.set_ylabel("AP (%)")
        axes.set_title(_wrap(title, _LINE))
        axes.grid(axis="y")
        if tasks:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


def pseudo_figure(path: Path, lines: Sequence[Mapping]) -> Figure:
    """Precision and recall of pseudo labels over training, and the last ones by their IoU.

    Args:
        path: the file.
        lines: of a run's ``pseudo_quality.json``, at least one.
    """
    steps = [line["iteration"] for line in lines]
    views = {"pseudo": "precision", "truth": "recall"}
    palette = colours(["precision: pseudo boxes that are right", "recall: objects that are found"])
    with figure(path, _WIDTH, _HEIGHT) as drawn:
        left, right = drawn.subplots(1, 2)
        for (view, metric), (name, colour) in zip(views.items(), palette.items(), strict=True):
            values = [line[view][metric] for line in lines]
            percent = [float("nan") if v is None else 100 * v for v in values]
            left.plot(steps, percent, marker="o", color=colour, label=name)
        left.set_ylim(0, 105)
        left.set_xlabel("training step")
        left.set_ylabel("IoU of 0.5 or more, same class (%)")
        left.set_title("Quality of the teacher's pseudo labels")
        left.grid(axis="y")
        _legend_below(left)
        last = lines[-1]
        groups = {
            "pseudo boxes by their IoU with an object": last["pseudo"]["iou_histogram"],
            "objects by their IoU with a pseudo box": last["truth"]["iou_histogram"],
        }
        _iou_bars(right, {n: np.array(h) / max(sum(h), 1) for n, h in groups.items()})
        right.set_xlabel("highest IoU")
        right.set_ylabel("share (%)")
        right.set_title(f"How they overlap with the objects after {steps[-1]} steps")
        _legend_below(right)
    return drawn


def _iou_bars(axes: Axes, groups: Mapping[str, Sequence[float]], start: float = 0.0) -> None:
    """Bars side by side in equal bins from ``start`` to 1; values are shares."""
    palette = colours(list(groups))
    for i, (name, shares) in enumerate(groups.items()):
        step = (1 - start) / len(shares)
        width = 0.9 * step / len(groups)
        edges = start + step * np.arange(len(shares)) + 0.05 * step + i * width
        bars = axes.bar(edges, 100 * np.asarray(shares), width, align="edge", color=palette[name])
        bars.set_label(name)
    axes.set_xlim(start, 1)
    axes.grid(axis="y")


def _legend_below(axes: Axes) -> None:
    """Where it hides nothing; short names three a line, long ones below each other."""
    longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
    columns = 3 if longest < 25 else 1
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=columns,
        columnspacing=1,
        handlelength=1.2,
    )


def _wrap(text: str, length: int) -> str:
    """Lines of at most `length` characters; those of the text stay apart."""
    return "\n".join(textwrap.fill(line, max(length, 1)) for line in text.splitlines())
