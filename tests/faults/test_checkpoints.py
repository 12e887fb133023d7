"""Runs that are killed, stopped, out of disk space or left with broken files, and go on."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from il_net.checkpoint_files import damage
from tests.e2e.runner import REPO, Result
from tests.e2e.test_semisup import CONFIG, NO_EVALUATION, check_equal, load

STEPS = 12
SEMI = ("SOLVER.MAX_ITER", STEPS, "SEMISUP.BURN_IN_ITERS", 5, *NO_EVALUATION)
# A plain detector, with processes that read images, and without a seed of its own.
PLAIN = (
    *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_IOU_HEAD.ENABLED", "False"),
    *("DATASETS.UNLABELED", "()", "DATASETS.SPLIT.PERCENT", 100.0),
    *("DATALOADER.NUM_WORKERS", 2, "SOLVER.MAX_ITER", 6, *NO_EVALUATION),
)

# Runs a script of the repository until the moment that its first arguments say.
FAULT = """
import io, os, resource, runpy, signal, sys, threading, time
import numpy, torch
from il_net.engine.preemption import Preemption

numpy.random.seed()  # as in a fresh process
kind, number, share, *sys.argv = sys.argv[1:]
number, share = float(number), float(share)

def die(which=signal.SIGKILL, of=os.getpid()):
    os.kill(of, which)
    time.sleep(60)

def after(function, then):
    # Call ``then`` in place of the call of ``function`` with this number.
    def counted(*arguments, **options):
        global number
        number -= 1
        return (then if number == 0 else function)(*arguments, **options)
    return counted

def die_while_writing(state, file, save=torch.save):
    content = io.BytesIO()
    save(state, content)
    file.write(content.getvalue()[:int(share * content.tell())])
    file.flush()
    die()

def stop_while_writing(state, file, save=torch.save):
    content = io.BytesIO()
    save(state, content)
    half = content.tell() // 2
    file.write(content.getvalue()[:half])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)  # the handler runs between two operations of this function
    file.write(content.getvalue()[half:])

def at_step(signals):
    def begin(self, begin=Preemption.step_begins):
        begin(self)
        if self.trainer.iter == number:
            signals()
    Preemption.step_begins = begin

if kind == "time":  # since the start of the process
    threading.Timer(number, die).start()
elif kind == "training":  # since the start of training
    begun = Preemption.__enter__
    def enter(self):
        threading.Timer(number, die).start()
        return begun(self)
    Preemption.__enter__ = enter
elif kind == "write":  # while a file is written
    torch.save = after(torch.save, die_while_writing)
elif kind == "SIGTERM while writing":
    torch.save = after(torch.save, stop_while_writing)
elif kind == "sync":  # between two steps of a checkpoint's way into the folder
    os.fsync = after(os.fsync, lambda _: die())
elif kind == "SIGTERM":
    at_step(lambda: os.kill(os.getpid(), signal.SIGTERM))
elif kind == "Ctrl-C":  # goes to all processes of the terminal's group
    os.setpgid(0, 0)
    at_step(lambda: os.killpg(0, signal.SIGINT))
elif kind == "first":  # when the first checkpoint is there
    last = os.path.join(sys.argv[sys.argv.index("OUTPUT_DIR") + 1], "last_checkpoint")
    def watch():
        while not os.path.exists(last):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=watch, daemon=True).start()
