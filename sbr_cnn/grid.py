"""Grid R-CNN: boxes are located by a 3x3 grid of key points instead of regressed.

Host of rows 3 and 4 of thesis Table 2.5 (section 2.1); Grid R-CNN (arXiv 1811.12030) in the form
of the thesis' code.

Shape shorthand: R boxes of all images, K classes.
"""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from .extractors import build_roi_extractor
from .grid_head import GridHead
from .grid_targets import decode_boxes, grid_targets, jitter_boxes
from .standard_heads import ExtractorROIHeads


class ClassOutputLayers(FastRCNNOutputLayers):
    """Detectron2's box predictor with classification only: no box layer and no box loss.

    All deltas are zero, so that every box stays where it is. The keys of box regression
    (``MODEL.ROI_BOX_HEAD.BBOX_REG_*``, ``CLS_AGNOSTIC_BBOX_REG``) have no effect.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, **kwargs) -> None:
        super().__init__(input_shape, **kwargs)
        del self.bbox_pred

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (R, ...) to class logits (R, K + 1) and zero deltas (R, 4)."""
        scores = self.cls_score(x.flatten(start_dim=1))
        return scores, scores.new_zeros(len(scores), 4)

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """``loss_cls`` alone; see Detectron2's ``FastRCNNOutputLayers.losses``."""
        losses = super().losses(predictions, proposals)
        del losses["loss_box_reg"]
        return losses


@ROI_HEADS_REGISTRY.register()
class GridROIHeads(ExtractorROIHeads):
    """Grid R-CNN's RoI heads: proposals are classified, then located by their grid points.

    Training: ``loss_cls`` on the sampled proposals; ``loss_grid`` on at most ``max_positives`` of
    this process' positives, drawn at random and jittered.

    Inference: proposals are the candidates of every class (threshold, NMS and the best per
    image by ``MODEL.ROI_HEADS`` and ``TEST``); the grid branch then moves the boxes that are left.

    Decisions, as the thesis' code: the features are pooled from the box itself although the heat
    maps cover twice its width and height; no second NMS after the boxes have moved.

    Args:
        grid_pooler: the grid branch's RoI extractor.
        grid_head: the grid branch.
        loss_weight: of ``loss_grid``.
        jitter: see :func:`jitter_boxes`.
        max_positives: most boxes that train the grid branch, per process and step.
        **kwargs: see Detectron2's ``StandardROIHeads``.
    """

    @configurable
    def __init__(
        self,
        *,
        grid_pooler: nn.Module,
        grid_head: GridHead,
        loss_weight: float = 15.0,
        jitter: float = 0.15,
        max_positives: int = 192,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.grid_pooler = grid_pooler
        self.grid_head = grid_head
        self.loss_weight = loss_weight
        self.jitter = jitter
        self.max_positives = max_positives

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Read ``MODEL.ROI_GRID_HEAD``, ``ROI_HEADS`` and ``ROI_BOX_HEAD``."""
        if cfg.MODEL.MASK_ON:
            raise ValueError("GridROIHeads has no mask branch: set MODEL.MASK_ON: False, got True")
        node = cfg.MODEL.ROI_GRID_HEAD
        if not 0 <= node.JITTER < 1:
            raise ValueError(f"MODEL.ROI_GRID_HEAD.JITTER is in [0, 1), got {node.JITTER}")
        if node.MAX_POSITIVES < 1:
            raise ValueError(
                f"MODEL.ROI_GRID_HEAD.MAX_POSITIVES is at least 1, got {node.MAX_POSITIVES}"
            )
        ret = super().from_config(cfg, input_shape)
        ret.update(
            grid_pooler=build_roi_extractor(cfg, "ROI_GRID_HEAD", input_shape),
            grid_head=GridHead(
                channels=input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels,
                resolution=node.POOLER_RESOLUTION,
                num_conv=node.NUM_CONV,
                point_dim=node.POINT_DIM,
            ),
            loss_weight=node.LOSS_WEIGHT,
            jitter=node.JITTER,
            max_positives=node.MAX_POSITIVES,
        )
        return ret

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        parts = super()._init_box_head(cfg, input_shape)
        parts["box_predictor"] = ClassOutputLayers(cfg, parts["box_head"].output_shape)
        return parts

    def _forward_box(self, features, proposals):
        result = super()._forward_box(features, proposals)
        maps = [features[name] for name in self.box_in_features]
        if not self.training:
            return self._locate(maps, result)
        result["loss_grid"] = self.loss_weight * self._train_grid(maps, proposals)
        return result

    def _train_grid(self, maps: list[Tensor], proposals: list[Instances]) -> Tensor:
        positives = self._sample_positives(proposals)
        jittered = [jitter_boxes(p.proposal_boxes, self.jitter, p.image_size) for p in positives]
        # An image without ground truth has no gt_boxes; it has no positives either.
        gt_boxes = [p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes for p in positives]
        targets = grid_targets(
            Boxes.cat(jittered).tensor, Boxes.cat(gt_boxes).tensor, self.grid_head.heat_map_side
        )
        return self.grid_head.loss(self.grid_pooler(maps, jittered), targets)

    def _sample_positives(self, proposals: list[Instances]) -> list[Instances]:
        positives, _ = select_foreground_proposals(proposals, self.num_classes)
        counts = [len(p) for p in positives]
        keep = torch.zeros(sum(counts), dtype=torch.bool, device=proposals[0].gt_classes.device)
        keep[torch.randperm(len(keep), device=keep.device)[: self.max_positives]] = True
        return [p[chosen] for p, chosen in zip(positives, keep.split(counts), strict=True)]

    def _locate(self, maps: list[Tensor], detections: list[Instances]) -> list[Instances]:
        boxes = [d.pred_boxes for d in detections]
        logits = self.grid_head(self.grid_pooler(maps, boxes))
        moved = decode_boxes(logits, Boxes.cat(boxes).tensor)
        for detection, tensor in zip(detections, moved.split([len(b) for b in boxes]), strict=True):
            detection.pred_boxes = Boxes(tensor)
            detection.pred_boxes.clip(detection.image_size)
        return detections
