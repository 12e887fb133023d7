"""Mutated data sets: each one trains, or one message names the file; and it stays as it was.

In one process, from the registration of the data set to the first batches and an evaluation, some
as real runs. The mutations are the same in every run. Below: images that an evaluation can't read.
"""

import copy
import functools
import json
import math
import os
import re
import shutil
import signal
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.data.eval_loader import build_eval_loader
from il_net.data.loader import build_semi_loader
from il_net.data.validate import validate_datasets
from il_net.engine.resumable import build_resumable_loader
from il_net.evaluation.build import build_evaluator
from sbr_cnn import add_sbr_cnn_config
from tests.e2e.runner import Result

COUNT = 30  # mutated files of each kind
MUTATE = settings(
    max_examples=COUNT,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SECONDS = 20  # for one data set; it takes less than one
HUGE = 10**400
NUMBERS = (0, -1, 7, 0.5, 96.0, 1e300, -1e300, 2**31, 2**64, HUGE, math.nan, math.inf, -math.inf)
OTHERS = (
    *(None, True, False, "", "x", "7", "\ud83d", "a\0b", [], {}, [[]], [None], [[None]], {"a": 1}),
    *([7], [[7]], [[1, 2, 3, 4]], [[math.nan] * 6], [["a"] * 6], [[[1, 2, 3, 4, 5, 6]]]),
    *([-5, -5, 9, 9], [9, 9, -5, 5], [1e300] * 4, ["1", "2", "3", "4"], [5, 5, 0, 0], [0] * 5),
    {"size": [96, 96], "counts": [9216]},
    {"size": [96, 96], "counts": "0`d8"},
    {"size": [96, 96], "counts": [5]},
    {"size": [9, 9], "counts": [81]},
    {"size": [2**20, 2**20], "counts": [2**40]},
    {"size": None, "counts": "zz"},
    {"counts": [1]},
)
FILE_NAMES = (
    *("{root}/000000.jpg", "../train/000000.jpg", "sub/../000000.jpg", "link/../000000.jpg", ".."),
    *("", ".", "/", "a\0.jpg", "sub", "sub/000000.jpg", "link/000000.jpg", "linked.jpg"),
    *("gone.jpg", "dangling.jpg", "loop.jpg", "x" * 300, "000001.jpg", "text.jpg", "./000000.jpg"),
)
Edit = Callable[[st.DataObject, dict], None]


# ---- the data sets ----


@pytest.fixture(scope="module")
def good(datasets, tmp_path_factory) -> Path:
    """A COCO file with its images, links and a file that is no image; and a VOC folder."""
    root = tmp_path_factory.mktemp("mutated")
    shutil.copytree(datasets / "leaves" / "train", root / "images")
    shutil.copy(datasets / "leaves" / "train.json", root / "good.json")
    (root / "elsewhere").mkdir()
    for folder in ("sub", "../elsewhere"):
        (root / "images" / "sub").mkdir(exist_ok=True)
        shutil.copy(root / "images" / "000000.jpg", root / "images" / folder)
    links = {"link": "../elsewhere", "linked.jpg": "000000.jpg", "dangling.jpg": "nothing.jpg"}
    for name, target in {**links, "loop.jpg": "loop.jpg"}.items():
        (root / "images" / name).symlink_to(target)
    (root / "images" / "text.jpg").write_text("no image")
    write_voc(root / "voc", json.loads((root / "good.json").read_text()), root / "images")
    return root


def write_voc(root: Path, truth: dict, images: Path) -> None:
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / part).mkdir(parents=True)
    names = {c["id"]: c["name"] for c in truth["categories"]}
    stems = [Path(image["file_name"]).stem for image in truth["images"]]
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n".join(stems))
    for image, stem in zip(truth["images"], stems, strict=True):
        shutil.copy(images / image["file_name"], root / "JPEGImages")
        top = ET.Element("annotation")
        size = ET.SubElement(top, "size")
        for field in ("width", "height"):
            ET.SubElement(size, field).text = str(image[field])
        for a in truth["annotations"]:
            if a["image_id"] == image["id"]:
                x, y, w, h = a["bbox"]
                obj = ET.SubElement(top, "object")
                ET.SubElement(obj, "name").text = names[a["category_id"]]
                box = ET.SubElement(obj, "bndbox")
                corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
                for field, value in corners.items():
                    ET.SubElement(box, field).text = str(value)
        ET.ElementTree(top).write(root / "Annotations" / f"{stem}.xml")


