"""Two endless streams of images, labelled and unlabelled, as one batch of both for every step.

Differs from Unbiased Teacher's loader (thesis section 2.4): the streams do not wait for each other,
so that nothing is dropped; images are grouped by shape before they are read; no unlabelled one is
read before burn-in ends; and what a run sees follows from its seed alone, whatever the number of
workers, and also after a resume.
"""

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader

from .mapper import SemiMapper, TrainMapper, random_source
from .robust import CheckedLoader, MappedImages, UnreadableImages, probe_headers
from .split import Split, load_split, load_train

logger = logging.getLogger(__name__)

# Forked workers share the records. Under `launch`, and since Python 3.14, others would be the
# default, which get a copy each.
_WORKER_START = "fork" if sys.platform == "linux" else None


@dataclass(frozen=True)
class SemiBatch:
    """The images of one process for one step: mapped records, see `SemiMapper`."""

    labeled: list[dict[str, Any]]
    unlabeled: list[dict[str, Any]]  # empty during burn-in


class ImageStream:
    """Endless batches of one group of images: one random order of all after the other.

    All processes make the same batches and take every W-th image of each (W processes, from their
    rank on), so a run on 4 GPUs sees the same batches as one on 1 GPU. With `grouped`, a batch
    holds wide images or others only; an image waits until its batch is full. Nothing is dropped.

    Args:
        records: the images, not empty.
        mapper: turns a record and its position into a sample.
        batch_size: of all processes together.
        seed: of the order.
        unreadable: the account of images that are skipped.
        grouped: see above. Sizes that records lack are read from the files when their turn comes.
        pin_memory: hand out tensors from which a GPU can copy while it computes.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: SemiMapper,
        *,
        batch_size: int,
        seed: int,
        unreadable: UnreadableImages,
        grouped: bool,
        pin_memory: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self._images = MappedImages(records, mapper, seed=seed, limit=unreadable.limit)
        self._unreadable = unreadable
        self._group = "labelled" if mapper.group == "labeled" else "unlabelled"
        self._source = random_source(seed, f"{mapper.group} order")
        self._grouped = grouped
        self._pin_memory = pin_memory

    def batches(self, first: int, num_workers: int) -> Iterator[list[dict[str, Any]]]:
        """This process' share of batch `first` and all that follow.

        Args:
            first: number of a batch, from 0. Those before it cost no reading.
            num_workers: processes that map; 0 maps in this one. They end with the iterator.

        Raises:
            SystemExit: see `UnreadableImages.take`; or a worker has died.
        """
        loader = DataLoader(
            self._images,
            # An endless epoch, so that workers are started once.
            batch_sampler=islice(self.index_batches(), first, None),
            num_workers=num_workers,
            collate_fn=trivial_batch_collator,
            pin_memory=self._pin_memory,
            worker_init_fn=_init_worker,
            multiprocessing_context=_WORKER_START if num_workers else None,
            # Its own, because a DataLoader draws a seed, which would shift the model's draws.
            generator=torch.Generator(),
        )
        return iter(CheckedLoader(loader, self._group, self._unreadable))

    def index_batches(self) -> Iterator[list[tuple[int, int, bool | None]]]:
        """This process' share of every batch: position in the stream, index of the record, shape.

        The shape is whether images of the batch are wide, None if they may be both.
        """
        rank, processes = comm.get_rank(), comm.get_world_size()
        waiting: tuple[list, list] = ([], [])
        for position, index in enumerate(self._order()):
            wide = self._images.is_wide(index) if self._grouped else None
            group = waiting[bool(wide)]
            group.append((position, index, wide))
            if len(group) == self.batch_size:
                yield group[rank::processes]
                group.clear()

    def _order(self) -> Iterator[int]:
        rng = np.random.default_rng(self._source)
        while True:
            yield from rng.permutation(len(self._images)).tolist()


class SemiLoader:
    """An endless iterable of `SemiBatch`, for this process.

    Iterating starts at step `start_iter`, and again so every time; the batches from there on are
    those of a run that started at 0.

    Args:
        labeled: from the first step on.
        unlabeled: from the step after burn-in on, with workers of its own; None: never.
        burn_in_iters: steps on labelled images alone.
        accumulate: batches per step.
        num_workers: of both streams together; in burn-in all are the labelled one's.
        split: of the training images, for the record.
    """

    def __init__(
        self,
        labeled: ImageStream,
        unlabeled: ImageStream | None,
        *,
        burn_in_iters: int,
        accumulate: int,
        num_workers: int,
        split: Split,
    ) -> None:
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.burn_in_iters = burn_in_iters
        self.accumulate = accumulate
        self.num_workers = num_workers
        self.split = split
        self.start_iter = 0

    def __iter__(self) -> Iterator[SemiBatch]:
        first = self.start_iter * self.accumulate
        burned_in = self.burn_in_iters * self.accumulate
        if self.unlabeled is None or first < burned_in:
            stop = None if self.unlabeled is None else burned_in - first
            for labeled in islice(self.labeled.batches(first, self.num_workers), stop):
                yield SemiBatch(labeled, [])
            first = burned_in
        shares = share_workers(self.num_workers, self.labeled.batch_size, self.unlabeled.batch_size)
        unlabeled = self.unlabeled.batches(first - burned_in, shares[1])
        for labeled in self.labeled.batches(first, shares[0]):
            yield SemiBatch(labeled, next(unlabeled))


def build_semi_loader(cfg: CfgNode) -> SemiLoader:
    """The loader of a semi-supervised run, after `register_datasets`.

    With SEED below 0 the processes agree on a random seed, and a resumed run sees other batches.

    Raises:
        ValueError: a batch that the processes cannot share, ACCUMULATE below 1, no unlabelled
            images or too many that cannot be read; see also `load_split`.
    """
    sizes = {
        "IMS_PER_BATCH": cfg.SOLVER.IMS_PER_BATCH,
        "IMS_PER_BATCH_UNLABELED": cfg.SOLVER.IMS_PER_BATCH_UNLABELED,
    }
    _check_sizes(sizes, cfg.SOLVER.ACCUMULATE)
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            "DATALOADER.SAMPLER_TRAIN: semi-supervised training has TrainingSampler only, got "
            f"{cfg.DATALOADER.SAMPLER_TRAIN}"
        )
    labeled, unlabeled, split = load_split(cfg)
    unreadable = UnreadableImages.from_config(cfg)
    if sizes["IMS_PER_BATCH_UNLABELED"]:
        _check_unlabeled(unlabeled, sizes["IMS_PER_BATCH_UNLABELED"])
        _probe_unlabeled(unlabeled, unreadable.limit)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    streams: dict[str, ImageStream] = {}
    groups = (("labeled", labeled), ("unlabeled", unlabeled))
    for (name, own), batch_size in zip(groups, sizes.values(), strict=True):
        if batch_size:
            streams[name] = ImageStream(
                own,
                SemiMapper(cfg, name == "labeled", seed),
                batch_size=batch_size,
                seed=seed,
                unreadable=unreadable,
                grouped=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
                pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
            )
        logger.info("%s: %d images, %d per batch of all processes", name, len(own), batch_size)
    return SemiLoader(
        streams["labeled"],
        streams.get("unlabeled"),
        burn_in_iters=cfg.SEMISUP.BURN_IN_ITERS,
        accumulate=cfg.SOLVER.ACCUMULATE,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        split=split,
    )


def build_labeled_loader(cfg: CfgNode, records: Sequence[dict[str, Any]] | None = None) -> Iterable:
    """Detectron2's endless loader of labelled images, which skips those that cannot be read.

    Args:
        records: dataset dicts; None: those of `DATASETS.TRAIN`, as Detectron2 takes them.
    """
    if records is None:
        records = load_train(cfg)
    unreadable = UnreadableImages.from_config(cfg)
    images = MappedImages(records, TrainMapper(cfg), seed=max(cfg.SEED, 0), limit=unreadable.limit)
    loader = build_detection_train_loader(cfg, dataset=images, mapper=_as_it_is)
    return CheckedLoader(loader, "labelled", unreadable)


def share_workers(total: int, labeled: int, unlabeled: int) -> tuple[int, int]:
    """Divide workers in proportion to the batches; of 2 or more, either stream gets one."""
    own = round(total * labeled / (labeled + unlabeled))
    if total >= 2:
        own = min(max(own, 1), total - 1)
    return own, total - own


def _check_sizes(sizes: dict[str, int], accumulate: int) -> None:
    processes = comm.get_world_size()
    for key, size in sizes.items():
        # Only the unlabelled batch may be empty.
        if size < 0 or size % processes or (key == "IMS_PER_BATCH" and not size):
            raise ValueError(
                f"SOLVER.{key} {size} is the batch of all processes together and must be a "
                f"multiple of their number, {processes}"
            )
    if accumulate < 1:
        raise ValueError(f"SOLVER.ACCUMULATE must be at least 1, got {accumulate}")


def _check_unlabeled(unlabeled: Sequence[dict[str, Any]], batch_size: int) -> None:
    if not unlabeled:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH_UNLABELED is {batch_size}, but there are no unlabelled images: "
            "name datasets in DATASETS.UNLABELED, or set DATASETS.SPLIT.PERCENT below 100; or set "
            "IMS_PER_BATCH_UNLABELED 0 to train on labelled images alone"
        )


def _probe_unlabeled(records: Sequence[dict[str, Any]], limit: int) -> None:
    # They are not read before burn-in ends, hours later. One process looks, and tells the others.
    key, problem = "DATASETS.UNLABELED", ""
    if comm.is_main_process():
        try:
            probe_headers(records, key, limit)
        except ValueError as error:
            problem = str(error)
    if any(problems := comm.all_gather(problem)):
        raise ValueError("".join(problems))


def _as_it_is(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


def _init_worker(worker: int) -> None:
    # One core a worker, as torch does it for its own threads.
    cv2.setNumThreads(0)
