"""Reading and writing COCO files as they are: one JSON object with lists of records."""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

LISTS = ("images", "annotations", "categories")
# Path, time and size of a file: a changed one is read again.
_Stamp = tuple[str, int, int]
# The files that were parsed inside `parsed_once`; None outside of it.
_parsed: dict[_Stamp, dict[str, Any]] | None = None


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, a COCO file is parsed once, however often it is read; at the end all are let go.

    For a start that reads a file for its categories, its faults and its records. Those who read it
    share what they get and must not change it, but for the one who takes it (`take_coco_json`).
    """
    global _parsed
    before, _parsed = _parsed, {}
    try:
        yield
    finally:
        _parsed = before


@contextmanager
def paused_gc() -> Iterator[None]:
    """Without Python's search for cycles, which doubles the time of building millions of lists."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(json_file: str | Path, *, mark_allowed: bool = False) -> Any:
    """Parse a JSON file in UTF-8.

    Args:
        json_file: the file.
        mark_allowed: whether it may begin with a byte order mark. A COCO file may not, because
            pycocotools could not read it afterwards.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or nothing that Python can hold; names the file.
    """
    if not Path(json_file).is_file():
        raise FileNotFoundError(f"there is no file {json_file}")
    try:
        text = Path(json_file).read_text(encoding="utf-8")
        if text.startswith("\ufeff") and not mark_allowed:
            raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
        with paused_gc():
            data = json.loads(text.removeprefix("\ufeff"))
        if "\\ud" in text.lower():  # half a character, perhaps: no file or terminal takes it
            _check_characters(data)
        return data
    except RecursionError as error:
        raise ValueError(f"{json_file} is nested too deeply to be of use here") from error
    except ValueError as error:  # of JSON, of UTF-8, of a number of thousands of digits
        raise ValueError(f"{json_file} is not JSON: {error}") from error


def _check_characters(data: Any) -> None:
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"it has half a character: {error}") from error


def read_coco_json(json_file: str | Path) -> dict[str, Any]:
    """Parse a COCO file and check that it is a JSON object; see also `parsed_once`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `read_json`, or the top level is not an object; names the file.
    """
    if _parsed is None or not os.path.isfile(json_file):
        return _parse_coco_json(json_file)
    stamp = _stamp(json_file)
    if stamp not in _parsed:
        _parsed[stamp] = _parse_coco_json(json_file)
    return _parsed[stamp]


def take_coco_json(json_file: str | Path) -> dict[str, Any]:
    """As `read_coco_json`, for the last reader: `parsed_once` lets go of the file."""
    data = read_coco_json(json_file)
    if _parsed is not None:
        _parsed.pop(_stamp(json_file), None)
    return data


def _stamp(json_file: str | Path) -> _Stamp:
    stat = os.stat(json_file)
    return os.path.abspath(json_file), stat.st_mtime_ns, stat.st_size


def _parse_coco_json(json_file: str | Path) -> dict[str, Any]:
    data = read_json(json_file)
    kind = type(data).__name__
    if kind != "dict":
        raise ValueError(
            f"{json_file} holds a JSON {kind}; a COCO file is an object with the lists "
            f"{', '.join(LISTS)}"
        )
    return data


def read_coco(json_file: str | Path) -> dict[str, Any]:
    """A COCO file whose three lists are there; their records are not checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `read_coco_json`, or a list is missing or is none.
    """
    data = read_coco_json(json_file)
    check_lists(data, str(json_file))
    return data


def check_lists(data: dict[str, Any], source: str) -> None:
    """Check that the three lists of a COCO file are there.

    Args:
        data: the file.
        source: where it is from, for the message.

    Raises:
        ValueError: a list is missing or is none.
    """
    for key in LISTS:
        if not isinstance(data.get(key), list):
            raise ValueError(f"{source}: a COCO file has a list '{key}'")


def write_coco(json_file: str | Path, data: dict[str, Any]) -> None:
    """Write a COCO file, in the order of `data`; an old file stays whole until the new one is.

    Raises:
        ValueError: what JSON in UTF-8 does not have (NaN, infinity, half a character); names the
            record.
    """
    path = Path(json_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for number, (key, value) in enumerate(data.items()):
                file.write(", " if number else "{")
                _write_entry(file, key, value)
            file.write("}\n" if data else "{}\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_entry(file: TextIO, key: str, value: Any) -> None:
    """`"key": value`; a list record by record, because the text of all takes gigabytes."""
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    place = key
    try:
        file.write(f"{encode(key)}: ")
        if not isinstance(value, list):
            file.write(encode(value))
            return
        file.write("[")
        for position, record in enumerate(value):
            place = f"{key}[{position}]"
            file.write((", " if position else "") + encode(record))
        file.write("]")
    except ValueError as error:
        raise ValueError(f"{place!r} can't be written: {error}") from error
