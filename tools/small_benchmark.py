#!/usr/bin/env python
"""Compare the methods on two small real data sets, with several seeds.

python tools/small_benchmark.py --output FOLDER [--tables coffee_leaf,bccd_10] [--seeds 1,2,3]
    [--only METHOD,...] [--max-hours H] [--threads N] [--list] [KEY VALUE ...]

The data sets are folders under DETECTRON2_DATASETS, each with annotations/instances_train.json,
annotations/instances_val.json and images/. One process trains at a time. All methods come with the
first seed, then all with the second, ... Before the first training that needs them, learning rates
and the settings of pseudo labels are chosen on a fifth of the training images that is left out of
these trainings; val is not looked at. Started again, the same command goes on: what is finished is
not repeated, and what SIGINT, SIGTERM or --max-hours has stopped (exit code 75) continues with the
step it had reached.

FOLDER/report.md, written after every training, has the tables, with the seeds' mean, spread and
paired differences to the first row; a picture per table shows AP over the steps.

--only       these methods, and what is needed to choose their settings
--max-hours  stop then; 0 writes the report alone
--list       print the trainings in their order and whether they are finished; start nothing
KEY VALUE    for every training, as SOLVER.MAX_ITER 2 for a trial; such a folder is no benchmark
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from count_parameters import count_trainable
from detectron2.modeling import build_model

from il_net.benchmark.small_protocol import (
    Table,
    annotation_file,
    needed_choices,
    planned,
    run_folder,
    select_tables,
)
from il_net.benchmark.small_report import write_report
from il_net.benchmark.small_runs import (
    RESULT,
    SmallBenchmark,
    Stopped,
    Trainings,
    chosen_settings,
)
from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.engine.preemption import PREEMPTED
from il_net.errors import check_output, plain_errors
from sbr_cnn import add_sbr_cnn_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "benchmark"


def main(argv: list[str] | None = None) -> int:
    """Run, or list, the benchmark; returns the exit code."""
    args = parse_arguments(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("il_net.benchmark").setLevel(logging.INFO)
    folder = args.output.resolve()
    with plain_errors():
        check_output(args.output, is_folder=True, option="--output")
        tables = select_tables(args.tables, args.only)
        if args.list:
            list_runs(folder, tables, args.seeds)
            return 0
        for table in tables:
            for part in ("train", "val"):
                annotation_file(table.dataset, part)

    def report() -> Path:
        return write_report(folder, tables, args.seeds, args.threads)

    trainings = Trainings(
        ROOT / "train_net.py", CONFIGS, threads=args.threads, hours=args.max_hours
    )
    benchmark = SmallBenchmark(folder, trainings, count_parameters, args.opts)
    code = 0
    with plain_errors(), trainings:
        try:
            benchmark.run(tables, args.seeds, report)
        except Stopped:
            code = PREEMPTED
    with plain_errors():
        print(report())
    for failed in benchmark.failed:
        print(f"failed: {failed}")
    return code or int(bool(benchmark.failed))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked as far as argparse can."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--tables", type=_names, default=[], metavar="T[,T]", help="all")
    add("--seeds", type=_seeds, default=[1, 2, 3], metavar="N[,N]", help="1,2,3")
    add("--only", type=_names, default=[], metavar="METHOD[,METHOD]")
    add("--max-hours", type=_hours, default=math.inf, metavar="H")
    add("--threads", type=int, default=1, metavar="N", help="of a training (1)")
    add("--list", action="store_true")
    add("opts", nargs="*", metavar="KEY VALUE")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"argument --threads: needs a whole number from 1 on, got {args.threads}")
    return args


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _seeds(text: str) -> list[int]:
    names = _names(text)
    if not names or not all(name.isdecimal() for name in names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"needs different whole numbers, as 1,2,3; got {text!r}")
    return [int(name) for name in names]


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not hours >= 0:
        raise argparse.ArgumentTypeError(f"needs a number of hours from 0 on, got {text!r}")
    return hours


def list_runs(folder: Path, tables: Sequence[Table], seeds: Sequence[int]) -> None:
    """Print what there is to choose and to train, in the order in which it happens."""
    chosen = chosen_settings(folder)
    for choice in needed_choices(m for table in tables for m in table.methods):
        what = " ".join(chosen[choice.name]) if choice.name in chosen else "not chosen yet"
        tried = ", ".join(choice.candidates)
        judges = ", ".join(method.name for method in choice.judges)
        print(f"choose {choice.name} of {tried} by {judges}: {what}")
    for table, method, seed in planned(tables, seeds):
        name = run_folder(table, method, seed)
        print(f"train  {name}: {'finished' if (folder / name / RESULT).is_file() else 'to do'}")


def count_parameters(config: str, settings: Sequence[str]) -> int:
    """Trainable parameters of a configuration's model, of a semi-supervised one's student."""
    cfg = load_config(str(CONFIGS / f"{config}.yaml"), list(settings), add_sbr_cnn_config)
    register_datasets(cfg)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    return count_trainable(getattr(model, "student", model))


if __name__ == "__main__":
    sys.exit(main())
