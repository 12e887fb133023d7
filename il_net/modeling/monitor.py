"""What the pseudo labels of the last steps were like, read from the device once per log period.

Thesis section 2.4 (Fig. 2.14's question: are the pseudo labels any good?).
"""

import torch
from detectron2.structures import Instances
from torch import Tensor

from .pseudo_labels import pseudo_label_statistics


class PseudoLabelMonitor:
    """Sums on the device; :meth:`read` transfers, divides and forgets them.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        # The last step's unlabelled records and their pseudo labels, for a picture.
        self.latest: tuple[list[dict], list[Instances]] = ([], [])

    def labels(self, records: list[dict], labels: list[Instances]) -> None:
        """Count the pseudo labels of one step's unlabelled records."""
        boxes = ("gt_boxes", "gt_classes", "scores")  # masks, large, may go
        shown = [Instances(x.image_size, **{n: x.get(n) for n in boxes}) for x in labels]
        self.latest = (records, shown)
        for name, value in pseudo_label_statistics(labels, self.num_classes).items():
            self._add(f"pseudo/{name}", value)

    def counts(self, counts: dict[str, Tensor]) -> None:
        """Count what the teacher's IoU filter removed in one step."""
        for name, value in counts.items():
            self._add(f"pseudo/{name}", value)

    def losses(self, losses: dict[str, Tensor]) -> None:
        """Count one step's losses on unlabelled images before they are weighted."""
        for name, value in losses.items():
            self._add(f"pseudo/raw_{name}", value.detach())

    def read(self) -> dict[str, float | list[float]]:
        """Means since the last call; a vector (the class histogram) as a list."""
        if not self._sums:
            return {}
        names, tensors = zip(*self._sums.items(), strict=True)
        flat = torch.cat([t.double().flatten() for t in tensors]).tolist()  # the only transfer
        values, means = iter(flat), {}
        for name, tensor in zip(names, tensors, strict=True):
            mean = [next(values) / self._counts[name] for _ in range(tensor.numel())]
            means[name] = mean if tensor.dim() else mean[0]
        self._sums, self._counts = {}, {}
        return means

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1
