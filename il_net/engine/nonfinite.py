"""What happens when a loss or a gradient is no number: found by all processes together, kept, told.

Every process learns in the same step that one of them has met it, so that none waits for another,
and no process changes its weights. The images, the weights and the random numbers of the step are
kept for ``tools/replay_batch.py``.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils import comm
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce

logger = logging.getLogger(__name__)

ACTIONS = ("stop", "skip")
FOLDER = "nonfinite"
# Steps of a run that are kept, each as large as the model: many may be skipped.
KEPT = 3
GRADIENTS = "the gradients"
BOXES = "the predicted boxes"
ADVICE = (
    "Look with tools/replay_batch.py; lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS, or set "
    'SOLVER.CLIP_GRADIENTS.ENABLED True; SOLVER.NONFINITE.ACTION "skip" leaves single steps out'
)

# What is made from one tensor, by name.
_STRUCTURES = {structure.__name__: structure for structure in (Boxes, BitMasks, Keypoints)}
_PLAIN = (str, bytes, bool, int, float, type(None), Tensor)


class NonFiniteGuard:
    """Keeps what led to a non-finite number, and stops the run or lets it skip the step.

    Args:
        model: what is trained, without DDP around it; see :func:`answer_with_nan`.
        folder: the run's.
        action: "stop", or "skip" the step's update.
        limit: steps that may be skipped before the run stops; counted anew after a resume.
    """

    def __init__(self, model: nn.Module, folder: Path, *, action: str, limit: int) -> None:
        self.model = model
        self.folder = folder / FOLDER
        self.action = action
        self.limit = limit
        self.skipped = 0
        answer_with_nan(model)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(by_dtype.values())
        self._before = [[buffer.clone() for buffer in group] for group in self._buffers]

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> "NonFiniteGuard":
        """Read ``SOLVER.NONFINITE``.

        Raises:
            ValueError: no such action, or a negative limit.
        """
        node = cfg.SOLVER.NONFINITE
        if node.ACTION not in ACTIONS:
            raise ValueError(
                f"SOLVER.NONFINITE.ACTION is one of {list(ACTIONS)}, got {node.ACTION!r}"
            )
        if node.LIMIT < 0:
            raise ValueError(f"SOLVER.NONFINITE.LIMIT is 0 or more, got {node.LIMIT}")
        return cls(model, Path(cfg.OUTPUT_DIR), action=node.ACTION, limit=node.LIMIT)

    def before_step(self) -> None:
        """Note what a forward pass may change: running statistics and counts in buffers."""
        for before, buffers in zip(self._before, self._buffers, strict=True):
            torch._foreach_copy_(before, buffers)

    def handle(self, iteration: int, bad: list[str], batches: list[Any], rng: list[dict]) -> None:
        """Keep the step; returns if it is to be skipped. Every process calls it.

        Args:
            iteration: of the step.
            bad: what is not finite in this process, perhaps nothing.
            batches: what this process read for the step.
            rng: of :func:`rng_state` before each of them.

        Raises:
            SystemExit: the run is to stop; with the message in the main process.
        """
        for before, buffers in zip(self._before, self._buffers, strict=True):
            torch._foreach_copy_(buffers, before)
        causes = _causes(comm.all_gather((bad, sorted(set(file_names(batches))))))
        place = ""
        if comm.get_rank() in causes and self.skipped < KEPT:
            place = self._keep(iteration, bad, batches, rng)
        # Also waits until all have written: the first process that ends takes the others with it.
        places = [place for place in comm.all_gather(place) if place]
        text = (
            f"iteration {iteration}: not finite: {'; '.join(causes.values())}. "
            f"Inputs and weights: {', '.join(places) or self.folder}"
        )
        self.skipped += 1
        if self.action == "skip" and self.skipped <= self.limit:
            logger.warning("%s. The step is skipped (%d so far)", text, self.skipped)
            return
        if self.action == "skip":
            text += f". SOLVER.NONFINITE.LIMIT {self.limit} steps were skipped before"
        text += f". {ADVICE}"
        if not comm.is_main_process():
            raise SystemExit(1)
        # For the log; and a launcher may end this process before its last words.
        logger.error(text)
        raise SystemExit(f"error: {text}")

    def _keep(self, iteration: int, bad: list[str], batches: list[Any], rng: list[dict]) -> str:
        """Write the step; returns the file, or why there is none."""
        path = self.folder / f"iter_{iteration:07d}_rank{comm.get_rank()}.pt"
        partial = path.with_suffix(".partial")
        try:
            step = {
                "iteration": iteration,
                "bad": bad,
                "batches": [pack_batch(batch) for batch in batches],
                "rng": rng,
                "model": self.model.state_dict(),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(step, file)
            partial.replace(path)
        except Exception as error:  # a full disk or whatever else: the other processes wait
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            return f"not kept ({' '.join(str(error).split())})"
        return str(path)


def _causes(found: list[tuple[list[str], list[str]]]) -> dict[int, str]:
    """Rank to what it met, from names and files of all ranks.

    One process' loss is in the gradients of all of them: who has only these is not the cause.
    """
    losses = any(set(names) - {GRADIENTS} for names, _ in found)
    return {
        rank: f"{', '.join(names)} on rank {rank} with {', '.join(files)}"
        for rank, (names, files) in enumerate(found)
        if names and not (losses and GRADIENTS in names)
    }


def answer_with_nan(model: nn.Module) -> None:
    """Where a training forward pass gives up on a NaN, let it return a NaN as its only loss.

    Detectron2's RPN raises FloatingPointError, clipping boxes AssertionError. With no loss this
    process would have no gradients, and all others would wait for them.
    """
    forward = model.forward

    @functools.wraps(forward)
    def answer(*args: object, **kwargs: object) -> Any:
        try:
            return forward(*args, **kwargs)
        except (FloatingPointError, AssertionError) as error:
            if not model.training or "NaN" not in str(error):
                raise
        return {BOXES: math.nan * sum(p.sum() for p in model.parameters() if p.requires_grad)}

    model.forward = answer


def anywhere(bad: bool, device: torch.device) -> bool:
    """Whether any process says so; a small exchange where there are several."""
    if comm.get_world_size() == 1:
        return bad
    flag = torch.tensor(float(bad), device=device)
    all_reduce(flag, ReduceOp.MAX)
    return bool(flag.item())


def gradients_are_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A bool on the parameters' device: no gradient has a NaN or an infinity."""
    gradients = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
    norms = torch._foreach_norm(gradients, float("inf"))
    return torch.isfinite(torch.stack([norm.float() for norm in norms])).all()


