"""Datasets by configuration: what an entry may say, and that classes are mapped by name."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode

from il_net.config import add_il_net_config
from il_net.data import coco_file, sources
from il_net.data.class_lists import contiguous_ids, is_subsequence, model_classes
from il_net.data.datasets import register_datasets
from il_net.data.validate import validate_datasets

REPO = Path(__file__).parents[3]
DATA = REPO.parent / "shared" / "data"
NUM_CLASSES = "MODEL.ROI_HEADS.NUM_CLASSES"


pytestmark = pytest.mark.usefixtures("clean_catalogs")


def make_cfg(*entries: object, train=("train",), test=(), num_classes: int = 0) -> CfgNode:
    cfg = get_cfg()
    add_il_net_config(cfg)
    cfg.DATASETS.REGISTER = list(entries)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    return cfg


def write_coco(folder: Path, name: str, categories: dict[int, str]) -> dict:
    """A COCO set of one 20 x 10 px image with one box per category; returns its entry."""
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "pictures" / "a.jpg").touch()
    data = {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 20, "height": 10}],
        "annotations": [
            {"id": i + 1, "image_id": 5, "category_id": c, "bbox": [0, 0, 2 + i, 3], "iscrowd": 0}
            for i, c in enumerate(categories)
        ],
        "categories": [{"id": c, "name": n} for c, n in categories.items()],
    }
    (folder / f"{name}.json").write_text(json.dumps(data))
    return {"name": name, "type": "coco", "json": f"{name}.json", "images": "pictures"}


def write_voc(root: Path, split: str, images: dict[str, list[str]]) -> dict:
    """A VOC folder; every object is the box 3..12 x 4..8 in VOC's 1-based pixels."""
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(images) + "\n")
    box = "<xmin>3</xmin><ymin>4</ymin><xmax>12</xmax><ymax>8</ymax>"
    for image_id, names in images.items():
        objects = "".join(f"<object><name>{n}</name><bndbox>{box}</bndbox></object>" for n in names)
        size = "<size><width>20</width><height>10</height></size>"
        xml = f"<annotation>{size}{objects}</annotation>"
        (root / "Annotations" / f"{image_id}.xml").write_text(xml)
        (root / "JPEGImages" / f"{image_id}.jpg").touch()
    return {"name": split, "type": "voc", "root": root.name, "split": split}


def category_ids(name: str) -> list[int]:
    return [a["category_id"] for r in DatasetCatalog.get(name) for a in r["annotations"]]


# --- mapping by name ---


def test_names_sorted_by_id_and_gaps_closed(tmp_path):
    cfg = make_cfg(write_coco(tmp_path, "train", {9: "rust", 2: "leaf", 4: "miner"}))
    register_datasets(cfg)
    meta = MetadataCatalog.get("train")
    assert meta.thing_classes == ["leaf", "miner", "rust"]
    assert meta.thing_dataset_id_to_contiguous_id == {2: 0, 4: 1, 9: 2}
    assert category_ids("train") == [2, 0, 1]  # the boxes are written in the order 9, 2, 4
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert meta.json_file == str(tmp_path / "train.json")
    assert meta.image_root == str(tmp_path / "pictures")
    assert meta.evaluator_type == "coco"
    record = DatasetCatalog.get("train")[0]
    assert record["file_name"] == str(tmp_path / "pictures" / "a.jpg")
    assert (record["image_id"], record["width"], record["height"]) == (5, 20, 10)
    assert record["annotations"][1]["bbox"] == [0, 0, 3, 3]


def test_test_set_lacking_a_class_is_mapped_by_name(tmp_path):
    cfg = make_cfg(
        write_coco(tmp_path, "train", {1: "leaf", 2: "miner", 3: "rust"}),
        write_coco(tmp_path, "val", {1: "leaf", 2: "rust"}),
        test=("val",),
    )
    register_datasets(cfg)
    meta = MetadataCatalog.get("val")
    assert meta.thing_classes == ["leaf", "miner", "rust"]
    # 'miner' is not in the file: 3 is the first id beyond its largest.
    assert meta.thing_dataset_id_to_contiguous_id == {1: 0, 3: 1, 2: 2}
    assert category_ids("val") == [0, 2]


