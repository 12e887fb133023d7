"""Finished runs beside the thesis' figures, as Markdown, for tools/reproduce.py.

A run is a folder with thesis_row.json, which names its row, and what train_net.py wrote there:
config.yaml, metrics.json and inference/<dataset>/results.json; of a semi-supervised run the
teacher's, teacher/inference/<dataset>/results.json.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from count_parameters import count_trainable
from detectron2.config import CfgNode
from tabulate import tabulate
from thesis_tables import ParameterCounter, Row, find_row

from il_net.config import load_config
from il_net.modeling.teacher_student import TeacherStudentRCNN
from sbr_cnn import add_sbr_cnn_config

ROW_FILE = "thesis_row.json"
HEADERS = (
    "row",
    "method",
    "box AP, thesis",
    "box AP",
    "mask AP, thesis",
    "mask AP",
    "parameters, thesis",
    "parameters",
    "tested on",
    "iterations",
    "remarks",
)
# Of tables that print the AP of single classes, below the others.
CLASS_HEADERS = ("row", "method", "of", "class", "AP, thesis", "AP", "tested on")
# Keys in which a run may differ from its row and still be one of it: where and how it is computed.
_FREE_KEYS = {
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.CLASSES",
    "MODEL.DEVICE",
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "OUTPUT_DIR",
    "SEED",
    "SEMISUP.EVAL",
    "SEMISUP.MERGED_FORWARD",
    "SEMISUP.PSEUDO.COMPARE_WITH_TRUTH",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    "VIS_PERIOD",
}
# Differences that are shown with their values, and first.
_FIRST_KEYS = (
    "SOLVER.MAX_ITER",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.IMS_PER_BATCH_UNLABELED",
    "DATASETS.TRAIN",
    "DATASETS.SPLIT.PERCENT",
    "DATASETS.TEST",
)
_OTHER_KEYS_SHOWN = 4
# The published list of labelled images has to be fetched, so no row names it.
_SPLIT_FILE = "DATASETS.SPLIT.FILE"


@dataclass(frozen=True)
class Run:
    """What a run's folder says.

    Attributes:
        row: id of the row.
        cfg: its configuration, None if it never began.
        iterations: how many it has trained, None if it has not trained in this folder.
        results: {dataset: {"bbox": {"AP": ...}, "segm": ...}}, empty before an evaluation.
    """

    row: str
    cfg: CfgNode | None
    iterations: int | None
    results: dict[str, dict]


def report(rows: dict[str, Row], selected: list[Row], folders: list[Path]) -> str:
    """Markdown tables of the ``selected`` rows; what was not run says so.

    Rows with the same settings in several tables share their runs. Rows without figures to
    reproduce (single layers) are left out.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a folder holds no run, or a run names no row.
    """
    runs = [read_run(path) for folder in folders for path in find_runs(folder)]
    by_setup: dict[tuple, list[Run]] = {}
    for run in runs:
        by_setup.setdefault(find_row(rows, run.row).setup, []).append(run)
    counter, text = ParameterCounter(), []
    for table in dict.fromkeys(row.table for row in selected if not row.module):
        lines, of_classes = [], []
        members = [row for row in selected if row.table == table]
        for row in members:
            for run in by_setup.get(row.setup, [None]):
                lines += run_lines(row, run, counter)
                of_classes += class_lines(row, run)
        text.append(f"### {members[0].heading}\n\n{_markdown(lines, HEADERS)}\n")
        if of_classes:
            text.append(f"{_markdown(of_classes, CLASS_HEADERS)}\n")
    return "\n".join(text)


def _markdown(lines: list[tuple[str, ...]], headers: tuple[str, ...]) -> str:
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def find_runs(folder: Path) -> list[Path]:
    """The runs' folders: ``folder`` itself, or those in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    found = sorted(path.parent for path in folder.rglob(ROW_FILE))
    if not found:
        raise ValueError(
            f"{folder} holds no run of a row (no {ROW_FILE}); `reproduce.py run ROW` makes one"
        )
    return found


def read_run(folder: Path) -> Run:
    """Read a run's folder."""
    config, metrics = folder / "config.yaml", folder / "metrics.json"
    iterations = None
    if metrics.exists():
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        trained = [record["iteration"] + 1 for record in records if "total_loss" in record]
        iterations = max(trained, default=None)
    cfg = load_config(str(config), [], add_sbr_cnn_config) if config.exists() else None
    # The thesis' figures are the teacher's.
    tested = folder / "teacher" if cfg is not None and is_semi_supervised(cfg) else folder
    return Run(
        row=json.loads((folder / ROW_FILE).read_text())["row"],
        cfg=cfg,
        iterations=iterations,
        results={
            path.parent.name: json.loads(path.read_text())
            for path in sorted(tested.glob("inference/*/results.json"))
        },
    )


