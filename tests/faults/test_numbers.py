"""Numbers that are not finite in real runs: one process and two, stopped and skipped, replayed."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.e2e.runner import REPO, Result
from tests.e2e.test_command_line import read_metrics
from tests.e2e.test_semisup import CONFIG as SEMI_CONFIG

STEPS, AT = 4, 2
MODULE = "roi_heads.pairs.a.box_head.fc1"

# Breaks one thing in one iteration on one rank, and writes each rank's weights at the end.
BREAK = """
import os, runpy, sys
import torch
from detectron2.engine import DefaultTrainer
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from il_net.engine.train_step import TrainStep
from il_net.modeling import teacher_student

what, iteration, rank, *sys.argv = sys.argv[1:]
losses, weigh = FastRCNNOutputLayers.losses, teacher_student.weigh
backward, train = TrainStep._backward, DefaultTrainer.train

def now(kind):
    here = get_event_storage().iter == int(iteration) and comm.get_rank() == int(rank)
    return here and what == kind

def broken_losses(*args):
    factor = float("nan") if now("loss") else 1.0
    return {name: loss * factor for name, loss in losses(*args).items()}

def broken_weigh(raw, weights):
    factor = float("nan") if now("unlabelled loss") else 1.0
    return weigh({name: loss * factor for name, loss in raw.items()}, weights)

def broken_backward(self, batch):
    if now("image"):
        for record in batch:
            record["image"] = torch.full_like(record["image"], float("nan"), dtype=torch.float32)
    if now("weights"):
        self.model.get_submodule("MODULE").weight.data[0, 0] = float("inf")
    return backward(self, batch)

def train_and_tell(self):
    train(self)
    path = os.path.join(self.cfg.OUTPUT_DIR, f"rank{comm.get_rank()}.pt")
    torch.save(getattr(self._trainer.model, "module", self._trainer.model).state_dict(), path)

