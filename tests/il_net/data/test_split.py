"""Which images keep their labels: counts of the thesis, both file formats, what a run gets."""

import hashlib
import json
import logging
import random
from collections import Counter

import pytest

pytest.importorskip("detectron2")

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from il_net.config import add_il_net_config
from il_net.data.datasets import register_datasets
from il_net.data.split import (
    Split,
    count_labeled,
    draw_labeled,
    load_split,
    load_train,
    make_split,
    split_digest,
    split_records,
    stratify,
    train_records,
    write_split,
)
from il_net.data.split_file import hash_ids, read_labeled, split_document
from il_net.data.validate import validate_datasets

COCO_TRAIN = 117_266  # images with annotations (facts 6.1)
ASND_TRAIN = 3_199

# --- how many ---


@pytest.mark.parametrize(
    ("percent", "total", "count"),
    [
        (5.0, ASND_TRAIN, 159),
        (10.0, ASND_TRAIN, 319),
        (20, ASND_TRAIN, 639),
        (50.0, ASND_TRAIN, 1599),
        # The lengths of the published lists.
        (0.01, COCO_TRAIN, 11),
        (0.1, COCO_TRAIN, 117),
        (0.5, COCO_TRAIN, 586),
        (1.0, COCO_TRAIN, 1172),
        (2.0, COCO_TRAIN, 2345),
        (5.0, COCO_TRAIN, 5863),
        (10.0, COCO_TRAIN, 11_726),
        (29.0, 100, 29),  # 0.29 * 100 is 28.999... in binary
        (0.7, 1000, 7),
        (1e-05, 10_000_000, 1),
        (1.0, 3, 1),
        (100.0, 3, 3),
    ],
)
def test_counts(percent, total, count):
    assert count_labeled(percent, total) == count


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.5, float("nan")])
def test_percentage_out_of_range(percent):
    with pytest.raises(ValueError, match=r"DATASETS\.SPLIT\.PERCENT must be above 0"):
        count_labeled(percent, 10)


# --- drawing ---


