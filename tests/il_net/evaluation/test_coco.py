"""COCO metrics on hand-made pictures whose precision can be worked out on paper."""

import copy
import json
import logging
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import coco_evaluation
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import encode, frPyObjects

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.evaluation import scoring
from il_net.evaluation.build import build_evaluator
from il_net.evaluation.coco import COCOEvaluator

SIDE = 200
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


pytestmark = pytest.mark.usefixtures("clean_catalogs")


def rectangle(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def write(folder: Path, name: str, categories: dict[int, str], truths: dict[int, list]) -> dict:
    """A COCO file of pictures of 200 x 200 px; ``truths`` are {image: [(category, box)]}.

    Returns its entry for ``DATASETS.REGISTER``.
    """
    (folder / "pictures").mkdir(exist_ok=True)
    for image_id in truths:
        (folder / "pictures" / f"{image_id}.jpg").touch()
    rows = [(i, c, b) for i, marks in truths.items() for c, b in marks]
    data = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": SIDE, "height": SIDE} for i in truths
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": rectangle(*box),
            }
            for number, (image_id, category, box) in enumerate(rows, 1)
        ],
        "categories": [{"id": c, "name": n} for c, n in categories.items()],
    }
    (folder / f"{name}.json").write_text(json.dumps(data))
    return {"name": name, "type": "coco", "json": f"{name}.json", "images": "pictures"}


def register(*entries: dict, train: str, test: str):
    cfg = load_config("", ["DATASETS.TRAIN", train, "DATASETS.TEST", test])
    cfg.DATASETS.REGISTER = list(entries)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    register_datasets(cfg)
    return cfg


def predict(rows: list[tuple[int, tuple, float]]) -> Instances:
    """Predictions (class index, x-y-width-height box, score) with filled rectangles as masks."""
    instances = Instances((SIDE, SIDE))
    boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h), _ in rows]).reshape(-1, 4)
    instances.pred_boxes = Boxes(boxes.float())
    instances.pred_classes = torch.tensor([c for c, _, _ in rows], dtype=torch.int64)
    instances.scores = torch.tensor([s for _, _, s in rows], dtype=torch.float32)
    masks = np.zeros((len(rows), SIDE, SIDE), dtype=bool)
    for mask, (_, (x, y, w, h), _) in zip(masks, rows, strict=True):
        mask[int(y) : int(y + h), int(x) : int(x + w)] = True
    instances.pred_masks = torch.as_tensor(masks)
    return instances


def evaluate(evaluator: COCOEvaluator, predictions: dict[int, list]) -> dict[str, dict]:
    evaluator.reset()
    for image_id, rows in predictions.items():
        evaluator.process([{"image_id": image_id}], [{"instances": predict(rows)}])
    return evaluator.evaluate()


CATEGORIES = {1: "leaf", 2: "rust", 3: "blight"}
# One leaf of 100 x 100 (large: above 96 x 96), two rusts and a blight of 50 x 50 (medium).
TRUTHS = {
    1: [(1, (10, 10, 100, 100)), (2, (120, 120, 50, 50))],
    2: [(2, (20, 20, 50, 50)), (3, (100, 20, 50, 50))],
}


def as_predictions(truths: dict[int, list], class_of: dict[int, int], score: float = 0.9) -> dict:
    return {i: [(class_of[c], b, score) for c, b in marks] for i, marks in truths.items()}


@pytest.mark.parametrize("ids", [(1, 2, 3), (3, 7, 90)], ids=["ids 1 2 3", "gaps in the ids"])
def test_perfect_predictions(tmp_path, ids):
    renumber = dict(zip((1, 2, 3), ids, strict=True))
    categories = {renumber[c]: name for c, name in CATEGORIES.items()}
    truths = {i: [(renumber[c], b) for c, b in marks] for i, marks in TRUTHS.items()}
    entry = write(tmp_path, "val", categories, truths)
    cfg = register(entry, train="val", test="val")
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    evaluator = build_evaluator(cfg, "val")
    class_of = {category: index for index, category in enumerate(ids)}
    results = evaluate(evaluator, as_predictions(truths, class_of))
    assert set(results) == {"bbox", "segm"}
    for metrics in results.values():
        for name in ("leaf", "rust", "blight"):
            assert metrics[f"AP-{name}"] == pytest.approx(100)
            assert metrics[f"AP50-{name}"] == pytest.approx(100)
        for name in ("AP", "AP50", "AP75", "APm", "APl"):
            assert metrics[name] == pytest.approx(100)
        assert math.isnan(metrics["APs"])  # there is no small object
    # The predictions are written with the ids of the file.
    written = tmp_path / "out" / "inference" / "val" / "coco_instances_results.json"
    assert sorted(r["category_id"] for r in json.loads(written.read_text())) == sorted(
        renumber[c] for marks in TRUTHS.values() for c, _ in marks
    )


