"""The three kinds of dataset that `DATASETS.REGISTER` knows: where the files are, how they load.

Opening a source checks that its files exist and reads its class names; `load` reads the rest, as
Detectron2's dataset dicts.
"""

import functools
import glob
import math
import os
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from detectron2.data.datasets import load_coco_json, load_voc_instances

from .class_lists import ClassNames, contiguous_ids
from .coco_file import read_coco_json

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_NUM_NAMED = 5


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
        categories = _read_categories(json_file, stat.st_mtime_ns, stat.st_size)
        names = tuple(name for _, name in categories)
        _check_declared(key, names, classes, json_file)
        return cls(json_file, image_root, categories, classes or names)

    def load(self, model: ClassNames) -> list[dict[str, Any]]:
        """Read the whole file; raises ValueError for a category id that it does not define."""
        to_contiguous = contiguous_ids(self.categories, model)
        # Without a name Detectron2 keeps the file's category ids and leaves the metadata alone.
        records = load_coco_json(self.json_file, self.image_root, dataset_name=None)
        own = {category_id for category_id, _ in self.categories}
        for record in records:
            for annotation in record["annotations"]:
                category_id = annotation["category_id"]
                if category_id not in own:
                    raise ValueError(
                        f"{self.json_file}: an annotation of image {record['image_id']} has "
                        f"category_id {category_id}, known are {sorted(own)}"
                    )
                annotation["category_id"] = to_contiguous[category_id]
        return records

    def metadata(self, model: ClassNames) -> dict[str, Any]:
        return {
            "thing_classes": list(model),
            "thing_dataset_id_to_contiguous_id": contiguous_ids(self.categories, model),
            "json_file": self.json_file,
            "image_root": self.image_root,
            "evaluator_type": "coco",
        }


@dataclass(frozen=True)
class VocSource:
    """A Pascal VOC folder: Annotations/*.xml, ImageSets/Main/<split>.txt, JPEGImages/*.jpg."""

    root: str
    split: str
    image_ids: tuple[str, ...]
    class_names: ClassNames

    @classmethod
    def open(
        cls, key: str, root: str, split: str, classes: ClassNames | None = None
    ) -> "VocSource":
        """Find the files of the split and read the class names from its xml files, sorted.

        Raises:
            FileNotFoundError: a folder, the list of the split, or xml or jpg files of it.
            ValueError: an unusable list, an xml file without what Detectron2 reads from it, or
                class names that `classes` lacks.
        """
        found = find_path(root, f"{key}.root", os.path.isdir, "folder")
        image_ids = _read_split(_voc_part(found, key, "ImageSets", "Main", f"{split}.txt"))
        annotations = _voc_part(found, key, "Annotations")
        _check_listed(annotations, image_ids, ".xml", key)
        _check_listed(_voc_part(found, key, "JPEGImages"), image_ids, ".jpg", key)
        names: set[str] = set()
        for image_id in image_ids:
            names |= _read_voc_names(os.path.join(annotations, f"{image_id}.xml"))
        class_names = tuple(sorted(names))
        _check_declared(key, class_names, classes, annotations)
        return cls(found, split, image_ids, classes or class_names)

    def load(self, model: ClassNames) -> list[dict[str, Any]]:
        """Read the xml files through Detectron2, which maps by name itself."""
        if len(self.image_ids) > 1:
            records = load_voc_instances(self.root, self.split, list(model))
        else:
            # Detectron2 cannot read a list of one image; an absolute split replaces its folder.
            with tempfile.TemporaryDirectory() as folder:
                split = os.path.join(folder, "split")
                with open(f"{split}.txt", "w", encoding="utf-8") as f:
                    f.write(f"{self.image_ids[0]}\n" * 2)
                records = load_voc_instances(self.root, split, list(model))[:1]
        for record in records:  # numpy's strings would end up in json files and messages
            record["image_id"] = str(record["image_id"])
            record["file_name"] = str(record["file_name"])
        return records

    def metadata(self, model: ClassNames) -> dict[str, Any]:
        # Without json_file Detectron2's COCOEvaluator converts the dataset by itself.
        return {
            "thing_classes": list(model),
            "thing_dataset_id_to_contiguous_id": contiguous_ids((), model),
            "dirname": self.root,
            "split": self.split,
            "year": 2012,  # for PascalVOCDetectionEvaluator: AP as area under the curve
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


def _check_declared(key: str, found: ClassNames, classes: ClassNames | None, where: str) -> None:
    """Every class of the files must be in the entry's `classes`, if it has one."""
    unknown = [] if classes is None else [name for name in found if name not in classes]
    if unknown:
        raise ValueError(
            f"{key}.classes lacks {unknown}, which {where} has. classes: {list(classes or ())}; "
            f"in the data: {list(found)}. Add the names, or remove them from the data"
        )


def _voc_part(root: str, key: str, *parts: str) -> str:
    path = os.path.join(root, *parts)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{key}.root: a VOC folder has {'/'.join(parts)}, but there is no "
            f"{os.path.abspath(path)}"
        )
    return path


def _read_split(path: str) -> tuple[str, ...]:
    with open(path, encoding="utf-8") as f:
        image_ids = tuple(line.strip() for line in f if line.strip())
    if not image_ids:
        raise ValueError(f"{path}: the list of images is empty")
    for image_id in image_ids:
        # Detectron2 reads the list with numpy.loadtxt, to which these mean columns and comments.
        if len(image_id.split()) > 1 or "#" in image_id:
            raise ValueError(
                f"{path}: expected one image name a line, without ending, spaces or '#'; got "
                f"'{image_id}'"
            )
    twice = [i for i, count in Counter(image_ids).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: {len(twice)} images are listed twice: {twice[:_NUM_NAMED]}")
    return image_ids


def _check_listed(folder: str, image_ids: tuple[str, ...], ending: str, key: str) -> None:
    present = set(os.listdir(folder))
    missing = [f"{i}{ending}" for i in image_ids if f"{i}{ending}" not in present]
    if missing:
        raise FileNotFoundError(
            f"{key}.root: {len(missing)} of {len(image_ids)} files of the split are missing from "
            f"{folder}: {missing[:_NUM_NAMED]}"
        )


def _read_voc_names(path: str) -> set[str]:
    """Class names of one xml file, after a check of what Detectron2 will read from it."""
    try:
        tree = ET.parse(path)
    except ET.ParseError as e:
        raise ValueError(f"{path} is not XML: {e}") from e
    for field in ("width", "height"):
        if not (tree.findtext(f"size/{field}") or "").strip().isdigit():
            raise ValueError(f"{path}: size/{field} must be a whole number of pixels")
    names = set()
    for i, obj in enumerate(tree.findall("object")):
        name = obj.findtext("name")
        try:
            corners = [float(obj.findtext(f"bndbox/{c}") or "") for c in _CORNERS]
        except ValueError:
            corners = [math.nan]
        if not name or not all(map(math.isfinite, corners)):
            raise ValueError(
                f"{path}: object {i} ('{name}') needs a name and bndbox/{{{','.join(_CORNERS)}}} "
                "as numbers"
            )
        names.add(name)
    return names
