"""The mask head of R3-CNN and HTC, which takes features of the pass before, and the mask losses.

Thesis section 2.2.3, eqs. 2.6-2.8. Shape shorthand: R positives or detections of all images,
G ground-truth masks of one image, C channels, K classes, M the mask's side (28).
"""

import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from .mask_iou import MaskIoUHead, fraction_inside


@ROI_MASK_HEAD_REGISTRY.register()
class LoopMaskHead(MaskRCNNConvUpsampleHead):
    """Mask R-CNN's mask head plus C1, a 1x1 convolution with ReLU for the fed-back features.

    One iteration is ``m = convs(x + relu(C1(m_previous)))`` and ``logits = C2(U(m))``. The first
    iteration passes zeros through C1, so what it adds is the ReLU of C1's bias.

    HTC's first head has no C1 and takes no features: :meth:`drop_feedback`.

    Differs from Detectron2's head: all layers start Kaiming-normal (its predictor: N(0, 0.001)),
    and training and inference are steered by ``LoopROIHeads``.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, **kwargs) -> None:
        super().__init__(input_shape, **kwargs)
        channels = self.deconv.in_channels
        # C1 of the thesis; "conv_res" is its name in HTC's published code.
        self.conv_res = Conv2d(channels, input_shape.channels, 1, activation=F.relu)
        c2_msra_fill(self.conv_res)
        c2_msra_fill(self.predictor)

    def drop_feedback(self) -> None:
        """Remove C1: the head ignores the features of the pass before."""
        self.conv_res = None

    def iterate(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """One iteration's features m: (R, C, 14, 14).

        Args:
            x: pooled RoI features, (R, C, 14, 14).
            previous: m of the iteration before, None in the first.
        """
        if self.conv_res is not None:
            if previous is None:
                # One zero pixel, broadcast: as zeros of full size, and C1 stays in the graph.
                previous = x.new_zeros(1, self.conv_res.in_channels, 1, 1)
            x = x + self.conv_res(previous)
        for conv in self.conv_norm_relus:
            x = conv(x)
        return x

    def logits(self, features: Tensor) -> Tensor:
        """Mask logits (R, K, 28, 28) from m; K is 1 for class-agnostic masks."""
        return self.predictor(self.deconv_relu(self.deconv(features)))

    def class_logits(self, features: Tensor, classes: Tensor) -> Tensor:
        """Mask logits of one class per RoI, (R,) to (R, 28, 28), without those of all others."""
        if self.predictor.out_channels == 1:
            classes = torch.zeros_like(classes)
        upsampled = self.deconv_relu(self.deconv(features))
        weight, bias = self.predictor.weight.flatten(1)[classes], self.predictor.bias[classes]
        return torch.einsum("rc,rchw->rhw", weight, upsampled) + bias[:, None, None]

    def layers(self, x: Tensor) -> Tensor:
        """A single iteration, as Detectron2's own RoI heads call it."""
        return self.logits(self.iterate(x, None))


def crop_masks(masks: BitMasks | PolygonMasks, boxes: Boxes, index: Tensor, side: int) -> Tensor:
    """Cut each box out of its ground-truth mask and resize the cut to ``side`` pixels.

    Args:
        masks: the G masks of one image.
        boxes: R boxes in the image's pixels.
        index: (R,) int64, which mask each box takes.
        side: M.

    Returns:
        (R, M, M) float32 of zeros and ones: RoIAlign (aligned, as many samples as pixels) at 0.5.
    """
    if isinstance(masks, PolygonMasks):
        return masks[index].crop_and_resize(boxes.tensor, side).to(boxes.device).float()
    # RoIAlign's batch index selects the mask: G masks become float, not R copies of them.
    rois = torch.cat([index[:, None].to(boxes.tensor), boxes.tensor], dim=1)
    pixels = masks.tensor.to(rois.dtype)[:, None]
    with torch.autocast(pixels.device.type, enabled=False):
        cropped = roi_align(pixels, rois, side, sampling_ratio=0, aligned=True)
    return (cropped[:, 0] >= 0.5).float()


def select_class(logits: Tensor, classes: Tensor) -> Tensor:
    """The channel of each RoI's class: (R, K, M, M) and (R,) to (R, M, M); K = 1 is agnostic."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(len(classes), device=classes.device), classes]


def mask_loss(logits: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of the ground-truth class' channel over all positives and pixels.

    Args:
        logits: (R, K, M, M).
        classes: (R,) ground-truth classes in [0, K).
        targets: (R, M, M) of zeros and ones.

    Returns:
        A scalar; zero and still connected to the graph when R is 0.
    """
    if len(classes) == 0:
        return logits.sum() * 0.0
    selected = select_class(logits, classes).float()
    return F.binary_cross_entropy_with_logits(selected, targets)


def train_masks(
    x: Tensor,
    logits: Tensor,
    positives: list[Instances],
    masks: list[BitMasks | PolygonMasks | None],
    iou_head: MaskIoUHead | None = None,
) -> dict[str, Tensor]:
    """The losses of one mask prediction on the positives of all images.

    Args:
        x: pooled features, (R, C, S, S).
        logits: (R, K, M, M).
        positives: per image ``proposal_boxes``, ``gt_classes`` and ``gt_index``.
        masks: per image the ground-truth masks that ``gt_index`` points into; an image without
            positives may have none.
        iou_head: adds its loss.

    Returns:
        ``loss_mask`` and, with ``iou_head``, ``loss_mask_iou``.

    Raises:
        ValueError: an image with positives has no masks.
    """
    used = [(p, m) for p, m in zip(positives, masks, strict=True) if len(p)]
    if any(m is None for _, m in used):
        raise ValueError(
            "MODEL.MASK_ON is True, but an image's objects have no masks (gt_masks): give every "
            "annotation a segmentation, or set MODEL.MASK_ON False"
        )
    side = logits.shape[-1]
    crops = [crop_masks(m, p.proposal_boxes, p.gt_index, side) for p, m in used]
    targets = torch.cat(crops) if crops else logits.new_zeros(0, side, side, dtype=torch.float32)
    classes = torch.cat([p.gt_classes for p in positives])
    losses = {"loss_mask": mask_loss(logits, classes, targets)}
    if iou_head is not None:
        shares = [
            fraction_inside(_bitmaps(m, p).to(x.device), p.proposal_boxes.tensor, p.gt_index)
            for p, m in used
        ]
        inside = torch.cat(shares) if shares else targets.new_zeros(0)
        selected = select_class(logits, classes)
        losses["loss_mask_iou"] = iou_head.loss(x, selected, classes, targets, inside)
    return losses


def _bitmaps(masks: BitMasks | PolygonMasks, image: Instances) -> Tensor:
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *image.image_size)
    return masks.tensor
