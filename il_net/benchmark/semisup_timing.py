"""The semi-supervised training step on fixed work, with the time of each of its phases.

Thesis section 2.4. The teacher finds the workload's objects, whatever its weights, so that student
and losses work as behind a trained teacher.

Shape shorthand: N pictures of a group, R proposals of one, K classes, H and W a picture's sides.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from torch import Tensor, nn

from ..data.augment import StrongAugment
from ..data.loader import SemiBatch
from ..data.mapper import SemiMapper
from ..engine.hooks import PseudoLabelReport, TeacherUpdate
from ..modeling.iou_head import IoUHead
from ..modeling.teacher_student import TeacherStudentRCNN
from .timing import Subject
from .workload import (
    NUM_OBJECTS,
    SEED,
    Workload,
    fix_decisions,
    replace_decisions,
    settle_norms,
)

PHASES = ("data", "teacher", "student", "backward", "update", "EMA", "logging")
# The teacher's IoU logits: above every theta, so that the filter removes nothing.
SURE = 8.0


class PhaseClock:
    """Seconds of named phases; one inside another counts for itself alone.

    Args:
        synchronize: waits for the device, before the clock is read.

    Attributes:
        seconds: phase of ``PHASES`` to seconds since :meth:`restart`.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self.restart()

    def restart(self) -> None:
        """Start from zero."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._inner = 0.0  # of the phases inside the one under way

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as ``name``."""
        self._synchronize()
        outer, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            took = time.perf_counter() - start
            self.seconds[name] += took - self._inner
            self._inner = outer + took

    def wrap(self, owner: object, method: str, name: str) -> None:
        """Count every call of one object's method as ``name``."""
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        setattr(owner, method, timed)


class SemisupSubject(Subject):
    """Teacher and student of a comparison: their step, as in training, in phases.

    A step makes the views of N labelled and N unlabelled pictures from a generated JPEG file, with
    the configuration's augmentation and in this process, and drops them; the models get the
    workload's picture as weak and strong view. The hooks are training's: the teacher is averaged
    and the pseudo labels' means are read in every step (in training every 20).

    The data phase is what one worker would need for the batch. "student" is the forward pass
    without the teacher's, "update" the optimizer's, "logging" all that only reports need.

    Args:
        As :class:`Subject`; ``images`` is N.
    """

    def __init__(self, label: str, cfg: CfgNode, workload: Workload, **kwargs: Any) -> None:
        self.clock = PhaseClock(self._synchronize)
        super().__init__(label, cfg, workload, **kwargs)
        self.wanted = expected_counts(cfg, workload, self.images)
        update = TeacherUpdate(self.model)
        report = PseudoLabelReport(
            self.model,
            [str(k) for k in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)],
            period=1,
            picture_period=0,
            folder=Path(),
            bgr=cfg.INPUT.FORMAT == "BGR",
        )
        self.step.register_hooks([update, report])
        self.step.storage = self.storage
        # After burn-in, at a step that averages; the same random numbers in every run.
        self.step.iter = self.model.burn_in_iters + self.model.ema_period
        self._time_phases(report)

    def _prepare(self, cfg: CfgNode, workload: Workload) -> Iterator[SemiBatch]:
        fix_decisions(self.model.student, workload, cfg)
        settle_norms(self.model.student, workload)
        fix_teacher(self.model.teacher, workload, cfg)
        self.model.update_teacher(self.model.burn_in_iters)  # a copy
        self._folder = tempfile.TemporaryDirectory()  # lives as long as this object
        return self._batches(cfg, workload, write_record(Path(self._folder.name), workload))

    def _batches(self, cfg: CfgNode, workload: Workload, record: dict) -> Iterator[SemiBatch]:
        strong = strong_view(cfg, workload)
        labeled = [{**r, "strong_image": strong} for r in workload.batch(cfg, self.images)]
        unlabeled = [{"image": workload.image, "strong_image": strong}] * self.images
        mappers = [SemiMapper(cfg, is_labeled, SEED) for is_labeled in (True, False)]
        position = 0
        while True:
            with self.clock.phase("data"):
                for mapper in mappers:
                    for number in range(position, position + self.images):
                        mapper(record, number)
            position += self.images
            yield SemiBatch(labeled, unlabeled)

    def _time_phases(self, report: PseudoLabelReport) -> None:
        model, step = self.model, self.step
        for owner, method, name in (
            (model, "pseudo_label", "teacher"),
            (model, "forward", "student"),
            (step.optimizer, "zero_grad", "update"),
            (step.grad_scaler, "step", "update"),
            (step.grad_scaler, "update", "update"),
            (model, "update_teacher", "EMA"),
            (step, "_write_metrics", "logging"),
            (report, "after_step", "logging"),
            *((model.monitor, method, "logging") for method in ("labels", "counts", "losses")),
        ):
            self.clock.wrap(owner, method, name)
        scale = step.grad_scaler.scale

        def scale_and_time(loss: Tensor) -> SimpleNamespace:
            scaled = SimpleNamespace(backward=scale(loss).backward)
            self.clock.wrap(scaled, "backward", "backward")
            return scaled

        step.grad_scaler.scale = scale_and_time

    def _work(self, mode: str) -> None:
        self.clock.restart()
        with self.storage:
            torch.manual_seed(SEED)
            self.step.before_step()
            self.step.run_step()
            self.step.after_step()
        self.phases.append(self.clock.seconds)
        _, labels = self.model.monitor.latest
        self.seen[mode]["pseudo boxes"] = [len(label) for label in labels]

    def differs(self, mode: str) -> list[str]:
        """Where the work counted is not :func:`expected_counts`, a phrase each."""
        seen = self.seen[mode]
        return [
            f"{name} {seen.get(name, [])} instead of {' and '.join(map(str, numbers))}"
            for name, numbers in self.wanted.items()
            if set(seen.get(name, [])) != set(numbers)
        ]


