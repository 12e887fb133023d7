"""Teacher and student in one module: any two-stage detector trained on images without labels.

Thesis section 2.4 (IL-net) on Unbiased Teacher: the teacher finds pseudo labels on the weak view of
unlabelled images, the student learns from the strong view of them and from the labelled images, and
the teacher is the moving average of the student.

Shape shorthand: N images of a batch, K classes.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .box_predictor import filter_counts, score_cut, upgrade_predictors
from .ema import copy_state, update_average
from .losses import weigh
from .monitor import PseudoLabelMonitor
from .pseudo_labels import make_pseudo_labels
from .skipping import without_losses, without_masks


class TrainBatch(Protocol):
    """What the model reads in training, as ``il_net.data.loader.SemiBatch``.

    Records are Detectron2's with a weak view, ``image``, and a strong one, ``strong_image``; those
    of ``labeled`` have ``instances``. ``unlabeled`` is empty during burn-in.
    """

    labeled: list[dict]
    unlabeled: list[dict]


# One backbone pass pads both groups to the size of the larger; above this it costs more than two.
MAX_PADDING = 1.1
_PARTS = ("preprocess_image", "backbone", "proposal_generator", "roi_heads", "inference")


@META_ARCH_REGISTRY.register()
class TeacherStudentRCNN(nn.Module):
    """A student that trains and a teacher that labels for it.

    In training it takes a :class:`TrainBatch` and returns the student's losses; those on unlabelled
    images are weighted and end in ``_pseudo``. In evaluation it is the teacher, before the end of
    burn-in the student.

    Differs from Unbiased Teacher: the teacher is in evaluation mode with as many proposals as at
    test; its score threshold cuts before NMS (same boxes); losses of weight 0 are not computed
    instead of multiplied; one backbone pass for all of the student's images.

    Args:
        student: a detector with a backbone, a proposal generator and RoI heads.
        burn_in_iters: steps before the teacher exists.
        keep_rate, ema_period: see ``SEMISUP.EMA``.
        loss_weights: group (see :func:`.losses.weigh`) to weight on unlabelled images.
        score_thresh, min_side, max_per_image: see :func:`.pseudo_labels.make_pseudo_labels`.
        merged_forward: one backbone pass over all of the student's images, if padding allows.
        teacher_train_proposals: the teacher proposes as in training.
        num_classes: K.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        burn_in_iters: int,
        keep_rate: float,
        ema_period: int,
        loss_weights: dict[str, float],
        score_thresh: float,
        min_side: float,
        max_per_image: int,
        merged_forward: bool,
        teacher_train_proposals: bool,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False).eval()
        self.burn_in_iters = burn_in_iters
        self.keep_rate = keep_rate
        self.ema_period = ema_period
        self.loss_weights = loss_weights
        self.score_thresh = score_thresh
        self.min_side = min_side
        self.max_per_image = max_per_image
        self.merged_forward = merged_forward
        self.teacher_train_proposals = teacher_train_proposals
        self.monitor = PseudoLabelMonitor(num_classes)
        # Whether the teacher is one; in checkpoints, so that a loaded model knows.
        self.register_buffer("burned_in", torch.tensor(False))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read ``SEMISUP``; the student is the architecture ``SEMISUP.DETECTOR``."""
        node, weights = cfg.SEMISUP, cfg.SEMISUP.LOSS_WEIGHT
        if node.DETECTOR not in META_ARCH_REGISTRY or cls.__name__ == node.DETECTOR:
            raise ValueError(f"SEMISUP.DETECTOR: there is no detector {node.DETECTOR!r}")
        inner = cfg.clone()
        inner.defrost()
        inner.MODEL.META_ARCHITECTURE = node.DETECTOR
        student = META_ARCH_REGISTRY.get(node.DETECTOR)(inner)
        missing = [part for part in _PARTS if getattr(student, part, None) is None]
        if missing:
            raise ValueError(
                f"SEMISUP.DETECTOR {node.DETECTOR} has no {', '.join(missing)}: the student needs "
                "a backbone, a proposal generator and RoI heads, as GeneralizedRCNN has"
            )
        upgrade_predictors(student, cfg)
        if not 0 <= node.EMA.KEEP_RATE <= 1:
            raise ValueError(f"SEMISUP.EMA.KEEP_RATE lies in [0, 1], got {node.EMA.KEEP_RATE}")
        if cfg.MODEL.KEYPOINT_ON:
            raise ValueError("MODEL.KEYPOINT_ON: there are no pseudo labels of keypoints")
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"SEMISUP.LOSS_WEIGHT.{name} is 0 or more, got {value}")
        if not 0 <= node.PSEUDO.SCORE_THRESH < 1:
            raise ValueError(
                f"SEMISUP.PSEUDO.SCORE_THRESH lies in [0, 1), got {node.PSEUDO.SCORE_THRESH}"
            )
        if node.EMA.PERIOD < 1:
            raise ValueError(f"SEMISUP.EMA.PERIOD is 1 or more, got {node.EMA.PERIOD}")
        return {
            "student": student,
            "burn_in_iters": node.BURN_IN_ITERS,
            "keep_rate": node.EMA.KEEP_RATE,
            "ema_period": node.EMA.PERIOD,
            "loss_weights": {
                "CLS": weights.CLS,
                "RPN_CLS": weights.RPN_CLS,
                "BOX_REG": weights.BOX_REG,
                "RPN_LOC": weights.RPN_LOC,
                "IOU": weights.IOU,
                "MASK": weights.MASK,
            },
            "score_thresh": node.PSEUDO.SCORE_THRESH,
            "min_side": node.PSEUDO.MIN_SIDE,
            "max_per_image": node.PSEUDO.MAX_PER_IMAGE,
            "merged_forward": node.MERGED_FORWARD,
            "teacher_train_proposals": node.TEACHER_TRAIN_PROPOSALS,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.burned_in.device

    def train(self, mode: bool = True) -> "TeacherStudentRCNN":
        """As usual, but the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def adopt_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Give a plain detector's tensors to student and teacher.

        Args:
            state: a checkpoint's tensors, changed in place.
            prefix: what comes before this module's names, with a dot at its end.
        """
        names = [name for name in state if name.startswith(prefix)]
        if any(name.startswith((f"{prefix}student.", f"{prefix}teacher.")) for name in names):
            return
        for name in names:
            tensor, rest = state.pop(name), name.removeprefix(prefix)
            state[f"{prefix}student.{rest}"] = state[f"{prefix}teacher.{rest}"] = tensor

    def update_teacher(self, iteration: int) -> None:
        """Copy or average the student's weights; call it before every training step.

        The student is as the step before left it: a copy before the first step after burn-in, an
        average every ``ema_period`` steps from then on.
        """
        since = iteration - self.burn_in_iters
        if since == 0:
            copy_state(self.teacher, self.student)
            self.burned_in.fill_(True)
        elif since > 0 and since % self.ema_period == 0:
            update_average(self.teacher, self.student, self.keep_rate)

    def forward(self, batch: TrainBatch | list[dict]) -> dict[str, Tensor] | list[dict]:
        """Losses of a batch in training; detections of a list of records otherwise."""
        if not self.training:
            return (self.teacher if self.burned_in else self.student)(batch)
        labeled = [*_views(batch.labeled, "strong_image"), *_views(batch.labeled, "image")]
        targets = [record["instances"].to(self.device) for record in labeled]
        if not batch.unlabeled:
            images, features = self._extract(labeled)
            return self._losses(images, features, targets)
        pseudo = self.pseudo_label(batch.unlabeled)
        self.monitor.labels(batch.unlabeled, pseudo)
        self.monitor.counts(filter_counts(self.teacher))
        unlabeled = _views(batch.unlabeled, "strong_image")
        if self.merged_forward and _padding(labeled, unlabeled) < MAX_PADDING:
            whole = self._extract([*labeled, *unlabeled])
            parts = [_slice(*whole, 0, len(labeled)), _slice(*whole, len(labeled), None)]
        else:
            parts = [self._extract(labeled), self._extract(unlabeled)]
        losses = self._losses(*parts[0], targets)
        without_weight = {group for group, weight in self.loss_weights.items() if not weight}
        # A name of their own for what the heads count on pseudo labels.
        scope = get_event_storage().name_scope("pseudo")
        with scope, without_losses(self.student, without_weight):
            raw = self._losses(*parts[1], pseudo)
        weighted = weigh(raw, self.loss_weights)
        self.monitor.losses({name: raw[name] for name in raw if f"{name}_pseudo" in weighted})
        return losses | weighted

    def pseudo_label(self, records: list[dict]) -> list[Instances]:
        """What the teacher finds on the weak view of N unlabelled records, as ground truth."""
        with_masks = self.loss_weights["MASK"] > 0
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(score_cut(self.teacher, self.score_thresh))
            if not with_masks:
                stack.enter_context(without_masks(self.teacher))
            if self.teacher_train_proposals:
                stack.enter_context(_train_proposals(self.teacher))
            detections = self.teacher.inference(records, do_postprocess=False)
        # Outside of inference mode, because the student's losses keep these boxes for backward.
        return make_pseudo_labels(
            detections,
            score_thresh=self.score_thresh,
            min_side=self.min_side,
            max_per_image=self.max_per_image,
            with_masks=with_masks and self.teacher.roi_heads.mask_on,
        )

    def _extract(self, records: list[dict]) -> tuple[ImageList, dict[str, Tensor]]:
        images = self.student.preprocess_image(records)
        return images, self.student.backbone(images.tensor)

    def _losses(
        self, images: ImageList, features: dict[str, Tensor], targets: list[Instances]
    ) -> dict[str, Tensor]:
        proposals, losses = self.student.proposal_generator(images, features, targets)
        _, detector_losses = self.student.roi_heads(images, features, proposals, targets)
        return {**detector_losses, **losses}


def _views(records: list[dict], view: str) -> list[dict]:
    return [{**record, "image": record[view]} for record in records]


def _padding(*groups: list[dict]) -> float:
    """How much larger one padded batch of all images is than one batch for each group."""

    def area(records: list[dict]) -> int:
        heights, widths = zip(*(record["image"].shape[-2:] for record in records), strict=True)
        return max(heights) * max(widths) * len(records)

    return area([r for group in groups for r in group]) / sum(area(group) for group in groups)


def _slice(
    images: ImageList, features: dict[str, Tensor], start: int, end: int | None
) -> tuple[ImageList, dict[str, Tensor]]:
    part = ImageList(images.tensor[start:end], images.image_sizes[start:end])
    return part, {name: feature[start:end] for name, feature in features.items()}


@contextmanager
def _train_proposals(detector: nn.Module) -> Iterator[None]:
    """Propose as many boxes in evaluation mode as in training."""
    generator = detector.proposal_generator
    counts = [generator.pre_nms_topk, generator.post_nms_topk]
    before = [count[False] for count in counts]
    for count in counts:
        count[False] = count[True]
    try:
        yield
    finally:
        for count, value in zip(counts, before, strict=True):
            count[False] = value
