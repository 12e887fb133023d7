"""Reading and writing COCO files as they are: one JSON object with lists of records."""

import json
from pathlib import Path
from typing import Any

LISTS = ("images", "annotations", "categories")


def read_coco_json(json_file: str | Path) -> dict[str, Any]:
    """Parse a COCO file and check that it is a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, or its top level is not an object; names the file.
    """
    try:
        # UTF-8 without a byte order mark, which is all that pycocotools can read afterwards.
        with open(json_file, encoding="utf-8") as f:
            data = json.load(f)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{json_file} is not JSON: {e}") from e
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
    if not Path(json_file).is_file():
        raise FileNotFoundError(f"there is no file {json_file}")
    data = read_coco_json(json_file)
    for key in LISTS:
        if not isinstance(data.get(key), list):
            raise ValueError(f"{json_file}: a COCO file has a list '{key}'")
    return data


def write_coco(json_file: str | Path, data: dict[str, Any]) -> None:
    """Write a COCO file, in the order of `data`; an old file stays whole until the new one is.

    Raises:
        ValueError: a number that JSON does not have (NaN, infinity).
    """
    path = Path(json_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for number, (key, value) in enumerate(data.items()):
            file.write(f"{', ' if number else '{'}{encode(key)}: ")
            if isinstance(value, list):  # record by record: the text of all takes gigabytes
                file.write("[")
                for position, record in enumerate(value):
                    file.write((", " if position else "") + encode(record))
                file.write("]")
            else:
                file.write(encode(value))
        file.write("}\n" if data else "{}\n")
    partial.replace(path)
