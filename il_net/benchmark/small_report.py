"""The report of the small benchmark: tables and curves of the runs that are finished."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from .small_protocol import Method, Table, annotation_file, run_folder
from .small_runs import RESULT, all_classes, counted_classes, extra_settings, read_chosen
from .small_table import (
    MODELS,
    BySeed,
    class_table,
    counted_metrics,
    curve_figure,
    difference_table,
    value_table,
)
from .timing import machine_facts

REPORT = "report.md"


def write_report(folder: Path, tables: Sequence[Table], seeds: Sequence[int], threads: int) -> Path:
    """Write ``report.md`` and a picture of the curves of each table into the output folder.

    Args:
        folder: the output folder.
        tables, seeds: what is shown; runs without a result are written "not run".
        threads: that each training had.

    Returns:
        The report's path.
    """
    machine = machine_facts("cpu")
    lines = [
        "# Small benchmark",
        "",
        f"{machine['device']}, {threads} thread(s) a training, torch {machine['torch']}, "
        f"{machine['date']}. Seeds {', '.join(map(str, seeds))}; a seed has the same labelled "
        "images in the same order for every method of a table. Final models, not the best ones.",
        "",
        "Values are means over the seeds ± standard deviation (n - 1). Seconds per step are means "
        "over a run, burn-in included and evaluations apart, and depend on what else ran.",
        *_trial_lines(folder),
        *_chosen_lines(folder),
    ]
    for table in tables:
        lines += ["", *_table_lines(folder, table, seeds)]
    path = folder / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _trial_lines(folder: Path) -> list[str]:
    extra = extra_settings(folder)
    return ["", f"**A trial with {' '.join(extra)}: no benchmark.**"] if extra else []


def _chosen_lines(folder: Path) -> list[str]:
    chosen = read_chosen(folder)
    if not chosen:
        return []
    lines = ["", "## Chosen on a fifth of the training images", ""]
    lines += ["Final AP (mask, without masks box) of each method by candidate:", ""]
    for name, choice in chosen.items():
        tried = "; ".join(
            f"{label}: " + ", ".join(f"{judge} {ap:.1f}" for judge, ap in scores.items())
            for label, scores in choice["scores"].items()
        )
        lines.append(f"- {name}: **{choice['label']}** ({tried})")
    return lines


def _table_lines(folder: Path, table: Table, seeds: Sequence[int]) -> list[str]:
    val = annotation_file(table.dataset, "val")
    counts, counted = all_classes(val), list(counted_classes(val))
    rows: dict[str, dict[int, dict[str, float]]] = {}
    curves: dict[str, dict[int, list[dict[str, float]]]] = {}
    costs: dict[str, tuple[int, float]] = {}
    for method in table.methods:
        results = _results(folder, table, method, seeds)
        models = _models(results)
        for model in models:
            title = f"{method.title}, {model}" if len(models) > 1 else method.title
            rows[title], curves[title] = {}, {}
            for seed, result in results.items():
                by_step = result["curves"][model]
                rows[title][seed] = by_step[str(result["steps"])]
                for step, metrics in by_step.items():
                    point = counted_metrics(metrics, counted)
                    curves[title].setdefault(int(step), []).append(point)
            if results:
                seconds = statistics.fmean(r["seconds_per_step"] for r in results.values())
                costs[title] = (next(iter(results.values()))["parameters"], seconds)
    lines = [f"## {table.title}", ""]
    if not costs:
        return [*lines, "Not run."]
    own: dict[str, BySeed] = {
        title: {seed: counted_metrics(m, counted) for seed, m in row.items()}
        for title, row in rows.items()
    }
    left_out = [name for name in counts if name not in counted]
    if left_out:
        lines += [f"Over the classes with more than one object in val ({', '.join(counted)}):", ""]
    lines += value_table(own, costs)
    lines += ["", f"Differences to {next(iter(own))}, seed by seed:", "", *difference_table(own)]
    if left_out:
        lines += ["", f"Over all classes, {', '.join(left_out)} included, as COCO counts:", ""]
        lines += value_table(rows)
    lines += ["", "AP by class (objects in val):", "", *class_table(rows, counts)]
    picture = f"{table.name}.png"
    curve_figure(folder / picture, table.title, curves)
    return [*lines, "", f"![AP over the training steps]({picture})"]


def _results(folder: Path, table: Table, method: Method, seeds: Sequence[int]) -> dict[int, dict]:
    paths = {seed: folder / run_folder(table, method, seed) / RESULT for seed in seeds}
    return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.is_file()}


def _models(results: dict[int, dict]) -> list[str]:
    """Which models a method's results have; a method without any is one row all the same."""
    found = {model for result in results.values() for model in result["curves"]}
    return [model for model in ("", *MODELS) if model in found] or [""]
