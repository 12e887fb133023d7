"""Configurations that cannot work, or not as they read, stopped before the first iteration.

What is the business of one class is checked where it is built; here is what nothing else looks at:
values out of range, mistakes that end in asserts of Detectron2, and keys that are not read. The
semi-supervised keys are thesis section 2.4's.
"""

import difflib
import logging
import math
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from .config import add_il_net_config
from .modeling.teacher_student import TeacherStudentRCNN

logger = logging.getLogger(__name__)

# What the numbers of keys are, each number of those that are lists.
_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "1 or more",
        lambda v: v >= 1,
        """SOLVER.MAX_ITER SOLVER.CHECKPOINT_PERIOD INPUT.MAX_SIZE_TRAIN INPUT.MAX_SIZE_TEST
        MODEL.FPN.OUT_CHANNELS MODEL.RESNETS.STEM_OUT_CHANNELS MODEL.RESNETS.RES2_OUT_CHANNELS
        MODEL.RESNETS.NUM_GROUPS MODEL.RESNETS.WIDTH_PER_GROUP MODEL.RPN.BATCH_SIZE_PER_IMAGE
        MODEL.RPN.PRE_NMS_TOPK_TRAIN MODEL.RPN.PRE_NMS_TOPK_TEST MODEL.RPN.POST_NMS_TOPK_TRAIN
        MODEL.RPN.POST_NMS_TOPK_TEST MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
        MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        MODEL.ROI_BOX_HEAD.FC_DIM MODEL.ROI_BOX_HEAD.CONV_DIM MODEL.ROI_MASK_HEAD.CONV_DIM
        MODEL.ROI_IOU_HEAD.HIDDEN_DIM SEMISUP.PSEUDO.MAX_PER_IMAGE TEST.PRECISE_BN.NUM_ITER""",
    ),
    (
        "0 or more",
        lambda v: v >= 0,
        """SOLVER.BASE_LR SOLVER.WEIGHT_DECAY SOLVER.WEIGHT_DECAY_NORM SOLVER.GAMMA SOLVER.STEPS
        SOLVER.WARMUP_ITERS SOLVER.REFERENCE_WORLD_SIZE SOLVER.BIAS_LR_FACTOR
        SOLVER.WEIGHT_DECAY_BIAS TEST.EVAL_PERIOD
        VIS_PERIOD DATALOADER.NUM_WORKERS DATALOADER.REPEAT_THRESHOLD INPUT.MIN_SIZE_TRAIN
        INPUT.MIN_SIZE_TEST MODEL.BACKBONE.FREEZE_AT MODEL.ROI_HEADS.NUM_CLASSES
        MODEL.PROPOSAL_GENERATOR.MIN_SIZE MODEL.RPN.SMOOTH_L1_BETA MODEL.RPN.LOSS_WEIGHT
        MODEL.RPN.BBOX_REG_LOSS_WEIGHT MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA
        MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT MODEL.ROI_BOX_HEAD.NUM_FC
        MODEL.ROI_BOX_HEAD.NUM_CONV MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO
        MODEL.ROI_MASK_HEAD.NUM_CONV MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO
        SEMISUP.BURN_IN_ITERS SEMISUP.PSEUDO.MIN_SIDE SOLVER.CHECKPOINTS_KEPT""",
    ),
    (
        "above 0",
        lambda v: v > 0,
        """SOLVER.CLIP_GRADIENTS.CLIP_VALUE MODEL.PIXEL_STD MODEL.ANCHOR_GENERATOR.SIZES
        MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS MODEL.RPN.BBOX_REG_WEIGHTS
        MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS""",
    ),
    (
        "in [0, 1]",
        lambda v: 0 <= v <= 1,
        """SOLVER.WARMUP_FACTOR MODEL.RPN.POSITIVE_FRACTION MODEL.RPN.NMS_THRESH
        MODEL.ROI_HEADS.POSITIVE_FRACTION MODEL.ROI_HEADS.NMS_THRESH_TEST""",
    ),
    (
        "in [0, 1)",
        lambda v: 0 <= v < 1,
        """SOLVER.MOMENTUM MODEL.ROI_HEADS.SCORE_THRESH_TEST MODEL.ROI_IOU_HEAD.TEST_THRESH
        MODEL.ANCHOR_GENERATOR.OFFSET""",
    ),
    (
        "in (0, 1]",
        lambda v: 0 < v <= 1,
        "MODEL.RPN.IOU_THRESHOLDS MODEL.ROI_HEADS.IOU_THRESHOLDS",
    ),
    ("-1, 0 or 1", lambda v: v in (-1, 0, 1), "MODEL.RPN.IOU_LABELS MODEL.ROI_HEADS.IOU_LABELS"),
    ("below 4294900000 (below 0: random)", lambda v: v < 4294900000, "SEED"),
)
_MAY_BE_INFINITE = "SOLVER.CLIP_GRADIENTS.NORM_TYPE"
_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
_POOLERS = ("ROIAlignV2", "ROIAlign", "ROIPool", "ROIAlignRotated")
_CHOICES = {
    "INPUT.FORMAT": ("BGR", "RGB", "L", "YUV-BT.601"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",  # not in release 0.6, which says so
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLERS,
}


def check_il_net_config(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Check what the run would stumble over, or ignore; call it after ``register_datasets``.

    A key that only sets a part up which is off is a warning. A part that is switched on and would
    not act is an error.

    Args:
        cfg: with the keys of ``add_il_net_config``; others are left alone.
        eval_only: nothing will be trained.

    Raises:
        ValueError: says the key, its value and what to write instead.
    """
    for key, value in _leaves(cfg):
        if key != _MAY_BE_INFINITE and not all(map(math.isfinite, _numbers(value))):
            raise ValueError(f"{key} is {value}; write a finite number")
    for wanted, is_good, keys in _RANGES:
        for key in keys.split():
            if not all(map(is_good, _numbers(_get(cfg, key)))):
                raise ValueError(f"{key} is {_get(cfg, key)}; write {wanted}")
    for key, known in _CHOICES.items():
        if _get(cfg, key) not in known:
            near = difflib.get_close_matches(str(_get(cfg, key)), known, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{key} is {_get(cfg, key)!r}; write one of {', '.join(known)}{hint}")
    _check_device(cfg)
    _check_pictures(cfg)
    for key in ("MODEL.RPN", "MODEL.ROI_HEADS"):
        _check_matching(cfg, key)
    if eval_only and not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is (): write the datasets to evaluate on")
    if not eval_only:
        _check_training(cfg)
    if TeacherStudentRCNN.__name__ == cfg.MODEL.META_ARCHITECTURE:
        _check_semi_supervised(cfg)
    else:
        _check_plain(cfg)


def _check_device(cfg: CfgNode) -> None:
    device = cfg.MODEL.DEVICE
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE is {device!r}; write cuda or cpu") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"MODEL.DEVICE is {device!r}, but there is no GPU; write cpu")


def _check_pictures(cfg: CfgNode) -> None:
    """Sizes and channels of the pictures."""
    node, channels = cfg.INPUT, 1 if cfg.INPUT.FORMAT == "L" else 3
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) != channels:
            raise ValueError(
                f"MODEL.{key} is {cfg.MODEL[key]}; write {channels} numbers, one for each channel "
                f"of INPUT.FORMAT {node.FORMAT}"
            )
    count, sampling = len(node.MIN_SIZE_TRAIN), node.MIN_SIZE_TRAIN_SAMPLING
    if count == 0 or (sampling == "range" and count != 2):
        wanted = "the shortest and the longest" if sampling == "range" else "at least one length"
        raise ValueError(
            f"INPUT.MIN_SIZE_TRAIN is {node.MIN_SIZE_TRAIN} and MIN_SIZE_TRAIN_SAMPLING "
            f"{sampling}; write {wanted}"
        )
    if len(node.CROP.SIZE) != 2:
        raise ValueError(f"INPUT.CROP.SIZE is {node.CROP.SIZE}; write height and width")


def _check_matching(cfg: CfgNode, key: str) -> None:
    """Thresholds and labels of a matcher, and the weights of its box coder."""
    node = _get(cfg, key)
    thresholds, labels = list(node.IOU_THRESHOLDS), list(node.IOU_LABELS)
    if not thresholds or thresholds != sorted(thresholds) or len(labels) != len(thresholds) + 1:
        raise ValueError(
            f"{key}.IOU_THRESHOLDS is {thresholds} and IOU_LABELS {labels}; write rising "
            "thresholds and one label more, that of each span between them"
        )
    coder = key if key == "MODEL.RPN" else "MODEL.ROI_BOX_HEAD"
    weights = _get(cfg, coder).BBOX_REG_WEIGHTS
    if len(weights) not in (4, 5):
        raise ValueError(
            f"{coder}.BBOX_REG_WEIGHTS is {weights}; write four numbers, for x, y, width and "
            "height (five with rotated boxes)"
        )


def _check_training(cfg: CfgNode) -> None:
    """Datasets and schedule."""
    solver = cfg.SOLVER
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is (): write the datasets to train on")
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps, last = list(solver.STEPS), solver.MAX_ITER
        if steps != sorted(steps) or last in steps:
            raise ValueError(
                f"SOLVER.STEPS is {solver.STEPS}; write rising iterations below SOLVER.MAX_ITER "
                f"{last}"
            )
        if late := [step for step in steps if step > last]:
            logger.warning(
                "SOLVER.STEPS has %s, which SOLVER.MAX_ITER %d never reaches: the learning rate "
                "does not fall there; write iterations below %d, or [] for none",
                late,
                last,
                last,
            )
    split = cfg.DATASETS.SPLIT
    if (split.STRATIFIED or split.NESTED) and (split.PERCENT == 100 or split.FILE):
        logger.warning(
            "DATASETS.SPLIT.STRATIFIED %s and NESTED %s are not read: they are ways to draw, and "
            "with DATASETS.SPLIT.PERCENT %g and FILE %r nothing is drawn; write False",
            split.STRATIFIED,
            split.NESTED,
            split.PERCENT,
            split.FILE,
        )


def _check_semi_supervised(cfg: CfgNode) -> None:
    head, changed = cfg.MODEL.ROI_IOU_HEAD, _changed(cfg, "MODEL.ROI_IOU_HEAD")
    if cfg.SEMISUP.LOSS_WEIGHT.MASK > 0 and not cfg.MODEL.MASK_ON:
        raise ValueError(
            f"SEMISUP.LOSS_WEIGHT.MASK is {cfg.SEMISUP.LOSS_WEIGHT.MASK}, but MODEL.MASK_ON is "
            "False, so that there are no pseudo masks; write 0, or MODEL.MASK_ON True"
        )
    if not head.ENABLED:
        if "MODEL.ROI_IOU_HEAD.TEST_THRESH" in changed:
            raise ValueError(
                f"MODEL.ROI_IOU_HEAD.TEST_THRESH is {head.TEST_THRESH}, but the branch that it is "
                "a threshold of is off; write MODEL.ROI_IOU_HEAD.ENABLED True, or leave the key out"
            )
        _warn_unread(changed, "MODEL.ROI_IOU_HEAD.ENABLED is False; write True, or leave them out")
    if not cfg.INPUT.STRONG_AUG.ENABLED:
        details = _changed(cfg, "INPUT.STRONG_AUG")
        del details["INPUT.STRONG_AUG.ENABLED"]
        _warn_unread(details, "INPUT.STRONG_AUG.ENABLED is False; write True, or leave them out")


def _check_plain(cfg: CfgNode) -> None:
    name = f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}"
    if cfg.MODEL.ROI_IOU_HEAD.ENABLED:
        raise ValueError(
            f"MODEL.ROI_IOU_HEAD.ENABLED is True, but {name}: only TeacherStudentRCNN builds the "
            "branch; write False, or MODEL.META_ARCHITECTURE TeacherStudentRCNN"
        )
    advice = f"{name}; write TeacherStudentRCNN, or leave them out"
    nodes = ("SEMISUP", "MODEL.ROI_IOU_HEAD", "INPUT.STRONG_AUG", "SOLVER.IMS_PER_BATCH_UNLABELED")
    for node in nodes:
        _warn_unread(_changed(cfg, node), advice)


def _warn_unread(changed: dict[str, Any], advice: str) -> None:
    if changed:
        keys = ", ".join(f"{key} {value}" for key, value in changed.items())
        logger.warning("Not read: %s, because %s", keys, advice)


def _changed(cfg: CfgNode, key: str) -> dict[str, Any]:
    """The keys in a node, or the one key, that differ from the defaults of this package."""
    default = get_cfg()
    add_il_net_config(default)
    before = dict(_leaves(_get(default, key), key))
    return {k: v for k, v in _leaves(_get(cfg, key), key) if v != before[k]}


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, CfgNode):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{key}.{name}" if key else name)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, (int, float)):
        yield value


def _get(cfg: CfgNode, key: str) -> Any:
    return reduce(CfgNode.__getitem__, key.split("."), cfg)
