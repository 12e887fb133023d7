"""The three kinds of dataset that `DATASETS.REGISTER` knows: where the files are, how they load.

Opening a source checks that its files exist and reads its class names; `load` reads the rest, as
Detectron2's dataset dicts.
"""

import functools
import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from .class_lists import ClassNames, contiguous_ids
from .coco_file import read_coco_json, take_coco_json
from .coco_records import coco_records
from .shared_records import once_per_machine

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Source(Protocol):
    """A dataset of `DATASETS.REGISTER`; `class_names` is None where there are no labels."""

    @property
    def class_names(self) -> ClassNames | None: ...

    def load(self, model: ClassNames) -> list[dict[str, Any]]:
        """Detectron2's dataset dicts, with the category ids of the list `model`."""
        ...

    def metadata(self, model: ClassNames) -> dict[str, Any]:
        """Fields for Detectron2's MetadataCatalog, for a model with the classes `model`."""
        ...


@dataclass(frozen=True)
class CocoSource:
    """A COCO json and its image folder; `categories` are (id, name) sorted by id."""

    json_file: str
    image_root: str
    categories: tuple[tuple[int, str], ...]
    class_names: ClassNames

    @classmethod
    def open(
        cls, key: str, json: str, images: str, classes: ClassNames | None = None
    ) -> "CocoSource":
        """Find the files and read the categories; `classes` replaces their order.

        Raises:
            FileNotFoundError: names `key`, the path as configured and where it was looked for.
            ValueError: unusable `categories`, or names that `classes` lacks.
        """
        json_file = find_path(json, f"{key}.json", os.path.isfile, "file")
        image_root = find_path(images, f"{key}.images", os.path.isdir, "folder")
        stat = os.stat(json_file)
        read = functools.partial(_read_categories, json_file, stat.st_mtime_ns, stat.st_size)
        categories = once_per_machine(read)
        names = tuple(name for _, name in categories)
        check_declared(key, names, classes, json_file)
        return cls(json_file, image_root, categories, classes or names)

    def load(self, model: ClassNames) -> list[dict[str, Any]]:
        """Read the whole file; raises ValueError for a category id that it does not define."""
        data = take_coco_json(self.json_file)
        all_ids = contiguous_ids(self.categories, model)  # also for classes that the file lacks
        own = {category_id: all_ids[category_id] for category_id, _ in self.categories}
        return coco_records(data, self.json_file, self.image_root, own)

    def metadata(self, model: ClassNames) -> dict[str, Any]:
        return {
            "thing_classes": list(model),
            "thing_dataset_id_to_contiguous_id": contiguous_ids(self.categories, model),
            "json_file": self.json_file,
            "image_root": self.image_root,
            "evaluator_type": "coco",
        }


@dataclass(frozen=True)
class ImagesSource:
    """Pictures without labels: a folder with all below it, or a glob. Sizes are not read.

    Files and folders whose name starts with a dot are left out. `image_id` is the path relative to
    the folder (of a glob: to its part before the first wildcard), so that adding pictures later
    changes no id.
    """

    path: str
    class_names: None = None

    @classmethod
    def open(cls, key: str, images: str) -> "ImagesSource":
        """Find the folder, or match the glob, and see that there is a picture.

        Raises:
            FileNotFoundError: no such folder, or no picture there.
        """
        path = resolve_path(images)
        if not glob.has_magic(path):
            path = find_path(images, f"{key}.images", os.path.isdir, "folder (or glob)")
        source = cls(path)
        if next(source._walk(), None) is None:
            raise FileNotFoundError(
                f"{key}.images: no picture ({', '.join(PICTURE_ENDINGS)}) for '{images}', looked "
                f"for in {os.path.abspath(path)}"
            )
        return source

    def load(self, model: ClassNames = ()) -> list[dict[str, Any]]:
        """`file_name` and `image_id` of every picture, sorted by path."""
        root = self._root()
        ids = {os.path.relpath(p, root).replace(os.sep, "/"): p for p in self._walk()}
        return [{"file_name": ids[i], "image_id": i} for i in sorted(ids)]

    def metadata(self, model: ClassNames = ()) -> dict[str, Any]:
        return {"image_root": self._root()}

    def _root(self) -> str:
        if os.path.isdir(self.path):
            return self.path
        folder = self.path
        while glob.has_magic(folder):
            folder = os.path.dirname(folder)
        return folder or "."

    def _walk(self) -> Iterator[str]:
        if not os.path.isdir(self.path):
            for path in glob.iglob(self.path, recursive=True):
                if _is_picture(path) and os.path.isfile(path):
                    yield path
            return
        for folder, subfolders, files in os.walk(self.path):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            yield from (os.path.join(folder, name) for name in files if _is_picture(name))


def resolve_path(path: str) -> str:
    """Where a configured path points to.

    `~` is expanded. Absolute paths, and those that start with `./` or `../`, are taken as they
    are; others are under Detectron2's dataset root, `DETECTRON2_DATASETS` (default `datasets`).
    """
    path = os.path.expanduser(path)
    if os.path.isabs(path) or path.split("/", 1)[0] in (".", ".."):
        return path
    return os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), path)


def _is_picture(path: str) -> bool:
    name = os.path.basename(path)
    # macOS leaves files such as ._leaf.jpg that are no pictures.
    return name.lower().endswith(PICTURE_ENDINGS) and not name.startswith(".")


def find_path(path: str, key: str, exists: Callable[[str], bool], what: str) -> str:
    """Where a configured path points to, after `exists` has said that there is such a `what`.

    Raises:
        FileNotFoundError: names `key`, the path as configured and where it was looked for.
    """
    found = resolve_path(path)
    if not exists(found):
        raise FileNotFoundError(
            f"{key}: there is no {what} '{path}', looked for in {os.path.abspath(found)}. Paths "
            "that do not start with /, ~ or ./ are under the environment variable "
            "DETECTRON2_DATASETS (default: datasets)"
        )
    return found


@functools.lru_cache(maxsize=64)
def _read_categories(json_file: str, mtime_ns: int, size: int) -> tuple[tuple[int, str], ...]:
    """(id, name) sorted by id; time and size are in the key so that a changed file is read again.

    Only the categories stay in memory. A file without annotations may do without them.
    """
    data = read_coco_json(json_file)
    records = data.get("categories")
    if not records and not data.get("annotations"):
        return ()
    if not isinstance(records, list) or not records:
        raise ValueError(f"{json_file}: 'categories' must be a list with at least one category")
    categories = []
    for i, record in enumerate(records):
        fields = record if isinstance(record, dict) else {}
        if type(fields.get("id")) is not int or not isinstance(fields.get("name"), str):
            raise ValueError(
                f"{json_file}: categories[{i}] needs an integer 'id' and a 'name', got {record!r}"
            )
        categories.append((fields["id"], fields["name"]))
    ids, names = zip(*categories, strict=True)
    for field, values in (("id", ids), ("name", names)):
        twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
        if twice:
            raise ValueError(f"{json_file}: category {field}s used twice: {twice}")
    return tuple(sorted(categories))


def check_declared(key: str, found: ClassNames, classes: ClassNames | None, where: str) -> None:
    """Every class of the files must be in the entry's `classes`, if it has one."""
    unknown = [] if classes is None else [name for name in found if name not in classes]
    if unknown:
        raise ValueError(
            f"{key}.classes lacks {unknown}, which {where} has. classes: {list(classes or ())}; "
            f"in the data: {list(found)}. Add the names, or remove them from the data"
        )
