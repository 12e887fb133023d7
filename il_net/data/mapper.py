"""From a dataset record to the weak and the strong view of its image, in one common geometry.

Thesis section 2.4: the teacher sees the weak view (resized, perhaps flipped), the student also the
strong one (colours, blur, erased rectangles). The image is read once.

Shapes: views are (3, H, W) uint8 in the order of `INPUT.FORMAT`.
"""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper

from .augment import StrongAugment
from .split import without_labels


class SemiMapper:
    """Detectron2's training mapper, and the strong view beside its image.

    Everything random about a sample follows from `seed`, the group and the sample's position in
    the group's endless stream: not from the process or worker that makes it, nor from what was
    made before.

    Args:
        cfg: geometry, formats and `INPUT.STRONG_AUG`.
        labeled: whether annotations become `instances`; else they are dropped first.
        seed: not negative.
    """

    def __init__(self, cfg: CfgNode, labeled: bool, seed: int) -> None:
        self.group = "labeled" if labeled else "unlabeled"
        self._seed = seed
        self._weak = DatasetMapper(cfg, is_train=True)
        self._strong = StrongAugment.from_config(cfg)

    def __call__(self, record: dict[str, Any], position: int) -> dict[str, Any]:
        """Map one image.

        Args:
            record: Detectron2's; it is not changed.
            position: of the sample in its group's stream, from 0.

        Returns:
            the record with `image` (the weak view), `strong_image` and, if labelled, `instances`
            (`gt_boxes` in pixels of the views, `gt_classes`, `gt_masks` with MODEL.MASK_ON).

        Raises:
            ValueError: anything that goes wrong with this image, under the name of its file.
        """
        geometry, colors = random_source(self._seed, f"{self.group} views", position).spawn(2)
        if self.group == "unlabeled":
            record = without_labels(record)
        try:
            with _seeded(geometry):
                mapped = self._weak(record)
        except Exception as error:
            name = type(error).__name__
            raise ValueError(f"{record['file_name']} cannot be used: {name}: {error}") from error
        mapped["strong_image"] = mapped["image"]
        if self._strong is not None:
            weak = cv2.merge(list(mapped["image"].numpy()))  # (H, W, 3)
            strong = self._strong(weak, np.random.default_rng(colors))
            mapped["strong_image"] = torch.from_numpy(strong).permute(2, 0, 1).contiguous()
        return mapped


def random_source(seed: int, purpose: str, position: int = 0) -> np.random.SeedSequence:
    """The source of all randomness of one thing, independent of that of any other."""
    return np.random.SeedSequence((seed, zlib.crc32(purpose.encode()), position))


@contextmanager
def _seeded(sequence: np.random.SeedSequence) -> Iterator[None]:
    """numpy's and Python's global generators, from which Detectron2's augmentations draw.

    They are put back afterwards: without workers the samples are made in the training process,
    whose own draws must not repeat with them. torch's are left alone.
    """
    before = np.random.get_state(), random.getstate()
    numbers = sequence.generate_state(8)
    np.random.seed(numbers[:4])
    random.seed(numbers[4:].tobytes())
    try:
        yield
    finally:
        np.random.set_state(before[0])
        random.setstate(before[1])
