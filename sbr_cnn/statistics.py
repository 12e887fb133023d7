"""What the RoI heads are trained on: how well proposals overlap objects, loop by loop.

Thesis sections 2.2 and 2.3 (Figs. 2.8 and 2.11: the IoU of proposals per loop) and 2.7 (Fig. 2.34:
how often each C2SSL target occurs).
"""

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from .c2ssl import SITUATIONS

BINS = 20  # of width 0.05; a proposal that overlaps nothing is in the first


class RoIStatistics:
    """Sums on the device; :meth:`read` transfers and forgets them.

    Args:
        num_classes: K.
        period: training steps between two readings, for who reads.
    """

    def __init__(self, num_classes: int, period: int) -> None:
        self.num_classes = num_classes
        self.period = period
        self._sums: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def add_proposals(self, loop: int, boxes: list[Boxes], targets: list[Instances]) -> None:
        """Count the boxes that enter a loop, without the ground truth that joins them.

        Args:
            loop: its number, from 1.
            boxes: of each image, the candidates before sampling.
            targets: of each image, with ``gt_boxes``.
        """
        for own, target in zip(boxes, targets, strict=True):
            best = own.tensor.new_zeros(len(own))
            if len(target):
                best = pairwise_iou(target.gt_boxes, own).amax(dim=0)
            # An IoU on an edge belongs to the bin above it; 1 to the last.
            index = (best * BINS + 1e-4).long().clamp(max=BINS - 1)
            counts = torch.zeros(BINS, dtype=torch.long, device=index.device)
            self._add("iou_histogram", loop, counts.scatter_add_(0, index, torch.ones_like(index)))

    def add_sample(self, loop: int, sample: list[Instances]) -> None:
        """Count the positives of a loop's sampled boxes and, where C2SSL is on, its targets.

        Args:
            loop: its number, from 1.
            sample: of each image, with ``gt_classes`` and perhaps ``situation``.
        """
        for image in sample:
            self._add("positives", loop, (image.gt_classes < self.num_classes).sum())
            self._add("sampled", loop, image.gt_classes.new_tensor(len(image)))
            if image.has("situation"):
                found = image.situation[:, None] == torch.arange(
                    len(SITUATIONS), device=image.situation.device
                )
                self._add("situations", loop, found.sum(dim=0))

    def read(self) -> dict[int, dict[str, int | list[int]]]:
        """Counts since the last call, by loop.

        Returns:
            Loop number to ``iou_histogram`` (``BINS`` counts), ``positives``, ``sampled`` and, with
            C2SSL, ``situations`` (counts of ``SITUATIONS``).
        """
        loops: dict[int, dict[str, int | list[int]]] = {}
        if self._sums:
            keys, sums = zip(*self._sums.items(), strict=True)
            flat = torch.cat([t.flatten() for t in sums]).tolist()  # the only transfer
            values = iter(flat)
            for (name, loop), tensor in zip(keys, sums, strict=True):
                counts = [next(values) for _ in range(tensor.numel())]
                loops.setdefault(loop, {})[name] = counts if tensor.dim() else counts[0]
        self._sums = {}
        return loops

    def _add(self, name: str, loop: int, counts: Tensor) -> None:
        key = (name, loop)
        self._sums[key] = self._sums[key] + counts if key in self._sums else counts


def build_statistics(cfg: CfgNode) -> RoIStatistics | None:
    """Statistics of RoI heads, or None where ``MODEL.ROI_STATISTICS_PERIOD`` is 0."""
    period = cfg.MODEL.ROI_STATISTICS_PERIOD
    if period < 0:
        raise ValueError(f"MODEL.ROI_STATISTICS_PERIOD is 0 (off) or more steps, got {period}")
    return RoIStatistics(cfg.MODEL.ROI_HEADS.NUM_CLASSES, period) if period else None