FastRCNNOutputLayers.losses, teacher_student.weigh = broken_losses, broken_weigh
TrainStep._backward, DefaultTrainer.train = broken_backward, train_and_tell
runpy.run_path(sys.argv[0], run_name="__main__")
""".replace("MODULE", MODULE)


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """The file of ``BREAK``."""
    path = tmp_path_factory.mktemp("script") / "break.py"
    path.write_text(BREAK)
    return path


@pytest.fixture
def train(run, config, script, tmp_path) -> Callable[..., Result]:
    """``train("loss", *options)``: a run with that fault in iteration ``AT``."""

    def call(what: str, *options: object) -> Result:
        return run(script, what, AT, 0, *command(config, tmp_path, *options))

    return call


def command(config: Path, folder: Path, *options: object) -> list[object]:
    return [
        *(REPO / "train_net.py", "--config-file", config, "OUTPUT_DIR", folder),
        *("SOLVER.MAX_ITER", STEPS, *options),
    ]


def skip(limit: int = 10) -> tuple:
    return ("SOLVER.NONFINITE.ACTION", "skip", "SOLVER.NONFINITE.LIMIT", limit)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def check_finite(state: dict[str, Tensor]) -> None:
    bad = [name for name, x in state.items() if not x.double().isfinite().all()]
    assert not bad


def steps_kept(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "nonfinite").iterdir())


def check_stopped(result: Result, folder: Path, names: str) -> Path:
    """One line at the end that tells all, the step kept, the last checkpoint as it was."""
    assert result.code == 1, result.output[-3000:]
    assert "Traceback" not in result.output, result.output[-3000:]
    (path,) = steps_kept(folder)
    assert path.name == f"iter_{AT:07d}_rank0.pt"
    step = load(path)
    groups = [records for batch in step["batches"] for records in batch.values()]
    files = sorted({record["file_name"] for records in groups for record in records})
    found = f"error: iteration {AT}: not finite: {names} on rank 0 with {', '.join(files)}. "
    assert result.last_line.startswith(f"{found}Inputs and weights: {path}. ")
    assert result.last_line.removeprefix("error: ") in (folder / "log.txt").read_text()
    # Nothing is saved or evaluated after the last good step.
    assert (folder / "last_checkpoint").read_text() == f"model_{AT - 1:07d}.pth"
    assert not (folder / f"model_{AT:07d}.pth").exists()
    assert not (folder / "inference").exists()
    checkpoint = load(folder / f"model_{AT - 1:07d}.pth")
    assert checkpoint["iteration"] == AT - 1
    check_finite(checkpoint["model"])
    return path


# ---- one process ----


def test_a_run_stops_and_goes_on_from_its_last_checkpoint(train, run, config, tmp_path, injected):
    injected(1)
    result = train("loss")
    names = [f"{kind}_loop{t}" for t in (1, 2, 3) for kind in ("loss_cls", "loss_box_reg")]
    check_stopped(result, tmp_path, ", ".join(names))
    script, *rest = command(config, tmp_path, "DATASETS.TEST", "()")
    resumed = run(script, "--resume", *rest)
    assert resumed.code == 0, resumed.output[-3000:]
    assert f"Resumed at iteration {AT} of {STEPS}" in resumed.output
    check_finite(load(tmp_path / "model_final.pth")["model"])


def test_a_run_that_stops_in_its_last_step_is_not_evaluated(train, tmp_path, injected):
    injected(1)
    result = train("loss", "SOLVER.MAX_ITER", AT + 1)
    assert result.code == 1
    assert result.last_line.startswith(f"error: iteration {AT}: not finite: ")
    assert not (tmp_path / "inference").exists()


def test_a_run_that_stops_in_its_first_step(run, config, script, tmp_path, injected):
    """There is nothing to write into the metrics yet, and no checkpoint."""
    injected(1)
    result = run(script, "loss", 0, 0, *command(config, tmp_path))
    assert result.code == 1
    assert "Traceback" not in result.output
    assert result.last_line.startswith("error: iteration 0: not finite: loss_cls_loop1")
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("what", ["loss", "image"])
def test_a_run_skips_the_step(train, tmp_path, injected, what):
    injected(1)
    result = train(what, *skip(), "SOLVER.CHECKPOINT_PERIOD", 1)
    assert result.code == 0, result.output[-3000:]
    assert f"iteration {AT}: not finite: " in result.output
    before, after, last = (
        load(tmp_path / name)["model"]
        for name in (f"model_{AT - 1:07d}.pth", f"model_{AT:07d}.pth", "model_final.pth")
    )
    for state in (after, last):
        check_finite(state)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert any(not torch.equal(last[name], x) for name, x in before.items())
    losses, scores = read_metrics(tmp_path)  # evaluated at the end
    assert all(math.isfinite(value) for value in losses.values())
    assert "total_loss" in losses and "bbox/AP" in scores


def test_too_many_skipped_steps_stop_the_run(train, tmp_path, injected):
    """Weights that are infinite stay so: every step from then on is bad."""
    injected(1)
    result = train("weights", *skip(limit=1))
    assert result.code == 1
    assert "Traceback" not in result.output
    assert result.last_line.startswith(f"error: iteration {AT + 1}: not finite: ")
    assert "SOLVER.NONFINITE.LIMIT 1 steps were skipped before" in result.last_line
    assert len(steps_kept(tmp_path)) == 2


def test_a_full_disk_stops_no_run_that_skips(train, tmp_path, injected):
    injected(2)
    (tmp_path / "nonfinite").mkdir()
    (tmp_path / "nonfinite" / f"iter_{AT:07d}_rank0.partial").symlink_to("/dev/full")
    result = train("loss", *skip(), "DATASETS.TEST", "()")
    assert result.code == 0, result.output[-3000:]
    assert "not kept (" in result.output and "No space left on device" in result.output
    assert steps_kept(tmp_path) == []
    check_finite(load(tmp_path / "model_final.pth")["model"])


# ---- replay ----


def replay(run, folder: Path, *options: object) -> Result:
    (path,) = steps_kept(folder)
    config = ("--config-file", folder / "config.yaml")
    return run("tools/replay_batch.py", *config, "--step", path, *options)


def test_a_bad_image_stops_the_run_and_replay_shows_it(train, run, tmp_path, injected):
    """Detectron2's RPN raises an exception on it, in this process only."""
    injected(1)
    check_stopped(train("image"), tmp_path, "the predicted boxes")
    result = replay(run, tmp_path)
    assert result.code == 0, result.output
    lines = result.output.splitlines()
    assert sum(line.endswith("objects, not finite itself") for line in lines) == 2
    assert "the predicted boxes: nan" in lines


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16"])
def test_a_bad_weight_stops_the_run_and_replay_names_its_module(
    train, run, tmp_path, injected, dtype
):
    injected(1)
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype) if dtype else ()
    result = train("weights", *amp)
    assert result.code == 1, result.output[-3000:]
    result = replay(run, tmp_path)
    assert result.code == 0, result.output
    assert f"first module with a non-finite output: {MODULE}" in result.output.splitlines()


