"""The death of a process that reads images, as one line that says what to change.

torch notices it by the signal that a child has ended, and raises a RuntimeError wherever the main
process is just then, which is seldom where it takes a batch from the loader.
"""

import multiprocessing
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

_TORCHS_WORDS = re.compile(r"DataLoader worker \(pid\D*(\d+).*?\) (?:.* by signal: ([^.]*))?")
_ADVICE = {
    signal.SIGKILL: "Mostly the system does so when memory runs out: lower DATALOADER.NUM_WORKERS "
    "(0 reads in the main process), SOLVER.IMS_PER_BATCH or INPUT.MAX_SIZE_TRAIN, or make very "
    "large images smaller",
    signal.SIGBUS: "Mostly shared memory is full: enlarge it (docker run --shm-size 8g), or lower "
    "DATALOADER.NUM_WORKERS (0 needs none)",
}
_OTHER_ADVICE = (
    "DATALOADER.NUM_WORKERS 0 reads in the main process, and shows what an image does to it"
)

# Living workers, and what they read.
_watched: dict[BaseProcess, str] = {}
_handlers: set[Callable] = set()


def watched(loader: Iterable, group: str) -> Iterator[Any]:
    """The batches of a loader, of which iteration starts now.

    Args:
        loader: may start workers.
        group: what it reads, for the message.

    Raises:
        SystemExit: a worker has died; wherever the main thread is just then.
    """
    try:
        batches = iter(loader)
    except RuntimeError as error:
        raise _explained(error, group) from error
    _watch_workers(group)
    return _drain(batches, group)


def _drain(batches: Iterator, group: str) -> Iterator[Any]:
    try:
        for number, batch in enumerate(batches):
            if number == 0:  # Detectron2's loader starts its workers only now
                _watch_workers(group)
            yield batch
    except (RuntimeError, EOFError, ConnectionError) as error:
        # One that ends while it sends a sample is missed before torch hears of its end.
        ended = wait([process.sentinel for process in _watched], timeout=1.0)
        for process in _watched:
            if process.sentinel in ended:
                process.join(timeout=1.0)
        raise _explained(error, group) from error


def _watch_workers(group: str) -> None:
    """Take the processes that were started since the last call for the workers of `group`."""
    for process in [p for p in _watched if not p.is_alive()]:
        del _watched[process]
    for process in multiprocessing.active_children():
        _watched.setdefault(process, group)
    raising = signal.getsignal(signal.SIGCHLD)
    if not _watched or not callable(raising) or raising in _handlers:
        return

    def explain(number: int, frame: FrameType | None) -> None:
        try:
            raising(number, frame)
        except RuntimeError as error:
            raise _explained(error, "the") from error

    try:
        signal.signal(signal.SIGCHLD, explain)
    except ValueError:  # not in the main thread, in which torch does nothing of that either
        return
    _handlers.add(explain)


def _explained(error: Exception, group: str) -> Exception | SystemExit:
    """The end of the run, if a worker has died; else the same error."""
    dead = {p.pid: (p.exitcode, its) for p, its in _watched.items() if p.exitcode}
    found = _TORCHS_WORDS.match(str(error))
    if not found and not dead:
        return error
    process = int(found[1]) if found else next(iter(dead))
    # torch's words name the signal also of one that died before it was watched.
    code = -next((s for s in signal.Signals if found and signal.strsignal(s) == found[2]), 0)
    code, group = dead.get(process, (code, group))
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return SystemExit(
        f"error: a worker that reads {group} images (process {process}) {how}. "
        f"{_ADVICE.get(-code, _OTHER_ADVICE)}. --resume goes on from the last checkpoint"
    )
