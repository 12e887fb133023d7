"""A long semi-supervised run: memory and open files stay flat, old checkpoints go."""

import json
from statistics import median

import pytest

from tests.e2e.runner import REPO
from tests.e2e.test_command_line import read_metrics
from tests.e2e.test_semisup import CONFIG

STEPS, BURN_IN, PERIOD, EVALUATE = 1000, 100, 100, 300
OPTIONS = (
    *("SOLVER.MAX_ITER", STEPS, "SEMISUP.BURN_IN_ITERS", BURN_IN),
    *("SOLVER.CHECKPOINT_PERIOD", PERIOD, "SOLVER.CHECKPOINTS_KEPT", 2),
    *("TEST.EVAL_PERIOD", EVALUATE, "VIS_PERIOD", 700),
    *("INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 2),
)

# Writes resident kilobytes and open files of a run of train_net.py before every tenth step, without
# fonts, which stay open from the first drawing on, and images that wait in shared memory.
WATCH = """
import json, os, runpy, sys
from pathlib import Path
from il_net.engine.preemption import Preemption

target, *sys.argv = sys.argv[1:]

def begin(self, begin=Preemption.step_begins):
    begin(self)
    if self.trainer.iter % 10 == 0:
        status = Path("/proc/self/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0])
        opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        files = sum(not name.endswith(".ttf") and "/shm/torch_" not in name for name in opened)
        with open(target, "a") as file:
            print(json.dumps([self.trainer.iter, resident, files]), file=file)

Preemption.step_begins = begin
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_thousand_steps(run, tmp_path, injected):
    """Memory within the five percent asked; four evaluations, one preview, two checkpoints."""
    injected(1)
    config, script = tmp_path / "semi.yaml", tmp_path / "watch.py"
    config.write_text(CONFIG.format(base=REPO / "configs" / "quickstart" / "il_net.yaml"))
    script.write_text(WATCH)
    seen, output = tmp_path / "seen.json", tmp_path / "run"
    command = (REPO / "train_net.py", "--config-file", config, "OUTPUT_DIR", output)
    result = run(script, seen, *command, *OPTIONS)
    assert result.code == 0, result.output[-3000:]
    check_flat([json.loads(line) for line in seen.read_text().splitlines()])

    evaluated = [m["iteration"] for m in read_metrics(output) if "student/bbox/AP" in m]
    assert evaluated == [*(i - 1 for i in range(EVALUATE, STEPS, EVALUATE)), STEPS]
    assert len(list((output / "pseudo_labels").iterdir())) == 1
    last = [f"model_{step - 1:07d}.pth" for step in (STEPS - PERIOD, STEPS)]
    kept = sorted(path.name for path in output.glob("*.pth"))
    assert kept == [*last, "model_best.pth", "model_final.pth"]
    assert not list(output.glob("*.partial"))


def check_flat(samples: list[list[int]]) -> None:
    """Samples (step, kilobytes, open files), every ten steps to the last."""
    assert samples[-1][0] == STEPS - 10
    memory = [kilobytes for step, kilobytes, _ in samples if step >= BURN_IN + 50]
    assert max(memory) < 1.05 * median(memory[:10]), memory
    # The readers of the last evaluation stay until the next one.
    files = [number for step, _, number in samples if step >= EVALUATE]
    assert median(files[-10:]) <= median(files[:10]), files
