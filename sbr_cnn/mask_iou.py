"""The Mask-IoU branch: predicts how well each mask fits, to rank masks by it.

Thesis section 2.3.4 and Table 2.16; Huang et al., "Mask Scoring R-CNN". The score it gives counts
for mask AP only: box results keep the class score.

Shape shorthand: R RoIs, G ground-truth masks of one image, C channels, K classes, S the pooled
side (14), M the mask's side (28).
"""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn
from torch.nn import functional as F

from .fcc import LAYERS as FCC_LAYERS
from .fcc import build_fcc_layers

LAYERS = ("fc", *FCC_LAYERS)
FC_DIM = 1024


class MaskIoUHead(nn.Module):
    """Predicts the IoU of a mask with its whole object from RoI features and the mask's logits.

    Four 3x3 convolutions on C + 1 channels, the last with stride 2; then two FC layers of 1024
    (the original) or FCC layers; then one linear value per class, not clamped.

    Args:
        input_shape: C and S of the mask branch's features.
        num_classes: K.
        layers: "fc", or the FCC layers of :func:`.fcc.build_fcc_layers`.
        non_local_before, non_local_after: as there.
        loss_weight: factor of the loss.
        threshold_logits: in the training target a predicted mask is where its *logit* is above
            0.5, as all published code has it; False: where its probability is.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        layers: str = "fc",
        non_local_before: bool = False,
        non_local_after: bool = False,
        loss_weight: float = 0.5,
        threshold_logits: bool = True,
    ) -> None:
        super().__init__()
        channels, side = input_shape.channels, (input_shape.height + 1) // 2
        convs: list[nn.Module] = []
        for i in range(4):
            conv = nn.Conv2d(channels + (i == 0), channels, 3, padding=1, stride=2 if i == 3 else 1)
            c2_msra_fill(conv)
            convs += [conv, nn.ReLU()]
        self.convs = nn.Sequential(*convs)
        if layers == "fc":
            fc1, fc2 = nn.Linear(channels * side**2, FC_DIM), nn.Linear(FC_DIM, FC_DIM)
            c2_xavier_fill(fc1)
            c2_xavier_fill(fc2)
            self.layers = nn.Sequential(nn.Flatten(), fc1, nn.ReLU(), fc2, nn.ReLU())
            width = FC_DIM
        else:
            self.layers = build_fcc_layers(
                channels,
                side,
                layers,
                non_local_before=non_local_before,
                non_local_after=non_local_after,
            )
            width = channels // 4 * side**2
        self.predictor = nn.Linear(width, num_classes)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)
        self.loss_weight = loss_weight
        self.threshold_logits = threshold_logits

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Read ``MODEL.MASK_IOU_HEAD`` and the number of classes."""
        node = cfg.MODEL.MASK_IOU_HEAD
        if node.LAYERS not in LAYERS:
            raise ValueError(f"MODEL.MASK_IOU_HEAD.LAYERS is one of {LAYERS}, got {node.LAYERS!r}")
        if node.LAYERS == "fc" and (node.NON_LOCAL_BEFORE or node.NON_LOCAL_AFTER):
            raise ValueError(
                "MODEL.MASK_IOU_HEAD.NON_LOCAL_BEFORE and NON_LOCAL_AFTER need convolutions: "
                f"LAYERS one of {FCC_LAYERS}, got 'fc'"
            )
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "layers": node.LAYERS,
            "non_local_before": node.NON_LOCAL_BEFORE,
            "non_local_after": node.NON_LOCAL_AFTER,
            "loss_weight": node.LOSS_WEIGHT,
            "threshold_logits": node.THRESHOLD_LOGITS,
        }

    def forward(self, x: Tensor, logits: Tensor, classes: Tensor) -> Tensor:
        """Predicted IoU of each RoI's class.

        Args:
            x: the mask branch's pooled features, (R, C, S, S).
            logits: mask logits of each RoI's class, (R, M, M) with M = 2 S.
            classes: (R,) in [0, K).

        Returns:
            (R,), not clamped.
        """
        masks = F.max_pool2d(logits[:, None].sigmoid(), 2)
        features = self.layers(self.convs(torch.cat([x, masks.to(x.dtype)], dim=1)))
        return self.predictor(features.flatten(1)).gather(1, classes[:, None])[:, 0]

    def loss(
        self, x: Tensor, logits: Tensor, classes: Tensor, targets: Tensor, inside: Tensor
    ) -> Tensor:
        """Weighted mean squared error over the positives whose target is above 0.

        Gradients reach the features and the mask logits.

        Args:
            x, logits, classes: as in :meth:`forward`, with the ground-truth classes.
            targets: (R, M, M) of zeros and ones, the mask targets.
            inside: (R,) share of each ground-truth mask inside its box, see
                :func:`fraction_inside`.

        Returns:
            A scalar; zero and still connected to the graph without such a positive.
        """
        predicted = self(x, logits, classes).float()
        masks = logits > (0.5 if self.threshold_logits else 0.0)  # 0 is a probability of 0.5
        wanted = mask_iou_targets(masks, targets, inside)
        counted = wanted > 0
        errors = ((predicted - wanted) * counted).square()
        return self.loss_weight * errors.sum() / counted.sum().clamp(min=1)

    def rescore(self, x: Tensor, logits: Tensor, instances: list[Instances]) -> None:
        """Give each image's detections ``mask_scores`` (R_i,): class score times predicted IoU.

        Given boxes without ``scores`` get none.

        Args:
            x, logits: as in :meth:`forward`, of the detections of all images.
            instances: detections with ``pred_classes``.
        """
        ious = self(x, logits, torch.cat([i.pred_classes for i in instances])).float()
        per_image = ious.split([len(i) for i in instances])
        for image, image_ious in zip(instances, per_image, strict=True):
            if image.has("scores"):
                image.mask_scores = image.scores * image_ious


