"""Records as bytes in one buffer: one copy for all processes of a machine.

One process of each machine reads the data and writes the records into a temporary file, which all
map; their workers inherit the mapping. With one process a machine no file is needed.

B bytes, N records.
"""

import io
import logging
import mmap
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np
from detectron2.utils import comm

from .coco_file import paused_gc

logger = logging.getLogger(__name__)

T = TypeVar("T")


class PackedRecords(Sequence[dict[str, Any]]):
    """A list of Detectron2's dataset dicts, each of which is made anew when it is asked for.

    Args:
        data: (B,) uint8, the pickled records of this and perhaps other lists.
        offsets: (N + 1,) int64, where each record begins in `data`, and where the last one ends.
        wide: (N,) int8, whether each image is wider than high; -1 where the record has no size.
    """

    def __init__(self, data: np.ndarray, offsets: np.ndarray, wide: np.ndarray) -> None:
        self.data = data
        self.offsets = offsets
        self.wide = wide

    def __len__(self) -> int:
        return len(self.wide)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no record {index} of {len(self)}")
        begin, end = self.offsets[index : index + 2].tolist()
        return pickle.loads(memoryview(self.data[begin:end]))


def pack(records: Iterable[dict[str, Any]]) -> PackedRecords:
    """The records in memory of this process, at least one."""
    file = io.BytesIO()
    offsets, wide = _write(records, file)
    return PackedRecords(_mapped(file), offsets, wide)


def load_packed(
    load: Callable[[], tuple[Sequence[Iterable[dict[str, Any]]], T]],
) -> tuple[list[PackedRecords], T]:
    """Lists of records, one copy for all processes of a machine, and what else was read.

    Every process has to call it. Only one of each machine calls `load`.

    Args:
        load: gives lists of records, at least one record in all, and anything small.

    Raises:
        ValueError, OSError: of `load`, in every process; no space for the records, or processes of
            one machine that do not share their temporary folder.
    """
    processes = comm.get_local_size()
    file = _open_for_machine() if processes > 1 else io.BytesIO()

    def write() -> tuple[list[tuple[np.ndarray, np.ndarray]], T]:
        with paused_gc():
            lists, others = load()
            return [_write(records, file) for records in lists], others

    places, others = once_per_machine(write)
    data = _mapped(file)
    logger.info(
        "The records of %d images take %.0f MiB, once for the %d processes of this machine",
        *(sum(len(wide) for _, wide in places), len(data) / 2**20, processes),
    )
    return [PackedRecords(data, *place) for place in places], others


def once_per_machine(work: Callable[[], T]) -> T:
    """What `work` gives, which only one process of each machine calls; all have to call this.

    Args:
        work: its result is sent to the others and should be small.

    Raises:
        ValueError, OSError: of `work`, in every process.
    """
    if comm.get_local_size() == 1:
        return work()
    result, error = None, None
    if comm.get_local_rank() == 0:
        try:
            result = work()
        except (ValueError, OSError) as e:
            error = e
    # The processes of a machine have consecutive ranks.
    result, error = comm.all_gather((result, error))[comm.get_rank() - comm.get_local_rank()]
    if error is not None:
        raise error
    return result


def _open_for_machine() -> BinaryIO:
    """An empty file, open in all processes of this machine; one of them may write.

    It loses its name before anything is in it: however the processes end, no records are left.
    """
    path = once_per_machine(_make_file)
    file, problem = None, ""
    try:
        file = open(path, "r+b" if comm.get_local_rank() == 0 else "rb")  # noqa: SIM115  (stays)
    except OSError as e:
        problem = str(e)
    try:
        problems = comm.all_gather(problem)  # all of them have it open now
    finally:  # also where another process has died
        if comm.get_local_rank() == 0:
            os.unlink(path)
    if told := "; ".join(filter(None, problems)):
        raise ValueError(
            f"{told}: the processes of a machine must have the same temporary folder; set the "
            "environment variable TMPDIR to one"
        )
    return file


def _make_file() -> str:
    descriptor, path = tempfile.mkstemp(prefix="records_")
    os.close(descriptor)
    return path


def _write(records: Iterable[dict[str, Any]], file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """Append pickled records to a file: `offsets` and `wide` of `PackedRecords`."""
    offsets, wide = [file.tell()], []
    try:
        for record in records:
            offsets.append(offsets[-1] + file.write(pickle.dumps(record, protocol=-1)))
            wide.append(record["width"] > record["height"] if "width" in record else -1)
        file.flush()
    except OSError as e:
        raise ValueError(
            f"the records of the images, which the processes of this machine share, cannot be "
            f"written to {tempfile.gettempdir()} ({offsets[-1] / 2**20:.0f} MiB came before): {e}. "
            "Set the environment variable TMPDIR to a folder with more space"
        ) from e
    return np.array(offsets, np.int64), np.array(wide, np.int8)


def _mapped(file: BinaryIO) -> np.ndarray:
    """(B,) uint8: what was written, without a copy."""
    if isinstance(file, io.BytesIO):
        return np.frombuffer(file.getbuffer(), np.uint8)
    with file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