@pytest.fixture(autouse=True)
def _catalog() -> Iterator[None]:
    yield
    if "mutated" in DatasetCatalog:
        DatasetCatalog.pop("mutated")
        MetadataCatalog.pop("mutated", None)


def contents(folder: Path) -> dict[str, bytes | str]:
    """All files, and where links lead."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


# ---- what a run does with them ----


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"still busy after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def start(cfg: CfgNode, entry: dict, *, masks: bool, semi: bool) -> str:
    """Data set, first batches and an evaluation; the message of a user's mistake, or ""."""
    cfg = cfg.clone()
    cfg.DATASETS.REGISTER = [{"name": "mutated", **entry}]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("mutated",)
    cfg.MODEL.MASK_ON = masks
    if semi:
        cfg.SOLVER.IMS_PER_BATCH_UNLABELED = 2
        cfg.DATASETS.SPLIT.PERCENT = 50.0
        cfg.SEMISUP.BURN_IN_ITERS = 1
    with time_limit():
        try:
            register_datasets(cfg)
            validate_datasets(cfg)
            loader = build_semi_loader(cfg) if semi else build_resumable_loader(cfg)
            for batch in islice(loader, 3):
                for sample in [*batch.labeled, *batch.unlabeled] if semi else batch:
                    check_sample(sample, len(cfg.DATASETS.CLASSES))
            evaluate(cfg)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        except SystemExit as error:  # of an image
            assert str(error).startswith("error: "), error
            return str(error)
    return ""


def check_sample(sample: dict, classes: int) -> None:
    """An image with finite boxes inside of it."""
    height, width = sample["image"].shape[1:]
    assert sample["image"].dtype == torch.uint8 and height and width
    if "instances" not in sample:
        return
    boxes, labels = sample["instances"].gt_boxes.tensor, sample["instances"].gt_classes
    assert torch.isfinite(boxes).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
    assert ((labels >= 0) & (labels < classes)).all()


def evaluate(cfg: CfgNode) -> None:
    """With one detection on each image."""
    evaluator = build_evaluator(cfg, "mutated")
    evaluator.reset()
    for (record,) in build_eval_loader(cfg, "mutated"):
        size = (record["height"], record["width"])
        found = Instances(size, pred_boxes=Boxes(torch.tensor([[2.0, 2.0, 60.0, 60.0]])))
        found.scores, found.pred_classes = torch.tensor([0.5]), torch.tensor([0])
        if cfg.MODEL.MASK_ON:
            found.pred_masks = torch.ones(1, *size, dtype=torch.bool)
        evaluator.process([record], [{"instances": found}])
    assert "bbox" in evaluator.evaluate()


@pytest.fixture(scope="module")
def cfg(config, good) -> CfgNode:
    cfg = load_config(str(config), [], add_sbr_cnn_config)
    cfg.OUTPUT_DIR = str(good.parent / "run")
    return cfg


@pytest.fixture
def check(cfg, good) -> Callable[..., str]:
    """``check(entry, path, ...)``: the message names what it is about; nothing is changed."""

    def check(entry: dict, path: Path, **how: bool) -> str:
        before = contents(good)
        message = start(cfg, entry, **how)
        # An image that is left alone cannot be split.
        named = (str(path), f"{good / 'images'}/", "there are no unlabelled images")
        assert not message or any(part in message for part in named), message
        assert contents(good) == before
        return message

    return check


def coco(good: Path, name: str = "mutated.json") -> tuple[dict, Path]:
    path = good / name
    return {"type": "coco", "json": str(path), "images": str(good / "images")}, path


VOC = functools.partial(dict, type="voc", split="train")


@pytest.mark.parametrize("semi", [False, True])
def test_the_data_sets_are_good(cfg, good, semi):
    for masks in (False, True):
        assert start(cfg, coco(good, "good.json")[0], masks=masks, semi=semi) == ""
    assert start(cfg, VOC(root=str(good / "voc")), masks=False, semi=semi) == ""


