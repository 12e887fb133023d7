"""Start one process per GPU (or per CPU process), by spawning or under torchrun.

Detectron2 0.6's own ``launch`` insists on CUDA and knows nothing of torchrun.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

# COCO evaluation runs on rank 0 while the others wait.
TIMEOUT = timedelta(hours=2)


def launch(
    main: Callable,
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
) -> None:
    """Run ``main(*args)`` in every process of the job.

    Under torchrun (``RANK`` and ``WORLD_SIZE`` are set) this process is one of the job and the
    other arguments are ignored. CUDA uses NCCL, a machine without GPU gloo.

    Args:
        main: what to run; picklable.
        num_processes: processes on this machine (``--num-gpus``).
        num_machines, machine_rank: machines in the job and this one's number.
        dist_url: ``tcp://host:port`` of machine 0, or "auto" on a single machine.
        args: arguments of ``main``.

    Raises:
        ValueError: more processes than GPUs, or "auto" with several machines.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        local_rank = int(os.environ["LOCAL_RANK"])
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        _run(local_rank, local_size, "env://", main, args)
        return
    gpus = torch.cuda.device_count()
    if gpus and num_processes > gpus:
        raise ValueError(f"--num-gpus {num_processes}: this machine has {gpus} GPUs")
    world_size = num_processes * num_machines
    if world_size <= 1:
        main(*args)
        return
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError("--dist-url is needed with --num-machines above 1: tcp://HOST:PORT")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    spawned = (num_processes, world_size, machine_rank, dist_url, main, args)
    mp.spawn(_spawned, nprocs=num_processes, args=spawned)


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
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=url, timeout=TIMEOUT, **ranks)
    _create_local_group(local_size)
    comm.synchronize()
    try:
        main(*args)
    finally:
        dist.destroy_process_group()


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


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
