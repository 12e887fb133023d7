"""Truth and predictions of a set of images, read from COCO files and put side by side.

Predictions are a COCO results list (``coco_instances_results.json`` of an evaluation), which uses
the ids of the truth, or a COCO document whose annotations have a ``score`` (``detections.json`` of
``tools/predict.py``), which has ids of its own: its images are found in the truth by file name, its
classes by name.

Shape shorthand: N objects of one image.
"""

import logging
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.coco_checks import name_annotation
from ..data.coco_file import check_lists, read_coco, read_json
from ..data.coco_values import NUMBERS
from ..data.masks import Rle, to_rle
from ..data.report import Findings
from ..data.sound_coco import check_sound
from .file_names import match_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Objects:
    """The objects of one image, in its pixels.

    Attributes:
        classes: (N,) int64, positions in the class list.
        shapes: (N, 4) float64 boxes x, y, width, height; or N masks as compressed run lengths.
        scores: (N,) float64; 1 for truth.
        crowd: (N,) bool, COCO's ``iscrowd``; False for predictions.
    """

    classes: np.ndarray
    shapes: np.ndarray | list[Rle]
    scores: np.ndarray
    crowd: np.ndarray

    def select(self, keep: np.ndarray) -> "Objects":
        """The objects that (N,) bool ``keep`` names."""
        shapes = self.shapes
        if isinstance(shapes, list):
            shapes = [shapes[i] for i in np.flatnonzero(keep)]
        else:
            shapes = shapes[keep]
        return Objects(self.classes[keep], shapes, self.scores[keep], self.crowd[keep])


@dataclass(frozen=True)
class LabeledImage:
    """An image of a COCO file with its objects; sides in pixels."""

    image_id: int | str
    file_name: str
    height: int
    width: int
    objects: Objects


@dataclass(frozen=True)
class Labels:
    """Class names and images of a file, in its order; ``category_ids`` are those of the names."""

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[LabeledImage, ...]


def read_truth(json_file: str | Path, *, masks: bool) -> Labels:
    """The labels of a COCO file, classes sorted by category id; see :func:`parse_truth`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no sound COCO file.
    """
    return parse_truth(read_coco(json_file), str(json_file), masks=masks)


def parse_truth(data: dict[str, Any], source: str, *, masks: bool) -> Labels:
    """The labels of a COCO document.

    Args:
        data: the lists ``images``, ``annotations`` and ``categories``.
        source: where it comes from, for messages.
        masks: take masks as shapes instead of boxes.

    Raises:
        ValueError: a record is malformed, or has no mask though masks are wanted.
    """
    return _parse(data, source, masks, scored=False)


def read_predictions(json_file: str | Path, truth: Labels | None, *, masks: bool) -> Labels:
    """The predictions of a results list or of a document; see :func:`parse_predictions`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, is malformed or does not fit the truth.
    """
    data = read_json(json_file)
    if isinstance(data, dict):
        check_lists(data, str(json_file))
    elif not isinstance(data, list):
        raise ValueError(
            f"{json_file} holds a JSON {type(data).__name__}; predictions are a COCO results list, "
            "or a COCO file with scores"
        )
    return parse_predictions(data, str(json_file), truth, masks=masks)


def parse_predictions(
    data: dict[str, Any] | list[Any], source: str, truth: Labels | None, *, masks: bool
) -> Labels:
    """Predictions in the order of the truth's images, with classes numbered as there.

    Args:
        data: a COCO document with scores, or a results list.
        source: where it comes from, for messages.
        truth: None reads a document by itself.
        masks: take masks as shapes instead of boxes.

    Returns:
        Every image of the truth, also those without predictions. Classes that only a document has
        follow those of the truth.

    Raises:
        ValueError: malformed records, no masks though they are wanted, images or categories that
            the truth lacks (of a document: no image in common), a picture of another size, a
            results list without truth, whose names it needs.
    """
    if isinstance(data, list):
        if truth is None:
            raise ValueError(
                f"{source} is a COCO results list, which has no class and file names; give the "
                "truth as well, or detections.json of tools/predict.py"
            )
        return _parse(_as_document(data, truth), source, masks, scored=True)
    found = _parse(data, source, masks, scored=True)
    return found if truth is None else _align(found, truth, source)


