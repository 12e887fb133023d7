#!/usr/bin/env python
"""Train the rows of the thesis' results tables and compare with what it prints.

python tools/reproduce.py list [--table 2.15]
python tools/reproduce.py params [--table 2.15]
python tools/reproduce.py show ROW
python tools/reproduce.py run ROW [train_net.py's options] [KEY VALUE ...]
python tools/reproduce.py report [--table 2.15] [DIR ...]

A ROW is named by table and number, 2.15/5, a curve by figure and number, fig2.16b/1. Results and
settings are in configs/thesis_tables.yaml.
list    the rows with the thesis' results
params  builds every row's model and compares its trainable parameters; exit code 1: some differ
show    the row's notes and, as YAML, its whole configuration
run     trains the row into output/thesis/2.15-5, with --eval-only evaluates it; what is typed after
        ROW goes to train_net.py and wins over the row's settings
report  a Markdown table of the thesis' results beside those of finished runs (of semi-supervised
        ones the teacher's); a DIR is a run's folder or holds such folders
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from detectron2.engine import default_argument_parser
from tabulate import tabulate
from thesis_report import ROW_FILE, report
from thesis_tables import ParameterCounter, Row, find_row, read_rows, select_table

from il_net.config import load_config
from il_net.errors import plain_errors
from sbr_cnn import add_sbr_cnn_config

ROOT = Path(__file__).resolve().parent.parent


def list_rows(rows: list[Row]) -> None:
    """Print one line a row."""
    lines = []
    for row in rows:
        box, mask = row.printed_ap("box"), row.printed_ap("mask")
        lines.append((row.id, row.title, box, mask, row.thesis.get("params", ""), remark(row)))
    headers = ("row", "method", "box AP", "mask AP", "parameters", "")
    print(tabulate(lines, headers=headers, disable_numparse=True))


def remark(row: Row) -> str:
    """What makes the row special, in a few words."""
    if row.external:
        return "another project's model"
    if row.module:
        return "one layer"
    return f"weights of {row.same_weights_as}" if row.same_weights_as else ""


def check_params(rows: list[Row]) -> int:
    """Print every row's trainable parameters beside the thesis'; returns the exit code."""
    counter, lines, wrong = ParameterCounter(), [], []
    for row in rows:
        count, verdict, explained = counter.check(row)
        lines.append((row.id, row.title, count, row.thesis.get("params", ""), verdict))
        if not explained:
            wrong.append(row.id)
    headers = ("row", "method", "here", "thesis", "")
    align = ("left", "left", "right", "right", "left")
    print(tabulate(lines, headers=headers, disable_numparse=True, colalign=align))
    print(f"\n{len(rows)} rows, {len(wrong)} differ{': ' if wrong else ''}{', '.join(wrong)}")
    return 1 if wrong else 0


def show(row: Row) -> None:
    """Print the row's notes, as YAML comments, and its whole configuration."""
    lines = [f"{row.id} {row.title}", row.heading]
    lines += [f"Thesis: {json.dumps(row.thesis)}", *row.notes]
    if row.same_weights_as:
        lines.append(weights_hint(row))
    if row.module:
        lines.append(f"The figure is of one layer, {row.module}; below is the model around it")
    if row.external:
        lines.append("Another project's model: there is no configuration")
    print("\n".join(f"# {line}" for line in lines))
    if not row.external:
        cfg = row.resolve(["OUTPUT_DIR", output_dir(row.id)])
        cfg.MODEL.DEVICE = "cuda"  # not what this machine has; without a GPU it is the CPU anyway
        print(cfg.dump(), end="")


def output_dir(row_id: str) -> str:
    """Where a row is trained unless OUTPUT_DIR says otherwise."""
    return f"output/thesis/{row_id.replace('/', '-')}"


def weights_hint(row: Row) -> str:
    """How a row that differs at test only is evaluated without training it."""
    weights = f"{output_dir(row.same_weights_as)}/model_final.pth"
    return (
        f"Has the weights of {row.same_weights_as}: "
        f"python tools/reproduce.py run {row.id} --eval-only MODEL.WEIGHTS {weights}"
    )


def prepare_run(row: Row, arguments: list[str]) -> list[str]:
    """Mark the row's output folder; returns the command that trains or evaluates it.

    Args:
        arguments: train_net.py's options, then KEY VALUE pairs.

    Raises:
        ValueError: the row is no model of ours, a key is wrong, or the folder is another row's.
    """
    if row.module:
        raise ValueError(f"Row {row.id} is one layer, {row.module}; `params` counts it")
    typed = default_argument_parser().parse_args(arguments)
    if typed.config_file:
        raise ValueError(
            f"--config-file {typed.config_file}: a row has its own; change keys as KEY VALUE pairs"
        )
    typed_options = arguments[: len(arguments) - len(typed.opts)]
    opts = [*row.options(), "OUTPUT_DIR", output_dir(row.id), *typed.opts]
    config_file = row.config_file()
    cfg = load_config(config_file, opts, add_sbr_cnn_config)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several of us
        mark_folder(Path(cfg.OUTPUT_DIR), row)
    if row.same_weights_as and not typed.eval_only:
        print(weights_hint(row), flush=True)
    script = str(ROOT / "train_net.py")
    return [sys.executable, script, "--config-file", config_file, *typed_options, *opts]


def mark_folder(folder: Path, row: Row) -> None:
    """Write into a run's folder which row it is, for `report`.

    Raises:
        ValueError: it is another row's.
    """
    marker = folder / ROW_FILE
    if not marker.exists() and (folder / "config.yaml").exists():
        raise ValueError(f"OUTPUT_DIR {folder} holds a run that is no row's: name another")
    if marker.exists() and (other := json.loads(marker.read_text())["row"]) != row.id:
        raise ValueError(f"OUTPUT_DIR {folder} holds a run of row {other}: name another")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"row": row.id}))


def parse_arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    by_name = {name: commands.add_parser(name) for name in ("list", "params", "report")}
    for command in by_name.values():
        command.add_argument("--table", metavar="T", help="only this table, as 2.15")
    by_name["report"].add_argument("folders", nargs="*", type=Path, metavar="DIR")
    for name in ("show", "run"):
        by_name[name] = commands.add_parser(name)
        by_name[name].add_argument("row", metavar="ROW", help="table and number, as 2.15/5")
    by_name["run"].add_argument("arguments", nargs=argparse.REMAINDER, help="train_net.py's")
    return parser.parse_args()


def main() -> int:
    """Run one of the commands; returns the exit code."""
    args = parse_arguments()
    with plain_errors():
        rows = read_rows()
        if args.command == "show":
            show(find_row(rows, args.row))
        elif args.command == "list":
            list_rows(select_table(rows, args.table))
        elif args.command == "params":
            return check_params(select_table(rows, args.table))
        elif args.command == "report":
            print(report(rows, select_table(rows, args.table), args.folders))
        else:
            command = prepare_run(find_row(rows, args.row), args.arguments)
            return subprocess.run(command).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