def test_several_training_sets_share_the_longest_list(tmp_path):
    cfg = make_cfg(
        write_coco(tmp_path, "short", {1: "rust"}),
        write_coco(tmp_path, "long", {1: "leaf", 2: "rust"}),
        train=("short", "long"),
    )
    register_datasets(cfg)
    assert category_ids("short") == [1]
    assert category_ids("long") == [0, 1]
    # Detectron2 compares thing_classes of all training sets and raises if they differ.
    assert len(get_detection_dataset_dicts(cfg.DATASETS.TRAIN)) == 2


def test_unused_dataset_keeps_its_own_list(tmp_path):
    register_datasets(
        make_cfg(
            write_coco(tmp_path, "train", {1: "leaf"}), write_coco(tmp_path, "other", {1: "cat"})
        )
    )
    assert MetadataCatalog.get("other").thing_classes == ["cat"]
    assert category_ids("other") == [0]


def test_classes_of_an_entry_give_the_order(tmp_path):
    val = write_coco(tmp_path, "val", {1: "rust", 2: "leaf"})
    train = write_coco(tmp_path, "train", {1: "leaf", 2: "rust"})
    val["classes"] = ["leaf", "rust"]
    register_datasets(make_cfg(train, val, test=("val",)))
    assert category_ids("val") == [1, 0]
    assert MetadataCatalog.get("val").thing_dataset_id_to_contiguous_id == {2: 0, 1: 1}


