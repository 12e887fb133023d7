"""Architectures that cannot be built, or not as the configuration reads, found before building.

What one class needs is checked in its ``from_config``; here are the names in Detectron2's
registries, the mistakes that end in its asserts, and the keys that what is named does not read.
"""

import difflib
import logging
from collections.abc import Iterator
from functools import reduce
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads

from .backbone_checks import NORM_BUILDER, RESNET_BUILDERS, TIMM_BUILDER, check_backbone
from .config import add_sbr_cnn_config
from .fcc import FCCBoxHead
from .grid import GridROIHeads
from .loop_heads import LoopROIHeads

logger = logging.getLogger(__name__)

_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}
# Names that Detectron2 knows without a registry.
_UNREGISTERED = {"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"}
# Detectors with an RPN and RoI heads; the last is another package's and known by name alone.
_TWO_STAGES = ("GeneralizedRCNN", "PanopticFPN", "TeacherStudentRCNN")


def check_sbr_cnn_config(cfg: CfgNode) -> None:
    """Check what building the model would stumble over, or ignore.

    A key that only sets a part up which is off or not chosen is a warning. A part that is switched
    on and would not act is an error. Classes and builders of others are trusted to read all.

    Args:
        cfg: with the keys of ``add_sbr_cnn_config``, its number of classes known.

    Raises:
        ValueError: says the key, its value and what to write instead.
    """
    _check_names(cfg)
    weights = cfg.MODEL.C2SSL.CLASS_WEIGHTS
    if not all(type(weight) in (int, float) for weight in weights):
        raise ValueError(f"MODEL.C2SSL.CLASS_WEIGHTS is {weights}; write four numbers, or []")
    two_stages = cfg.MODEL.META_ARCHITECTURE in _TWO_STAGES
    check_backbone(cfg, two_stages=two_stages)
    if two_stages:
        _check_roi_heads(cfg)
    _check_switches(cfg)
    _warn_unread(cfg)


def _check_names(cfg: CfgNode) -> None:
    for key, registry in _REGISTRIES.items():
        name = _get(cfg, key)
        if name in registry or name == _UNREGISTERED.get(key):
            continue
        # Without a name, RoI heads that build no box head.
        if key == "MODEL.ROI_BOX_HEAD.NAME" and not name and not _has_box_head(cfg):
            continue
        known = [known for known, _ in registry]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{key} is {name!r}; write one of {', '.join(known)}{hint}")


def _check_roi_heads(cfg: CfgNode) -> None:
    heads, box = _roi_heads(cfg), cfg.MODEL.ROI_BOX_HEAD
    if _has_box_head(cfg) and box.NAME == "FastRCNNConvFCHead" and not box.NUM_FC + box.NUM_CONV:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.NUM_FC and NUM_CONV are 0; write NUM_FC 2 for the usual head"
        )
    if heads is LoopROIHeads:
        _check_coders(cfg, "MODEL.ROI_LOOP_HEAD")
        for key in ("MODEL.KEYPOINT_ON", "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES"):
            if _get(cfg, key):
                raise ValueError(f"{key} is True, which LoopROIHeads cannot do; write False")
    elif heads is CascadeROIHeads:
        _check_coders(cfg, "MODEL.ROI_BOX_CASCADE_HEAD")
        cascade, first = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS
        if not box.CLS_AGNOSTIC_BBOX_REG:
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False; CascadeROIHeads needs True"
            )
        stages = len(cascade.BBOX_REG_WEIGHTS)
        if len(cascade.IOUS) != stages or list(cascade.IOUS[:1]) != list(first):
            raise ValueError(
                f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS is {cascade.IOUS}; write {stages}, as many as "
                f"BBOX_REG_WEIGHTS, of which the first is MODEL.ROI_HEADS.IOU_THRESHOLDS, {first}"
            )


def _check_coders(cfg: CfgNode, key: str) -> None:
    for weights in _get(cfg, key).BBOX_REG_WEIGHTS:
        four = isinstance(weights, (list, tuple)) and len(weights) == 4
        if not four or not all(weight > 0 for weight in weights):
            raise ValueError(
                f"{key}.BBOX_REG_WEIGHTS has {weights}; write four numbers above 0, for x, y, "
                "width and height, of each head"
            )


def _check_switches(cfg: CfgNode) -> None:
    """Parts that are switched on and would not be there."""
    model = cfg.MODEL
    architecture = META_ARCH_REGISTRY.get(model.META_ARCHITECTURE)
    if _is_detectron2s(architecture) and model.META_ARCHITECTURE not in _TWO_STAGES:
        reader = f"MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE}"
    elif _is_detectron2s(_roi_heads(cfg)):
        reader = f"MODEL.ROI_HEADS.NAME {model.ROI_HEADS.NAME}"
    else:
        return
    # The values for off.
    switches = {
        "MODEL.ROI_BOX_HEAD.EXTRACTOR": "single",
        "MODEL.C2SSL.ENABLED": False,
        "MODEL.ROI_STATISTICS_PERIOD": 0,
    }
    if model.MASK_ON:
        switches["MODEL.ROI_MASK_HEAD.EXTRACTOR"] = "single"
        switches["MODEL.MASK_IOU_HEAD.ENABLED"] = False
    for key, off in switches.items():
        if _get(cfg, key) != off:
            raise ValueError(
                f"{key} is {_get(cfg, key)}, which {reader} does not read; write {off}, or take "
                "MODEL.ROI_HEADS.NAME ExtractorROIHeads or LoopROIHeads"
            )


