"""Mistakes in the keys of backbones, feature maps and anchors that end in Detectron2's asserts.

Part of ``sbr_cnn.config_checks``; builders of others are trusted to read all.
"""

import logging

from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.utils import comm

from .resnet import FROZEN_STATS, block_stages

logger = logging.getLogger(__name__)

NORM_BUILDER, TIMM_BUILDER = "build_norm_resnet_fpn_backbone", "build_timm_fpn_backbone"
# Levels that a builder adds above the last one of MODEL.FPN.IN_FEATURES; None: it has no FPN.
RESNET_BUILDERS = {
    "build_resnet_backbone": None,
    "build_resnet_fpn_backbone": 1,
    "build_retinanet_resnet_fpn_backbone": 2,
    NORM_BUILDER: 1,
}
_BUILDERS = {**RESNET_BUILDERS, TIMM_BUILDER: 1}
_GENERATORS = ("RPN", "RRPN")
_STAGES = ("stem", "res2", "res3", "res4", "res5")


def check_backbone(cfg: CfgNode, *, two_stages: bool) -> None:
    """Check what ``MODEL.BACKBONE.NAME`` reads, the maps that others take from it, and anchors.

    Args:
        cfg: with registered names.
        two_stages: the detector has an RPN and RoI heads.

    Raises:
        ValueError: says the key, its value and what to write instead.
    """
    if cfg.MODEL.BACKBONE.NAME in _BUILDERS:
        _check_stages(cfg)
        if _has_simple_pyramid(cfg):
            _check_simple_pyramid(cfg)
        if two_stages:
            _check_features(cfg, _feature_names(cfg))
    _check_norms(cfg, two_stages)
    if two_stages and cfg.MODEL.PROPOSAL_GENERATOR.NAME in _GENERATORS:
        _check_anchors(cfg)


def _check_stages(cfg: CfgNode) -> None:
    builder, node, fpn = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS, cfg.MODEL.FPN
    if not node.OUT_FEATURES or set(node.OUT_FEATURES) - set(_STAGES):
        raise ValueError(
            f"MODEL.RESNETS.OUT_FEATURES is {node.OUT_FEATURES}; write some of {list(_STAGES)}"
        )
    if builder in RESNET_BUILDERS:
        _check_resnet(cfg)
    if _BUILDERS[builder] is None:
        return
    levels = list(fpn.IN_FEATURES)
    start = _STAGES.index(levels[0]) if levels and levels[0] in _STAGES else len(_STAGES)
    given = [stage for stage in _STAGES[1:] if stage in node.OUT_FEATURES]
    if not levels or set(levels) - set(given) or levels != list(_STAGES[start:][: len(levels)]):
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {levels}; write stages that follow each other, of those in "
            f"MODEL.RESNETS.OUT_FEATURES, {given}"
        )


def _has_simple_pyramid(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME == TIMM_BUILDER and cfg.MODEL.TIMM.PYRAMID == "simple"


def _check_simple_pyramid(cfg: CfgNode) -> None:
    model, fpn = cfg.MODEL, cfg.MODEL.FPN
    if model.BACKBONE.FREEZE_AT:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {model.BACKBONE.FREEZE_AT}, but MODEL.TIMM.PYRAMID is "
            "simple, for plain ViTs, which have no stages to freeze; write 0"
        )
    unread = {"NORM": "", "FUSE_TYPE": "sum"}
    texts = [f"MODEL.FPN.{key} {fpn[key]}" for key, off in unread.items() if fpn[key] != off]
    if texts:
        logger.warning(
            "Not read: %s, because MODEL.TIMM.PYRAMID is simple; leave them out", ", ".join(texts)
        )


