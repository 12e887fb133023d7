"""Checkpoints as files of a run's folder: written whole or not at all, proved, found, thinned out.

A file takes its name only when all of it is on the disk, so whatever stops a run leaves the
checkpoints before it as they were.
"""

import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from .safe_load import load_pth

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"  # Detectron2's: names the file that a run goes on from
_PARTIAL = "checkpoint.partial"
_NUMBERED = re.compile(r"model_(\d{7})\.pth")
FINAL = "model_final.pth"
# What was asked for while a file is being written.
_waiting: list[Callable[[], None]] = []
_is_writing = False


class UnwrittenError(OSError):
    """A file of the run could not be written; the message is meant for the user."""


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file beside ``path``, bring it to the disk, and only then give it its name.

    Args:
        path: a file of that name stays as it is until the new one is whole.
        write: writes the content.

    Raises:
        UnwrittenError: the disk is full, or another reason not to write; nothing partial is left.
    """
    global _is_writing
    _is_writing = True
    try:
        _write(path, write)
    finally:
        _is_writing = False
        while _waiting:
            _waiting.pop(0)()


def when_written(action: Callable[[], None]) -> None:
    """For a signal's handler: do something now, or as soon as the file under way is written."""
    if _is_writing:
        _waiting.append(action)
    else:
        action()


def _write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    partial = path.with_name(_PARTIAL)  # one name: what a killed process leaves is replaced
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # torch reports a failed write as an error of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        free = shutil.disk_usage(path.parent).free
        raise UnwrittenError(
            f"{path} can't be written: {cause.strerror or cause}; {free / 1e6:,.1f} MB are free "
            "there. What was saved before is untouched: make room, then go on with --resume"
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # or a power failure may forget the new name
    finally:
        os.close(descriptor)


def write_state(path: Path, state: dict) -> None:
    """``torch.save`` through ``write_whole``."""
    write_whole(path, lambda file: torch.save(state, file))


def tag_last(path: Path) -> None:
    """Make ``path`` the checkpoint that its folder's run goes on from."""
    write_whole(path.with_name(LAST), lambda file: file.write(path.name.encode()))


def damage(path: Path) -> str:
    """What is wrong with a checkpoint that ``write_state`` wrote; "" if nothing is.

    Reads all of it: torch itself does not compare the check sums that it writes, so that it loads
    a file with a flipped bit without a word.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            return f"{broken} in it is not as it was written"
        load_pth(str(path), mmap=True)
    except FileNotFoundError:
        return "there is no such file"
    # What zipfile makes of a file that is garbled somewhere is not all foreseen.
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def earlier_checkpoints(path: Path) -> list[Path]:
    """The checkpoints of the folder that come before ``path`` in a run, latest first.

    Those with a higher number, of a longer run that was there before, do not count.
    """
    found = []
    for other in path.parent.glob("model_*.pth"):
        if (number := _NUMBERED.fullmatch(other.name)) and int(number[1]) < _iteration(path):
            found.append((other.stat().st_mtime_ns, int(number[1]), other))
    return [other for *_, other in sorted(found, reverse=True)]


def _iteration(path: Path) -> float:
    """The number of the last step that is in a checkpoint; infinity for that of the last of all."""
    number = _NUMBERED.fullmatch(path.name)
    return int(number[1]) if number else float("inf")


def thin_out(path: Path, kept: int) -> None:
    """Delete the numbered checkpoints before ``path``, itself one, but for ``kept`` - 1 of them.

    None is deleted if ``path`` turns out to be damaged.

    Args:
        path: the latest checkpoint.
        kept: how many to keep, at least 2; 0: all.
    """
    if not kept or not _NUMBERED.fullmatch(path.name):
        return
    surplus = earlier_checkpoints(path)[kept - 1 :]
    if surplus and not damage(path):
        for old in surplus:
            old.unlink(missing_ok=True)


def choose_checkpoint(folder: Path, or_start: bool) -> Path | None:
    """The checkpoint that a run in ``folder`` goes on from, after it was found to be whole.

    Args:
        folder: the run's ``OUTPUT_DIR``.
        or_start: whether to take an earlier checkpoint if the last is damaged, or none.

    Returns:
        The file; None without any, where a new run may start.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the last one is damaged, and ``or_start`` is not set or no other one is whole.
    """
    tag = folder / LAST
    named = tag.read_text(errors="replace").strip() if tag.is_file() else ""
    latest = folder / (Path(named).name or FINAL)
    candidates = earlier_checkpoints(latest)
    if named:
        problem = damage(latest)
        if not problem:
            return latest
        problem = f"{latest} is damaged ({problem})"
    else:
        # A run that is stopped before it could name its first checkpoint.
        candidates = [path for path in (latest, *candidates) if path.is_file()]
        problem = f"{tag} is missing or empty"
        if not candidates and or_start:
            return None
        if not candidates:
            raise FileNotFoundError(
                f"--resume: there is no checkpoint in OUTPUT_DIR {folder}. --resume-or-start "
                "starts a new run from MODEL.WEIGHTS where there is none"
            )
    whole = next((path for path in candidates if not damage(path)), None)
    if whole is None:
        raise ValueError(
            f"{problem}, and no earlier checkpoint of the run is whole. To start anew, take "
            f"another OUTPUT_DIR, or delete the damaged files and {LAST}"
        )
    if not or_start:
        raise ValueError(
            f"{problem}. The checkpoint before it, {whole.name}, is whole: --resume-or-start goes "
            "on from that one"
        )
    logger.warning("%s: going on from %s, the checkpoint before it", problem, whole)
    return whole


def set_aside(folder: Path) -> None:
    """Give a run that starts anew a folder without an earlier run's checkpoints and metrics.

    They go to ``earlier-1``, ``earlier-2``, ... below it, with the run's ``config.yaml``: with
    ``--resume`` the new run could otherwise go on from a file of the old one.
    """
    metrics = folder / "metrics.json"
    moved = [path for path in (*folder.glob("model_*.pth"), folder / LAST) if path.is_file()]
    has_metrics = metrics.is_file() and metrics.stat().st_size > 0
    if not moved and not has_metrics:
        return
    number = 1
    while (place := folder / f"earlier-{number}").exists():
        number += 1
    place.mkdir()
    for path in (*moved, folder / "config.yaml"):
        if path.is_file():
            path.rename(place / path.name)
    if has_metrics:
        shutil.copy2(metrics, place)
        os.truncate(metrics, 0)  # the new run's writer has it open, to append
    logger.warning("OUTPUT_DIR holds an earlier run: its files are in %s now", place)