def test_coco_and_asnd_by_seed():
    ids = [7 * i + 9 for i in range(COCO_TRAIN)]
    labeled = draw_labeled(ids, 10.0, 1)
    assert len(set(labeled)) == len(labeled) == 11_726
    assert len(set(ids).difference(labeled)) == 105_540
    assert list(labeled) == sorted(labeled)
    # Evenly over the list: 10 % of each tenth, standard deviation sqrt(11727 * 0.1 * 0.9) = 32.5.
    tenths = Counter((image_id - 9) // 7 * 10 // COCO_TRAIN for image_id in labeled)
    assert all(abs(tenths[t] - 1172.6) < 4 * 32.5 for t in range(10))
    for percent, count in ((5, 159), (10, 319), (20, 639), (50, 1599)):
        assert len(draw_labeled(range(ASND_TRAIN), percent, 1)) == count


def test_a_draw_depends_on_percentage_and_seed_alone():
    ids = [f"{i:04d}.jpg" for i in range(400)]
    shuffled = ids[:]
    random.Random(0).shuffle(shuffled)
    first = draw_labeled(ids, 10, 1)
    random.seed(5)
    assert draw_labeled(shuffled, 10.0, 1) == first
    others = [draw_labeled(ids, 10, seed) for seed in range(2, 7)]
    assert len({first, *others}) == 6
    # Another percentage is another draw: of 40 images about half would be in any 200.
    assert not set(first) <= set(draw_labeled(ids, 50, 1))


def test_every_image_has_the_same_chance():
    drawn = Counter(i for seed in range(1000) for i in draw_labeled(range(50), 20, seed))
    # Binomial: mean 200, standard deviation sqrt(1000 * 0.2 * 0.8) = 12.6.
    assert all(abs(drawn[i] - 200) < 4.5 * 12.6 for i in range(50))


def test_nested_draws_contain_each_other():
    draws = [set(draw_labeled(range(300), p, 3, nested=True)) for p in (1, 5, 20, 70, 100)]
    assert [len(d) for d in draws] == [3, 15, 60, 210, 300]
    assert all(small < large for small, large in zip(draws, draws[1:], strict=False))
    assert draws[1] != set(draw_labeled(range(300), 5, 4, nested=True))


def test_stratified_draw_keeps_proportions():
    # One class an image: 800, 150 and 50 images, and 24 without any; a tenth of each.
    sizes = {(0,): 800, (1,): 150, (2,): 50, (): 24}
    classes = dict(enumerate(names for names, size in sizes.items() for _ in range(size)))
    for seed in range(5):
        labeled = draw_labeled(classes, 10, seed, classes=classes)
        assert len(labeled) == 102
        found = Counter(name for i in labeled for name in classes[i])
        assert found == {0: 80, 1: 15, 2: 5}
    assert draw_labeled(classes, 10, 1, classes=classes) != labeled


def make_multilabel(total: int = 600) -> dict[int, set[int]]:
    """Images with several classes: class k is in every image with probability 0.5 ** k."""
    rng = random.Random(1)
    return {i: {k for k in range(8) if rng.random() < 0.5**k} for i in range(total)}


def test_stratified_draw_of_images_with_several_classes():
    classes = make_multilabel()
    sizes = Counter(k for names in classes.values() for k in names)
    assert sizes[7] < 10  # a plain 10 % may well have none of it
    for nested in (False, True):
        labeled = draw_labeled(classes, 10, 1, nested=nested, classes=classes)
        assert len(labeled) == 60
        found = Counter(k for i in labeled for k in classes[i])
        for k, size in sizes.items():
            assert found[k] >= 1
            assert abs(found[k] - size / 10) <= 3, k


def test_nested_stratified_draws_contain_each_other():
    classes = make_multilabel()
    draws = [
        set(draw_labeled(classes, p, 1, nested=True, classes=classes)) for p in (2, 10, 50, 100)
    ]
    assert [len(d) for d in draws] == [12, 60, 300, 600]
    assert all(small < large for small, large in zip(draws, draws[1:], strict=False))


def test_stratify_gives_the_rarest_class_its_image_first():
    # One place: of the class with a single image, not of the one with three.
    assert stratify([1, 2, 3, 4], 1, {1: {5}, 2: {5}, 3: {6}, 4: {5}}) == [3]
    assert stratify([1, 2, 3], 2, {1: (), 2: (), 3: ()}) == [1, 2]
    assert stratify([1, 2], 0, {1: {1}, 2: {1}}) == []
    assert stratify([], 0, {}) == []


# --- files ---


def write_json(path, data) -> str:
    path.write_text(json.dumps(data))
    return str(path)


def test_published_file_lists_positions(tmp_path):
    ids = [3 * i + 5 for i in range(COCO_TRAIN)]
    positions = random.Random(0).sample(range(COCO_TRAIN), 11_726)
    path = write_json(tmp_path / "COCO_supervision.txt", {"10.0": {"0": [1], "1": positions}})
    for percent in (10, 10.0):
        labeled = read_labeled(path, ids, percent, 1, count_labeled(percent, len(ids)))
        assert labeled == tuple(sorted(3 * p + 5 for p in positions))


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (117_300, "10.0 % of the 117300 images of DATASETS.TRAIN are 11730, the list has 11726"),
        (117_265, "the largest position is 117265"),  # as many, but too few images
    ],
)
def test_published_file_with_another_dataset(tmp_path, total, message):
    positions = range(COCO_TRAIN - 11_726, COCO_TRAIN)
    path = write_json(tmp_path / "COCO_supervision.txt", {"10.0": {"1": list(positions)}})
    with pytest.raises(ValueError, match=r"DATASETS\.SPLIT\.FILE: .*for another dataset") as e:
        read_labeled(path, range(total), 10.0, 1, count_labeled(10.0, total))
    assert e.match(message)
    assert e.match("COCO train2017: 117266")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"5.0": {"1": [0]}},
            r"no list for DATASETS\.SPLIT\.PERCENT 10\.0 and SEED 1.*5\.0: \[1\]",
        ),
        ({"10.0": {"0": [0]}}, r"no list .* SEED 1.*10\.0: \[0\]"),
        ({"10.0": {"1": [-1]}}, "must list positions"),
        ({"10.0": {"1": ["a"]}}, "must list positions"),
        ({"10.0": {"1": [0, 1]}}, "are 1, the list has 2"),
        ({"10.0": {"1": [12]}}, "largest position is 12"),
        ({"10.0": {"1": []}}, "is no list"),
        ({"10.0": [0]}, "percent -> seed -> list"),
        ([1, 2], "percent -> seed -> list"),
        ({"images": [], "categories": []}, "percent -> seed -> list"),
    ],
)
def test_wrong_position_files(tmp_path, table, message):
    path = write_json(tmp_path / "x.txt", table)
    with pytest.raises(ValueError, match=rf"DATASETS\.SPLIT\.FILE: .*x\.txt.*{message}"):
        read_labeled(path, list(range(12)), 10.0, 1, 1)


def test_a_file_that_is_not_json(tmp_path):
    (tmp_path / "x.txt").write_text("10 %: 1, 2")
    with pytest.raises(ValueError, match=r"DATASETS\.SPLIT\.FILE: .*x\.txt is not JSON"):
        read_labeled(str(tmp_path / "x.txt"), [1], 10.0, 1, 1)