# ---- COCO files ----


def draw_place(data: st.DataObject, truth: dict) -> tuple[Any, Any]:
    """A container inside the file and a key or index of it, at any depth."""
    section = data.draw(st.sampled_from(["images", "annotations", "categories"]), "list")
    node, key = truth, section
    for _ in range(data.draw(st.sampled_from([1, 2, 2, 2, 2, 3, 4]), "depth")):
        inner = node[key]
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))[:20]
        if not keys:
            break
        node, key = inner, data.draw(st.sampled_from(keys), "key")
        if not isinstance(node[key], (dict, list)):
            break
    return node, key


def replace_values(data: st.DataObject, truth: dict) -> None:
    for _ in range(data.draw(st.integers(1, 2))):
        node, key = draw_place(data, truth)
        node[key] = copy.deepcopy(data.draw(st.sampled_from((*NUMBERS, *OTHERS)), "value"))


def rearrange(data: st.DataObject, truth: dict) -> None:
    """Keys lost, misspelt or exchanged, records twice, ids of another record."""
    kind = data.draw(st.sampled_from(["lose", "misspell", "swap", "repeat", "borrow"]))
    node, key = draw_place(data, truth)
    other = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    if kind == "lose":
        del node[key]
    elif kind == "misspell" and isinstance(node, dict):
        node[f"{key}s"] = node.pop(key)
    elif kind == "swap":
        node[key], node[other] = node[other], node[key]
    elif kind == "repeat" and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        section = data.draw(st.sampled_from(["images", "annotations", "categories"]))
        records = truth.get(section) or [{}]
        record = data.draw(st.sampled_from(records))
        field = data.draw(st.sampled_from(["id", "image_id", "category_id", "name", "file_name"]))
        record[field] = data.draw(st.sampled_from([1, 2, 99, "leaf", "000001.jpg"]))


def rename_file(data: st.DataObject, truth: dict) -> None:
    name = data.draw(st.sampled_from(FILE_NAMES)).format(root=truth["root"])
    data.draw(st.sampled_from(truth["images"]))["file_name"] = name


def odd_object(data: st.DataObject, truth: dict) -> None:
    """What few of the drawn places are: masks, boxes and flags of an annotation."""
    keys = ["segmentation", "bbox", "iscrowd", "ignore", "keypoints", "area"]
    key = data.draw(st.sampled_from(keys), "key")
    value = data.draw(st.sampled_from((*OTHERS, *NUMBERS)), "value")
    data.draw(st.sampled_from(truth["annotations"]))[key] = copy.deepcopy(value)


@pytest.mark.parametrize("edit", [replace_values, rearrange, rename_file, odd_object])
def test_coco_files_of_another_content(good, check, injected, edit: Edit):
    entry, path = coco(good)
    truth = json.loads((good / "good.json").read_text())

    @MUTATE
    @given(st.data())
    def mutate(data):
        mutated = {**copy.deepcopy(truth), "root": str(good / "images")}
        edit(data, mutated)
        path.write_text(json.dumps(mutated))
        masks, semi = data.draw(st.booleans(), "masks"), data.draw(st.booleans(), "semi")
        check(entry, path, masks=masks, semi=semi)

    mutate()
    injected(COUNT)


# What a text begins with, what a piece of it becomes, and how it is written.
ODD_TEXT = (
    "[" * 100_000,
    "9" * 5000,
    "9" * 400,
    "NaN",
    "Infinity",
    "1e999",
    "\0",
    "\ufeff",
    "}",
    ",",
)
ENCODINGS = ("utf-16", "utf-8-sig", "latin-1", "utf-32", "cp1252")


def damaged(data: st.DataObject, text: str, odd: tuple[str, ...]) -> bytes:
    """Cut off, with changed bytes, with something in between or in another encoding."""
    kind = data.draw(st.sampled_from(["cut", "flip", "insert", "replace", "encode"]), "kind")
    at = data.draw(st.integers(0, len(text) - 1), "place")
    if kind == "cut":
        return text[:at].encode()
    if kind == "flip":
        raw = bytearray(text.encode())
        raw[at] ^= data.draw(st.sampled_from([1, 8, 32, 128, 255]))
        return bytes(raw)
    if kind == "encode":
        return text.replace("leaf", "Blättchen").encode(data.draw(st.sampled_from(ENCODINGS)))
    places = [m.span() for m in re.finditer(r"[\w.]+", text)]
    start, end = data.draw(st.sampled_from(places), "piece")
    if kind == "insert":
        end = start
    return f"{text[:start]}{data.draw(st.sampled_from(odd))}{text[end:]}".encode()


