"""Reading Label Studio's own JSON: the full export, its older form with "completions", JSON_MIN.

The full export is a list of tasks, each with the data that was shown and annotations with results.
JSON_MIN is a list of flat records, one for each annotation, in which every control is a key.
Thesis 2.5 and 2.6 (both datasets were labelled in Label Studio); facts about the format are from
its documentation and exports.
"""

import json
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

from .records import Account, Choices, LabeledPicture, Region, fractions, quoted

# Kinds of result that have a shape. Other results (choices, text, relations) have none.
_SHAPES = ("polygon", "rectangle")
_OTHER_SHAPES = ("brush", "ellipse", "keypoint", "magicwand", "bitmask", "vector")
# Values that say something about a region whose shape they repeat.
_NO_SHAPE_KEYS = ("choices", "text", "rating", "number", "taxonomy", "datetime", "ranker")
# "labels" is the control of its own beside <Polygon> or <Rectangle>.
_LABEL_KINDS = ("polygonlabels", "rectanglelabels", "labels")
_PERCENT = (100.0, 100.0)
_PICTURE = re.compile(r"^data:image/|\.(jpe?g|png|bmp|webp|tiff?|gif)($|[?#&])", re.IGNORECASE)
_FRACTION = re.compile(r"\.\d+")


class TaskReader:
    """Reads tasks or records one by one; its methods raise ValueError for what is no export.

    Args:
        choices, account: what to take, and where it is told what was not.
    """

    def __init__(self, choices: Choices, account: Account) -> None:
        self._choices = choices
        self._account = account
        self._pictures_of_tasks: set[str] = set()

    def read_task(self, task: Any, where: str) -> list[LabeledPicture]:
        """Everybody's annotations of one task of the full export."""
        _expect(task, dict, where)
        data = _expect(task.get("data"), dict, f"{where}['data']")
        key = next((k for k in ("annotations", "completions") if k in task), "annotations")
        annotations = _expect(task.get(key) or [], list, f"{where}['{key}']")
        references = self._references(data, task.get("file_upload"), where)
        found = []
        for i, annotation in enumerate(annotations):
            here = f"{where}['{key}'][{i}]"
            _expect(annotation, dict, here)
            if annotation.get("was_cancelled") or annotation.get("skipped"):
                self._account.note("annotations that were cancelled, not used")
                continue
            results = _expect(annotation.get("result") or [], list, f"{here}['result']")
            found.append(self._labelled(task.get("id"), references, annotation, results, here, i))
        if not annotations:
            self._account.note("tasks without annotations, left out")
        elif not found:
            self._account.note("tasks whose annotations are all cancelled, left out")
        return found

    def read_record(self, record: Any, where: str, position: int) -> LabeledPicture:
        """One annotation, a record of JSON_MIN."""
        _expect(record, dict, where)
        references = self._references(record, None, where)
        results = []
        for control, items in record.items():
            for item in items if isinstance(items, list) else ():
                if isinstance(item, dict):
                    kind = _kind_of_item(item)
                    results.append({**item, "type": kind, "from_name": control, "value": item})
        task = record.get("id")
        about = {**record, "id": record.get("annotation_id")}
        return self._labelled(task, references, about, results, where, position)

    def _references(self, data: dict, upload: Any, where: str) -> tuple[str, ...]:
        """How the picture is called: the field of the data that names it, then the stored file."""
        key = self._choices.image_key or ("image" if "image" in data else "")
        if not key:
            keys = [k for k, v in data.items() if isinstance(v, str) and _PICTURE.search(v)]
            if len(keys) != 1:
                raise ValueError(
                    f"{where} has {len(keys)} fields that look like pictures {keys}, among "
                    f"{sorted(data)}; name the right one with --image-key"
                )
            key = keys[0]
        if not isinstance(data.get(key), str):
            raise ValueError(
                f"{where}: the picture '{key}' must be a text, found {quoted(data.get(key))}; name "
                "another field with --image-key (tasks of several pictures cannot be converted)"
            )
        return (data[key], upload) if isinstance(upload, str) and upload else (data[key],)

    def _labelled(
        self,
        task: Any,
        references: tuple[str, ...],
        annotation: dict,
        results: list,
        where: str,
        position: int,
    ) -> LabeledPicture:
        about = f"task {quoted(task)}" if task is not None else where
        before = self._account.num_changes
        shapes = self._join(results, where, about)
        regions = [region for shape in shapes if (region := self._region(shape, about))]
        annotation_id = annotation.get("id")
        rank = (
            bool(annotation.get("ground_truth") or annotation.get("honeypot")),
            _seconds(annotation.get("updated_at") or annotation.get("created_at")),
            annotation_id if type(annotation_id) is int else -1,
            position,
        )
        size = next((size for shape in shapes if (size := _original_size(shape))), None)
        lost = self._account.num_changes > before
        return LabeledPicture(task, references, tuple(regions), size, rank, lost)

    def _join(self, results: list, where: str, about: str) -> list[dict]:
        """One record for each shape: results with the same id are geometry and labels of one.

        JSON_MIN has no ids: there the geometry itself, which both repeat, joins them, but only a
        shape without labels to one with.
        """
        shapes: list[dict] = []
        by_key: dict[Any, dict] = {}
        for i, result in enumerate(results):
            _expect(result, dict, f"{where}['result'][{i}]")
            kind, value = result.get("type"), result.get("value")
            if not isinstance(kind, str) or not isinstance(value, dict):
                self._account.note("results that are no shapes (choices, texts, relations)")
                continue
            if kind not in _SHAPES and kind not in _LABEL_KINDS:
                self._skip_kind(kind, about)
                continue
            foreign = kind in _LABEL_KINDS and not self._counts(result)
            labels = [] if foreign else _label_names(value.get(kind))
            key = result["id"] if "id" in result else _geometry_key(value)
            known = by_key.get(key) if isinstance(key, (str, int)) else None
            if known is not None and ("id" in result or not (known["labels"] and labels)):
                known["labels"] += [name for name in labels if name not in known["labels"]]
                known["foreign"] |= foreign
                continue
            shape = {**result, "labels": labels, "foreign": foreign}
            shapes.append(shape)
            if isinstance(key, (str, int)):
                by_key[key] = shape
        return shapes

    def _counts(self, result: dict) -> bool:
        """Whether the labels of this result's control are wanted."""
        controls = self._choices.label_from
        return not controls or result.get("from_name") in controls

    def _skip_kind(self, kind: str, about: str) -> None:
        if kind.removesuffix("labels") in _OTHER_SHAPES:
            self._account.change(
                f"regions of type '{kind}', which have no outline", "left out", about
            )
        else:
            self._account.note("results that are no shapes (choices, texts, relations)")

    def _region(self, shape: dict, about: str) -> Region | None:
        """A shape as a region; None, and told, if it is not to be used."""
        name = f"region {quoted(shape['id'])} of {about}" if "id" in shape else f"region of {about}"
        if shape["foreign"] and not shape["labels"]:
            self._account.note("regions of controls that --label-from does not name, left out")
            return None
        target = shape.get("to_name")
        if isinstance(target, str):
            self._pictures_of_tasks.add(target)
            if len(self._pictures_of_tasks) > 1:
                raise ValueError(
                    f"{name}: the tasks show several pictures {sorted(self._pictures_of_tasks)} at "
                    "a time, and it is not known which field of a task is which"
                )
        if shape.get("image_rotation"):
            self._account.change("regions drawn on a picture turned by hand", "left out", name)
            return None
        value = shape["value"]
        if "points" in value:
            ring = fractions(value["points"], _PERCENT)
            region = Region(name, tuple(shape["labels"]), rings=() if ring is None else (ring,))
            sound = ring is not None
        else:
            sides = [[value.get("x"), value.get("y")], [value.get("width"), value.get("height")]]
            box = fractions(sides, _PERCENT)
            turn = fractions([[value.get("rotation") or 0, 0]], (360.0, 360.0))
            sound = box is not None and turn is not None
            rectangle = (*box.ravel().tolist(), float(turn[0, 0] * 360)) if sound else None
            region = Region(name, tuple(shape["labels"]), rectangle=rectangle)
        if not sound:
            self._account.change("regions without usable coordinates", "left out", name)
            return None
        return region


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(
            f"{where} must be {'an object' if kind is dict else 'a list'}, found {quoted(value)}"
        )
    return value


