"""Checks of the records of a COCO file, one function for each kind of record or relation.

Every function adds what it finds to ``Findings``; those that take records as they are return the
well-formed ones. Boxes are COCO's: (x, y, width, height) in pixels of the stored image.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .coco_values import LARGEST_PX, has_file_name, is_box, is_id, is_side
from .report import Findings, Severity

EDGE_TOLERANCE_PX = 1.0
# (width, height) in pixels by image id.
Sizes = Mapping[int | str, tuple[float, float]]


def _split_malformed(
    records: list[Any], is_well_formed: Callable[[dict], bool]
) -> tuple[list[dict], list[int]]:
    """The well-formed records, and the positions of the others."""
    good, bad = [], []
    for position, record in enumerate(records):
        if isinstance(record, dict) and is_well_formed(record):
            good.append(record)
        else:
            bad.append(position)
    return good, bad


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def check_categories(records: list[Any], findings: Findings) -> list[dict]:
    """The categories with an integer id and a name, each id and name once."""
    good, bad = _split_malformed(
        records, lambda c: type(c.get("id")) is int and isinstance(c.get("name"), str)
    )
    findings.add(
        "categories without an integer 'id' and a 'name'", [f"categories[{i}]" for i in bad]
    )
    if not records:
        findings.state("'categories' is empty")
    findings.add("category ids used twice", [str(i) for i in _repeated(c["id"] for c in good)])
    names = _repeated(c["name"] for c in good)
    findings.add("category names used twice", [f"'{name}'" for name in names])
    return good


def check_images(records: list[Any], findings: Findings) -> list[dict]:
    """The images with an id, a file name and sides in whole pixels, each id once."""
    good, bad = _split_malformed(
        records,
        lambda i: (
            is_id(i.get("id"))
            and has_file_name(i)
            and is_side(i.get("width"))
            and is_side(i.get("height"))
        ),
    )
    findings.add(
        "images without 'id', 'file_name' and positive whole 'width' and 'height'",
        [f"images[{i}]" for i in bad],
    )
    if not records:
        findings.state("no images")
    if len({type(i["id"]) for i in good}) > 1:
        findings.state("image ids are partly numbers, partly strings; Detectron2 must sort them")
    findings.add("image ids used twice", [str(i) for i in _repeated(i["id"] for i in good)])
    return good


def check_files(file_names: list[str], image_root: str, findings: Findings) -> list[str]:
    """That every image's file is in the folder; returns the names of those that are."""
    if not os.path.isdir(image_root):
        findings.state(f"there is no image folder {image_root}")
        return []
    present, leaving, missing = [], [], []
    listings: dict[str, set[str]] = {}
    for file_name in file_names:
        # Behind a link, "link/../x" is not the "x" that it looks like.
        if os.path.isabs(file_name) or ".." in file_name.split("/"):
            leaving.append(file_name)
            continue
        folder, base = os.path.split(os.path.normpath(file_name))
        if folder not in listings:
            # One listing per folder: a stat for every file takes minutes on network drives.
            path = os.path.join(image_root, folder)
            listings[folder] = set(os.listdir(path)) if os.path.isdir(path) else set()
        (present if base in listings[folder] else missing).append(file_name)
    findings.add("file names that leave the image folder ('..', or absolute)", leaving)
    findings.add(f"image files missing from {image_root}", missing)
    return present


def check_annotations(
    records: list[Any], findings: Findings, repeated_ids_tolerated: bool
) -> list[dict]:
    """The annotations with an id, an image and a category, each id once."""
    good, bad = _split_malformed(
        records,
        lambda a: (
            is_id(a.get("id")) and is_id(a.get("image_id")) and type(a.get("category_id")) is int
        ),
    )
    findings.add(
        "annotations without 'id', 'image_id' and an integer 'category_id'",
        [f"annotations[{i}]" for i in bad],
    )
    findings.add(
        "annotation ids used twice",
        [str(i) for i in _repeated(a["id"] for a in good)],
        # COCO's own 2014 minival files have this fault; Detectron2 lets them pass by their name.
        severity=Severity.WARNING if repeated_ids_tolerated else Severity.ERROR,
    )
    findings.add(
        "annotations with id 0",
        [name_annotation(a) for a in good if a["id"] == 0],
        severity=Severity.WARNING,
        consequence="pycocotools scores a detection matched to it as a false positive",
    )
    return good


def check_references(
    annotations: list[dict], images: list[dict], categories: list[dict], findings: Findings
) -> None:
    """That annotations name images and categories that exist."""
    image_ids = {i["id"] for i in images}
    findings.add(
        "annotations of an image that is not in the file",
        [name_annotation(a) for a in annotations if a["image_id"] not in image_ids],
    )
    category_ids = {c["id"] for c in categories}
    findings.add(
        "unknown category ids",
        [
            f"{a['category_id']} in {name_annotation(a)}"
            for a in annotations
            if a["category_id"] not in category_ids
        ],
    )