def test_classes_may_declare_more_than_the_file_has(tmp_path):
    train = write_coco(tmp_path, "train", {1: "leaf"})
    cfg = make_cfg({**train, "classes": ("bug", "leaf")})
    register_datasets(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert category_ids("train") == [1]


def test_classes_lacking_a_category_of_the_file(tmp_path):
    train = write_coco(tmp_path, "train", {1: "leaf", 2: "rust"})
    with pytest.raises(ValueError, match=r"REGISTER\[0\]\.classes lacks \['rust'\].*train\.json"):
        register_datasets(make_cfg({**train, "classes": ["leaf"]}))


@pytest.mark.parametrize(
    ("val", "differs", "advice"),
    [
        ({1: "rust", 2: "leaf"}, "another order", r"classes: \['leaf', 'rust'\]"),
        ({1: "leaf", 2: "Rust"}, r"\['Rust'\] are not among", r"'leaf', 'rust', 'Rust'\]"),
    ],
)
def test_reordered_or_unknown_class_shows_both_lists(tmp_path, val, differs, advice):
    cfg = make_cfg(
        write_coco(tmp_path, "train", {1: "leaf", 2: "rust"}),
        write_coco(tmp_path, "val", val),
        test=("val",),
    )
    with pytest.raises(ValueError, match=differs) as e:
        register_datasets(cfg)
    assert e.match(r"'val' \(DATASETS\.TEST\)")
    assert e.match(r"model \(from 'train'\): \['leaf', 'rust'\]")
    assert e.match(rf"val: \['{val[1]}', '{val[2]}'\]")
    assert e.match(f"What to do: .*{advice}")
    assert "train" not in DatasetCatalog  # nothing is registered by a call that fails


def test_training_sets_that_disagree(tmp_path):
    cfg = make_cfg(
        write_coco(tmp_path, "one", {1: "leaf", 2: "rust"}),
        write_coco(tmp_path, "two", {1: "leaf", 2: "miner"}),
        train=("one", "two"),
    )
    with pytest.raises(ValueError, match=r"'two' \(DATASETS\.TRAIN\).*'miner'"):
        register_datasets(cfg)


def test_pure_functions():
    assert is_subsequence(["a", "c"], ["a", "b", "c"])
    assert not is_subsequence(["c", "a"], ["a", "b", "c"])
    assert not is_subsequence(["a", "a"], ["a", "b"])
    assert model_classes({}) == ()
    assert model_classes({"x": ("b",), "y": ("a", "b")}) == ("a", "b")
    assert contiguous_ids([(7, "a"), (2, "c")], ("a", "b", "c")) == {7: 0, 8: 1, 2: 2}
    assert contiguous_ids([], ("a", "b")) == {1: 0, 2: 1}


# --- the number of classes ---


def test_right_number_is_kept_and_wrong_number_explained(tmp_path):
    train = write_coco(tmp_path, "train", {1: "leaf", 2: "rust"})
    register_datasets(make_cfg(train, num_classes=2))
    with pytest.raises(ValueError, match=f"{NUM_CLASSES} is 80") as e:
        register_datasets(make_cfg(train, num_classes=80))
    assert e.match(r"2 classes: \['leaf', 'rust'\]")
    assert e.match("0, which infers it")


def test_nothing_to_infer_from():
    with pytest.raises(ValueError, match=f"{NUM_CLASSES} is 0.*no training classes"):
        register_datasets(make_cfg(train=()))


def test_plain_configurations_are_left_alone():
    cfg = make_cfg(train=("coco_2017_train",), test=("coco_2017_val",), num_classes=80)
    register_datasets(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    cfg = make_cfg(train=("voc_2007_trainval",), num_classes=80)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"  # counts its classes elsewhere
    register_datasets(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    register_datasets(make_cfg(train=(), num_classes=80))


def test_without_training_sets_a_test_set_keeps_its_own_list(tmp_path):
    val = write_coco(tmp_path, "val", {1: "leaf"})
    register_datasets(make_cfg(val, train=(), test=("val",), num_classes=1))
    assert MetadataCatalog.get("val").thing_classes == ["leaf"]
    assert category_ids("val") == [0]


# --- datasets registered elsewhere ---


def test_builtin_with_fewer_classes_than_the_model(tmp_path):
    names = MetadataCatalog.get("voc_2007_test").thing_classes
    train = write_coco(tmp_path, "train", dict(enumerate([*names, "leaf"], start=1)))
    with pytest.raises(ValueError, match="'voc_2007_test'.*registered outside DATASETS.REGISTER"):
        register_datasets(make_cfg(train, test=("voc_2007_test",)))


def test_user_registered_dataset_is_loaded_for_its_classes(tmp_path):
    write_coco(tmp_path, "mine", {1: "leaf", 2: "rust"})
    register_coco_instances("mine", {}, str(tmp_path / "mine.json"), str(tmp_path / "pictures"))
    val = write_coco(tmp_path, "val", {1: "rust"})
    cfg = make_cfg(val, train=("mine",), test=("val",))
    register_datasets(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert category_ids("val") == [1]


def test_unknown_name_lists_near_misses(tmp_path):
    cfg = make_cfg(write_coco(tmp_path, "coffee_train", {1: "leaf"}), train=("cofee_train",))
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN: no dataset 'cofee_train'") as e:
        register_datasets(cfg)
    assert e.match(r"Similar names: \['coffee_train'")
    cfg = make_cfg(train=("coco_2017_train",), test=("coco_2017_vall",), num_classes=80)
    with pytest.raises(ValueError, match=r"DATASETS\.TEST: .*'coco_2017_val'"):
        register_datasets(cfg)


# --- entries ---

COCO = {"name": "x", "type": "coco", "json": "train.json", "images": "pictures"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("train.json", r"expected fields name and type"),
        ({**COCO, "type": "yolo"}, r"'type' must be one of coco, voc, images; got"),
        ({**COCO, "type": ["coco"]}, r"'type' must be one of"),
        ({k: v for k, v in COCO.items() if k != "type"}, r"'type' must be one of"),
        (
            {**COCO, "image": "x"},
            r"unknown field 'image' \(did you mean 'images'\?\); type coco takes name, .*, cl",
        ),
        ({k: v for k, v in COCO.items() if k != "json"}, "field 'json' is missing; type coco"),
        ({k: v for k, v in COCO.items() if k != "name"}, "field 'name' is missing"),
        ({"name": "x", "type": "voc", "root": "v"}, "field 'split' is missing; type voc takes"),
        ({"name": "x", "type": "images", "images": "v", "classes": ["a"]}, "field 'classes'"),
        ({**COCO, "json": 3}, r"\.json must be a non-empty string, got 3"),
        ({**COCO, "classes": "leaf"}, r"\.classes must be a list of different names"),
        ({**COCO, "classes": ["leaf", "leaf"]}, r"\.classes must be a list of different names"),
        ({**COCO, "classes": ["leaf", 1]}, r"\.classes must be a list of different names"),
        ({**COCO, "classes": []}, r"\.classes must be a list of different names"),
    ],
)
def test_wrong_entry_is_named_with_what_is_legal(tmp_path, entry, message):
    train = write_coco(tmp_path, "train", {1: "leaf"})
    with pytest.raises(ValueError, match=rf"DATASETS\.REGISTER\[1\].*{message}"):
        register_datasets(make_cfg(train, entry))


def test_names_must_be_free(tmp_path):
    train = write_coco(tmp_path, "train", {1: "leaf"})
    with pytest.raises(ValueError, match=r"REGISTER\[1\]\.name: 'train' is the name of an earlier"):
        register_datasets(make_cfg(train, train))
    with pytest.raises(ValueError, match=r"REGISTER\[0\]\.name: 'coco_2017_val' is already"):
        register_datasets(make_cfg({**train, "name": "coco_2017_val"}))


@pytest.mark.parametrize(("field", "what"), [("json", "file"), ("images", "folder")])
def test_missing_file_names_key_path_and_place(tmp_path, field, what):
    train = write_coco(tmp_path, "train", {1: "leaf"})
    with pytest.raises(FileNotFoundError) as e:
        register_datasets(make_cfg({**train, field: "gone"}))
    assert e.match(rf"DATASETS\.REGISTER\[0\]\.{field}: there is no {what} 'gone'")
    assert str(tmp_path / "gone") in str(e.value)
    assert e.match("DETECTRON2_DATASETS")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "'categories' must be a list with at least one"),
        ('{"categories": []}', "'categories' must be a list with at least one"),
        ('{"categories": [{"id": "1", "name": "a"}]}', r"categories\[0\] needs an integer 'id'"),
        ('{"categories": [5]}', r"categories\[0\] needs an integer 'id'"),
        (
            '{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            r"category ids used twice: \[1\]",
        ),
        (
            '{"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            r"category names used twice: \['a'\]",
        ),
    ],
)
def test_unusable_categories_name_the_file(tmp_path, text, message):
    train = write_coco(tmp_path, "train", {1: "leaf"})
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=rf"train\.json.*{message}"):
        register_datasets(make_cfg(train))


