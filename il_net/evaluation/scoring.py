"""COCO metrics by faster-coco-eval, where it is installed and gives what pycocotools gives."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from detectron2.evaluation import coco_evaluation
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None

logger = logging.getLogger(__name__)

MAX_ID = 2**53  # it holds ids in floating point


def fits_fast_scoring(truth: COCO, records: Iterable[Mapping]) -> bool:
    """Whether faster-coco-eval can score these boxes and masks.

    It fails at ids that are words (Pascal VOC) and at keypoints, takes objects with negative ids
    for missed ones and mixes up ids above ``MAX_ID``; pycocotools does none of these.

    Args:
        truth: the ground truth.
        records: predictions as COCO results.
    """
    if COCOeval_faster is None or any("keypoints" in record for record in records):
        return False
    ids = (i for known in (truth.imgs, truth.anns, truth.cats) for i in known)
    return all(isinstance(i, int) and 0 <= i <= MAX_ID for i in ids)


@contextmanager
def fast_scoring() -> Iterator[None]:
    """Detectron2's evaluators with ``use_fast_impl`` use faster-coco-eval instead of their own."""

    def make(truth: COCO, found: COCO, task: str) -> COCOeval:
        return COCOeval_faster(truth, found, task, print_function=logger.info)

    before = coco_evaluation.COCOeval_opt
    coco_evaluation.COCOeval_opt = make
    try:
        yield
    finally:
        coco_evaluation.COCOeval_opt = before
