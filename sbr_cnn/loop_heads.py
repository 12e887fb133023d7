"""The looped RoI heads of R3-CNN, SBR-CNN and HTC.

Thesis section 2.2: the same box and mask heads run several times over boxes that each loop
refines, against a rising IoU threshold.

Shape shorthand: N images, R boxes of all images, K classes, C channels.
"""

import re

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .extractors import select_maps
from .head_pair import HeadPair
from .mask_heads import train_masks
from .mask_iou import MaskIoUHead, build_mask_iou_head
from .schedule import Loop, LoopSchedule
from .statistics import RoIStatistics, build_statistics


@ROI_HEADS_REGISTRY.register()
class LoopROIHeads(ROIHeads):
    """Box and mask heads that run in loops, each loop refining the boxes of the one before.

    Training, loop t: match the boxes with the ground truth at IoU u_t and sample; losses of the
    sample times alpha_t; refine the whole sample without gradient and drop what was ground
    truth; for the masks match and sample the refined boxes again with the same u_t (interleaving);
    the refined boxes enter loop t + 1. The ground truth joins the candidates every time.

    Inference: all proposals pass all loops; the class logits of the loops are averaged, then
    softmax; the boxes are the last loop's; the mask head iterates once per loop on the final
    boxes and its probabilities are averaged.

    With "abc" and a first mask head without C1 this is HTC: the mask of loop t runs heads 1 to
    t - 1 for their features only, then head t.

    Differs from Detectron2's ``CascadeROIHeads``: re-samples in every loop, averages logits, does
    not scale gradients, trains masks in every loop.

    Args:
        in_features: names of the feature maps, finest first.
        pairs: the head pair of each letter of the schedule.
        schedule: the loops.
        mask_iou_head: one for all pairs; trained in the last loop, not scaled by alpha; the
            detections carry ``mask_scores``.
        mask_loop: iterate the mask head t times in training loop t.
        interleaved: train masks on a new sample of the refined boxes.
        statistics: counts what enters the loops in training.
        **kwargs: see Detectron2's ``ROIHeads``; ``proposal_matcher``
            (``MODEL.ROI_HEADS.IOU_THRESHOLDS``) is not used, the schedule has the thresholds;
            nor is ``MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS``, every pair has its own.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        pairs: dict[str, HeadPair],
        schedule: LoopSchedule,
        mask_iou_head: MaskIoUHead | None = None,
        mask_loop: bool = True,
        interleaved: bool = True,
        statistics: RoIStatistics | None = None,
        **kwargs,
    ) -> None:
        super().__init__(proposal_matcher=None, **kwargs)
        self.in_features = in_features
        self.pairs = nn.ModuleDict(pairs)
        self.schedule = schedule
        self.mask_iou_head = mask_iou_head
        self.mask_loop = mask_loop
        self.interleaved = interleaved
        self.statistics = statistics
        self.mask_on = self.pairs["a"].mask_head is not None

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Read ``MODEL.ROI_LOOP_HEAD``, ``ROI_HEADS``, ``ROI_BOX_HEAD`` and ``ROI_MASK_HEAD``."""
        if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            raise ValueError("LoopROIHeads needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG: True")
        node = cfg.MODEL.ROI_LOOP_HEAD
        schedule = LoopSchedule.from_config(cfg)
        if len(node.BBOX_REG_WEIGHTS) < len(schedule.pairs):
            raise ValueError(
                f"MODEL.ROI_LOOP_HEAD.BBOX_REG_WEIGHTS has {len(node.BBOX_REG_WEIGHTS)} entries, "
                f"MODEL.ROI_LOOP_HEAD.ORDER {node.ORDER!r} needs {len(schedule.pairs)}"
            )
        if not node.FIRST_FEEDBACK and "a" in node.ORDER[1:]:
            raise ValueError(
                "MODEL.ROI_LOOP_HEAD.FIRST_FEEDBACK False lets the first pair's mask head ignore "
                f"the loops before; MODEL.ROI_LOOP_HEAD.ORDER {node.ORDER!r} uses it again"
            )
        ret = super().from_config(cfg)
        del ret["proposal_matcher"]
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        pairs = {
            letter: HeadPair.build(cfg, input_shape, tuple(weights))
            for letter, weights in zip(schedule.pairs, node.BBOX_REG_WEIGHTS, strict=False)
        }
        if cfg.MODEL.MASK_ON and not node.FIRST_FEEDBACK:
            pairs["a"].mask_head.drop_feedback()
        ret.update(
            in_features=in_features,
            pairs=pairs,
            schedule=schedule,
            mask_iou_head=build_mask_iou_head(cfg, input_shape[in_features[0]].channels),
            mask_loop=node.MASK_LOOP,
            interleaved=node.INTERLEAVED,
            statistics=build_statistics(cfg),
        )
        return ret

    def adopt_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Rename the tensors of heads without pairs (Detectron2's, ``ExtractorROIHeads``).

        ``box_head.fc1.weight`` goes to every pair; ``box_head.0.fc1.weight`` of a cascade's
        first stage to the first pair, and so on. A pair that looped heads lack starts as their
        first.

        Args:
            state: a checkpoint's tensors, changed in place.
            prefix: what comes before this module's names, with a dot at its end.
        """
        first = {n: t for n, t in state.items() if n.startswith(f"{prefix}pairs.a.")}
        if first:  # of looped heads, perhaps with fewer pairs
            for letter in self.pairs:
                if not any(name.startswith(f"{prefix}pairs.{letter}.") for name in state):
                    start = len(f"{prefix}pairs.a.")
                    state |= {f"{prefix}pairs.{letter}.{n[start:]}": t for n, t in first.items()}
            return
        branches = "box_pooler|box_head|box_predictor|mask_pooler|mask_head|c2ssl_head"
        pattern = re.compile(rf"{re.escape(prefix)}((?:{branches})\.)(?:(\d+)\.)?(.+)")
        letters = list(self.pairs)
        for match in filter(None, map(pattern.fullmatch, list(state))):
            branch, stage, rest = match.groups()
            takers = letters if stage is None else letters[int(stage) : int(stage) + 1]
            if takers:
                tensor = state.pop(match[0])
                state |= {f"{prefix}pairs.{letter}.{branch}{rest}": tensor for letter in takers}

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See Detectron2's ``ROIHeads.forward``; losses carry the suffix ``_loop{t}``."""
        maps = select_maps(features, self.in_features)
        if self.training:
            if targets is None:
                raise ValueError("LoopROIHeads needs targets in training")
            return proposals, self._train_loops(maps, proposals, targets)
        return self._detect_masks(maps, self._detect_boxes(maps, proposals)), {}

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Masks for given ``pred_boxes`` and ``pred_classes``; see ``StandardROIHeads``."""
        return self._detect_masks(select_maps(features, self.in_features), instances)

    # ---- training ----

    def _train_loops(
        self, maps: list[Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        boxes = [p.proposal_boxes for p in proposals]
        for loop in self.schedule.train:
            if self.statistics is not None:
                self.statistics.add_proposals(loop.number, boxes, targets)
            sample = self.label_and_sample(boxes, targets, loop)
            loop_losses, predictions = self._train_boxes(maps, sample, targets, loop)
            resample = self.mask_on and self.interleaved
            if resample or loop.number < len(self.schedule.order):
                refined = self._refine(self.pairs[loop.pair], predictions, sample)
                boxes = [b[~s.is_gt] for b, s in zip(refined, sample, strict=True)]
            if self.mask_on:
                if resample:
                    sample = self.label_and_sample(boxes, targets, loop)
                loop_losses |= self._train_masks(maps, sample, targets, loop)
            if "loss_mask_iou" in loop_losses:
                losses["loss_mask_iou"] = loop_losses.pop("loss_mask_iou")
            for name, loss in loop_losses.items():
                losses[f"{name}_loop{loop.number}"] = loss * loop.loss_weight
        return losses

    @torch.no_grad()
    def label_and_sample(
        self, boxes: list[Boxes], targets: list[Instances], loop: Loop
    ) -> list[Instances]:
        """Match candidate boxes with the ground truth at the loop's IoU and sample some.

        Args:
            boxes: the candidates of each image; its ground truth is put in front of them.
            targets: ground truth with ``gt_boxes`` and ``gt_classes``.
            loop: gives the IoU threshold.

        Returns:
            Per image at most ``batch_size_per_image`` boxes, positives first, with
            ``proposal_boxes``, ``gt_classes`` (K is background), ``gt_boxes``, ``gt_index`` (the
            matched ground truth; meaningless for background) and ``is_gt``.
        """
        matcher = Matcher([loop.iou], [0, 1], allow_low_quality_matches=False)
        samples = []
        for candidates, target in zip(boxes, targets, strict=True):
            num_gt = len(target)
            if self.proposal_append_gt:
                candidates = Boxes.cat([target.gt_boxes, candidates])
            is_gt = torch.zeros(len(candidates), dtype=torch.bool, device=candidates.device)
            is_gt[: num_gt if self.proposal_append_gt else 0] = True
            index, labels = matcher(pairwise_iou(target.gt_boxes, candidates))
            classes = torch.full_like(index, self.num_classes)
            if num_gt:
                classes = torch.where(labels == 1, target.gt_classes[index], classes)
            positive, negative = subsample_labels(
                classes, self.batch_size_per_image, self.positive_fraction, self.num_classes
            )
            chosen = torch.cat([positive, negative])
            sample = Instances(target.image_size)
            sample.proposal_boxes = candidates[chosen]
            sample.gt_classes = classes[chosen]
            sample.gt_index = index[chosen]
            sample.is_gt = is_gt[chosen]
            # Without ground truth all is background: any box of the right shape will do.
            sample.gt_boxes = target.gt_boxes[sample.gt_index] if num_gt else sample.proposal_boxes
            samples.append(sample)
        return samples

    def _train_boxes(
        self, maps: list[Tensor], sample: list[Instances], targets: list[Instances], loop: Loop
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        pair = self.pairs[loop.pair]
        # Read before the heads are launched: sampling has just waited for the device anyway.
        positives = (torch.cat([s.gt_classes for s in sample]) < self.num_classes).sum().item()
        x = pair.box_features(maps, [s.proposal_boxes for s in sample])
        predictions = pair.box_predictor(x)
        storage = get_event_storage()
        storage.put_scalar(
            f"roi_head/num_fg_samples_loop{loop.number}", positives / max(len(sample), 1)
        )
        with storage.name_scope(f"loop{loop.number}"):
            losses = pair.box_predictor.losses(predictions, sample)
        if pair.c2ssl_head is not None:
            pair.c2ssl_head.assign(sample, targets)
            losses["loss_c2ssl"] = pair.c2ssl_head(x, sample)
        if self.statistics is not None:
            self.statistics.add_sample(loop.number, sample)
        return losses, predictions

    @torch.no_grad()
    def _refine(
        self, pair: HeadPair, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> list[Boxes]:
        decoded = pair.box_predictor.predict_boxes(predictions, proposals)
        refined = [Boxes(boxes) for boxes in decoded]
        for boxes, proposal in zip(refined, proposals, strict=True):
            boxes.clip(proposal.image_size)
        return refined

    def _train_masks(
        self,
        maps: list[Tensor],
        sample: list[Instances],
        targets: list[Instances],
        loop: Loop,
    ) -> dict[str, Tensor]:
        pair = self.pairs[loop.pair]
        positives, _ = select_foreground_proposals(sample, self.num_classes)
        x = pair.mask_pooler(maps, [p.proposal_boxes for p in positives])
        order = self.schedule.order[: loop.number] if self.mask_loop else loop.pair
        features = None
        for letter in order:
            features = self.pairs[letter].mask_head.iterate(x, features)
        masks = [t.gt_masks if t.has("gt_masks") else None for t in targets]
        last = loop.number == len(self.schedule.order)
        iou_head = self.mask_iou_head if last else None
        return train_masks(x, pair.mask_head.logits(features), positives, masks, iou_head)

    # ---- inference ----

    def _detect_boxes(self, maps: list[Tensor], proposals: list[Instances]) -> list[Instances]:
        order = self.schedule.test
        logits = 0.0
        for number, letter in enumerate(order, start=1):
            pair = self.pairs[letter]
            predictions = pair.predict_boxes(maps, [p.proposal_boxes for p in proposals])
            logits = logits + predictions[0]
            if number < len(order):
                # Degenerate boxes stay, so that the loops' logits keep belonging together.
                proposals = [
                    Instances(p.image_size, proposal_boxes=boxes)
                    for p, boxes in zip(
                        proposals, self._refine(pair, predictions, proposals), strict=True
                    )
                ]
        # The last loop's own coder decodes its deltas, whichever pair that is.
        merged = (logits / len(order), *predictions[1:])
        detections, _ = pair.box_predictor.inference(merged, proposals)
        return detections

    def _detect_masks(self, maps: list[Tensor], instances: list[Instances]) -> list[Instances]:
        if not self.mask_on:
            return instances
        order = self.schedule.test
        x = self.pairs[order[-1]].mask_pooler(maps, [i.pred_boxes for i in instances])
        classes = torch.cat([i.pred_classes for i in instances])
        features, probabilities = None, 0.0
        for letter in order:
            head = self.pairs[letter].mask_head
            features = head.iterate(x, features)
            logits = head.class_logits(features, classes)
            probabilities = probabilities + logits.sigmoid()
        masks = (probabilities / len(order))[:, None]
        per_image = masks.split([len(i) for i in instances])
        for image, image_masks in zip(instances, per_image, strict=True):
            image.pred_masks = image_masks  # (R_i, 1, M, M), as Detectron2's mask heads give
        if self.mask_iou_head is not None:
            self.mask_iou_head.rescore(x, logits, instances)
        return instances
