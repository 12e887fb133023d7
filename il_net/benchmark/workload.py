"""The work that every detector of a comparison is given: picture, objects, proposals, scores.

For the speed and memory columns of thesis Tables 2.6 to 2.16. A model without trained weights
proposes and detects arbitrary numbers of boxes; here its layers run as always, but what they
decide is replaced by fixed numbers, the same for every model.

Shape shorthand: G true objects, R boxes, K classes, H and W the picture's sides.
"""

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor, nn

# Inference comes first: its peak memory must not hold the gradients of training steps.
MODES = ("inference", "train")
SEMISUP = "semisup"  # the mode of semi-supervised configurations, see semisup_benchmark
NUM_OBJECTS = 20
NUM_PROPOSALS = {"inference": 1000, "train": 2000}
# Logits of the object classes, normal, beside 0 for the background: with 80 classes some 400 of
# the 80,000 class scores of 1000 proposals pass 0.05 and some 3700 pass 0.001.
LOGIT_MEAN, LOGIT_STD = -13.8, 4.2
SEED = 0


@dataclass(frozen=True)
class Workload:
    """What every model gets to see.

    Attributes:
        image: (3, H, W) uint8, noise.
        truths: (G, 4) boxes of the objects, x1, y1, x2, y2 in pixels.
        masks: (G, H, W) bool, the ellipse in each box.
        proposals: mode to (R, 4) boxes, R as ``NUM_PROPOSALS`` says.
    """

    image: Tensor
    truths: Tensor
    masks: Tensor
    proposals: dict[str, Tensor]

    def batch(self, cfg: CfgNode, images: int) -> list[dict]:
        """A training batch of ``images`` times the picture, with masks where ``MASK_ON``."""
        target = Instances(tuple(self.image.shape[1:]), gt_boxes=Boxes(self.truths))
        target.gt_classes = torch.arange(NUM_OBJECTS) % cfg.MODEL.ROI_HEADS.NUM_CLASSES
        if cfg.MODEL.MASK_ON:
            target.gt_masks = BitMasks(self.masks)
        return [{"image": self.image, "instances": target}] * images


def make_workload(size: tuple[int, int]) -> Workload:
    """Generate the work for pictures of (H, W) pixels, the same on every call."""
    generator = torch.Generator().manual_seed(SEED)
    truths = _random_boxes(NUM_OBJECTS, size, generator)
    return Workload(
        image=torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator),
        truths=truths,
        masks=_ellipses(truths, size),
        proposals={m: _proposals(truths, NUM_PROPOSALS[m], size, generator) for m in MODES},
    )


