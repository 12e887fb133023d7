"""The IoU-classification branch: will a box, once refined, overlap its object enough?

Thesis section 2.4.3, eq. 2.11 and 2.12, Fig. 2.15; where the text and the published code differ,
the code (all classes' deltas, logits instead of scores, the matched object instead of the best).

Shape shorthand: R RoIs of all images, K classes, D features, B = 4 K box deltas (4 if
class-agnostic).
"""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor, nn
from torch.nn import functional as F

from .losses import focal_binary

_INPUTS = ("feature", "logits", "deltas")
_ACTIVATIONS = {"elu": nn.ELU, "none": nn.Identity}
_LOSSES = ("focal", "soft_focal", "smooth_l1")


class IoUHead(nn.Module):
    """Two linear layers from a RoI's features, class logits and box deltas to K + 1 logits.

    The sigmoid of column k is the predicted probability that the box decoded for class k overlaps
    its object by more than mu ("focal"), or that overlap itself ("soft_focal", "smooth_l1"). The
    column of the background is never trained. Nothing is detached: the loss reaches the class
    and the box layer through their outputs.

    Args:
        feature_dim: D.
        delta_dim: B.
        num_classes: K.
        inputs: what it reads, of "feature" (always), "logits" and "deltas".
        hidden_dim: width between the layers.
        activation: between the layers, "elu" or "none".
        loss: "focal" on the question whether the IoU is above mu, "soft_focal" with the IoU as
            target, or "smooth_l1" between the sigmoid and the IoU.
        threshold: mu.
        focal_gamma: of both focal losses.
    """

    @configurable
    def __init__(
        self,
        *,
        feature_dim: int,
        delta_dim: int,
        num_classes: int,
        inputs: tuple[str, ...] = _INPUTS,
        hidden_dim: int = 1024,
        activation: str = "elu",
        loss: str = "focal",
        threshold: float = 0.75,
        focal_gamma: float = 1.5,
    ) -> None:
        super().__init__()
        widths = dict(zip(_INPUTS, (feature_dim, num_classes + 1, delta_dim), strict=True))
        self.layers = nn.Sequential(
            nn.Linear(sum(widths[name] for name in inputs), hidden_dim),
            _ACTIVATIONS[activation](),
            nn.Linear(hidden_dim, num_classes + 1),
        )
        for layer in (self.layers[0], self.layers[2]):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.inputs = inputs
        self.num_classes = num_classes
        self.loss_kind = loss
        self.threshold = threshold
        self.focal_gamma = focal_gamma

    @classmethod
    def from_config(cls, cfg: CfgNode, *, feature_dim: int, delta_dim: int) -> dict:
        """Read ``MODEL.ROI_IOU_HEAD`` and the number of classes."""
        node = cfg.MODEL.ROI_IOU_HEAD
        inputs = tuple(node.INPUTS)
        if "feature" not in inputs or set(inputs) - set(_INPUTS) or len(set(inputs)) < len(inputs):
            raise ValueError(
                'MODEL.ROI_IOU_HEAD.INPUTS has "feature" and, each at most once, "logits" and '
                f'"deltas"; got {inputs}'
            )
        for key, known in (("ACTIVATION", tuple(_ACTIVATIONS)), ("LOSS", _LOSSES)):
            if node[key] not in known:
                raise ValueError(f"MODEL.ROI_IOU_HEAD.{key} is one of {known}, got {node[key]!r}")
        if not 0 <= node.TRAIN_THRESH < 1:
            raise ValueError(
                f"MODEL.ROI_IOU_HEAD.TRAIN_THRESH is an IoU in [0, 1), got {node.TRAIN_THRESH}"
            )
        if node.FOCAL_GAMMA < 0:
            raise ValueError(f"MODEL.ROI_IOU_HEAD.FOCAL_GAMMA is 0 or more, got {node.FOCAL_GAMMA}")
        return {
            "feature_dim": feature_dim,
            "delta_dim": delta_dim,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "inputs": inputs,
            "hidden_dim": node.HIDDEN_DIM,
            "activation": node.ACTIVATION,
            "loss": node.LOSS,
            "threshold": node.TRAIN_THRESH,
            "focal_gamma": node.FOCAL_GAMMA,
        }

    def forward(self, features: Tensor, logits: Tensor, deltas: Tensor) -> Tensor:
        """Features (R, D), class logits (R, K + 1) and deltas (R, B) to IoU logits (R, K + 1)."""
        given = dict(zip(_INPUTS, (features, logits, deltas), strict=True))
        return self.layers(torch.cat([given[n] for n in _INPUTS if n in self.inputs], dim=1))

    def loss(self, iou_logits: Tensor, ious: Tensor, classes: Tensor) -> Tensor:
        """Loss of the positives, of each the column of its ground-truth class; in fp32.

        Args:
            iou_logits: (R, K + 1), what :meth:`forward` gave.
            ious: (R,) of the decoded boxes, see :func:`decoded_ious`; any value for background.
            classes: (R,) int64 in [0, K], K is background.

        Returns:
            A scalar: the focal losses' sum divided by R, that of smooth-L1 by the number of
            positives. Zero and still connected to the graph without positives.
        """
        # A mask over all rows instead of the positive rows, whose number only the device knows.
        logits = iou_logits.gather(1, classes[:, None])[:, 0].float()
        positive = classes < self.num_classes
        if self.loss_kind == "smooth_l1":
            losses = F.smooth_l1_loss(logits.sigmoid(), ious, reduction="none", beta=1.0)
            count = positive.sum().clamp(min=1)
        else:
            targets = ious if self.loss_kind == "soft_focal" else (ious > self.threshold)
            losses = focal_binary(logits, targets, self.focal_gamma)
            count = max(len(classes), 1)
        return torch.where(positive, losses, 0.0).sum() / count


@torch.no_grad()
def decoded_ious(
    deltas: Tensor, proposals: Tensor, gt_boxes: Tensor, classes: Tensor, coder: Box2BoxTransform
) -> Tensor:
    """IoU of each RoI's box, decoded for its ground-truth class, with the object it is matched to.

    The decoded box is not clipped to the image. No gradient passes.

    Args:
        deltas: (R, B), of any precision; decoded in fp32.
        proposals: (R, 4) boxes x1, y1, x2, y2 in pixels, to which the deltas apply.
        gt_boxes: (R, 4) matched by the proposals' IoU; anything for background.
        classes: (R,) int64 in [0, K], K is background.
        coder: of the deltas.

    Returns:
        (R,) fp32 in [0, 1]; meaningless for background.
    """
    if deltas.shape[1] > 4:
        per_class = deltas.unflatten(1, (-1, 4))
        column = classes.clamp(max=per_class.shape[1] - 1)[:, None, None].expand(-1, -1, 4)
        deltas = per_class.gather(1, column)[:, 0]
    decoded = coder.apply_deltas(deltas, proposals)
    # Two empty boxes, possible for background alone, have no IoU.
    return matched_pairwise_iou(Boxes(decoded), Boxes(gt_boxes.float())).nan_to_num(0.0)