elif kind == "limit":  # no file may grow any more
    at_step(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def train(run, tmp_path_factory) -> Callable[..., Result]:
    """``train(folder, *options, fault=(kind, number, share))``: a run of train_net.py."""
    folder = tmp_path_factory.mktemp("config")
    config, script = folder / "semi.yaml", folder / "fault.py"
    config.write_text(CONFIG.format(base=REPO / "configs" / "quickstart" / "il_net.yaml"))
    script.write_text(FAULT)

    def start(output: Path, *options: object, fault: tuple = ("none",)) -> Result:
        kind, number, share = (*fault, 0, 0)[:3]
        command = ("train_net.py", "--config-file", config, *options, "OUTPUT_DIR", output)
        return run(script, kind, number, share, REPO / command[0], *command[1:])

    return start


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    result = train(folder, *SEMI)
    assert result.code == 0, result.output[-3000:]
    return folder


def check_finished(folder: Path, whole: Path) -> None:
    """The same numbers as those of the run that nothing disturbed, to the last bit."""
    ours, theirs = load(folder / "model_final.pth"), load(whole / "model_final.pth")
    momenta = ours["trainer"]["_trainer"]["optimizer"]["state"].values()
    assert any(m["momentum_buffer"].abs().sum() > 0 for m in momenta)
    check_equal(ours, theirs)
    assert not list(folder.glob("*.partial"))


def resume(train: Callable, folder: Path, whole: Path, *options: object) -> Result:
    result = train(folder, "--resume", *(options or SEMI))
    assert result.code == 0, result.output[-3000:]
    check_finished(folder, whole)
    return result


# ---- killed ----


def moments() -> list[tuple]:
    """Twenty: at the start, in training, while a file is written, on its way into the folder."""
    random = Random(7)
    chosen = [("time", random.uniform(0.0, 3.0)) for _ in range(4)]
    chosen += [("training", random.uniform(0.0, 1.0)) for _ in range(6)]
    chosen += [("write", random.choice([1, 2]), random.random()) for _ in range(5)]
    chosen += [("sync", number) for number in (1, 2, 3, 4, 5)]
    random.shuffle(chosen)
    return chosen


def test_killed_at_twenty_moments(train, whole, tmp_path, injected):
    """Each time it goes on from the files that the last death left."""
    faults, runs = moments(), 0
    injected(len(faults))
    folder = tmp_path / "0"
    while faults:
        result = train(folder, "--resume-or-start", *SEMI, fault=faults[0])
        if result.code == -9:
            faults.pop(0)
            continue
        # The run was faster than its killer: another one for the moments that are left.
        assert result.code == 0, result.output[-3000:]
        check_finished(folder, whole)
        runs += 1
        assert runs < 10
        folder = tmp_path / str(runs)
    result = train(folder, "--resume-or-start", *SEMI)
    assert result.code == 0, result.output[-3000:]
    check_finished(folder, whole)


# ---- stopped ----


def test_sigterm_stops_a_run_that_goes_on(train, whole, tmp_path, injected):
    injected(1)
    options = ("SOLVER.CHECKPOINT_PERIOD", 1000)
    result = train(tmp_path, *SEMI, *options, fault=("SIGTERM", 7))
    assert result.code == 75, result.output[-3000:]
    assert "Traceback" not in result.output
    assert f"Stopped after iteration 8 of {STEPS}; --resume goes on" in result.output
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["model_0000007.pth"]
    result = resume(train, tmp_path, whole)
    assert f"Resumed at iteration 8 of {STEPS}" in result.output


def test_sigterm_while_the_best_model_is_written(train, tmp_path, injected):
    """In an evaluation the step is saved at once, but not into a file that is half written."""
    injected(1)
    options = (*SEMI[:-len(NO_EVALUATION)], "SOLVER.CHECKPOINT_PERIOD", 1000)
    # In the first evaluation after burn-in: the predictions of both models come before.
    options += ("TEST.EVAL_PERIOD", 6)
    result = train(tmp_path, *options, fault=("SIGTERM while writing", 3))
    assert result.code == 75, result.output[-3000:]
    assert "Traceback" not in result.output
    names = sorted(path.name for path in tmp_path.glob("*.p*"))
    assert names == ["model_0000005.pth", "model_best.pth"]
    assert [damage(tmp_path / name) for name in names] == ["", ""]
    assert (tmp_path / "last_checkpoint").read_text() == names[0]


def test_ctrl_c_stops_a_plain_run_with_readers_and_without_a_seed(train, tmp_path, injected):
    injected(1)
    result = train(tmp_path / "run", *PLAIN, fault=("Ctrl-C", 2))
    assert result.code == 75, result.output[-3000:]
    assert "Traceback" not in result.output
    state = load(tmp_path / "run" / "model_0000002.pth")
    seed = state["trainer"]["seed"]
    assert seed >= 0
    assert not (tmp_path / "run" / "model_0000003.pth").exists()
    # The same seed, named, without an interruption and without readers.
    options = (*PLAIN, "SEED", seed, "DATALOADER.NUM_WORKERS", 0)
    result = train(tmp_path / "whole", *options)
    assert result.code == 0, result.output[-3000:]
    resume(train, tmp_path / "run", tmp_path / "whole", *PLAIN)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU")
def test_several_processes_stop_together(train, tmp_path, injected):
    """The launching process gets the signal; all save once, and it ends with their code."""
    injected(1)
    options = ("--num-gpus", 2, *PLAIN, "SOLVER.MAX_ITER", 10000)
    result = train(tmp_path, *options, fault=("first", 0))
    assert result.code == 75, result.output[-3000:]
    assert "Traceback" not in result.output
    last = tmp_path / (tmp_path / "last_checkpoint").read_text()
    assert damage(last) == ""
    assert f"Stopped after iteration {load(last)['iteration'] + 1} of 10000" in result.output


# ---- a disk that is full ----


@pytest.fixture
def small_disk(tmp_path, whole) -> Iterator[Path]:
    """A file system with room for three checkpoints and a half."""
    room = int(3.5 * (whole / "model_0000003.pth").stat().st_size) + 500_000
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={room}", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(
            "no permission to mount a file system; the limit on files is tried all the same"
        )
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def check_full(result: Result, folder: Path, last: int, reason: str) -> None:
    assert result.code == 1, result.output[-3000:]
    assert "Traceback" not in result.output
    lost = folder / f"model_{last + 1:07d}.pth"
    assert result.last_line.startswith(f"error: {lost} can't be written: {reason}; ")
    assert "MB are free" in result.last_line
    names = {path.name for path in folder.iterdir()}
    assert not any("partial" in name for name in names) and lost.name not in names
    tagged = folder / (folder / "last_checkpoint").read_text()
    assert tagged.name == f"model_{last:07d}.pth"
    assert damage(tagged) == ""


