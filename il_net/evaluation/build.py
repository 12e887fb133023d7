"""Choose the evaluator of a dataset."""

import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from .coco import COCOEvaluator


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """COCO metrics for COCO files and for anything that converts to them (VOC folders).

    Results and predictions go to ``OUTPUT_DIR/inference/<dataset>``.

    Raises:
        ValueError: the dataset has another kind of truth (LVIS, Cityscapes, ...).
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in ("coco", "pascal_voc"):
        raise ValueError(
            f"DATASETS.TEST: {dataset_name} needs the evaluator {kind!r}; only COCO files and VOC "
            "folders are evaluated here"
        )
    folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    if MetadataCatalog.get(dataset_name).get("json_file") is None:
        # Detectron2 converts such a dataset once and would trust an older run's file for ever.
        if comm.is_main_process():
            Path(folder, f"{dataset_name}_coco_format.json").unlink(missing_ok=True)
        comm.synchronize()
    return COCOEvaluator(dataset_name, output_dir=folder)
