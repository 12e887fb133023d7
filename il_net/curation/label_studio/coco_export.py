"""Reading the COCO file that Label Studio exports, with what is known to be wrong in it.

Its ids start at 0, pictures that two people labelled are there twice, rectangles have no outline,
and for photos that a camera stored turned, width and height are swapped. What the export itself
lost cannot come back: versions of 2022 cut rectangles down to whole pixels and forgot their
rotation. Label Studio's own JSON has everything.
"""

from collections import defaultdict
from typing import Any

import numpy as np

from ...data.coco_checks import name_annotation
from .records import Account, LabeledPicture, Region, fractions, quoted


def read_coco_export(
    data: dict[str, Any], source: str, account: Account
) -> tuple[list[LabeledPicture], dict[str, int]]:
    """The pictures of an export with their regions, and its class ids by name.

    Args:
        data: the parsed file.
        source: its name, for messages.

    Raises:
        ValueError: a record of the wrong type; names the file and the position.
    """
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            raise ValueError(f"{source}: '{key}' must be a list, found {quoted(data.get(key))}")
    table = read_categories(data["categories"], source)
    names = {category_id: name for name, category_id in table.items()}
    images = {}
    for i, image in enumerate(data["images"]):
        if not (isinstance(image, dict) and isinstance(image.get("file_name"), str)):
            raise ValueError(f"{source}: images[{i}] must be an object with a 'file_name'")
        if type(image.get("id")) is not int or image["id"] in images:
            raise ValueError(
                f"{source}: images[{i}] must have a whole number as 'id' that no other image has, "
                f"found {quoted(image.get('id'))}"
            )
        images[image["id"]] = image
    regions: dict[int, list[Region]] = defaultdict(list)
    lost = set()
    for i, annotation in enumerate(data["annotations"]):
        where = f"{source}: annotations[{i}]"
        if not isinstance(annotation, dict):
            raise ValueError(f"{where} must be an object, found {quoted(annotation)}")
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        if type(image_id) is not int or type(category_id) is not int:
            raise ValueError(f"{where} must have whole numbers as 'image_id' and 'category_id'")
        if category_id not in names:
            raise ValueError(f"{where} has category_id {category_id}, which 'categories' lacks")
        region = _read_region(annotation, names[category_id], images.get(image_id), account)
        if region is None:
            lost.add(image_id)
        else:
            regions[image_id].append(region)
    _note_ids(images, data["annotations"], account)
    return [
        LabeledPicture(
            task=None,
            references=(image["file_name"],),
            regions=tuple(regions[image_id]),
            size=_size(image),
            # Nothing tells what is best: the later, unless somebody has not labelled it yet.
            rank=(bool(regions[image_id]), image_id),
            lost=image_id in lost,
        )
        for image_id, image in sorted(images.items())
    ], table


def read_categories(records: list[Any], source: str) -> dict[str, int]:
    """Class ids by name, from COCO's list of categories.

    Raises:
        ValueError: a record without id and name, or an id or name used twice.
    """
    table: dict[str, int] = {}
    for i, record in enumerate(records):
        record = record if isinstance(record, dict) else {}
        name, category_id = record.get("name"), record.get("id")
        if type(category_id) is not int or not isinstance(name, str):
            raise ValueError(f"{source}: categories[{i}] must have an integer 'id' and a 'name'")
        if name in table or category_id in table.values():
            raise ValueError(
                f"{source}: categories[{i}] repeats the id or the name of another: {category_id}, "
                f"{quoted(name)}"
            )
        table[name] = category_id
    return table


def _read_region(
    annotation: dict, label: str, image: dict | None, account: Account
) -> Region | None:
    """An annotation as a region; None, and told, if it is not to be used."""
    name = name_annotation({"id": quoted(annotation.get("id")), "image_id": annotation["image_id"]})
    if image is None:
        account.change("annotations of a picture that is not in the file", "left out", name)
        return None
    if annotation.get("iscrowd") or annotation.get("ignore"):
        account.change("annotations with 'iscrowd' or 'ignore'", "left out", name)
        return None
    size = _size(image)
    if size is None:
        account.change("annotations of a picture without a size", "left out", name)
        return None
    segmentation = annotation.get("segmentation") or []
    if segmentation:
        rings = [_ring(ring, size) for ring in _rings(segmentation)]
        sound = bool(rings) and all(ring is not None for ring in rings)
        region = Region(name, (label,), rings=tuple(rings)) if sound else None
    else:
        region = _rectangle(annotation.get("bbox"), size, name, label)
    if region is None:
        account.change("annotations without usable coordinates", "left out", name)
    elif not annotation.get("area"):
        account.change("annotations without an area", "measured", name)
    return region


def _rings(segmentation: Any) -> list[Any]:
    return segmentation if isinstance(segmentation, list) else []


def _ring(numbers: Any, size: tuple[float, float]) -> np.ndarray | None:
    """COCO's x, y, x, y, ... as fractions of the picture."""
    if not isinstance(numbers, list) or len(numbers) % 2:
        return None
    return fractions([numbers[i : i + 2] for i in range(0, len(numbers), 2)], size)


def _rectangle(box: Any, size: tuple[float, float], name: str, label: str) -> Region | None:
    if not isinstance(box, list) or len(box) != 4:
        return None
    sides = _ring(box, size)
    return None if sides is None else Region(name, (label,), rectangle=(*sides.ravel().tolist(), 0))


def _size(image: dict) -> tuple[float, float] | None:
    size = (image.get("width"), image.get("height"))
    return size if all(type(side) in (int, float) and 0 < side < 1e9 for side in size) else None


def _note_ids(images: dict[int, dict], annotations: list[dict], account: Account) -> None:
    if any(annotation.get("id") == 0 for annotation in annotations):
        account.note("annotation with id 0, which pycocotools never counts as found; now from 1")
    used = {annotation["image_id"] for annotation in annotations}
    empty = sum(image_id not in used for image_id in images)
    if empty:
        account.note("pictures without regions, which may be unlabelled or empty; kept", empty)