def _check_resnet(cfg: CfgNode) -> None:
    node, builder = cfg.MODEL.RESNETS, cfg.MODEL.BACKBONE.NAME
    if node.DEPTH not in (18, 34, 50, 101, 152):
        raise ValueError(f"MODEL.RESNETS.DEPTH is {node.DEPTH}; write 18, 34, 50, 101 or 152")
    # A dilated res5 has the stride of res4, of which FPN makes no pyramid.
    plain = builder == "build_resnet_backbone" and node.DEPTH >= 50
    good = {"RES5_DILATION": (1, 2) if plain else (1,)}
    if node.DEPTH < 50:
        good |= {"RES2_OUT_CHANNELS": (64,), "NUM_GROUPS": (1,)}
    for key, values in good.items():
        if node[key] not in values:
            raise ValueError(
                f"MODEL.RESNETS.{key} is {node[key]}; write {' or '.join(map(str, values))} with "
                f"MODEL.RESNETS.DEPTH {node.DEPTH} and MODEL.BACKBONE.NAME {builder}"
            )
    if builder == NORM_BUILDER:
        return  # it checks its blocks itself
    deform, context = block_stages(cfg).items()
    if len(deform[1]) != 4 or (any(deform[1]) and node.DEPTH < 50):
        raise ValueError(
            f"{deform[0]} is {list(deform[1])} and MODEL.RESNETS.DEPTH {node.DEPTH}; write four "
            "values, for res2 to res5, all False below a depth of 50"
        )
    if any(context[1]):
        raise ValueError(
            f"{context[0]} is {list(context[1])}, which MODEL.BACKBONE.NAME {builder} does not "
            f"read; write {NORM_BUILDER}, or False four times"
        )


def _feature_names(cfg: CfgNode) -> list[str]:
    """The maps that a backbone of a known builder gives."""
    extra = _BUILDERS[cfg.MODEL.BACKBONE.NAME]
    if extra is None:
        return [stage for stage in _STAGES if stage in cfg.MODEL.RESNETS.OUT_FEATURES]
    first, last = (int(cfg.MODEL.FPN.IN_FEATURES[i].removeprefix("res")) for i in (0, -1))
    return [f"p{level}" for level in range(first, last + extra + 1)]


def _check_features(cfg: CfgNode, given: list[str]) -> None:
    model = cfg.MODEL
    nodes = {"MODEL.RPN": model.RPN, "MODEL.ROI_HEADS": model.ROI_HEADS}
    if model.PROPOSAL_GENERATOR.NAME not in _GENERATORS:
        del nodes["MODEL.RPN"]
    for key, node in nodes.items():
        names = list(node.IN_FEATURES)
        if not names or set(names) - set(given):
            raise ValueError(
                f"{key}.IN_FEATURES is {names}; write some of {given}: what MODEL.BACKBONE.NAME "
                f"{model.BACKBONE.NAME} gives with MODEL.FPN.IN_FEATURES "
                f"{list(model.FPN.IN_FEATURES)} and MODEL.RESNETS.OUT_FEATURES "
                f"{list(model.RESNETS.OUT_FEATURES)}"
            )
    names, heads = list(model.ROI_HEADS.IN_FEATURES), ROI_HEADS_REGISTRY.get(model.ROI_HEADS.NAME)
    if heads is Res5ROIHeads and len(names) != 1:
        raise ValueError(
            f"MODEL.ROI_HEADS.IN_FEATURES is {names}, but MODEL.ROI_HEADS.NAME is Res5ROIHeads, "
            "which reads one map; write it, or other RoI heads"
        )
    start = given.index(names[0])
    # Of other RoI heads the extractors say what they need.
    if heads.__module__.startswith("detectron2.") and names != given[start:][: len(names)]:
        raise ValueError(
            f"MODEL.ROI_HEADS.IN_FEATURES is {names}; write maps that follow each other, of {given}"
        )