def test_own_file_by_image_id(tmp_path):
    ids = [5, 9, 11, 20]
    document = split_document("mine", ids, {50: {1: (9, 5)}, 25.0: {0: (20,), 1: (5,)}})
    # printf '[5,9,11,20]' | sha256sum
    digest = "e45fa5c4cb571cc54c271f655889d7c4395cdb10a64097dd7bbc9d5f951ec6f2"
    assert document["sha256"] == hash_ids(reversed(ids)) == digest
    assert {k: v for k, v in document.items() if k != "sha256"} == {
        "dataset": "mine",
        "unit": "image_id",
        "total": 4,
        "labeled": {"50.0": {"1": [5, 9]}, "25.0": {"0": [20], "1": [5]}},
    }
    path = write_json(tmp_path / "split.json", document)
    assert read_labeled(path, ids, 50.0, 1, 2) == (5, 9)
    assert read_labeled(path, ids, 25, 0, 1) == (20,)
    for other in ([5, 9, 11, 21], ids[:3]):
        with pytest.raises(ValueError, match="made for other images: 'mine' with 4") as e:
            read_labeled(path, other, 50.0, 1, 2)
        assert e.match(r"DATASETS\.SPLIT\.FILE")
        assert e.match("tools/split_coco.py")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "position"}, "unit is 'position'"),
        ({"labeled": {"50.0": {"1": [5, 6]}}}, r"does not count: \{6\}"),
        ({"labeled": {"50.0": {"1": [5, 5]}}}, "lists an image twice"),
        ({"labeled": {"50.0": {"2": [5, 9]}}}, r"50\.0: \[2\]"),
    ],
)
def test_wrong_own_files(tmp_path, change, message):
    document = {**split_document("mine", [5, 9], {50.0: {1: [5]}}), **change}
    path = write_json(tmp_path / "split.json", document)
    with pytest.raises(ValueError, match=rf"DATASETS\.SPLIT\.FILE: .*{message}"):
        read_labeled(path, [5, 9], 50.0, 1, 1)
    del document["total"]
    path = write_json(tmp_path / "split.json", document)
    with pytest.raises(ValueError, match=r"missing are \['total'\]"):
        read_labeled(path, [5, 9], 50.0, 1, 1)


# --- records of a run ---


def make_record(image_id: int | str, *categories: int, folder: str = "d", crowd: int = 0) -> dict:
    boxes = [
        {"bbox": [0, 0, 4, 4], "bbox_mode": 1, "category_id": c, "iscrowd": crowd}
        for c in categories
    ]
    return {
        "file_name": f"{folder}/{image_id}.jpg",
        "image_id": image_id,
        "height": 8,
        "width": 10,
        "annotations": boxes,
    }


def register(name: str, records: list[dict]) -> None:
    DatasetCatalog.register(name, lambda: [dict(r) for r in records])
    MetadataCatalog.get(name).set(thing_classes=["a", "b"])


@pytest.fixture
def cfg(clean_catalogs) -> CfgNode:
    cfg = get_cfg()
    add_il_net_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN = ("train",)
    return cfg


def labeled_of(cfg: CfgNode) -> tuple[list, list]:
    labeled, unlabeled = split_records(cfg, train_records(cfg))
    return [r["image_id"] for r in labeled], [r["image_id"] for r in unlabeled]


def test_the_rest_of_the_training_set_is_unlabeled_and_bare(cfg):
    # Image 3 has nothing, image 4 a crowd: as in the published lists they are nowhere.
    records = [make_record(i, 0, 1) for i in (20, 5, 11, 9)]
    register("train", [*records, make_record(3), make_record(4, 1, crowd=1)])
    cfg.DATASETS.SPLIT.PERCENT = 50.0
    labeled, unlabeled = split_records(cfg, train_records(cfg))
    assert {r["image_id"] for r in (*labeled, *unlabeled)} == {5, 9, 11, 20}
    assert len(labeled) == len(unlabeled) == 2
    assert all(len(r["annotations"]) == 2 for r in labeled)
    for record in unlabeled:
        assert set(record) == {"file_name", "image_id", "height", "width"}
    assert [r["image_id"] for r in labeled] == sorted(draw_labeled((5, 9, 11, 20), 50, 1))
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert {i for part in labeled_of(cfg) for i in part} == {3, 4, 5, 9, 11, 20}