def test_annotation_of_undefined_category_is_named_when_loaded(tmp_path):
    train = write_coco(tmp_path, "train", {1: "leaf"})
    data = json.loads((tmp_path / "train.json").read_text())
    data["annotations"][0]["category_id"] = 2  # the id that a lacking class would be given
    (tmp_path / "train.json").write_text(json.dumps(data))
    register_datasets(make_cfg({**train, "classes": ["leaf", "rust"]}))
    with pytest.raises(ValueError, match=r"train\.json.*image 5 has category_id 2"):
        DatasetCatalog.get("train")


def test_entries_from_the_command_line(tmp_path):
    entry = write_coco(tmp_path, "train", {1: "leaf"})
    cfg = make_cfg()
    cfg.merge_from_list(["DATASETS.REGISTER", repr([entry])])
    register_datasets(cfg)
    assert category_ids("train") == [0]
    entries = cfg.DATASETS.REGISTER
    assert entries == [entry]  # the configuration that is written out stays as given


# --- registering again, paths ---


def test_registering_again_replaces_our_own(tmp_path):
    train = write_coco(tmp_path, "train", {1: "leaf"})
    register_datasets(make_cfg(train))
    train = write_coco(tmp_path, "train", {1: "leaf", 2: "rust"})
    cfg = make_cfg(train)
    register_datasets(cfg)
    register_datasets(make_cfg(train))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert MetadataCatalog.get("train").thing_classes == ["leaf", "rust"]
    assert category_ids("train") == [0, 1]


