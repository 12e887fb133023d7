"""Two processes: ranks without an object, ranks with fewer images, and one that is killed."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.runner import REPO, Result
from tests.e2e.test_semisup import (
    NO_EVALUATION,
    check_equal,
    load,
    semi,  # noqa: F401
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU"),
]

# Forks two ranks of a job, which need not import anything again.
PAIR = """
import os, runpy, socket, sys

del sys.argv[0]
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
os.environ.update(LOCAL_WORLD_SIZE="2")
children = []
for rank in ("0", "1"):
    os.environ.update(RANK=rank, LOCAL_RANK=rank)
    child = os.fork()
    if child == 0:
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(max(codes, key=abs))
"""

# Writes what each rank trained on and tested, and what it ended with.
WATCH = """
import os, runpy, sys
import torch
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

target, *sys.argv = sys.argv[1:]
steps, tested = [], []
process, train = COCOEvaluator.process, DefaultTrainer.train

def see(self, inputs, outputs):
    tested.extend(record["image_id"] for record in inputs)
    return process(self, inputs, outputs)

def train_and_tell(self):
    model = self._trainer.model.module
    def watch(_, args, losses):
        steps.append((sum(len(r["instances"]) for r in args[0]), sorted(losses)))
    model.register_forward_hook(lambda m, a, out: watch(m, a, out) if m.training else None)
    result = train(self)
    told = {"steps": steps, "tested": tested, "state": model.state_dict()}
    torch.save(told, os.path.join(target, f"rank{comm.get_rank()}.pt"))
    return result

COCOEvaluator.process, DefaultTrainer.train = see, train_and_tell
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Kills rank 1 before a step, unless torchrun has started it for a second time.
DIE = """
import os, runpy, signal, sys
from detectron2.utils import comm
from il_net.engine.preemption import Preemption

iteration, *sys.argv = sys.argv[1:]

def begin(self, begin=Preemption.step_begins):
    begin(self)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and comm.get_rank() == 1 and self.trainer.iter == int(iteration):
        os.kill(os.getpid(), signal.SIGKILL)

Preemption.step_begins = begin
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def scripts(folder: Path) -> tuple[Path, Path, Path]:
    """Files of the three programs above."""
    paths = [folder / name for name in ("pair.py", "watch.py", "die.py")]
    for path, text in zip(paths, (PAIR, WATCH, DIE), strict=True):
        path.write_text(text)
    return tuple(paths)


def half_empty(datasets: Path, folder: Path) -> Path:
    """The small training set, of which every second picture has lost its objects."""
    content = json.loads((datasets / "leaves" / "train.json").read_text())
    empty = {image["id"] for image in content["images"][::2]}
    left = [a for a in content["annotations"] if a["image_id"] not in empty]
    assert left and len(left) < len(content["annotations"])
    path = folder / "half.json"
    path.write_text(json.dumps({**content, "annotations": left}))
    return path


@pytest.mark.parametrize("name", ["Base-small.yaml", "sbr_cnn_small.yaml"])
def test_ranks_without_objects_and_with_fewer_images(
    run, config, datasets, tmp_path, injected, name
):
    """Loops, FCC, Mask IoU and C2SSL: the same losses on both ranks, no hang, equal weights."""
    injected(2)
    pair, watch, _ = scripts(tmp_path)
    text = config.read_text().replace("Base-small.yaml", name)
    text = text.replace("leaves/train.json", str(half_empty(datasets, tmp_path)))
    (tmp_path / "half.yaml").write_text(text)
    output = tmp_path / "run"
    options = (
        *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False", "SOLVER.MAX_ITER", 8, "SEED", 2),
        *("MODEL.C2SSL.ENABLED", "True"),
        *("MODEL.C2SSL.GROUPS", '[{"containers": ["leaf"], "contents": ["miner", "rust"]}]'),
    )
    train = (REPO / "train_net.py", "--config-file", tmp_path / "half.yaml")
    result = run(pair, watch, tmp_path, *train, *options, "OUTPUT_DIR", output)
    assert result.code == 0, result.output[-3000:]
    ranks = [load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]

    objects = [[count for count, _ in rank["steps"]] for rank in ranks]
    pairs = set(zip(*[[n > 0 for n in counts] for counts in objects], strict=True))
    assert {(True, False), (False, True)} <= pairs, objects  # the fault was there, either way
    assert [keys for _, keys in ranks[0]["steps"]] == [keys for _, keys in ranks[1]["steps"]]
    check_equal(ranks[0]["state"], ranks[1]["state"])

    truth = json.loads((datasets / "leaves" / "val.json").read_text())
    ids = sorted(image["id"] for image in truth["images"])
    assert sorted(ranks[0]["tested"] + ranks[1]["tested"]) == ids
    assert {len(rank["tested"]) for rank in ranks} == {1, 2}
    check_equal(detections(output), detections(evaluated_alone(run, output, tmp_path)))


def evaluated_alone(run, folder: Path, scratch: Path) -> Path:
    """The same weights, scored by one process."""
    result = run(
        *("train_net.py", "--config-file", folder / "config.yaml", "--eval-only"),
        *("MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", scratch / "alone"),
    )
    assert result.code == 0, result.output[-3000:]
    return scratch / "alone"


def detections(folder: Path) -> list[tuple]:
    """Image, class, box and score of every detection, in an order of their own."""
    path = folder / "inference" / "tiny_val" / "coco_instances_results.json"
    found = json.loads(path.read_text())
    assert found
    keys = ("image_id", "category_id", "score", "bbox")
    return sorted(tuple(str(record[key]) for key in keys) for record in found)


def test_a_killed_rank_and_the_job_goes_on(run, semi, tmp_path, injected):  # noqa: F811
    """torchrun starts both anew; the result is that of a job that nothing disturbed."""
    injected(1)
    _, _, die = scripts(tmp_path)
    steps, killed = 6, 4
    options = ("SOLVER.MAX_ITER", steps, *NO_EVALUATION)
    # Without the checkpoint of step 3 the killed step's predecessor is repeated.
    options += ("SOLVER.CHECKPOINT_PERIOD", 3)
    whole = elastic(run, die, -1, semi, *options, "OUTPUT_DIR", tmp_path / "whole")
    assert whole.code == 0, whole.output[-3000:]
    result = elastic(run, die, killed, semi, *options, "OUTPUT_DIR", tmp_path / "run")
    assert result.code == 0, result.output[-3000:]
    assert f"Resumed at iteration 3 of {steps}" in result.output
    assert "Resumed" not in whole.output
    finals = [load(tmp_path / name / "model_final.pth") for name in ("run", "whole")]
    check_equal(*finals)


def elastic(run, die: Path, iteration: int, config: Path, *options: object) -> Result:
    return run.alone(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2),
        *("--max-restarts", 2, die, iteration, REPO / "train_net.py", "--resume-or-start"),
        *("--config-file", config, *options),
    )
