"""The trainer of semi-supervised runs: two streams of images, a teacher, two evaluations.

Thesis section 2.4.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import Checkpointer
from ..data.loader import SemiLoader, build_semi_loader
from ..data.split import write_split
from ..modeling.teacher_student import TeacherStudentRCNN
from .hooks import BestModel, PseudoLabelReport, TeacherUpdate
from .quality import PseudoLabelQuality, unlabeled_truth
from .trainer import Trainer

logger = logging.getLogger(__name__)

MODELS = ("teacher", "student")


class ILNetTrainer(Trainer):
    """``Trainer`` for ``MODEL.META_ARCHITECTURE: TeacherStudentRCNN``."""

    @property
    def semisup(self) -> TeacherStudentRCNN:
        """The model, without DDP around it."""
        return bare(self._trainer.model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        """Both streams of images; writes the run's ``split.json``."""
        loader = build_semi_loader(cfg)
        write_split(cfg.OUTPUT_DIR, loader.split)
        return loader

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, the teacher's update before and the reports after them."""
        standard, folder = super().build_hooks(), Path(self.cfg.OUTPUT_DIR)
        report = PseudoLabelReport(
            self.semisup,
            list(self.cfg.DATASETS.CLASSES),
            period=20,
            picture_period=self.cfg.VIS_PERIOD,
            folder=folder / "pseudo_labels",
            bgr=self.cfg.INPUT.FORMAT == "BGR",
        )
        compare = []
        if self.cfg.SEMISUP.PSEUDO.COMPARE_WITH_TRUTH and comm.is_main_process():
            truth = unlabeled_truth(self.cfg, self._trainer.data_loader.split)
            path, period = folder / "pseudo_quality.json", self.cfg.TEST.EVAL_PERIOD
            compare = [PseudoLabelQuality(self.semisup, truth, self.cfg, period=period, path=path)]
        best = BestModel(best_metric(self.cfg), self.semisup, folder)
        writers = [h for h in standard if isinstance(h, hooks.PeriodicWriter)]
        others = [h for h in standard if h not in writers]
        first = TeacherUpdate(self.semisup)
        return [first, *others, best, *compare, report, *writers]

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on with a run, or start from ``MODEL.WEIGHTS``.

        Weights of a plain detector or a backbone go to the student and, as the teacher is a copy
        of it, to the teacher; a checkpoint of such a run fills both.

        Raises:
            ValueError: burn-in ends at another step than in the run that goes on.
        """
        if resume and self.checkpointer.has_checkpoint():
            super().resume_or_load(resume=True)
            check_burn_in(self.semisup, self.start_iter)
        else:
            load_initial(self.semisup, self.cfg.MODEL.WEIGHTS)
        loader: SemiLoader = self._trainer.data_loader
        loader.start_iter = self.start_iter

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict:
        """Evaluate the models that ``SEMISUP.EVAL`` names, each in a folder of its own.

        Returns:
            {"teacher": {...}, "student": {...}}; the teacher is left out before burn-in ends.
        """
        model, results = bare(model), OrderedDict()
        for name in cfg.SEMISUP.EVAL:
            if name == "teacher" and not model.burned_in:
                logger.info("The teacher is not evaluated before burn-in ends")
                continue
            logger.info("Evaluation of the %s", name)
            own = cfg.clone()
            own.defrost()
            own.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, name))
            results[name] = super().test(own, getattr(model, name), evaluators)
        if not results:
            logger.warning(
                "Nothing was evaluated: burn-in has not ended, and SEMISUP.EVAL is %s; add student",
                cfg.SEMISUP.EVAL,
            )
        return results


def bare(model: nn.Module) -> TeacherStudentRCNN:
    """The model inside DDP, or itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def best_metric(cfg: CfgNode) -> str:
    """The value that ``model_best.pth`` has the highest of, by its name in the event storage.

    Box AP on the first test set, of the first model of ``SEMISUP.EVAL`` that the run will have.
    """
    models = [m for m in cfg.SEMISUP.EVAL if m == "student" or has_teacher(cfg)]
    tests = cfg.DATASETS.TEST
    # Detectron2 names the set where there are several.
    return "/".join([models[0], *(tests[:1] if len(tests) > 1 else ()), "bbox", "AP"])


def has_teacher(cfg: CfgNode) -> bool:
    """Whether burn-in ends before the run does."""
    return cfg.SEMISUP.BURN_IN_ITERS < cfg.SOLVER.MAX_ITER


def load_initial(model: TeacherStudentRCNN, path: str) -> None:
    """Load ``MODEL.WEIGHTS`` of any kind at the start of a run.

    A ``.pth`` or ``.safetensors`` file may hold such a model, or a detector; anything else
    (Detectron2's ``.pkl``, a backbone) is matched with the student.
    """
    if path.endswith((".pth", ".safetensors")):
        Checkpointer(model).load(path, checkpointables=[])
        model.burned_in.fill_(False)
    else:
        Checkpointer(model.student).load(path, checkpointables=[])
        model.teacher.load_state_dict(model.student.state_dict())


def check_burn_in(model: TeacherStudentRCNN, start_iter: int) -> None:
    """Refuse a burn-in that would have ended before, or did not end where the checkpoint's did."""
    if bool(model.burned_in) == (start_iter > model.burn_in_iters):
        return
    if model.burned_in:
        problem = "but in the checkpoint it has ended: its teacher would be lost"
    else:
        problem = f"but in the checkpoint it has not ended: {start_iter} or more is possible"
    raise ValueError(
        f"SEMISUP.BURN_IN_ITERS is {model.burn_in_iters} and the run goes on at iteration "
        f"{start_iter}, {problem}"
    )


def trainer_class(cfg: CfgNode) -> type[Trainer]:
    """The trainer that fits ``MODEL.META_ARCHITECTURE``; warns about unlabelled images unused.

    Raises:
        ValueError: a semi-supervised key that cannot work.
    """
    if TeacherStudentRCNN.__name__ != cfg.MODEL.META_ARCHITECTURE:
        if cfg.DATASETS.UNLABELED:
            logger.warning(
                "DATASETS.UNLABELED is not read: MODEL.META_ARCHITECTURE is %s, not %s",
                cfg.MODEL.META_ARCHITECTURE,
                TeacherStudentRCNN.__name__,
            )
        return Trainer
    unknown = set(cfg.SEMISUP.EVAL) - set(MODELS)
    if unknown or not cfg.SEMISUP.EVAL:
        raise ValueError(f"SEMISUP.EVAL names one or both of {MODELS}, got {cfg.SEMISUP.EVAL}")
    if has_teacher(cfg) and cfg.SOLVER.IMS_PER_BATCH_UNLABELED < 1:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH_UNLABELED is {cfg.SOLVER.IMS_PER_BATCH_UNLABELED}: set it, or "
            f"SEMISUP.BURN_IN_ITERS to SOLVER.MAX_ITER ({cfg.SOLVER.MAX_ITER}) to train on "
            "labelled images alone"
        )
    if not has_teacher(cfg) and "student" not in cfg.SEMISUP.EVAL:
        raise ValueError(
            f"SEMISUP.EVAL is {cfg.SEMISUP.EVAL}, but with SEMISUP.BURN_IN_ITERS "
            f"{cfg.SEMISUP.BURN_IN_ITERS} of {cfg.SOLVER.MAX_ITER} SOLVER.MAX_ITER there is never "
            "a teacher: name the student"
        )
    return ILNetTrainer