def _warn_unread(cfg: CfgNode) -> None:
    """Settings of parts that are off or not chosen."""
    default = get_cfg()
    add_sbr_cnn_config(default)

    def warn(read: bool, because: str, *keys: str) -> None:
        changed = {} if read else {k: v for key in keys for k, v in _changed(cfg, default, key)}
        if changed:
            texts = ", ".join(f"{key} {value}" for key, value in changed.items())
            logger.warning("Not read: %s, because %s, or leave them out", texts, because)

    model, heads = cfg.MODEL, _roi_heads(cfg)
    name = f"MODEL.ROI_HEADS.NAME is {model.ROI_HEADS.NAME}"
    warn(_is(heads, LoopROIHeads), f"{name}; write LoopROIHeads", "MODEL.ROI_LOOP_HEAD")
    warn(_is(heads, GridROIHeads), f"{name}; write GridROIHeads", "MODEL.ROI_GRID_HEAD")
    warn(
        heads is not LoopROIHeads,
        f"{name}; write MODEL.ROI_LOOP_HEAD.IOUS and BBOX_REG_WEIGHTS",
        *("MODEL.ROI_HEADS.IOU_THRESHOLDS", "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS"),
    )
    box = model.ROI_BOX_HEAD.NAME
    fcc = bool(box) and _is(ROI_BOX_HEAD_REGISTRY.get(box), FCCBoxHead)
    warn(fcc, f"MODEL.ROI_BOX_HEAD.NAME is {box!r}; write FCCBoxHead", "MODEL.FCC")
    extractors = [model[part].EXTRACTOR for part in ("ROI_BOX_HEAD", "ROI_MASK_HEAD")]
    extractors.append(model.ROI_GRID_HEAD.EXTRACTOR)
    warn("groie" in extractors, f"no EXTRACTOR is groie ({extractors}); write it", "MODEL.GROIE")
    for key in ("MODEL.MASK_IOU_HEAD", "MODEL.C2SSL"):
        warn(_get(cfg, key).ENABLED, f"{key}.ENABLED is False; write True", key)
    # A base's branch without masks is what "boxes only" means: no error.
    mask_iou = "MODEL.MASK_IOU_HEAD.ENABLED"
    warn(model.MASK_ON, "MODEL.MASK_ON is False; write True", mask_iou)
    stages = model.GC_BLOCK.ON_PER_STAGE
    warn(any(stages), f"MODEL.GC_BLOCK.ON_PER_STAGE is {stages}; write some True", "MODEL.GC_BLOCK")
    builder = model.BACKBONE.NAME
    name = f"MODEL.BACKBONE.NAME is {builder}; write"
    warn(builder not in RESNET_BUILDERS, f"{name} {TIMM_BUILDER}", "MODEL.TIMM")
    keys = ("MODEL.RESNETS.DEPTH", "MODEL.RESNETS.NORM")
    warn(builder != TIMM_BUILDER, f"{name} {NORM_BUILDER}", *keys)


def _changed(cfg: CfgNode, default: CfgNode, key: str) -> Iterator[tuple[str, Any]]:
    """The keys in a node, or the one key, with values other than the default."""
    value, before = _get(cfg, key), _get(default, key)
    if not isinstance(value, CfgNode):
        value, before, key = {key: value}, {key: before}, ""
    for name in value:
        if _as_lists(value[name]) != _as_lists(before[name]):
            yield f"{key}.{name}" if key else name, value[name]


def _as_lists(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples in lists."""
    return [_as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def _roi_heads(cfg: CfgNode) -> type:
    return ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)


def _has_box_head(cfg: CfgNode) -> bool:
    """Whether ``MODEL.ROI_BOX_HEAD.NAME`` is built, so far as one can know."""
    heads = (StandardROIHeads, LoopROIHeads)
    return cfg.MODEL.META_ARCHITECTURE in _TWO_STAGES and issubclass(_roi_heads(cfg), heads)


def _is_detectron2s(registered: Any) -> bool:
    return registered.__module__.startswith("detectron2.")


def _is(registered: Any, kind: type) -> bool:
    """Whether a class is of that kind, or somebody else's, which may read anything."""
    if isinstance(registered, type) and issubclass(registered, kind):
        return True
    return not registered.__module__.startswith(("detectron2.", "sbr_cnn."))


def _get(cfg: CfgNode, key: str) -> Any:
    return reduce(CfgNode.__getitem__, key.split("."), cfg)
