"""Detectron2's dataset dicts of a COCO file that has been parsed already.

The records are those of its `load_coco_json`, which would parse the file once more and index what
training never asks for.
"""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

logger = logging.getLogger(__name__)

_KEPT = ("iscrowd", "bbox", "keypoints", "category_id")
# Three points.
_SMALLEST_POLYGON = 6
_NUM_NAMED = 5


def coco_records(
    data: dict[str, Any], json_file: str, image_root: str, to_contiguous: Mapping[int, int]
) -> list[dict[str, Any]]:
    """The records of all images, sorted by id, with their annotations in the order of the file.

    Annotations whose polygons all have less than three points are left out, those without any
    segmentation are not. Keypoints move by half a pixel, from pixels to coordinates.

    Args:
        data: of `read_coco_json`. Its lists become parts of the records.
        json_file: where it is from, for messages.
        image_root: the folder that file names are relative to.
        to_contiguous: the model's class by the file's category id.

    Raises:
        ValueError: annotations that Detectron2 refuses: an id used twice, `ignore` set, an empty
            box; a category id that is not in `to_contiguous`. Names the file and the image.
    """
    by_image = defaultdict(list)
    for annotation in data.get("annotations", ()):
        by_image[annotation["image_id"]].append(annotation)
    images = {image["id"]: image for image in data.get("images", ())}
    _check_annotation_ids(by_image, images, json_file)
    records, dropped = [], 0
    for image_id in sorted(images):
        image = images[image_id]
        found = by_image.get(image_id, ())
        try:
            objects = [_object(annotation, to_contiguous) for annotation in found]
        except ValueError as error:
            raise ValueError(f"{json_file}: an annotation of image {image_id} {error}") from error
        kept = [obj for obj in objects if obj is not None]
        dropped += len(objects) - len(kept)
        records.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": int(image["height"]),  # some programs write 480.0
                "width": int(image["width"]),
                "image_id": image_id,
                "annotations": kept,
            }
        )
    if dropped:
        logger.warning(
            "%s: %d annotations are left out, whose polygons have less than three points",
            *(json_file, dropped),
        )
    logger.info("%d images of %s", len(records), json_file)
    return records


def _check_annotation_ids(
    by_image: Mapping[Any, list[dict[str, Any]]], images: Mapping[Any, Any], json_file: str
) -> None:
    lost = sum(len(found) for image_id, found in by_image.items() if image_id not in images)
    if lost:
        logger.warning("%s: %d annotations are of images that it does not have", json_file, lost)
    # COCO's own 2014 minival files use ids twice; Detectron2 lets them pass by their name.
    if "minival" in json_file:
        return
    ids = [a["id"] for image_id in images for a in by_image.get(image_id, ())]
    if len(set(ids)) < len(ids):
        twice = [i for i, count in Counter(ids).items() if count > 1]
        raise ValueError(
            f"{json_file}: {len(twice)} annotation ids are used twice: {twice[:_NUM_NAMED]}"
        )


def _object(annotation: dict[str, Any], to_contiguous: Mapping[int, int]) -> dict[str, Any] | None:
    """What training reads of an annotation; None if it is left out."""
    if annotation.get("ignore", 0):
        raise ValueError("has 'ignore' set, which Detectron2 refuses")
    if "bbox" in annotation and not annotation["bbox"]:
        raise ValueError("has an empty 'bbox'")
    obj = {key: annotation[key] for key in _KEPT if key in annotation}
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict) and segmentation:
        if isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
    elif segmentation:
        segmentation = [p for p in segmentation if len(p) >= _SMALLEST_POLYGON and not len(p) % 2]
        if not segmentation:
            return None
    if segmentation:
        obj["segmentation"] = segmentation
    if obj.get("keypoints"):
        # x, y, visibility of each; the box' coordinates begin at the corner of the first pixel.
        obj["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(obj["keypoints"])]
    obj["bbox_mode"] = BoxMode.XYWH_ABS
    category_id = annotation.get("category_id")
    if category_id not in to_contiguous:
        raise ValueError(f"has category_id {category_id}, known are {sorted(to_contiguous)}")
    obj["category_id"] = to_contiguous[category_id]
    return obj