def test_a_full_disk(train, whole, small_disk, injected):
    injected(1)
    folder = small_disk / "run"
    check_full(train(folder, *SEMI), folder, 2, "No space left on device")
    subprocess.run(["mount", "-o", "remount,size=1G", str(small_disk)], check=True)
    resume(train, folder, whole, *SEMI, "SOLVER.CHECKPOINTS_KEPT", 2)
    kept = [f"model_{STEPS - i:07d}.pth" for i in (2, 1)]
    assert sorted(path.name for path in folder.glob("*.pth")) == [*kept, "model_final.pth"]


def test_a_limit_on_files(train, whole, tmp_path, injected):
    injected(1)
    result = train(tmp_path, *SEMI, fault=("limit", 3))
    check_full(result, tmp_path, 2, "File too large")
    resume(train, tmp_path, whole)


# ---- broken files ----


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut_off, flip_a_bit, Path.unlink])
def test_a_broken_checkpoint_is_not_used_and_the_one_before_is_offered(
    train, whole, tmp_path, injected, harm
):
    injected(1)
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (STEPS - 4, STEPS - 3):
        shutil.copy2(whole / f"model_{step:07d}.pth", folder)
    last, before = f"model_{STEPS - 3:07d}.pth", f"model_{STEPS - 4:07d}.pth"
    (folder / "last_checkpoint").write_text(last)
    harm(folder / last)
    result = train(folder, "--resume", *SEMI)
    assert result.code == 1
    assert "Traceback" not in result.output
    assert f"{folder / last} is damaged" in result.last_line
    assert f"{before}, is whole: --resume-or-start goes on from that one" in result.last_line
    assert (folder / "last_checkpoint").read_text() == last
    result = train(folder, "--resume-or-start", *SEMI)
    assert result.code == 0, result.output[-3000:]
    assert f"going on from {folder / before}" in result.output
    assert f"Resumed at iteration {STEPS - 3} of {STEPS} from {folder / before}" in result.output
    check_finished(folder, whole)


def test_a_broken_final_model_is_written_anew(train, whole, tmp_path, injected):
    injected(1)
    for name in (f"model_{STEPS - 1:07d}.pth", "model_final.pth"):
        shutil.copy2(whole / name, tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    cut_off(tmp_path / "model_final.pth")
    result = train(tmp_path, "--resume-or-start", *SEMI)
    assert result.code == 0, result.output[-3000:]
    assert f"All {STEPS} iterations are done" in result.output
    check_finished(tmp_path, whole)


# ---- nothing to go on with ----


def test_resuming_where_there_is_no_checkpoint(train, tmp_path, injected):
    injected(1)
    for options in (SEMI, ("--eval-only",)):
        result = train(tmp_path, "--resume", *options)
        assert result.code == 1
        assert "Traceback" not in result.output
        assert "there is no checkpoint in OUTPUT_DIR" in result.last_line
        assert "--resume-or-start" in result.last_line
    assert not list(tmp_path.glob("*.pth"))


def test_resuming_a_finished_run(train, whole, tmp_path, injected):
    injected(1)
    shutil.copy2(whole / "model_final.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    result = resume(train, tmp_path, whole)
    assert f"All {STEPS} iterations are done" in result.output
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_final.pth"]