def rng_state() -> dict[str, Tensor]:
    """torch's random numbers of this process: {"cpu": state, "cuda": state}."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Undo :func:`rng_state`; CUDA's part only where there is a GPU."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def file_names(batches: Sequence[Any]) -> Iterator[str]:
    """The image files of batches, plain ones and those of two groups."""
    for batch in batches:
        for records in _groups(batch).values():
            yield from (str(record.get("file_name", "?")) for record in records)


def pack_batch(batch: Any) -> dict[str, list[dict]]:
    """A batch as plain containers, values and tensors: group name to records, "" without groups.

    Such files load with ``weights_only=True``; what is neither that nor Detectron2's becomes text.

    Args:
        batch: a list of records, or an object with ``labeled`` and ``unlabeled`` ones.
    """
    return _pack(_groups(batch))


def unpack_batch(packed: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Undo :func:`pack_batch`, but for the object around the groups; arrays are tensors."""
    return _unpack(packed)


def _groups(batch: Any) -> dict[str, list[dict]]:
    if hasattr(batch, "labeled"):
        return {"labeled": batch.labeled, "unlabeled": batch.unlabeled}
    return {"": batch} if isinstance(batch, list) else {}


def _pack(value: Any) -> Any:
    if isinstance(value, Instances):
        fields = _pack(value.get_fields())
        return {"is": "Instances", "size": tuple(map(int, value.image_size)), "fields": fields}
    if type(value).__name__ in _STRUCTURES:
        return {"is": type(value).__name__, "tensor": value.tensor}
    if isinstance(value, PolygonMasks):
        return {"is": "PolygonMasks", "polygons": _pack(value.polygons)}
    if isinstance(value, dict):
        return {key: _pack(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(entry) for entry in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.as_tensor(np.ascontiguousarray(value))
    if isinstance(value, (np.ndarray, np.generic)):
        return _pack(value.tolist())
    # A class that is also a number, as BoxMode, would not be read.
    return value if type(value) in _PLAIN else str(value)


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("is")
    if kind == "Instances":
        return Instances(value["size"], **_unpack(value["fields"]))
    if kind == "PolygonMasks":
        return PolygonMasks([[p.numpy() for p in own] for own in value["polygons"]])
    if kind in _STRUCTURES:
        return _STRUCTURES[kind](value["tensor"])
    return {key: _unpack(entry) for key, entry in value.items()}
