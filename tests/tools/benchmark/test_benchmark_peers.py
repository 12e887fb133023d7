"""Detectors of torchvision do the work that Detectron2's do, and it is told where they do not."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import nn
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    MaskRCNN,
    MaskRCNN_ResNet50_FPN_Weights,
    fasterrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from il_net.benchmark.peers import PEERS, PeerSubject, fix_torchvision, peer_config
from il_net.benchmark.timing import Subject
from il_net.benchmark.workload import MODES, Workload, class_logits
from il_net.config import load_config
from sbr_cnn import add_sbr_cnn_config

REPO = Path(__file__).parents[3]
MASK_CONFIG = str(REPO / "configs" / "sbr_cnn" / "mask_rcnn_r50_fpn_1x.yaml")
MASK, BOX, TINY = (
    f"torchvision:{n}" for n in ("maskrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn", "tiny")
)
SIZE = (64, 96)
NARROW = {
    "MODEL.RESNETS.WIDTH_PER_GROUP": "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "16",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "8",
    "MODEL.FPN.OUT_CHANNELS": "8",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "8",
}
NARROW_CONFIG = ":".join([MASK_CONFIG, *map("=".join, NARROW.items())])


def tiny(cfg: CfgNode, workload: Workload) -> nn.Module:
    """A Mask R-CNN of torchvision that is as the big one but for depth and widths."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    detector = MaskRCNN(
        backbone,
        box_head=TwoMLPHead(256 * 7 * 7, 16),
        box_predictor=FastRCNNPredictor(16, 81),
        mask_head=MaskRCNNHeads(256, [8], 1),
        mask_predictor=MaskRCNNPredictor(8, 8, 81),
    )
    return fix_torchvision(detector, cfg, workload)


@pytest.fixture(autouse=True)
def _tiny_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, TINY, tiny)


def make_peer(workload: Workload, name: str, **kwargs) -> PeerSubject:
    cfg = peer_config(name, [])
    cfg.MODEL.DEVICE = "cpu"
    return PeerSubject("x", cfg, workload, **kwargs)


def narrow_subject(workload: Workload) -> Subject:
    opts = [part for pair in NARROW.items() for part in pair]
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.DEVICE", "cpu"]
    return Subject("x", load_config(MASK_CONFIG, opts, add_sbr_cnn_config), workload)


def detect(subject: Subject) -> Instances:
    subject.model.eval()
    with torch.no_grad():
        return subject.model(subject.inputs)[0]["instances"]


# ---- the work ----


@pytest.mark.parametrize(("name", "masks"), [(MASK, True), (BOX, False)])
def test_every_head_gets_what_is_promised(workload, name, masks):
    subject = make_peer(workload, name)
    modes = MODES if name == BOX else ("inference",)  # the tiny one's training is below
    for mode in modes:
        assert subject.run(mode) > 0
    expected = {
        "inference": {"box": [1000], **({"mask": [100]} if masks else {}), "detections": [100]},
        "train": {"box": [512]},
    }
    assert subject.seen == {mode: expected[mode] for mode in modes}
    assert all(subject.differs(mode) == [] for mode in modes)


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_two_pictures_are_twice_the_training_and_bf16_is_the_same(workload, amp_dtype):
    subject = make_peer(workload, TINY, images=2, amp_dtype=amp_dtype)
    for mode in MODES:
        subject.run(mode)
        assert subject.differs(mode) == []
    assert subject.seen["train"] == {"box": [1024], "mask": [256]}
    assert subject.seen["inference"] == {"box": [1000], "mask": [100], "detections": [100]}


def test_a_peer_that_works_less_is_told(workload):
    subject = make_peer(workload, TINY)
    heads = subject.model.detector.roi_heads
    heads.detections_per_img = 7
    heads.fg_bg_sampler.batch_size_per_image = 64
    for mode in MODES:
        subject.run(mode)
    assert subject.differs("inference") == [
        "mask [7] instead of 100",
        "detections [7] instead of 100",
    ]
    # A quarter of 64 is positive.
    assert subject.differs("train") == ["box [64] instead of 512", "mask [16] instead of 128"]


def test_the_peer_finds_what_detectron2_finds(workload):
    ours, theirs = detect(narrow_subject(workload)), detect(make_peer(workload, TINY))
    assert torch.equal(theirs.pred_classes, ours.pred_classes)
    assert torch.allclose(theirs.scores, ours.scores, atol=1e-5)
    assert torch.allclose(theirs.pred_boxes.tensor, ours.pred_boxes.tensor, atol=1e-3)
    # Masks are pasted and decided: one of the picture's size per detection.
    assert theirs.pred_masks.shape == ours.pred_masks.shape == (100, *SIZE)
    assert theirs.pred_masks.dtype == ours.pred_masks.dtype == torch.bool
    assert theirs.image_size == ours.image_size == SIZE


def test_scores_are_those_of_the_replaced_logits(workload):
    found = detect(make_peer(workload, TINY))
    probability = class_logits(80).softmax(dim=1)[:, :-1].max()  # of any proposal and class
    assert found.scores.max() == pytest.approx(float(probability), abs=1e-6)
    assert 0 <= found.pred_classes.min() <= found.pred_classes.max() < 80


def test_pictures_and_masks_enter_at_their_size_and_normalised(workload):
    """800 x 1333 would be torchvision's own idea of a picture of 64 x 96 pixels."""
    transform = make_peer(workload, TINY).model.detector.transform
    picture = workload.image.float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # ImageNet's
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    target = {"boxes": workload.truths, "masks": workload.masks}
    for training in (True, False):
        transform.train(training)
        pictures, (kept,) = transform([picture], [dict(target)])
        assert pictures.image_sizes == [SIZE]
        assert torch.allclose(pictures.tensors[0], (picture - mean) / std, atol=1e-6)
        assert torch.equal(kept["masks"], workload.masks)
        assert torch.equal(kept["boxes"], workload.truths)


