"""SIGTERM and SIGINT end a run with a checkpoint: batch systems send one, Ctrl-C the other.

The step under way is finished, its state saved, and every process exits with ``PREEMPTED``. A
second signal stops the process at once.
"""

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import torch.multiprocessing as mp
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..checkpoint_files import when_written

logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h: start the same command again.
PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds in which signals count as one: a batch system, its launcher and ours all pass it on.
SAME = 1.0
# Seconds after which a process that could not finish its step is stuck (in a collective whose
# other processes are gone, on a dead network drive) and ends all the same.
LIMIT = 300.0
_END = 0  # among the numbers of signals: the run has ended


class Preemption(HookBase):
    """Watches for the signals while it is entered; a hook that comes before the evaluation's.

    An evaluation that was due at the last step is left out. A signal during one saves at once; a
    single process then stops, several go on to the end of the next step, because only there all
    of them can agree.

    Its trainer has ``save_step()``, which writes the checkpoint of the step that was done last.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        # The step whose state the model, the optimizer and the rest are in; None during a step.
        self.done: int | None = None
        self.finished = False

    def __enter__(self) -> "Preemption":
        self._main_thread = threading.current_thread() is threading.main_thread()
        if self._main_thread:  # the only one that may handle signals
            reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
            threading.Thread(target=_watch, args=(reading,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if not self._main_thread:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._writing, bytes([_END]))
        os.close(self._writing)
        if kind is not None:
            _end_readers()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, between any two of its operations."""
        if self.signal is not None:
            return  # the watch sees to it
        self.signal = number
        when_written(self._obey)

    def _obey(self) -> None:
        name = signal.Signals(self.signal).name
        if self.finished:
            logger.warning("%s: the last checkpoint is written, --resume evaluates it", name)
            raise SystemExit(PREEMPTED)
        logger.warning("%s: the run stops after this step; a second one stops it at once", name)
        if self.done is not None and self.done == self.trainer.iter:
            self.trainer.save_step()
            if comm.get_world_size() == 1:
                self._leave()

    def step_begins(self) -> None:
        """Before anything of a step's state changes, other hooks' ``before_step`` included."""
        self.done = None

    def after_step(self) -> None:
        """Runs after the step's checkpoint, if one was due, and before its evaluation."""
        self.done = self.trainer.iter
        if not any(comm.all_gather(self.signal is not None)):
            return
        self.trainer.save_step()
        comm.synchronize()  # the launcher stops all when the first one ends
        self._leave()

    def after_train(self) -> None:
        """Runs before the last evaluation: from here on there is nothing to save."""
        self.finished = self.trainer.iter >= self.trainer.max_iter

    def _leave(self) -> None:
        logger.warning(
            "Stopped after iteration %d of %d; --resume goes on",
            self.trainer.iter + 1,
            self.trainer.max_iter,
        )
        raise SystemExit(PREEMPTED)


def _watch(reading: int) -> None:
    """End the process at a second signal, or when the first one had no effect for too long.

    A thread, because the main one may hang in a call that Python can't interrupt.
    """
    first = number = None
    with open(reading, "rb", buffering=0) as pipe:
        while True:
            left = None if first is None else max(0.0, first + LIMIT - time.monotonic())
            ready, _, _ = select.select([pipe], [], [], left)
            received = pipe.read(1)[0] if ready else number
            if received == _END:
                return
            if received not in SIGNALS:
                continue
            if first is None:
                first, number = time.monotonic(), received
            elif not ready or time.monotonic() - first > SAME:
                os._exit(128 + received)


def _end_readers() -> None:
    """End the processes that read images, which don't hear the signal by which Python would."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take it for an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
            child.join()
    signal.signal(signal.SIGCHLD, before)


def _shield() -> None:
    """In a child: the signals are its parent's, which needs images to finish its step."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(getattr(handler, "__self__", None), Preemption):
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


os.register_at_fork(after_in_child=_shield)


@contextlib.contextmanager
def relayed_signals() -> Iterator[None]:
    """Around a launch of several processes: they get the signals, and their exit code is passed on.

    Without it the launching process would die by the signal, before the others could save.
    """

    def relay(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)

    before = {number: signal.signal(number, relay) for number in SIGNALS}
    try:
        yield
    except SystemExit as error:
        cause = error.__cause__
        if isinstance(cause, mp.ProcessExitedException) and cause.exit_code == PREEMPTED:
            raise SystemExit(PREEMPTED) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
