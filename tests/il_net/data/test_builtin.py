"""LDD and ASND by name: generated mini folders, gaps in the ids, and what goes wrong.

Expected ids and names are Tables 2.27 and 2.32.
"""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from PIL import Image

from il_net.config import add_il_net_config, load_config
from il_net.data.builtin import BUILTIN
from il_net.data.datasets import register_datasets
from il_net.data.loader import build_semi_loader
from il_net.data.split import count_labeled
from sbr_cnn import add_sbr_cnn_config

CONFIGS = Path(__file__).parents[3] / "configs" / "datasets"
# Table 2.27
LDD = {
    1: "black_rot_foglia",
    2: "black_rot_grappolo",
    3: "botrite_foglia",
    4: "botrite_grappolo",
    6: "foglia_vite",
    7: "grappolo_vite",
    9: "oidio_foglia",
    10: "oidio_grappolo",
    12: "peronospora_foglia",
    13: "peronospora_grappolo",
}
# Table 2.32
ASND = {
    0: "Bras",
    1: "Jackets",
    2: "Pants",
    3: "Shoes",
    4: "Shorts",
    5: "Skirt/Dresses",
    6: "Sweatshirts(LONG SLEEVES)",
    7: "T-Shirt(SHORT SLEEVES)",
    8: "Tanks(SLEEVELES)",
}
TABLES = {"ldd": LDD, "asnd": ASND}
IMAGES = {"train": 20, "val": 3}

pytestmark = pytest.mark.usefixtures("clean_catalogs")


def write_tree(root: Path, folder: str, categories: dict[int, str] | None = None) -> Path:
    """A mini dataset: every picture shows one object of every class; returns the training json."""
    categories = categories or TABLES[folder]
    (root / folder / "images").mkdir(parents=True)
    (root / folder / "annotations").mkdir()
    for split, count in IMAGES.items():
        names = [f"{split}{n}.jpg" for n in range(count)]
        for name in names:
            Image.new("RGB", (40, 30)).save(root / folder / "images" / name)
        annotations = [
            {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [category_id, 2, 10, 5],
                "segmentation": [[category_id, 2, category_id + 10, 2, category_id + 10, 7]],
                "area": 25,
                "iscrowd": 0,
            }
            for image_id in range(count)
            for category_id in reversed(categories)
        ]
        data = {
            "images": [
                {"id": n, "file_name": name, "width": 40, "height": 30}
                for n, name in enumerate(names)
            ],
            "annotations": [{"id": n, **a} for n, a in enumerate(annotations, start=1)],
            # Not in the order of the ids.
            "categories": [{"id": c, "name": name} for c, name in reversed(categories.items())],
        }
        path = root / folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(data))
    return root / folder / "annotations" / "instances_train.json"


def make_cfg(train=("ldd_train",), test=(), unlabeled=(), register=()) -> CfgNode:
    cfg = get_cfg()
    add_il_net_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.DATASETS.UNLABELED, cfg.DATASETS.REGISTER = unlabeled, list(register)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    return cfg


def test_there_are_four_names():
    assert set(BUILTIN) == {"ldd_train", "ldd_val", "asnd_train", "asnd_val"}


@pytest.mark.parametrize("folder", TABLES)
def test_names_alone_register_both_files(tmp_path, folder):
    write_tree(tmp_path, folder)
    cfg = make_cfg((f"{folder}_train",), (f"{folder}_val",))
    register_datasets(cfg)
    table = TABLES[folder]
    assert len(table) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    for split, count in IMAGES.items():
        name = f"{folder}_{split}"
        meta = MetadataCatalog.get(name)
        assert meta.thing_classes == [table[i] for i in sorted(table)]
        # The gaps are closed in the order of the ids.
        contiguous = {category_id: n for n, category_id in enumerate(sorted(table))}
        assert meta.thing_dataset_id_to_contiguous_id == contiguous
        assert meta.evaluator_type == "coco"
        records = DatasetCatalog.get(name)
        assert len(records) == count
        for record in records:
            assert os.path.isfile(record["file_name"])
            assert (record["width"], record["height"]) == (40, 30)
            # The box's x is the id in the file.
            found = {a["bbox"][0]: a["category_id"] for a in record["annotations"]}
            assert found == contiguous
            assert all(len(a["segmentation"][0]) == 6 for a in record["annotations"])
    assert len(get_detection_dataset_dicts(cfg.DATASETS.TRAIN)) == IMAGES["train"]


def test_kinds_and_plant_parts_of_ldd(tmp_path):
    """The labels end in the Italian for leaf or bunch; the two without a disease contain."""
    write_tree(tmp_path, "ldd")
    register_datasets(make_cfg())
    meta = MetadataCatalog.get("ldd_train")
    assert list(meta.kinds) == list(meta.plant_parts) == meta.thing_classes
    containers = {"foglia_vite": "leaf", "grappolo_vite": "grape"}
    for name in LDD.values():
        assert meta.kinds[name] == ("container" if name in containers else "disease")
        part = containers.get(name) or {"foglia": "leaf", "grappolo": "grape"}[name.split("_")[-1]]
        assert meta.plant_parts[name] == part
    assert not hasattr(meta, "published_files")  # which nothing reads


