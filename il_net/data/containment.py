"""Which classes' objects lie inside which others', counted in a training set.

Thesis section 2.7 names containers and contents of one data set and wishes for others: here they
are inferred.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

logger = logging.getLogger(__name__)

# An object lies inside another that covers this share of its box.
COVERED = 0.9


def count_inside(
    records: Iterable[dict[str, Any]], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """How many objects there are, and how many lie inside an object of each class.

    Args:
        records: Detectron2's dataset dicts; crowds do not count.
        num_classes: K.

    Returns:
        (K, K) counts at [outer, inner], an object never being inside itself, and (K,) objects.
    """
    inside = np.zeros((num_classes, num_classes), dtype=np.int64)
    objects = np.zeros(num_classes, dtype=np.int64)
    for record in records:
        own = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
        corners = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in own]
        boxes = np.array(corners, dtype=np.float64).reshape(-1, 4)
        classes = np.array([a["category_id"] for a in own], dtype=np.int64)
        objects += np.bincount(classes, minlength=num_classes)
        start = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        end = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        shared = (end - start).clip(min=0).prod(axis=2)
        area = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)
        covers = (shared >= COVERED * area[None]) & (area[None] > 0)
        np.fill_diagonal(covers, False)
        for outer in np.unique(classes):
            covered = covers[classes == outer].any(axis=0)
            inside[outer] += np.bincount(classes[covered], minlength=num_classes)
    return inside, objects


def infer_groups(
    records: Iterable[dict[str, Any]], classes: Sequence[str], share: float
) -> list[dict[str, list[str]]]:
    """The container classes of a data set with the classes of their contents.

    A class contains another if at least ``share`` of the other's objects lie inside one of its own,
    and not the other way round. What is inside a container is no container itself. Says what it
    finds in the log.

    Args:
        records: see :func:`count_inside`.
        classes: the K names.
        share: in (0, 1].

    Returns:
        {"containers": [name], "contents": names} for each container class.

    Raises:
        ValueError: no class contains another.
    """
    inside, objects = count_inside(records, len(classes))
    shares = inside / np.maximum(objects, 1)
    contains = shares >= share
    contains &= ~contains.T  # drops the diagonal as well
    contains[contains.any(axis=0)] = False
    if not contains.any():
        outer, inner = np.unravel_index(
            np.where(np.eye(len(classes), dtype=bool), -1, shares).argmax(), shares.shape
        )
        raise ValueError(
            f"no class of {list(classes)} contains another: at most {shares[outer, inner]:.0%} of "
            f"the objects of a class lie inside those of another ({classes[inner]} inside "
            f"{classes[outer]}), and {share:.0%} are asked for"
        )
    groups = []
    for outer in np.flatnonzero(contains.any(axis=1)):
        contents = np.flatnonzero(contains[outer])
        groups.append(
            {"containers": [classes[outer]], "contents": [classes[inner] for inner in contents]}
        )
        found = (f"{classes[i]} ({shares[outer, i]:.0%} of {objects[i]})" for i in contents)
        logger.info("%s contains %s", classes[outer], ", ".join(found))
    return groups
