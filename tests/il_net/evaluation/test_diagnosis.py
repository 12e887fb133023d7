"""What a diagnosis counts and draws, against counts by hand, by plain loops and by pycocotools."""

import contextlib
import copy
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.data.synthetic import generate
from il_net.evaluation import diagnosis, diagnosis_figures
from sbr_cnn import add_sbr_cnn_config
from sbr_cnn.schedule import LoopSchedule

pytestmark = pytest.mark.usefixtures("clean_catalogs")

BACKBONE = ["res2", "res3", "res4", "res5"]
SIZES = [[8], [16], [32], [48], [64]]
TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.MASK_ON", True),
    *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 8),
    *("MODEL.RESNETS.OUT_FEATURES", BACKBONE, "MODEL.FPN.IN_FEATURES", BACKBONE),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.ANCHOR_GENERATOR.SIZES", SIZES),
    *("MODEL.PIXEL_STD", [60.0, 60.0, 60.0]),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 200, "MODEL.RPN.POST_NMS_TOPK_TEST", 60),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 0, "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 10),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
    *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 1),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14, "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 1),
    *("INPUT.MIN_SIZE_TEST", 80, "INPUT.MAX_SIZE_TEST", 200, "DATALOADER.NUM_WORKERS", 0),
]
STANDARD = [
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
]
EXTRACTOR = [*STANDARD, "MODEL.ROI_HEADS.NAME", "ExtractorROIHeads"]
LOOPED = [
    *("MODEL.ROI_HEADS.NAME", "LoopROIHeads", "MODEL.ROI_MASK_HEAD.NAME", "LoopMaskHead"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
]
CASCADE = [
    *STANDARD,
    *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def leaves(tmp_path_factory) -> Path:
    """Three pictures of 100 x 150 px: shrunk to 80 x 120 and padded to 96 x 128."""
    root = tmp_path_factory.mktemp("leaves")
    generate(root, num_images=3, image_size=(100, 150), name="val")
    return root


def load(entry: dict, output: Path, *options: object) -> CfgNode:
    cfg = load_config("", [str(o) for o in (*TINY, *options)], add_sbr_cnn_config)
    cfg.DATASETS.REGISTER = [entry]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (entry["name"],)
    cfg.OUTPUT_DIR = str(output)
    register_datasets(cfg)
    return cfg


@pytest.fixture
def make(leaves, tmp_path) -> Callable[..., CfgNode]:
    """``make(KEY, VALUE, ...)``: a configuration whose dataset ``val`` is the leaves."""
    entry = {"name": "val", "type": "coco", "json": str(leaves / "val.json")}
    entry["images"] = str(leaves / "val")
    return lambda *options: load(entry, tmp_path / "out", *options)


@pytest.fixture
def truth(leaves) -> dict:
    return json.loads((leaves / "val.json").read_text())


def shaken(cfg: CfgNode) -> nn.Module:
    """An untrained detector whose boxes move from loop to loop."""
    model = build_model(cfg).eval()
    for name, parameter in model.named_parameters():
        if "bbox_pred" in name or "anchor_deltas" in name:
            nn.init.normal_(parameter, std=0.5 if "bbox_pred" in name else 0.02)
    return model


def overlap(a: list[float], b: list[float]) -> float:
    """IoU of two boxes x1, y1, x2, y2."""
    sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    both = sides[0] * sides[1]
    return both / (sum(areas) - both) if both else 0.0


def bin_of(iou: float) -> int:
    """How many of 0.05, 0.1, ... 0.95 it reaches."""
    return sum(iou >= edge / 100 - 1e-6 for edge in range(5, 100, 5))


def scaled_truth(truth: dict, image_id: int) -> list[list[float]]:
    """An image's boxes as the model sees them: 100 x 150 px shrunk to 80 x 120."""
    boxes = [a["bbox"] for a in truth["annotations"] if a["image_id"] == image_id]
    return [[0.8 * v for v in (x, y, x + w, y + h)] for x, y, w, h in boxes]


# ---- bins and images ----


def test_bins_of_edges():
    """0.3 and 0.7 times 20 are below 6 and 14 in float32."""
    ious = torch.tensor([0.0, 0.0499, 0.05, 0.3, 0.6999, 0.7, 0.95, 1.0])
    assert diagnosis.iou_bins(ious).tolist() == [0, 0, 1, 6, 13, 14, 19, 19]


def test_images_are_scaled_with_their_boxes(make, truth):
    images = list(diagnosis.labelled_images(make(*STANDARD), "val", 10))
    assert [image["image_id"] for image in images] == [1, 2, 3]
    for image in images:
        assert image["image"].shape == (3, 80, 120)
        expected = scaled_truth(truth, image["image_id"])
        assert image["instances"].gt_boxes.tensor.tolist() == [
            pytest.approx(box, abs=1e-3) for box in expected
        ]


def test_images_are_a_fixed_draw_of_those_with_objects(tmp_path):
    """Images 1 to 40; the even ones have an object, image 40 only a crowd."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 64} for i in range(1, 41)]
    objects = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [8, 8, 20, 30], "area": 600,
         "iscrowd": int(i == 40)}
        for i in range(2, 41, 2)
    ]  # fmt: skip
    data = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "leaf"}]}
    (tmp_path / "val.json").write_text(json.dumps(data))
    (tmp_path / "pictures").mkdir()
    for image in images:
        path = tmp_path / "pictures" / image["file_name"]
        cv2.imwrite(str(path), np.zeros((64, 64, 3), np.uint8))
    cfg = load({"name": "val", "type": "coco", "json": "val.json", "images": "pictures"}, tmp_path)

    def draw(count: int) -> list[int]:
        return [image["image_id"] for image in diagnosis.labelled_images(cfg, "val", count)]

    assert draw(100) == list(range(2, 40, 2))  # no masks needed, though MODEL.MASK_ON
    few = draw(5)
    assert few == draw(5) == sorted(few)
    assert 4 <= len(few) <= 5  # the crowd may be among the five
    assert set(few) != {2, 4, 6, 8, 10}


@pytest.mark.parametrize(
    ("count", "title"),
    [(1, "1"), (2, "2-3"), (3, "2-3"), (4, "4-7"), (7, "4-7"), (8, "8-15"), (31, "16-31"),
     (32, "32 or more"), (400, "32 or more")],
)  # fmt: skip
def test_groups_of_images_by_their_objects(count, title):
    boxes = [{"bbox": [0, 0, 1, 1]}] * count
    records = [
        {"image_id": 7, "annotations": [*boxes, {"iscrowd": 1}]},
        {"image_id": "crowd", "annotations": [{"iscrowd": 1}]},
        {"image_id": "empty", "annotations": []},
        {"image_id": "unlabelled"},
    ]
    DatasetCatalog.register("counted", lambda: records)
    assert diagnosis.images_by_count("counted") == {title: [7]}


def test_groups_of_images_are_in_order():
    counts = {"a": 40, "b": 1, "c": 5, "d": 1}
    records = [{"image_id": i, "annotations": [{}] * n} for i, n in counts.items()]
    DatasetCatalog.register("counted", lambda: records)
    found = diagnosis.images_by_count("counted")
    assert list(found.items()) == [("1", ["b", "d"]), ("4-7", ["c"]), ("32 or more", ["a"])]


# ---- anchors ----


def anchors_by_hand(model: nn.Module, image: dict) -> list[list[float]]:
    """Detectron2's rule on the model's own maps: centres at multiples of the stride."""
    with torch.no_grad():
        maps = model.backbone(model.preprocess_image([image]).tensor)
    anchors = []
    for level, ((side,), stride) in enumerate(zip(SIZES, (4, 8, 16, 32, 64), strict=True), 2):
        for row in range(maps[f"p{level}"].shape[2]):
            for column in range(maps[f"p{level}"].shape[3]):
                for ratio in (0.5, 1.0, 2.0):  # height / width
                    w, h = side / math.sqrt(ratio), side * math.sqrt(ratio)
                    x, y = column * stride, row * stride
                    anchors.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return anchors


def test_objects_without_anchor(make, truth):
    cfg = make(*STANDARD)
    model = build_model(cfg).eval()
    images = list(diagnosis.labelled_images(cfg, "val", 10))
    without, best, objects = np.zeros(20), [0] * 20, 0
    for image in images:
        anchors = anchors_by_hand(model, image)
        for box in scaled_truth(truth, image["image_id"]):
            ious = [overlap(box, anchor) for anchor in anchors]
            reached = {bin_of(iou) for iou in ious}
            without += [number not in reached for number in range(20)]
            best[bin_of(max(ious))] += 1
            objects += 1
    found = diagnosis.unmatched_by_anchors(model, iter(images))
    assert found["objects"] == objects > 5
    assert found["without_anchor"] == pytest.approx((without / objects).tolist())
    assert found["best"] == best
    assert found["without_anchor"][0] == 0 and found["without_anchor"][-1] > 0.5


def test_no_images_no_objects(make):
    model = build_model(make(*STANDARD)).eval()
    found = diagnosis.unmatched_by_anchors(model, iter([]))
    assert found == {"objects": 0, "without_anchor": [0.0] * 20, "best": [0] * 20}
    assert diagnosis.loop_histograms(model, iter([])) == []


# ---- proposals ----


def clipped(boxes: Tensor) -> Tensor:
    return torch.stack([boxes[:, 0].clamp(0, 120), boxes[:, 1].clamp(0, 80),
                        boxes[:, 2].clamp(0, 120), boxes[:, 3].clamp(0, 80)], dim=1)  # fmt: skip


@torch.no_grad()
def boxes_by_hand(model: nn.Module, image: dict) -> list[Tensor]:
    """The boxes that enter each loop or stage, by the heads' parts."""
    images = model.preprocess_image([image])
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    heads, boxes = model.roi_heads, proposals[0].proposal_boxes.tensor
    maps = [features[name] for name in ("p2", "p3", "p4", "p5")]
    if hasattr(heads, "schedule"):
        parts = [heads.pairs[letter] for letter in heads.schedule.test]
        stages = [(part.box_pooler, part.box_head, part.box_predictor) for part in parts]
    elif isinstance(heads.box_head, nn.ModuleList):
        stages = [
            (heads.box_pooler, *rest)
            for rest in zip(heads.box_head, heads.box_predictor, strict=True)
        ]
    else:
        stages = [(heads.box_pooler, heads.box_head, heads.box_predictor)]
    entered = [boxes]
    for pooler, head, predictor in stages[:-1]:
        _, deltas = predictor(head(pooler(maps, [Boxes(boxes)])))
        boxes = clipped(predictor.box2box_transform.apply_deltas(deltas, boxes))
        entered.append(boxes)
    return entered


@pytest.mark.parametrize(
    ("options", "loops"),
    [
        (STANDARD, 1),
        (EXTRACTOR, 1),
        ([*EXTRACTOR, "MODEL.ROI_BOX_HEAD.EXTRACTOR", "groie"], 1),
        (LOOPED, 3),
        ([*LOOPED, "MODEL.ROI_LOOP_HEAD.ORDER", "aba"], 3),
        ([*LOOPED, "MODEL.ROI_LOOP_HEAD.TEST_LOOPS", 5], 5),
        (CASCADE, 3),
        ([*LOOPED, "MODEL.MASK_ON", False], 3),
    ],
    ids=["standard", "extractor", "groie", "aaa", "aba", "five loops", "cascade", "no masks"],
)
def test_histograms_are_brute_force_counts(make, truth, options, loops):
    cfg = make(*options)
    model = shaken(cfg)
    images = list(diagnosis.labelled_images(cfg, "val", 10))
    expected = [[0] * 20 for _ in range(loops)]
    for image in images:
        entered = boxes_by_hand(model, image)
        assert len(entered) == loops
        for counts, boxes in zip(expected, entered, strict=True):
            for box in boxes.tolist():
                objects = scaled_truth(truth, image["image_id"])
                counts[bin_of(max(overlap(box, other) for other in objects))] += 1
    assert diagnosis.loop_histograms(model, iter(images)) == expected
    assert len({tuple(counts) for counts in expected}) == loops  # the boxes moved
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_heads_without_box_pooler_run_once_on_the_proposals(make, truth):
    """Detectron2's C4 model pools for the masks with the same module."""
    cfg = make(
        *("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.BACKBONE.NAME", "build_resnet_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", ["res4"], "MODEL.RPN.IN_FEATURES", ["res4"]),
        *("MODEL.ROI_HEADS.IN_FEATURES", ["res4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]]),
        *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    )
    model = shaken(cfg)
    images = list(diagnosis.labelled_images(cfg, "val", 10))
    expected = [0] * 20
    for image in images:
        with torch.no_grad():
            batch = model.preprocess_image([image])
            features = model.backbone(batch.tensor)
            (proposals,), _ = model.proposal_generator(batch, features, None)
        for box in proposals.proposal_boxes.tensor.tolist():
            objects = scaled_truth(truth, image["image_id"])
            expected[bin_of(max(overlap(box, other) for other in objects))] += 1
    assert diagnosis.loop_histograms(model, iter(images)) == [expected]
    anchors = diagnosis.unmatched_by_anchors(model, iter(images))
    assert anchors["objects"] == len(truth["annotations"])


@pytest.mark.parametrize(("options", "loops"), [(STANDARD, 1), (LOOPED, 3), (CASCADE, 3)])
def test_no_proposals(make, options, loops):
    cfg = make(*options)
    model = shaken(cfg)
    model.proposal_generator.min_box_size = 1e6
    images = diagnosis.labelled_images(cfg, "val", 10)
    assert diagnosis.loop_histograms(model, images) == [[0] * 20] * loops


def test_hooks_go_when_the_model_fails(make):
    model = shaken(make(*LOOPED))
    with pytest.raises(KeyError):
        diagnosis.loop_histograms(model, iter([{}]))
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- metrics ----


class Marksman(nn.Module):
    """Finds the objects of a COCO file, each a bit beside it; farther off in every other loop.

    Args:
        truth: the file's content.
        masks: detections have masks.
        mask_scores: and their masks a score of their own.
        blind: image ids without detections.
    """

    def __init__(
        self, truth: dict, masks: bool = True, mask_scores: bool = False, blind: tuple = ()
    ) -> None:
        super().__init__()
        self.truth, self.masks, self.mask_scores, self.blind = truth, masks, mask_scores, blind
        schedule = LoopSchedule("aaa", (0.5, 0.6, 0.7), (1.0, 0.75, 0.5))
        self.roi_heads = SimpleNamespace(schedule=schedule)

    def forward(self, inputs: list[dict]) -> list[dict]:
        return [{"instances": self.find(**image)} for image in inputs]

    def find(self, image_id: object, height: int, width: int, **_) -> Instances:
        random = np.random.default_rng(len(str(image_id)) + 10 * hash_of(image_id))
        far = 0.06 * (1 + abs(len(self.roi_heads.schedule.test) - 2))
        marks = [a for a in self.truth["annotations"] if a["image_id"] == image_id]
        marks = [] if image_id in self.blind else marks
        boxes = np.array([m["bbox"] for m in marks], np.float32).reshape(-1, 4)
        boxes[:, :2] += random.uniform(0, far, (len(boxes), 2)) * boxes[:, 2:]
        boxes[:, 2:] += boxes[:, :2]
        found = Instances((height, width), pred_boxes=Boxes(torch.tensor(boxes)))
        found.scores = torch.tensor(random.uniform(0.1, 1, len(boxes)), dtype=torch.float32)
        wrong = random.uniform(size=len(boxes)) < 0.2
        categories = sorted(c["id"] for c in self.truth["categories"])
        classes = [categories.index(m["category_id"]) for m in marks]
        found.pred_classes = torch.tensor(
            [(c + w) % len(categories) for c, w in zip(classes, wrong, strict=True)],
            dtype=torch.long,
        )
        if self.masks:
            x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
            x1, y1, x2, y2 = torch.tensor(boxes).view(-1, 4, 1, 1).unbind(1)
            found.pred_masks = (x > x1) & (x < x2) & (y > y1) & (y < y2)
        if self.mask_scores:
            found.mask_scores = 1.1 - found.scores
        return found


def hash_of(image_id: object) -> int:
    return sum(str(image_id).encode())


def pycocotools_ap(document: dict, records: list[dict], task: str, folder: Path) -> float:
    """AP of a file that has only the images of this document."""
    path = folder / "alone.json"
    path.write_text(json.dumps(document))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        scoring = COCOeval(truth, truth.loadRes(copy.deepcopy(records)), task)
        scoring.evaluate()
        scoring.accumulate()
    precision = scoring.eval["precision"][:, :, :, 0, 2]
    return float(precision[precision > -1].mean()) * 100


def only(document: dict, ids: set) -> dict:
    return {
        **document,
        "images": [i for i in document["images"] if i["id"] in ids],
        "annotations": [a for a in document["annotations"] if a["image_id"] in ids],
    }


@pytest.mark.parametrize("mask_scores", [False, True])
def test_ap_of_groups_is_that_of_files_with_their_images(make, truth, tmp_path, mask_scores):
    cfg = make(*STANDARD)
    model = Marksman(truth, mask_scores=mask_scores)
    groups = {"one": [2], "two": [1, 3], "all": [1, 2, 3]}
    results, by_group = diagnosis.evaluate(cfg, model, "val", groups)
    assert set(results) == {"bbox", "segm"}
    folder = Path(cfg.OUTPUT_DIR, "inference", "val")
    records = json.loads((folder / "coco_instances_results.json").read_text())
    expected = {title: {} for title in groups}
    for title, ids in groups.items():
        mine = [r for r in records if r["image_id"] in ids]
        expected[title]["bbox"] = pycocotools_ap(only(truth, set(ids)), mine, "bbox", tmp_path)
        ranked = [{**r, "score": r.get("mask_score", r["score"])} for r in mine]
        expected[title]["segm"] = pycocotools_ap(only(truth, set(ids)), ranked, "segm", tmp_path)
    for title in groups:
        assert by_group[title] == pytest.approx(expected[title])
    assert by_group["all"]["bbox"] == pytest.approx(results["bbox"]["AP"])
    assert by_group["all"]["segm"] == pytest.approx(results["segm"]["AP"])
    assert by_group["one"]["bbox"] != pytest.approx(by_group["two"]["bbox"])
    assert 5 < by_group["all"]["segm"] < 95


def test_groups_where_nothing_is_found_or_nothing_is(make, truth):
    cfg = make(*STANDARD)
    model = Marksman(truth, masks=False, blind=(2,))
    groups = {"blind": [2], "seen": [1, 3], "empty": [], "elsewhere": [99]}
    results, by_group = diagnosis.evaluate(cfg, model, "val", groups)
    assert set(results) == {"bbox"}
    assert by_group["blind"] == {"bbox": 0.0}
    assert by_group["seen"]["bbox"] > 5
    assert math.isnan(by_group["empty"]["bbox"]) and math.isnan(by_group["elsewhere"]["bbox"])
    results, by_group = diagnosis.evaluate(cfg, Marksman(truth, blind=(1, 2, 3)), "val", groups)
    assert math.isnan(results["bbox"]["AP"])  # Detectron2's word for it
    assert by_group["seen"] == {"bbox": 0.0}
    assert diagnosis.evaluate(cfg, model, "val")[1] == {}


def test_voc_folder(tmp_path):
    """Ids of images are words there; two images, one object and two."""
    images = {"p1": [(3, 4, 40, 50)], "p2": [(10, 10, 30, 30), (40, 20, 60, 60)]}
    root = tmp_path / "voc"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / part).mkdir(parents=True)
    (root / "ImageSets/Main/val.txt").write_text("p1\np2\n")
    marks = []
    for image_id, boxes in images.items():
        cv2.imwrite(str(root / f"JPEGImages/{image_id}.jpg"), np.zeros((64, 80, 3), np.uint8))
        objects = ""
        for x1, y1, x2, y2 in boxes:
            corners = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
            objects += f"<object><name>leaf</name><bndbox>{corners}</bndbox></object>"
            # 1-based and inclusive corners.
            box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
            marks.append({"image_id": image_id, "category_id": 1, "bbox": box})
        size = "<size><width>80</width><height>64</height></size>"
        (root / f"Annotations/{image_id}.xml").write_text(
            f"<annotation>{size}{objects}</annotation>"
        )
    entry = {"name": "voc", "type": "voc", "root": "voc", "split": "val"}
    cfg = load(entry, tmp_path / "out", *LOOPED, "MODEL.MASK_ON", False)
    groups = diagnosis.images_by_count("voc")
    assert groups == {"1": ["p1"], "2-3": ["p2"]}
    truth = {"annotations": marks, "categories": [{"id": 1, "name": "leaf"}]}
    model = Marksman(truth, masks=False, blind=("p1",))
    results, by_count = diagnosis.evaluate(cfg, model, "voc", groups)
    assert by_count["1"] == {"bbox": 0.0}
    assert by_count["2-3"]["bbox"] > results["bbox"]["AP"] > 0
    histograms = diagnosis.loop_histograms(shaken(cfg), diagnosis.labelled_images(cfg, "voc", 10))
    assert len(histograms) == 3 and sum(histograms[0]) > 0


# ---- loops at test ----


def test_ap_by_loops(make, truth):
    cfg, model = make(*LOOPED), Marksman(truth)
    before = model.roi_heads.schedule
    plain, _ = diagnosis.evaluate(cfg, model, "val")
    found = diagnosis.ap_by_loops(cfg, model, "val", [1, 2, 3, 5])
    assert list(found) == [1, 2, 3, 5]
    assert model.roi_heads.schedule is before
    for task in ("bbox", "segm"):
        assert found[3][task] == pytest.approx(plain[task], nan_ok=True)
        aps = {loops: row[task]["AP"] for loops, row in found.items()}
        assert aps[2] > aps[1] == pytest.approx(aps[3])  # 1 and 3 are as far from 2
        assert aps[3] > aps[5]


def test_real_heads_take_the_number_of_loops(make):
    cfg = make(*LOOPED)
    model = shaken(cfg)
    calls = []
    model.roi_heads.pairs["a"].box_pooler.register_forward_hook(lambda *_: calls.append(1))
    diagnosis.ap_by_loops(cfg, model, "val", [2, 4])
    assert len(calls) == 3 * (2 + 4)  # three images


def test_schedule_comes_back_after_a_failure(make, truth):
    cfg, model = make(*LOOPED), Marksman(truth)
    before = model.roi_heads.schedule
    with pytest.raises(ValueError, match="TEST_LOOPS"):
        diagnosis.ap_by_loops(cfg, model, "val", [-1])
    model.find = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        diagnosis.ap_by_loops(cfg, model, "val", [2])
    assert model.roi_heads.schedule is before


# ---- figures ----


def picture(path: Path) -> np.ndarray:
    """The pixels of a PNG, not small and not blank."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = cv2.imread(str(path))
    height, width = pixels.shape[:2]
    assert 500 <= height <= 1000 and 1000 <= width <= 2000
    assert 0.02 < (pixels.min(axis=2) < 250).mean() < 0.8
    return pixels


def inside(drawn, axes: int) -> None:
    """Titles and labels are within the figure and over no neighbour."""
    drawn.canvas.draw()
    boxes = [a.get_tightbbox() for a in drawn.axes]
    assert len(boxes) == axes
    width, height = drawn.bbox.width, drawn.bbox.height
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    assert all(a.x1 <= b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


HISTOGRAM = [1000, 300, 200, 150, 120, 100, 90, 80, 70, 65, 60, 55, 50, 45, 40, 30, 20, 10, 5, 1]


def test_anchor_figure(tmp_path):
    shares = [0.0] * 12 + [0.05, 0.15, 0.3, 0.45, 0.62, 0.84, 0.97, 1.0]
    drawn = diagnosis_figures.anchor_figure(tmp_path / "new" / "anchors.png", shares, 1234)
    picture(tmp_path / "new" / "anchors.png")
    inside(drawn, 1)
    (axes,) = drawn.axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([100 * s for s in shares])
    lefts = [bar.get_x() for bar in axes.patches]
    assert all(0 <= x - n / 20 < 0.01 for n, x in enumerate(lefts))
    assert "1234 objects" in axes.get_title(loc="left")


@pytest.mark.parametrize("count", [1, 3, 5])
def test_proposal_figure(tmp_path, count):
    better = [HISTOGRAM[:10] + [c * (1 + t) for c in HISTOGRAM[10:]] for t in range(count)]
    drawn = diagnosis_figures.proposal_figure(tmp_path / "p.png", "in training", better)
    picture(tmp_path / "p.png")
    inside(drawn, 2)
    left, right = drawn.axes
    names = [text.get_text() for text in left.get_legend().get_texts()]
    expected = ["loop 1: proposals", *(f"loop {n}: refined {n - 1} x" for n in range(2, 9))]
    assert names == (expected[:count] if count > 1 else ["proposals"])
    assert [label.get_text() for label in right.get_yticklabels()] == names
    # Ten bins from 0.5 on, in percent of all of the loop's boxes.
    heights = [bar.get_height() for bar in left.patches]
    expected = [100 * c / sum(counts) for counts in better for c in counts[10:]]
    assert heights == pytest.approx(expected)
    for number, bar in enumerate(left.patches):
        lower = 0.5 + number % 10 / 20
        assert lower <= bar.get_x() and bar.get_x() + bar.get_width() <= lower + 0.0501
    # 0.7 and more are the bins from the 14th on.
    shares = [100 * sum(counts[14:]) / sum(counts) for counts in better]
    assert [bar.get_width() for bar in right.patches] == pytest.approx(shares)


def test_proposal_figure_without_proposals(tmp_path):
    drawn = diagnosis_figures.proposal_figure(tmp_path / "p.png", "at test", [[0] * 20] * 2)
    picture(tmp_path / "p.png")
    inside(drawn, 2)


def test_metric_figure(tmp_path):
    rows = {
        "small (below 32 x 32)": {"bbox": 12.3, "segm": 10.1},
        "medium": {"bbox": float("nan"), "segm": 0.0},
        "large (96 x 96 or more)": {"bbox": 55.5},
    }
    drawn = diagnosis_figures.metric_figure(tmp_path / "m.png", "AP by size", "area", rows)
    picture(tmp_path / "m.png")
    inside(drawn, 1)
    (axes,) = drawn.axes
    assert [t.get_text() for t in axes.texts] == ["12.3", "–", "55.5", "10.1", "0.0", "–"]
    assert [bar.get_height() for bar in axes.patches] == [12.3, 0, 55.5, 10.1, 0, 0]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["boxes", "masks"]


@pytest.mark.parametrize(
    "rows",
    [
        {f"a group with a very long name, number {i}": {"bbox": 10.0 * i} for i in range(7)},
        {str(i): {"bbox": float("nan"), "segm": float("nan")} for i in range(3)},
        {str(i): {"bbox": 30.0, "segm": 31.0} for i in range(1, 13)},
        {},
    ],
    ids=["long names", "no numbers", "many", "none"],
)
def test_metric_figure_fits(tmp_path, rows):
    title = "AP on " + "a_dataset_with_a_long_name_" * 5 + " by something with a name"
    drawn = diagnosis_figures.metric_figure(tmp_path / "m.png", title, "label", rows)
    picture(tmp_path / "m.png")
    inside(drawn, 1)
    labels = [t.get_window_extent() for t in drawn.axes[0].get_xticklabels()]
    assert all(a.x1 <= b.x0 for a, b in zip(labels, labels[1:], strict=False))


def quality(iteration: int, precision: float | None, recall: float | None) -> dict:
    return {
        "iteration": iteration,
        "pseudo": {"precision": precision, "iou_histogram": [5, 1, 1, 2, 3, 4, 6, 9, 12, 7]},
        "truth": {"recall": recall, "iou_histogram": [20, 3, 2, 1, 1, 4, 5, 8, 11, 6]},
    }


def test_pseudo_figure(tmp_path):
    lines = [quality(500, None, 0.0), quality(1000, 0.6, 0.2), quality(1500, 0.75, 0.5)]
    drawn = diagnosis_figures.pseudo_figure(tmp_path / "q.png", lines)
    picture(tmp_path / "q.png")
    inside(drawn, 2)
    left, right = drawn.axes
    precision, recall = left.get_lines()
    assert precision.get_xdata().tolist() == [500, 1000, 1500]
    assert math.isnan(precision.get_ydata()[0])
    assert precision.get_ydata()[1:].tolist() == [60, 75]
    assert recall.get_ydata().tolist() == [0, 20, 50]
    assert [b.get_height() for b in right.patches[:10]] == pytest.approx(
        [100 * c / 50 for c in (5, 1, 1, 2, 3, 4, 6, 9, 12, 7)]
    )


def test_pseudo_figure_of_one_line_without_boxes(tmp_path):
    line = quality(1, None, None)
    line["pseudo"]["iou_histogram"] = [0] * 10
    drawn = diagnosis_figures.pseudo_figure(tmp_path / "q.png", [line])
    picture(tmp_path / "q.png")
    inside(drawn, 2)
