"""COCO metrics with a per-class table of AP and AP50."""

import logging

import numpy as np
from detectron2 import evaluation
from tabulate import tabulate

logger = logging.getLogger(__name__)


class COCOEvaluator(evaluation.COCOEvaluator):
    """Detectron2's evaluator on pycocotools, with ``AP-<class>`` and ``AP50-<class>`` results.

    Differs from Detectron2's: works without its compiled operators, and the file under test may
    lack classes that the model knows (they are left out of the table and of the mean).

    Args:
        dataset_name: a registered dataset.
        output_dir: folder for the predictions.
    """

    def __init__(self, dataset_name: str, *, output_dir: str) -> None:
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=False)

    def _derive_coco_results(self, coco_eval, iou_type: str, class_names=None) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names=None)
        if coco_eval is None:
            return results
        # (IoU, recall, class, area range, detections per image); -1 where a class has no truth.
        precision = coco_eval.eval["precision"][:, :, :, 0, -1]
        iou50 = int(np.flatnonzero(np.isclose(coco_eval.params.iouThrs, 0.5))[0])
        rows = []
        for index, category in enumerate(coco_eval.params.catIds):
            name = self._coco_api.cats[category]["name"]
            ap, ap50 = _mean(precision[:, :, index]), _mean(precision[iou50, :, index])
            truths = len(self._coco_api.getAnnIds(catIds=[category], iscrowd=False))
            rows.append((name, ap, ap50, truths))
            results[f"AP-{name}"], results[f"AP50-{name}"] = ap, ap50
        table = tabulate(
            rows, headers=["class", "AP", "AP50", "instances"], tablefmt="pipe", floatfmt=".2f"
        )
        logger.info("Per-class %s results:\n%s", iou_type, table)
        return results


def _mean(precision: np.ndarray) -> float:
    valid = precision[precision > -1]
    return float(valid.mean() * 100) if valid.size else float("nan")