def test_what_others_put_in_our_place_is_not_replaced(tmp_path):
    train = write_coco(tmp_path, "train", {1: "leaf"})
    register_datasets(make_cfg(train))
    DatasetCatalog.pop("train")
    DatasetCatalog.register("train", list)
    with pytest.raises(ValueError, match="already registered"):
        register_datasets(make_cfg(train))


def test_categories_are_read_once(tmp_path, monkeypatch):
    reads = []
    read = sources.read_coco_json
    monkeypatch.setattr(sources, "read_coco_json", lambda path: (reads.append(path), read(path))[1])
    train = write_coco(tmp_path, "train", {1: "leaf"})
    register_datasets(make_cfg(train))
    register_datasets(make_cfg(train))
    assert reads == [str(tmp_path / "train.json")]


def test_a_start_parses_each_file_once(tmp_path, monkeypatch):
    """For its categories, its faults and its records; a test set's records come later."""
    parsed = []
    parse = coco_file.read_json
    monkeypatch.setattr(coco_file, "read_json", lambda path: (parsed.append(path), parse(path))[1])
    train, val = (write_coco(tmp_path, name, {1: "leaf"}) for name in ("train", "val"))
    data = json.loads((tmp_path / "val.json").read_text())
    data["annotations"][0]["area"] = 6.0
    (tmp_path / "val.json").write_text(json.dumps(data))
    cfg = make_cfg(train, val, test=("val",))
    with coco_file.parsed_once():
        register_datasets(cfg)
        validate_datasets(cfg)
        records = DatasetCatalog.get("train")
    assert parsed == [str(tmp_path / "train.json"), str(tmp_path / "val.json")]
    assert records == DatasetCatalog.get("train")


def test_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data")
    assert sources.resolve_path("a/b") == "/data/a/b"
    assert sources.resolve_path(".hidden/b") == "/data/.hidden/b"
    assert sources.resolve_path("/a/b") == "/a/b"
    assert sources.resolve_path("./a") == "./a"
    assert sources.resolve_path("../a") == "../a"
    assert sources.resolve_path("~/a") == "/home/me/a"
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/sets")
    assert sources.resolve_path("a") == "/home/me/sets/a"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert sources.resolve_path("a") == "datasets/a"


# --- VOC ---


def test_voc_folder(tmp_path):
    root = tmp_path / "voc"
    train = write_voc(root, "train", {"p1": ["rust", "leaf"], "p2": ["miner"], "p3": []})
    val = write_voc(root, "val", {"q1": ["rust"], "q2": ["leaf"]})
    cfg = make_cfg(train, val, test=("val",))
    register_datasets(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    meta = MetadataCatalog.get("val")
    assert meta.thing_classes == ["leaf", "miner", "rust"]
    assert meta.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 3: 2}
    assert "json_file" not in meta.as_dict()
    assert category_ids("train") == [2, 0, 1]
    assert category_ids("val") == [2, 0]
    record = DatasetCatalog.get("val")[0]
    assert record["image_id"] == "q1"
    assert type(record["image_id"]) is str
    assert record["file_name"] == str(root / "JPEGImages" / "q1.jpg")
    assert (record["width"], record["height"]) == (20, 10)
    # 1-based and inclusive 3..12 x 4..8 are the edges 2..12 x 3..8.
    assert record["annotations"][0]["bbox"] == [2, 3, 12, 8]
    assert record["annotations"][0]["bbox_mode"] == BoxMode.XYXY_ABS


def test_voc_split_of_one_image_and_declared_classes(tmp_path):
    train = write_voc(tmp_path / "voc", "train", {"p1": ["leaf"]})
    register_datasets(make_cfg({**train, "classes": ["rust", "leaf"]}))
    assert [r["image_id"] for r in DatasetCatalog.get("train")] == ["p1"]
    assert category_ids("train") == [1]


