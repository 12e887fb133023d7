"""Images that cannot be read are replaced by others, logged and counted, up to a limit.

Workers send what they met along with the samples, so that the process that trains logs and counts
it in the order of the batches: a run stops at the same step whatever the number of workers.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from torch.utils.data import Dataset

from .mapper import UnreadableImage, random_source, read_size
from .shared_records import PackedRecords, pack
from .workers import watched

logger = logging.getLogger(__name__)

KEY = "DATALOADER.MAX_UNREADABLE"
# What comes of an image that an evaluation cannot read.
MISSED = "It is scored as one in which nothing was found"
NUM_PROBED = 2000
_NUM_NAMED = 5
_NUM_THREADS = 16
# Other images whose shape is looked at, to replace one by another of its shape.
_NUM_LOOKED_AT = 50
# What a worker leaves in a sample for the process that trains.
_SKIPPED, _ERROR = "skipped_images", "error"


class MappedImages(Dataset):
    """Samples of records, which are kept as bytes: forked workers share them.

    An image that cannot be read is replaced by another, which follows from `seed` and the sample's
    position alone; the sample tells of it, for `UnreadableImages`. Iterating gives the records, as
    Detectron2's samplers read them.

    Args:
        records: Detectron2's dataset dicts, not empty; packed or to be packed here.
        mapper: turns a record and a position into a sample.
        seed: of the replacements; not negative.
        limit: unreadable images that a run may meet.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any], int], dict[str, Any]],
        *,
        seed: int,
        limit: int,
    ) -> None:
        self._records = records if isinstance(records, PackedRecords) else pack(records)
        self._mapper = mapper
        self._seed = seed
        self._limit = limit
        # This process' own: sizes that are not known are read when they are needed.
        self._wide = self._records.wide.copy()

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._records[index] for index in range(len(self)))

    def __getitem__(self, item: int | tuple[int, int, bool | None]) -> dict[str, Any]:
        """A sample.

        Args:
            item: index of the record, or (position of the sample in its stream, index, whether a
                replacement must be wide; None: it may have any shape). Without a position, the
                index is taken for it.
        """
        position, index, wide = item if isinstance(item, tuple) else (item, item, None)
        skipped: dict[str, str] = {}
        candidates = chain([index], self._replacements(position, index, wide))
        for candidate in islice(candidates, self._limit + 1):
            record = self._records[candidate]
            try:
                sample = self._mapper(record, position)
            except UnreadableImage as error:
                skipped[record["file_name"]] = str(error)
            except ValueError as error:
                return _no_sample({_ERROR: str(error)})
            else:
                return {**sample, _SKIPPED: skipped} if skipped else sample
        return _no_sample({_SKIPPED: skipped})

    def is_wide(self, index: int) -> bool:
        """Whether an image is wider than high; read from its file where the record has no size."""
        if self._wide[index] < 0:
            try:
                width, height = read_size(self._records[index]["file_name"])
            except UnreadableImage:  # found again, and told, when it is to be mapped
                width = height = 0
            self._wide[index] = width > height
        return bool(self._wide[index])

    def _replacements(self, position: int, index: int, wide: bool | None) -> Iterator[int]:
        rng = np.random.default_rng(random_source(self._seed, "replacements", position))
        others = [i for i in rng.permutation(len(self)).tolist() if i != index]
        if wide is not None:
            others[:_NUM_LOOKED_AT] = sorted(
                others[:_NUM_LOOKED_AT], key=lambda i: self.is_wide(i) != wide
            )
        yield from others