def _check_norms(cfg: CfgNode, two_stages: bool) -> None:
    """Kinds of normalisation where one is built, and what they ask of the width."""
    norm = cfg.MODEL.RESNETS.NORM
    heads = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)
    if norm == FROZEN_STATS and cfg.MODEL.BACKBONE.NAME == NORM_BUILDER and heads is Res5ROIHeads:
        raise ValueError(
            f"MODEL.RESNETS.NORM is {norm}, which MODEL.ROI_HEADS.NAME Res5ROIHeads cannot build; "
            "write FrozenBN, or other RoI heads"
        )
    for name, widths in _normed_widths(cfg, two_stages).items():
        norm, key = cfg.MODEL[name].NORM, f"MODEL.{name}.NORM"
        if norm == FROZEN_STATS and name == "RESNETS" and cfg.MODEL.BACKBONE.NAME == NORM_BUILDER:
            continue
        try:
            get_norm(norm, 32)
        except KeyError as error:
            raise ValueError(
                f"{key} is {norm!r}; write FrozenBN, BN, SyncBN, GN or '' ({FROZEN_STATS} is one "
                f"of MODEL.RESNETS.NORM under MODEL.BACKBONE.NAME {NORM_BUILDER})"
            ) from error
        for width in widths:
            if norm == "GN" and cfg.MODEL[name][width] % 32:
                raise ValueError(
                    f"MODEL.{name}.{width} is {cfg.MODEL[name][width]} and {key} GN, which makes "
                    "32 groups of the channels; write a multiple of 32, or another NORM"
                )
        if norm == "BN" and comm.get_world_size() > 1:
            logger.warning(
                "%s is BN, for which each of the %d processes has its own images alone; write "
                "SyncBN, or FrozenBN for a pretrained backbone",
                key,
                comm.get_world_size(),
            )


def _normed_widths(cfg: CfgNode, two_stages: bool) -> dict[str, tuple[str, ...]]:
    """The nodes whose NORM is built, with their keys of the layers' widths."""
    model, widths = cfg.MODEL, {}
    if model.BACKBONE.NAME in RESNET_BUILDERS:
        widths["RESNETS"] = ("STEM_OUT_CHANNELS", "WIDTH_PER_GROUP", "RES2_OUT_CHANNELS")
        if model.RESNETS.NUM_GROUPS > 1:  # together wide enough, as published
            widths["RESNETS"] = ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS")
    if _BUILDERS.get(model.BACKBONE.NAME) and not _has_simple_pyramid(cfg):
        widths["FPN"] = ("OUT_CHANNELS",)
    box, mask = model.ROI_BOX_HEAD, model.ROI_MASK_HEAD
    if two_stages and box.NAME == "FastRCNNConvFCHead" and box.NUM_CONV:
        widths["ROI_BOX_HEAD"] = ("CONV_DIM",)
    if two_stages and model.MASK_ON and mask.NUM_CONV:
        widths["ROI_MASK_HEAD"] = ("CONV_DIM",)
    return widths


def _check_anchors(cfg: CfgNode) -> None:
    node, levels = cfg.MODEL.ANCHOR_GENERATOR, len(cfg.MODEL.RPN.IN_FEATURES)
    counts = []
    for name in ("SIZES", "ASPECT_RATIOS"):
        values = list(node[name])
        # Detectron2 takes one flat list, too.
        lists = values if values and isinstance(values[0], (list, tuple)) else [values]
        nested = all(isinstance(v, (list, tuple)) and len(v) for v in lists)
        if not nested or len(lists) not in (1, levels):
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.{name} is {values}; write a list of one list, or of one "
                f"for each of the {levels} maps of MODEL.RPN.IN_FEATURES"
            )
        counts.append([len(v) for v in lists] * (levels // len(lists)))
    if len({sizes * ratios for sizes, ratios in zip(*counts, strict=True)}) > 1:
        raise ValueError(
            f"MODEL.ANCHOR_GENERATOR.SIZES is {node.SIZES} and ASPECT_RATIOS {node.ASPECT_RATIOS}; "
            "write as many anchors (sizes times ratios) for every map"
        )