def test_one_false_positive_above_a_true_positive(tmp_path):
    """Class rust has two truths; its ranking is false (0.9), true (0.8), true (0.7).

    Precision after each true positive is 1/2 at recall 1/2 and 2/3 at recall 1. COCO takes at each
    of the 101 recalls the best precision further right: 2/3 everywhere. So AP = AP50 = 66.7 for
    rust, 100 for the other two, and the mean is (100 + 100 + 66.7) / 3 = 88.9.
    """
    register(write(tmp_path, "val", CATEGORIES, TRUTHS), train="val", test="val")
    predictions = {
        1: [(0, (10, 10, 100, 100), 0.9), (1, (150, 0, 40, 40), 0.9), (1, (120, 120, 50, 50), 0.8)],
        2: [(1, (20, 20, 50, 50), 0.7), (2, (100, 20, 50, 50), 0.9)],
    }
    results = evaluate(COCOEvaluator("val", output_dir=str(tmp_path)), predictions)
    for metrics in results.values():
        assert metrics["AP-rust"] == pytest.approx(200 / 3)
        assert metrics["AP50-rust"] == pytest.approx(200 / 3)
        assert metrics["AP-leaf"] == metrics["AP-blight"] == pytest.approx(100)
        assert metrics["AP"] == pytest.approx(800 / 9)
        assert metrics["AP50"] == pytest.approx(800 / 9)


