"""Time and peak memory of detectors that are all given the same work, measured in turn.

For comparisons like the speed and memory columns of thesis Tables 2.6 to 2.16. What the work is:
:mod:`il_net.benchmark.workload`.
"""

import datetime
import importlib
import itertools
import logging
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.profiler import ProfilerActivity

from ..engine.train_step import TrainStep
from ..engine.trainer import Trainer
from .workload import MODES, SEED, SEMISUP, Workload, fix_decisions, settle_norms

logger = logging.getLogger(__name__)

# Boxes per picture in each call of a branch's RoI extractor, and detections.
EXPECTED = {
    "inference": {"box": 1000, "mask": 100, "detections": 100},
    "train": {"box": 512, "mask": 128},
}
# Names of RoI extractors and their branch: Detectron2's and this project's, and torchvision's.
EXTRACTOR = re.compile(r"([^.]+)_(?:pooler|roi_pool)$")


class Subject:
    """One model of a comparison, with random weights and the decisions of the workload.

    The training step is this project's, with learning rate 0: it does all of its work and leaves
    the weights as they are, so that every step is the same.

    Args:
        label: the model's name in messages.
        cfg: configuration; ``MODEL.DEVICE`` says where to run.
        workload: see :func:`.workload.make_workload`.
        images: pictures per training step; inference takes one.
        amp_dtype: number format of autocast, None for fp32.

    Attributes:
        parameters: numbers in the parameters that train.
        seen: mode to the boxes of each call of a branch's RoI extractor, in all pictures
            together, as counted in the first run: ``{"box": [1000], "mask": [100]}``; at
            inference also ``"detections"``.
        phases: per training step the seconds of its parts, where they are timed
            (:mod:`.semisup_benchmark`).
        peak_bytes: mode to the peak of this model's memory over all runs, weights, gradients
            and optimizer included; None on the CPU. The second training step is the first that
            starts with gradients and momentum.

    Raises:
        ValueError: the configuration is not of an R-CNN with proposals and class scores.
    """

    def __init__(
        self,
        label: str,
        cfg: CfgNode,
        workload: Workload,
        *,
        images: int = 1,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        self.label = label
        self.images = images
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.amp_dtype = amp_dtype
        self.seen: dict[str, dict[str, list[int]]] = {}
        self.phases: list[dict[str, float]] = []
        self.peak_bytes: dict[str, int | None] = dict.fromkeys((*MODES, SEMISUP))
        _allocate_workspaces(self.device)
        before = self._allocated()
        torch.manual_seed(SEED)
        self.model = self._build(cfg, workload)
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.inputs = [{"image": workload.image}]
        still = cfg.clone()
        still.defrost()
        still.SOLVER.BASE_LR = 0.0
        self.step = TrainStep(
            self.model,
            self._prepare(cfg, workload),
            Trainer.build_optimizer(still, self.model),
            amp_dtype=amp_dtype,
        )
        self.storage = EventStorage()
        self.resident = self._allocated() - before

    def _build(self, cfg: CfgNode, workload: Workload) -> nn.Module:
        return build_model(cfg)

    def _prepare(self, cfg: CfgNode, workload: Workload) -> Iterable:
        """Fix what the model decides; returns the batches to train on."""
        fix_decisions(self.model, workload, cfg)
        settle_norms(self.model, workload)
        return itertools.repeat(workload.batch(cfg, self.images))

    def differs(self, mode: str) -> list[str]:
        """Where the work counted is not what it should be, a phrase each."""
        return differences(mode, self.seen[mode], self.images)

    def run(self, mode: str) -> float:
        """Run once and return the seconds it took; the first run of a mode also counts boxes."""
        self.model.train(mode != "inference")
        # Nothing but this model's own runs changes its share, so the others' is known exactly.
        others = self._allocated() - self.resident
        if mode in self.seen:
            seconds = self._timed(mode)
        else:
            with count_boxes(self.model) as self.seen[mode]:
                seconds = self._timed(mode)
        if self.device.type == "cuda":
            self.resident = self._allocated() - others
            peak = torch.cuda.max_memory_allocated(self.device) - others
            self.peak_bytes[mode] = max(peak, self.peak_bytes[mode] or 0)
        logger.info("%s %s: %.3f s", mode, self.label, seconds)
        return seconds

    def _timed(self, mode: str) -> float:
        self._synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        self._work(mode)
        self._synchronize()
        return time.perf_counter() - start

    def _work(self, mode: str) -> None:
        if mode == "inference":
            self._detect()
        else:
            with self.storage:
                self.step.run_step()

    @torch.no_grad()
    def _detect(self) -> None:
        with torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            (output,) = self.model(self.inputs)
        self.seen["inference"]["detections"] = [len(output["instances"])]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def _allocate_workspaces(device: torch.device) -> None:
    """cuBLAS keeps a workspace for the forward and one for the backward: not the first model's."""
    if device.type == "cuda":
        x = torch.ones(1, 1, device=device, requires_grad=True)
        (x @ x).sum().backward()


@contextmanager
def count_boxes(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Record how many boxes each call of a branch's RoI extractor gets, by the branch's name.

    An extractor is a module called ``{branch}_pooler``, as Detectron2 and this project name them,
    or ``{branch}_roi_pool``, as torchvision does; its second argument is the pictures' boxes.
    Student and teacher are counted apart, as ``student {branch}`` and ``teacher {branch}``.
    """
    counts: dict[str, list[int]] = {}

    def counter(branch: str) -> Callable[[nn.Module, tuple], None]:
        def count(module: nn.Module, args: tuple) -> None:
            counts.setdefault(branch, []).append(sum(len(boxes) for boxes in args[1]))

        return count

    handles = [
        module.register_forward_pre_hook(counter(_branch(name)))
        for name, module in model.named_modules()
        if EXTRACTOR.search(name)
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _branch(name: str) -> str:
    first, branch = name.split(".")[0], EXTRACTOR.search(name)[1]
    return f"{first} {branch}" if first in ("student", "teacher") else branch


def differences(mode: str, seen: dict[str, list[int]], images: int) -> list[str]:
    """Where a model's work is not what ``EXPECTED`` says, a phrase each.

    Args:
        mode: of ``MODES``.
        seen: as in :class:`Subject`; without "mask" there is no mask branch.
        images: pictures per training step.
    """
    per_run = images if mode == "train" else 1
    wanted = {name: number * per_run for name, number in EXPECTED[mode].items()}
    if "mask" not in seen:
        del wanted["mask"]
    return [
        f"{name} {seen.get(name, [])} instead of {number}"
        for name, number in wanted.items()
        if set(seen.get(name, [])) != {number}
    ]


def in_turn(runs: Sequence[Callable[[], float]], *, warmup: int, repeat: int) -> list[list[float]]:
    """Call all of ``runs`` one after another, again and again: a drift of the machine hits all.

    Args:
        runs: each returns the seconds it took.
        warmup: rounds whose seconds are not kept.
        repeat: rounds whose seconds are.

    Returns:
        For each of ``runs`` its seconds per round.
    """
    rounds = [[run() for run in runs] for _ in range(warmup + repeat)]
    return [list(times) for times in zip(*rounds[warmup:], strict=True)]


def profile(subject: Subject, mode: str, rows: int = 15) -> str:
    """torch.profiler's table of the ``rows`` operators that take longest in one run."""
    activities = [ProfilerActivity.CPU]
    if subject.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        subject.run(mode)
    sort_by = f"self_{subject.device.type}_time_total"
    return profiler.key_averages().table(sort_by=sort_by, row_limit=rows)


def machine_facts(device: str) -> dict[str, object]:
    """What measurements depend on besides the models; ``device`` is "cpu" or "cuda"."""
    libraries = ("torch", "torchvision", "detectron2")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.import_module(name).__version__ for name in libraries},
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def peak_resident_bytes() -> int:
    """The most memory this process has held; on Linux at least what its parent had at its start."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
