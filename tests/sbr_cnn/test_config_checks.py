"""Architectures that cannot be built, or not as they read: what is said instead."""

import logging

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.utils import comm

from sbr_cnn import add_sbr_cnn_config
from sbr_cnn.config_checks import check_sbr_cnn_config

STAGES = ["res2", "res3", "res4", "res5"]
# Mask R-CNN on Detectron2's own FPN; ours on top of it.
FPN = [
    *("MODEL.MASK_ON", True),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", STAGES),
    *("MODEL.FPN.IN_FEATURES", STAGES),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    *("MODEL.ROI_BOX_HEAD.NUM_FC", 2),
]
EXTRACTORS = ("MODEL.ROI_HEADS.NAME", "ExtractorROIHeads")
LOOPS = ("MODEL.ROI_HEADS.NAME", "LoopROIHeads")
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)
NORM = ("MODEL.BACKBONE.NAME", "build_norm_resnet_fpn_backbone")
TIMM = ("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone")


def config(*opts: object) -> CfgNode:
    cfg = get_cfg()
    add_sbr_cnn_config(cfg)
    cfg.merge_from_list([*FPN, *opts])
    return cfg


def message(*opts: object) -> str:
    with pytest.raises(ValueError) as error:
        check_sbr_cnn_config(config(*opts))
    return str(error.value)


@pytest.mark.parametrize(
    "opts", [(), EXTRACTORS, LOOPS, CASCADE, NORM, TIMM], ids=lambda opts: "/".join(map(str, opts))
)
def test_good_ones_pass(opts, caplog):
    with caplog.at_level(logging.WARNING):
        check_sbr_cnn_config(config(*opts))
        cfg = get_cfg()
        add_sbr_cnn_config(cfg)
        check_sbr_cnn_config(cfg)  # Detectron2's defaults, without FPN and box head
    assert caplog.messages == []


# ---- names ----