def test_false_positive_between_two_true_positives(tmp_path):
    """True (0.9), false (0.8), true (0.7): precision 1 up to recall 1/2, then 2/3.

    Of the 101 recalls 0, 0.01, ..., 1 those up to 0.5 are 51: (51 + 50 * 2/3) / 101 = 83.5.
    """
    register(write(tmp_path, "val", CATEGORIES, TRUTHS), train="val", test="val")
    rows = {
        1: [(1, (120, 120, 50, 50), 0.9), (1, (150, 0, 40, 40), 0.8)],
        2: [(1, (20, 20, 50, 50), 0.7)],
    }
    results = evaluate(COCOEvaluator("val", output_dir=str(tmp_path)), rows)
    for metrics in results.values():
        assert metrics["AP50-rust"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
        # Nothing found of the others: zero, not missing.
        assert metrics["AP-leaf"] == metrics["AP-blight"] == 0.0


def test_shifted_box_counts_up_to_its_iou(tmp_path):
    """Leaf 100 x 100 found 20 px too far right: IoU = 80 / 120 = 0.667.

    True at the thresholds 0.5, 0.55, 0.6 and 0.65, false at the other six: AP 40, AP50 100, AP75 0.
    """
    register(write(tmp_path, "val", {1: "leaf"}, {1: TRUTHS[1][:1]}), train="val", test="val")
    results = evaluate(
        COCOEvaluator("val", output_dir=str(tmp_path)), {1: [(0, (30, 10, 100, 100), 0.9)]}
    )
    for metrics in results.values():
        assert metrics["AP-leaf"] == metrics["AP"] == pytest.approx(40)
        assert metrics["AP50-leaf"] == metrics["AP50"] == pytest.approx(100)
        assert metrics["AP75"] == 0.0


def test_file_under_test_without_the_middle_class(tmp_path, caplog):
    """The model knows leaf, rust, blight; the test file has leaf and blight, numbered 1 and 2."""
    truths = {1: [(1, (10, 10, 100, 100)), (2, (120, 120, 50, 50))]}
    register(
        write(tmp_path, "train", CATEGORIES, TRUTHS),
        write(tmp_path, "val", {1: "leaf", 2: "blight"}, truths),
        train="train",
        test="val",
    )
    evaluator = COCOEvaluator("val", output_dir=str(tmp_path / "out"))
    # Class 1, rust, is found as well: there is no truth for it, so it does not count.
    rows = [
        (0, (10, 10, 100, 100), 0.9),
        (1, (20, 20, 50, 50), 0.9),
        (2, (120, 120, 50, 50), 0.9),
    ]
    with caplog.at_level(logging.INFO, logger="il_net.evaluation.coco"):
        results = evaluate(evaluator, {1: rows})
    for metrics in results.values():
        assert metrics["AP"] == pytest.approx(100)
        assert metrics["AP-leaf"] == metrics["AP-blight"] == pytest.approx(100)
        assert {name for name in metrics if "-" in name} == {
            "AP-leaf",
            "AP50-leaf",
            "AP-blight",
            "AP50-blight",
        }
    tables = [r.getMessage() for r in caplog.records if "Per-class" in r.getMessage()]
    assert len(tables) == 2
    assert all("leaf" in t and "blight" in t and "rust" not in t for t in tables)


def test_confused_classes_score_nothing(tmp_path):
    register(write(tmp_path, "val", CATEGORIES, TRUTHS), train="val", test="val")
    wrong = as_predictions(TRUTHS, {1: 1, 2: 2, 3: 0})
    results = evaluate(COCOEvaluator("val", output_dir=str(tmp_path)), wrong)
    assert results["bbox"]["AP"] == results["segm"]["AP"] == 0.0


def test_class_of_the_file_without_an_instance_is_not_in_the_mean(tmp_path):
    truths = {1: TRUTHS[1]}  # no blight
    register(write(tmp_path, "val", CATEGORIES, truths), train="val", test="val")
    results = evaluate(
        COCOEvaluator("val", output_dir=str(tmp_path)), as_predictions(truths, {1: 0, 2: 1})
    )
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert math.isnan(results["bbox"]["AP-blight"])
    assert math.isnan(results["bbox"]["AP50-blight"])


def test_per_class_table_shows_instances(tmp_path, caplog):
    register(write(tmp_path, "val", CATEGORIES, TRUTHS), train="val", test="val")
    with caplog.at_level(logging.INFO, logger="il_net.evaluation.coco"):
        evaluate(
            COCOEvaluator("val", output_dir=str(tmp_path)),
            as_predictions(TRUTHS, {1: 0, 2: 1, 3: 2}),
        )
    table = next(r.getMessage() for r in caplog.records if "bbox" in r.getMessage())
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[3:]]
    assert rows == [
        ["leaf", "100.00", "100.00", "1"],
        ["rust", "100.00", "100.00", "2"],
        ["blight", "100.00", "100.00", "1"],
    ]


def test_no_predictions_give_nan(tmp_path):
    register(write(tmp_path, "val", CATEGORIES, TRUTHS), train="val", test="val")
    results = evaluate(COCOEvaluator("val", output_dir=str(tmp_path)), {1: [], 2: []})
    assert set(results["bbox"]) >= set(METRICS)
    assert all(math.isnan(value) for value in results["bbox"].values())


def test_one_class_has_its_row_too(tmp_path):
    """Detectron2 leaves the per-class table out for a single class."""
    register(
        write(tmp_path, "val", {5: "leaf"}, {1: [(5, (0, 0, 50, 50))]}), train="val", test="val"
    )
    results = evaluate(
        COCOEvaluator("val", output_dir=str(tmp_path)), {1: [(0, (0, 0, 50, 50), 0.9)]}
    )
    assert results["bbox"]["AP-leaf"] == pytest.approx(100)


# ---- masks ranked by a score of their own ----

LEAF = (10, 10, 100, 100)
# The class score puts a box beside the leaf before the leaf's own; the mask score does not.
RANKED = [(0, LEAF, 0.6), (0, (130, 130, 50, 50), 0.9)]
MASK_SCORES = [0.5, 0.25]


def make_evaluator(tmp_path: Path, *, images: int = 1, box: tuple = LEAF) -> COCOEvaluator:
    truths = {image_id: [(4, box)] for image_id in range(1, images + 1)}
    entry = write(tmp_path, "val", {4: "leaf"}, truths)
    register(entry, train="val", test="val")
    evaluator = COCOEvaluator("val", output_dir=str(tmp_path / "out"))
    evaluator.reset()
    return evaluator


