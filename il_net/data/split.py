"""Which training images keep their labels: drawn from a percentage and a seed, or from a file.

Thesis sections 2.4 (10 % of COCO) and 2.6 (5 to 50 % of ASND). The draw ranks image ids by a hash
of seed and id: no process, library version or order of the file can change it. (In Unbiased
Teacher's first version every process drew for itself, so that together they saw most labels.)
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils import comm

from ..safe_load import load_pkl
from .shared_records import PackedRecords, load_packed
from .sources import find_path
from .split_file import ImageId, read_labeled, split_document
from .stratify import floor_share, order_by_hash, stratify

logger = logging.getLogger(__name__)

_PERCENT = "DATASETS.SPLIT.PERCENT"
_FILE = "split.json"
_IMAGE_FIELDS = ("file_name", "image_id", "height", "width")
Records = dict[str, list[dict[str, Any]]]
T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """The images of `DATASETS.TRAIN` by id, those with labels and the rest.

    With several training sets an id is "dataset/id", because each numbers its own images.
    """

    dataset: str
    percent: float
    seed: int
    labeled: tuple[ImageId, ...]
    unlabeled: tuple[ImageId, ...]


def count_labeled(percent: float, total: int, key: str = _PERCENT) -> int:
    """floor(percent / 100 * total) of the decimal number as written, at least 1.

    Args:
        percent: of the images.
        total: how many there are.
        key: where the percentage was written, for the message.

    Raises:
        ValueError: not above 0 and at most 100.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"{key} must be above 0 and at most 100, got {percent}")
    return max(1, floor_share(percent, total, whole=100))


def draw_labeled(
    ids: Collection[ImageId],
    percent: float,
    seed: int,
    *,
    nested: bool = False,
    classes: Mapping[ImageId, Collection[int]] | None = None,
    key: str = _PERCENT,
) -> tuple[ImageId, ...]:
    """The ids that keep their labels, sorted; their order in `ids` does not matter.

    Args:
        ids: all images.
        percent: of them, see `count_labeled`.
        seed: another one draws other images.
        nested: draw so that the images of a smaller percentage are among those of a larger one.
        classes: the classes in each image, for a stratified draw: see `stratify`.
        key: see `count_labeled`.
    """
    count = count_labeled(percent, len(ids), key)
    # Nested draws are prefixes of one order; others have an order for every percentage.
    salt = str(seed) if nested else f"{seed}/{float(percent)}"
    order = order_by_hash(ids, salt)
    if classes is not None and nested:
        order = _stratified_order(order, classes)
    elif classes is not None:
        order = stratify(order, count, classes)
    return tuple(sorted(order[:count]))


