"""COCO files that can be counted, cut and compared: records that are not sound are refused."""

from pathlib import Path
from typing import Any

from .coco_checks import (
    check_annotations,
    check_boxes,
    check_categories,
    check_images,
    check_references,
)
from .coco_file import read_coco
from .report import Findings


def read_sound_coco(json_file: str | Path, *, boxes: bool = False) -> dict[str, Any]:
    """A COCO file whose records `check_sound` passes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no COCO file, or see `check_sound`.
    """
    data = read_coco(json_file)
    check_sound(data, str(json_file), boxes=boxes)
    return data


def check_sound(data: dict[str, Any], source: str, *, boxes: bool) -> None:
    """Check that images, annotations and categories can be told apart by their ids.

    Args:
        data: a COCO file with its three lists.
        source: where it is from, for the message.
        boxes: whether boxes have to be usable as well.

    Raises:
        ValueError: fatal problems of `coco_checks`; names all.
    """
    findings = Findings()
    categories = check_categories(data["categories"], findings)
    images = check_images(data["images"], findings)
    annotations = check_annotations(data["annotations"], findings, "minival" in source)
    check_references(annotations, images, categories, findings)
    if boxes:
        check_boxes(annotations, images, findings)
    findings.raise_fatal(source)
