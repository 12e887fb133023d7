#!/usr/bin/env python
"""Count the objects of COCO files and draw the counts, one colour for every split.

python tools/dataset_stats.py --json train.json val.json --output DIR [--names train val] \\
    [--containers leaf ...] [--bins 0.05]

Writes, as CSV (counts, and shares of each split's own total) and PNG:
instances_per_category, categories_in_image and instances_in_image (images with 0, 1, 2, ...), and
instance_size: the area of the box / the area of the image. Crowd annotations are in none of them.

--json         COCO files; their classes are matched by name
--names        of the splits, as many as files (the files' names)
--containers   classes that contain the others, such as leaf: sizes also of both groups apart
--bins         width of the size bins as a share of the image (0.05: 5 %)
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from il_net.curation.statistics import (
    SplitObjects,
    Table,
    categories_in_image,
    class_names,
    coco_sizes,
    collect,
    instance_size,
    instances_in_image,
    num_instances,
    per_category,
    size_bins,
    write_table,
)
from il_net.curation.statistics_figures import category_figure, count_figure, size_figure
from il_net.data.sound_coco import read_sound_coco
from il_net.errors import check_output, plain_errors
from il_net.figures import shorten

_COLUMN = 18


def split_names(files: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """A name for every file.

    Raises:
        ValueError: too few or too many names, or one twice.
    """
    chosen = list(names or (Path(file).stem for file in files))
    if len(chosen) != len(files):
        raise ValueError(f"--names: {len(chosen)} names for {len(files)} files of --json")
    twice = sorted({name for name in chosen if chosen.count(name) > 1})
    if twice:
        raise ValueError(f"--names: every split needs a name of its own; twice: {twice}")
    return chosen


def read_splits(
    files: Sequence[str], names: Sequence[str] | None
) -> tuple[list[SplitObjects], tuple[str, ...]]:
    """The objects of every file, and the names of all classes."""
    chosen = split_names(files, names)
    if len(set(files)) < len(files):
        raise ValueError("--json: a file is named twice")
    datasets = {file: read_sound_coco(file, boxes=True) for file in files}
    classes = class_names(datasets)
    both = zip(chosen, datasets.values(), strict=True)
    return [collect(name, data, classes) for name, data in both], classes


def size_tables(
    splits: Sequence[SplitObjects], classes: Sequence[str], containers: Sequence[str], width: float
) -> dict[str, Table]:
    """The sizes of all objects and, with containers, of both groups, by the ending of the files.

    Raises:
        ValueError: a container that is no class.
    """
    unknown = [name for name in containers if name not in classes]
    if unknown:
        raise ValueError(f"--containers: no file has {unknown}; the classes are {list(classes)}")
    tables = {"": instance_size(splits, width)}
    if containers:
        outer = [i for i, name in enumerate(classes) if name in containers]
        inner = [i for i, name in enumerate(classes) if name not in containers]
        for ending, group in (("_containers", outer), ("_contents", inner)):
            tables[ending] = instance_size([split.of(group) for split in splits], width)
    return tables


def summary(splits: Sequence[SplitObjects], categories: Table, sizes: dict[str, Table]) -> str:
    """The main numbers as text, a column for every split."""
    per_image = [num_instances(split) for split in splits]
    first = sizes[""].rows[0]
    rows = [
        ("", [shorten(split.split, _COLUMN - 1) for split in splits]),
        ("images", [split.num_images for split in splits]),
        ("  without instances", [_share(int((n == 0).sum()), len(n)) for n in per_image]),
        ("instances", [int(n.sum()) for n in per_image]),
        ("  in an image, median", [f"{np.median(n):g}" for n in per_image]),
        ("  in an image, most", [int(n.max()) for n in per_image]),
        ("crowds, not counted here", [split.num_crowd for split in splits]),
        ("", []),
        (f"box up to {first} of image", _row(sizes[""], 0)),
    ]
    for ending, table in sizes.items():
        if ending:
            rows.append((f"  {ending[1:]}", _row(table, 0)))
    areas = coco_sizes(splits)
    rows += [(row, _row(areas, i)) for i, row in enumerate(areas.rows)]
    rows += [("", [])]
    rows += [(shorten(name, 40), _row(categories, i)) for i, name in enumerate(categories.rows)]
    wide = max(len(name) for name, _ in rows)
    lines = (f"{name:{wide}}" + "".join(f"{v:>{_COLUMN}}" for v in values) for name, values in rows)
    return "\n".join(line.rstrip() for line in lines)


def _row(table: Table, row: int) -> list[str]:
    totals = table.counts.sum(axis=0)
    return [_share(n, total) for n, total in zip(table.counts[row], totals, strict=True)]


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total if total else 0:6.1%})"


def write(
    folder: Path, splits: Sequence[SplitObjects], categories: Table, sizes: dict[str, Table]
) -> None:
    """The tables and pictures."""
    counts = {
        "categories_in_image": ("Different categories in an image", categories_in_image(splits)),
        "instances_in_image": ("Instances in an image", instances_in_image(splits)),
    }
    write_table(folder / "instances_per_category.csv", categories)
    category_figure(folder / "instances_per_category.png", categories)
    for name, (title, table) in counts.items():
        write_table(folder / f"{name}.csv", table)
        count_figure(folder / f"{name}.png", title, table)
    panels = {}
    for ending, table in sizes.items():
        write_table(folder / f"instance_size{ending}.csv", table)
        panels[f"Size of the instances: {ending[1:] or 'all'}"] = table
    size_figure(folder / "instance_size.png", panels)


def main() -> None:
    """Count, write the tables and pictures, print the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--names", nargs="+", metavar="NAME")
    parser.add_argument("--containers", nargs="+", default=[], metavar="CLASS")
    parser.add_argument("--bins", type=float, default=0.05, metavar="WIDTH")
    args = parser.parse_args()
    with plain_errors():
        check_output(args.output, is_folder=True)
        size_bins(args.bins)  # before the files, which may be large
        splits, classes = read_splits(args.json, args.names)
        sizes = size_tables(splits, classes, args.containers, args.bins)
        categories = per_category(splits, classes)
        write(args.output, splits, categories, sizes)
    print(summary(splits, categories, sizes))
    print(f"\ntables and pictures: {args.output}")


if __name__ == "__main__":
    main()