def _stratified_order(
    order: list[ImageId], classes: Mapping[ImageId, Collection[int]]
) -> list[ImageId]:
    """An order of which every prefix is made of stratified parts: halves of halves."""
    if len(order) < 2:
        return order
    first = stratify(order, len(order) // 2, classes)
    placed = set(first)
    second = [image_id for image_id in order if image_id not in placed]
    return _stratified_order(first, classes) + _stratified_order(second, classes)


def train_records(cfg: CfgNode) -> Records:
    """Every dataset of `DATASETS.TRAIN` with its records, without empty images.

    As in Detectron2 an image without annotations other than crowds is left out, unless
    `DATALOADER.FILTER_EMPTY_ANNOTATIONS` is False. So it is in no split, labelled or not.

    Raises:
        ValueError: DATASETS.TRAIN is empty, or one of its data sets has no such image.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty: name a dataset with labels")
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    records = {}
    for name in cfg.DATASETS.TRAIN:
        try:
            records[name] = get_detection_dataset_dicts(
                name,
                filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
                proposal_files=proposal_files(cfg, "TRAIN", name),
            )
        except AssertionError as error:  # Detectron2's way to say that no image is left
            meta = MetadataCatalog.get(name)
            raise ValueError(
                f"DATASETS.TRAIN: '{name}' ({meta.get('json_file') or meta.get('dirname')}): "
                f"{error} Crowds do not count, nor objects whose polygons have less than three "
                "points"
            ) from error
    return records


def proposal_files(cfg: CfgNode, key: str, name: str) -> list[str] | None:
    """The file of precomputed proposals of a data set, if `MODEL.LOAD_PROPOSALS` asks for one.

    Args:
        key: "TRAIN" or "TEST".
        name: of the data set.

    Raises:
        ValueError: the file can't be read, or would run code (Detectron2 does not look).
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return None
    path = cfg.DATASETS[f"PROPOSAL_FILES_{key}"][list(cfg.DATASETS[key]).index(name)]
    load_pkl(path)
    return [path]


def make_split(cfg: CfgNode, records: Records) -> Split:
    """Split the training images as `DATASETS.SPLIT` says; the same in every process.

    Raises:
        ValueError: see `count_labeled` and `read_labeled`, or image ids used twice.
        FileNotFoundError: there is no `DATASETS.SPLIT.FILE`.
    """
    node = cfg.DATASETS.SPLIT
    classes = image_classes(records)
    name = " + ".join(records)
    if node.FILE:
        path = find_path(node.FILE, "DATASETS.SPLIT.FILE", os.path.isfile, "file")
        count = count_labeled(node.PERCENT, len(classes))
        labeled = read_labeled(path, list(classes), node.PERCENT, node.SEED, count)
    elif node.PERCENT == 100:
        labeled = tuple(sorted(classes))
    else:
        stratified = classes if node.STRATIFIED else None
        labeled = draw_labeled(
            classes, node.PERCENT, node.SEED, nested=node.NESTED, classes=stratified
        )
    unlabeled = tuple(sorted(set(classes).difference(labeled)))
    return Split(name, float(node.PERCENT), node.SEED, labeled, unlabeled)


def split_records(
    cfg: CfgNode, records: Records, split: Split | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The labelled and the unlabelled records of a run.

    Unlabelled are the images of `DATASETS.TRAIN` that lost their labels and all images of
    `DATASETS.UNLABELED`, each file once, without anything but file name, id and size. An image
    that is in `DATASETS.UNLABELED` as well may be both labelled and unlabelled.

    Args:
        records: of `train_records`.
        split: of `make_split`, if it has been made already.
    """
    split = split or make_split(cfg, records)
    keep = set(split.labeled)
    labeled, unlabeled = [], {}
    for image_id, record in _with_ids(records):
        if image_id in keep:
            labeled.append(record)
        else:
            unlabeled[os.path.abspath(record["file_name"])] = without_labels(record)
    for name in cfg.DATASETS.UNLABELED:
        for record in DatasetCatalog.get(name):
            unlabeled.setdefault(os.path.abspath(record["file_name"]), without_labels(record))
    return labeled, list(unlabeled.values())


def load_train(cfg: CfgNode) -> PackedRecords:
    """All of `train_records`, once for all processes of a machine; every process has to call it.

    Raises:
        ValueError: see `train_records` and `load_groups`.
    """

    def load() -> tuple[tuple[list], None]:
        return (list(chain.from_iterable(train_records(cfg).values())),), None

    (records,), _ = load_groups(load)
    return records


def load_split(cfg: CfgNode) -> tuple[PackedRecords, PackedRecords, Split]:
    """What `split_records` gives, and the split; once for all processes of a machine.

    Every process has to call it.

    Raises:
        ValueError: see `train_records`, `make_split` and `load_groups`.
        FileNotFoundError: see `make_split`.
    """

    def load() -> tuple[tuple[list, list], Split]:
        records = train_records(cfg)
        split = make_split(cfg, records)
        return split_records(cfg, records, split), split

    (labeled, unlabeled), split = load_groups(load)
    return labeled, unlabeled, split


def load_groups(
    load: Callable[[], tuple[Sequence[list[dict[str, Any]]], T]],
) -> tuple[list[PackedRecords], T]:
    """`load_packed`, of images that must be the same on every machine.

    Raises:
        ValueError: the machines find different images; see also `load_packed`.
    """

    def load_and_sign() -> tuple[Sequence[list[dict[str, Any]]], tuple[T, str]]:
        groups, others = load()
        ids = repr([[record["image_id"] for record in group] for group in groups])
        return groups, (others, hashlib.sha256(ids.encode()).hexdigest())

    packed, (others, signature) = load_packed(load_and_sign)
    if len(set(comm.all_gather(signature))) > 1:
        raise ValueError(
            "The processes found different images, labelled or not: DATASETS.TRAIN, UNLABELED and "
            "SPLIT.FILE must be the same files on every machine"
        )
    return packed, others


def without_labels(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with file name, image id and, where known, size; nothing that tells of objects."""
    return {field: record[field] for field in _IMAGE_FIELDS if field in record}


def write_split(folder: str, split: Split) -> None:
    """Write `split.json` into the run's folder; `DATASETS.SPLIT.FILE` can read it.

    Another split in the folder, an older run's, becomes `split_previous.json`. A run that goes on
    must have its own (see `split_digest`). Only the main process writes.
    """
    if not comm.is_main_process():
        return
    ids = (*split.labeled, *split.unlabeled)
    lists = {split.percent: {split.seed: split.labeled}}
    text = json.dumps(split_document(split.dataset, ids, lists))
    path = Path(folder, _FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        path.replace(path.with_name("split_previous.json"))
    path.write_text(text, encoding="utf-8")
    logger.info(
        "%d labelled and %d unlabelled images of %s; sha256 of %s: %s",
        len(split.labeled),
        len(split.unlabeled),
        split.dataset,
        path,
        split_digest(folder),
    )


def split_digest(folder: str) -> str | None:
    """SHA-256 (hexadecimal) of a run's `split.json`, None where there is none."""
    path = Path(folder, _FILE)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def image_classes(records: Records) -> dict[ImageId, set[int]]:
    """The classes in every image, crowds apart, by the ids of `Split`, ordered by dataset and id.

    Raises:
        ValueError: two images of a dataset have the same id.
    """
    classes: dict[ImageId, set[int]] = {}
    for image_id, record in _with_ids(records):
        if image_id in classes:
            raise ValueError(f"DATASETS.TRAIN: image id {image_id!r} is used twice")
        objects = (a for a in record.get("annotations", ()) if not a.get("iscrowd", 0))
        classes[image_id] = {a["category_id"] for a in objects}
    return classes


def records_by_id(records: Records) -> dict[ImageId, dict[str, Any]]:
    """The records under the ids that a `Split` has for them."""
    return dict(_with_ids(records))


def _with_ids(records: Records) -> Iterable[tuple[ImageId, dict[str, Any]]]:
    """Ids of `Split` and records, sorted by id: the order of the files means nothing."""
    for name, own in records.items():
        for record in sorted(own, key=lambda r: r["image_id"]):
            image_id = record["image_id"]
            if isinstance(image_id, np.generic):  # Detectron2's VOC
                image_id = image_id.item()
            yield (image_id if len(records) == 1 else f"{name}/{image_id}"), record
