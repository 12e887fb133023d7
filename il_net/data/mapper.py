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
from detectron2.data import DatasetMapper, detection_utils, transforms
from PIL import Image, UnidentifiedImageError

from .augment import StrongAugment
from .image_size import ORIENTATION, SWAPS_SIDES, stored_size
from .split import without_labels


class UnreadableImage(ValueError):
    """An image file that is missing, broken, no image, too large, or not of the recorded size."""


class TrainMapper(DatasetMapper):
    """Detectron2's training mapper for images of any shape.

    Differs from it: no side of a view is below one pixel, whatever the image's shape and the crop;
    images without objects may be cropped; and errors name the file.

    Args:
        cfg: geometry and formats.
        is_train: False makes it the mapper of an evaluation, which leaves annotations out.
    """

    def __init__(self, cfg: CfgNode, is_train: bool = True) -> None:
        settings = DatasetMapper.from_config(cfg, is_train=is_train)
        settings["augmentations"] = [_one_pixel_or_more(a) for a in settings["augmentations"]]
        super().__init__(**settings)
        # Detectron2 augments as soon as it has read the image and compared its size.
        self._augment, self.augmentations = self.augmentations, self._augment_what_was_read
        self._is_read = False

    def __call__(self, record: dict[str, Any], position: int = 0) -> dict[str, Any]:
        """Map one image as Detectron2 does; `position` is not used.

        Raises:
            UnreadableImage: its file cannot be used.
            ValueError: what is recorded of its objects cannot be used.
        """
        self._is_read = False
        try:
            return super().__call__(record)
        except Exception as error:  # decoders of broken files raise whatever they stumble on
            # An evaluation uses nothing that is recorded of objects.
            kind = ValueError if self._is_read and self.is_train else UnreadableImage
            raise kind(_problem(record["file_name"], error)) from error

    def _augment_what_was_read(self, picture: transforms.AugInput) -> transforms.Transform:
        self._is_read = True
        return self._augment(picture)

    def _transform_annotations(
        self, record: dict[str, Any], chain: transforms.Transform, shape: tuple[int, int]
    ) -> None:
        if all(a.get("iscrowd", 0) for a in record["annotations"]):
            # Detectron2 would ask for the masks of none, to fit boxes to what a crop left of them.
            del record["annotations"]
            record["instances"] = detection_utils.annotations_to_instances([], shape)
            return
        super()._transform_annotations(record, chain, shape)


class SemiMapper:
    """`TrainMapper`, and the strong view beside its image.

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
        self._weak = TrainMapper(cfg)
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
            UnreadableImage, ValueError: see `TrainMapper`.
        """
        geometry, colors = random_source(self._seed, f"{self.group} views", position).spawn(2)
        if self.group == "unlabeled":
            record = without_labels(record)
        with _seeded(geometry):
            mapped = self._weak(record)
        mapped["strong_image"] = mapped["image"]
        if self._strong is not None:
            weak = cv2.merge(list(mapped["image"].numpy()))  # (H, W, 3)
            strong = self._strong(weak, np.random.default_rng(colors))
            mapped["strong_image"] = torch.from_numpy(strong).permute(2, 0, 1).contiguous()
        return mapped


def read_size(file_name: str) -> tuple[int, int]:
    """Width and height of an image as Detectron2 will read it, from the file's header.

    A PNG is taken to be upright if its EXIF entry comes after the pixels, which would all have to
    be decoded to find it.

    Raises:
        UnreadableImage: the file is no image.
    """
    try:
        with Image.open(file_name) as image:
            width, height = stored_size(image)
            in_header = image.format != "PNG" or "exif" in image.info
            turned = in_header and image.getexif().get(ORIENTATION) in SWAPS_SIDES
    except Exception as error:  # decoders of broken files raise whatever they stumble on
        raise UnreadableImage(_problem(file_name, error)) from error
    return (height, width) if turned else (width, height)


def _problem(file_name: str, error: Exception) -> str:
    what = "not an image" if isinstance(error, UnidentifiedImageError) else error
    return f"{file_name} cannot be used: {type(error).__name__}: {what}"


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


class _Resize(transforms.ResizeShortestEdge):
    """Of a very long image, Detectron2 would round the short edge to nothing."""

    def get_transform(self, image: np.ndarray) -> transforms.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, transforms.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


class _Crop(transforms.RandomCrop):
    """Of a very narrow image, Detectron2 would round a part to nothing."""

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = super().get_crop_size(image_size)
        return max(height, 1), max(width, 1)


def _one_pixel_or_more(augmentation: transforms.Augmentation) -> transforms.Augmentation:
    if type(augmentation) is transforms.ResizeShortestEdge:
        style = "range" if augmentation.is_range else "choice"
        lengths, longest = augmentation.short_edge_length, augmentation.max_size
        return _Resize(lengths, longest, style, augmentation.interp)
    if type(augmentation) is transforms.RandomCrop:
        return _Crop(augmentation.crop_type, augmentation.crop_size)
    return augmentation


def to_eight_bits(image: Image.Image) -> Image.Image:
    """The high byte of 16-bit gray, as Pillow takes it of 16-bit colours; others as they are.

    Pillow makes white of every 16-bit gray above 255 when it converts to a mode of 8 bits.

    Raises:
        ValueError: floating-point pixels that are no levels from 0 to 255; Pillow would make black
            of numbers that are none, and nearly black of 0 to 1.
    """
    if image.mode == "F":
        levels = np.asarray(image)
        if not (np.isfinite(levels).all() and levels.min() >= 0 and 1 < levels.max() < 256):
            raise ValueError(
                f"its floating-point pixels go from {levels.min():g} to {levels.max():g}; save it "
                "with integers, or with finite levels from 0 to 255"
            )
    # Pillow 9 opens 16-bit PNGs as 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):
        levels = np.asarray(image).clip(0, 2**16 - 1)
        return Image.fromarray((levels >> 8).astype(np.uint8))
    return image


# Detectron2 has no seam between opening a file and converting it. Here are two, for all that reads
# pictures through it: a model must see at test time what it saw in training.
_convert = detection_utils.convert_PIL_to_numpy
_turn_upright = detection_utils._apply_exif_orientation


def _convert_any(image: Image.Image, format: str | None) -> np.ndarray:  # noqa: A002
    # Class maps are read as "L", and their numbers must stay.
    return _convert(image if format in (None, "L") else to_eight_bits(image), format)


def _turn_upright_once(image: Image.Image) -> Image.Image:
    if image.format == "TIFF":  # newer Pillows turn these themselves, and then forget the entry
        image.load()
    return _turn_upright(image)


detection_utils.convert_PIL_to_numpy = _convert_any
detection_utils._apply_exif_orientation = _turn_upright_once
