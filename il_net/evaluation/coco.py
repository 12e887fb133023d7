"""COCO metrics with a per-class table of AP and AP50, and a score of their own for masks.

Thesis section 2.3: a Mask-IoU head rescales the score for mask AP only; box AP keeps the class
score.
"""

import json
import logging
import math
from pathlib import Path

import numpy as np
from detectron2 import evaluation
from detectron2.utils import comm
from pycocotools.coco import COCO
from tabulate import tabulate

from .scoring import fast_scoring, fits_fast_scoring

logger = logging.getLogger(__name__)


class COCOEvaluator(evaluation.COCOEvaluator):
    """Detectron2's evaluator, with ``AP-<class>`` and ``AP50-<class>`` results.

    Scored by faster-coco-eval where it is installed and equals pycocotools, otherwise by that.

    Differs from Detectron2's: works without its compiled operators, and the file under test may
    lack classes that the model knows (they are left out of the table and of the mean). Instances
    may carry ``mask_scores`` (R,), by which masks are ranked instead of by ``scores``.

    Writes, in the main process:
        ``coco_instances_results.json``: predictions; ``score`` is the class score, ``mask_score``
            the masks' own, where there is one.
        ``coco_instances_results_segm.json``: with ``mask_scores`` only, the same with the mask
            score as ``score``.
        ``results.json``: what ``evaluate`` returns, null where a metric can't be computed.

    Args:
        dataset_name: a registered dataset.
        output_dir: folder for the predictions and results.
    """

    def __init__(self, dataset_name: str, *, output_dir: str) -> None:
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=False)

    @property
    def truth(self) -> COCO:
        """The ground truth that predictions are compared with."""
        return self._coco_api

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """As Detectron2's; keeps ``mask_scores`` with the predictions."""
        for image, output in zip(inputs, outputs, strict=True):
            super().process([image], [output])
            if "instances" in output and output["instances"].has("mask_scores"):
                scores = output["instances"].mask_scores.tolist()
                for record, score in zip(self._predictions[-1]["instances"], scores, strict=True):
                    record["mask_score"] = score

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, dict[str, float]]:
        """Metrics by task, ``{"bbox": {"AP": ...}, "segm": {...}}``; empty but in the main process.

        Args:
            img_ids: the images to evaluate; None for all.
        """
        results = super().evaluate(img_ids)
        if comm.is_main_process():
            valid = {
                task: {name: None if math.isnan(value) else value for name, value in row.items()}
                for task, row in results.items()
            }
            folder = Path(self._output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(valid, indent=2, allow_nan=False)
            (folder / "results.json").write_text(text + "\n")
        return results

    def _eval_predictions(self, predictions: list[dict], img_ids: list[int] | None = None) -> None:
        records = [record for image in predictions for record in image["instances"]]
        self._use_fast_impl = fits_fast_scoring(self.truth, records)
        with fast_scoring():
            self._score(predictions, records, img_ids)

    def _score(
        self, predictions: list[dict], records: list[dict], img_ids: list[int] | None
    ) -> None:
        written = Path(self._output_dir, "coco_instances_results.json")
        for_masks = written.with_name("coco_instances_results_segm.json")
        for_masks.unlink(missing_ok=True)  # of an earlier evaluation
        if not any("mask_score" in record for record in records):
            super()._eval_predictions(predictions, img_ids)
            return
        # Masks first: Detectron2 writes its file in both rounds, and changes the records.
        rescored = [{**record, "score": record["mask_score"]} for record in records]
        others = [task for task in self._tasks_from_predictions(records) if task != "segm"]
        self._tasks = ["segm"]
        super()._eval_predictions([{"instances": rescored}], img_ids)
        written.replace(for_masks)
        self._tasks = others
        super()._eval_predictions(predictions, img_ids)
        self._tasks = None  # Detectron2 infers them from the predictions
        if "segm" in self._results:
            self._results.move_to_end("segm")

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