def test_replaced_layers_still_run(workload, count_calls):
    subject = make_peer(workload, TINY)
    heads = subject.model.detector.roi_heads
    layers = {
        "rpn": subject.model.detector.rpn.head,
        "classes": heads.box_predictor.cls_score,
        "deltas": heads.box_predictor.bbox_pred,
    }
    calls = count_calls(layers)
    subject.run("inference")
    subject.run("train")
    assert calls == {"rpn": 2, "classes": 2, "deltas": 2}


def test_the_training_step_is_whole_but_changes_nothing(workload):
    subject = make_peer(workload, TINY)
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    subject.run("train")
    losses = {name: value for name, (value, _) in subject.storage.latest().items()}
    names = ("classifier", "box_reg", "mask", "objectness", "rpn_box_reg")
    assert losses["total_loss"] == pytest.approx(sum(losses[f"loss_{name}"] for name in names))
    assert all(math.isfinite(losses[f"loss_{name}"]) for name in names)
    for name, parameter in subject.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
    # Stem and first stage are frozen, as by Detectron2's FREEZE_AT 2.
    body = subject.model.detector.backbone.body
    frozen = {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


# ---- the models are torchvision's ----

# Of 91 classes 10 are left out, each with a class score, 4 deltas and (with masks) a mask.
BOXES_OF_10, MASKS_OF_10 = 10 * 5 * (1024 + 1), 10 * (256 + 1)
# The stem's 7x7 convolution and the first stage's three blocks, the first with a shortcut.
FROZEN = 64 * 3 * 49 + (64 * 64 + 2 * 64 * 256) + 2 * (2 * 64 * 256) + 3 * (9 * 64 * 64)


@pytest.mark.parametrize(
    ("kind", "factory", "published", "less"),
    [
        (MASK, maskrcnn_resnet50_fpn, MaskRCNN_ResNet50_FPN_Weights, BOXES_OF_10 + MASKS_OF_10),
        (BOX, fasterrcnn_resnet50_fpn, FasterRCNN_ResNet50_FPN_Weights, BOXES_OF_10),
    ],
)
def test_the_layers_are_those_of_the_published_model(workload, kind, factory, published, less):
    subject = make_peer(workload, kind)
    assert subject.parameters == published.COCO_V1.meta["num_params"] - less - FROZEN
    with torch.device("meta"):
        theirs = factory(weights=None, weights_backbone=None, num_classes=81)
    ours = {name: t.shape for name, t in subject.model.detector.state_dict().items()}
    # Frozen BatchNorm does not count batches.
    assert ours == {
        name: t.shape
        for name, t in theirs.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    heads, theirs = subject.model.detector.roi_heads, theirs.roi_heads
    for key in ("score_thresh", "nms_thresh", "detections_per_img"):
        assert getattr(heads, key) == getattr(theirs, key)


def test_backbone_activations_are_those_of_a_normalised_network(workload):
    subject = make_peer(workload, BOX)
    subject.model.eval()
    seen = []
    for module in subject.model.detector.backbone.modules():
        if hasattr(module, "running_var"):
            module.register_forward_hook(lambda m, a, output: seen.append(output.var()))
    with torch.no_grad():
        subject.model(subject.inputs)
    assert len(seen) == 53  # a ResNet-50's
    assert torch.stack(seen).sub(1).abs().max() < 0.2


# ---- the command line ----


def test_a_peer_beside_a_configuration(tool, tmp_path, capsys):
    output = tmp_path / "bench.json"
    plain = f"{NARROW_CONFIG}:MODEL.ROI_HEADS.NAME=StandardROIHeads"
    options = ["--size", "64x96", "--device", "cpu", "--repeat", "1", "--output", str(output)]
    tool.main([NARROW_CONFIG, plain, TINY, *options])
    rows = json.loads(output.read_text())["configs"]
    assert rows[2]["config"] == rows[2]["label"] == TINY
    # Detectron2's own RoI heads, and torchvision's, have the work of this project's.
    for mode in MODES:
        assert rows[0][mode]["seen"] == rows[1][mode]["seen"] == rows[2][mode]["seen"]
        assert all(row[mode]["differs"] == [] for row in rows)
        assert rows[2][mode]["ratio"] == rows[2][mode]["median"] / rows[0][mode]["median"]
    assert rows[1]["parameters_ratio"] == 1
    assert f"| {TINY} | {rows[2]['parameters']:,} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["torchvision:maskrcnn"], f"CONFIG torchvision:maskrcnn: there is no file .*{MASK}"),
        ([f"{MASK}:SEED=3"], f"CONFIG {MASK}:SEED=3: .* got SEED 3; .*FILE:KEY=VALUE"),
        ([MASK, "--opts", "SEED", "3"], "not built from configuration keys, got SEED 3"),
        ([MASK, "--modes", "semisup"], f"CONFIG {MASK}: mode semisup needs .*got {MASK}"),
    ],
)
def test_mistakes_name_the_config(tool, monkeypatch, arguments, expected):
    monkeypatch.setattr(tool, "make_workload", None)  # refused before anything is built
    with pytest.raises(SystemExit, match=expected):
        tool.main([*arguments, *(["--device", "cpu"] if "--opts" not in arguments else [])])
