"""Files of weights: what they may hold is read, what could run code is not."""

import argparse
import collections
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from il_net import safe_load
from il_net.safe_load import add_trust_option, load_pkl, load_pth, trust_checkpoints


@pytest.fixture(autouse=True)
def untrusting():
    yield
    trust_checkpoints(False)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def save_pkl(path: Path, content: object, protocol: int = 4) -> str:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return str(path)


def save_pth(path: Path, content: object, zipped: bool = True) -> str:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return str(path)


# ---- pickles of arrays ----

ARRAYS = {
    "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "whole numbers": np.array([1, 2], dtype=np.int64),
    "text": np.array(["a", "bc"]),
    "empty": np.zeros((0, 3)),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_are_read_as_pickle_reads_them(tmp_path, protocol):
    content = {
        "model": collections.OrderedDict(ARRAYS),
        "scalar": np.float32(1.5),
        "plain": [1, 2.5, "x", b"\xff", None, True, (1,), {1, 2}, frozenset([3]), 1j],
        "bytes": bytearray(b"ab"),
    }
    loaded = load_pkl(save_pkl(tmp_path / "w.pkl", content, protocol))
    assert list(loaded["model"]) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert loaded["model"][name].dtype == array.dtype
        assert np.array_equal(loaded["model"][name], array)
    assert loaded["plain"] == content["plain"]
    assert (loaded["scalar"], loaded["bytes"]) == (1.5, b"ab")


def test_a_pickle_of_python_2_is_read(tmp_path):
    """As Detectron's: text in protocol 2 is bytes, and numpy lies in numpy.core."""
    pickled = pickle.dumps({"w": np.ones(2, np.float32)}, protocol=2)
    old = pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    # "w" as Python 2's str (SHORT_BINSTRING) in place of unicode (BINUNICODE).
    old = old.replace(b"X\x01\x00\x00\x00w", b"U\x01w")
    assert old != pickled
    (tmp_path / "w.pkl").write_bytes(old)
    assert load_pkl(str(tmp_path / "w.pkl"))["w"].tolist() == [1, 1]


HOSTILE = {
    "function": b"cos\nmkdir\n(S'%s'\ntR.",
    "builtin": b"cbuiltins\neval\n(S\"__import__('os').mkdir('%s')\"\ntR.",
    "old builtin": b"c__builtin__\neval\n(S\"__import__('os').mkdir('%s')\"\ntR.",
    # A name with dots walks from an admitted object to others.
    "dotted": b"\x80\x04\x8c\x05numpy\x8c\x08os.mkdir\x93\x8c\x01x\x85R.",
    "instance": b"(S'%s'\nios\nmkdir\n.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_calls_something_is_not_read(tmp_path, kind):
    mark, path = tmp_path / "mark", tmp_path / "w.pkl"
    path.write_bytes(HOSTILE[kind].replace(b"%s", str(mark).encode()))
    with pytest.raises(ValueError, match=r"w\.pkl was not read: it holds .*--trust-checkpoint"):
        load_pkl(str(path))
    assert not mark.exists()


def test_admitted_names_are_not_a_way_to_others(tmp_path):
    """``codecs.encode`` would look up any codec."""
    path = tmp_path / "w.pkl"
    path.write_bytes(b"c_codecs\nencode\n(Vx\nVrot13\ntR.")
    with pytest.raises(ValueError, match="rot13"):
        load_pkl(str(path))


# ---- files of torch ----


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_containers_are_read(tmp_path, zipped):
    content = {"model": {"w": torch.arange(3.0)}, "iteration": 7, "trainer": {"lr": [0.1, None]}}
    loaded = load_pth(save_pth(tmp_path / "w.pth", content, zipped))
    assert loaded["model"]["w"].tolist() == [0, 1, 2]
    assert (loaded["iteration"], loaded["trainer"]) == (7, {"lr": [0.1, None]})


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_calls_something_is_not_read(tmp_path, zipped):
    mark = tmp_path / "mark"
    path = save_pth(tmp_path / "w.pth", {"model": {"w": Payload(mark)}}, zipped)
    with pytest.raises(ValueError, match=r"it holds \w+\.mkdir, and not only .*--trust-checkpoint"):
        load_pth(path)
    assert not mark.exists()


def test_a_whole_model_is_not_read(tmp_path):
    path = save_pth(tmp_path / "w.pth", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"it holds torch\.nn\.modules\.linear\.Linear"):
        load_pth(path)


# ---- files that are broken, and none ----


@pytest.mark.parametrize("load", [load_pth, load_pkl])
def test_files_that_are_cut_off_or_garbled(tmp_path, load):
    path = tmp_path / ("w.pth" if load is load_pth else "w.pkl")
    content = {"model": {"w": np.arange(100.0)}}
    if load is load_pth:
        save_pth(path, {"model": {"w": torch.arange(100.0)}})
    else:
        save_pkl(path, content)
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{path.name} can't be read"):
            load(str(path))
    path.write_bytes(b"\x00these are no weights" * 20)
    with pytest.raises(ValueError, match=f"{path.name} can't be read"):
        load(str(path))
    with pytest.raises(FileNotFoundError):
        load(str(tmp_path / "gone"))


# ---- trust ----


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_trust_option(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("kind", ["pth", "pkl"])
def test_who_trusts_a_file_has_it_read_and_is_told(tmp_path, caplog, kind):
    mark = tmp_path / "mark"
    save, load = (save_pth, load_pth) if kind == "pth" else (save_pkl, load_pkl)
    path = save(tmp_path / f"w.{kind}", {"w": Payload(mark)})
    assert parse("--trust-checkpoint").trust_checkpoint is True
    with caplog.at_level(logging.WARNING, safe_load.__name__):
        load(path)
    assert mark.exists()  # the payload of these tests does work
    assert "--trust-checkpoint" in caplog.text


def test_without_the_option_nothing_is_trusted(tmp_path):
    assert parse().trust_checkpoint is False
    with pytest.raises(ValueError, match="was not read"):
        load_pkl(save_pkl(tmp_path / "w.pkl", Payload(tmp_path / "mark")))


def test_the_help_says_what_it_risks(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "can run any program as you" in text
