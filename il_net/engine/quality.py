"""How good the pseudo labels are, where true labels of the unlabelled images exist.

Thesis Figs. 2.14 and 2.16d. The teacher labels unlabelled images once more, at test size; the truth
stays in this hook and reaches no training step.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm

from ..data.mapper import TrainMapper, UnreadableImage
from ..data.split import Split, records_by_id, train_records, without_labels
from ..evaluation.pseudo_quality import PseudoQuality, append_summary
from ..json_lines import drop_later_lines
from ..modeling.teacher_student import TeacherStudentRCNN

logger = logging.getLogger(__name__)

MAX_IMAGES = 200


class PseudoLabelQuality(HookBase):
    """Compare pseudo labels with the truth after every ``period`` steps, on the main process.

    Args:
        model: the teacher-student model, without DDP around it.
        records: unlabelled images with their true ``annotations``; a draw of ``MAX_IMAGES`` serves.
        cfg: image size and format at test.
        period: steps; 0 means after the last step only.
        path: a file of one JSON summary a line.
    """

    def __init__(
        self,
        model: TeacherStudentRCNN,
        records: list[dict],
        cfg: CfgNode,
        *,
        period: int,
        path: Path,
    ) -> None:
        self.model = model
        order = np.random.default_rng(0).permutation(len(records))[:MAX_IMAGES]
        self.records = [records[i] for i in sorted(order)]
        self.mapper = TrainMapper(cfg, is_train=False)
        self.classes = cfg.DATASETS.CLASSES
        self.period = period
        self.path = path

    def before_train(self) -> None:
        """Runs once; a resumed run makes the lines that it repeats anew."""
        if comm.is_main_process():
            drop_later_lines(self.path, self.trainer.start_iter)

    def after_step(self) -> None:
        """Runs after the optimizer's step."""
        done = self.trainer.iter + 1
        due = done == self.trainer.max_iter or (self.period and done % self.period == 0)
        if due and self.model.burned_in and comm.is_main_process():
            self.compare(done)

    def compare(self, iteration: int) -> None:
        """Label the images, compare, write a line."""
        quality = PseudoQuality(len(self.classes))
        for record in self.records:
            try:
                mapped = self.mapper(without_labels(record))
            except UnreadableImage as error:
                logger.warning("%s. It is left out of the comparison of pseudo labels", error)
                continue
            (labels,) = self.model.pseudo_label([mapped])
            quality.add(labels.to("cpu"), true_instances(record, mapped["image"].shape[1:]))
        append_summary(self.path, iteration, quality, self.classes)
        logger.info("Pseudo labels of %d images compared: %s", len(self.records), self.path)


def true_instances(record: dict, size: tuple[int, int]) -> Instances:
    """A record's objects, crowds apart, in the pixels of its image resized to (height, width)."""
    objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    corners = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    boxes = Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
    boxes.scale(size[1] / record["width"], size[0] / record["height"])
    classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.long)
    return Instances(tuple(size), gt_boxes=boxes, gt_classes=classes)


def unlabeled_truth(cfg: CfgNode, split: Split) -> list[dict]:
    """The unlabelled images whose true labels exist, with them.

    Those are the images of ``DATASETS.TRAIN`` that the split takes the labels from, and those of
    ``DATASETS.UNLABELED`` with annotations in classes of the model.

    Raises:
        ValueError: there are none.
    """
    records = []
    if split.unlabeled:
        by_id = records_by_id(train_records(cfg))
        records += [by_id[image_id] for image_id in split.unlabeled]
    for name in cfg.DATASETS.UNLABELED:
        if MetadataCatalog.get(name).get("thing_classes") == list(cfg.DATASETS.CLASSES):
            records += [record for record in DatasetCatalog.get(name) if record.get("annotations")]
    if not records:
        raise ValueError(
            "SEMISUP.PSEUDO.COMPARE_WITH_TRUTH needs unlabelled images whose labels are known: "
            "set DATASETS.SPLIT.PERCENT below 100, or name a set with labels of the same classes "
            "in DATASETS.UNLABELED"
        )
    return records
