"""Counts of a dataset's objects: by class, by image and by size, one column for every split.

Thesis Figures 2.20-2.22 (LDD) and 2.28-2.30 (ASND). Shares are of each split's own total. Crowd
annotations are counted apart and in no table.

Shapes: N objects, I images of a split; R rows, S splits of a table.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from ..data.coco_values import is_area

# Areas in pixels from which COCO's metrics call an object medium and large.
COCO_AREAS = (32**2, 96**2)
SMALLEST_BIN = 0.001  # bins are labelled with three decimals


@dataclass(frozen=True)
class SplitObjects:
    """The objects of one split.

    Args:
        split: its name.
        num_images: I.
        image: (N,) int, number of the image, 0..I-1.
        category: (N,) int, index into the class names of all splits together.
        size: (N,) float, area of the box / area of the image.
        area: (N,) float, the annotation's `area` in pixels (the mask's, where there are masks);
            without one, the box's.
        num_crowd: annotations of crowds, which are none of the N.
    """

    split: str
    num_images: int
    image: np.ndarray
    category: np.ndarray
    size: np.ndarray
    area: np.ndarray
    num_crowd: int = 0

    def of(self, categories: Sequence[int]) -> "SplitObjects":
        """The objects of some classes; all images stay."""
        kept = np.isin(self.category, categories)
        arrays = (a[kept] for a in (self.image, self.category, self.size, self.area))
        return SplitObjects(self.split, self.num_images, *arrays, self.num_crowd)


@dataclass(frozen=True)
class Table:
    """Counts of something.

    Args:
        label: what the rows are.
        unit: what is counted, "instances" or "images".
        rows: R labels.
        splits: S names.
        counts: (R, S) int.
    """

    label: str
    unit: str
    rows: tuple[str, ...]
    splits: tuple[str, ...]
    counts: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """(R, S) float: of the split's total, so that columns sum to 1; 0 where there is none."""
        return self.counts / np.maximum(self.counts.sum(axis=0), 1)


def class_names(datasets: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """The classes of all splits by name: the first file's sorted by id, then what others add."""
    names: dict[str, None] = {}
    for data in datasets.values():
        for category in sorted(data["categories"], key=lambda c: c["id"]):
            names.setdefault(category["name"])
    return tuple(names)


def collect(split: str, data: dict[str, Any], names: Sequence[str]) -> SplitObjects:
    """The objects of a COCO file that `check_sound` has passed, boxes included.

    Args:
        split: name for the columns.
        data: the file.
        names: classes; they are matched by name, because files may number them differently.
    """
    number = {image["id"]: i for i, image in enumerate(data["images"])}
    pixels = np.array([i["width"] * i["height"] for i in data["images"]], dtype=np.float64)
    index_of = {name: i for i, name in enumerate(names)}
    index = {c["id"]: index_of[c["name"]] for c in data["categories"]}
    objects = [a for a in data["annotations"] if not a.get("iscrowd", 0)]
    image = np.array([number[a["image_id"]] for a in objects], dtype=np.int64)
    boxes = np.array([a["bbox"] for a in objects], dtype=np.float64).reshape(-1, 4)
    box_area = boxes[:, 2] * boxes[:, 3]
    own = (a.get("area") for a in objects)
    area = [a if is_area(a) else box for a, box in zip(own, box_area, strict=True)]
    return SplitObjects(
        split=split,
        num_images=len(number),
        image=image,
        category=np.array([index[a["category_id"]] for a in objects], dtype=np.int64),
        size=box_area / pixels[image],
        area=np.array(area, dtype=np.float64),
        num_crowd=len(data["annotations"]) - len(objects),
    )


def per_category(splits: Sequence[SplitObjects], names: Sequence[str]) -> Table:
    """SplitObjects of every class (Fig. 2.20a, 2.28), in the order of `names`."""
    columns = [np.bincount(s.category, minlength=len(names)) for s in splits]
    return _table("category", "instances", names, splits, columns)


def categories_in_image(splits: Sequence[SplitObjects]) -> Table:
    """Images with 0, 1, 2, ... different classes (Fig. 2.20b, 2.30a)."""
    values = []
    for split in splits:
        pairs = np.unique(np.stack([split.image, split.category]), axis=1)
        values.append(np.bincount(pairs[0], minlength=split.num_images))
    return _exact("categories in an image", splits, values)


def instances_in_image(splits: Sequence[SplitObjects]) -> Table:
    """Images with 0, 1, 2, ... objects (Fig. 2.21, 2.29)."""
    values = [num_instances(split) for split in splits]
    return _exact("instances in an image", splits, values)


def num_instances(split: SplitObjects) -> np.ndarray:
    """(I,) int: objects of every image."""
    return np.bincount(split.image, minlength=split.num_images)


def size_bins(width: float) -> tuple[float, ...]:
    """The upper edges of bins of the size, a share of the image; the last one is 1.

    Raises:
        ValueError: `width` is not between 0.001 and 1.
    """
    if not SMALLEST_BIN <= width <= 1:
        raise ValueError(
            f"--bins is the width of a bin as a share of the image, from {SMALLEST_BIN} to 1, "
            f"got {width:g}"
        )
    count = ceil(1 / width - 1e-9)
    return tuple(min(1.0, width * i) for i in range(1, count + 1))


def instance_size(splits: Sequence[SplitObjects], width: float) -> Table:
    """SplitObjects by the share of the image that their box takes (Fig. 2.22, 2.30b).

    A bin is labelled by its upper edge. A size exactly on an edge is in the next bin; 1 and more
    (boxes that leave their image) is in the last.
    """
    edges = size_bins(width)
    columns = []
    for split in splits:
        # Edges are decimal numbers: in binary 0.15 / 0.05 is below 3.
        bins = np.floor(split.size / width + 1e-9).astype(np.int64)
        columns.append(np.bincount(np.minimum(bins, len(edges) - 1), minlength=len(edges)))
    rows = [f"{edge:.3f}" for edge in edges]
    return _table("box area / image area, up to", "instances", rows, splits, columns)


def coco_sizes(splits: Sequence[SplitObjects]) -> Table:
    """SplitObjects that COCO's metrics call small, medium and large, by `SplitObjects.area`."""
    columns = [
        np.bincount(np.searchsorted(COCO_AREAS, s.area, side="right"), minlength=3) for s in splits
    ]
    rows = ("small, under 32 x 32 px", "medium, under 96 x 96 px", "large")
    return _table("area", "instances", rows, splits, columns)


def write_table(path: Path, table: Table) -> None:
    """Write a table as CSV: the row's label, the counts of every split, then the shares."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        shares = [f"{split} share" for split in table.splits]
        writer.writerow([table.label, *table.splits, *shares])
        for row, counts, own in zip(table.rows, table.counts, table.shares, strict=True):
            writer.writerow([row, *counts.tolist(), *(f"{share:.6f}" for share in own)])


def _exact(label: str, splits: Sequence[SplitObjects], values: Sequence[np.ndarray]) -> Table:
    """How many images have every value from 0 to the highest of all splits."""
    highest = max(int(v.max(initial=0)) for v in values)
    columns = [np.bincount(v, minlength=highest + 1) for v in values]
    return _table(label, "images", [str(i) for i in range(highest + 1)], splits, columns)


def _table(
    label: str,
    unit: str,
    rows: Sequence[str],
    splits: Sequence[SplitObjects],
    columns: Sequence[np.ndarray],
) -> Table:
    names = tuple(s.split for s in splits)
    return Table(label, unit, tuple(rows), names, np.stack(columns, axis=1))