# ---- semi-supervised ----


@pytest.fixture(scope="module")
def semi(tmp_path_factory) -> Path:
    """Burn-in ends before iteration ``AT``; two labelled and two unlabelled images a step."""
    path = tmp_path_factory.mktemp("config") / "semi.yaml"
    text = SEMI_CONFIG.format(base=REPO / "configs" / "quickstart" / "il_net.yaml")
    path.write_text(text.replace("BURN_IN_ITERS: 3", "BURN_IN_ITERS: 1"))
    return path


def test_a_loss_on_unlabelled_images_stops_the_run(run, semi, script, tmp_path, injected):
    injected(1)
    result = run(script, "unlabelled loss", AT, 0, *command(semi, tmp_path, "TEST.EVAL_PERIOD", 0))
    assert result.code == 1, result.output[-3000:]
    names = "loss_cls_pseudo, loss_box_reg_pseudo, loss_box_iou_pseudo"
    path = check_stopped(result, tmp_path, f"{names}, loss_rpn_cls_pseudo, loss_rpn_loc_pseudo")
    (batch,) = load(path)["batches"]
    assert [len(batch[group]) for group in ("labeled", "unlabeled")] == [2, 2]
    # The fault was in the run, not in what it kept.
    result = replay(run, tmp_path)
    assert result.code == 1, result.output
    assert result.last_line.startswith("all numbers are finite this time")


def test_a_loss_on_unlabelled_images_is_skipped(run, semi, script, tmp_path, injected):
    injected(1)
    options = (*skip(), "DATASETS.TEST", "()", "TEST.EVAL_PERIOD", 0)
    result = run(script, "unlabelled loss", AT, 0, *command(semi, tmp_path, *options))
    assert result.code == 0, result.output[-3000:]
    before, after = (load(tmp_path / f"model_{i:07d}.pth")["model"] for i in (AT - 1, AT))
    students = [name for name in before if name.startswith("student.")]
    assert students and all(torch.equal(before[name], after[name]) for name in students)
    state = load(tmp_path / "model_final.pth")["model"]
    check_finite(state)
    assert any(not torch.equal(before[name], state[name]) for name in students)


# ---- two processes ----


def torchrun(run, script: Path, what: str, *arguments: object) -> Result:
    """The fault on rank 1 of 2."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone")
    return run.alone(sys.executable, *launcher, script, what, AT, 1, *arguments)


@pytest.mark.slow
@pytest.mark.timeout(200)  # processes that wait for each other would do so for two hours
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU")
@pytest.mark.parametrize("what", ["loss", "image"])
def test_both_processes_stop(run, config, script, tmp_path, injected, what):
    injected(1)
    result = torchrun(run, script, what, *command(config, tmp_path))
    assert result.code != 0
    (path,) = steps_kept(tmp_path)
    assert path.name == f"iter_{AT:07d}_rank1.pt"
    (record,) = load(path)["batches"][0][""]
    name = "loss_cls_loop1, " if what == "loss" else "the predicted boxes on rank 1"
    log = (tmp_path / "log.txt").read_text()
    (line,) = [x for x in log.splitlines() if f"iteration {AT}: not finite: " in x]
    assert f" on rank 1 with {record['file_name']}. Inputs and weights: {path}. " in line
    assert f"not finite: {name}" in line
    assert "on rank 0" not in line
    assert line.partition("iteration")[2] in result.output
    assert not (tmp_path / f"model_{AT:07d}.pth").exists()
    check_finite(load(tmp_path / f"model_{AT - 1:07d}.pth")["model"])


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU")
@pytest.mark.parametrize("what", ["loss", "image"])
def test_both_processes_skip(run, config, script, tmp_path, injected, what):
    injected(1)
    options = (*skip(), "DATASETS.TEST", "()")
    result = torchrun(run, script, what, *command(config, tmp_path, *options))
    assert result.code == 0, result.output[-5000:]
    assert [path.name for path in steps_kept(tmp_path)] == [f"iter_{AT:07d}_rank1.pt"]
    one, other = (load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    before = load(tmp_path / f"model_{AT - 1:07d}.pth")["model"]
    assert one.keys() == other.keys() == before.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], before[name]) for name in one)
    check_finite(one)
