"""Leave out parts of a detector whose result has no weight or no reader.

Thesis section 2.4: the groups of losses on pseudo labels have weights (beta is 0 in Unbiased
Teacher).
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from detectron2.modeling.proposal_generator import RPN
from torch import Tensor, nn
from torch.nn import functional as F

from .box_predictor import ILNetOutputLayers


@contextmanager
def without_masks(detector: nn.Module) -> Iterator[None]:
    """Leave the mask branch out, in training and at inference."""
    heads = detector.roi_heads
    before = getattr(heads, "mask_on", False)
    heads.mask_on = False
    try:
        yield
    finally:
        heads.mask_on = before


@contextmanager
def without_losses(detector: nn.Module, groups: Collection[str]) -> Iterator[None]:
    """Do not compute the losses of some groups (see :func:`.losses.weigh`).

    "MASK" leaves the branch out, "IOU" and "BOX_REG" the losses of the box predictors, "RPN_LOC"
    that of Detectron2's own RPN. What is left out is missing from the loss dictionary or a zero.
    The losses of classification, cheap beside what they are computed from, always are.
    """
    with ExitStack() as stack:
        if "MASK" in groups:
            stack.enter_context(without_masks(detector))
        for module in detector.modules():
            if isinstance(module, ILNetOutputLayers):
                stack.enter_context(_set(module, "skipped", frozenset(groups)))
        generator = detector.proposal_generator
        if "RPN_LOC" in groups and type(generator).losses is RPN.losses:
            stack.enter_context(_set(generator, "losses", _objectness_loss(generator)))
        yield


@contextmanager
def _set(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """An attribute of the object that hides its class' for a while."""
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)


def _objectness_loss(rpn: RPN) -> Callable[..., dict[str, Tensor]]:
    """``RPN.losses`` without the localisation loss, of which it encodes every anchor."""

    def losses(
        anchors: list,
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        labels = torch.stack(gt_labels)
        logits = torch.cat(pred_objectness_logits, dim=1)
        loss = F.binary_cross_entropy_with_logits(
            logits, labels.clamp(min=0).to(logits.dtype), reduction="none"
        )
        sampled = torch.where(labels >= 0, loss, 0.0).sum()
        scale = rpn.loss_weight.get("loss_rpn_cls", 1.0) / rpn.batch_size_per_image
        return {"loss_rpn_cls": sampled * (scale / len(gt_labels))}

    return losses
