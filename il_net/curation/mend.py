"""Mends what can be mended safely in a COCO file, and counts what it did.

Safely: where the file and its images leave no doubt. What is doubtful stays as it is, for another
inspection to report: sizes that may mean other coordinates, missing files, unknown categories, ids
that stand for several images, several entries of one file with objects each or of different size,
boxes of negative size. Coordinates are pixels of the upright image.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ..data.coco_checks import (
    EDGE_TOLERANCE_PX,
    Sizes,
    find_box_faults,
    image_sizes,
    repeated_annotations,
    same_file,
)
from ..data.coco_file import LISTS
from ..data.coco_values import has_file_name, is_area, is_box, is_id, is_polygon, is_side
from ..data.masks import read_rle
from .image_checks import Picture, Pictures, picture_of
from .polygon_checks import draw_outline, find_outline_faults
from .polygons import clip_polygon, polygon_area, polygon_box

_SCALE_TOLERANCE = 0.01


def mend(data: Mapping[str, Any], pictures: Pictures) -> tuple[dict[str, Any], list[str]]:
    """A mended copy of a COCO file.

    Args:
        data: of `read_coco_json`; not changed.
        pictures: of its image files, as in `Inspection`.

    Returns:
        the copy, whose other entries are those of `data`, and what was done, a line for each kind.

    Raises:
        ValueError: one of the three lists is missing or is none.
    """
    # Files without labels may do without the other two.
    for key, value in {"images": None, "annotations": [], **data}.items():
        if key in LISTS and not isinstance(value, list):
            raise ValueError(f"a COCO file has a list '{key}'; this one can't be mended")
    done: Counter[str] = Counter()
    records = data.get("annotations", [])
    owners = (a.get("image_id") for a in records if isinstance(a, dict))
    annotated = {owner for owner in owners if is_id(owner)}
    images, merged = _mend_images(data["images"], annotated, pictures, done)
    annotations = _mend_references(records, images, merged, done)
    _set_sizes(images, annotations, pictures, done)
    sizes = _trusted_sizes(images, pictures)
    annotations = _mend_outlines(annotations, sizes, done)
    annotations = _mend_boxes(annotations, sizes, done)
    _fill(annotations, sizes, done)
    annotations = _drop_repeats(annotations, done)
    _renumber(annotations, done)
    lines = [f"{count} {what}" for what, count in done.items() if count]
    return {**data, "images": images, "annotations": annotations}, lines


def _mend_images(
    records: list[Any], annotated: set[int | str], pictures: Pictures, done: Counter[str]
) -> tuple[list[dict], dict[int | str, int | str]]:
    """The images, entries of a file merged where that is safe; for ids that are gone the new."""
    files_of_id = defaultdict(set)
    for image in records:
        if _is_listed(image):
            files_of_id[image["id"]].add(same_file(image["file_name"]))
    annotated = set(annotated)
    kept, merged = [], {}
    entries: dict[str, list[dict]] = defaultdict(list)
    for image in records:
        if not isinstance(image, dict):
            done["images that are no JSON objects: dropped"] += 1
        # Whose annotations these are nobody can tell.
        elif not _is_listed(image) or len(files_of_id[image["id"]]) > 1:
            kept.append(dict(image))
        elif pictures.get(same_file(image["file_name"]), Picture(None)).is_broken:
            done["images that are broken: dropped with their annotations"] += 1
        else:
            own = entries[same_file(image["file_name"])]
            other = next((o for o in own if _is_same_work(image, o, annotated)), None)
            if other is None:
                own.append(image)
                kept.append(dict(image))
                continue
            merged[image["id"]] = other["id"]
            if image["id"] in annotated:
                annotated.add(other["id"])
            done["images listed again: merged with the first entry of their file"] += 1
    return kept, merged


def _is_same_work(image: dict, other: dict, annotated: set[int | str]) -> bool:
    """Whether two entries of a file are of one size, and at most one of them has objects.

    Boxes of another size would have to be scaled, and objects of two entries may be two people's
    view of the same ones.
    """
    if any(image.get(side) != other.get(side) for side in ("width", "height")):
        return False
    return image["id"] == other["id"] or not {image["id"], other["id"]} <= annotated


def _is_listed(image: Any) -> bool:
    return has_file_name(image) and is_id(image.get("id"))


def _mend_references(
    records: list[Any],
    images: list[dict],
    merged: Mapping[int | str, int | str],
    done: Counter[str],
) -> list[dict]:
    """The annotations of images that are there."""
    ids = {image["id"] for image in images if is_id(image.get("id"))}
    kept = []
    for a in records:
        image_id = a.get("image_id") if isinstance(a, dict) else None
        image_id = merged.get(image_id, image_id) if is_id(image_id) else None
        if image_id in ids:
            kept.append({**a, "image_id": image_id})
        else:
            done["annotations of images that are not in the file: dropped"] += 1
    return kept


def _set_sizes(
    images: list[dict], annotations: list[dict], pictures: Pictures, done: Counter[str]
) -> None:
    """Take sizes from the files, unless the coordinates may belong to the recorded size."""
    ends: dict[int | str, np.ndarray] = {}
    for a in annotations:
        if is_box(a.get("bbox")):
            end = np.add(a["bbox"][:2], a["bbox"][2:])
            ends[a["image_id"]] = np.fmax(ends.get(a["image_id"], end), end)
    for image in images:
        picture = picture_of(image, pictures) if _is_listed(image) else None
        if picture is None or (image.get("width"), image.get("height")) == picture.size:
            continue
        if _is_sized(image) and image["id"] in ends:
            end = ends[image["id"]]
            fits = bool((end <= np.add(picture.size, EDGE_TOLERANCE_PX)).all())
            if not fits or _is_other_view(image, picture):
                continue
        image["width"], image["height"] = picture.size
        done["image sizes set to those of the files"] += 1


def _is_sized(image: dict) -> bool:
    return is_side(image.get("width")) and is_side(image.get("height"))


def _is_other_view(image: dict, picture: Picture) -> bool:
    """Whether the recorded size is that before EXIF rotation, or of a resized copy."""
    scales = np.divide((image["width"], image["height"]), picture.size)
    resized = abs(scales[0] / scales[1] - 1) < _SCALE_TOLERANCE < np.abs(scales - 1).max()
    return resized or picture.stored != picture.size


def _trusted_sizes(images: list[dict], pictures: Pictures) -> Sizes:
    """Sizes to cut annotations to: not those that contradict their file."""
    sized = [image for image in images if _is_listed(image) and _is_sized(image)]
    trusted = []
    for image in sized:
        picture = picture_of(image, pictures)
        if picture is None or (image["width"], image["height"]) == picture.size:
            trusted.append(image)
    return image_sizes(trusted)


def _mend_outlines(annotations: list[dict], sizes: Sizes, done: Counter[str]) -> list[dict]:
    """Polygons in lists, inside their image, with an area; objects without any are dropped."""
    for a in annotations:
        outline = a.get("segmentation")
        if isinstance(outline, list) and outline and is_polygon(outline):
            a["segmentation"] = [outline]
            done["polygons put into a list"] += 1
    faults = find_outline_faults(annotations, sizes)
    dropped = set()
    for row in np.flatnonzero(faults.malformed | faults.short | faults.empty | faults.outside):
        a = annotations[row]
        if not isinstance(a["segmentation"], list):
            continue  # an RLE, or nothing that could be told
        width, height = sizes.get(a["image_id"], (None, None))
        rings = _cut(a["segmentation"], width, height)
        if rings:
            a["segmentation"] = [ring.ravel().tolist() for ring in rings]
            a["bbox"], a["area"] = list(polygon_box(rings)), None
            done["outlines cut to the image, or freed of parts without area"] += 1
        else:
            dropped.add(row)
            done["objects whose outline has no area in the image: dropped"] += 1
    return [a for row, a in enumerate(annotations) if row not in dropped]


def _cut(polygons: list[Any], width: float | None, height: float | None) -> list[np.ndarray]:
    """What is inside the image, or everything where that is not known, of well-formed polygons."""
    rings = []
    for polygon in polygons:
        if not is_polygon(polygon) or len(polygon) % 2 or len(polygon) < 6:
            continue
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        shift = np.zeros(2) if width else points.min(axis=0)
        limits = (width, height) if width else points.max(axis=0) - shift
        rings += [ring + shift for ring in clip_polygon(points - shift, *limits)]
    return rings


def _mend_boxes(annotations: list[dict], sizes: Sizes, done: Counter[str]) -> list[dict]:
    """Boxes inside their image, from the outline where there is one; what has none is dropped."""
    faults = find_box_faults(annotations, sizes)
    dropped = set()
    for row in np.flatnonzero(faults.any):
        a = annotations[row]
        outline = a.get("segmentation")
        if isinstance(outline, list) and outline and all(map(is_polygon, outline)):
            a["bbox"] = list(polygon_box([np.reshape(ring, (-1, 2)) for ring in outline]))
            done["boxes set to those of the outlines"] += 1
        elif outline or faults.negative[row]:
            continue
        elif faults.partly[row]:
            x, y, width, height = a["bbox"]
            right, bottom = np.minimum((x + width, y + height), sizes[a["image_id"]]).tolist()
            x, y = max(x, 0), max(y, 0)
            a["bbox"], a["area"] = [x, y, right - x, bottom - y], None
            done["boxes cut to the image"] += 1
        else:
            dropped.add(row)
            done["objects whose box has no area in the image: dropped"] += 1
    return [a for row, a in enumerate(annotations) if row not in dropped]


def _fill(annotations: list[dict], sizes: Sizes, done: Counter[str]) -> None:
    """`area` where it is missing, none or wrong, and `iscrowd`."""
    wrong = find_outline_faults(annotations, sizes).area
    for row, a in enumerate(annotations):
        area = a.get("area")
        if wrong[row] or not is_area(area) or area <= 0:
            area = _area(a, sizes.get(a["image_id"]))
            if area:
                a["area"] = area
                done["areas set to those of the outlines or boxes"] += 1
        if "iscrowd" not in a:
            a["iscrowd"] = 0
            done["'iscrowd' set to 0"] += 1


def _area(annotation: dict, size: tuple[float, float] | None) -> float:
    """Of the outline, else of the box; 0 where neither has one."""
    outline = annotation.get("segmentation")
    if isinstance(outline, dict):
        mask = read_rle(outline)
        return 0.0 if mask is None else float(coco_mask.area(mask))
    if not outline:
        box = annotation.get("bbox")
        return float(box[2] * box[3]) if is_box(box) and min(box[2:]) > 0 else 0.0
    if not isinstance(outline, list):
        return 0.0
    # Parts may overlap, which is counted once.
    if len(outline) > 1 and size is not None and all(map(is_polygon, outline)):
        return draw_outline(outline, *size)[0]
    return polygon_area(_cut(outline, None, None))


def _drop_repeats(annotations: list[dict], done: Counter[str]) -> list[dict]:
    """One of the annotations with the same image, class, box, outline and `iscrowd`."""
    dropped = set()
    well_formed = [a for a in annotations if type(a.get("category_id")) is int]
    for rows in repeated_annotations(well_formed):
        seen = set()
        for row in rows:
            a = well_formed[row]
            content = json.dumps([a.get("segmentation") or [], a["iscrowd"]])
            if content in seen:
                dropped.add(id(a))
            seen.add(content)
    done["annotations that repeat another one: dropped"] += len(dropped)
    return [a for a in annotations if id(a) not in dropped]


def _renumber(annotations: list[dict], done: Counter[str]) -> None:
    """Ids from 1, if any is 0, missing or there twice."""
    ids = [a.get("id") for a in annotations]
    sound = all(map(is_id, ids)) and 0 not in ids and len(set(ids)) == len(ids)
    if sound:
        return
    for number, a in enumerate(annotations, start=1):
        a["id"] = number
    done["annotations numbered anew, from 1"] += len(annotations)