def process(evaluator: COCOEvaluator, image_id: int, rows: list, mask_scores: list | None) -> None:
    instances = predict(rows)
    if mask_scores is not None:
        instances.mask_scores = torch.tensor(mask_scores)
    evaluator.process([{"image_id": image_id}], [{"instances": instances}])


def read(tmp_path: Path, name: str) -> list | dict:
    return json.loads((tmp_path / "out" / name).read_text())


def test_boxes_are_ranked_by_class_score_and_masks_by_their_own(tmp_path):
    """False then true: precision 1/2 at every recall. True then false: precision 1."""
    evaluator = make_evaluator(tmp_path)
    process(evaluator, 1, RANKED, MASK_SCORES)
    results = evaluator.evaluate()
    assert list(results) == ["bbox", "segm"]
    for name in ("AP", "AP50", "AP75", "AP-leaf", "AP50-leaf"):
        assert results["bbox"][name] == pytest.approx(50)
        assert results["segm"][name] == pytest.approx(100)


def test_without_mask_scores_both_are_ranked_by_class_score(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "coco_instances_results_segm.json").write_text("[]")  # an earlier model's
    evaluator = make_evaluator(tmp_path)
    process(evaluator, 1, RANKED, None)
    results = evaluator.evaluate()
    assert results["bbox"]["AP50"] == results["segm"]["AP50"] == pytest.approx(50)
    assert all("mask_score" not in r for r in read(tmp_path, "coco_instances_results.json"))
    assert not (tmp_path / "out" / "coco_instances_results_segm.json").exists()


def test_predictions_with_mask_scores_are_written_twice(tmp_path):
    evaluator = make_evaluator(tmp_path)
    process(evaluator, 1, RANKED, MASK_SCORES)
    evaluator.evaluate()
    by_class = read(tmp_path, "coco_instances_results.json")
    by_mask = read(tmp_path, "coco_instances_results_segm.json")
    assert [r["score"] for r in by_class] == pytest.approx([0.6, 0.9])
    assert [r["mask_score"] for r in by_class] == MASK_SCORES
    assert [r["score"] for r in by_mask] == MASK_SCORES
    for records in (by_class, by_mask):
        assert [r["category_id"] for r in records] == [4, 4]
        assert [r["bbox"] for r in records] == [[10, 10, 100, 100], [130, 130, 50, 50]]
        assert all(r["segmentation"]["size"] == [SIDE, SIDE] for r in records)


def test_small_medium_large_follow_the_masks_area(tmp_path):
    """The leaf, 100 x 50, is medium. A wrong mask of 50 x 50 in a box of 100 x 100 goes before it:
    medium as well, so precision 1/2; by its box it would be large and not count."""
    evaluator = make_evaluator(tmp_path, box=(10, 10, 100, 50))
    instances = predict([(0, (10, 10, 100, 50), 0.9), (0, (90, 90, 100, 100), 0.6)])
    instances.pred_masks[1, 140:] = False
    instances.pred_masks[1, :, 140:] = False
    instances.mask_scores = torch.tensor([0.25, 0.5])
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    results = evaluator.evaluate()
    assert results["bbox"]["APm"] == pytest.approx(100)
    assert results["segm"]["APm"] == pytest.approx(50)