def _log_uniform(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    return low * (high / low) ** torch.rand(count, generator=generator)


def _random_boxes(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Boxes inside the picture, square roots of their areas 16 to 400 px at a short side of 800."""
    side = min(size) * _log_uniform(0.02, 0.5, count, generator)
    stretch = _log_uniform(0.5**0.5, 2**0.5, count, generator)
    extent = torch.stack([side * stretch, side / stretch], dim=1)
    start = torch.rand(count, 2, generator=generator) * (torch.tensor(size[::-1]) - extent)
    return torch.cat([start, start + extent], dim=1)


def _ellipses(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    y, x = (torch.arange(side) + 0.5 for side in size)
    center, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    dx = (x - center[:, 0, None]) / radius[:, 0, None]
    dy = (y - center[:, 1, None]) / radius[:, 1, None]
    return dx[:, None, :] ** 2 + dy[:, :, None] ** 2 <= 1


def _parts(
    truths: Tensor, count: int, ious: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Boxes inside the objects' boxes, in turn: a box with the share q of the area has IoU q."""
    outer = truths[torch.arange(count) % len(truths)]
    iou = ious[0] + (ious[1] - ious[0]) * torch.rand(count, 1, generator=generator)
    extent = outer[:, 2:] - outer[:, :2]
    room = extent * (1 - iou.sqrt())
    start = outer[:, :2] + torch.rand(count, 2, generator=generator) * room
    return torch.cat([start, start + extent - room], dim=1)


def _proposals(
    truths: Tensor, count: int, size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """A quarter with IoU 0.82 to 0.92, a quarter with 0.3 to 0.5, the rest anywhere below 0.5.

    Nothing lies between 0.5 and 0.82: every loop and stage, whatever its threshold, finds as many
    positives as the first, as it does behind heads that have learnt to refine.
    """
    good = _parts(truths, count // 4, (0.82, 0.92), generator)
    near = _parts(truths, count, (0.3, 0.5), generator)
    far = _random_boxes(count, size, generator)
    near, far = (b[pairwise_iou(Boxes(truths), Boxes(b)).amax(0) < 0.5] for b in (near, far))
    boxes = torch.cat([good, near[: count // 4], far[: count // 2]])
    assert len(boxes) == count, "too few boxes below IoU 0.5 were drawn"
    return boxes[torch.randperm(count, generator=generator)]


def fix_decisions(model: nn.Module, workload: Workload, cfg: CfgNode) -> None:
    """Have the same proposals, class scores and boxes come out of every model, in place.

    Proposals, and at inference class logits, are replaced after their layers have run. Box deltas
    become zero, so that boxes stay where they are in every loop and stage.

    Raises:
        ValueError: the model is no R-CNN with proposals and class scores.
    """
    logits = class_logits(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    replace_decisions(model, cfg, workload.proposals, logits)


def replace_decisions(
    model: nn.Module, cfg: CfgNode, proposals: dict[str, Tensor], logits: Tensor
) -> None:
    """Do what :func:`fix_decisions` says with given numbers.

    Args:
        model: changed in place.
        cfg: its configuration, for the message.
        proposals: mode to (R, 4) boxes of every picture; modes that are not run may be left out.
        logits: (R, K + 1) class logits of every picture's proposals at inference.

    Raises:
        ValueError: see :func:`fix_decisions`.
    """
    predictors = [m for m in model.modules() if hasattr(m, "cls_score")]
    if not isinstance(model, GeneralizedRCNN) or model.proposal_generator is None or not predictors:
        raise ValueError(
            "only R-CNNs with proposals and class scores can be compared: "
            "MODEL.META_ARCHITECTURE GeneralizedRCNN with an RPN and RoI heads, got "
            f"{type(model).__name__} with MODEL.PROPOSAL_GENERATOR.NAME "
            f"{cfg.MODEL.PROPOSAL_GENERATOR.NAME} and MODEL.ROI_HEADS.NAME "
            f"{cfg.MODEL.ROI_HEADS.NAME}"
        )
    boxes = {mode: Boxes(tensor.to(model.device)) for mode, tensor in proposals.items()}
    logits = logits.to(model.device)

    def propose(
        module: nn.Module, args: tuple[ImageList, ...], output: tuple
    ) -> tuple[list[Instances], dict]:
        fixed = boxes["train" if module.training else "inference"]
        zeros = fixed.tensor.new_zeros(len(fixed))
        proposed = [
            Instances(size, proposal_boxes=fixed, objectness_logits=zeros)
            for size in args[0].image_sizes
        ]
        return proposed, output[1]

    model.proposal_generator.register_forward_hook(propose)
    for predictor in predictors:
        replace_scores(predictor, logits)


def replace_scores(predictor: nn.Module, logits: Tensor) -> None:
    """Replace class logits at inference, and have all box deltas be zero, in place.

    Args:
        predictor: with a layer ``cls_score``, and ``bbox_pred`` if it moves boxes.
        logits: (R, K + 1) of every picture's proposals, where the predictor is.
    """

    def classify(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if module.training:
            return output
        return logits.repeat(len(output) // len(logits), 1).to(output.dtype)

    predictor.cls_score.register_forward_hook(classify)
    if hasattr(predictor, "bbox_pred"):
        for parameter in predictor.bbox_pred.parameters():
            nn.init.zeros_(parameter)


def class_logits(num_classes: int) -> Tensor:
    """(R, K + 1) class logits of the R proposals at inference, background last; see the top."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (NUM_PROPOSALS["inference"], num_classes)
    objects = LOGIT_MEAN + LOGIT_STD * torch.randn(shape, generator=generator)
    return torch.cat([objects, torch.zeros(shape[0], 1)], dim=1)


def settle_norms(model: GeneralizedRCNN, workload: Workload) -> None:
    """Do what :func:`settle_backbone` says with the workload's picture."""
    pictures = model.preprocess_image([{"image": workload.image}]).tensor
    settle_backbone(model.backbone, pictures)


@torch.no_grad()
def settle_backbone(backbone: nn.Module, pictures: Tensor) -> None:
    """Set BatchNorm statistics to those of the (N, 3, H, W) pictures, as pre-training would.

    With the initial ones activations double from block to block, until softmax and sums are full
    of zeros, infinities and denormal numbers, which take other time than ordinary ones.
    """

    def settle(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(args[0], dim=(0, 2, 3))
        norm.running_var.copy_(variance)
        norm.running_mean.copy_(mean)

    norms = [m for m in backbone.modules() if getattr(m, "running_var", None) is not None]
    handles = [norm.register_forward_pre_hook(settle) for norm in norms]
    backbone.eval()
    backbone(pictures)
    for handle in handles:
        handle.remove()