def _as_document(results: list[Any], truth: Labels) -> dict[str, Any]:
    """A results list with the images and categories of the truth; ids are positions from 1."""
    images = [
        {"id": i.image_id, "file_name": i.file_name, "height": i.height, "width": i.width}
        for i in truth.images
    ]
    named = zip(truth.category_ids, truth.classes, strict=True)
    return {
        "images": images,
        "annotations": [
            {**record, "id": position} if isinstance(record, dict) else record
            for position, record in enumerate(results, start=1)
        ],
        "categories": [{"id": category_id, "name": name} for category_id, name in named],
    }


def _parse(data: dict[str, Any], source: str, masks: bool, *, scored: bool) -> Labels:
    check_sound(data, source, boxes=True)
    if scored:
        findings = Findings()
        findings.add(
            "detections without a 'score' from 0 to 1 (is this a truth file?)",
            [name_annotation(a) for a in data["annotations"] if not _is_score(a.get("score"))],
        )
        findings.raise_fatal(source)
    categories = sorted(data["categories"], key=lambda category: category["id"])
    class_of = {category["id"]: i for i, category in enumerate(categories)}
    by_image = defaultdict(list)
    for annotation in data["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    return Labels(
        tuple(category["name"] for category in categories),
        tuple(class_of),
        tuple(
            LabeledImage(
                *(image[key] for key in ("id", "file_name", "height", "width")),
                _objects(by_image.pop(image["id"], []), class_of, image, source, masks, scored),
            )
            for image in data["images"]
        ),
    )


def _is_score(value: Any) -> bool:
    return type(value) in NUMBERS and 0 <= value <= 1


def _objects(
    annotations: list[dict],
    class_of: dict[int, int],
    image: dict,
    source: str,
    masks: bool,
    scored: bool,
) -> Objects:
    """Arrays of the checked records of one image."""
    shapes: np.ndarray | list[Rle] = []
    if not masks:
        shapes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    else:
        height, width = int(image["height"]), int(image["width"])
        for annotation in annotations:
            try:
                mask = to_rle(annotation.get("segmentation"), height, width)
            except ValueError as error:
                raise ValueError(
                    f"{source}: {name_annotation(annotation)}: masks are needed here, but {error}"
                ) from error
            shapes.append(mask)
    crowd = [not scored and bool(a.get("iscrowd", 0)) for a in annotations]
    return Objects(
        np.array([class_of[a["category_id"]] for a in annotations], dtype=np.int64),
        shapes,
        np.array([a["score"] if scored else 1 for a in annotations], dtype=np.float64),
        np.array(crowd, dtype=bool),
    )


def _align(found: Labels, truth: Labels, source: str) -> Labels:
    """A document's predictions with the images and class numbers of the truth."""
    matches = match_names(
        [i.file_name for i in found.images], [i.file_name for i in truth.images], source
    )
    _tell_unmatched(len(matches), len(found.images), len(truth.images), source)
    added = [name for name in found.classes if name not in truth.classes]
    first = max(truth.category_ids) + 1
    classes = (*truth.classes, *added)
    renumber = np.array([classes.index(name) for name in found.classes], dtype=np.int64)
    images = []
    for position, image in enumerate(truth.images):
        objects = _nothing(image.objects)
        if position in matches:
            match = found.images[matches[position]]
            _check_size(match, image, source)
            objects = replace(match.objects, classes=renumber[match.objects.classes])
        images.append(replace(image, objects=objects))
    return Labels(classes, (*truth.category_ids, *range(first, first + len(added))), tuple(images))


def _nothing(objects: Objects) -> Objects:
    return objects.select(np.zeros(len(objects.classes), dtype=bool))


def _check_size(found: LabeledImage, truth: LabeledImage, source: str) -> None:
    if (found.height, found.width) != (truth.height, truth.width):
        raise ValueError(
            f"{source}: {found.file_name} is {found.height} x {found.width} (height, width), in "
            f"the truth {truth.height} x {truth.width}: another picture, or turned or resized"
        )


def _tell_unmatched(matched: int, found: int, truth: int, source: str) -> None:
    if found > matched:
        logger.warning(
            "%d of the %d images of %s are not in the truth and left out",
            *(found - matched, found, source),
        )
    if truth > matched:
        logger.warning(
            "%d of the %d images of the truth are not in %s: nothing is found in them",
            *(truth - matched, truth, source),
        )
