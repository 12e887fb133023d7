"""What measured models are relative to the first of them, and all of it as Markdown tables."""

import statistics

from .semisup_timing import PHASES
from .workload import SEMISUP

TITLES = {"inference": "inference", "train": "training step", SEMISUP: "semi-supervised step"}


def compare(results: list[dict]) -> list[dict]:
    """Add to each result what is relative to the first one.

    Args:
        results: per model ``parameters`` and for every mode measured ``times`` (seconds, one per
            round) and ``peak_bytes`` (or None).

    Returns:
        Copies with ``parameters_ratio``, and for every mode ``median``, ``min`` and ``max`` of the
        times, ``ratio`` (of the medians), ``ratio_min`` and ``ratio_max`` (of the ratios round by
        round), ``peak_ratio`` (or None).
    """
    first, compared = results[0], []
    for result in results:
        row = {**result, "parameters_ratio": result["parameters"] / first["parameters"]}
        for mode in (m for m in TITLES if m in result):
            times, base = result[mode]["times"], first[mode]["times"]
            rounds = [time / other for time, other in zip(times, base, strict=True)]
            peak = result[mode]["peak_bytes"]
            row[mode] = {
                **result[mode],
                "median": statistics.median(times),
                "min": min(times),
                "max": max(times),
                "ratio": statistics.median(times) / statistics.median(base),
                "ratio_min": min(rounds),
                "ratio_max": max(rounds),
                "peak_ratio": peak / first[mode]["peak_bytes"] if peak else None,
            }
        compared.append(row)
    return compared


def render(report: dict) -> str:
    """The report as Markdown: machine, numbers with ratios, and what the heads were given."""
    machine, settings, rows = report["machine"], report["settings"], report["configs"]
    modes = [mode for mode in TITLES if mode in rows[0]]
    height, width = settings["size"]
    lines = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{settings['dtype']}, {height} x {width} pixels, pictures per training step: "
        f"{settings['images']}, rounds: {settings['repeat']}, {machine['date']}",
        "",
    ]
    header, saw = ["configuration", "trainable parameters", "ratio"], ["configuration"]
    for mode in modes:
        header += [f"{TITLES[mode]}, ms", "ratio", "peak memory, MiB", "ratio"]
        saw += [f"boxes in {TITLES[mode]}"]
    lines += _table(header, [_numbers(row, modes) for row in rows])
    lines += ["", *_table(saw, [[row["label"], *(_seen(row[m]) for m in modes)] for row in rows])]
    if SEMISUP in modes:
        lines += ["", *_phase_table(rows)]
    return "\n".join(lines)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def _numbers(row: dict, modes: list[str]) -> list[str]:
    cells = [row["label"], f"{row['parameters']:,}", f"{row['parameters_ratio']:.2f}"]
    for m in (row[mode] for mode in modes):
        cells += [
            f"{m['median'] * 1e3:.1f} ({m['min'] * 1e3:.1f}-{m['max'] * 1e3:.1f})",
            f"{m['ratio']:.2f} ({m['ratio_min']:.2f}-{m['ratio_max']:.2f})",
            f"{m['peak_bytes'] / 2**20:,.0f}" if m["peak_bytes"] else "not measured",
            f"{m['peak_ratio']:.2f}" if m["peak_ratio"] else "",
        ]
    return cells


def _seen(measured: dict) -> str:
    counts = "; ".join(f"{name} {' '.join(map(str, n))}" for name, n in measured["seen"].items())
    return "; ".join([counts, *(f"**{text}**" for text in measured["differs"])])


def _phase_table(rows: list[dict]) -> list[str]:
    """A line per phase; per configuration its median ms, share of the step and ratio."""
    header = ["phase"]
    for row in rows:
        header += [f"{row['label']}, ms", "share", "ratio"]
    columns = [_phase_medians(row[SEMISUP]) for row in rows]
    lines = []
    for name in columns[0]:
        cells = [name]
        for column in columns:
            seconds = column[name]
            share, ratio = seconds / column["step"], seconds / columns[0][name]
            cells += [f"{seconds * 1e3:.1f}", f"{share:.1%}", f"{ratio:.2f}"]
        lines.append(cells)
    return _table(header, lines)


def _phase_medians(measured: dict) -> dict[str, float]:
    times, phases = measured["times"], measured["phases"]
    medians = {name: statistics.median(round_[name] for round_ in phases) for name in PHASES}
    rest = [time - round_["data"] for time, round_ in zip(times, phases, strict=True)]
    medians["step without data"] = statistics.median(rest)
    medians["step"] = statistics.median(times)
    return medians
