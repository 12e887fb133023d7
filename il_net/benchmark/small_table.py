"""Results of trainings that are repeated with several seeds: reading them, tables, curves.

A row is one model: a method, and of a semi-supervised one its student or its teacher. Values are
in percent; where they are over "counted" classes, those with more than one object in val are meant.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..figures import colours, figure

TASKS = {"bbox": "box", "segm": "mask"}
METRICS = ("AP", "AP50")
MODELS = ("student", "teacher")

# {"bbox/AP": ..., "bbox/AP50-leaf": ...}
Metrics = Mapping[str, float]
# Per seed; of one row.
BySeed = Mapping[int, Metrics]


def read_metrics(path: Path, steps: int) -> dict[str, dict[int, dict[str, float]]]:
    """Every evaluation of a run: model -> step -> metrics; the model is "" of a plain detector.

    Args:
        path: the run's ``metrics.json``, of Detectron2.
        steps: of the run (``SOLVER.MAX_ITER``).

    Raises:
        ValueError: there is no evaluation after the last step.
    """
    found: dict[str, dict[int, dict[str, float]]] = {}
    for line in _lines(path):
        step = min(line["iteration"] + 1, steps)
        for name, value in line.items():
            model, metric = "", name
            if name.startswith(MODELS):
                model, _, metric = name.partition("/")
            if metric.startswith(tuple(f"{task}/" for task in TASKS)):
                found.setdefault(model, {}).setdefault(step, {})[metric] = value
    missing = [model for model, by_step in found.items() if steps not in by_step]
    if missing or not found:
        raise ValueError(f"{path} has no evaluation after step {steps}, the run's last")
    return found


def seconds_per_step(path: Path) -> float:
    """The mean over a run of the times that ``metrics.json`` has, evaluations apart."""
    times = {line["iteration"]: line["time"] for line in _lines(path) if "time" in line}
    return statistics.fmean(times.values()) if times else math.nan


def _lines(path: Path) -> list[dict]:
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # cut off when the run was killed; the resumed one wrote it again
            continue
    return lines


def class_mean(metrics: Metrics, task: str, metric: str, classes: Sequence[str]) -> float:
    """The mean of a metric over some classes, NaN where one is missing."""
    values = [metrics.get(f"{task}/{metric}-{name}", math.nan) for name in classes]
    return statistics.fmean(values) if values else math.nan


def counted_metrics(metrics: Metrics, classes: Sequence[str]) -> dict[str, float]:
    """AP and AP50 of boxes and masks over some classes: {"bbox/AP": ..., "segm/AP50": ...}."""
    tasks = [task for task in TASKS if f"{task}/AP" in metrics]
    return {f"{t}/{m}": class_mean(metrics, t, m, classes) for t in tasks for m in METRICS}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample, n - 1); NaN for the latter of a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread


def paired_differences(row: BySeed, first: BySeed, metric: str) -> list[float]:
    """Row minus first, seed by seed; of the seeds that both have."""
    return [row[seed][metric] - first[seed][metric] for seed in sorted(row.keys() & first.keys())]


def _cell(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    return f"{mean:{sign}.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")


def value_table(
    rows: Mapping[str, BySeed], costs: Mapping[str, tuple[int, float]] | None = None
) -> list[str]:
    """Markdown: mean and spread of every metric over the seeds.

    Args:
        rows: metrics by row and seed; a row without a seed is written "not run".
        costs: by row its trainable parameters and seconds per step, for two more columns.
    """
    names = _metric_names(rows)
    header = ["", "seeds", *(["parameters", "s/step"] if costs is not None else [])]
    lines = []
    for title, row in rows.items():
        cells = [title, str(len(row)) if row else "not run"]
        if costs is not None:
            known = title in costs and row
            cells += [f"{costs[title][0]:,}", f"{costs[title][1]:.2f}"] if known else ["", ""]
        cells += [_cell([row[seed][name] for seed in row]) for name in names]
        lines.append(cells)
    return _table([*header, *map(_heading, names)], lines)


def difference_table(rows: Mapping[str, BySeed]) -> list[str]:
    """Markdown: mean and spread of the differences to the first row, seed by seed."""
    names = _metric_names(rows)
    (_, first), *others = rows.items()
    lines = []
    for title, row in others:
        shared = len(row.keys() & first.keys())
        cells = [_cell(paired_differences(row, first, name), "+") for name in names]
        lines.append([title, str(shared) if shared else "not run", *cells])
    return _table(["", "seeds", *map(_heading, names)], lines)


def class_table(rows: Mapping[str, BySeed], counts: Mapping[str, int]) -> list[str]:
    """Markdown: AP of every class, the mean over the seeds, "box / mask".

    Args:
        rows: metrics by row and seed, with those by class.
        counts: objects of each class in val.
    """
    lines = []
    for title, row in rows.items():
        tasks = _tasks(row)
        cells = []
        for name in counts:
            values = [[m.get(f"{t}/AP-{name}", math.nan) for m in row.values()] for t in tasks]
            cells.append(" / ".join(f"{statistics.fmean(v):.1f}" for v in values))
        lines.append([title, *cells])
    return _table(["", *(f"{name} ({count})" for name, count in counts.items())], lines)


def _tasks(row: BySeed) -> list[str]:
    return [task for task in TASKS if any(f"{task}/AP" in m for m in row.values())]


def _metric_names(rows: Mapping[str, BySeed]) -> list[str]:
    tasks = [task for task in TASKS if any(task in _tasks(row) for row in rows.values())]
    return [f"{task}/{metric}" for task in tasks for metric in METRICS]


def _heading(name: str) -> str:
    task, _, metric = name.partition("/")
    return f"{TASKS[task]} {metric}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def curve_figure(
    path: Path, title: str, rows: Mapping[str, Mapping[int, Sequence[Metrics]]]
) -> Figure:
    """AP over the training steps, of boxes and, where there are some, of masks.

    Args:
        path: the file.
        title: of the whole figure.
        rows: by row and step the metrics of every seed; the line is their mean.
    """
    points = [m for by_step in rows.values() for seeds in by_step.values() for m in seeds]
    tasks = [task for task in TASKS if any(f"{task}/AP" in m for m in points)]
    palette = colours(list(rows))
    with figure(path, 4.8 * len(tasks) + 1.6, 4.2) as drawn:
        panels = drawn.subplots(1, len(tasks), squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            for name, by_step in rows.items():
                steps = sorted(by_step)
                means = [statistics.fmean(m[f"{task}/AP"] for m in by_step[s]) for s in steps]
                axes.plot(steps, means, marker="o", color=palette[name], label=name)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("training step")
            axes.set_ylabel(f"{TASKS[task]} AP (%)")
            axes.grid(axis="y")
        panels[0].set_title(title)
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn
