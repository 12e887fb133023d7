"""Reading files of weights without running what is in them.

Python's pickles, of which ``.pth`` and ``.pkl`` files are made, can name any function and have it
called when they are read. Here they may hold tensors, arrays, numbers, text and plain containers.
"""

import argparse
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

TRUST_OPTION = "--trust-checkpoint"
RISK = (
    "read weights that hold more than tensors and plain containers; such a file can run any "
    "program as you while it is read, so use this for files of people you trust only"
)
_trusted = False


def trust_checkpoints(trusted: bool = True) -> None:
    """Let this process read files that may run code, or no more."""
    global _trusted
    _trusted = trusted


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-checkpoint``, which takes effect in this process as soon as it is parsed."""
    parser.add_argument(TRUST_OPTION, action=_Trust, nargs=0, default=False, help=RISK)


class _Trust(argparse.Action):
    def __call__(self, parser: object, args: argparse.Namespace, *_: object) -> None:
        args.trust_checkpoint = True
        trust_checkpoints()


def load_pth(path: str, mmap: bool = False) -> Any:
    """What ``torch.save`` wrote, on the CPU.

    Args:
        path: a file.
        mmap: leave tensors on the disk until they are used.

    Raises:
        ValueError: the file can't be read, or holds objects that could run code.
    """
    return _read(path, lambda: _torch_load(path, mmap))


def _torch_load(path: str, mmap: bool) -> Any:
    return torch.load(path, map_location="cpu", mmap=mmap, weights_only=not _trusted)


def load_pkl(path: str) -> Any:
    """A pickle of Detectron2's or Detectron's model zoo: containers of arrays.

    Raises:
        ValueError: the file can't be read, or holds objects that could run code.
    """

    def load() -> Any:
        with open(path, "rb") as file:
            reader = pickle.Unpickler if _trusted else _ArrayUnpickler
            return reader(file, encoding="latin1").load()

    return _read(path, load)


def _read(path: str, load: Callable[[], Any]) -> Any:
    try:
        content = load()
    except OSError:
        raise
    # A pickle that is cut off or garbled raises whatever its pieces come to.
    except Exception as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} was not read: it holds {found[1]}, and not only tensors, arrays and "
                f"plain containers. {TRUST_OPTION} would {RISK}"
            ) from error
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{path} can't be read: {type(error).__name__}: {reason}") from error
    if _trusted:
        logger.warning("%s was read with %s: code in it would have run", path, TRUST_OPTION)
    return content


def _latin1(text: str, encoding: str) -> bytes:
    """``codecs.encode`` as old pickles call it to write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {encoding}, expected latin1")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Knows numpy's arrays and scalars and plain containers, and calls nothing else."""

    _MULTIARRAY = {
        "_reconstruct": np.zeros(0).__reduce__()[0],
        "scalar": np.float64(0).__reduce__()[0],
    }
    _NUMERIC = {"_frombuffer": np.zeros(1).__reduce_ex__(5)[0]}
    _BUILTINS = {t.__name__: t for t in (bytearray, bytes, complex, frozenset, set)}
    _ADMITTED = {
        "numpy": {"dtype": np.dtype, "ndarray": np.ndarray},
        "numpy.core.multiarray": _MULTIARRAY,
        "numpy._core.multiarray": _MULTIARRAY,  # numpy 2 moved them
        "numpy.core.numeric": _NUMERIC,
        "numpy._core.numeric": _NUMERIC,
        "collections": {"OrderedDict": OrderedDict},
        "_codecs": {"encode": _latin1},
        "builtins": _BUILTINS,
        "__builtin__": _BUILTINS,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Runs for every name in the pickle; pickles may not import by themselves."""
        try:
            return self._ADMITTED[module][name]
        except KeyError:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not admitted") from None