def is_semisup(cfg: CfgNode) -> bool:
    """Whether a configuration trains a student and its teacher."""
    return TeacherStudentRCNN.__name__ == cfg.MODEL.META_ARCHITECTURE


def expected_counts(cfg: CfgNode, workload: Workload, images: int) -> dict[str, list[int]]:
    """Boxes of each call of a branch, and pseudo boxes of each picture; see :class:`Subject`.

    The student's calls are one for both views of the labelled pictures, one for the unlabelled.
    """
    rois = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    positives = int(rois * cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION)
    wanted = {
        "teacher box": [len(_teacher_proposals(workload, cfg)) * images],
        "student box": [2 * rois * images, rois * images],
        "pseudo boxes": [NUM_OBJECTS],
    }
    if cfg.MODEL.MASK_ON:
        wanted["student mask"] = [2 * positives * images]
        if cfg.SEMISUP.LOSS_WEIGHT.MASK > 0:
            wanted["student mask"] += [positives * images]
            wanted["teacher mask"] = [NUM_OBJECTS * images]
    return wanted


def fix_teacher(teacher: nn.Module, workload: Workload, cfg: CfgNode) -> None:
    """Have the teacher find the workload's objects, in place: ``NUM_OBJECTS`` pseudo boxes.

    Some of its proposals are the objects' boxes. They and those that overlap an object by 0.82 or
    more are of its class, all above any threshold, the more overlap the higher: NMS leaves the
    objects' own. The IoU filter, if there is one, removes nothing.

    Raises:
        ValueError: see :func:`.workload.fix_decisions`.
    """
    proposals, logits = teacher_decisions(workload, cfg)
    replace_decisions(teacher, cfg, {"inference": proposals}, logits)

    def trust(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return torch.full_like(output, SURE)

    for module in teacher.modules():
        if isinstance(module, IoUHead):
            module.register_forward_hook(trust)


def teacher_decisions(workload: Workload, cfg: CfgNode) -> tuple[Tensor, Tensor]:
    """Boxes (R, 4) and class logits (R, K + 1) of :func:`fix_teacher`, background last."""
    boxes, classes = _teacher_proposals(workload, cfg), cfg.MODEL.ROI_HEADS.NUM_CLASSES
    boxes = torch.cat([workload.truths, boxes[NUM_OBJECTS:]])
    ious, objects = pairwise_iou(Boxes(boxes), Boxes(workload.truths)).max(dim=1)
    logits = torch.full((len(boxes), classes + 1), -10.0)
    logits[:, -1] = 0.0
    (found,) = (ious > 0.5).nonzero(as_tuple=True)
    # 7.3 to 8: probabilities above 0.995, in steps that bf16 can tell from the objects' own.
    logits[found, objects[found] % classes] = 4 + 4 * ious[found]
    return boxes, logits


def _teacher_proposals(workload: Workload, cfg: CfgNode) -> Tensor:
    as_in_training = cfg.SEMISUP.TEACHER_TRAIN_PROPOSALS
    return workload.proposals["train" if as_in_training else "inference"]


def strong_view(cfg: CfgNode, workload: Workload) -> Tensor:
    """The workload's picture (3, H, W) with the configuration's strong augmentation."""
    augment = StrongAugment.from_config(cfg)
    if augment is None:
        return workload.image
    picture = np.ascontiguousarray(workload.image.permute(1, 2, 0).numpy())
    strong = augment(picture, np.random.default_rng(SEED))
    return torch.from_numpy(strong).permute(2, 0, 1).contiguous()


def write_record(folder: Path, workload: Workload) -> dict[str, Any]:
    """Write a JPEG file of the workload's size; returns its record with the objects as polygons.

    Its content is coarse noise, which takes some 2 bits a pixel, as photographs do.
    """
    height, width = workload.image.shape[1:]
    coarse = workload.image[:, ::16, ::16].permute(1, 2, 0).numpy()
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    path = folder / "picture.jpg"
    cv2.imwrite(str(path), picture)
    angles = [2 * math.pi * step / 16 for step in range(16)]
    annotations = []
    for x1, y1, x2, y2 in workload.truths.tolist():
        corners = [
            ((x1 + x2 + (x2 - x1) * math.cos(a)) / 2, (y1 + y2 + (y2 - y1) * math.sin(a)) / 2)
            for a in angles
        ]
        annotations.append(
            {
                "bbox": [x1, y1, x2, y2],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "segmentation": [[number for corner in corners for number in corner]],
            }
        )
    size = {"height": height, "width": width}
    return {"file_name": str(path), "image_id": 0, **size, "annotations": annotations}
