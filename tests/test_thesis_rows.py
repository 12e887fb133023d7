"""Every row of the thesis' tables trains a step that reaches all parameters, and predicts.

The row's structure is as in configs/thesis_tables.yaml; only widths, sizes and counts are tiny.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from il_net.data.builtin import LDD

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from thesis_tables import Row, read_rows

SIZE = (128, 160)
TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 3),
    # Half a ResNet-50's blocks are not enough: all 16, each a few channels wide.
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.FPN.OUT_CHANNELS", 16),
    # All anchors count, small ones at every level: the RPN's loss reaches the whole pyramid.
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [48], [64]]),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 8000),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 100),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.ROI_GRID_HEAD.POINT_DIM", 8),
    # An untrained classifier is sure of nothing.
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 10),
]
# Parameters whose gradient is zero but for rounding, whatever the data, and why.
NO_GRADIENT = {
    "phi.bias": "adds the same to all energies of a query: the softmax cancels it",
    "context.attention.bias": "adds the same to all positions: the softmax cancels it",
}
# Start at zero and so hide what lies before them: moved away from it.
ZERO_AT_START = ("conv_out.weight", "gamma", "conv_res.bias", "context.expand.weight")
# One row of every kind of head, extractor and backbone; the others are as many again and slow.
REPRESENTATIVE = {"2.1/2", "2.4/6", "2.5/4", "2.6/3", "2.9/8", "2.14/5", "2.16/5", "2.20/10"}
# Of section 2.4: without branch, all inputs without ELU, the best row, the other loss.
REPRESENTATIVE_SEMI = {"2.21/1", "2.22/1", "2.22/2", "2.25/4", "fig2.16b/2"}

ROWS = read_rows()


def distinct_rows(semi: bool = False) -> list:
    """The first row of every set-up; a loop count at test alone makes no other training.

    Args:
        semi: those that train on images without labels too (Unbiased Teacher's config under
            another's keys), or all others.
    """
    first: dict[str, Row] = {}
    for row in ROWS.values():
        if not (row.external or row.module) and ("unbiased_teacher" in row.config) == semi:
            first.setdefault(row.setup, row)
    quick = REPRESENTATIVE | REPRESENTATIVE_SEMI
    return [
        pytest.param(row, id=row.id, marks=() if row.id in quick else pytest.mark.slow)
        for row in first.values()
    ]


def test_the_representative_rows_are_rows_of_their_own():
    assert {p.id for p in distinct_rows() if not p.marks} == REPRESENTATIVE
    assert {p.id for p in distinct_rows(semi=True) if not p.marks} == REPRESENTATIVE_SEMI


def target(classes: tuple[int, ...] = (0, 1, 2)) -> Instances:
    boxes = torch.tensor([[8.0, 8, 60, 56], [50, 40, 150, 120], [90, 4, 130, 40]])
    y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    center, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    dx = (x + 0.5 - center[:, :1, None]) / radius[:, :1, None]
    dy = (y + 0.5 - center[:, 1:, None]) / radius[:, 1:, None]
    masks = BitMasks(dx**2 + dy**2 <= 1)
    fields = {"gt_boxes": Boxes(boxes), "gt_classes": torch.tensor(classes), "gt_masks": masks}
    return Instances(SIZE, **fields)


@pytest.mark.parametrize("row", distinct_rows())
def test_row_trains_and_predicts(row):
    torch.manual_seed(0)
    cfg = row.resolve([str(o) for o in TINY])
    objects = target()
    if cfg.MODEL.C2SSL.ENABLED:  # a leaf with a disease, and another disease
        cfg.DATASETS.CLASSES = [category.name for category in LDD.categories]
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(cfg.DATASETS.CLASSES)
        objects = target((4, 0, 1))
    model = build_model(cfg).train()
    for name, parameter in model.named_parameters():
        if name.endswith(ZERO_AT_START):
            nn.init.constant_(parameter, 0.1)
    image = torch.randint(256, (3, *SIZE), dtype=torch.uint8)
    with EventStorage():
        losses = model([{"image": image, "instances": objects}] * 2)
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    sum(losses.values()).backward()
    # The convolution of fed-back features sees zeros only in heads that run first (methods 5.4).
    loops = cfg.MODEL.ROI_LOOP_HEAD
    fed = [f"pairs.{p}.mask_head.conv_res.weight" for p in loops.ORDER[1:] if loops.MASK_LOOP]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            if not name.endswith(tuple(NO_GRADIENT)):
                expected = not name.endswith("conv_res.weight") or name.endswith(tuple(fed))
                assert bool(parameter.grad.any()) == expected, name
    model.eval()
    with torch.no_grad():
        (found,) = model([{"image": image, "height": 256, "width": 320}])
    instances = found["instances"]
    assert 0 < len(instances) <= 10
    assert instances.image_size == (256, 320)
    assert torch.isfinite(instances.pred_boxes.tensor).all()
    assert instances.has("pred_masks") == cfg.MODEL.MASK_ON
    assert instances.has("mask_scores") == cfg.MODEL.MASK_IOU_HEAD.ENABLED


# ---- sections 2.4 and 2.6 ----


def record(**labels: Instances) -> dict:
    """A record as the mapper makes it: weak and strong view, and ``instances`` if labelled."""
    weak, strong = torch.randint(256, (2, 3, *SIZE), dtype=torch.uint8)
    return {"image": weak, "strong_image": strong, "height": 256, "width": 320, **labels}


@pytest.mark.parametrize("row", distinct_rows(semi=True))
def test_semi_supervised_row_trains_and_predicts(row):
    """A step after burn-in in which every detection of the teacher is a pseudo label."""
    torch.manual_seed(0)
    # MSRA's weights are for pixels up to 255; random ones would answer with logits of hundreds.
    tiny = [*TINY, "MODEL.PIXEL_STD", [60.0] * 3, "SEMISUP.PSEUDO.SCORE_THRESH", 0.0]
    cfg = row.resolve([str(o) for o in tiny])
    model = build_model(cfg).train()
    branch, weight = cfg.MODEL.ROI_IOU_HEAD, cfg.SEMISUP.LOSS_WEIGHT
    if branch.ENABLED:
        # All boxes pass every row's theta: sigmoid(3) = 0.95.
        nn.init.constant_(model.student.roi_heads.box_predictor.iou_head.layers[2].bias, 3.0)
    model.update_teacher(cfg.SEMISUP.BURN_IN_ITERS)
    batch = SimpleNamespace(labeled=[record(instances=target())], unlabeled=[record()])
    with EventStorage():
        losses = model(batch)
    names = ["loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"]
    names += ["loss_box_iou"] * branch.ENABLED
    weights = [weight.RPN_CLS, weight.RPN_LOC, weight.CLS, weight.BOX_REG, weight.IOU]
    on_pseudo = {f"{n}_pseudo": w for n, w in zip(names, weights, strict=False) if w}
    assert set(losses) == {*names, *on_pseudo}
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values()), losses
    means = model.monitor.read()
    assert 0 < means["pseudo/boxes_per_image"] <= 10
    for name, factor in on_pseudo.items():
        raw = means[f"pseudo/raw_{name.removesuffix('_pseudo')}"]
        assert losses[name].item() == pytest.approx(factor * raw), name
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    for name, parameter in model.student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        if "iou_head.layers.2" in name:  # the background's column is never trained
            assert not parameter.grad[-1].any()
    model.eval()
    with torch.no_grad():
        (found,) = model([record()])
    instances = found["instances"]
    assert 0 < len(instances) <= 10
    assert instances.image_size == (256, 320)
    assert torch.isfinite(instances.pred_boxes.tensor).all()
    assert instances.has("iou_scores") == branch.ENABLED
