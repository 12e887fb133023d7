#!/usr/bin/env python
"""Cut a COCO file into train and val, or choose the images that keep their labels.

python tools/split_coco.py train-val --json all.json --fraction 0.8 --seed 1 --output DIR \\
    [--stratified] [--group-by COLUMN | --group-regex REGEX] [--drop-empty]

Writes DIR/train.json and DIR/val.json, by whole images: floor(fraction * images) are in train.
Records, their ids and order stay as they are, both files have all categories, and info.split says
how they were made. An image file that is there under several ids is on one side.

--stratified    the objects of every class in proportion
--group-by      images with the same value in this column of their records stay together
--group-regex   or those with the same text in the first capture group (or the match) of file_name
--drop-empty    without the images that have no annotations

python tools/split_coco.py labeled --json instances.json --percent 5 10 --seed 1 2 \\
    --output split.json [--stratified] [--nested]
python tools/split_coco.py labeled --config-file FILE --percent 10 --output split.json

Writes a file for DATASETS.SPLIT.FILE, with a list for every percentage and seed.

--json          a COCO file
--config-file   or the datasets of DATASETS.TRAIN
--percent       of the images that have annotations
--stratified    every class in proportion to the images that show it
--nested        the images of a smaller percentage are among those of a larger one

The same arguments give the same images on any machine and for any order of the file. Tables tell
for each part how many objects and images of every class it has, and its share of all objects of
the class (crowds are not counted).
"""

import argparse
import json
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog

from il_net.config import load_config
from il_net.curation.split_parts import (
    count_objects,
    count_train,
    draw_train,
    drop_empty_images,
    group_images,
    objects_by_image,
    share_table,
    take_part,
)
from il_net.data.coco_file import write_coco
from il_net.data.datasets import register_datasets
from il_net.data.sound_coco import read_sound_coco
from il_net.data.split import Records, draw_labeled, image_classes, records_by_id, train_records
from il_net.data.split_file import split_document
from il_net.errors import check_output, plain_errors
from sbr_cnn import add_sbr_cnn_config


def split_train_val(args: argparse.Namespace) -> None:
    """Write both parts and show their shares."""
    targets = {part: args.output / f"{part}.json" for part in ("train", "val")}
    with plain_errors():
        check_output(args.output, is_folder=True)
        for path in targets.values():
            check_output(path, is_folder=False)
        if Path(args.json).resolve() in {path.resolve() for path in targets.values()}:
            raise ValueError(f"--output: {args.json} would be overwritten; name another folder")
        data = read_sound_coco(args.json)
        total = len(data["images"])
        if args.drop_empty:
            data = drop_empty_images(data)
        objects = objects_by_image(data)
        groups = group_images(data["images"], args.group_by, args.group_regex)
        train = draw_train(groups, args.fraction, args.seed, objects if args.stratified else None)
        ids = {"train": train, "val": objects.keys() - train}
        origin = {"fraction": args.fraction, "seed": args.seed, "command": command_line()}
        for part, path in targets.items():
            write_coco(path, take_part(data, ids[part], {"part": part, **origin}))
    if args.drop_empty:
        print(f"dropped {total - len(objects)} of {total} images: no annotations")
    asked = count_train(args.fraction, len(objects))
    print(f"{len(train)} of {len(objects)} images in train, {asked} asked for")
    print(share_table(class_names(data), {p: [objects[i] for i in ids[p]] for p in ids}))
    print(*targets.values(), sep="\n")


def class_names(data: dict[str, Any]) -> dict[int, str]:
    """The names by category id."""
    return {c["id"]: c["name"] for c in data["categories"]}


def command_line() -> str:
    """What was typed, as it can be typed again."""
    return shlex.join(["split_coco.py", *sys.argv[1:]])


def split_labeled(args: argparse.Namespace) -> None:
    """Draw every list, write the file and show the shares."""
    with plain_errors():
        check_output(args.output, is_folder=False)
        records, names = read_records(args.json, args.config_file)
        classes = image_classes(records)
        stratified = classes if args.stratified else None
        options = {"nested": args.nested, "classes": stratified, "key": "--percent"}
        labeled = {
            percent: {seed: draw_labeled(classes, percent, seed, **options) for seed in args.seed}
            for percent in args.percent
        }
        document = split_document(" + ".join(records), list(classes), labeled)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(document), encoding="utf-8")
    objects = {i: count_objects(r["annotations"]) for i, r in records_by_id(records).items()}
    for percent, by_seed in labeled.items():
        for seed, kept in by_seed.items():
            print(f"{percent:g} %, seed {seed}: {len(kept)} of {len(classes)} images")
            others = objects.keys() - kept
            parts = {"labeled": kept, "unlabeled": others}
            print(share_table(names, {p: [objects[i] for i in ids] for p, ids in parts.items()}))
    print(args.output)


def read_records(json_file: str | None, config_file: str | None) -> tuple[Records, dict[int, str]]:
    """The images to split, without empty ones, and the class names by the ids in them."""
    if config_file:
        cfg = load_config(config_file, [], add_sbr_cnn_config)
        register_datasets(cfg)
        records = train_records(cfg)
        return records, dict(enumerate(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes))
    data = read_sound_coco(json_file)
    # As Detectron2 reads the file and filters the images, but without looking at the masks.
    own = defaultdict(list)
    for annotation in data["annotations"]:
        own[annotation["image_id"]].append(annotation)
    records = [
        {"image_id": image["id"], "annotations": own[image["id"]]}
        for image in data["images"]
        if any(not a.get("iscrowd", 0) for a in own[image["id"]])
    ]
    if not records:
        raise ValueError(f"--json: no image of {json_file} has annotations")
    return {Path(json_file).stem: records}, class_names(data)


def main() -> None:
    """Run the chosen command."""
    style = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**style)
    commands = parser.add_subparsers(dest="command", required=True)

    parts = commands.add_parser("train-val", help="write train.json and val.json", **style)
    parts.add_argument("--json", required=True, metavar="FILE")
    parts.add_argument("--fraction", type=float, required=True, metavar="F")
    parts.add_argument("--seed", type=int, required=True, metavar="S")
    parts.add_argument("--output", type=Path, required=True, metavar="DIR")
    parts.add_argument("--stratified", action="store_true")
    grouping = parts.add_mutually_exclusive_group()
    grouping.add_argument("--group-by", default="", metavar="COLUMN")
    grouping.add_argument("--group-regex", default="", metavar="REGEX")
    parts.add_argument("--drop-empty", action="store_true")
    parts.set_defaults(run=split_train_val)

    lists = commands.add_parser("labeled", help="write a file for DATASETS.SPLIT.FILE", **style)
    source = lists.add_mutually_exclusive_group(required=True)
    source.add_argument("--json", metavar="FILE")
    source.add_argument("--config-file", metavar="FILE")
    lists.add_argument("--percent", type=float, nargs="+", required=True, metavar="P")
    lists.add_argument("--seed", type=int, nargs="+", default=[1], metavar="S")
    lists.add_argument("--stratified", action="store_true")
    lists.add_argument("--nested", action="store_true")
    lists.add_argument("--output", type=Path, required=True, metavar="FILE")
    lists.set_defaults(run=split_labeled)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
