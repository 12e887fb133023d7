#!/usr/bin/env python
"""Choose the images that keep their labels, and write them as a file for DATASETS.SPLIT.FILE.

python tools/split_dataset.py --json instances.json --percent 5 10 --seed 1 2 --output split.json
python tools/split_dataset.py --config-file FILE --percent 10 --stratified --output split.json

--json          a COCO file
--config-file   the datasets of DATASETS.TRAIN
--percent       of the images that have annotations; a list for every percentage and seed
--stratified    every class in proportion
--nested        the images of a smaller percentage are among those of a larger one
"""

import argparse
import json
import os
from pathlib import Path

from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.datasets import load_coco_json

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.data.split import Records, draw_labeled, image_classes, train_records
from il_net.data.split_file import split_document
from il_net.errors import plain_errors
from sbr_cnn import add_sbr_cnn_config


def read_records(json_file: str | None, config_file: str | None) -> Records:
    """The images to split, without empty ones, from a COCO file or a configuration."""
    if config_file:
        cfg = load_config(config_file, [], add_sbr_cnn_config)
        register_datasets(cfg)
        return train_records(cfg)
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"--json: there is no file {json_file}")
    records = filter_images_with_only_crowd_annotations(load_coco_json(json_file, ""))
    if not records:
        raise ValueError(f"--json: no image of {json_file} has annotations")
    return {Path(json_file).stem: records}


def main() -> None:
    """Draw every list and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--json", metavar="FILE")
    source.add_argument("--config-file", metavar="FILE")
    parser.add_argument("--percent", type=float, nargs="+", required=True, metavar="P")
    parser.add_argument("--seed", type=int, nargs="+", default=[1], metavar="S")
    parser.add_argument("--stratified", action="store_true")
    parser.add_argument("--nested", action="store_true")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    with plain_errors():
        records = read_records(args.json, args.config_file)
        classes = image_classes(records)
        stratified = classes if args.stratified else None
        labeled = {
            percent: {
                seed: draw_labeled(classes, percent, seed, nested=args.nested, classes=stratified)
                for seed in args.seed
            }
            for percent in args.percent
        }
    document = split_document(" + ".join(records), list(classes), labeled)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document), encoding="utf-8")
    for percent in args.percent:
        count = len(labeled[percent][args.seed[0]])
        print(f"{percent:g} %: {count} of {len(classes)} images, seeds {args.seed}")
    print(args.output)


if __name__ == "__main__":
    main()
