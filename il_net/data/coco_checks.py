"""Checks of the records of a COCO file, one function for each kind of record or relation.

Every function adds what it finds to ``Findings``; those that take records as they are return the
well-formed ones. Boxes are COCO's: (x, y, width, height) in pixels of the stored image.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .report import Findings

EDGE_TOLERANCE_PX = 1.0
NUMBERS = frozenset((int, float))


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


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _is_side(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


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
    """The images with an id, a file name and sides in pixels, each id once."""
    good, bad = _split_malformed(
        records,
        lambda i: (
            _is_id(i.get("id"))
            and isinstance(i.get("file_name"), str)
            and _is_side(i.get("width"))
            and _is_side(i.get("height"))
        ),
    )
    findings.add(
        "images without 'id', 'file_name' and positive 'width' and 'height'",
        [f"images[{i}]" for i in bad],
    )
    if not records:
        findings.state("no images")
    if len({type(i["id"]) for i in good}) > 1:
        findings.state("image ids are partly numbers, partly strings; Detectron2 must sort them")
    findings.add("image ids used twice", [str(i) for i in _repeated(i["id"] for i in good)])
    return good


def check_files(file_names: list[str], image_root: str, findings: Findings) -> None:
    """That every image's file is in the folder."""
    if not os.path.isdir(image_root):
        findings.state(f"there is no image folder {image_root}")
        return
    leaving, missing = [], []
    listings: dict[str, set[str]] = {}
    for file_name in file_names:
        folder, base = os.path.split(os.path.normpath(file_name))
        if os.path.isabs(file_name) or f"{folder}/".startswith("../"):
            leaving.append(file_name)
            continue
        if folder not in listings:
            # One listing per folder: a stat for every file takes minutes on network drives.
            path = os.path.join(image_root, folder)
            listings[folder] = set(os.listdir(path)) if os.path.isdir(path) else set()
        if base not in listings[folder]:
            missing.append(file_name)
    findings.add("file names that leave the image folder", leaving)
    findings.add(f"image files missing from {image_root}", missing)


def check_annotations(
    records: list[Any], findings: Findings, repeated_ids_tolerated: bool
) -> list[dict]:
    """The annotations with an id, an image and a category, each id once."""
    good, bad = _split_malformed(
        records,
        lambda a: (
            _is_id(a.get("id")) and _is_id(a.get("image_id")) and type(a.get("category_id")) is int
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
        fatal=not repeated_ids_tolerated,
    )
    findings.add(
        "annotations with id 0",
        [name_annotation(a) for a in good if a["id"] == 0],
        fatal=False,
        consequence="pycocotools scores a detection matched to it as a false positive",
    )
    findings.add(
        "annotations with 'ignore' set, which Detectron2 refuses",
        [name_annotation(a) for a in good if a.get("ignore", 0)],
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


def check_boxes(annotations: list[dict], images: list[dict], findings: Findings) -> None:
    """Boxes as numbers first, then against the size of their image; one problem per box."""
    rows = [a for a in annotations if _is_box(a.get("bbox"))]
    boxes = np.array([a["bbox"] for a in rows], dtype=np.float64).reshape(-1, 4)
    finite = np.isfinite(boxes).all(axis=1)
    bad = [a for a in annotations if not _is_box(a.get("bbox"))]
    bad += [rows[i] for i in np.flatnonzero(~finite)]
    findings.add("boxes that are not four finite numbers", [_name_box(a) for a in bad])

    sizes = {i["id"]: (i["width"], i["height"]) for i in images}
    # A box whose image is unknown is already fatal: an endless image keeps it out of the rest.
    endless = (np.inf, np.inf)
    limits = np.array([sizes.get(a["image_id"], endless) for a in rows]).reshape(-1, 2)
    corner, extent = boxes[:, :2], boxes[:, 2:]
    with np.errstate(invalid="ignore"):
        end = corner + extent
        negative = finite & (extent < 0).any(axis=1)
        empty = finite & ~negative & (extent == 0).any(axis=1)
        sound = finite & ~negative & ~empty
        outside = sound & ((end <= 0) | (corner >= limits)).any(axis=1)
        over = np.maximum(-corner, end - limits).max(axis=1, initial=-np.inf)
        partly = sound & ~outside & (over > EDGE_TOLERANCE_PX)

    def name(row: int) -> str:
        return _name_box(rows[row])

    for kind, mask, consequence in (
        ("boxes of negative size", negative, "Detectron2 would mirror them"),
        ("boxes of zero size", empty, "training drops them"),
        ("boxes wholly outside the image", outside, "training drops them"),
        ("boxes partly outside the image", partly, "training clips them"),
    ):
        fatal = mask is negative
        findings.add_rows(kind, np.flatnonzero(mask), name, fatal=fatal, consequence=consequence)


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and NUMBERS.issuperset(map(type, box))


def name_annotation(annotation: dict) -> str:
    """How a report names an annotation."""
    return f"annotation {annotation['id']} (image {annotation['image_id']})"


def _name_box(annotation: dict) -> str:
    return f"{name_annotation(annotation)} {annotation.get('bbox')}"
