"""Semi-supervised training around a step: the teacher's update, reports, the best model."""

import logging
from pathlib import Path

import cv2
import numpy as np
from detectron2.engine import HookBase
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import nn

from ..checkpoint_files import write_state
from ..modeling.teacher_student import TeacherStudentRCNN
from ..predict import draw
from ..safe_load import load_pth

logger = logging.getLogger(__name__)

# Steps without a single pseudo box after which a warning is due.
PATIENCE = 500


class TeacherUpdate(HookBase):
    """Copy or average the student into the teacher before each step.

    Args:
        model: the teacher-student model, without DDP around it.
    """

    def __init__(self, model: TeacherStudentRCNN) -> None:
        self.model = model

    def before_step(self) -> None:
        """Runs before the trainer's forward pass."""
        self.model.update_teacher(self.trainer.iter)


class PseudoLabelReport(HookBase):
    """Write means of the pseudo labels every ``period`` steps, pictures, and a warning without any.

    The last report is after the last step. Every process reports on its own images.

    Args:
        model: the teacher-student model, without DDP around it.
        classes: names of the K classes.
        period: steps between reports; one transfer from the device each.
        picture_period: steps between pictures of pseudo labels in ``folder``; 0: none.
        folder: where they go.
        bgr: whether pictures are in BGR order.
    """

    def __init__(
        self,
        model: TeacherStudentRCNN,
        classes: list[str],
        *,
        period: int,
        picture_period: int,
        folder: Path,
        bgr: bool,
    ) -> None:
        self.model = model
        self.classes = classes
        self.period = period
        self.picture_period = picture_period
        self.folder = folder
        self.bgr = bgr
        self.barren = 0

    def after_step(self) -> None:
        """Runs after the optimizer's step."""
        done = self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            self._report(self.model.monitor.read())
        if self.picture_period and done % self.picture_period == 0 and comm.is_main_process():
            self._draw(done)

    def _report(self, means: dict[str, float | list[float]]) -> None:
        if not means:
            return
        scalars = {}
        for name, value in means.items():
            if isinstance(value, list):
                total = sum(value) or 1.0
                for label, count in zip(self.classes, value, strict=True):
                    scalars[f"{name}/{label}"] = count / total
            else:
                scalars[name] = value
        # Means already: writers shall not take the median of the last twenty of them.
        self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        self.barren = 0 if means["pseudo/boxes_per_image"] > 0 else self.barren + self.period
        if self.barren >= PATIENCE:
            logger.warning(
                "No pseudo box in the last %d steps: unlabelled images teach background only. "
                "Lower SEMISUP.PSEUDO.SCORE_THRESH or raise SEMISUP.BURN_IN_ITERS",
                self.barren,
            )
            self.barren = 0

    def _draw(self, done: int) -> None:
        records, labels = self.model.monitor.latest
        if not records:
            return
        image = records[0]["image"].permute(1, 2, 0).numpy()
        found = labels[0].to("cpu")
        shown = Instances(found.image_size, pred_boxes=found.gt_boxes, scores=found.scores)
        shown.pred_classes = found.gt_classes
        picture = draw(image if self.bgr else image[:, :, ::-1], shown, self.classes)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{done:07d}_{Path(records[0]['file_name']).stem}.jpg"
        cv2.imwrite(str(path), np.ascontiguousarray(picture))


class BestModel(HookBase):
    """Keep ``model_best.pth``, the model with the highest value of a metric.

    Differs from Detectron2's: the file tells its own value, so that a resumed run never replaces a
    better model; and it is no checkpoint to resume from, because a run that is stopped while it
    replaces the file must be able to go on.

    Args:
        metric: name in the event storage, as "teacher/bbox/AP".
        model: what to keep, without DDP around it.
        folder: the run's.
    """

    def __init__(self, metric: str, model: nn.Module, folder: Path) -> None:
        self.metric = metric
        self.model = model
        self.path = folder / "model_best.pth"
        self.best = float("-inf")

    def before_train(self) -> None:
        """Runs once; a resumed run goes on with what the file holds."""
        if self.trainer.start_iter > 0 and self.path.is_file():
            try:
                kept = load_pth(str(self.path), mmap=True)
                self.best = kept["metrics"].get(self.metric, self.best)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                logger.warning("%s can't be read and will be replaced: %s", self.path, error)

    def after_step(self) -> None:
        """Runs after the evaluation of this step, if there was one."""
        value, iteration = self.trainer.storage.latest().get(self.metric, (0.0, -1))
        if iteration < self.trainer.iter or not value > self.best:
            return
        self.best = value
        last = min(self.trainer.iter, self.trainer.max_iter - 1)
        metrics = {self.metric: value}
        state = {"model": self.model.state_dict(), "iteration": last, "metrics": metrics}
        write_state(self.path, state)
        logger.info("%s %.2f is the best so far: saved %s", self.metric, value, self.path.name)

    def after_train(self) -> None:
        """Runs after the last evaluation, which Detectron2 leaves for the end."""
        self.after_step()
