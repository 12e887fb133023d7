"""Reading and writing COCO files as they are: one JSON object with lists of records."""

import json
from pathlib import Path
from typing import Any, TextIO

LISTS = ("images", "annotations", "categories")


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
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError as error:
        raise ValueError(f"{json_file} is nested too deeply to be of use here") from error
    except ValueError as error:  # of JSON, of UTF-8, of a number of thousands of digits
        raise ValueError(f"{json_file} is not JSON: {error}") from error


def read_coco_json(json_file: str | Path) -> dict[str, Any]:
    """Parse a COCO file and check that it is a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `read_json`, or the top level is not an object; names the file.
    """
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
