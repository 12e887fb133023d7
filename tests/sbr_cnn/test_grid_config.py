"""The configuration of Grid R-CNN: its keys, its parameters and what the thesis sets."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from il_net.config import load_config
from sbr_cnn import add_sbr_cnn_config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "sbr_cnn" / "grid_rcnn_r50_fpn_1x.yaml"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.MASK_ON", True, r"MODEL\.MASK_ON: False"),
        ("MODEL.ROI_GRID_HEAD.JITTER", 1.0, r"MODEL\.ROI_GRID_HEAD\.JITTER .*got 1\.0"),
        ("MODEL.ROI_GRID_HEAD.JITTER", -0.1, r"MODEL\.ROI_GRID_HEAD\.JITTER .*got -0\.1"),
        ("MODEL.ROI_GRID_HEAD.MAX_POSITIVES", 0, r"ROI_GRID_HEAD\.MAX_POSITIVES .*got 0"),
        ("MODEL.ROI_GRID_HEAD.POINT_DIM", 10, r"ROI_GRID_HEAD\.POINT_DIM .*got 10"),
    ],
)
def test_wrong_keys(make_heads, key, value, message):
    opts = ("MODEL.MASK_ON", False, "MODEL.ROI_HEADS.NAME", "GridROIHeads")
    with pytest.raises(ValueError, match=message):
        make_heads(*opts, key, value)


def load(*opts: str) -> CfgNode:
    fixed = ["MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.DEVICE", "meta"]
    return load_config(str(CONFIG), [*fixed, *opts], add_sbr_cnn_config)


def count(*opts: str) -> int:
    with torch.device("meta"):
        model = build_model(load("MODEL.RESNETS.NORM", "FrozenStatsBN", *opts))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_parameters_of_the_configuration():
    # Methods 11: Faster R-CNN. Its box layer goes: 1024 features to 4 numbers for each class.
    # The grid branch is added: 23,123,145 (test_grid_head.py).
    expected = 41_527_712 - 4 * 80 * (1024 + 1) + 23_123_145
    assert count() == expected
    # Row 4 of Table 2.5: the first version of GRoIE in both extractors (methods 2.3 and 2.5).
    groie = [
        *("MODEL.ROI_BOX_HEAD.EXTRACTOR", "groie", "MODEL.ROI_GRID_HEAD.EXTRACTOR", "groie"),
        *("MODEL.GROIE.PRE_KERNEL", "5", "MODEL.GROIE.POST", "attention"),
        *("MODEL.GROIE.EXTRA_RELU", "True"),
    ]
    assert count(*groie) == expected + 2 * 1_896_961


def test_configuration_is_the_thesis():
    """Methods 1.3 (section 2.1) and 9.5."""
    model = load().MODEL
    assert (model.ROI_HEADS.SCORE_THRESH_TEST, model.ROI_HEADS.NMS_THRESH_TEST) == (0.03, 0.3)
    assert load().TEST.DETECTIONS_PER_IMAGE == 100
    assert (model.RPN.BOUNDARY_THRESH, model.RPN.POST_NMS_TOPK_TRAIN) == (0, 2000)
    assert pytest.approx(1 / 9, abs=1e-4) == model.RPN.SMOOTH_L1_BETA
    grid = model.ROI_GRID_HEAD
    assert (grid.POOLER_RESOLUTION, grid.NUM_CONV, 9 * grid.POINT_DIM) == (14, 8, 576)
    assert (grid.LOSS_WEIGHT, grid.JITTER, grid.MAX_POSITIVES) == (15, 0.15, 192)
