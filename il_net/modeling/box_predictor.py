"""Detectron2's box predictor with focal classification and the IoU branch.

Thesis section 2.4.3: eq. 2.10 (focal classifier of Unbiased Teacher), 2.11, 2.12 (IoU branch) and
the filter by IoU score that precedes the one by class score.

Shape shorthand: R RoIs of all images, R_i of image i, K classes, B = 4 K box deltas (4 if
class-agnostic).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Instances
from torch import Tensor, nn

from .iou_head import IoUHead, decoded_ious
from .losses import focal_cross_entropy


class ILNetOutputLayers(FastRCNNOutputLayers):
    """A box predictor that classifies with a focal loss and may have an IoU branch.

    Not constructed: :func:`upgrade_predictors` turns a detector's own predictor into one. Without
    branch and with gamma 0 it computes what the predictor did before.

    Predictions are (class logits (R, K + 1), deltas (R, B)); with the branch a third member, IoU
    logits (R, K + 1), is used wherever it is given.

    Attributes:
        focal_gamma: of ``loss_cls``.
        iou_head: the branch, None without.
        iou_filter: inference removes proposals by their IoU score.
        iou_threshold: theta, which an IoU score must be above to stay.
        skipped: groups of losses that :func:`.skipping.without_losses` leaves out.
        filtered: what the filter removed in the last inference, see :func:`filter_counts`.
    """

    focal_gamma: float
    iou_head: IoUHead | None
    iou_filter: bool
    iou_threshold: float
    skipped: frozenset[str] = frozenset()
    # Not a buffer: no state of the model, nothing to average or to broadcast.
    filtered: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features (R, ...) to the predictions."""
        scores, deltas = super().forward(x)
        if self.iou_head is None:
            return scores, deltas
        return scores, deltas, self.iou_head(x.flatten(start_dim=1), scores, deltas)

    def losses(
        self, predictions: tuple[Tensor, ...], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """Detectron2's losses with a focal ``loss_cls``; with the branch also ``loss_box_iou``."""
        losses = super().losses(predictions[:2], proposals)
        classes = torch.cat([p.gt_classes for p in proposals])
        if self.focal_gamma:
            loss = focal_cross_entropy(predictions[0], classes, self.focal_gamma)
            losses["loss_cls"] = loss * self.loss_weight.get("loss_cls", 1.0)
        if self.iou_head is not None and "IOU" not in self.skipped:
            boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
            # Without ground truth all is background: any box of the right shape will do.
            gt_boxes = torch.cat(
                [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
            )
            ious = decoded_ious(predictions[1], boxes, gt_boxes, classes, self.box2box_transform)
            losses["loss_box_iou"] = self.iou_head.loss(predictions[2], ious, classes)
        return losses

    def box_reg_loss(
        self, proposal_boxes: Tensor, gt_boxes: Tensor, pred_deltas: Tensor, gt_classes: Tensor
    ) -> Tensor:
        """Detectron2's loss of the deltas (R, B), or a zero where it is skipped."""
        if "BOX_REG" in self.skipped:
            return pred_deltas.new_zeros(())
        return super().box_reg_loss(proposal_boxes, gt_boxes, pred_deltas, gt_classes)

    def inference(
        self, predictions: tuple[Tensor, ...], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Detections; with the branch filtered, and with the ``iou_scores`` (R_i,) of their class.

        A proposal is removed, for all classes, if its most probable class is not the background
        and the IoU score of that class is not above theta. That precedes Detectron2's score
        threshold and NMS.

        Returns:
            The detections, and per image the proposal (its row) that each comes from.

        Raises:
            ValueError: the RoI heads have lost the IoU logits on the way.
        """
        if self.iou_head is None:
            return super().inference(predictions, proposals)
        if len(predictions) < 3:
            raise ValueError(
                "MODEL.ROI_IOU_HEAD.ENABLED is True, but MODEL.ROI_HEADS.NAME's RoI heads hand on "
                "class logits and deltas without the IoU logits; set it to False"
            )
        boxes = self.predict_boxes(predictions, proposals)
        probs = self.predict_probs(predictions, proposals)
        scores = predictions[2].float().sigmoid().split([len(p) for p in proposals])
        kept = self._filter(boxes, probs, scores)
        # A probability below every threshold removes a row without moving the others, and
        # without asking the device how many are left.
        detections, rows = fast_rcnn_inference(
            [b.masked_fill(~keep, 0.0) for b, keep in zip(boxes, kept, strict=True)],
            [p.masked_fill(~keep, -1.0) for p, keep in zip(probs, kept, strict=True)],
            [p.image_size for p in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )
        for detection, row, score in zip(detections, rows, scores, strict=True):
            detection.iou_scores = score[row, detection.pred_classes]
        return detections, rows

    def _filter(
        self, boxes: tuple[Tensor, ...], probs: tuple[Tensor, ...], scores: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """Which of each image's proposals are finite and pass the filter: (R_i, 1) bool."""
        kept, counts = [], []
        for image in zip(boxes, probs, scores, strict=True):
            finite = torch.isfinite(torch.cat(image, dim=1)).all(dim=1)
            _, prob, score = image
            best, classes = prob.max(dim=1)
            score = score.gather(1, classes[:, None])[:, 0]
            passes = (classes == self.num_classes) | (score > self.iou_threshold)
            removed = finite & ~passes if self.iou_filter else torch.zeros_like(finite)
            candidates = removed & (best > self.test_score_thresh)
            kept.append((finite & ~removed)[:, None])
            counts.append(torch.stack([removed.sum(), candidates.sum()]))
        self.filtered = torch.stack(counts).sum(dim=0)
        return kept

    # Detectron2's unpack two members; softmax of bf16 logits would have steps of 1/256 near 1.

    def predict_boxes(
        self, predictions: tuple[Tensor, ...], proposals: list[Instances]
    ) -> list[Tensor]:
        """Decoded boxes (R_i, B) of each image."""
        return super().predict_boxes(predictions[:2], proposals)

    def predict_boxes_for_gt_classes(
        self, predictions: tuple[Tensor, ...], proposals: list[Instances]
    ) -> list[Tensor]:
        """Boxes (R_i, 4) of each image decoded for the ground-truth classes."""
        return super().predict_boxes_for_gt_classes(predictions[:2], proposals)

    def predict_probs(
        self, predictions: tuple[Tensor, ...], proposals: list[Instances]
    ) -> list[Tensor]:
        """Class probabilities (R_i, K + 1) of each image, in fp32."""
        return super().predict_probs((predictions[0].float(), predictions[1]), proposals)


def upgrade_predictors(model: nn.Module, cfg: CfgNode) -> None:
    """Turn every box predictor inside a detector into an ``ILNetOutputLayers``, in place.

    Modules, names and weights stay; with ``MODEL.ROI_IOU_HEAD.ENABLED`` each gets an ``iou_head``.
    A subclass of Detectron2's predictor keeps what it overrides, below what ``ILNetOutputLayers``
    adds: that fits as long as it predicts (class logits, deltas) and has a ``loss_cls``, which
    becomes focal.

    Args:
        model: any detector with ``FastRCNNOutputLayers``: Faster, Mask and Cascade R-CNN, looped.
        cfg: ``SEMISUP.FOCAL_GAMMA``, ``MODEL.ROI_IOU_HEAD`` and the number of classes are read.

    Raises:
        ValueError: a detector or a combination of keys that does not fit.
    """
    predictors = _predictors(model)
    gamma, node = cfg.SEMISUP.FOCAL_GAMMA, cfg.MODEL.ROI_IOU_HEAD
    if gamma < 0:
        raise ValueError(f"SEMISUP.FOCAL_GAMMA is 0 or more, got {gamma}")
    if not predictors and (gamma or node.ENABLED):
        raise ValueError(
            "SEMISUP.DETECTOR has no Fast R-CNN box predictor: set SEMISUP.FOCAL_GAMMA: 0 and "
            "MODEL.ROI_IOU_HEAD.ENABLED: False"
        )
    if node.ENABLED:
        _check_branch(model, predictors)
    for predictor in predictors:
        # Binary cross-entropy per class, in versions of Detectron2 that have it.
        if getattr(predictor, "use_sigmoid_ce", False) and (gamma or node.ENABLED):
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE has neither the softmax of SEMISUP.FOCAL_GAMMA "
                f"(got {gamma}) nor that of the IoU filter: set it to False"
            )
        predictor.__class__ = _upgraded(type(predictor))
        predictor.focal_gamma = gamma
        predictor.iou_filter = node.FILTER
        predictor.iou_threshold = node.TEST_THRESH
        predictor.iou_head = None
        if node.ENABLED:
            predictor.iou_head = IoUHead(
                cfg,
                feature_dim=predictor.cls_score.in_features,
                delta_dim=predictor.bbox_pred.out_features,
            ).to(predictor.cls_score.weight.device)


@contextmanager
def score_cut(model: nn.Module, threshold: float) -> Iterator[None]:
    """Raise the test score threshold of all box predictors to at least ``threshold``.

    The detections are those of the old threshold that score more than ``threshold``: NMS goes by
    class from the highest score down, so that a lower box never removes a higher one, and the
    best per image are the best either way.
    """
    before = [(predictor, predictor.test_score_thresh) for predictor in _predictors(model)]
    for predictor, old in before:
        predictor.test_score_thresh = max(old, threshold)
    try:
        yield
    finally:
        for predictor, old in before:
            predictor.test_score_thresh = old


def filter_counts(model: nn.Module) -> dict[str, Tensor]:
    """How many proposals of all images the IoU filter removed in the last inference.

    Returns:
        int64 scalars on the model's device: ``filtered_proposals``, all of them (thesis Fig.
        2.16d), and ``filtered_candidates``, those whose class score was above the score threshold
        (of :func:`score_cut`, if one was in force): without the filter they would have gone on to
        NMS. Empty without the branch.
    """
    counts = [getattr(predictor, "filtered", None) for predictor in _predictors(model)]
    counts = [count for count in counts if count is not None]
    if not counts:
        return {}
    proposals, candidates = torch.stack(counts).sum(dim=0)
    return {"filtered_proposals": proposals, "filtered_candidates": candidates}


def _predictors(model: nn.Module) -> list[FastRCNNOutputLayers]:
    return [module for module in model.modules() if isinstance(module, FastRCNNOutputLayers)]


def _upgraded(kind: type[FastRCNNOutputLayers]) -> type[ILNetOutputLayers]:
    if issubclass(kind, ILNetOutputLayers):
        return kind
    if kind is FastRCNNOutputLayers:
        return ILNetOutputLayers
    return type(f"ILNet{kind.__name__}", (ILNetOutputLayers, kind), {})


def _check_branch(model: nn.Module, predictors: list[FastRCNNOutputLayers]) -> None:
    key = "MODEL.ROI_IOU_HEAD.ENABLED is True, but"
    if any(isinstance(module, CascadeROIHeads) for module in model.modules()):
        raise ValueError(
            f"{key} MODEL.ROI_HEADS.NAME CascadeROIHeads averages its stages' scores and detects "
            "by itself, past the filter; set it to False or take other RoI heads, LoopROIHeads "
            "for one"
        )
    for predictor in predictors:
        # Rotated boxes have five numbers; a predictor without box layer locates elsewhere.
        if not hasattr(predictor, "bbox_pred") or len(predictor.box2box_transform.weights) != 4:
            raise ValueError(
                f"{key} the box predictor {type(predictor).__name__} of MODEL.ROI_HEADS.NAME does "
                "not regress boxes x1, y1, x2, y2; set it to False"
            )