def test_coco_files_of_damaged_text(good, check, injected):
    entry, path = coco(good)
    text = (good / "good.json").read_text()

    @MUTATE
    @given(st.data())
    def mutate(data):
        path.write_bytes(damaged(data, text, ODD_TEXT))
        check(entry, path, masks=True, semi=False)

    mutate()
    injected(COUNT)


@pytest.mark.parametrize("key", ["images", "annotations", "categories", "id", "bbox", "file_name"])
def test_keys_that_are_there_twice(good, check, injected, key):
    """The last one counts, for every reader."""
    injected(1)
    entry, path = coco(good)
    text = (good / "good.json").read_text()
    path.write_text(text.replace(f'"{key}": ', f'"{key}": 0, "{key}": '))
    assert check(entry, path, masks=True, semi=False) == ""


def test_polygons_that_are_none(good, check, injected):
    """Nothing is left to train on."""
    injected(1)
    entry, path = coco(good)
    truth = json.loads((good / "good.json").read_text())
    for annotation in truth["annotations"]:
        annotation["segmentation"] = [[1, 2, 3, 4]]
    path.write_text(json.dumps(truth))
    assert check(entry, path, masks=False, semi=False)


# ---- VOC folders ----

ODD_XML = (
    *(
        "",
        " ",
        "-1",
        "0",
        "nan",
        "inf",
        "1e400",
        "1e300",
        "9" * 400,
        "9" * 5000,
        "\u00b2",
        "\u0663",
    ),
    *(
        "<",
        "&",
        "&#0;",
        "&nothing;",
        "x",
        "size",
        "object",
        "bndbox",
        "name",
        "a b",
        "<a>" * 20_000,
    ),
)
BOMB = """<!DOCTYPE a [<!ENTITY e0 "lol">{}]><annotation>&e9;</annotation>"""
OUTSIDE = """<!DOCTYPE a [<!ENTITY a SYSTEM "file://{}">]><annotation>&a;</annotation>"""


@pytest.mark.parametrize("part", ["xml", "txt"])
def test_voc_folders_of_damaged_text(good, cfg, check, tmp_path, injected, part):
    root = tmp_path / "voc"
    shutil.copytree(good / "voc", root)
    files = {"xml": "Annotations/000000.xml", "txt": "ImageSets/Main/train.txt"}
    path = root / files[part]
    text = path.read_text()
    odd = ODD_XML if part == "xml" else ("/", "../000000", "a\0", "#", "000001", *ODD_XML[:8])

    @MUTATE
    @given(st.data())
    def mutate(data):
        path.write_bytes(damaged(data, text, odd))
        message = check(VOC(root=str(root)), root, masks=False, semi=data.draw(st.booleans()))
        # A list of other names names the files that are missing.
        assert not message or str(path) in message or part == "txt", message

    mutate()
    injected(COUNT)


def test_xml_files_that_refer_to_more(good, check, tmp_path, injected):
    """A text that would fill the memory, and one that would read another file."""
    injected(2)
    root = tmp_path / "voc"
    shutil.copytree(good / "voc", root)
    path = root / "Annotations" / "000000.xml"
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    for text in (BOMB.format(entities), OUTSIDE.format(good / "good.json")):
        path.write_text(text)
        assert str(path) in check(VOC(root=str(root)), root, masks=False, semi=False)


# ---- as real runs ----


def check_one_error(result: Result, *parts: str) -> None:
    assert result.code == 1, result.output[-3000:]
    assert "Traceback" not in result.output and "Logging error" not in result.output
    _, found, message = f"\n{result.output}".rpartition("\nerror: ")
    assert found and "\nerror: " not in f"\n{result.output}".removesuffix(f"\nerror: {message}")
    for part in parts:
        assert part in message