def break_voc(root: Path, case: str) -> None:
    xml = root / "Annotations" / "p1.xml"
    split = root / "ImageSets" / "Main" / "train.txt"
    if case == "no split":
        split.unlink()
    elif case == "no pictures":
        (root / "JPEGImages" / "p1.jpg").unlink()
        (root / "JPEGImages").rename(root / "Pictures")
    elif case == "one picture":
        (root / "JPEGImages" / "p1.jpg").unlink()
    elif case == "one xml":
        xml.unlink()
    elif case == "empty split":
        split.write_text("\n")
    elif case == "columns":
        split.write_text("p1 1\n")
    elif case == "twice":
        split.write_text("p1\np2\np1\n")
    elif case == "not xml":
        xml.write_text("<annotation>")
    elif case == "other encoding":
        text = xml.read_text().replace("leaf", "Blättchen")
        xml.write_bytes(f'<?xml version="1.0" encoding="latin-1"?>{text}'.encode("latin-1"))
    elif case == "list of other encoding":
        split.write_text("p1\np2\n", encoding="utf-16")
    else:
        old, new = case.split(" -> ")
        xml.write_text(xml.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("no split", FileNotFoundError, r"\[0\]\.root: .*ImageSets/Main/train\.txt"),
        ("no pictures", FileNotFoundError, r"\[0\]\.root: .*JPEGImages"),
        (
            "one picture",
            FileNotFoundError,
            r"\[0\]\.root: 1 of 2 files .*JPEGImages: \['p1\.jpg'\]",
        ),
        ("one xml", FileNotFoundError, r"\[0\]\.root: 1 of 2 files .*Annotations: \['p1\.xml'\]"),
        ("empty split", ValueError, r"train\.txt: the list of images is empty"),
        ("columns", ValueError, r"train\.txt: expected one image name a line.*'p1 1'"),
        ("twice", ValueError, r"train\.txt: 1 images are listed twice: \['p1'\]"),
        ("not xml", ValueError, r"p1\.xml is not XML"),
        ("other encoding", ValueError, r"p1\.xml must be saved as UTF-8"),
        ("list of other encoding", ValueError, r"train\.txt must be saved as UTF-8"),
        ("<width>20</width> -> ", ValueError, r"p1\.xml: size/width must be"),
        ("<width>20 -> <width>\u00b2", ValueError, r"p1\.xml: size/width .* got '\u00b2'"),
        ("<width>20 -> <width>0", ValueError, r"p1\.xml: size/width must be a positive whole"),
        ("<width>20 -> <width>" + "9" * 5000, ValueError, r"p1\.xml: size/width must be"),
        ("<xmax>12 -> <xmax>1e300", ValueError, r"p1\.xml: object 0 .*up to 1,000,000"),
        ("<xmax>12 -> <xmax>2", ValueError, r"p1\.xml: object 0 .*the smaller ones first"),
        ("<xmax>12</xmax> -> <xmax/>", ValueError, r"p1\.xml: object 0 \('leaf'\) needs a name"),
        ("<name>leaf</name> -> ", ValueError, r"p1\.xml: object 0 \('None'\) needs a name"),
    ],
)
def test_broken_voc_folder(tmp_path, case, error, message):
    train = write_voc(tmp_path / "voc", "train", {"p1": ["leaf"], "p2": ["leaf"]})
    break_voc(tmp_path / "voc", case)
    with pytest.raises(error, match=message):
        register_datasets(make_cfg(train))


def test_missing_voc_root(tmp_path):
    entry = {"name": "train", "type": "voc", "root": "gone", "split": "train"}
    with pytest.raises(FileNotFoundError, match=r"REGISTER\[0\]\.root: there is no folder 'gone'"):
        register_datasets(make_cfg(entry))


# --- folders of pictures ---


