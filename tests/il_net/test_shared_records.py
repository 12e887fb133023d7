"""Packed records: what went in comes out; the processes of a machine hold one copy together."""

import json
import os
import resource
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.utils import comm

from il_net.data import shared_records
from il_net.data.loader import ImageStream
from il_net.data.robust import UnreadableImages
from il_net.data.shared_records import load_packed, once_per_machine, pack
from il_net.engine.launch import launch

RECORDS = [
    {"file_name": "a.jpg", "width": 4, "height": 3, "annotations": [{"bbox": [0.5, 1, 2, 2.25]}]},
    {"file_name": "b.jpg", "width": 3, "height": 4, "annotations": []},
    {"file_name": "c.jpg", "image_id": "c"},
    {"file_name": "d.jpg", "width": 3, "height": 3},
]


# --- one process ---


def test_what_went_in_comes_out():
    packed = pack(RECORDS)
    assert len(packed) == 4
    assert list(packed) == RECORDS
    assert [packed[i] for i in (2, 0)] == [RECORDS[2], RECORDS[0]]
    assert packed[0] is not packed[0]  # a caller may change what it gets
    assert packed.wide.tolist() == [1, 0, -1, 0]
    for index in (4, -1):
        with pytest.raises(IndexError, match=f"no record {index} of 4"):
            packed[index]


def test_one_process_needs_no_file(monkeypatch):
    def fail(**_: str) -> None:
        raise OSError("no file is needed")

    monkeypatch.setattr(tempfile, "mkstemp", fail)
    (first, none, second), others = load_packed(lambda: ((RECORDS[:3], [], RECORDS[3:]), "others"))
    assert (list(first), list(none), list(second)) == (RECORDS[:3], [], RECORDS[3:])
    assert others == "others"
    assert first.data is second.data
    assert first.wide.tolist() == [1, 0, -1]


# --- what others tell ---


@pytest.fixture
def first_of_three(monkeypatch, tmp_path) -> Path:
    """The temporary folder of a process that believes to be the first of three."""
    monkeypatch.setattr(comm, "get_local_size", lambda: 3)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_others_that_cannot_open_the_file_are_told_apart(first_of_three, monkeypatch):
    answers = {"": ["", "no x", "no y"]}
    monkeypatch.setattr(comm, "all_gather", lambda mine: answers.get(mine, [mine] * 3))
    with pytest.raises(ValueError, match=r"^no x; no y: the processes of a machine .*TMPDIR"):
        load_packed(lambda: ((RECORDS,), None))
    assert list(first_of_three.iterdir()) == []


def test_nothing_is_left_if_another_process_dies(first_of_three, monkeypatch):
    seen = []

    def gather(mine: object) -> list:
        if mine == "":  # all have opened it
            seen.extend(path.name for path in first_of_three.iterdir())
            raise RuntimeError("Connection closed by peer")
        return [mine] * 3

    monkeypatch.setattr(comm, "all_gather", gather)
    with pytest.raises(RuntimeError, match="closed by peer"):
        load_packed(lambda: ((RECORDS,), None))
    assert len(seen) == 1 and seen[0].startswith("records_")
    assert list(first_of_three.iterdir()) == []


# --- two processes ---


def mapped_files() -> list[list[str]]:
    """Device, inode and name of the record files that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(None, 5)[3:] for line in lines if "records_" in line]


def named_files() -> list[str]:
    return [path.name for path in Path(tempfile.gettempdir()).glob("records_*")]


class WhatWorkersMap:
    """A mapper that tells which process reads, and what it has mapped."""

    group = "labeled"

    def __call__(self, record: dict, position: int) -> dict:
        return {"image": record["file_name"], "pid": os.getpid(), "mapped": mapped_files()}


def error_of(load) -> str:
    try:
        load_packed(load)
    except ValueError as error:
        return str(error)
    return "none"


def fail_to_load() -> None:
    raise ValueError("no images")


def fail_to_open(path: str, mode: str) -> None:
    raise FileNotFoundError(f"no such file: {path}")


def share(folder: str) -> None:
    """Load in every process of a job, without and with faults; `<rank>.json` tells what it has."""
    rank, known = comm.get_rank(), {}
    calls = []

    def load() -> tuple:
        calls.append(named_files())
        return (RECORDS, RECORDS[1:]), {"pid": os.getpid()}

    packed, known["others"] = load_packed(load)
    known["names_while_loading"] = calls
    known["records"] = [list(records) for records in packed]
    known["mapped"] = mapped_files()
    known["resource"] = once_per_machine(lambda: f"of rank {rank}")
    stream = ImageStream(
        *(packed[0], WhatWorkersMap()),
        batch_size=2, seed=0, unreadable=UnreadableImages(0), grouped=False,
    )  # fmt: skip
    ((known["worker"],), known["pid"]) = (next(stream.batches(0, 1)), os.getpid())
    known["fault"] = error_of(fail_to_load)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    known["full"] = error_of(lambda: ((RECORDS * 1000,), None))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    if rank == 1:
        shared_records.open = fail_to_open
    known["elsewhere"] = error_of(load)
    comm.synchronize()  # the other one takes the name away
    known["names_at_the_end"] = named_files()
    Path(folder, f"{rank}.json").write_text(json.dumps(known))


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> list[dict]:
    """What each of two processes of one machine has."""
    if torch.cuda.is_available():
        pytest.skip("two processes on the CPU")
    folder = tmp_path_factory.mktemp("shared")
    (folder / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder / "tmp"))
        patch.setenv("OMP_NUM_THREADS", "1")
        launch(share, 2, args=(str(folder),))
    assert list((folder / "tmp").glob("records_*")) == []
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_one_process_loads_and_both_have_the_records(shared):
    for known in shared:
        assert known["records"] == [RECORDS, RECORDS[1:]]
        assert known["resource"] == "of rank 0"
        assert known["others"] == {"pid": shared[0]["pid"]}
    assert shared[0]["pid"] != shared[1]["pid"]


def test_both_map_the_same_memory_and_so_do_their_workers(shared):
    # One file for both lists of records.
    (mapped,) = shared[0]["mapped"]
    for known in shared:
        assert known["mapped"] == [mapped]
        assert known["worker"]["pid"] != known["pid"]
        assert known["worker"]["mapped"] == [mapped]


def test_nothing_is_left_however_the_processes_end(shared):
    """The file has no name any more when the first record is read."""
    assert shared[0]["names_while_loading"] == [[]]
    assert shared[1]["names_while_loading"] == []
    assert shared[0]["mapped"][0][2].endswith("(deleted)")
    assert [known["names_at_the_end"] for known in shared] == [[], []]


def test_faults_are_told_in_both(shared):
    for known in shared:
        assert known["fault"] == "no images"
        for text in ("cannot be written to", "File too large", "TMPDIR"):
            assert text in known["full"]
        assert known["elsewhere"].startswith("no such file: ")
        assert "TMPDIR" in known["elsewhere"]
