"""The training step with mixed precision."""

import contextlib
import time
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .nonfinite import GRADIENTS, NonFiniteGuard, anywhere, gradients_are_finite, rng_state

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The number format that ``SOLVER.AMP`` asks for, None when it is off."""
    if cfg.SOLVER.AMP.DTYPE not in AMP_DTYPES:
        raise ValueError(
            f"SOLVER.AMP.DTYPE is one of {list(AMP_DTYPES)}, got {cfg.SOLVER.AMP.DTYPE!r}"
        )
    return AMP_DTYPES[cfg.SOLVER.AMP.DTYPE] if cfg.SOLVER.AMP.ENABLED else None