def test_loading_packs_the_same_records(cfg):
    register("train", [make_record(i, 0, 1) for i in (20, 5, 11, 9)])
    cfg.DATASETS.SPLIT.PERCENT = 50.0
    records = train_records(cfg)
    labeled, unlabeled, split = load_split(cfg)
    assert split == make_split(cfg, records)
    assert (list(labeled), list(unlabeled)) == split_records(cfg, records)
    assert list(load_train(cfg)) == records["train"]


def test_everything_is_labeled_by_default(cfg):
    register("train", [make_record(i, 0) for i in range(4)])
    assert labeled_of(cfg) == ([0, 1, 2, 3], [])


def test_unlabeled_datasets_add_to_the_rest(cfg):
    register("train", [make_record(i, 0) for i in range(4)])
    register("more", [make_record("x", 1, folder="m"), make_record(1, 0)])
    pictures = [{"file_name": "u/p.jpg", "image_id": "p.jpg"}]
    DatasetCatalog.register("bare", lambda: pictures)
    cfg.DATASETS.UNLABELED = ("more", "bare")
    assert labeled_of(cfg) == ([0, 1, 2, 3], ["x", 1, "p.jpg"])
    _, unlabeled = split_records(cfg, train_records(cfg))
    assert unlabeled[-1] == pictures[0]
    assert all("annotations" not in r for r in unlabeled)
    # The training set as a whole, whatever keeps its labels; every file once.
    cfg.DATASETS.UNLABELED, cfg.DATASETS.SPLIT.PERCENT = ("train", "more"), 25.0
    labeled, unlabeled = labeled_of(cfg)
    assert len(labeled) == 1
    assert sorted(unlabeled, key=str) == [0, 1, 2, 3, "x"]


@pytest.mark.parametrize("stratified", [False, True])
def test_several_training_sets_may_number_alike(cfg, stratified):
    register("train", [make_record(i, i % 2) for i in range(6)])
    register("other", [make_record(i, 1, folder="o") for i in range(4)])
    cfg.DATASETS.TRAIN = ("train", "other")
    cfg.DATASETS.SPLIT.PERCENT, cfg.DATASETS.SPLIT.STRATIFIED = 50.0, stratified
    records = train_records(cfg)
    split = make_split(cfg, records)
    names = {f"train/{i}" for i in range(6)} | {f"other/{i}" for i in range(4)}
    assert split.dataset == "train + other"
    assert {*split.labeled, *split.unlabeled} == names
    labeled, unlabeled = split_records(cfg, records, split)
    assert len(labeled) == len(unlabeled) == 5
    files = {f"d/{i}.jpg" for i in range(6)} | {f"o/{i}.jpg" for i in range(4)}
    assert {r["file_name"] for r in (*labeled, *unlabeled)} == files
    if stratified:  # 3 of class 0, 7 of class 1
        found = Counter(r["annotations"][0]["category_id"] for r in labeled)
        assert found in ({0: 1, 1: 4}, {0: 2, 1: 3})


def test_stratified_and_nested_keys_are_read(cfg):
    classes = {i: {0} if i < 90 else {1} for i in range(100)}
    register("train", [make_record(i, *names) for i, names in classes.items()])
    node = cfg.DATASETS.SPLIT
    node.PERCENT, node.SEED, node.STRATIFIED = 10.0, 4, True
    assert sum(i >= 90 for i in labeled_of(cfg)[0]) == 1
    assert tuple(labeled_of(cfg)[0]) == draw_labeled(classes, 10, 4, classes=classes)
    node.STRATIFIED, node.NESTED = False, True
    assert tuple(labeled_of(cfg)[0]) == draw_labeled(classes, 10, 4, nested=True)


def test_split_file_of_a_run(cfg, tmp_path, caplog):
    # Positions count in the list sorted by id, without the empty image 2.
    register("train", [make_record(i, 0) for i in (30, 10, 20, 40)] + [make_record(2)])
    write_json(tmp_path / "legacy.txt", {"50.0": {"0": [2, 0]}})
    cfg.DATASETS.SPLIT.FILE = "legacy.txt"
    cfg.DATASETS.SPLIT.PERCENT, cfg.DATASETS.SPLIT.SEED = 50.0, 0
    assert labeled_of(cfg) == ([10, 30], [20, 40])

    split = make_split(cfg, train_records(cfg))
    assert split == Split("train", 50.0, 0, (10, 30), (20, 40))
    folder = tmp_path / "run" / "deep"
    with caplog.at_level(logging.INFO):
        write_split(str(folder), split)
        write_split(str(folder), split)
    assert "2 labelled and 2 unlabelled images of train" in caplog.text
    assert not (folder / "split_previous.json").exists()
    cfg.DATASETS.SPLIT.FILE = str(folder / "split.json")
    assert make_split(cfg, train_records(cfg)) == split
    old, digest = (folder / "split.json").read_bytes(), split_digest(str(folder))
    assert digest == hashlib.sha256(old).hexdigest()
    write_split(str(folder), Split("train", 50.0, 0, (10, 20), (30, 40)))
    assert (folder / "split_previous.json").read_bytes() == old
    assert split_digest(str(folder)) != digest and split_digest(str(tmp_path)) is None

    cfg.DATASETS.SPLIT.FILE = "gone.json"
    with pytest.raises(FileNotFoundError, match=r"DATASETS\.SPLIT\.FILE: there is no file 'gone"):
        make_split(cfg, train_records(cfg))
    cfg.DATASETS.SPLIT.FILE, cfg.DATASETS.SPLIT.PERCENT = "legacy.txt", 100.0
    with pytest.raises(ValueError, match=r"no list for DATASETS\.SPLIT\.PERCENT 100\.0"):
        make_split(cfg, train_records(cfg))