def write_pictures(root: Path) -> None:
    for path in ("b.JPG", "a/z.png", "a-1.jpeg", "notes.txt", ".x.jpg", "a/._z.png", ".t/c.jpg"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


@pytest.mark.parametrize(
    ("images", "ids"),
    [
        ("u", ["a-1.jpeg", "a/z.png", "b.JPG"]),
        ("u/*.jp*g", ["a-1.jpeg"]),
        ("u/**/*.*", ["a-1.jpeg", "a/z.png", "b.JPG"]),
        ("u/a/*", ["z.png"]),
    ],
)
def test_pictures_of_a_folder_or_glob(tmp_path, images, ids):
    write_pictures(tmp_path / "u")
    train = write_coco(tmp_path, "train", {1: "leaf"})
    entry = {"name": "more", "type": "images", "images": images}
    register_datasets(make_cfg(train, entry))
    root = tmp_path / ("u/a" if images == "u/a/*" else "u")
    expected = [{"file_name": str(root / i), "image_id": i} for i in ids]
    assert DatasetCatalog.get("more") == expected
    # A picture that is added later changes no id.
    (root / "0.jpeg").touch()
    assert [r for r in DatasetCatalog.get("more") if r["image_id"] in ids] == expected


@pytest.mark.parametrize("images", ["gone", "u", "u/*.jpg"])
def test_no_pictures(tmp_path, images):
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "notes.txt").touch()
    entry = {"name": "train", "type": "images", "images": images}
    with pytest.raises(FileNotFoundError, match=r"DATASETS\.REGISTER\[0\]\.images: ") as e:
        register_datasets(make_cfg(entry))
    assert os.path.join(tmp_path, images) in str(e.value)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_pictures_without_labels_are_not_for_training_or_testing(tmp_path, key):
    write_pictures(tmp_path / "u")
    train = write_coco(tmp_path, "train", {1: "leaf"})
    entry = {"name": "more", "type": "images", "images": "u"}
    used = {"train": ("more",)} if key == "TRAIN" else {"test": ("more",)}
    with pytest.raises(ValueError, match=rf"DATASETS\.{key}: 'more' is of type images"):
        register_datasets(make_cfg(train, entry, **used))


def test_voc_folder_has_no_masks(tmp_path):
    cfg = make_cfg(write_voc(tmp_path / "v", "train", {"a": ["leaf"], "b": ["rust"]}))
    cfg.MODEL.MASK_ON = True
    with pytest.raises(ValueError, match=r"type voc and has no masks; set MODEL\.MASK_ON"):
        register_datasets(cfg)


def test_classes_of_a_finished_run(tmp_path):
    train = write_coco(tmp_path, "train", {1: "leaf", 2: "rust"})
    cfg = make_cfg(train)
    register_datasets(cfg)
    assert cfg.DATASETS.CLASSES == ("leaf", "rust")
    register_datasets(cfg)  # its config.yaml used again
    cfg.DATASETS.CLASSES = ("rust", "leaf")
    with pytest.raises(ValueError, match=r"DATASETS\.CLASSES is \['rust', 'leaf'\]"):
        register_datasets(cfg)


# --- real data ---


@pytest.mark.parametrize(
    ("name", "classes", "counts"),
    [  # images and instances of train and val: the READMEs of the data sets
        (
            "coffee_leaf",
            ["leaf", "miner", "rust", "phoma", "cercospora"],
            {"train": (338, 1517), "val": (42, 209)},
        ),
        ("bccd", ["RBC", "WBC", "Platelets"], {"train": (205, 2804), "val": (87, 1137)}),
    ],
)
def test_real_data(name, classes, counts, monkeypatch):
    if not (DATA / name).is_dir():
        pytest.skip(f"needs the public data set {name} in ../shared/data beside the repository")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(DATA))
    entries = [
        {
            "name": split,
            "type": "coco",
            "json": f"{name}/annotations/instances_{split}.json",
            "images": f"{name}/images",
        }
        for split in counts
    ]
    cfg = make_cfg(*entries, test=("val",))
    register_datasets(cfg)
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert num_classes == len(classes)
    for split, (images, instances) in counts.items():
        assert MetadataCatalog.get(split).thing_classes == classes
        records = DatasetCatalog.get(split)
        assert len(records) == images
        assert sum(len(r["annotations"]) for r in records) == instances
        assert os.path.isfile(records[0]["file_name"])
