"""A Pascal VOC folder as one of the kinds of dataset that `DATASETS.REGISTER` knows."""

import math
import os
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from typing import Any

from detectron2.data.datasets import load_voc_instances

from .class_lists import ClassNames, contiguous_ids
from .coco_values import LARGEST_PX, is_box, is_side
from .sources import check_declared, find_path

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_NUM_NAMED = 5
_MOST_DIGITS = 10  # of a side


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
        check_declared(key, class_names, classes, annotations)
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
        """Fields for Detectron2's MetadataCatalog, for a model with the classes `model`."""
        # Without json_file Detectron2's COCOEvaluator converts the dataset by itself.
        return {
            "thing_classes": list(model),
            "thing_dataset_id_to_contiguous_id": contiguous_ids((), model),
            "dirname": self.root,
            "split": self.split,
            "year": 2012,  # for PascalVOCDetectionEvaluator: AP as area under the curve
            "evaluator_type": "coco",
        }


def _voc_part(root: str, key: str, *parts: str) -> str:
    path = os.path.join(root, *parts)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{key}.root: a VOC folder has {'/'.join(parts)}, but there is no "
            f"{os.path.abspath(path)}"
        )
    return path


def _read_split(path: str) -> tuple[str, ...]:
    lines = _read_text(path).split("\n")
    image_ids = tuple(line.strip() for line in lines if line.strip())
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


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} must be saved as UTF-8, which Detectron2 reads: {e}") from e


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
        tree = ET.ElementTree(ET.fromstring(_read_text(path)))
    except ET.ParseError as e:
        raise ValueError(f"{path} is not XML: {e}") from e
    for field in ("width", "height"):
        text = (tree.findtext(f"size/{field}") or "").strip()
        if not (text.isdecimal() and len(text) < _MOST_DIGITS and is_side(int(text))):
            raise ValueError(
                f"{path}: size/{field} must be a positive whole number of pixels, got '{text}'"
            )
    names = set()
    for i, obj in enumerate(tree.findall("object")):
        name = obj.findtext("name")
        try:
            corners = [float(obj.findtext(f"bndbox/{c}") or "") for c in _CORNERS]
        except ValueError:
            corners = [math.nan] * 4
        x0, y0, x1, y1 = corners
        if not (name and is_box(corners) and x0 <= x1 and y0 <= y1):
            raise ValueError(
                f"{path}: object {i} ('{name}') needs a name and bndbox/{{{','.join(_CORNERS)}}} "
                f"as numbers up to {LARGEST_PX:,.0f}, the smaller ones first"
            )
        names.add(name)
    return names
