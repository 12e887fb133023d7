"""The trainer of a plain detector, assembled from a configuration."""

import logging
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    TrainerBase,
    create_ddp_model,
)
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from ..checkpoint import Checkpointer
from ..checkpoint_files import FINAL
from ..data.eval_loader import build_eval_loader
from ..data.split import load_split, write_split
from ..evaluation.build import build_evaluator
from .nonfinite import NonFiniteGuard
from .optimizer import build_optimizer
from .resumable import ResumableTrainer, build_resumable_loader
from .roi_statistics import RoIStatisticsReport, counting_modules
from .summed_counts import SummedCounts, summed_buffers
from .train_step import TrainStep, amp_dtype

logger = logging.getLogger(__name__)


class Trainer(ResumableTrainer):
    """Detectron2's ``DefaultTrainer`` with this project's step, checkpointer and evaluators.

    Differs from its parent's constructor: the step above, and DDP also on the CPU.
    """

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_batch_size(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        guard = NonFiniteGuard.from_config(cfg, model)
        on_cpu = next(model.parameters()).device.type == "cpu"
        model = create_ddp_model(
            model, broadcast_buffers=False, **({"device_ids": None} if on_cpu else {})
        )
        self._trainer = TrainStep(
            model,
            data_loader,
            optimizer,
            amp_dtype=amp_dtype(cfg),
            accumulate=cfg.SOLVER.ACCUMULATE,
            guard=guard,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            kept=cfg.SOLVER.CHECKPOINTS_KEPT,
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        if cfg.SOLVER.MAX_ITER <= cfg.SOLVER.WARMUP_ITERS:
            logger.warning(
                "SOLVER.MAX_ITER %d is not above SOLVER.WARMUP_ITERS %d: nearly nothing is learned",
                cfg.SOLVER.MAX_ITER,
                cfg.SOLVER.WARMUP_ITERS,
            )
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, and those for what RoI heads count."""
        standard = super().build_hooks()
        counts = summed_buffers(self._trainer.model)
        if counts and comm.get_world_size() > 1:
            standard.insert(0, SummedCounts(counts))
        if sources := counting_modules(self._trainer.model):
            path = Path(self.cfg.OUTPUT_DIR, "roi_statistics.json")
            # Before the writers, which come last and write what it stores.
            standard.insert(-1, RoIStatisticsReport(sources, path))
        return standard

    def after_train(self) -> None:
        """As Detectron2's, which would also evaluate where the last step of all has failed."""
        if self.iter < self.max_iter:
            self._hooks = [h for h in self._hooks if not isinstance(h, EvalHook)]
        super().after_train()

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; says from where the run goes on."""
        super().resume_or_load(resume=resume)
        if self.start_iter >= self.max_iter:
            logger.info(
                "All %d iterations are done, in %s: its evaluation is repeated. To train on, raise "
                "SOLVER.MAX_ITER",
                *(self.max_iter, self.checkpointer.get_checkpoint_file()),
            )
            if Path(self.checkpointer.get_checkpoint_file()).name != FINAL:  # it was damaged
                self.checkpointer.save(Path(FINAL).stem, iteration=self.start_iter - 1)
        elif self.start_iter:
            logger.info(
                "Resumed at iteration %d of %d from %s",
                self.start_iter,
                self.max_iter,
                self.checkpointer.get_checkpoint_file(),
            )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`il_net.engine.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """As Detectron2's, for ``SOLVER.REFERENCE_WORLD_SIZE``; also what is semi-supervised.

        Raises:
            ValueError: a batch that the reference's processes could not share.
        """
        reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference in (0, num_workers):
            return cfg
        for key in ("IMS_PER_BATCH", "IMS_PER_BATCH_UNLABELED"):
            if cfg.SOLVER[key] % reference:
                raise ValueError(
                    f"SOLVER.{key} {cfg.SOLVER[key]} must be a multiple of "
                    f"SOLVER.REFERENCE_WORLD_SIZE {reference}, for which it was chosen"
                )
        factor = num_workers / reference
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        frozen = scaled.is_frozen()
        scaled.defrost()
        scaled.SOLVER.IMS_PER_BATCH_UNLABELED = round(cfg.SOLVER.IMS_PER_BATCH_UNLABELED * factor)
        scaled.SEMISUP.BURN_IN_ITERS = round(cfg.SEMISUP.BURN_IN_ITERS / factor)
        if frozen:
            scaled.freeze()
        return scaled

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        """Detectron2's, over the images that ``DATASETS.SPLIT`` leaves their labels.

        Images that can't be read are skipped, and a resumed run sees those it would have seen.
        """
        if cfg.DATASETS.SPLIT.PERCENT == 100 and not cfg.DATASETS.SPLIT.FILE:
            return build_resumable_loader(cfg)
        labeled, _, split = load_split(cfg)
        write_split(cfg.OUTPUT_DIR, split)
        return build_resumable_loader(cfg, labeled)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        """See :func:`il_net.data.eval_loader.build_eval_loader`."""
        return build_eval_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See :func:`il_net.evaluation.build.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)


def check_batch_size(cfg: CfgNode) -> None:
    """Refuse a batch that the processes cannot share evenly, and steps without one."""
    processes, batch = comm.get_world_size(), cfg.SOLVER.IMS_PER_BATCH
    if batch < processes or batch % processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {batch} is the batch of all processes together and must be a "
            f"multiple of their number, {processes}"
        )
    if cfg.SOLVER.ACCUMULATE < 1:
        raise ValueError(f"SOLVER.ACCUMULATE must be at least 1, got {cfg.SOLVER.ACCUMULATE}")