def _label_names(names: Any) -> list[str]:
    return [n for n in names if isinstance(n, str)] if isinstance(names, list) else []


def _kind_of_item(item: dict) -> str | None:
    """The type of a region of JSON_MIN, which does not say it."""
    if any(key in item for key in _NO_SHAPE_KEYS):
        return None
    for key in item:
        if key == "labels" or key.endswith("labels"):
            return key
    for key, kind in (
        ("points", "polygon"),
        ("radiusX", "ellipse"),
        ("rle", "brush"),
        ("height", "rectangle"),
        ("width", "keypoint"),
    ):
        if key in item:
            return kind
    return None


def _geometry_key(value: dict) -> str:
    geometry = ("points", "x", "y", "width", "height", "rotation")
    return json.dumps([value.get(key) for key in geometry])


def _original_size(shape: dict) -> tuple[float, float] | None:
    size = (shape.get("original_width"), shape.get("original_height"))
    usable = all(type(side) in (int, float) and 0 < side < 1e9 for side in size)
    return size if usable else None


def _seconds(time: Any) -> float:
    """A time of an export, seconds or ISO 8601, as a number; before all others if it is neither."""
    if type(time) in (int, float):
        return float(time) if abs(time) < 1e15 else float("-inf")
    try:
        # Python 3.10 reads fractions of 3 or 6 digits only.
        exact = _FRACTION.sub(lambda match: match[0].ljust(7, "0")[:7], time, count=1)
        parsed = datetime.fromisoformat(exact.replace("Z", "+00:00"))
        if parsed.tzinfo is None:
            parsed = parsed.replace(tzinfo=timezone.utc)
        return parsed.timestamp()
    except (TypeError, ValueError, OverflowError):
        return float("-inf")


def read_tasks(
    records: Iterable[Any], minimal: bool, source: str, choices: Choices, account: Account
) -> list[LabeledPicture]:
    """All annotations that an export has of pictures, cancelled ones left out.

    Args:
        records: tasks of the full export, or records of JSON_MIN (`minimal`).
        source: the file, for messages.

    Raises:
        ValueError: a record that is none; names the file and the position.
    """
    reader = TaskReader(choices, account)
    found: list[LabeledPicture] = []
    for i, record in enumerate(records):
        where = f"{source}: [{i}]"
        if minimal:
            found.append(reader.read_record(record, where, i))
        else:
            found += reader.read_task(record, where)
    return found