@dataclass(frozen=True)
class BoxFaults:
    """What is wrong with boxes, at most one of these for each: (A,) bool, A annotations."""

    malformed: np.ndarray
    negative: np.ndarray
    empty: np.ndarray
    outside: np.ndarray
    partly: np.ndarray

    @property
    def any(self) -> np.ndarray:
        """(A,) bool: boxes with a fault."""
        return self.malformed | self.negative | self.empty | self.outside | self.partly


def image_sizes(images: Iterable[dict]) -> Sizes:
    """The sizes that the records of images hold."""
    return {i["id"]: (i["width"], i["height"]) for i in images}


def image_limits(annotations: Sequence[dict], sizes: Sizes) -> np.ndarray:
    """(A, 2): width and height of each annotation's image; endless where it is not in `sizes`."""
    endless = (np.inf, np.inf)
    return np.array([sizes.get(a["image_id"], endless) for a in annotations]).reshape(-1, 2)


def find_box_faults(annotations: Sequence[dict], sizes: Sizes) -> BoxFaults:
    """Boxes as numbers first, then against the size of their image.

    Args:
        annotations: well-formed ones.
        sizes: of `image_sizes`; boxes of other images cannot leave theirs.
    """
    missing = [np.nan] * 4
    rows = [a["bbox"] if is_box(a.get("bbox")) else missing for a in annotations]
    boxes = np.array(rows, dtype=np.float64).reshape(-1, 4)
    limits = image_limits(annotations, sizes)
    finite = np.isfinite(boxes).all(axis=1)
    corner, extent = boxes[:, :2], boxes[:, 2:]
    with np.errstate(invalid="ignore"):
        end = corner + extent
        negative = finite & (extent < 0).any(axis=1)
        empty = finite & ~negative & (extent == 0).any(axis=1)
        sound = finite & ~negative & ~empty
        outside = sound & ((end <= 0) | (corner >= limits)).any(axis=1)
        over = np.maximum(-corner, end - limits).max(axis=1, initial=-np.inf)
        partly = sound & ~outside & (over > EDGE_TOLERANCE_PX)
    return BoxFaults(~finite, negative, empty, outside, partly)


def check_boxes(annotations: list[dict], images: list[dict], findings: Findings) -> None:
    """`find_box_faults` in words; one problem per box."""
    # A box whose image is unknown is already fatal: an endless image keeps it out of the rest.
    faults = find_box_faults(annotations, image_sizes(images))

    def name(row: int) -> str:
        return f"{name_annotation(annotations[row])} {annotations[row].get('bbox')}"

    for kind, mask, severity, consequence in (
        (
            f"boxes that are not four finite numbers up to {LARGEST_PX:,.0f}", faults.malformed,
            Severity.ERROR, "",
        ),
        (
            "boxes of negative size", faults.negative, Severity.ERROR,
            "Detectron2 would mirror them",
        ),
        ("boxes of zero size", faults.empty, Severity.WARNING, "training drops them"),
        (
            "boxes wholly outside the image", faults.outside, Severity.WARNING,
            "training drops them",
        ),
        (
            "boxes partly outside the image", faults.partly, Severity.WARNING,
            "training clips them",
        ),
    ):  # fmt: skip
        rows = np.flatnonzero(mask)
        findings.add_rows(kind, rows, name, severity=severity, consequence=consequence)


def same_file(file_name: str) -> str:
    """One spelling for every name of a file: `a.jpg` for `./a.jpg`."""
    return os.path.normpath(file_name)


def repeated_annotations(annotations: Sequence[dict]) -> list[list[int]]:
    """Positions of annotations with the same image, class and box, in groups of two and more."""
    groups = defaultdict(list)
    for row, a in enumerate(annotations):
        if is_box(a.get("bbox")):
            groups[(a["image_id"], a["category_id"], *a["bbox"])].append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def check_repeats(annotations: list[dict], images: list[dict], findings: Findings) -> None:
    """That no file is listed twice and no object is there twice."""
    findings.add(
        "files listed as several images",
        _repeated(same_file(i["file_name"]) for i in images),
        severity=Severity.WARNING,
        consequence="each entry lacks the objects of the others; a split may part them",
    )
    findings.add(
        "annotations that repeat another one's image, class and box",
        [
            name_annotation(annotations[row])
            for g in repeated_annotations(annotations)
            for row in g[1:]
        ],
        severity=Severity.WARNING,
    )


def name_annotation(annotation: dict) -> str:
    """How a report names an annotation."""
    return f"annotation {annotation['id']} (image {annotation['image_id']})"
