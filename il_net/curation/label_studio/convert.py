"""From an export of Label Studio, of any of three kinds, to the content of a clean COCO file."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...data.coco_file import read_json
from ...data.report import Severity
from .build import build_records
from .coco_export import read_categories, read_coco_export
from .images import ImageFolder
from .records import Account, Choices, LabeledPicture, quoted
from .tasks import read_tasks

_NUM_NAMED = 5


@dataclass(frozen=True)
class Conversion:
    """A clean COCO file, the kind of export it is from, and what was mended or dropped."""

    coco: dict[str, Any]
    kind: str
    account: Account


def convert(export: str | Path, image_root: str | Path, choices: Choices) -> Conversion:
    """Read an export and make a COCO file of it; the same input gives the same content.

    Args:
        export: Label Studio's JSON, JSON_MIN or COCO export.
        image_root: the folder of the pictures.
        choices: what to take, and how classes are numbered.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a malformed export, a label that the table lacks, or nothing left to convert.
    """
    data, kind = read_export(export)
    source = Path(export).name
    folder = ImageFolder(image_root)
    account = Account()
    own_table = None
    if kind == "COCO":
        if choices.label_from or choices.image_key:
            raise ValueError("--label-from and --image-key are of JSON, this is a COCO export")
        labelled, own_table = read_coco_export(data, source, account)
    else:
        labelled = read_tasks(data, kind == "JSON_MIN", source, choices, account)
    if not labelled:
        raise ValueError(f"{export}: no task has an annotation that is not cancelled")
    pictures = _choose(_by_file(labelled, folder, account), choices, account)
    if not pictures:
        raise ValueError(
            f"none of the {len(labelled)} pictures of {export} is in {image_root}, for example "
            f"{quoted(labelled[0].references[0])}; give their folder with --images"
        )
    table = _class_table(pictures, own_table, choices)
    images, annotations = build_records(pictures, table, folder, choices, account)
    if not images:
        found = "; ".join(str(problem) for problem in account.problems(Severity.WARNING))
        raise ValueError(f"no picture of {export} is left: {found}")
    categories = [{"id": i, "name": name} for name, i in table.items()]
    coco = {
        "info": {"description": f"converted from Label Studio's {kind} export {source}"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": sorted(categories, key=lambda category: category["id"]),
    }
    return Conversion(coco, kind, account)


def read_export(path: str | Path) -> tuple[Any, str]:
    """Parse an export and tell its kind: "JSON", "JSON_MIN" or "COCO".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or none of the three kinds.
    """
    data = read_json(path, mark_allowed=True)
    if isinstance(data, dict) and "data" in data:
        data = [data]  # the file of one task, as Label Studio's storages hold it
    if isinstance(data, dict) and "images" in data:
        return data, "COCO"
    if not isinstance(data, list) or not data:
        raise ValueError(
            f"{path} is no export of Label Studio: a list of tasks (JSON, JSON_MIN), or an object "
            f"with 'images', 'annotations' and 'categories' (COCO); found {quoted(data)}"
        )
    keys = {key for record in data if isinstance(record, dict) for key in record}
    full = keys & {"data", "annotations", "completions"}
    return data, "JSON" if full else "JSON_MIN"


def read_table(path: str | Path) -> dict[str, int]:
    """Class ids by name from a JSON of {"name": id}, or from COCO's categories.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, or an id is there twice.
    """
    data = read_json(path, mark_allowed=True)
    if isinstance(data, dict) and isinstance(data.get("categories"), list):
        data = data["categories"]
    if isinstance(data, dict):
        data = [{"id": category_id, "name": name} for name, category_id in data.items()]
    if not isinstance(data, list) or not data:
        raise ValueError(f'{path} must be {{"name": id, ...}} or a list of COCO\'s categories')
    return read_categories(data, str(path))


def _by_file(
    labelled: Sequence[LabeledPicture], folder: ImageFolder, account: Account
) -> dict[str, list[LabeledPicture]]:
    """All annotations of each picture's file, in the order of the tasks."""
    groups: dict[str, list[LabeledPicture]] = defaultdict(list)
    files: dict[tuple[str, ...], str | None] = {}
    for item in sorted(labelled, key=_task_order):
        if item.references not in files:
            files[item.references] = None
            try:
                files[item.references], rule = folder.find(item.references)
                account.note(f"pictures found {rule}")
            except ValueError as error:
                case = f"{quoted(item.references[0])} {error}"
                account.change("pictures without a usable file", "left out", case)
        file_name = files[item.references]
        if file_name is not None:
            groups[file_name].append(item)
    return groups


def _task_order(item: LabeledPicture) -> tuple:
    """Numbers first; the order of the file where tasks have no id."""
    is_number = type(item.task) is int
    return (not is_number, item.task if is_number else 0, str(item.task))


def _choose(
    groups: dict[str, list[LabeledPicture]], choices: Choices, account: Account
) -> dict[str, list[LabeledPicture]]:
    """Of several annotations of one picture the best, or all."""
    every = choices.annotations == "all"
    used = "their regions are put together" if every else "the best is used"
    for file_name, items in groups.items():
        best = max(items, key=lambda item: item.rank)
        is_empty = not (best.regions or best.lost)
        if not every and is_empty and any(item.regions for item in items):
            kind = "pictures whose best annotation has no regions, though another one has"
            account.change(kind, "the empty one is used", quoted(file_name))
        tasks = {str(item.task) for item in items}
        if len(tasks) > 1 or (len(items) > 1 and items[0].task is None):
            kind = "pictures that are in the export more than once"
            account.change(kind, used, quoted(file_name))
        elif len(items) > 1:
            account.note(f"pictures with several annotations: {used}")
    if every:
        return groups
    # The picture keeps its first task, whose id its image gets.
    return {
        name: [replace(max(items, key=lambda item: item.rank), task=items[0].task)]
        for name, items in groups.items()
    }


def _class_table(
    pictures: dict[str, list[LabeledPicture]], own_table: dict[str, int] | None, choices: Choices
) -> dict[str, int]:
    """Class ids by name: given, of the export itself, or alphabetical.

    Raises:
        ValueError: the table lacks labels, or there are none.
    """
    labels = {
        label
        for items in pictures.values()
        for item in items
        for region in item.regions
        for label in choices.labels_of(region)
    }
    for label in labels:
        try:
            label.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the label {quoted(label)} holds half a character") from error
    if choices.table is not None:
        unknown = sorted(labels.difference(choices.table))
        if unknown:
            raise ValueError(
                f"--categories lacks {len(unknown)} labels of the export: {unknown[:_NUM_NAMED]}; "
                "add them, or name them with --ignore-labels"
            )
        return dict(choices.table)
    own = {n: i for n, i in (own_table or {}).items() if n not in choices.ignore_labels}
    if own and choices.first_id is None:
        return own
    first = choices.first_id
    names = sorted(labels.union(own))
    if not names:
        raise ValueError("no region has a label that is wanted, so there are no classes")
    return {name: i for i, name in enumerate(names, start=1 if first is None else first)}
