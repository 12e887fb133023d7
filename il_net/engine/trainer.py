"""The training step with mixed precision, and the trainer assembled from a configuration."""

import contextlib
import logging
import time
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
)
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import Checkpointer
from ..data.split import make_split, split_records, train_records, write_split
from ..evaluation.build import build_evaluator
from .nonfinite import GRADIENTS, NonFiniteGuard, anywhere, gradients_are_finite, rng_state
from .resumable import ResumableTrainer, build_resumable_loader
from .roi_statistics import RoIStatisticsReport, counting_modules

logger = logging.getLogger(__name__)

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Detectron2's, and the norm of all gradients together (thesis section 2.1: at most 35).
CLIP_TYPES = ("value", "norm", "full_model")


class TrainStep(SimpleTrainer):
    """One optimisation step: forward, backward, update.

    Differs from Detectron2's ``AMPTrainer``: bf16 beside fp16, and the CPU beside CUDA.

    Args:
        model, data_loader, optimizer: as in ``SimpleTrainer``.
        amp_dtype: None for full precision; fp16 scales the loss.
        accumulate: batches whose gradients are averaged before the update.
        guard: told of numbers that are not finite; without one they raise FloatingPointError.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        amp_dtype: torch.dtype | None = None,
        accumulate: int = 1,
        guard: NonFiniteGuard | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.guard = guard
        self.accumulate = accumulate
        self.amp_dtype = amp_dtype
        self.device = next(model.parameters()).device
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=amp_dtype == torch.float16
        )

    def run_step(self) -> None:
        """Draw the batches, sum the losses, update the weights if all is finite everywhere."""
        assert self.model.training, "the model was left in evaluation mode"
        self.optimizer.zero_grad()
        if self.guard is not None:
            self.guard.before_step()
        rng, batches = [], []
        sums: dict[str, Tensor] = {}
        data_time = 0.0
        for left in reversed(range(self.accumulate)):
            start = time.perf_counter()
            batches.append(next(self._data_loader_iter))
            data_time += time.perf_counter() - start
            rng.append(rng_state())
            # Processes exchange gradients once, with the last batch.
            wait = left and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if wait else contextlib.nullcontext():
                losses = self._backward(batches[-1])
            for name, loss in losses.items():
                sums[name] = loss.detach() + sums.get(name, 0.0)
        # One transfer a step, for all losses together and after the backward pass is under way;
        # the weights change only when it has come.
        finite = gradients_are_finite(self.model.parameters()).float()
        *values, finite = torch.stack([*(v.float() for v in sums.values()), finite]).cpu()
        bad = [name for name, v in zip(sums, values, strict=True) if not torch.isfinite(v)]
        bad += [] if finite or bad or self._may_overflow() else [GRADIENTS]
        if anywhere(bool(bad), self.device):
            if self.guard is None:
                raise FloatingPointError(f"not finite: {', '.join(bad)}")
            self.guard.handle(self.iter, bad, batches, rng)
            self.optimizer.zero_grad()
            return
        self._write_metrics(dict(zip(sums, values, strict=True)), data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _backward(self, batch: object) -> dict[str, Tensor]:
        with torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            losses = {k: v / self.accumulate for k, v in self.model(batch).items()}
            loss = sum(losses.values())
        self.grad_scaler.scale(loss).backward()
        return losses

    def _may_overflow(self) -> bool:
        """Whether the scaled loss explains such gradients; the scaler then lowers the scale."""
        return self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() > 1

    def state_dict(self) -> dict:
        """Detectron2's state and the loss scale."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Undo ``state_dict``; a checkpoint without a loss scale starts a new one."""
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


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
        """Detectron2's, and reports on what RoI heads count."""
        standard = super().build_hooks()
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
        elif self.start_iter:
            logger.info(
                "Resumed at iteration %d of %d from %s",
                self.start_iter,
                self.max_iter,
                self.checkpointer.get_checkpoint_file(),
            )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's; ``CLIP_TYPE: "full_model"`` clips the norm of all gradients together.

        Raises:
            ValueError: ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` is none of ``CLIP_TYPES``.
        """
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if clip.CLIP_TYPE not in CLIP_TYPES:
            raise ValueError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is one of {list(CLIP_TYPES)}, "
                f"got {clip.CLIP_TYPE!r}"
            )
        if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
            return super().build_optimizer(cfg, model)
        plain = cfg.clone()
        plain.defrost()
        plain.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer = super().build_optimizer(plain, model)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def clip_all(*_: object) -> None:
            nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

        # Inside the optimizer's step, as Detectron2 clips: fp16's loss scale is undone by then.
        optimizer.register_step_pre_hook(clip_all)
        return optimizer

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
        records = train_records(cfg)
        split = make_split(cfg, records)
        write_split(cfg.OUTPUT_DIR, split)
        labeled, _ = split_records(cfg, records, split)
        return build_resumable_loader(cfg, labeled)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See :func:`il_net.evaluation.build.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The number format that ``SOLVER.AMP`` asks for, None when it is off."""
    if cfg.SOLVER.AMP.DTYPE not in AMP_DTYPES:
        raise ValueError(
            f"SOLVER.AMP.DTYPE is one of {list(AMP_DTYPES)}, got {cfg.SOLVER.AMP.DTYPE!r}"
        )
    return AMP_DTYPES[cfg.SOLVER.AMP.DTYPE] if cfg.SOLVER.AMP.ENABLED else None


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
