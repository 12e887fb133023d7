"""Starting processes: two on the CPU by spawning, and under torchrun's environment."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.utils import comm

from il_net.engine import launch as launch_module
from il_net.engine.launch import launch

REPO = Path(__file__).parents[3]


def record(folder: str) -> None:
    """Write what this process knows of the job to ``folder/<rank>.json``."""
    rank = comm.get_rank()
    total = torch.tensor([float(rank + 1)])
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(total)
    known = {
        "pid": os.getpid(),
        "world_size": comm.get_world_size(),
        "local_rank": comm.get_local_rank(),
        "local_size": comm.get_local_size(),
        "gathered": comm.all_gather(f"rank {rank}"),
        "sum": total.item(),
        "backend": torch.distributed.get_backend() if comm.get_world_size() > 1 else None,
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(known))


def fail_on_rank_1() -> None:
    if comm.get_rank() == 1:
        raise ValueError("no second half")


def read(folder: Path) -> dict[int, dict]:
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(autouse=True)
def _no_job_around_us(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_one_process_runs_here_without_a_group(tmp_path):
    for count in (1, 0):  # Detectron2's --num-gpus 0 is a CPU run as well
        launch(record, count, args=(str(tmp_path),))
        (known,) = read(tmp_path).values()
        assert known["pid"] == os.getpid()
        assert known["world_size"] == known["local_size"] == 1
        assert known["gathered"] == ["rank 0"]
        assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="spawns gloo processes on the CPU")
def test_two_processes(tmp_path):
    launch(record, 2, args=(str(tmp_path),))
    known = read(tmp_path)
    assert sorted(known) == [0, 1]
    assert len({known[0]["pid"], known[1]["pid"], os.getpid()}) == 3
    for rank in (0, 1):
        assert known[rank]["world_size"] == known[rank]["local_size"] == 2
        assert known[rank]["local_rank"] == rank
        assert known[rank]["gathered"] == ["rank 0", "rank 1"]
        assert known[rank]["sum"] == 3.0
        assert known[rank]["backend"] == "gloo"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="spawns gloo processes on the CPU")
def test_an_error_in_one_process_reaches_the_caller():
    with pytest.raises(Exception, match="no second half"):
        launch(fail_on_rank_1, 2)


def run_ranks(folder: Path, environments: list[dict], code: str) -> None:
    """Run ``code`` once per environment at the same time and wait for all."""
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            cwd=REPO,
            env={**base, "PYTHONPATH": f"{REPO}{os.pathsep}{Path(__file__).parent}", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


CODE = "import os, sys, test_launch; test_launch.launch(test_launch.record, {}, (sys.argv[1],))"


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo processes on the CPU")
def test_two_machines_of_one_process_under_torchruns_environment(tmp_path):
    """The other arguments are ignored: what torchrun says counts."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [{**common, **address, "RANK": str(rank)} for rank in (0, 1)]
    run_ranks(tmp_path, environments, CODE.format("8, 4, 3, 'tcp://nowhere:1'"))
    known = read(tmp_path)
    assert sorted(known) == [0, 1]
    for rank in (0, 1):
        assert known[rank]["world_size"] == 2
        assert known[rank]["local_rank"] == 0
        assert known[rank]["local_size"] == 1
        assert known[rank]["gathered"] == ["rank 0", "rank 1"]


def test_ranks_go_on_from_machine_to_machine(monkeypatch):
    """Two machines of three processes: the second has the ranks 3, 4, 5 of 6."""
    started = []

    def spawn(function, nprocs: int, args: tuple) -> None:
        for local_rank in range(nprocs):
            function(local_rank, *args)

    def run(local_rank: int, local_size: int, url: str, main, args: tuple, **ranks: int) -> None:
        started.append((local_rank, local_size, url, args, ranks["rank"], ranks["world_size"]))

    monkeypatch.setattr(launch_module.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(launch_module.mp, "spawn", spawn)
    monkeypatch.setattr(launch_module, "_run", run)
    launch(record, 3, 2, 1, "tcp://first:1", ("folder",))
    assert started == [(i, 3, "tcp://first:1", ("folder",), 3 + i, 6) for i in range(3)]


def test_several_machines_need_an_address():
    with pytest.raises(ValueError, match="--dist-url"):
        launch(record, 1, num_machines=2, dist_url="auto", args=("unused",))


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--num-gpus 2: this machine has 1"):
        launch(record, 2, args=("unused",))


# ---- SLURM ----

STEP = {
    **{"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3"},
    **{"SLURM_LOCALID": "1", "SLURM_JOB_ID": "45678", "SLURM_STEP_NODELIST": "gpu[03-04]"},
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_a_task_of_srun_is_a_process_of_the_job():
    assert launch_module.slurm_job(STEP) == {
        **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "gpu03", "MASTER_PORT": "15678"},
    }
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert launch_module.slurm_job({**STEP, **own}).items() >= own.items()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu1", "gpu1"), ("gpu[03,07-09]", "gpu03"), ("a[1-2]b,c", "a1b"), ("x,y", "x")],
)
def test_first_host_of_a_list(hosts, first):
    assert launch_module.slurm_job({**STEP, "SLURM_STEP_NODELIST": hosts})["MASTER_ADDR"] == first


def test_a_batch_script_and_a_single_task_are_no_job():
    script = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}
    assert launch_module.slurm_job(script) == {}
    assert launch_module.slurm_job({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert launch_module.slurm_job({}) == {}


def test_uneven_tasks_are_refused():
    uneven = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    with pytest.raises(ValueError, match=r"3 tasks on 2 nodes \(2,1\).*--ntasks-per-node"):
        launch_module.slurm_job({**STEP, **uneven})


def test_tasks_dealt_out_in_turn_are_refused():
    """Task 2 of 4 on 2 nodes, the first of its node under --distribution=cyclic as well."""
    assert launch_module.slurm_job({**STEP, "SLURM_PROCID": "2", "SLURM_LOCALID": "0"})
    with pytest.raises(ValueError, match="--distribution=block"):
        launch_module.slurm_job({**STEP, "SLURM_PROCID": "2", "SLURM_LOCALID": "1"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="starts gloo processes on the CPU")
def test_two_tasks_of_srun_find_each_other(tmp_path):
    """With the variables that srun sets; srun itself is not here."""
    job = {
        **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": "7"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    }
    tasks = [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    run_ranks(tmp_path, tasks, CODE.format("1, 1, 0, 'auto'"))
    known = read(tmp_path)
    assert known[0]["gathered"] == known[1]["gathered"] == ["rank 0", "rank 1"]
    assert [known[rank]["local_rank"] for rank in (0, 1)] == [0, 1]
    assert known[0]["local_size"] == 2 and known[0]["sum"] == 3