def test_only_the_main_process_writes(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
    write_split(str(tmp_path / "run"), Split("train", 50.0, 0, (1,), (2,)))
    assert not (tmp_path / "run").exists()


def test_unusable_training_sets(cfg):
    register("train", [make_record(1, 0), make_record(1, 1)])
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN: image id 1 is used twice"):
        make_split(cfg, train_records(cfg))
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty"):
        train_records(cfg)


# --- registering what has no labels ---


def write_coco(tmp_path, name: str, categories: list | None, boxes: int) -> dict:
    (tmp_path / "p").mkdir(exist_ok=True)
    (tmp_path / "p" / "a.jpg").touch()
    data = {"images": [{"id": 5, "file_name": "a.jpg", "width": 20, "height": 10}]}
    if categories is not None:
        data["categories"] = [{"id": i + 1, "name": n} for i, n in enumerate(categories)]
    if boxes:
        box = {"image_id": 5, "category_id": 1, "bbox": [0, 0, 4, 3], "area": 12, "iscrowd": 0}
        data["annotations"] = [{**box, "id": i + 1} for i in range(boxes)]
    write_json(tmp_path / f"{name}.json", data)
    return {"name": name, "type": "coco", "json": f"{name}.json", "images": "p"}


def test_unlabeled_datasets_of_any_kind_are_registered(cfg, tmp_path):
    entries = [
        write_coco(tmp_path, "train", ["leaf", "rust"], 2),
        write_coco(tmp_path, "other", ["cat"], 1),
        write_coco(tmp_path, "plain", None, 0),
        {"name": "folder", "type": "images", "images": "p"},
    ]
    cfg.DATASETS.REGISTER = entries
    cfg.DATASETS.UNLABELED = ("other", "plain", "folder")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    cfg.MODEL.MASK_ON = False
    register_datasets(cfg)
    validate_datasets(cfg)
    assert cfg.DATASETS.CLASSES == ("leaf", "rust")
    assert MetadataCatalog.get("other").thing_classes == ["cat"]
    labeled, unlabeled = split_records(cfg, train_records(cfg))
    assert len(labeled) == 1
    assert [r["image_id"] for r in unlabeled] == [5]  # one file, three times
    cfg.DATASETS.UNLABELED = ("foldr",)
    with pytest.raises(ValueError, match=r"DATASETS\.UNLABELED: no dataset 'foldr'.*\['folder'"):
        register_datasets(cfg)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_a_file_without_categories_is_for_nothing_else(cfg, tmp_path, key):
    cfg.DATASETS.REGISTER = [
        write_coco(tmp_path, "train", ["leaf"], 1),
        write_coco(tmp_path, "plain", None, 0),
    ]
    cfg.DATASETS[key] = ("plain",)
    with pytest.raises(ValueError, match=rf"DATASETS\.{key}: 'plain': .*plain\.json: 'categories'"):
        register_datasets(cfg)


def test_pictures_of_unlabeled_sets_are_looked_for(cfg, tmp_path):
    cfg.DATASETS.REGISTER = [
        write_coco(tmp_path, "train", ["leaf"], 1),
        write_coco(tmp_path, "plain", None, 0),
    ]
    cfg.DATASETS.UNLABELED = ("plain",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.MASK_ON = 1, False
    data = json.loads((tmp_path / "plain.json").read_text())
    data["images"][0]["file_name"] = "b.jpg"
    write_json(tmp_path / "plain.json", data)
    register_datasets(cfg)
    with pytest.raises(ValueError, match=r"dataset 'plain'.*\n.*image files missing.*b\.jpg"):
        validate_datasets(cfg)
