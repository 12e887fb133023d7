"""Focal losses, and the weights of the losses on unlabelled images.

Thesis section 2.4.3, eq. 2.10 (weights) and 2.11 (focal loss of the IoU branch); Lin et al., "Focal
Loss for Dense Object Detection", without its alpha.

Shape shorthand: R RoIs of all images, K classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

# Beginning of a loss' name to its group, a key of SEMISUP.LOSS_WEIGHT.
_GROUPS = {
    "loss_rpn_cls": "RPN_CLS",
    "loss_rpn_loc": "RPN_LOC",
    "loss_cls": "CLS",
    "loss_c2ssl": "CLS",
    "loss_box_reg": "BOX_REG",
    "loss_grid": "BOX_REG",
    "loss_box_iou": "IOU",
    "loss_mask": "MASK",
}


def focal_cross_entropy(logits: Tensor, classes: Tensor, gamma: float) -> Tensor:
    """Mean over the RoIs of ``(1 - p)^gamma * CE``, p the softmax probability of the true class.

    Args:
        logits: (R, K + 1), of any precision; computed in fp32.
        classes: (R,) int64 in [0, K], K is background.
        gamma: 0 is plain cross-entropy.

    Returns:
        A scalar; zero and still connected to the graph when R is 0.
    """
    entropy = F.cross_entropy(logits.float(), classes, reduction="none")
    return _focus(entropy, gamma).sum() / max(len(classes), 1)


def focal_binary(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """``(1 - exp(-BCE))^gamma * BCE`` of each element, in fp32.

    Args:
        logits: of any shape, before the sigmoid.
        targets: the same shape, zeros and ones, or soft values between them.
        gamma: 0 is plain binary cross-entropy.

    Returns:
        The losses, of the same shape.
    """
    logits, targets = logits.float(), targets.float()
    return _focus(F.binary_cross_entropy_with_logits(logits, targets, reduction="none"), gamma)


def _focus(entropy: Tensor, gamma: float) -> Tensor:
    # expm1 keeps 1 - p exact for a p near 1; the floor keeps the gradient finite at p = 1, where
    # that of a root (gamma below 1) is not.
    return (-torch.expm1(-entropy)).clamp(min=1e-12) ** gamma * entropy


def weigh(
    losses: Mapping[str, Tensor], weights: Mapping[str, float], suffix: str = "_pseudo"
) -> dict[str, Tensor]:
    """Multiply each loss by its group's weight and mark its name.

    Args:
        losses: named as Detectron2's and ``sbr_cnn``'s heads name them, with or without an ending
            such as ``_loop2`` or ``_stage0``.
        weights: group ("CLS", "RPN_CLS", "BOX_REG", "RPN_LOC", "IOU", "MASK") to weight.
        suffix: put at the end of every name.

    Returns:
        The weighted losses. Those of weight 0 are left out: 0 times an infinite loss is not 0.

    Raises:
        ValueError: a loss of no group.
    """
    weighted = {}
    for name, loss in losses.items():
        weight = weights[_group(name)]
        if weight:
            weighted[f"{name}{suffix}"] = weight * loss
    return weighted


def _group(name: str) -> str:
    for start, group in _GROUPS.items():
        if name == start or name.startswith(f"{start}_"):
            return group
    raise ValueError(
        f"The detector's loss {name!r} on unlabelled images has no weight: SEMISUP.LOSS_WEIGHT "
        f"covers {', '.join(_GROUPS)}. Turn off the head that has this loss"
    )
