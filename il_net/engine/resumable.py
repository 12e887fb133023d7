"""A trainer that may be stopped at any moment and goes on as if it had not been.

A checkpoint holds the models, the optimizer, the schedule, the loss scale and the iteration. What
is random in a step, and which images it sees, follows from ``SEED``, the iteration and the rank
alone, so that no state of generators or samplers has to be kept.
"""

import errno
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.utils import comm

from ..checkpoint_files import UnwrittenError, choose_checkpoint, tag_last
from ..data.loader import ImageStream, build_labeled_loader
from ..data.mapper import SemiMapper
from ..data.robust import UnreadableImages
from ..data.split import load_train, split_digest
from .preemption import Preemption

logger = logging.getLogger(__name__)

_OR_NEW = "or start a new run from MODEL.WEIGHTS in another OUTPUT_DIR, without --resume"


class ResumableTrainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` with the state and the ends of a run; see ``Trainer``."""

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, and one that watches for SIGTERM and SIGINT."""
        standard = super().build_hooks()
        self.preemption = Preemption()
        place = [isinstance(hook, hooks.EvalHook) for hook in standard].index(True)
        return [*standard[:place], self.preemption, *standard[place:]]

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; the loader of a plain detector goes on, too."""
        super().resume_or_load(resume=resume)
        loader = self._trainer.data_loader
        if isinstance(loader, LabeledLoader):
            loader.start_iter = self.start_iter

    def train(self) -> dict | None:
        """As Detectron2's; SIGTERM and SIGINT end it, see ``Preemption``."""
        with self.preemption:
            return super().train()

    def before_step(self) -> None:
        """Runs before each iteration; seeds it, unless ``SEED`` is negative."""
        self.preemption.step_begins()
        if self.cfg.SEED >= 0:
            rank, ranks = comm.get_rank(), comm.get_world_size()
            torch.manual_seed(self.cfg.SEED * 10**9 + self.iter * ranks + rank)
        super().before_step()

    def after_step(self) -> None:
        """Runs after each iteration.

        Raises:
            SystemExit: a file could not be written, or the run was told to stop.
        """
        with _full_disks_told():
            super().after_step()

    def after_train(self) -> None:
        """Runs after the last iteration, or one that failed.

        Raises:
            SystemExit: as ``after_step``.
        """
        with _full_disks_told():
            super().after_train()

    def save_step(self) -> None:
        """Write the checkpoint of the last step that was done, unless it is there."""
        name = f"model_{self.iter:07d}"
        # After the last step of all it has another name, and was just written.
        if self.iter < self.max_iter - 1 and self.checkpointer.saved != name:
            self.checkpointer.save(name, iteration=self.iter)

    def state_dict(self) -> dict:
        """Iteration, hooks, split, seed and the step's state (release 0.6 leaves that out)."""
        return {
            **TrainerBase.state_dict(self),
            "_trainer": self._trainer.state_dict(),
            "split": split_digest(self.cfg.OUTPUT_DIR),
            "seed": self.cfg.SEED,
            "made_for": self._made_for(),
        }

    def _made_for(self) -> dict:
        """What the numbers of a checkpoint mean nothing without, by key."""
        return {
            "DATASETS.CLASSES": list(self.cfg.DATASETS.CLASSES),
            "SOLVER.OPTIMIZER": self.cfg.SOLVER.OPTIMIZER,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Undo ``state_dict``; warns about a checkpoint of Detectron2 0.6's own trainer.

        Raises:
            ValueError: the run had other labelled or unlabelled images, other classes or another
                optimizer.
        """
        now = self._made_for()
        for key, before in state_dict.get("made_for", {}).items():
            if before != now[key]:
                raise ValueError(
                    f"{key} is {now[key]}, in the run that goes on {before}: restore it, {_OR_NEW}"
                )
        before, now = state_dict.get("split"), split_digest(self.cfg.OUTPUT_DIR)
        if before and now and before != now:
            raise ValueError(
                "The training images or their split into labelled and unlabelled ones are not "
                "those of the run that goes on: restore DATASETS.TRAIN and DATASETS.SPLIT, "
                f"{_OR_NEW}"
            )
        seed = state_dict.get("seed", self.cfg.SEED)
        if seed != self.cfg.SEED:
            logger.warning(
                "The run had SEED %d: with SEED %d it sees other images from here on",
                seed,
                self.cfg.SEED,
            )
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            try:
                self._trainer.load_state_dict(state_dict["_trainer"])
            except ValueError as error:  # of torch, about groups of parameters
                raise ValueError(
                    f"MODEL is not that of the run that goes on ({error}): restore it, {_OR_NEW}"
                ) from error
        else:
            logger.warning("The checkpoint holds no optimizer state: momentum starts at zero")


@contextmanager
def _full_disks_told() -> Iterator[None]:
    """A disk that is full ends the run with a message: nothing of it is the program's fault."""
    try:
        yield
    except UnwrittenError as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise SystemExit(f"error: {error}: make room, then go on with --resume") from error


class LabeledLoader:
    """Endless batches of labelled images; iterating starts with those of step ``start_iter``.

    Args:
        stream: this process' share of every batch.
        accumulate: batches per step.
        num_workers: processes that read images; 0: this one.
    """

    def __init__(self, stream: ImageStream, *, accumulate: int, num_workers: int) -> None:
        self.stream = stream
        self.accumulate = accumulate
        self.num_workers = num_workers
        self.start_iter = 0

    def __iter__(self) -> Iterator[list[dict]]:
        yield from self.stream.batches(self.start_iter * self.accumulate, self.num_workers)


class _SeededMapper(SemiMapper):
    """Detectron2's training mapper; what is random follows from seed and position."""

    def __call__(self, record: dict, position: int) -> dict:
        sample = super().__call__(record, position)
        del sample["strong_image"]
        return sample


def build_resumable_loader(cfg: CfgNode, records: Sequence[dict] | None = None) -> Iterable:
    """The loader of a plain detector's training.

    Detectron2's own samplers beside ``TrainingSampler``, and precomputed proposals, are read by
    its own loader, from which a resumed run sees other batches.

    Args:
        records: dataset dicts; None: all of ``DATASETS.TRAIN``.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler" or cfg.MODEL.LOAD_PROPOSALS:
        return build_labeled_loader(cfg, records)
    if records is None:
        records = load_train(cfg)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    weak = cfg.clone()
    weak.defrost()
    weak.INPUT.STRONG_AUG.ENABLED = False
    stream = ImageStream(
        records,
        _SeededMapper(weak, True, seed),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        seed=seed,
        unreadable=UnreadableImages.from_config(cfg),
        grouped=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
    )
    return LabeledLoader(
        stream, accumulate=cfg.SOLVER.ACCUMULATE, num_workers=cfg.DATALOADER.NUM_WORKERS
    )


def choose_seed(cfg: CfgNode, resume: bool) -> int:
    """``SEED``, or where it is negative one that is drawn and kept in the run's ``config.yaml``.

    The same in every process.

    Args:
        cfg: before Detectron2 writes its ``config.yaml``.
        resume: whether the run goes on, with the seed that it had.
    """
    if cfg.SEED >= 0:
        return cfg.SEED
    drawn = comm.shared_random_seed()
    kept = comm.all_gather(_kept_seed(cfg.OUTPUT_DIR) if resume else -1)[0]
    return kept if kept >= 0 else drawn


def _kept_seed(folder: str) -> int:
    try:
        seed = yaml.safe_load(Path(folder, "config.yaml").read_text())["SEED"]
    # A run that is killed while it writes the file leaves a part of it.
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError):
        return -1
    return seed if isinstance(seed, int) else -1


def choose_start(folder: str, or_start: bool) -> bool:
    """Whether a run goes on, from the checkpoint that ``last_checkpoint`` names afterwards.

    The main process looks, and tells the others; see ``choose_checkpoint``.

    Raises:
        ValueError: in every process, if there is no checkpoint, or none that may be used.
    """
    chosen, problem = False, ""
    if comm.is_main_process():
        try:
            if path := choose_checkpoint(Path(folder), or_start):
                tag_last(path)
                chosen = True
        except (ValueError, OSError) as error:
            problem = str(error)
    chosen, problem = comm.all_gather((chosen, problem))[0]
    if problem:
        raise ValueError(problem)
    return chosen
