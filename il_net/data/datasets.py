"""Datasets by configuration alone: `DATASETS.REGISTER` into Detectron2's catalogs.

All datasets that a run trains and tests on are compared by class name, and those registered here
are loaded with the class ids of one list, the model's. So a class that a test file lacks, or
numbers otherwise, shifts nothing.
"""

import difflib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .builtin import BUILTIN, open_builtin, with_categories_of
from .class_lists import ClassNames, check_equal, check_fits, model_classes
from .sources import CocoSource, ImagesSource, Source
from .voc_source import VocSource

logger = logging.getLogger(__name__)

_KEY = "DATASETS.REGISTER"
_TYPES: dict[str, Callable[..., Source]] = {
    "coco": CocoSource.open,
    "voc": VocSource.open,
    "images": ImagesSource.open,
}
# Detectron2's architectures that have no RoI heads and count their classes in another key.
_WITHOUT_ROI_HEADS = ("RetinaNet", "SemanticSegmentor", "ProposalNetwork", "FCOS")
# The loaders this module put into the catalog, to tell its own registrations from others'.
_registered: dict[str, Callable[[], list[dict[str, Any]]]] = {}


def register_datasets(cfg: CfgNode) -> None:
    """Register `cfg.DATASETS.REGISTER`, check all class lists, infer the number of classes.

    Call it once in every process, before `cfg` is frozen. An entry is one of

    * `{name, type: coco, json, images, classes?}`: a COCO json and its image folder;
    * `{name, type: voc, root, split, classes?}`: a Pascal VOC folder;
    * `{name, type: images, images}`: a folder of pictures, or a glob, without labels.

    `classes` declares names and order, and must hold every class of the data; without it, they are
    the json's categories sorted by id, or the names in the xml files sorted by letter. Paths:
    see `sources.resolve_path`. An entry replaces one that an earlier call registered by that name.
    Names of `builtin.BUILTIN` need no entry; one of type coco must have that dataset's categories.

    The longest class list in `DATASETS.TRAIN` is the model's. Other training and test sets must be
    subsequences of it, by name. A dataset of ours in TRAIN or TEST gets the model's list in its
    metadata and its annotations; one in neither keeps its own. A dataset registered by Detectron2
    or by user code cannot be mapped and must have the model's list. Without training classes (a
    configuration only to test), every dataset keeps its own list.

    `MODEL.ROI_HEADS.NUM_CLASSES` 0 is replaced by the number of model classes. It is left alone
    where `MODEL.META_ARCHITECTURE` has no RoI heads. `DATASETS.CLASSES` is set to the model's
    list; when it was set before (the config.yaml of a run), the list must still be the same.

    Raises:
        ValueError: a wrong entry, a name that is taken or registered nowhere, class lists that do
            not agree, or a wrong `NUM_CLASSES`; the message says which key to change.
        FileNotFoundError: a file or folder of an entry does not exist.
    """
    sources = _open_entries(cfg.DATASETS.REGISTER)
    _open_builtin(cfg, sources)
    _check_names(cfg, sources)
    train = _class_lists(cfg.DATASETS.TRAIN, sources)
    test = _class_lists(cfg.DATASETS.TEST, sources)
    model = model_classes(train)
    if model:
        _check_test_and_foreign(train, test, model, sources)
    _set_classes(cfg, model)
    used = {*train, *test} if model else set()
    for name, source in sources.items():
        _register(name, source, model if name in used else source.class_names or ())
    for name, names in {**train, **test}.items():
        logger.info("dataset '%s': %d classes: %s", name, len(names), ", ".join(names))


def _open_entries(entries: Any) -> dict[str, Source]:
    """Check the form of all entries, then open them."""
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"{_KEY} must be a list of entries, got {entries!r}")  # noqa: TRY004
    sources: dict[str, Source] = {}
    for i, entry in enumerate(entries):
        key = f"{_KEY}[{i}]"
        fields = _check_entry(key, entry)
        name, opener = fields.pop("name"), _TYPES[fields.pop("type")]
        if name in sources:
            raise ValueError(f"{key}.name: '{name}' is the name of an earlier entry of {_KEY}")
        if name in DatasetCatalog and not _is_ours(name):
            raise ValueError(
                f"{key}.name: '{name}' is already registered by Detectron2 or other code; choose "
                "another name"
            )
        source = opener(key, **fields)
        if name in BUILTIN and isinstance(source, CocoSource):
            source = with_categories_of(name, source)
        sources[name] = source
    return sources


def _open_builtin(cfg: CfgNode, sources: dict[str, Source]) -> None:
    """Add the datasets of `builtin.py` that the run names, where nothing else has the name."""
    for key in ("TRAIN", "TEST", "UNLABELED"):
        for name in cfg.DATASETS[key]:
            taken = name in sources or (name in DatasetCatalog and not _is_ours(name))
            if name in BUILTIN and not taken:
                sources[name] = open_builtin(name, f"DATASETS.{key}")