def test_asnd_has_neither_kinds_nor_plant_parts(tmp_path):
    write_tree(tmp_path, "asnd")
    register_datasets(make_cfg(("asnd_train",)))
    fields = MetadataCatalog.get("asnd_train").as_dict()
    assert not {"kinds", "plant_parts"} & set(fields)


def test_only_what_a_run_names_is_looked_for(tmp_path):
    write_tree(tmp_path, "ldd")
    register_datasets(make_cfg(("ldd_train",)))
    assert "ldd_train" in DatasetCatalog
    assert not {"ldd_val", "asnd_train", "asnd_val"} & set(DatasetCatalog)


def test_unlabelled_images_by_name(tmp_path):
    write_tree(tmp_path, "ldd")
    register_datasets(make_cfg(("ldd_val",), unlabeled=("ldd_train",)))
    assert len(DatasetCatalog.get("ldd_train")) == IMAGES["train"]


def test_registering_again_reads_a_changed_file(tmp_path):
    path = write_tree(tmp_path, "ldd")
    register_datasets(make_cfg())
    data = json.loads(path.read_text())
    data["images"] = data["images"][:5]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] < 5]
    path.write_text(json.dumps(data))
    register_datasets(make_cfg())
    assert len(DatasetCatalog.get("ldd_train")) == 5


# --- other places ---


def test_an_entry_says_that_the_files_are_elsewhere(tmp_path):
    write_tree(tmp_path, "ldd")
    (tmp_path / "ldd").rename(tmp_path / "vines")
    entry = {
        "name": "ldd_train",
        "type": "coco",
        "json": "vines/annotations/instances_val.json",
        "images": "vines/images",
    }
    register_datasets(make_cfg(register=[entry]))
    meta = MetadataCatalog.get("ldd_train")
    assert meta.json_file == str(tmp_path / "vines" / "annotations" / "instances_val.json")
    assert meta.kinds["foglia_vite"] == "container"
    assert len(DatasetCatalog.get("ldd_train")) == IMAGES["val"]


def test_an_entry_under_the_name_must_have_the_categories(tmp_path):
    write_tree(tmp_path, "ldd", {1: "leaf"})
    entry = {
        "name": "ldd_train",
        "type": "coco",
        "json": "ldd/annotations/instances_train.json",
        "images": "ldd/images",
    }
    with pytest.raises(ValueError, match=r"'ldd_train': the categories .* Table 2\.27"):
        register_datasets(make_cfg(register=[entry]))
    # Any other name will do.
    register_datasets(make_cfg(("mine",), register=[{**entry, "name": "mine"}]))
    assert MetadataCatalog.get("mine").thing_classes == ["leaf"]


def test_what_somebody_else_registered_by_the_name_is_left_alone():
    DatasetCatalog.register("ldd_train", list)
    MetadataCatalog.get("ldd_train").thing_classes = ["leaf"]
    register_datasets(make_cfg())
    assert DatasetCatalog.get("ldd_train") == []


def test_a_misspelt_name_is_told_the_right_one():
    with pytest.raises(ValueError, match=r"no dataset 'asnd_trian' .*'asnd_train'"):
        register_datasets(make_cfg(("asnd_trian",)))


# --- what goes wrong ---


def test_a_missing_folder_shows_the_tree(tmp_path, monkeypatch):
    root = tmp_path / "sets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    with pytest.raises(FileNotFoundError) as error:
        register_datasets(make_cfg())
    lines = str(error.value).splitlines()
    assert lines[0] == (
        "DATASETS.TRAIN: 'ldd_train' needs ldd/annotations/instances_train.json and ldd/images, "
        f"not found. The environment variable DETECTRON2_DATASETS is '{root}', so LDD is expected "
        "as"
    )
    assert [line.split() for line in lines[1:-1]] == [
        [f"{root}/ldd/"],
        ["annotations/"],
        ["instances_train.json", "published", "as", "train_17122021.json"],
        ["instances_val.json", "published", "as", "validation_17122021.json"],
        ["images/", "published", "as", "images_10-10-21"],
    ]
    indents = [len(line) - len(line.lstrip()) for line in lines[1:-1]]
    assert indents == [2, 4, 6, 6, 4]
    assert "{name: ldd_train, type: coco, json: FILE, images: FOLDER}" in lines[-1]
    assert "ldd_train" not in DatasetCatalog