def build_mask_iou_head(cfg: CfgNode, channels: int) -> MaskIoUHead | None:
    """The head that ``MODEL.MASK_IOU_HEAD`` asks for, None when it is off or masks are.

    Args:
        cfg: the whole configuration.
        channels: C of the mask branch's pooled features.
    """
    if not (cfg.MODEL.MASK_ON and cfg.MODEL.MASK_IOU_HEAD.ENABLED):
        return None
    side = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
    return MaskIoUHead(cfg, ShapeSpec(channels=channels, height=side, width=side))


def mask_iou_targets(predicted: Tensor, targets: Tensor, inside: Tensor) -> Tensor:
    """IoU of predicted masks with the *whole* objects, from what lies inside the boxes.

    The object's area on the mask's grid is the target's area divided by ``inside``.

    Args:
        predicted: (R, M, M) bool.
        targets: (R, M, M) of zeros and ones.
        inside: (R,) in [0, 1].

    Returns:
        (R,) fp32 in [0, 1]; 0 where both masks are empty.
    """
    overlap = (predicted * targets).sum(dim=(1, 2))
    whole = targets.sum(dim=(1, 2)) / (inside + 1e-7)
    union = predicted.sum(dim=(1, 2)) + whole - overlap
    return torch.where(union > 0, overlap / union, 0.0)


def fraction_inside(masks: Tensor, boxes: Tensor, index: Tensor) -> Tensor:
    """Share of each ground-truth mask's pixels inside its integer-truncated box.

    Args:
        masks: (G, H, W) bool.
        boxes: (R, 4) as x1, y1, x2, y2 in the image's pixels.
        index: (R,) int64, which mask each box takes.

    Returns:
        (R,) fp32; a box covers at least one pixel.
    """
    # Sums over all rectangles from the corner: four lookups a box instead of a crop.
    sums = F.pad(masks.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32), (1, 0, 1, 0))
    height, width = masks.shape[1:]
    x1, y1, x2, y2 = boxes.long().unbind(1)
    x1, y1 = x1.clamp(0, width - 1), y1.clamp(0, height - 1)
    x2 = torch.maximum(x2.clamp(max=width), x1 + 1)
    y2 = torch.maximum(y2.clamp(max=height), y1 + 1)
    within = sums[index, y2, x2] - sums[index, y1, x2] - sums[index, y2, x1] + sums[index, y1, x1]
    return within / (sums[index, -1, -1] + 1e-7)
