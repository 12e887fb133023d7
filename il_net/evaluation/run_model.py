"""What a model finds in the datasets of ``DATASETS.TEST``, put beside the truth."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.logger import log_every_n_seconds

from ..data.robust import MISSED, UnreadableImages
from ..predict import Predictor, read_picture, to_coco
from .predictions import Labels, parse_predictions, parse_truth

_SECONDS_PER_LINE = 10
_IMAGE_FIELDS = ("file_name", "height", "width")


def run_model(cfg: CfgNode, *, masks: bool) -> Iterator[tuple[str, Labels, Labels]]:
    """Name, truth and predictions of each dataset.

    Args:
        cfg: of a trained model; ``MODEL.WEIGHTS`` are loaded.
        masks: compare masks instead of boxes.

    On a picture that cannot be used nothing is found; `DATALOADER.MAX_UNREADABLE` limits them.

    Raises:
        ValueError: no dataset or class is named, or the model has no masks though they are wanted.
        SystemExit: more pictures that cannot be used than the limit, or all of a dataset.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: name the datasets to run the model on")
    if not cfg.DATASETS.CLASSES:
        raise ValueError("DATASETS.CLASSES is empty: use the config.yaml of the training run")
    if masks and not cfg.MODEL.MASK_ON:
        raise ValueError("--masks needs a model with masks, but MODEL.MASK_ON is False")
    predictor = Predictor(cfg)
    for name in cfg.DATASETS.TEST:
        records = DatasetCatalog.get(name)
        # Without training sets, a dataset keeps a class list of its own.
        truth = _empty_document(MetadataCatalog.get(name).thing_classes)
        found = _empty_document(cfg.DATASETS.CLASSES)
        unreadable, read = UnreadableImages.from_config(cfg), 0
        for image_id, record in enumerate(records, start=1):
            image = {"id": image_id, **{key: record[key] for key in _IMAGE_FIELDS}}
            truth["images"].append(image)
            truth["annotations"] += [_to_record(a, image_id) for a in record["annotations"]]
            found["images"].append(image)
            try:
                picture = _read(record, name)
            except ValueError as error:
                unreadable.enter(image["file_name"], str(error), MISSED)
                unreadable.check()
            else:
                found["annotations"] += to_coco(predictor(picture), image_id)
                read += 1
            log_every_n_seconds(
                logging.INFO, f"{name}: {image_id} of {len(records)} images", n=_SECONDS_PER_LINE
            )
        unreadable.check(none_read=not read)
        for document in (truth, found):
            for number, annotation in enumerate(document["annotations"], start=1):
                annotation["id"] = number
        labels = parse_truth(truth, name, masks=masks)
        yield name, labels, parse_predictions(found, name, labels, masks=masks)


def _read(record: dict, dataset: str) -> np.ndarray:
    """The picture of a record: (H, W, 3) uint8, BGR; a ValueError if it is not of its size."""
    picture, size = read_picture(Path(record["file_name"])), (record["height"], record["width"])
    if picture.shape[:2] != size:
        raise ValueError(
            f"{record['file_name']} is {picture.shape[:2]} (height, width), in the dataset "
            f"{dataset} {size}"
        )
    return picture


def _empty_document(classes: Sequence[str]) -> dict[str, list[dict]]:
    """A COCO document with categories 1, 2, ... and nothing else."""
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    return {"images": [], "annotations": [], "categories": categories}


def _to_record(annotation: dict, image_id: int) -> dict:
    """A COCO annotation, without id, from Detectron2's of one image."""
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)
    return {
        "image_id": image_id,
        "category_id": annotation["category_id"] + 1,
        "bbox": [float(value) for value in box],
        "segmentation": annotation.get("segmentation"),
        "iscrowd": annotation.get("iscrowd", 0),
    }
