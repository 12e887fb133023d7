"""Checks of what annotations hold beside their boxes: crowds, flags, keypoints, masks.

As far as Detectron2 and pycocotools stop at it, or read it as something else, some of it only after
the training. Annotations are well-formed ones; see `coco_checks.check_annotations`.
"""

from .coco_checks import Sizes, name_annotation
from .coco_values import is_area, is_polygon
from .masks import read_rle
from .report import Findings

# COCO's metrics keep ids as floating-point numbers.
_LARGEST_ID = 2**53


def check_flags(annotations: list[dict], findings: Findings) -> None:
    """That crowds, `ignore` and keypoints are such that Detectron2 can load the file."""
    findings.add(
        "annotations with 'ignore' set, which Detectron2 refuses",
        [name_annotation(a) for a in annotations if a.get("ignore", 0)],
    )
    findings.add(
        "annotations whose 'iscrowd' is neither 0 nor 1",
        [name_annotation(a) for a in annotations if a.get("iscrowd", 0) not in (0, 1)],
    )
    findings.add(
        "annotations whose 'keypoints' are no list of finite numbers",
        [
            name_annotation(a)
            for a in annotations
            if a.get("keypoints") and not is_polygon(a["keypoints"])
        ],
    )


def check_scored(annotations: list[dict], findings: Findings) -> None:
    """That COCO's metrics can compare predictions with the annotations."""
    findings.add(
        "annotations without a number 'area', which COCO's metrics need",
        [name_annotation(a) for a in annotations if not is_area(a.get("area"))],
    )
    findings.add(
        "annotations without 'iscrowd', which COCO's metrics need",
        [name_annotation(a) for a in annotations if "iscrowd" not in a],
    )
    findings.add(
        f"annotations whose 'id' is no integer up to {_LARGEST_ID}, as COCO's metrics need it",
        [
            name_annotation(a)
            for a in annotations
            if not (type(a["id"]) is int and abs(a["id"]) <= _LARGEST_ID)
        ],
    )


def check_segmentations(
    annotations: list[dict], sizes: Sizes, findings: Findings, *, masks: bool, scored: bool
) -> None:
    """That segmentations can be read; Detectron2 does so even where it trains on boxes alone.

    Args:
        annotations: well-formed ones.
        sizes: (width, height) by image id.
        findings: what is added to.
        masks: whether masks will be trained on or compared.
        scored: whether they will be compared.
    """
    malformed, other_size, short = [], [], []
    for a in annotations:
        outline = a.get("segmentation")
        if not outline:
            continue
        if isinstance(outline, dict):
            if read_rle(outline) is None:
                malformed.append(a)
            # The image may be one that the file does not have, which is told elsewhere.
            elif a["image_id"] in sizes and tuple(outline["size"]) != sizes[a["image_id"]][::-1]:
                other_size.append(a)
        elif not (isinstance(outline, list) and all(map(is_polygon, outline))):
            malformed.append(a)
        elif any(len(polygon) < 6 or len(polygon) % 2 for polygon in outline):
            short.append(a)
    kind = "segmentations that are neither lists of lists of finite numbers nor sound RLE"
    found = {kind: malformed}
    if masks:
        found["objects without 'segmentation', which MODEL.MASK_ON needs"] = [
            a for a in annotations if not a.get("segmentation")
        ]
        found["RLE masks of another size than their image"] = other_size
    if masks and scored:
        kind = "polygons with an odd number of coordinates or fewer than three points"
        found[f"{kind}, which COCO's metrics refuse"] = short
    for kind, offenders in found.items():
        findings.add(kind, [name_annotation(a) for a in offenders])
