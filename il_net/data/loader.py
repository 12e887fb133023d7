"""Two endless streams of images, labelled and unlabelled, as one batch of both for every step.

Differs from Unbiased Teacher's loader (thesis section 2.4): the streams do not wait for each other,
so that nothing is dropped; images are grouped by shape before they are read; no unlabelled one is
read before burn-in ends; and what a run sees follows from its seed alone, whatever the number of
workers, and also after a resume.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .mapper import SemiMapper, random_source
from .split import Split, make_split, split_records, train_records

logger = logging.getLogger(__name__)

_EXIF_ORIENTATION = 0x0112
_EXIF_TURNED = (5, 6, 7, 8)


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
        grouped: see above. Sizes that records lack are read from the files when their turn comes.
        pin_memory: hand out tensors from which a GPU can copy while it computes.
    """

    def __init__(
        self,
        records: list[dict[str, Any]],
        mapper: SemiMapper,
        *,
        batch_size: int,
        seed: int,
        grouped: bool,
        pin_memory: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self._images = _MappedImages(records, mapper)
        self._source = random_source(seed, f"{mapper.group} order")
        self._grouped = grouped
        self._pin_memory = pin_memory
        self._wide = [r["width"] > r["height"] if "width" in r else None for r in records]

    def batches(self, first: int, num_workers: int) -> Iterator[list[dict[str, Any]]]:
        """This process' share of batch `first` and all that follow.

        Args:
            first: number of a batch, from 0. Those before it cost no reading.
            num_workers: processes that map; 0 maps in this one. They end with the iterator.
        """
        loader = DataLoader(
            self._images,
            # An endless epoch, so that workers are started once.
            batch_sampler=islice(self.index_batches(), first, None),
            num_workers=num_workers,
            collate_fn=trivial_batch_collator,
            pin_memory=self._pin_memory,
            worker_init_fn=_init_worker,
            # Its own, because a DataLoader draws a seed, which would shift the model's draws.
            generator=torch.Generator(),
        )
        return iter(loader)

    def index_batches(self) -> Iterator[list[tuple[int, int]]]:
        """This process' share of every batch, as (position in the stream, index of the record)."""
        rank, processes = comm.get_rank(), comm.get_world_size()
        waiting: tuple[list, list] = ([], [])
        for position, index in enumerate(self._order()):
            group = waiting[self._grouped and self._is_wide(index)]
            group.append((position, index))
            if len(group) == self.batch_size:
                yield group[rank::processes]
                group.clear()

    def _order(self) -> Iterator[int]:
        rng = np.random.default_rng(self._source)
        while True:
            yield from rng.permutation(len(self._images)).tolist()

    def _is_wide(self, index: int) -> bool:
        if self._wide[index] is None:
            width, height = read_size(self._images.file_name(index))
            self._wide[index] = width > height
        return self._wide[index]


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
            images, processes that find different images; see also `make_split`.
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
    records = train_records(cfg)
    split = make_split(cfg, records)
    groups = dict(zip(("labeled", "unlabeled"), split_records(cfg, records, split), strict=True))
    _check_records(groups["labeled"], groups["unlabeled"], sizes["IMS_PER_BATCH_UNLABELED"])
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    streams: dict[str, ImageStream] = {}
    for (name, own), batch_size in zip(groups.items(), sizes.values(), strict=True):
        if batch_size:
            streams[name] = ImageStream(
                own,
                SemiMapper(cfg, name == "labeled", seed),
                batch_size=batch_size,
                seed=seed,
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


def share_workers(total: int, labeled: int, unlabeled: int) -> tuple[int, int]:
    """Divide workers in proportion to the batches; of 2 or more, either stream gets one."""
    own = round(total * labeled / (labeled + unlabeled))
    if total >= 2:
        own = min(max(own, 1), total - 1)
    return own, total - own


def read_size(file_name: str) -> tuple[int, int]:
    """Width and height of an image as Detectron2 will read it, from the file's header.

    Raises:
        ValueError: the file is no image.
    """
    try:
        with Image.open(file_name) as image:
            width, height = image.size
            # Cameras write JPEG; to look for the tag in a PNG all of it would be decoded.
            has_tag = image.format in ("JPEG", "MPO")
            turned = has_tag and image.getexif().get(_EXIF_ORIENTATION) in _EXIF_TURNED
    except OSError as error:
        raise ValueError(f"{file_name} cannot be read as an image: {error}") from error
    return (height, width) if turned else (width, height)


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


def _check_records(labeled: list[dict], unlabeled: list[dict], batch_size: int) -> None:
    if batch_size and not unlabeled:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH_UNLABELED is {batch_size}, but there are no unlabelled images: "
            "name datasets in DATASETS.UNLABELED, or set DATASETS.SPLIT.PERCENT below 100; or set "
            "IMS_PER_BATCH_UNLABELED 0 to train on labelled images alone"
        )
    ids = repr([[r["image_id"] for r in group] for group in (labeled, unlabeled)])
    if len(set(comm.all_gather(hashlib.sha256(ids.encode()).hexdigest()))) > 1:
        raise ValueError(
            "The processes found different images, labelled or not: DATASETS.TRAIN, UNLABELED and "
            "SPLIT.FILE must be the same files on every machine"
        )


class _MappedImages(Dataset):
    """Mapped records by (position, index); the records are kept as bytes, which workers share."""

    def __init__(self, records: list[dict[str, Any]], mapper: SemiMapper) -> None:
        self._records = DatasetFromList(records, copy=False, serialize=True)
        self._mapper = mapper

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        return self._mapper(self._records[index], position)

    def file_name(self, index: int) -> str:
        return self._records[index]["file_name"]


def _init_worker(worker: int) -> None:
    # One core a worker, as torch does it for its own threads.
    cv2.setNumThreads(0)