@pytest.mark.parametrize(
    ("key", "name", "near"),
    [
        ("MODEL.META_ARCHITECTURE", "GeneralisedRCNN", "GeneralizedRCNN"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_bakbone", "build_resnet_fpn_backbone"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "rpn", ""),
        ("MODEL.RPN.HEAD_NAME", "StandardRPNhead", "StandardRPNHead"),
        ("MODEL.ROI_HEADS.NAME", "LoopRoIHeads", "LoopROIHeads"),
        ("MODEL.ROI_BOX_HEAD.NAME", "FCCHead", "FCCBoxHead"),
        ("MODEL.ROI_MASK_HEAD.NAME", "LoopMaskhead", "LoopMaskHead"),
        ("MODEL.ROI_BOX_HEAD.NAME", "", ""),
    ],
)
def test_a_name_that_is_not_registered(key, name, near):
    text = message(key, name)
    assert f"{key} is {name!r}; write one of " in text
    assert ("did you mean" in text) == bool(near)
    assert near in text


def test_proposals_from_a_file_need_no_generator():
    check_sbr_cnn_config(
        config(
            *("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
            *("MODEL.RPN.IN_FEATURES", ["res4"]),
        )
    )


# ---- backbones, maps, anchors ----


@pytest.mark.parametrize(
    ("opts", "parts"),
    [
        (("MODEL.RESNETS.DEPTH", 51), ["MODEL.RESNETS.DEPTH is 51", "50, 101"]),
        (("MODEL.RESNETS.DEPTH", 18), ["MODEL.RESNETS.RES2_OUT_CHANNELS is 256", "write 64"]),
        (("MODEL.RESNETS.RES5_DILATION", 2), ["MODEL.RESNETS.RES5_DILATION is 2", "write 1 "]),
        (
            ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [True]),
            ["MODEL.RESNETS.DEFORM_ON_PER_STAGE is [True]", "four"],
        ),
        (("MODEL.RESNETS.OUT_FEATURES", ["res6"]), ["MODEL.RESNETS.OUT_FEATURES is ['res6']"]),
        (("MODEL.FPN.IN_FEATURES", []), ["MODEL.FPN.IN_FEATURES is []", "res2"]),
        (("MODEL.FPN.IN_FEATURES", ["res2", "res4"]), ["MODEL.FPN.IN_FEATURES", "follow"]),
        (("MODEL.RPN.IN_FEATURES", ["p2", "p7"]), ["MODEL.RPN.IN_FEATURES", "'p6'"]),
        (("MODEL.ROI_HEADS.IN_FEATURES", ["res4"]), ["MODEL.ROI_HEADS.IN_FEATURES", "'p5'"]),
        (("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p4"]), ["MODEL.ROI_HEADS.IN_FEATURES", "follow"]),
        (
            ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads"),
            ["MODEL.ROI_HEADS.IN_FEATURES", "one map", "Res5ROIHeads"],
        ),
        (
            ("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64]]),
            ["MODEL.ANCHOR_GENERATOR.SIZES", "5 maps"],
        ),
        (
            ("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512, 640]]),
            ["MODEL.ANCHOR_GENERATOR.SIZES", "as many anchors"],
        ),
        (("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", []), ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"]),
        (("MODEL.FPN.NORM", "LayerNorm2"), ["MODEL.FPN.NORM is 'LayerNorm2'", "FrozenBN"]),
        (("MODEL.RESNETS.NORM", "FrozenStatsBN"), ["MODEL.RESNETS.NORM", NORM[1]]),
        (("MODEL.FPN.NORM", "FrozenStatsBN", *NORM), ["MODEL.FPN.NORM"]),
        (("MODEL.GC_BLOCK.ON_PER_STAGE", [False, True, True, True]), ["ON_PER_STAGE", NORM[1]]),
    ],
)
def test_backbones_that_cannot_be(opts, parts):
    text = message(*opts)
    assert "write" in text
    assert [part for part in parts if part not in text] == []


def test_what_only_our_builder_reads():
    blocks = ("MODEL.GC_BLOCK.ON_PER_STAGE", [False, True, True, True])
    check_sbr_cnn_config(config(*NORM, "MODEL.RESNETS.NORM", "FrozenStatsBN", *blocks))
    c4 = ["MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["p4"]]
    assert "Res5ROIHeads" in message(*NORM, "MODEL.RESNETS.NORM", "FrozenStatsBN", *c4)


@pytest.mark.parametrize(
    ("key", "width", "opts"),
    [
        ("MODEL.FPN.OUT_CHANNELS", 48, ("MODEL.FPN.NORM", "GN")),
        (
            "MODEL.ROI_BOX_HEAD.CONV_DIM",
            80,
            ("MODEL.ROI_BOX_HEAD.NORM", "GN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 1),
        ),
        (
            "MODEL.ROI_MASK_HEAD.CONV_DIM",
            16,
            ("MODEL.ROI_MASK_HEAD.NORM", "GN", "MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
        ),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", 16, ("MODEL.RESNETS.NORM", "GN")),
    ],
)
def test_group_norm_needs_a_multiple_of_32(key, width, opts):
    text = message(*opts, key, width)
    assert f"{key} is {width}" in text and "multiple of 32" in text
    check_sbr_cnn_config(config(*opts, key, 64))
    check_sbr_cnn_config(config(key, width))  # without GN any width


def test_batch_norm_of_each_process_for_itself(monkeypatch, caplog):
    live = config("MODEL.RESNETS.NORM", "BN")
    check_sbr_cnn_config(live)
    assert caplog.messages == []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    check_sbr_cnn_config(live)
    (text,) = caplog.messages
    assert "MODEL.RESNETS.NORM is BN" in text and "2 processes" in text and "SyncBN" in text
    caplog.clear()
    check_sbr_cnn_config(config("MODEL.RESNETS.NORM", "SyncBN"))
    check_sbr_cnn_config(config("MODEL.ROI_BOX_HEAD.NORM", "BN"))  # no convolution there
    assert caplog.messages == []


# ---- heads ----


@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads", "RetinaNet"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ROI_BOX_HEAD.EXTRACTOR", "groie"),
        ("MODEL.ROI_BOX_HEAD.EXTRACTOR", "random"),
        ("MODEL.ROI_MASK_HEAD.EXTRACTOR", "groie"),
        ("MODEL.MASK_IOU_HEAD.ENABLED", True),
        ("MODEL.C2SSL.ENABLED", True),
        ("MODEL.ROI_STATISTICS_PERIOD", 20),
    ],
)
def test_what_heads_of_detectron2_do_not_read(heads, key, value):
    opts = {"StandardROIHeads": (), "CascadeROIHeads": CASCADE}.get(
        heads, (*EXTRACTORS, "MODEL.META_ARCHITECTURE", heads)
    )
    text = message(*opts, key, value)
    assert f"{key} is {value}, which MODEL." in text and f"{heads} does not read" in text
    for ours in (EXTRACTORS, LOOPS):
        check_sbr_cnn_config(config(*ours, key, value))


def test_extractor_of_masks_that_are_off():
    check_sbr_cnn_config(config("MODEL.ROI_MASK_HEAD.EXTRACTOR", "groie", "MODEL.MASK_ON", False))


def test_boxes_only_of_a_configuration_with_masks(caplog):
    check_sbr_cnn_config(
        config(*EXTRACTORS, "MODEL.MASK_IOU_HEAD.ENABLED", True, "MODEL.MASK_ON", False)
    )
    (text,) = caplog.messages
    assert "MODEL.MASK_IOU_HEAD.ENABLED True, because MODEL.MASK_ON is False; write True" in text


def test_heads_of_others_are_trusted(monkeypatch, caplog):
    class TheirROIHeads(StandardROIHeads):
        """Registered by a user's own code."""

    monkeypatch.setitem(ROI_HEADS_REGISTRY._obj_map, "TheirROIHeads", TheirROIHeads)
    theirs = ("MODEL.ROI_HEADS.NAME", "TheirROIHeads", "MODEL.ROI_LOOP_HEAD.ORDER", "aab")
    check_sbr_cnn_config(config(*theirs, "MODEL.ROI_BOX_HEAD.EXTRACTOR", "groie"))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("opts", "parts"),
    [
        (("MODEL.ROI_BOX_HEAD.NUM_FC", 0), ["MODEL.ROI_BOX_HEAD.NUM_FC and NUM_CONV are 0"]),
        ((*LOOPS, "MODEL.KEYPOINT_ON", True), ["MODEL.KEYPOINT_ON is True"]),
        (
            (*LOOPS, "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True),
            ["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES is True"],
        ),
        (
            (*LOOPS, "MODEL.ROI_LOOP_HEAD.BBOX_REG_WEIGHTS", ((10.0, 10.0, 5.0),)),
            ["MODEL.ROI_LOOP_HEAD.BBOX_REG_WEIGHTS has (10.0, 10.0, 5.0)", "four numbers"],
        ),
        (
            (*CASCADE, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False),
            ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False", "True"],
        ),
        (
            (*CASCADE, "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.6)),
            ["MODEL.ROI_BOX_CASCADE_HEAD.IOUS is (0.5, 0.6)", "write 3"],
        ),
        (
            (*CASCADE, "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.6]),
            ["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "MODEL.ROI_HEADS.IOU_THRESHOLDS, [0.6]"],
        ),
        (
            (*LOOPS, "MODEL.C2SSL.CLASS_WEIGHTS", ("a", "b", "c", "d")),
            ["MODEL.C2SSL.CLASS_WEIGHTS", "four numbers"],
        ),
    ],
)
def test_heads_that_cannot_be(opts, parts):
    text = message(*opts)
    assert [part for part in parts if part not in text] == []


# ---- settings that nothing reads ----


@pytest.mark.parametrize(
    ("key", "value", "write", "read"),
    [
        ("MODEL.ROI_LOOP_HEAD.ORDER", "aab", "LoopROIHeads", LOOPS),
        (
            "MODEL.ROI_GRID_HEAD.JITTER",
            0.5,
            "GridROIHeads",
            ("MODEL.ROI_HEADS.NAME", "GridROIHeads"),
        ),
        ("MODEL.FCC.LAYERS", "rect", "FCCBoxHead", ("MODEL.ROI_BOX_HEAD.NAME", "FCCBoxHead")),
        ("MODEL.GROIE.POST", "attention", "groie", ("MODEL.ROI_BOX_HEAD.EXTRACTOR", "groie")),
        (
            "MODEL.MASK_IOU_HEAD.LAYERS",
            "square",
            "True",
            ("MODEL.MASK_IOU_HEAD.ENABLED", True),
        ),
        ("MODEL.C2SSL.THRESHOLD", 0.6, "True", ("MODEL.C2SSL.ENABLED", True)),
        (
            "MODEL.GC_BLOCK.RATIO",
            0.5,
            "some True",
            (*NORM, "MODEL.GC_BLOCK.ON_PER_STAGE", [False, True, True, True]),
        ),
        ("MODEL.TIMM.NAME", "resnet18", TIMM[1], TIMM),
    ],
)
def test_settings_of_what_is_off_or_not_chosen(caplog, key, value, write, read):
    check_sbr_cnn_config(config(*EXTRACTORS, key, value))
    (text,) = caplog.messages
    assert text.startswith(f"Not read: {key} {value}, because MODEL.") or "no EXTRACTOR" in text
    assert f"write {write}, or leave them out" in text or "groie" in text
    caplog.clear()
    check_sbr_cnn_config(config(*EXTRACTORS, key, value, *read))
    assert caplog.messages == []


def test_keys_of_a_resnet_under_timm(caplog):
    keys = ("MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.NORM", "BN")
    check_sbr_cnn_config(config(*TIMM, *keys))
    (text,) = caplog.messages
    assert "MODEL.RESNETS.DEPTH 101, MODEL.RESNETS.NORM BN" in text and NORM[1] in text


def test_loops_have_their_own_thresholds_and_coders(caplog):
    check_sbr_cnn_config(config("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.6]))
    assert caplog.messages == []
    check_sbr_cnn_config(config(*LOOPS, "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.6]))
    (text,) = caplog.messages
    assert "MODEL.ROI_HEADS.IOU_THRESHOLDS [0.6]" in text and "MODEL.ROI_LOOP_HEAD.IOUS" in text
