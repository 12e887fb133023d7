"""Start one process per GPU (or per CPU process), by spawning, under torchrun or under srun.

Detectron2 0.6's own ``launch`` insists on CUDA and knows nothing of torchrun.
"""

import os
import re
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from .rendezvous import fresh_store

# COCO evaluation runs on rank 0 while the others wait.
TIMEOUT = timedelta(hours=2)
_PEER_GONE = re.compile("Connection (closed|reset) by peer")  # gloo's words
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


def launch(
    main: Callable,
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
) -> None:
    """Run ``main(*args)`` in every process of the job.

    Under torchrun (``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` are set) this process is one of the
    job and the other arguments are ignored; so it is under ``srun`` with several tasks, unless the
    arguments ask for several processes themselves. CUDA uses NCCL, a machine without GPU gloo.

    Args:
        main: what to run; picklable.
        num_processes: processes on this machine (``--num-gpus``).
        num_machines, machine_rank: machines in the job and this one's number.
        dist_url: ``tcp://host:port`` of machine 0, or "auto" on a single machine.
        args: arguments of ``main``.

    Raises:
        ValueError: see :func:`choose_url`.
    """
    if not TORCHRUN.issubset(os.environ) and num_processes * num_machines <= 1:
        os.environ.update(slurm_job(os.environ))
    if TORCHRUN.issubset(os.environ):
        local_rank = int(os.environ["LOCAL_RANK"])
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        _run(local_rank, local_size, "env://", main, args)
        return
    dist_url = choose_url(num_processes, num_machines, dist_url)
    world_size = num_processes * num_machines
    if world_size <= 1:
        main(*args)
        return
    spawned = (num_processes, world_size, machine_rank, dist_url, main, args)
    try:
        mp.spawn(_spawned, nprocs=num_processes, args=spawned)
    except mp.ProcessExitedException as error:
        # The process has said why it ended (a user's mistake, a signal); a traceback adds nothing.
        raise SystemExit(f"error: {error}") from error


def slurm_job(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task that ``srun`` has started, one of several of its step.

    A batch script itself, whose commands are no tasks of a step, is none; nor is a single task.
    ``MASTER_ADDR`` and ``MASTER_PORT`` are kept where they are set; else the first machine of the
    step serves, at a port that follows from the job's number.

    Args:
        environ: the process' environment.

    Returns:
        ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and
        ``MASTER_PORT``, or nothing.

    Raises:
        ValueError: the machines of the step have different numbers of tasks.
    """
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks <= 1 or "SLURM_PROCID" not in environ:
        return {}
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", 1))
    layout = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if tasks % nodes or "," in layout:
        raise ValueError(
            f"srun has {tasks} tasks on {nodes} nodes ({layout}): start the same number on each, "
            "--ntasks-per-node"
        )
    if int(environ["SLURM_PROCID"]) % (tasks // nodes) != int(environ["SLURM_LOCALID"]):
        raise ValueError(
            f"srun task {environ['SLURM_PROCID']} is number {environ['SLURM_LOCALID']} of its "
            "node: the tasks of a node must follow each other, --distribution=block"
        )
    address = environ.get("MASTER_ADDR") or _first_host(environ["SLURM_STEP_NODELIST"])
    port = 10_000 + int(environ.get("SLURM_JOB_ID", 0)) % 20_000
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "MASTER_ADDR": address,
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
    }


def _first_host(hosts: str) -> str:
    """The first of SLURM's compressed list: ``gpu[03-04,07],cpu1`` begins with ``gpu03``."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", hosts)
    if not found:
        raise ValueError(f"SLURM_STEP_NODELIST {hosts!r} names no host; set MASTER_ADDR")
    return "".join(part or "" for part in found.groups())


def choose_url(num_processes: int, num_machines: int, dist_url: str) -> str:
    """Check the size of a job that is not under torchrun and replace "auto" by a free port.

    Raises:
        ValueError: more processes than GPUs, or "auto" with several machines.
    """
    gpus = torch.cuda.device_count()
    if gpus and num_processes > gpus:
        raise ValueError(f"--num-gpus {num_processes}: this machine has {gpus} GPUs")
    if dist_url != "auto":
        return dist_url
    if num_machines > 1:
        raise ValueError("--dist-url is needed with --num-machines above 1: tcp://HOST:PORT")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _spawned(
    local_rank: int,
    local_size: int,
    world_size: int,
    machine_rank: int,
    dist_url: str,
    main: Callable,
    args: tuple,
) -> None:
    rank = machine_rank * local_size + local_rank
    _run(local_rank, local_size, dist_url, main, args, world_size=world_size, rank=rank)


def _run(
    local_rank: int, local_size: int, url: str, main: Callable, args: tuple, **ranks: int
) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _usable_cores() // local_size))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if dist.is_torchelastic_launched():
        store, rank, world_size = next(dist.rendezvous(url, timeout=TIMEOUT))
        where = {"store": fresh_store(store, rank, world_size)}
        ranks = {"rank": rank, "world_size": world_size}
    else:
        where = {"init_method": url}
    dist.init_process_group(backend, timeout=TIMEOUT, **where, **ranks)
    _create_local_group(local_size)
    comm.synchronize()
    try:
        main(*args)
    except BaseException as error:
        if backend == "gloo":  # NCCL would wait for the other ranks
            _leave()
        if isinstance(error, RuntimeError) and _PEER_GONE.search(str(error)):
            raise SystemExit(
                "error: another process of the job has ended; what it said tells why"
            ) from error
        raise
    _leave()


def _usable_cores() -> int:
    """Those that a batch system has left to this process, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _leave() -> None:
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None  # a gloo group that outlives the others aborts at exit


def _create_local_group(local_size: int) -> None:
    """Tell Detectron2 which ranks share this machine."""
    if hasattr(comm, "create_local_process_group"):  # after release 0.6
        comm.create_local_process_group(local_size)
        return
    for first in range(0, dist.get_world_size(), local_size):
        ranks = list(range(first, first + local_size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group