@pytest.fixture(scope="module")
def messy_truth(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A COCO file of 40 pictures, and predictions for it as COCO results.

    Crowds (RLE), a picture and a class without truth, a class without predictions, equal scores,
    exact duplicates, boxes out of the picture, 130 predictions in one picture.
    """
    random = np.random.default_rng(3)

    def box(largest: float) -> list[float]:
        x, y, w, h = random.uniform(size=4) * [SIDE, SIDE, largest, largest]
        return [round(float(v), 2) for v in (x, y, w + 2, h + 2)]

    truths, found = [], []
    for image in range(1, 41):
        for _ in range(0 if image == 7 else random.integers(1, 9)):
            mark = box(120 if image % 2 else 20)
            truth = {"image_id": image, "category_id": int(random.integers(1, 5)), "iscrowd": 0}
            truth |= {"bbox": mark, "area": mark[2] * mark[3], "segmentation": rectangle(*mark)}
            if random.uniform() < 0.15:
                mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
                x, y, w, h = map(int, mark)
                mask[y : y + h, x : x + w] = 1
                rle = encode(mask)
                truth["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
                truth["iscrowd"] = 1
            truths.append({"id": len(truths) + 1, **truth})
            for _ in range(random.integers(0, 4)):  # near it, some with a score that others have
                near = [float(v) for v in np.array(mark) + random.normal(size=4) * 2]
                near[2:] = [max(v, 1.0) for v in near[2:]]
                score = round(float(random.uniform()), 1)
                found.append((image, truth["category_id"], near, score))
    found += [(3, 2, box(60), float(score)) for score in random.uniform(size=130)]
    found += found[:20]
    found = [f for f in found if f[1] != 4] + [(1, 5, box(60), 0.5)]
    data = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": SIDE, "height": SIDE} for i in range(1, 41)
        ],
        "annotations": truths,
        "categories": [{"id": c, "name": f"class {c}"} for c in range(1, 6)],
    }
    path = tmp_path_factory.mktemp("messy") / "truth.json"
    path.write_text(json.dumps(data))
    results = [
        {"image_id": i, "category_id": c, "bbox": b, "score": s, "segmentation": rle_of(b)}
        for i, c, b, s in found
    ]
    return path, results


def rle_of(box: list[float]) -> dict:
    rle = frPyObjects(rectangle(*box), SIDE, SIDE)[0]
    return {"size": rle["size"], "counts": rle["counts"].decode()}


@pytest.mark.parametrize("images", [None, [3, 7, *range(20, 35)]], ids=["all", "some"])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_faster_coco_eval_gives_what_pycocotools_gives(task, images, messy_truth):
    fast = pytest.importorskip("faster_coco_eval").COCOeval_faster
    path, results = messy_truth
    scored = []
    for kind in (COCOeval, fast):
        # As Detectron2 calls it: without boxes, so that masks have the size of their area.
        kept = ("image_id", "category_id", "score", "bbox" if task == "bbox" else "segmentation")
        truth = COCO(str(path))  # anew, for pycocotools turns its polygons into RLE
        given = [{key: copy.deepcopy(result[key]) for key in kept} for result in results]
        scored.append(kind(truth, truth.loadRes(given), task))
        if images is not None:
            scored[-1].params.imgIds = images
        scored[-1].evaluate()
        scored[-1].accumulate()
        scored[-1].summarize()
    slow, fast = scored
    assert 0.05 < slow.stats[0] < 0.95  # neither trivial nor perfect
    np.testing.assert_allclose(fast.stats[:12], slow.stats, rtol=0, atol=1e-6)
    for name in ("precision", "recall", "scores"):
        assert fast.eval[name].shape == slow.eval[name].shape
        np.testing.assert_allclose(fast.eval[name], slow.eval[name], rtol=0, atol=1e-6)


@pytest.fixture
def used_scorings(monkeypatch) -> list[type]:
    """The class of every scoring that was run."""
    fast = pytest.importorskip("faster_coco_eval").COCOeval_faster
    used = []
    for kind in (COCOeval, fast):
        evaluate = kind.evaluate
        monkeypatch.setattr(
            kind, "evaluate", lambda self, run=evaluate: used.append(type(self)) or run(self)
        )
    return used


def is_fast(used: list[type]) -> bool:
    (kind,) = set(used)
    return kind.__module__.startswith("faster_coco_eval")


@pytest.mark.parametrize("installed", [True, False])
def test_which_package_scores(installed, tmp_path, monkeypatch, used_scorings, caplog):
    if not installed:
        monkeypatch.setattr(scoring, "COCOeval_faster", None)
    evaluator = make_evaluator(tmp_path)
    process(evaluator, 1, [(0, LEAF, 0.9)], None)
    before = coco_evaluation.COCOeval_opt
    with caplog.at_level(logging.INFO, logger="il_net"):
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    assert len(used_scorings) == 2  # boxes, masks
    assert is_fast(used_scorings) == installed
    assert coco_evaluation.COCOeval_opt is before  # Detectron2's own evaluators keep theirs
    # What pycocotools prints is in the log: six precisions and recalls of boxes, as many of masks.
    lines = re.findall(r"Average (?:Precision|Recall) .*maxDets= *\d+ ] = [-\d.]+", caplog.text)
    assert len([x for x in lines if "0.50:0.95" in x or "Prec" in x]) == (24 if installed else 0)


@pytest.mark.parametrize(
    ("image", "annotation", "fast"),
    [
        (0, 1, True),
        (2**53, 2**53, True),
        ("photo", 1, False),
        (-4, 1, False),
        (2**53 + 1, 1, False),
        (4, -1, False),
        (4, 2**53 + 1, False),
    ],
)
def test_ids_that_faster_coco_eval_cannot_take(image, annotation, fast, tmp_path, used_scorings):
    entry = write(tmp_path, "odd", {1: "leaf"}, {9: [(1, LEAF)]})
    path = tmp_path / "odd.json"
    data = json.loads(path.read_text())
    data["images"][0]["id"] = data["annotations"][0]["image_id"] = image
    data["annotations"][0]["id"] = annotation
    path.write_text(json.dumps(data))
    register(entry, train="odd", test="odd")
    evaluator = COCOEvaluator("odd", output_dir=str(tmp_path / "out"))
    evaluator.reset()
    process(evaluator, image, [(0, LEAF, 0.9)], None)
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert is_fast(used_scorings) == fast


def test_an_evaluator_may_be_used_again(tmp_path):
    """EvalHook makes a new one each time; others may not."""
    evaluator = make_evaluator(tmp_path)
    for mask_scores, expected in ((MASK_SCORES, 100), (None, 50), (MASK_SCORES, 100)):
        evaluator.reset()
        process(evaluator, 1, RANKED, mask_scores)
        assert evaluator.evaluate()["segm"]["AP50"] == pytest.approx(expected)


def test_predictions_of_several_processes_are_put_together(tmp_path, monkeypatch):
    """Three images with a leaf each; the other process finds that of the second."""
    evaluator = make_evaluator(tmp_path, images=3)
    process(evaluator, 2, [(0, LEAF, 0.6)], [0.5])
    process(evaluator, 3, [], [])
    sent = pickle.loads(pickle.dumps(evaluator._predictions))
    with monkeypatch.context() as other:
        other.setattr("detectron2.utils.comm.is_main_process", lambda: False)
        assert evaluator.evaluate() == {}
    assert not (tmp_path / "out").exists()
    evaluator.reset()
    process(evaluator, 1, RANKED, MASK_SCORES)
    monkeypatch.setattr("detectron2.utils.comm.gather", lambda data, dst: [data, sent])
    results = evaluator.evaluate()
    # Two of three leaves: 67 of the 101 recalls are up to 2/3. Boxes: false, true, true, precision
    # 2/3 in the end and interpolated before; masks: true, true, false.
    assert results["bbox"]["AP50"] == pytest.approx(100 * 67 * 2 / 3 / 101)
    assert results["segm"]["AP50"] == pytest.approx(100 * 67 / 101)


# ---- results.json ----


def test_results_are_written_with_null_for_what_is_not_defined(tmp_path):
    evaluator = make_evaluator(tmp_path)
    process(evaluator, 1, RANKED, MASK_SCORES)
    results = evaluator.evaluate()
    assert math.isnan(results["bbox"]["APs"])  # there is no small leaf; callers still get NaN
    written = read(tmp_path, "results.json")
    assert written["bbox"]["APs"] is None
    assert written["bbox"]["AP"] == pytest.approx(50)
    assert written["segm"]["AP50-leaf"] == pytest.approx(100)
    assert {task: set(row) for task, row in written.items()} == {
        task: set(row) for task, row in results.items()
    }
    assert "NaN" not in (tmp_path / "out" / "results.json").read_text()


def test_results_of_an_evaluation_without_pictures_are_written_too(tmp_path):
    evaluator = make_evaluator(tmp_path)
    assert evaluator.evaluate() == {}
    assert read(tmp_path, "results.json") == {}


# ---- which evaluator ----


def test_other_kinds_of_truth_are_refused_by_name(tmp_path):
    MetadataCatalog.get("made_up_lvis").set(evaluator_type="lvis")
    try:
        with pytest.raises(ValueError, match=r"DATASETS\.TEST: made_up_lvis .*'lvis'"):
            build_evaluator(load_config("", []), "made_up_lvis")
    finally:
        MetadataCatalog.pop("made_up_lvis")
