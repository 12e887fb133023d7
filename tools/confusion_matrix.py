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
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.errors import plain_errors
from il_net.evaluation.confusion import MATCHINGS, confusion_matrix, row_shares
from il_net.evaluation.confusion_figure import BACKGROUND, draw_confusion
from il_net.evaluation.predictions import (
    Labels,
    parse_predictions,
    parse_truth,
    read_predictions,
    read_truth,
)
from il_net.predict import Predictor, read_picture, to_coco
from sbr_cnn import add_sbr_cnn_config


def run_model(cfg: CfgNode, *, masks: bool) -> Iterator[tuple[str, Labels, Labels]]:
    """Name, truth and predictions of each dataset of DATASETS.TEST."""
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: name the datasets to run the model on")
    if not cfg.DATASETS.CLASSES:
        raise ValueError("DATASETS.CLASSES is empty: use the config.yaml of the training run")
    if masks and not cfg.MODEL.MASK_ON:
        raise ValueError("--masks needs a model with masks, but MODEL.MASK_ON is False")
    predictor = Predictor(cfg)
    for name in cfg.DATASETS.TEST:
        records = DatasetCatalog.get(name)
        # Without training sets, a dataset keeps a class list of its own.
        truth = empty_document(MetadataCatalog.get(name).thing_classes)
        found = empty_document(cfg.DATASETS.CLASSES)
        for image_id, record in enumerate(tqdm(records, name), start=1):
            picture = read_picture(Path(record["file_name"]))
            sides = {"height": record["height"], "width": record["width"]}
            if picture.shape[:2] != tuple(sides.values()):
                raise ValueError(
                    f"{record['file_name']} is {picture.shape[:2]} (height, width), in the "
                    f"dataset {name} {tuple(sides.values())}"
                )
            image = {"id": image_id, "file_name": record["file_name"], **sides}
            truth["images"].append(image)
            for annotation in record["annotations"]:
                truth["annotations"].append(to_record(annotation, image_id))
            found["images"].append(image)
            found["annotations"] += to_coco(predictor(picture), image_id)
        for document in (truth, found):
            for number, annotation in enumerate(document["annotations"], start=1):
                annotation["id"] = number
        labels = parse_truth(truth, name, masks=masks)
        yield name, labels, parse_predictions(found, name, labels, masks=masks)


def empty_document(classes: Sequence[str]) -> dict[str, list[dict]]:
    """A COCO document with categories 1, 2, ... and nothing else."""
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    return {"images": [], "annotations": [], "categories": categories}


def to_record(annotation: dict, image_id: int) -> dict:
    """A COCO annotation, without id, from Detectron2's of one image."""
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)
    return {
        "image_id": image_id,
        "category_id": annotation["category_id"] + 1,
        "bbox": [float(value) for value in box],
        "segmentation": annotation.get("segmentation"),
        "iscrowd": annotation.get("iscrowd", 0),
    }


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
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    if bool(args.json) != bool(args.predictions):
        parser.error("--predictions goes with --json, and only with it")
    if args.json and args.opts:
        parser.error(f"KEY VALUE pairs go with --config-file, got {args.opts}")
    setup_logger(name="il_net")
    with plain_errors():
        if args.json:
            truth = read_truth(args.json, masks=args.masks)
            found = read_predictions(args.predictions, truth, masks=args.masks)
            report(truth, found, args, args.output)
            return
        cfg = load_config(args.config_file, args.opts, add_sbr_cnn_config)
        register_datasets(cfg)
        cfg.freeze()
        for name, truth, found in run_model(cfg, masks=args.masks):
            report(truth, found, args, args.output / name)


if __name__ == "__main__":
    main()