def _check_entry(key: str, entry: Any) -> dict[str, Any]:
    """A copy of the entry with the right fields of the right types."""
    fields = dict(entry) if isinstance(entry, dict) else {}
    if str(fields.get("type")) not in _TYPES:
        raise ValueError(
            f"{key}: expected fields name and type, and those of the type; 'type' must be one of "
            f"{', '.join(_TYPES)}; got {entry!r}"
        )
    # The fields of a type are the parameters of its opener, the optional ones with a default.
    parameters = dict(inspect.signature(_TYPES[fields["type"]]).parameters)
    del parameters["key"]
    required = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    legal = ["name", "type", *parameters]
    explained = f"type {fields['type']} takes " + ", ".join(
        n if n in ("name", "type", *required) else f"{n} (optional)" for n in legal
    )
    for field in fields:
        if field not in legal:
            close = difflib.get_close_matches(str(field), legal, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise ValueError(f"{key}: unknown field '{field}'{hint}; {explained}")
    for field in ("name", *required):
        if field not in fields:
            raise ValueError(f"{key}: field '{field}' is missing; {explained}")
    for field, value in fields.items():
        if field == "classes":
            fields[field] = _check_classes(key, value)
        elif not isinstance(value, str) or not value:
            raise ValueError(f"{key}.{field} must be a non-empty string, got {value!r}")
    return fields


def _check_classes(key: str, value: Any) -> ClassNames:
    if (
        not isinstance(value, (list, tuple))
        or not value
        or not all(isinstance(name, str) and name for name in value)
        or len(set(value)) < len(value)
    ):
        raise ValueError(
            f"{key}.classes must be a list of different names (quote those that YAML reads as "
            f"numbers, yes or no), got {value!r}"
        )
    return tuple(value)


def _check_names(cfg: CfgNode, sources: dict[str, Source]) -> None:
    """Every dataset of the run is registered, and those to train and test on have labels."""
    known = [*sources, *DatasetCatalog.list(), *BUILTIN]
    for key in ("TRAIN", "TEST", "UNLABELED"):
        for name in cfg.DATASETS[key]:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
                raise ValueError(
                    f"DATASETS.{key}: no dataset '{name}' is registered. Similar names: "
                    f"{close or 'none'}; in {_KEY}: {list(sources)}"
                )
            source = sources.get(name)
            if key == "UNLABELED":
                continue
            if isinstance(source, CocoSource) and not source.categories:
                raise ValueError(
                    f"DATASETS.{key}: '{name}': {source.json_file}: 'categories' must be a list "
                    "with at least one category"
                )
            if isinstance(source, ImagesSource):
                raise ValueError(
                    f"DATASETS.{key}: '{name}' is of type images and has no labels to train on or "
                    "to compare with"
                )
            if isinstance(source, VocSource) and cfg.MODEL.MASK_ON:
                raise ValueError(
                    f"DATASETS.{key}: '{name}' is of type voc and has no masks; set MODEL.MASK_ON "
                    "False or use a COCO file"
                )


def _class_lists(names: Iterable[str], sources: dict[str, Source]) -> dict[str, ClassNames]:
    """Class names of each dataset that has any."""
    lists = {}
    for name in names:
        found = sources[name].class_names if name in sources else _foreign_classes(name)
        if found:
            lists[name] = found
    return lists


def _foreign_classes(name: str) -> ClassNames | None:
    if "thing_classes" not in MetadataCatalog.get(name).as_dict():
        # register_coco_instances in user code fills the metadata only when it loads.
        DatasetCatalog.get(name)
    classes = MetadataCatalog.get(name).as_dict().get("thing_classes")
    return tuple(classes) if classes else None


def _check_test_and_foreign(
    train: dict[str, ClassNames],
    test: dict[str, ClassNames],
    model: ClassNames,
    sources: dict[str, Source],
) -> None:
    model_from = ", ".join(f"'{name}'" for name, names in train.items() if names == model)
    for key, lists in (("DATASETS.TRAIN", train), ("DATASETS.TEST", test)):
        for name, names in lists.items():
            check = check_fits if name in sources else check_equal
            check(name, names, model, model_from, key=key)


def _set_classes(cfg: CfgNode, model: ClassNames) -> None:
    declared = tuple(cfg.DATASETS.CLASSES)
    if declared and model and declared != model:
        raise ValueError(
            f"DATASETS.CLASSES is {list(declared)}, but DATASETS.TRAIN has the classes "
            f"{list(model)}. Leave it empty to take them from the data"
        )
    model = model or declared
    cfg.DATASETS.CLASSES = model
    key = "MODEL.ROI_HEADS.NUM_CLASSES"
    configured = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if cfg.MODEL.META_ARCHITECTURE in _WITHOUT_ROI_HEADS:
        return
    if configured == 0:
        if not model:
            raise ValueError(
                f"{key} is 0, which infers it, but there are no training classes: DATASETS.TRAIN "
                f"is {tuple(cfg.DATASETS.TRAIN)}. Name a labelled dataset there, or set the number"
            )
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(model)
    elif model and configured != len(model):
        raise ValueError(
            f"{key} is {configured}, but DATASETS.TRAIN has {len(model)} classes: {list(model)}. "
            f"Set it to {len(model)}, or to 0, which infers it"
        )


def _is_ours(name: str) -> bool:
    return name in _registered and DatasetCatalog[name] is _registered[name]


def _register(name: str, source: Source, classes: ClassNames) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.pop(name)
    # Detectron2 refuses to change metadata once it is set, so it goes with the dataset.
    MetadataCatalog.pop(name, None)
    loader = functools.partial(source.load, classes)
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(**source.metadata(classes))
    _registered[name] = loader
