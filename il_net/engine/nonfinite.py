"""What happens when a loss or a gradient is no number: found by all processes together, kept, told.

Every process learns in the same step that one of them has met it, so that none waits for another,
and no process changes its weights. The images, the weights and the random numbers of the step are
kept for ``tools/replay_batch.py``.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils import comm
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce

logger = logging.getLogger(__name__)

ACTIONS = ("stop", "skip")
FOLDER = "nonfinite"
GRADIENTS = "the gradients"


class NonFiniteGuard:
    """Keeps what led to a non-finite number, and stops the run or lets it skip the step.

    Args:
        model: what is trained, without DDP around it.
        folder: the run's.
        action: "stop", or "skip" the step's update.
        limit: steps that may be skipped before the run stops.
    """

    def __init__(self, model: nn.Module, folder: Path, *, action: str, limit: int) -> None:
        self.model = model
        self.folder = folder / FOLDER
        self.action = action
        self.limit = limit
        self.skipped = 0

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> "NonFiniteGuard":
        """Read ``SOLVER.NONFINITE``."""
        node = cfg.SOLVER.NONFINITE
        if node.ACTION not in ACTIONS:
            raise ValueError(
                f"SOLVER.NONFINITE.ACTION is one of {list(ACTIONS)}, got {node.ACTION!r}"
            )
        if node.LIMIT < 0:
            raise ValueError(f"SOLVER.NONFINITE.LIMIT is 0 or more, got {node.LIMIT}")
        return cls(model, Path(cfg.OUTPUT_DIR), action=node.ACTION, limit=node.LIMIT)

    def handle(self, iteration: int, bad: list[str], batches: list[Any], rng: dict) -> None:
        """Keep the step; returns if it is to be skipped. Every process calls it.

        Args:
            iteration: of the step.
            bad: what is not finite in this process, perhaps nothing.
            batches: what this process read for the step.
            rng: of :func:`rng_state` before it.

        Raises:
            SystemExit: the run is to stop; with the message in the main process.
        """
        path = self.folder / f"iter_{iteration:07d}_rank{comm.get_rank()}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "iteration": iteration,
                "bad": bad,
                "batches": [pack_batch(batch) for batch in batches],
                "rng": rng,
                "model": self.model.state_dict(),
            },
            path,
        )
        found = comm.all_gather((bad, sorted(set(file_names(batches)))))
        self.skipped += 1
        where = "; ".join(
            f"{', '.join(names)} on rank {rank} with {', '.join(files)}"
            for rank, (names, files) in enumerate(found)
            if names
        )
        text = f"iteration {iteration}: not finite: {where}. Inputs and weights: {self.folder}"
        if self.action == "skip" and self.skipped <= self.limit:
            logger.warning("%s. The step is skipped (%d so far)", text, self.skipped)
            return
        advice = (
            "Look with tools/replay_batch.py; lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS, or "
            'set SOLVER.CLIP_GRADIENTS.ENABLED True; SOLVER.NONFINITE.ACTION "skip" leaves single '
            "steps out"
        )
        if self.action == "skip":
            advice = f"SOLVER.NONFINITE.LIMIT {self.limit} steps were skipped before. {advice}"
        raise SystemExit(f"error: {text}. {advice}" if comm.is_main_process() else 1)


def anywhere(bad: bool, device: torch.device) -> bool:
    """Whether any process says so; a small exchange where there are several."""
    if comm.get_world_size() == 1:
        return bad
    flag = torch.tensor(float(bad), device=device)
    all_reduce(flag, ReduceOp.MAX)
    return bool(flag.item())


def gradients_are_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A bool on the parameters' device: no gradient has a NaN or an infinity."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients, float("inf"))
    return torch.isfinite(torch.stack([norm.float() for norm in norms])).all()


def rng_state() -> dict[str, Tensor]:
    """torch's random numbers of this process: {"cpu": state, "cuda": state}."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
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
        for records in pack_batch(batch).values():
            yield from (str(record.get("file_name", "?")) for record in records)


def pack_batch(batch: Any) -> dict[str, list[dict]]:
    """A batch as containers and tensors: group name to records, "" without groups.

    Args:
        batch: a list of records, or an object with ``labeled`` and ``unlabeled`` ones.
    """
    groups = {"": batch} if isinstance(batch, list) else vars(batch)
    return {
        group: [
            {k: _pack(v) if isinstance(v, Instances) else v for k, v in record.items()}
            for record in records
        ]
        for group, records in groups.items()
    }


def unpack_records(records: list[dict]) -> list[dict]:
    """The records of one group of :func:`pack_batch`, ready for a model."""
    return [
        {k: _unpack(v) if k == "instances" else v for k, v in record.items()} for record in records
    ]


def _pack(instances: Instances) -> dict:
    masks = instances.get("gt_masks") if instances.has("gt_masks") else None
    packed = {
        "size": tuple(instances.image_size),
        "boxes": instances.gt_boxes.tensor,
        "classes": instances.gt_classes,
    }
    if isinstance(masks, BitMasks):
        packed["bitmasks"] = masks.tensor
    elif isinstance(masks, PolygonMasks):
        packed["polygons"] = [[torch.as_tensor(p) for p in own] for own in masks.polygons]
    return packed


def _unpack(packed: dict) -> Instances:
    instances = Instances(packed["size"], gt_boxes=Boxes(packed["boxes"]))
    instances.gt_classes = packed["classes"]
    if "bitmasks" in packed:
        instances.gt_masks = BitMasks(packed["bitmasks"])
    elif "polygons" in packed:
        instances.gt_masks = PolygonMasks([[p.numpy() for p in own] for own in packed["polygons"]])
    return instances
