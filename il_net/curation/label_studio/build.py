"""COCO's records from the chosen annotations of pictures: sizes checked, shapes mended, measured.

Boxes and polygons are in pixels of the upright picture, rounded to 1/100.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..image_checks import probe_picture
from ..polygons import clip_polygon, polygon_area, polygon_box, without_repeats
from .images import ImageFolder
from .records import Account, Choices, LabeledPicture, Region, quoted

_DECIMALS = 2
# A picture that was resized keeps the ratio of its sides, up to rounding to whole pixels.
_SAME_RATIO = 0.02
# Less than a pixel is a slip of the mouse.
_SMALLEST_PX = 1.0


def build_records(
    pictures: Mapping[str, Sequence[LabeledPicture]],
    table: Mapping[str, int],
    folder: ImageFolder,
    choices: Choices,
    account: Account,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """COCO's images and annotations.

    The id of an image is that of its task, where the export has them, so that labelling more
    pictures changes no id; else images count from 1. Annotations count from 1.

    Args:
        pictures: annotations to use, by file name below the folder.
        table: class ids by name, with every label.
    """
    outlines = any(
        not region.is_upright
        for items in pictures.values()
        for item in items
        for region in item.regions
    )
    ids = _image_ids(pictures)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for file_name, items in pictures.items():
        size = _upright_size(file_name, items, folder, account)
        if size is None:
            continue
        before = account.num_changes
        found = _annotations(file_name, items, size, table, outlines, choices, account)
        if not found and (account.num_changes > before or any(item.lost for item in items)):
            # As a picture of nothing it would teach that what is there is background.
            account.change("pictures of which no region is usable", "left out", quoted(file_name))
            continue
        image_id = ids[file_name]
        width, height = size
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for record in found:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **record})
    return images, annotations


def _image_ids(pictures: Mapping[str, Sequence[LabeledPicture]]) -> dict[str, int]:
    tasks = [items[0].task for items in pictures.values()]
    usable = all(type(task) is int and task > 0 for task in tasks)
    ids = tasks if usable and len(set(tasks)) == len(tasks) else range(1, len(tasks) + 1)
    return dict(zip(pictures, ids, strict=True))


def _upright_size(
    file_name: str, items: Sequence[LabeledPicture], folder: ImageFolder, account: Account
) -> tuple[int, int] | None:
    """Width and height of the file; None, and told, if it is not the picture that was labelled."""
    name = quoted(file_name)
    picture = probe_picture(folder.path(file_name), pixels=False)
    size = picture.size
    if size is None:
        account.change("pictures that can't be read", "left out", f"{name} ({picture.fault})")
        return None
    labelled = next((item.size for item in items if item.size), size)
    if labelled == size:
        return size
    name = f"{name} ({size[0]} x {size[1]}, labelled as {labelled[0]:g} x {labelled[1]:g})"
    ratio = (size[0] / size[1]) / (labelled[0] / labelled[1])
    if labelled == size[::-1]:
        account.change(
            "pictures whose width and height are swapped in the export, as of photos stored turned",
            "taken as labelled upright",
            name,
        )
    elif abs(ratio - 1) < _SAME_RATIO:
        account.change(
            "pictures of another size than when they were labelled", "regions scaled", name
        )
    else:
        account.change("files of another shape than the labelled picture", "left out", name)
        return None
    return size


def _annotations(
    file_name: str,
    items: Sequence[LabeledPicture],
    size: tuple[int, int],
    table: Mapping[str, int],
    outlines: bool,
    choices: Choices,
    account: Account,
) -> list[dict[str, Any]]:
    """The records of one picture, without ids."""
    found: dict[tuple, dict[str, Any]] = {}
    for region in (region for item in items for region in item.regions):
        name = f"{region.name} in {quoted(file_name)}"
        labels = choices.labels_of(region)
        if not labels:
            if region.labels:
                account.note("regions with labels of --ignore-labels, left out")
            else:
                account.change("regions without a label", "left out", name)
            continue
        if len(choices.wanted_labels(region)) > len(labels):
            account.change("regions with several labels", "the first is used", name)
        parts = _mended(region, size, name, account)
        if not parts:
            continue
        box = [round(side, _DECIMALS) for side in polygon_box(parts)]
        rings = [ring.ravel().tolist() for ring in parts] if outlines else []
        if outlines and region.is_upright:
            account.note("rectangles given an outline of four corners, as other regions have one")
        record = {
            "bbox": box,
            # In whole hundredths of a pixel the sum is exact, so the same on every machine.
            "area": round(polygon_area([np.rint(r * 100) for r in parts]) / 1e4, _DECIMALS),
            "segmentation": rings,
            "iscrowd": 0,
        }
        shape = (*box, *map(tuple, rings))
        for label in labels:
            if (label, shape) in found:
                account.change("regions drawn twice", "one is used", name)
            found[label, shape] = {"category_id": table[label], **record}
    return list(found.values())


def _mended(region: Region, size: tuple[int, int], name: str, account: Account) -> list[np.ndarray]:
    """The rings of a region inside its picture; none, and told, if nothing is left of it."""
    parts, repeats, outside, crossing = [], False, False, False
    for ring in region.outline(*size):
        repeats |= len(without_repeats(ring)) < len(ring)
        # Before cutting: 100 percent and a rounding error must not count as outside.
        ring = without_repeats(ring.round(_DECIMALS) + 0.0)  # + 0.0: no -0.0
        clipped = clip_polygon(ring, *size)
        beyond = len(ring) > 0 and bool(ring.min() < 0 or (ring.max(axis=0) > size).any())
        outside |= beyond
        crossing |= not beyond and not (len(clipped) == 1 and np.array_equal(clipped[0], ring))
        rounded = (part.round(_DECIMALS) + 0.0 for part in clipped)
        parts += [part for part in rounded if polygon_area([part]) > 0]
    if sum(polygon_area([part]) for part in parts) < _SMALLEST_PX:
        kind = "regions of less than a pixel, or with fewer than three points, in their picture"
        account.change(kind, "left out", name)
        return []
    if repeats:
        account.change("outlines with repeated points", "one of each kept", name)
    if outside:
        account.change("regions that reach out of their picture", "cut off", name)
    if crossing:
        account.change("outlines that cross themselves", "mended", name)
    return parts
