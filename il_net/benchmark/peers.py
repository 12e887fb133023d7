"""Detectors of other libraries in a comparison, given the same work as Detectron2's.

For comparisons like the speed and memory columns of thesis Tables 2.6 to 2.16.

Shape shorthand: G true objects, R boxes, K classes, H and W a picture's sides.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.misc import FrozenBatchNorm2d

from ..config import load_config
from .timing import Subject
from .workload import Workload, class_logits, replace_scores, settle_backbone


class PeerSubject(Subject):
    """A detector of ``PEERS`` in a comparison.

    Args:
        As :class:`Subject`; ``cfg`` is :func:`peer_config`'s.
    """

    def _build(self, cfg: CfgNode, workload: Workload) -> nn.Module:
        return PEERS[cfg.MODEL.META_ARCHITECTURE](cfg, workload)

    def _prepare(self, cfg: CfgNode, workload: Workload) -> Iterable:
        return itertools.repeat(workload.batch(cfg, self.images))


def is_peer(cfg: CfgNode) -> bool:
    """Whether a configuration is :func:`peer_config`'s."""
    return cfg.MODEL.META_ARCHITECTURE in PEERS


def peer_config(name: str, opts: list[str]) -> CfgNode:
    """What a comparison has to know of a peer: its name, the classes, the optimizer.

    Args:
        name: of ``PEERS``; it becomes ``MODEL.META_ARCHITECTURE``.
        opts: configuration keys that were asked for; a peer has none.

    Raises:
        ValueError: there are ``opts``.
    """
    if opts:
        raise ValueError(
            f"{name} is not built from configuration keys, got {' '.join(opts)}; "
            "give keys to the files alone, as FILE:KEY=VALUE"
        )
    # Every picture has masks; a peer without a mask branch leaves them where they are.
    return load_config("", ["MODEL.META_ARCHITECTURE", name, "MODEL.MASK_ON", "True"])


class TorchvisionRCNN(nn.Module):
    """A detector of torchvision that takes and gives what one of Detectron2 does.

    Args:
        detector: torchvision's.
    """

    def __init__(self, detector: FasterRCNN) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: list[dict]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Losses in training, else per picture ``{"instances": Instances}``, masks pasted.

        Args:
            batch: per picture ``"image"`` (3, H, W) uint8 RGB, in training also ``"instances"``.
        """
        device = next(self.detector.parameters()).device
        pictures = [record["image"].to(device).float() / 255 for record in batch]
        if self.training:
            return self.detector(pictures, [self._target(r["instances"], device) for r in batch])
        return [
            {"instances": _instances(found, tuple(picture.shape[1:]))}
            for found, picture in zip(self.detector(pictures), pictures, strict=True)
        ]

    def _target(self, truth: Instances, device: torch.device) -> dict[str, Tensor]:
        target = {
            "boxes": truth.gt_boxes.tensor.to(device),
            "labels": truth.gt_classes.to(device) + 1,  # 0 is the background
        }
        if self.detector.roi_heads.has_mask():
            target["masks"] = truth.gt_masks.tensor.to(device).byte()
        return target


def _instances(found: dict[str, Tensor], size: tuple[int, int]) -> Instances:
    result = Instances(size, pred_boxes=Boxes(found["boxes"]), scores=found["scores"])
    result.pred_classes = found["labels"] - 1
    if "masks" in found:
        result.pred_masks = found["masks"][:, 0] >= 0.5  # probabilities, where Detectron2 decides
    return result


class _KeepSize(GeneralizedRCNNTransform):
    """Normalises and pads pictures, and leaves their size alone, as the workload has it."""

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


def build_torchvision(kind: type[FasterRCNN], cfg: CfgNode, workload: Workload) -> TorchvisionRCNN:
    """torchvision's ``fasterrcnn_resnet50_fpn`` or ``maskrcnn_resnet50_fpn`` with the workload.

    It is what these functions give with weights: all BatchNorm frozen, stem and first stage too.
    The RPN keeps 1000 proposals in training, as this project's configurations; 512 RoIs a picture,
    score threshold 0.05, NMS at 0.5 and 100 detections are torchvision's own settings, and so are
    the two samples per bin and axis of its RoIAlign, where Detectron2's number depends on the box.

    Args:
        kind: ``FasterRCNN`` or ``MaskRCNN``.
        cfg, workload: see :func:`fix_torchvision`.
    """
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1
    return fix_torchvision(kind(backbone, classes, rpn_post_nms_top_n_train=1000), cfg, workload)


def fix_torchvision(detector: FasterRCNN, cfg: CfgNode, workload: Workload) -> TorchvisionRCNN:
    """Give a detector of torchvision the work that Detectron2's get, in place, and wrap it.

    Its own layers run, then proposals, class logits at inference and box deltas are replaced, see
    :func:`.workload.fix_decisions`. Pictures and masks keep their size.

    Args:
        detector: with K + 1 classes.
        cfg: says K and the device, see :func:`peer_config`.
        workload: its picture also settles the backbone, see :func:`.workload.settle_backbone`.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    detector.to(device)
    own = detector.transform
    detector.transform = _KeepSize(own.min_size, own.max_size, own.image_mean, own.image_std)
    boxes = {mode: tensor.to(device) for mode, tensor in workload.proposals.items()}

    def propose(
        module: nn.Module, args: tuple[ImageList, ...], output: tuple
    ) -> tuple[list[Tensor], dict]:
        fixed = boxes["train" if module.training else "inference"]
        return [fixed] * len(args[0].image_sizes), output[1]

    detector.rpn.register_forward_hook(propose)
    # torchvision's background is the first class.
    logits = class_logits(cfg.MODEL.ROI_HEADS.NUM_CLASSES).roll(1, dims=1).to(device)
    replace_scores(detector.roi_heads.box_predictor, logits)
    picture = workload.image.to(device).float() / 255
    settle_backbone(detector.backbone, detector.transform([picture])[0].tensors)
    return TorchvisionRCNN(detector)


# Name on the command line to what builds the model, on MODEL.DEVICE: a module that takes and gives
# what a detector of Detectron2 does, has the work fixed, and has RoI extractors with names that
# benchmark.count_boxes knows. Further libraries are added here.
PEERS: dict[str, Callable[[CfgNode, Workload], nn.Module]] = {
    "torchvision:fasterrcnn_resnet50_fpn": partial(build_torchvision, FasterRCNN),
    "torchvision:maskrcnn_resnet50_fpn": partial(build_torchvision, MaskRCNN),
}