def test_only_what_is_missing_is_named(tmp_path, monkeypatch):
    write_tree(tmp_path, "asnd").with_name("instances_val.json").unlink()
    message = r"DATASETS\.TEST: 'asnd_val' needs asnd/annotations/instances_val\.json, not found"
    with pytest.raises(FileNotFoundError, match=message) as error:
        register_datasets(make_cfg(("asnd_train",), ("asnd_val",)))
    assert "published" not in str(error.value)
    (tmp_path / "asnd" / "images").rename(tmp_path / "asnd" / "pictures")
    with pytest.raises(FileNotFoundError, match="'asnd_train' needs asnd/images, not found"):
        register_datasets(make_cfg(("asnd_train",)))
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.chdir(tmp_path / "asnd")
    with pytest.raises(FileNotFoundError, match="is not set, which means datasets") as error:
        register_datasets(make_cfg(("asnd_train",)))
    assert f"{tmp_path}/asnd/datasets/asnd/\n" in str(error.value)


def test_wrong_ids_are_named(tmp_path):
    """An export whose labels are numbered without the gaps."""
    write_tree(tmp_path, "ldd", dict(enumerate(LDD.values(), start=1)))
    with pytest.raises(ValueError, match=r"'ldd_train': the categories of .*_train\.json") as error:
        register_datasets(make_cfg())
    lines = str(error.value).splitlines()
    assert lines[0].endswith("are not those of LDD (thesis, Table 2.27):")
    assert lines[1:-1] == [
        "  id 5: 'foglia_vite', expected none",
        "  id 6: 'grappolo_vite', expected 'foglia_vite'",
        "  id 7: 'oidio_foglia', expected 'grappolo_vite'",
        "  id 8: 'oidio_grappolo', expected none",
        "  id 9: 'peronospora_foglia', expected 'oidio_foglia'",
        "  id 10: 'peronospora_grappolo', expected 'oidio_grappolo'",
        "  id 12: missing, expected 'peronospora_foglia'",
        "  id 13: missing, expected 'peronospora_grappolo'",
    ]
    assert lines[-1].startswith("What to do: ")


def test_a_minus_sign_in_place_of_the_hyphen_is_visible(tmp_path):
    """As the thesis' listing prints it."""
    write_tree(tmp_path, "asnd", {**ASND, 7: "T\N{MINUS SIGN}Shirt(SHORT SLEEVES)"})
    with pytest.raises(ValueError, match=r"Table 2\.32") as error:
        register_datasets(make_cfg(("asnd_train",)))
    (line,) = str(error.value).splitlines()[1:-1]
    assert line == (r"  id 7: 'T\u2212Shirt(SHORT SLEEVES)', expected 'T-Shirt(SHORT SLEEVES)'")


def test_many_differences_are_counted(tmp_path):
    """80 foreign classes from id 20 on, and all ten of the table missing: 90 differences."""
    write_tree(tmp_path, "ldd", {i: f"class {i}" for i in range(20, 100)})
    with pytest.raises(ValueError, match="'ldd_train'") as error:
        register_datasets(make_cfg())
    lines = str(error.value).splitlines()
    assert lines[1] == "  id 1: missing, expected 'black_rot_foglia'"
    assert lines[-2] == "  and 78 more"
    assert len(lines) == 1 + 12 + 2


# --- their configurations ---


def load(name: str, *options: object) -> CfgNode:
    return load_config(str(CONFIGS / name), [str(o) for o in options], add_sbr_cnn_config)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_finds_its_data(tmp_path, path):
    folder = path.stem.split("_")[0]
    write_tree(tmp_path, folder)
    cfg = load(path.name)
    table = TABLES[folder]
    assert len(table) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    register_datasets(cfg)
    assert list(cfg.DATASETS.CLASSES) == [table[i] for i in sorted(table)]
    assert [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] == [f"{folder}_train", f"{folder}_val"]


@pytest.mark.parametrize("name", ["asnd_unbiased_teacher.yaml", "asnd_il_net.yaml"])
@pytest.mark.parametrize(("percent", "files"), [(5, 159), (10, 319), (20, 639), (50, 1599)])
def test_percentages_of_asnd_label_the_thesis_number_of_files(tmp_path, name, percent, files):
    """Table 2.33, of 3,199 images; the mini folder has 20."""
    write_tree(tmp_path, "asnd")
    cfg = load(name, "DATASETS.SPLIT.PERCENT", percent, "DATALOADER.NUM_WORKERS", 0)
    assert count_labeled(cfg.DATASETS.SPLIT.PERCENT, 3199) == files
    register_datasets(cfg)
    split = build_semi_loader(cfg).split
    assert len(split.labeled) == 20 * percent // 100
    assert len(split.labeled) + len(split.unlabeled) == 20


def test_all_of_asnd_is_labelled_when_supervised():
    cfg = load("asnd_supervised.yaml")
    assert count_labeled(cfg.DATASETS.SPLIT.PERCENT, 3199) == 3199
