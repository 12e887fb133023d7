"""LDD and ASND, the thesis' own datasets: their classes with category ids, and where files lie.

Thesis sections 2.5 (LDD, Table 2.27) and 2.6 (ASND, Table 2.32). The names in `BUILTIN` can be used
in `DATASETS.TRAIN`, `TEST` and `UNLABELED` without an entry in `DATASETS.REGISTER`; an entry with
such a name says that the files are elsewhere.

The thesis' totals contradict each other, so no count is checked. LDD: 881 + 212 = 1,093 images, but
1,092 in all; 14,721 + 3,234 = 17,955 annotations, but 17,706. ASND: Table 2.32 has 2,855 Pants; its
total and Table 2.33 need 1,855.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .class_lists import ClassNames
from .sources import CocoSource, resolve_path

_NUM_NAMED = 12


@dataclass(frozen=True)
class Category:
    """A row of a dataset's table.

    Attributes:
        id: in the json files.
        name: the class name.
        kind: "container" or "disease", which lies inside a container of its plant part; or "".
        plant_part: "leaf", "grape" or "".
    """

    id: int
    name: str
    kind: str = ""
    plant_part: str = ""


@dataclass(frozen=True)
class Collection:
    """A dataset of the thesis, with a training and a validation file.

    Attributes:
        title: the thesis' name.
        table: where the thesis lists the classes.
        categories: sorted by id, which is the order of the model's classes.
        published: path in the folder -> what the authors call it, where that is known.
    """

    title: str
    table: str
    categories: tuple[Category, ...]
    published: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The folder's name under DETECTRON2_DATASETS."""
        return self.title.lower()


# Missing ids belong to labels of the labelling project that the thesis left out: 0, 5, 8, 11,
# and 14 and 15 at the end.
LDD = Collection(
    "LDD",
    "Table 2.27",
    (
        Category(1, "black_rot_foglia", "disease", "leaf"),
        Category(2, "black_rot_grappolo", "disease", "grape"),
        Category(3, "botrite_foglia", "disease", "leaf"),
        Category(4, "botrite_grappolo", "disease", "grape"),
        Category(6, "foglia_vite", "container", "leaf"),
        Category(7, "grappolo_vite", "container", "grape"),
        Category(9, "oidio_foglia", "disease", "leaf"),
        Category(10, "oidio_grappolo", "disease", "grape"),
        Category(12, "peronospora_foglia", "disease", "leaf"),
        Category(13, "peronospora_grappolo", "disease", "grape"),
    ),
    {
        "annotations/instances_train.json": "train_17122021.json",
        "annotations/instances_val.json": "validation_17122021.json",
        "images": "images_10-10-21",
    },
)
# Spelling as in the labelling project. What the thesis prints as a minus sign in "T-Shirt" is a
# hyphen: the ids are in the order of the letters, and a minus sign comes after all of them.
ASND = Collection(
    "ASND",
    "Table 2.32",
    (
        Category(0, "Bras"),
        Category(1, "Jackets"),
        Category(2, "Pants"),
        Category(3, "Shoes"),
        Category(4, "Shorts"),
        Category(5, "Skirt/Dresses"),
        Category(6, "Sweatshirts(LONG SLEEVES)"),
        Category(7, "T-Shirt(SHORT SLEEVES)"),
        Category(8, "Tanks(SLEEVELES)"),
    ),
)
BUILTIN = {
    f"{collection.folder}_{split}": (collection, split)
    for collection in (LDD, ASND)
    for split in ("train", "val")
}


@dataclass(frozen=True)
class BuiltinSource(CocoSource):
    """A COCO json with the categories of one of the collections."""

    collection: Collection

    def metadata(self, model: ClassNames) -> dict[str, Any]:
        """As for any COCO json, and {class name: text} as `kinds` and `plant_parts` (LDD only)."""
        more = {
            "kinds": {c.name: c.kind for c in self.collection.categories if c.kind},
            "plant_parts": {
                c.name: c.plant_part for c in self.collection.categories if c.plant_part
            },
        }
        return super().metadata(model) | {key: value for key, value in more.items() if value}


def open_builtin(name: str, key: str) -> BuiltinSource:
    """Open a dataset of `BUILTIN` at its place under DETECTRON2_DATASETS.

    Args:
        name: of the dataset.
        key: the configuration key that names it.

    Raises:
        FileNotFoundError: no json or no images; shows the expected tree.
        ValueError: see `with_categories_of`.
    """
    collection, split = BUILTIN[name]
    json_file = f"{collection.folder}/annotations/instances_{split}.json"
    images = f"{collection.folder}/images"
    missing = [] if os.path.isfile(resolve_path(json_file)) else [json_file]
    missing += [] if os.path.isdir(resolve_path(images)) else [images]
    if missing:
        raise FileNotFoundError(_describe_missing(name, key, missing))
    return with_categories_of(name, CocoSource.open(key, json_file, images))


def with_categories_of(name: str, source: CocoSource) -> BuiltinSource:
    """The same files as the dataset `name` of `BUILTIN`, after a check of their categories.

    Raises:
        ValueError: ids or names are not the collection's; names every difference.
    """
    collection, _ = BUILTIN[name]
    wanted = {category.id: category.name for category in collection.categories}
    found = dict(source.categories)
    # ascii(): a minus sign looks like a hyphen.
    differences = [
        f"  id {i}: {ascii(found[i]) if i in found else 'missing'}, expected "
        f"{repr(wanted[i]) if i in wanted else 'none'}"
        for i in sorted(wanted.keys() | found.keys())
        if found.get(i) != wanted.get(i)
    ]
    if differences:
        more = len(differences) - _NUM_NAMED
        lines = differences[:_NUM_NAMED] + ([f"  and {more} more"] if more > 0 else [])
        raise ValueError(
            f"'{name}': the categories of {source.json_file} are not those of {collection.title} "
            f"(thesis, {collection.table}):\n" + "\n".join(lines) + "\n"
            "What to do: give them these ids and names; or register the file under another name "
            "in DATASETS.REGISTER, where any categories will do."
        )
    return BuiltinSource(**vars(source), collection=collection)


def _describe_missing(name: str, key: str, missing: list[str]) -> str:
    collection, _ = BUILTIN[name]
    root = os.getenv("DETECTRON2_DATASETS")
    configured = "is not set, which means datasets" if root is None else f"is '{root}'"
    tree = {
        "": f"  {os.path.abspath(resolve_path(collection.folder))}/",
        "annotations": "    annotations/",
        "annotations/instances_train.json": "      instances_train.json",
        "annotations/instances_val.json": "      instances_val.json",
        "images": "    images/",
    }
    for path, known in collection.published.items():
        tree[path] = f"{tree[path]:<28}published as {known}"
    return (
        f"{key}: '{name}' needs {' and '.join(missing)}, not found. The environment variable "
        f"DETECTRON2_DATASETS {configured}, so {collection.title} is expected as\n"
        + "\n".join(tree.values())
        + "\nor elsewhere, if DATASETS.REGISTER says where: "
        f"{{name: {name}, type: coco, json: FILE, images: FOLDER}}"
    )
