"""One box branch and one mask branch that the looped RoI heads run together.

Shape shorthand: R boxes of all images, K classes.
"""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_box_head, build_mask_head
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes
from torch import Tensor, nn

from .c2ssl import ContainmentHead, build_containment_head
from .extractors import build_roi_extractor
from .mask_heads import LoopMaskHead


class HeadPair(nn.Module):
    """One letter of the schedule: box branch and mask branch with their own extractors.

    Args:
        box_pooler, box_head, box_predictor: as in Detectron2's ``StandardROIHeads``; the
            predictor is class-agnostic for boxes.
        mask_pooler, mask_head: a ``LoopMaskHead`` and its extractor; None without masks.
        c2ssl_head: trains beside the box predictor on the same features; None without.
    """

    def __init__(
        self,
        *,
        box_pooler: nn.Module,
        box_head: nn.Module,
        box_predictor: FastRCNNOutputLayers,
        mask_pooler: nn.Module | None = None,
        mask_head: nn.Module | None = None,
        c2ssl_head: ContainmentHead | None = None,
    ) -> None:
        super().__init__()
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_pooler = mask_pooler
        self.mask_head = mask_head
        self.c2ssl_head = c2ssl_head

    @classmethod
    def build(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], box_reg_weights: tuple[float, ...]
    ) -> "HeadPair":
        """Build one pair; ``box_reg_weights`` are its box coder's."""
        channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        box_head = build_box_head(cfg, ShapeSpec(channels=channels, height=side, width=side))
        parts = {
            "box_pooler": build_roi_extractor(cfg, "ROI_BOX_HEAD", input_shape),
            "box_head": box_head,
            "box_predictor": FastRCNNOutputLayers(
                cfg, box_head.output_shape, box2box_transform=Box2BoxTransform(box_reg_weights)
            ),
        }
        parts["c2ssl_head"] = build_containment_head(
            cfg, parts["box_predictor"].cls_score.in_features
        )
        if cfg.MODEL.MASK_ON:
            side = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
            shape = ShapeSpec(channels=channels, height=side, width=side)
            parts["mask_pooler"] = build_roi_extractor(cfg, "ROI_MASK_HEAD", input_shape)
            parts["mask_head"] = build_mask_head(cfg, shape)
            if not isinstance(parts["mask_head"], LoopMaskHead):
                raise ValueError(
                    "LoopROIHeads needs MODEL.ROI_MASK_HEAD.NAME: LoopMaskHead, got "
                    f"{cfg.MODEL.ROI_MASK_HEAD.NAME}"
                )
        return cls(**parts)

    def box_features(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        """The box head's output (R, ...) for the given boxes."""
        return self.box_head(self.box_pooler(features, boxes))

    def predict_boxes(self, features: list[Tensor], boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        """Class logits (R, K + 1) and box deltas (R, 4) of the given boxes."""
        return self.box_predictor(self.box_features(features, boxes))
