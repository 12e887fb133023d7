"""Checks of COCO files before the first iteration: mistakes are counted, the first cases named.

Boxes are COCO's: (x, y, width, height) in pixels of the stored image, from its top left corner.
`validate_coco` needs no Detectron2; `validate_datasets` reads Detectron2's catalog.
"""

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .coco_checks import (
    check_annotations,
    check_boxes,
    check_categories,
    check_files,
    check_images,
    check_references,
    image_sizes,
)
from .coco_file import LISTS, paused_gc, read_coco_json
from .coco_values import has_file_name
from .label_checks import check_flags, check_scored, check_segmentations
from .report import Findings, Report

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


def validate_coco(
    json_file: str,
    image_root: str,
    *,
    labeled: bool,
    scored: bool = False,
    masks: bool = False,
) -> Report:
    """Check one COCO file against its image folder.

    Fatal, because Detectron2 could not load the file or would train on wrong data: not JSON, a
    missing or malformed list or record, no images, no usable annotations (`labeled` only), missing
    image files, file names that may leave `image_root`, repeated image, annotation or category ids,
    repeated category names, unknown image or category ids, boxes that are not four finite numbers,
    boxes of negative size (Detectron2 mirrors them into real boxes), `ignore` flags, malformed
    crowd flags, keypoints or masks; annotations without `area`, `iscrowd` or an integer as id
    (`scored` only: pycocotools stops there, after the training); objects without `segmentation` or
    with an RLE of another size than their image (`masks` only).

    Warnings, because Detectron2 handles them: boxes of zero size and boxes wholly outside the
    image (dropped), boxes that leave the image by more than 1 px (clipped), annotations
    with id 0 (pycocotools counts a detection matched to them as a false positive).

    Args:
        json_file: the COCO file.
        image_root: the folder that `file_name` entries are relative to.
        labeled: whether the file is for training; others may lack annotations.
        scored: whether predictions will be compared with the file. If it is neither `labeled` nor
            `scored` and has no annotations, it may lack categories.
        masks: whether masks will be trained on or compared.

    Returns:
        the counts and problems; mistakes in the data never raise.

    Raises:
        FileNotFoundError: `json_file` does not exist.
    """
    findings = Findings()
    try:
        data = dict(read_coco_json(json_file))  # others read it as it is
    except ValueError as e:
        findings.state(str(e))
        return Report(json_file, image_root, problems=tuple(findings.problems))
    with paused_gc():
        records = check_records(
            data, json_file, image_root, findings, labeled=labeled, scored=scored, masks=masks
        )
        return make_report(json_file, image_root, records, findings)


@dataclass(frozen=True)
class Records:
    """The well-formed records of a COCO file; `files`: those of its images that are there."""

    categories: list[dict]
    images: list[dict]
    annotations: list[dict]
    files: list[str]


def check_records(
    data: dict[str, Any],
    json_file: str,
    image_root: str,
    findings: Findings,
    *,
    labeled: bool,
    scored: bool,
    masks: bool,
) -> Records | None:
    """The checks of `validate_coco` for what a file holds; None if one of its lists is missing."""
    if not labeled:
        data.setdefault("annotations", [])
    images_only = not (labeled or scored or data["annotations"])
    if images_only:
        data["categories"] = []
    missing = False
    for key in LISTS:
        if isinstance(data.get(key), list):
            continue
        missing = True
        if key not in data:
            findings.state(f"'{key}' is missing")
        else:
            findings.state(f"'{key}' is of type {type(data[key]).__name__}, expected a list")
    if missing:
        return None

    categories = [] if images_only else check_categories(data["categories"], findings)
    images = check_images(data["images"], findings)
    named = [i["file_name"] for i in data["images"] if has_file_name(i)]
    files = check_files(named, image_root, findings)
    annotations = check_annotations(data["annotations"], findings, "minival" in json_file)
    check_flags(annotations, findings)
    if scored:
        check_scored(annotations, findings)
    check_segmentations(annotations, image_sizes(images), findings, masks=masks, scored=scored)
    check_references(annotations, images, categories, findings)
    check_boxes(annotations, images, findings)
    num_crowd = sum(1 for a in annotations if a.get("iscrowd", 0))
    if labeled and len(annotations) == num_crowd:
        # Detectron2 removes training images that have nothing but crowd annotations.
        findings.state(f"no annotations to train on ({num_crowd} crowd annotations do not count)")
    return Records(categories, images, annotations, files)


def make_report(
    json_file: str, image_root: str, records: Records | None, findings: Findings
) -> Report:
    """Count the records; `findings` are taken as they stand."""
    problems = tuple(findings.problems)
    if records is None:
        return Report(json_file, image_root, problems=problems)
    with_annotations = {a["image_id"] for a in records.annotations}
    return Report(
        json_file=json_file,
        image_root=image_root,
        num_images=len(records.images),
        num_annotations=len(records.annotations),
        num_categories=len(records.categories),
        num_crowd=sum(1 for a in records.annotations if a.get("iscrowd", 0)),
        num_images_without_annotations=sum(i["id"] not in with_annotations for i in records.images),
        problems=problems,
    )


def validate_datasets(cfg: "CfgNode") -> None:
    """Validate every COCO-type dataset of TRAIN, TEST and UNLABELED, one log entry each.

    Call it after `register_datasets`. Datasets without `json_file` and `image_root` in their
    metadata, and those of another evaluator type (LVIS, panoptic), are passed over.

    Raises:
        FileNotFoundError: the json file of a dataset does not exist.
        ValueError: fatal problems in any of them, with the file, the counts and the first cases.
    """
    from detectron2.data import MetadataCatalog

    broken = []
    labeled = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    # A plain Detectron2 configuration has no UNLABELED.
    for name in dict.fromkeys((*labeled, *cfg.DATASETS.get("UNLABELED", ()))):
        meta = MetadataCatalog.get(name)
        json_file, image_root = meta.get("json_file"), meta.get("image_root")
        if not json_file or not image_root or meta.get("evaluator_type", "coco") != "coco":
            continue
        if not os.path.isfile(json_file):
            raise FileNotFoundError(
                f"dataset '{name}': there is no file {json_file} (looked in "
                f"{os.path.abspath(json_file)}); relative paths of Detectron2's own datasets are "
                "under the environment variable DETECTRON2_DATASETS"
            )
        report = validate_coco(
            json_file,
            image_root,
            labeled=name in cfg.DATASETS.TRAIN,
            scored=name in cfg.DATASETS.TEST,
            masks=cfg.MODEL.MASK_ON and name in labeled,
        )
        text = f"dataset '{name}': {report.summary()}"
        logger.log(logging.WARNING if report.problems else logging.INFO, text)
        if report.fatal:
            broken.append(text)
    if broken:
        raise ValueError("datasets that cannot be used:\n" + "\n".join(broken))
