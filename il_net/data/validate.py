"""Checks of COCO files before the first iteration: mistakes are counted, the first cases named.

Boxes are COCO's: (x, y, width, height) in pixels of the stored image, from its top left corner.
`validate_coco` needs no Detectron2; `validate_datasets` reads Detectron2's catalog.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .report import Findings, Report

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

EDGE_TOLERANCE_PX = 1.0
_NUMBERS = frozenset((int, float))
_LISTS = ("images", "annotations", "categories")


def read_coco_json(json_file: str) -> dict[str, Any]:
    """Parse a COCO file and check that it is a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, or its top level is not an object; names the file.
    """
    try:
        # UTF-8 without a byte order mark, which is all that pycocotools can read afterwards.
        with open(json_file, encoding="utf-8") as f:
            data = json.load(f)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{json_file} is not JSON: {e}") from e
    kind = type(data).__name__
    if kind != "dict":
        raise ValueError(
            f"{json_file} holds a JSON {kind}; a COCO file is an object with the lists "
            f"{', '.join(_LISTS)}"
        )
    return data


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
    image files, file names that leave `image_root`, repeated image, annotation or category ids,
    repeated category names, unknown image or category ids, boxes that are not four finite numbers,
    boxes of negative size (Detectron2 mirrors them into real boxes), `ignore` flags,
    annotations without an `area` (`scored` only: pycocotools stops there, after the training),
    objects without `segmentation` (`masks` only).

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
        data = read_coco_json(json_file)
    except ValueError as e:
        findings.state(str(e))
        return Report(json_file, image_root, problems=tuple(findings.problems))
    if not labeled:
        data.setdefault("annotations", [])
    images_only = not (labeled or scored or data["annotations"])
    if images_only:
        data["categories"] = []
    for key in _LISTS:
        if key not in data:
            findings.state(f"'{key}' is missing")
        elif not isinstance(data[key], list):
            findings.state(f"'{key}' is of type {type(data[key]).__name__}, expected a list")
    if findings.problems:
        return Report(json_file, image_root, problems=tuple(findings.problems))

    categories = [] if images_only else _check_categories(data["categories"], findings)
    images = _check_images(data["images"], findings)
    _check_files([i["file_name"] for i in images], image_root, findings)
    annotations = _check_annotations(data["annotations"], findings, "minival" in json_file)
    if scored:
        kind = "annotations without a number 'area', which COCO's metrics need"
        bad = [_name(a) for a in annotations if type(a.get("area")) not in _NUMBERS]
        findings.add(kind, bad)
    if masks:
        kind = "objects without 'segmentation', which MODEL.MASK_ON needs"
        findings.add(kind, [_name(a) for a in annotations if not a.get("segmentation")])
    _check_references(annotations, images, categories, findings)
    _check_boxes(annotations, images, findings)
    num_crowd = sum(1 for a in annotations if a.get("iscrowd", 0))
    if labeled and len(annotations) == num_crowd:
        # Detectron2 removes training images that have nothing but crowd annotations.
        findings.state(f"no annotations to train on ({num_crowd} crowd annotations do not count)")
    with_annotations = {a["image_id"] for a in annotations}
    return Report(
        json_file=json_file,
        image_root=image_root,
        num_images=len(images),
        num_annotations=len(annotations),
        num_categories=len(categories),
        num_crowd=num_crowd,
        num_images_without_annotations=sum(i["id"] not in with_annotations for i in images),
        problems=tuple(findings.problems),
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


def _check_categories(records: list[Any], findings: Findings) -> list[dict]:
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


def _check_images(records: list[Any], findings: Findings) -> list[dict]:
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


def _check_files(file_names: list[str], image_root: str, findings: Findings) -> None:
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


def _check_annotations(
    records: list[Any], findings: Findings, repeated_ids_tolerated: bool
) -> list[dict]:
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
        [_name(a) for a in good if a["id"] == 0],
        fatal=False,
        consequence="pycocotools scores a detection matched to it as a false positive",
    )
    findings.add(
        "annotations with 'ignore' set, which Detectron2 refuses",
        [_name(a) for a in good if a.get("ignore", 0)],
    )
    return good


def _check_references(
    annotations: list[dict], images: list[dict], categories: list[dict], findings: Findings
) -> None:
    image_ids = {i["id"] for i in images}
    findings.add(
        "annotations of an image that is not in the file",
        [_name(a) for a in annotations if a["image_id"] not in image_ids],
    )
    category_ids = {c["id"] for c in categories}
    findings.add(
        "unknown category ids",
        [
            f"{a['category_id']} in {_name(a)}"
            for a in annotations
            if a["category_id"] not in category_ids
        ],
    )


def _check_boxes(annotations: list[dict], images: list[dict], findings: Findings) -> None:
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
    return isinstance(box, list) and len(box) == 4 and _NUMBERS.issuperset(map(type, box))


def _name(annotation: dict) -> str:
    return f"annotation {annotation['id']} (image {annotation['image_id']})"


def _name_box(annotation: dict) -> str:
    return f"{_name(annotation)} {annotation.get('bbox')}"
