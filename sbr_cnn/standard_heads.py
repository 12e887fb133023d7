"""Detectron2's RoI heads with any RoI extractor, with the Mask-IoU branch and with C2SSL.

Thesis sections 2.1 (GRoIE in Faster and Mask R-CNN) and 2.7, and the baseline Mask Scoring R-CNN.
"""

import torch
from detectron2.config import configurable
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor

from .c2ssl import ContainmentHead, build_containment_head
from .extractors import build_roi_extractor
from .mask_heads import select_class, train_masks
from .mask_iou import MaskIoUHead, build_mask_iou_head
from .statistics import RoIStatistics, build_statistics


@ROI_HEADS_REGISTRY.register()
class ExtractorROIHeads(StandardROIHeads):
    """Detectron2's ``StandardROIHeads`` with the extractors that ``EXTRACTOR`` names.

    With "single" everywhere and without further heads it computes what its parent does.

    Args:
        mask_iou_head: predicts the masks' IoU; detections then carry ``mask_scores``.
        c2ssl_head: trains beside the box predictor on the same features.
        statistics: counts what enters the box head in training, as loop 1.
        **kwargs: see Detectron2's ``StandardROIHeads``.
    """

    @configurable
    def __init__(
        self,
        *,
        mask_iou_head: MaskIoUHead | None = None,
        c2ssl_head: ContainmentHead | None = None,
        statistics: RoIStatistics | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.mask_iou_head = mask_iou_head
        self.c2ssl_head = c2ssl_head
        self.statistics = statistics

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        parts = super()._init_box_head(cfg, input_shape)
        parts["box_pooler"] = build_roi_extractor(cfg, "ROI_BOX_HEAD", input_shape)
        width = parts["box_predictor"].cls_score.in_features
        parts["c2ssl_head"] = build_containment_head(cfg, width)
        parts["statistics"] = build_statistics(cfg)
        return parts

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        parts = super()._init_mask_head(cfg, input_shape)
        if parts:
            parts["mask_pooler"] = build_roi_extractor(cfg, "ROI_MASK_HEAD", input_shape)
            channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
            parts["mask_iou_head"] = build_mask_iou_head(cfg, channels)
        return parts

    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """As Detectron2's; proposals also get ``gt_index``, the image's object that they match."""
        for target in targets:
            target.gt_index = torch.arange(len(target), device=target.gt_classes.device)
        if self.statistics is not None:
            self.statistics.add_proposals(1, [p.proposal_boxes for p in proposals], targets)
        samples = super().label_and_sample_proposals(proposals, targets)
        if self.c2ssl_head is not None:
            self.c2ssl_head.assign(samples, targets)
        if self.statistics is not None:
            self.statistics.add_sample(1, samples)
        return samples

    def _forward_box(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        if self.c2ssl_head is None or not self.training:
            return super()._forward_box(features, proposals)
        seen: list[Tensor] = []
        with self.box_head.register_forward_hook(lambda *args: seen.append(args[-1])):
            losses = super()._forward_box(features, proposals)
        return {**losses, "loss_c2ssl": self.c2ssl_head(seen[0], proposals)}

    def _forward_mask(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        if self.mask_iou_head is None:
            return super()._forward_mask(features, instances)
        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
        boxes = [i.proposal_boxes if self.training else i.pred_boxes for i in instances]
        x = self.mask_pooler([features[name] for name in self.mask_in_features], boxes)
        logits = self.mask_head.layers(x)
        if not self.training:
            mask_rcnn_inference(logits, instances)
            classes = torch.cat([i.pred_classes for i in instances])
            self.mask_iou_head.rescore(x, select_class(logits, classes), instances)
            return instances
        masks = [_distinct_masks(image) for image in instances]
        return train_masks(x, logits, instances, masks, self.mask_iou_head)


def _distinct_masks(image: Instances) -> BitMasks | PolygonMasks | None:
    """One mask per object, where Detectron2 has copied one per positive; adapts ``gt_index``."""
    if not image.has("gt_masks"):
        return None
    objects, image.gt_index = image.gt_index.unique(return_inverse=True)
    positives = torch.arange(len(image), device=objects.device)
    return image.gt_masks[torch.zeros_like(objects).scatter_(0, image.gt_index, positives)]
