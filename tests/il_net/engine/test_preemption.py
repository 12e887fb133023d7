"""Signals to a run: what is saved, when the process ends, and with which code.

Each run is a fork of this process: signals and exits are real ones.
"""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.engine import HookBase, TrainerBase
from torch.utils.data import DataLoader

from il_net.engine import preemption
from il_net.engine.preemption import PREEMPTED, Preemption, relayed_signals

STEPS = 5
TERM, INT = signal.SIGTERM, signal.SIGINT


class Run(TrainerBase):
    """Writes each step, save and evaluation on a line of a file; ``during`` runs in each of them.

    The evaluations are after the second step and after the last, as Detectron2's with period 2.
    """

    def __init__(self, path: Path, during: Callable[["Run", str], None]) -> None:
        super().__init__()
        self.path, self.during = path, during
        self.preemption = Preemption()
        self.register_hooks([self.preemption, Evaluation()])

    def note(self, what: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{what}\n")
        self.during(self, what)

    def before_step(self) -> None:
        self.preemption.step_begins()
        super().before_step()

    def run_step(self) -> None:
        self.note(f"step {self.iter}")

    def save_step(self) -> None:
        self.note(f"save {self.iter}")


class Evaluation(HookBase):
    def after_step(self) -> None:
        if self.trainer.iter == 1:
            self.trainer.note("evaluate 1")

    def after_train(self) -> None:
        if self.trainer.iter == self.trainer.max_iter:
            self.trainer.note("evaluate")


@pytest.fixture
def process(tmp_path) -> Callable:
    """``process(during)`` is the exit code of such a run and the lines it wrote."""

    def start(during: Callable[[Run, str], None]) -> tuple[int, list[str]]:
        def main() -> None:
            torch.set_num_threads(1)
            run = Run(tmp_path / "lines", during)
            with run.preemption:
                run.train(0, STEPS)

        child = multiprocessing.get_context("fork").Process(target=main)
        child.start()
        child.join(60)
        assert child.exitcode is not None, "it hangs"
        return child.exitcode, (tmp_path / "lines").read_text().splitlines()

    return start


def send(number: int, at: str) -> Callable[[Run, str], None]:
    def during(_: Run, what: str) -> None:
        if what == at:
            os.kill(os.getpid(), number)

    return during


def test_an_undisturbed_run(process):
    code, lines = process(lambda *_: None)
    assert code == 0
    steps = [f"step {i}" for i in range(STEPS)]
    assert lines == [*steps[:2], "evaluate 1", *steps[2:], "evaluate"]


@pytest.mark.parametrize("number", [TERM, INT])
def test_the_step_is_finished_saved_and_the_last(process, number):
    code, lines = process(send(number, "step 3"))
    assert code == PREEMPTED == 75
    assert lines[-2:] == ["step 3", "save 3"]


def test_an_evaluation_that_is_due_is_left_out(process):
    code, lines = process(send(TERM, "step 1"))
    assert (code, lines) == (PREEMPTED, ["step 0", "step 1", "save 1"])


def test_a_signal_in_an_evaluation_saves_and_ends_at_once(process):
    code, lines = process(send(TERM, "evaluate 1"))
    assert (code, lines) == (PREEMPTED, ["step 0", "step 1", "evaluate 1", "save 1"])


def test_a_signal_in_the_last_step_ends_without_an_evaluation(process):
    code, lines = process(send(TERM, f"step {STEPS - 1}"))
    assert code == PREEMPTED
    assert lines[-1] == f"save {STEPS - 1}"


def test_a_signal_in_the_last_evaluation_ends_at_once(process):
    code, lines = process(send(TERM, "evaluate"))
    assert code == PREEMPTED
    assert lines[-1] == "evaluate"  # all was saved before


def test_a_signal_that_arrives_by_several_ways_is_one(process):
    def during(run: Run, what: str) -> None:
        if what == "step 3":
            for number in (TERM, TERM, INT):
                os.kill(os.getpid(), number)
                time.sleep(0.05)

    code, lines = process(during)
    assert (code, lines[-1]) == (PREEMPTED, "save 3")


def test_a_second_signal_ends_a_process_that_hangs(process, monkeypatch):
    """In a call that Python does not interrupt."""
    monkeypatch.setattr(preemption, "SAME", 0.2)

    def during(run: Run, what: str) -> None:
        if what == "step 3":
            pid = os.getpid()
            for delay in (0.0, 0.6):
                threading.Timer(delay, os.kill, (pid, INT)).start()
            hang()

    begin = time.monotonic()
    code, lines = process(during)
    assert (code, lines[-1]) == (128 + INT, "step 3")
    assert time.monotonic() - begin < 20


def test_a_process_that_cannot_finish_its_step_ends_all_the_same(process, monkeypatch):
    monkeypatch.setattr(preemption, "LIMIT", 0.5)

    def during(run: Run, what: str) -> None:
        if what == "step 3":
            os.kill(os.getpid(), TERM)
            hang()

    code, lines = process(during)
    assert (code, lines[-1]) == (128 + TERM, "step 3")


def hang() -> None:
    """Wait for a mutex of this very thread: no signal ends that, no handler of Python runs."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)


def test_readers_of_images_do_not_hear_the_signals(process):
    """Ctrl-C goes to all processes of a terminal, and srun's signals to all of a step."""

    def during(run: Run, what: str) -> None:
        if what == "step 0":
            run.loader = iter(DataLoader(range(100), num_workers=2))
        if what == "step 3":
            readers = multiprocessing.active_children()
            assert len(readers) == 2
            for reader in readers:
                for number in (INT, TERM):
                    os.kill(reader.pid, number)
            time.sleep(0.3)
            os.kill(os.getpid(), TERM)
            for _ in range(90):
                next(run.loader)

    code, lines = process(during)
    assert (code, lines[-1]) == (PREEMPTED, "save 3")


def test_what_handled_the_signals_before_does_so_afterwards():
    before = [signal.getsignal(number) for number in (TERM, INT)]
    with Preemption():
        assert signal.getsignal(TERM) not in before
    assert [signal.getsignal(number) for number in (TERM, INT)] == before


def test_outside_the_main_thread_nothing_is_handled():
    done = []

    def run() -> None:
        before = signal.getsignal(TERM)
        with Preemption():
            done.append(signal.getsignal(TERM) is before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [True]


# ---- the process that launches others ----


def wait_for_it(code: int) -> None:
    signal.signal(TERM, lambda *_: os._exit(code))
    time.sleep(60)


@pytest.mark.parametrize(("code", "expected"), [(PREEMPTED, PREEMPTED), (3, 1)])
def test_a_launching_process_passes_signals_on_and_the_code_back(code, expected):
    def main() -> None:
        with relayed_signals():
            context = torch.multiprocessing.start_processes(
                lambda rank: wait_for_it(code), nprocs=1, join=False, start_method="fork"
            )
            time.sleep(0.5)
            os.kill(os.getpid(), TERM)
            try:
                while not context.join():
                    pass
            except torch.multiprocessing.ProcessExitedException as error:
                raise SystemExit("error: a process has ended") from error

    child = multiprocessing.get_context("fork").Process(target=main)
    child.start()
    child.join(60)
    assert child.exitcode == expected
