#!/usr/bin/env python
"""Count which class is taken for which, what is missed and what is made up (thesis Fig. 2.25).

python tools/confusion_matrix.py --json truth.json --predictions results.json --output DIR \\
    [--min-score S] [--iou T] [--masks] [--matching thesis|one-to-one]
python tools/confusion_matrix.py --config-file F --output DIR [...] [MODEL.WEIGHTS W]

--predictions   coco_instances_results.json of an evaluation, or detections.json of predict.py,
                whose pictures are found in the truth by file name and its classes by name
--config-file   run the model on DATASETS.TEST; a folder under DIR for each dataset
--matching      thesis: every true object that a detection overlaps counts, so one may count twice;
                a true object is missed where nothing of its own class overlaps it.
                one-to-one: within each class as in COCO's evaluation, by falling score; what is
                left over is paired across classes

Rows are the truth, columns the prediction, the last of each is the background. Crowds are no true
objects, and detections in a crowd of their class count nowhere. Writes confusion_matrix.png (the
shares of each row in percent), confusion_counts.csv and confusion_shares.csv (empty cells where a
row has no entry).
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.utils.logger import setup_logger

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.data.validate import validate_datasets
from il_net.errors import check_output, plain_errors
from il_net.evaluation.confusion import MATCHINGS, confusion_matrix, row_shares
from il_net.evaluation.confusion_figure import BACKGROUND, draw_confusion
from il_net.evaluation.predictions import Labels, read_predictions, read_truth
from il_net.evaluation.run_model import run_model
from il_net.safe_load import add_trust_option
from sbr_cnn import add_sbr_cnn_config


def write_table(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A CSV file with the names along both sides."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["truth \\ predicted", *names])
        writer.writerows([name, *row] for name, row in zip(names, rows, strict=True))


def write(folder: Path, counts: np.ndarray, classes: Sequence[str], title: str) -> None:
    """The two tables and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*classes, BACKGROUND]
    shares = [
        [round(share, 6) if row.any() else "" for share in row.tolist()]
        for row in row_shares(counts)
    ]
    write_table(folder / "confusion_counts.csv", names, counts.tolist())
    write_table(folder / "confusion_shares.csv", names, shares)
    draw_confusion(folder / "confusion_matrix.png", counts, classes, title)


def report(truth: Labels, found: Labels, args: argparse.Namespace, folder: Path) -> None:
    """Count one dataset, write its files and print a summary."""
    counts = confusion_matrix(
        truth, found, min_score=args.min_score, min_iou=args.iou, matching=args.matching
    )
    kind = "mask" if args.masks else "box"
    title = f"{args.matching} matching, {kind} IoU ≥ {args.iou:g}, score ≥ {args.min_score:g}"
    write(folder, counts, found.classes, f"Confusion matrix, percent of each row\n{title}")
    objects = sum(int((~image.objects.crowd).sum()) for image in truth.images)
    kept = sum(int((i.objects.scores >= args.min_score).sum()) for i in found.images)
    print(f"{title}: {objects} true objects and {kept} detections in {len(truth.images)} images")
    without = [n for n, row in zip(found.classes, counts, strict=False) if not row.any()]
    if without:
        print(f"classes without truth, whose rows are empty: {', '.join(without)}")
    print(f"written to {folder}")


def main() -> None:
    """Count, from files or from a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--json", metavar="FILE", help="truth, a COCO file")
    source.add_argument("--config-file", metavar="FILE")
    parser.add_argument("--predictions", metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--min-score", type=float, default=0.3, help="of a detection (0.3)")
    parser.add_argument("--iou", type=float, default=0.5, help="overlaps from here on (0.5)")
    parser.add_argument("--masks", action="store_true", help="compare masks instead of boxes")
    parser.add_argument("--matching", choices=MATCHINGS, default="thesis")
    add_trust_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    if bool(args.json) != bool(args.predictions):
        parser.error("--predictions goes with --json, and only with it")
    if args.json and args.opts:
        parser.error(f"KEY VALUE pairs go with --config-file, got {args.opts}")
    setup_logger(name="il_net")
    with plain_errors():
        check_output(args.output, is_folder=True)
        if args.json:
            truth = read_truth(args.json, masks=args.masks)
            found = read_predictions(args.predictions, truth, masks=args.masks)
            report(truth, found, args, args.output)
            return
        cfg = load_config(args.config_file, args.opts, add_sbr_cnn_config)
        register_datasets(cfg)
        validate_datasets(cfg)
        cfg.freeze()
        for name, truth, found in run_model(cfg, masks=args.masks):
            report(truth, found, args, args.output / name)


if __name__ == "__main__":
    main()