RUNS: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "half a character": (lambda t: t.replace("000000.jpg", "\\ud83d.jpg"), "is not JSON"),
    "cut off": (lambda t: t[: len(t) // 2], "is not JSON"),
    "no text": (lambda t: t.encode("utf-16"), "is not JSON"),
    "nested": (lambda t: "[" * 100_000, "nested too deeply"),
    "a mask that is none": (
        lambda t: t.replace('"segmentation": [[', '"segmentation": [["a", ', 1),
        "neither lists of lists",
    ),
    "a size of 400 digits": (lambda t: t.replace('"width": 96', f'"width": {HUGE}'), "'width'"),
}


@pytest.mark.parametrize("case", RUNS)
def test_runs_on_broken_files(run, config, good, tmp_path, injected, case):
    injected(1)
    edit, problem = RUNS[case]
    entry, path = coco(good)
    mutated = edit((good / "good.json").read_text())
    path.write_bytes(mutated if isinstance(mutated, bytes) else mutated.encode())
    before = contents(good)
    result = run(
        *("train_net.py", "--config-file", config, "OUTPUT_DIR", tmp_path / "run"),
        *("DATASETS.REGISTER", str([{"name": "mutated", **entry}])),
        *("DATASETS.TRAIN", "mutated", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1),
    )
    check_one_error(result, str(path), problem)
    assert contents(good) == before
    assert not list((tmp_path / "run").glob("*.pth"))


# ---- images that an evaluation can't read ----


@pytest.fixture
def evaluated(datasets, tmp_path, config) -> tuple:
    """A command line whose test images are a copy: the second of three is no image any more."""
    shutil.copytree(datasets / "leaves" / "val", tmp_path / "val")
    (tmp_path / "val" / "000001.jpg").write_text("no image")
    images = {"train": datasets / "leaves" / "train", "val": tmp_path / "val"}
    register = [
        {"name": name, "type": "coco", "json": f"leaves/{name}.json", "images": str(folder)}
        for name, folder in images.items()
    ]
    return (
        *("train_net.py", "--config-file", config, "OUTPUT_DIR", tmp_path / "run"),
        *("DATASETS.REGISTER", str(register), "DATASETS.TRAIN", "train", "DATASETS.TEST", "val"),
        *("SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_leaves_out_what_it_cannot_read(run, evaluated, tmp_path, injected, workers):
    injected(1)
    result = run(*evaluated, "DATALOADER.NUM_WORKERS", workers)
    assert result.code == 0, result.output[-3000:]
    bad = tmp_path / "val" / "000001.jpg"
    told = f"{bad} cannot be used: UnidentifiedImageError: not an image. It is scored as one in "
    lines = [line for line in result.output.splitlines() if told in line]
    assert len(lines) == 2  # in each evaluation
    assert all("DATALOADER.MAX_UNREADABLE is 100" in line for line in lines)
    assert (tmp_path / "run" / "model_final.pth").is_file()
    folder = tmp_path / "run" / "inference" / "val"
    found = json.loads((folder / "coco_instances_results.json").read_text())
    assert {record["image_id"] for record in found} == {1, 3}
    assert (folder / "results.json").is_file()


def test_too_many_that_an_evaluation_cannot_read(run, evaluated, tmp_path, injected):
    """The evaluation is the first; the checkpoint before it stays."""
    injected(1)
    result = run(*evaluated, "DATALOADER.MAX_UNREADABLE", 0)
    check_one_error(result, "unreadable images: 1, ", "DATALOADER.MAX_UNREADABLE is 0", "000001")
    assert (tmp_path / "run" / "model_0000000.pth").is_file()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU")
def test_unreadable_test_images_with_two_processes(run, evaluated, tmp_path, injected):
    """The first has images 1 and 2, the second has 3: both stop, though the first has met one."""
    injected(2)
    (tmp_path / "val" / "000002.jpg").write_text("no image")
    command = (evaluated[0], "--num-gpus", 2, *evaluated[1:], "DATALOADER.MAX_UNREADABLE", 1)
    result = run(*command)
    assert result.code == 1, result.output[-3000:]
    assert "Traceback" not in result.output
    assert "error: unreadable images: 2, but DATALOADER.MAX_UNREADABLE is 1" in result.output