def is_semi_supervised(cfg: CfgNode) -> bool:
    """Whether a teacher labels images for a student."""
    return TeacherStudentRCNN.__name__ == cfg.MODEL.META_ARCHITECTURE


def run_lines(row: Row, run: Run | None, counter: ParameterCounter) -> list[tuple[str, ...]]:
    """Lines of the table for one run, one for each dataset it was tested on."""
    box, mask = row.printed_ap("box"), row.printed_ap("mask")
    params = row.thesis.get("params", "")
    if run is None or run.cfg is None:
        state = "not run" if not row.external else "another project's model"
        return [
            (row.id, row.title, box, state, mask, state if mask else "", params, "", "", "", "")
        ]
    wanted = row.resolve([])
    count = f"{count_trainable(counter.build(run.cfg)):,}"
    iterations = "none here"
    if run.iterations is not None:
        iterations = f"{run.iterations:,} of {wanted.SOLVER.MAX_ITER:,}"
    remarks = "; ".join(remarks_on(row, run, wanted))
    return [
        (
            row.id,
            row.title,
            box,
            _ap(result, "bbox", row.decimals),
            mask,
            _ap(result, "segm", row.decimals),
            params,
            count,
            dataset,
            iterations,
            remarks,
        )
        for dataset, result in (run.results or {"": {}}).items()
    ]


def class_lines(row: Row, run: Run | None) -> list[tuple[str, ...]]:
    """Lines for the classes whose AP the thesis prints, again one for each dataset."""
    results = run.results if run is not None and run.results else {"": None}
    return [
        (
            row.id,
            row.title,
            task,
            name.removeprefix("AP-"),
            f"{ap:.{row.decimals}f}",
            "not tested" if result is None else _ap(result, metric, row.decimals, name),
            dataset,
        )
        for task, metric in (("box", "bbox"), ("mask", "segm"))
        for dataset, result in results.items()
        for name, ap in row.thesis.get(task, {}).items()
        if name.startswith("AP-")
    ]


def _ap(result: dict, task: str, decimals: int, name: str = "AP") -> str:
    if name not in result.get(task, {}):
        return ""
    ap = result[task][name]  # null where nothing was detected
    return "none" if ap is None else f"{ap:.{decimals}f}"


def remarks_on(row: Row, run: Run, wanted: CfgNode) -> list[str]:
    """What keeps the run from being a reproduction of the row, in words."""
    remarks = []
    if run.row != row.id:
        remarks.append(f"run of {run.row}")
    if not run.results:
        remarks.append("not evaluated")
    if run.iterations is not None and run.iterations < run.cfg.SOLVER.MAX_ITER:
        remarks.append("unfinished")
    if row.same_weights_as:
        remarks.append(f"weights of {row.same_weights_as}")
    different = differences(run.cfg, wanted)
    split = different.pop(_SPLIT_FILE, None)
    if is_semi_supervised(wanted):
        remarks.append(f"labelled images of {split[0]}" if split else "labelled images drawn")
    weights = different.pop("MODEL.WEIGHTS", None)  # evaluating again, or a copy of the same file
    if weights and not row.same_weights_as:
        remarks.append(f"MODEL.WEIGHTS {weights[0]}")
    if different:
        remarks.append(f"**not the row's settings**: {describe(different)}")
    return remarks


def differences(cfg: CfgNode, wanted: CfgNode) -> dict[str, tuple]:
    """{KEY: (the run's value, the row's)} where they differ and it matters."""
    ours, theirs = dict(leaves(cfg)), dict(leaves(wanted))
    return {
        key: (ours.get(key), value)
        for key, value in theirs.items()
        if key not in _FREE_KEYS and _plain(ours.get(key)) != _plain(value)
    }


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys and values of a configuration."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def describe(different: dict[str, tuple]) -> str:
    """The differences as one line: what makes a toy run first and with values."""
    first = [
        f"{key} {different[key][0]} (row: {different[key][1]})"
        for key in _FIRST_KEYS
        if key in different
    ]
    # The model and its training before the data, which a first try always changes.
    others = sorted(
        (key for key in different if key not in _FIRST_KEYS),
        key=lambda key: (not key.startswith(("MODEL.", "SOLVER.", "SEMISUP.")), key),
    )
    more = len(others) - _OTHER_KEYS_SHOWN
    shown = [*first, *others[:_OTHER_KEYS_SHOWN], *([f"{more} more"] if more > 0 else [])]
    return ", ".join(shown)