class UnreadableImages:
    """The account of one process: each image that was skipped, logged once, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped: dict[str, str] = {}  # file name to what is wrong with it

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "UnreadableImages":
        """Read `DATALOADER.MAX_UNREADABLE`."""
        limit = cfg.DATALOADER.MAX_UNREADABLE
        if limit < 0:
            raise ValueError(f"{KEY} must be 0 (stop at the first) or more, got {limit}")
        return cls(limit)

    def take(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The samples of `MappedImages`, after what they tell is entered and taken out of them.

        Raises:
            SystemExit: more images than the limit, or none can be read, or what is recorded of
                one cannot be used.
        """
        for sample in samples:
            for name, reason in sample.pop(_SKIPPED, {}).items():
                self.enter(name, reason, "Another image takes its place")
                self.check()
            if _ERROR in sample:
                raise SystemExit(f"error: {sample[_ERROR]}")
            if "image" not in sample:
                self.check(none_read=True)
        return samples

    def leave_out(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The samples of an evaluation that could be read, after the others are entered.

        It has no use for replacements: `MappedImages` with a limit of 0 makes none.
        """
        for sample in samples:
            for name, reason in sample.get(_SKIPPED, {}).items():
                self.enter(name, reason, MISSED)
        return [sample for sample in samples if "image" in sample]

    def enter(self, name: str, reason: str, consequence: str) -> None:
        """Count an image, unless it has been before, and say what comes of it."""
        if name in self.skipped:
            return
        self.skipped[name] = reason
        count = len(self.skipped)
        if count <= self.limit:
            logger.warning(
                "%s. %s (%d skipped so far, %s is %d)",
                *(reason, consequence, count, KEY, self.limit),
            )

    def check(self, none_read: bool = False) -> None:
        """Stop if there are more images than the limit, or none can be read.

        Raises:
            SystemExit: names the first ones.
        """
        reasons = list(self.skipped.values())
        if len(reasons) > self.limit:
            raise SystemExit(f"error: {too_many(reasons, self.limit)}")
        if none_read:
            raise SystemExit(f"error: none of the images can be read: {first_of(reasons)}")


class CheckedLoader:
    """A loader whose batches went through an account, and whose workers' deaths are explained.

    Args:
        loader: of batches of `MappedImages`' samples.
        group: what it reads, for messages.
        unreadable: the account.
    """

    def __init__(self, loader: Iterable, group: str, unreadable: UnreadableImages) -> None:
        self.loader = loader
        self.group = group
        self.unreadable = unreadable

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return map(self.unreadable.take, watched(self.loader, self.group))


def probe_headers(records: Sequence[dict[str, Any]], key: str, limit: int) -> list[str]:
    """Read the headers of at most `NUM_PROBED` images, evenly spread, before they are needed.

    A file that is cut off behind its header is not found.

    Args:
        records: the images.
        key: where they are configured.
        limit: unreadable images that a run may meet.

    Returns:
        what is wrong with each that cannot be read.

    Raises:
        ValueError: more than `limit`, or all: training would stop when their turn comes.
    """

    def problem(name: str) -> str:
        try:
            read_size(name)
        except UnreadableImage as error:
            return str(error)
        return ""

    count = min(len(records), NUM_PROBED)
    names = [records[i * len(records) // count]["file_name"] for i in range(count)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = [text for text in pool.map(problem, names) if text]
    if found and len(found) == len(names):
        raise ValueError(f"{key}: none of {len(names)} images can be read: {first_of(found)}")
    if len(found) > limit:
        raise ValueError(f"{key}: {too_many(found, limit)}")
    if found:
        logger.warning(
            "%s: %d of %d images looked at cannot be read and will be skipped: %s",
            *(key, len(found), len(names), first_of(found)),
        )
    return found


def too_many(reasons: Sequence[str], limit: int) -> str:
    """What to say when more images than the limit cannot be read."""
    return (
        f"unreadable images: {len(reasons)}, but {KEY} is {limit}: {first_of(reasons)}. Mend or "
        "remove the files (tools/check_dataset.py finds them), or raise the key"
    )


def first_of(reasons: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(reasons) - _NUM_NAMED
    return "; ".join([*reasons[:_NUM_NAMED], *([f"and {more} more"] if more > 0 else ())])


def _no_sample(what: dict[str, Any]) -> dict[str, Any]:
    # Detectron2 groups samples by their sizes.
    return {"width": 0, "height": 0, **what}
