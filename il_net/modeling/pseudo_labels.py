"""Pseudo labels: which of the teacher's detections the student takes for ground truth.

Thesis section 2.4.3 (threshold delta on the class score; the IoU filter has acted before).

Shape shorthand: R detections of one image, P pseudo labels of one image, K classes.
"""

import torch
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.structures import BitMasks, Instances
from torch import Tensor


@torch.no_grad()
def make_pseudo_labels(
    detections: list[Instances],
    *,
    score_thresh: float,
    min_side: float,
    max_per_image: int,
    with_masks: bool,
) -> list[Instances]:
    """Choose detections and name their fields as ground truth.

    Args:
        detections: of each image, on the resized image: ``pred_boxes`` clipped to it,
            ``pred_classes``, ``scores``; with the IoU branch ``iou_scores``; for masks
            ``pred_masks`` (R, 1, M, M), probabilities inside the box.
        score_thresh: a class score must be above it.
        min_side: shortest allowed side in pixels of the resized image. Boxes without extent, which
            Detectron2 could not encode, are left out also with 0.
        max_per_image: of the others, the best by class score.
        with_masks: give ``gt_masks``.

    Returns:
        Per image, best first and of the same image size: ``gt_boxes``, ``gt_classes`` and
        ``scores`` (P,); ``iou_scores`` (P,) where the detections have them; ``gt_masks`` as bitmaps
        of the resized image, where the pasted probability is at least 0.5, which is never outside
        the box.
    """
    labels = []
    for image in detections:
        sides = image.pred_boxes.tensor[:, 2:] - image.pred_boxes.tensor[:, :2]
        shortest = sides.amin(dim=1)
        good = (image.scores > score_thresh) & (shortest >= min_side) & (shortest > 0)
        order = image.scores.argsort(descending=True, stable=True)
        chosen = image[order[good[order]][:max_per_image]]
        label = Instances(image.image_size)
        label.gt_boxes = chosen.pred_boxes
        label.gt_classes = chosen.pred_classes
        label.scores = chosen.scores
        if chosen.has("iou_scores"):
            label.iou_scores = chosen.iou_scores
        if with_masks:
            masks = chosen.pred_masks[:, 0].float()
            pasted = paste_masks_in_image(masks, chosen.pred_boxes, image.image_size, 0.5)
            label.gt_masks = BitMasks(pasted)
        labels.append(label)
    return labels


def pseudo_label_statistics(labels: list[Instances], num_classes: int) -> dict[str, Tensor]:
    """What one batch of pseudo labels is like, without waiting for the device.

    Args:
        labels: what :func:`make_pseudo_labels` gave, at least one image.
        num_classes: K.

    Returns:
        Tensors on the labels' device: ``boxes_per_image`` and ``images_without_boxes`` (a share),
        fp32 scalars; ``class_histogram`` (K,), int64 counts; with at least one box also the means
        ``class_score`` and, if the labels have it, ``iou_score``.
    """
    classes = torch.cat([label.gt_classes for label in labels])
    counts = [len(label) for label in labels]

    def scalar(value: float) -> Tensor:
        # Filled on the device; copied there, it would wait.
        return torch.full((), value, dtype=torch.float32, device=classes.device)

    # bincount would ask the device for the largest class.
    histogram = classes.new_zeros(num_classes).scatter_add_(0, classes, torch.ones_like(classes))
    statistics = {
        "boxes_per_image": scalar(sum(counts) / len(counts)),
        "images_without_boxes": scalar(counts.count(0) / len(counts)),
        "class_histogram": histogram,
    }
    if sum(counts):
        statistics["class_score"] = torch.cat([label.scores for label in labels]).mean()
        if labels[0].has("iou_scores"):
            statistics["iou_score"] = torch.cat([label.iou_scores for label in labels]).mean()
    return statistics
