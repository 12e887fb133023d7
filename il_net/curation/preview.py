"""What the model will see: samples of a run's own loaders as pictures in a grid.

Thesis section 2.4 for the weak and the strong view.

Shapes: pictures are (H, W, 3) uint8, BGR unless said otherwise.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import BoxMode, Instances, PolygonMasks
from detectron2.utils.env import seed_all_rng

from ..data.loader import ImageStream, build_semi_loader
from ..data.split import split_records, train_records
from ..figures import DPI, figure, shorten

COLUMNS = 4
CELL = 480  # pixels: the longer side of a picture in the grid
_GAP, _CAPTION = 12, 44  # pixels
_LINE_LENGTH = 52


@dataclass(frozen=True)
class View:
    """One picture of a sample.

    Args:
        image: the picture, augmented.
        annotations: Detectron2's, in its pixels: box, class and, if trained on, mask; those of an
            unlabelled picture are empty.
        caption: two lines.
    """

    image: np.ndarray
    annotations: list[dict[str, Any]]
    caption: str

    @property
    def scale(self) -> float:
        """Size in the grid relative to the picture."""
        return CELL / max(self.image.shape[:2])


def supervised_rows(cfg: CfgNode, count: int) -> list[list[View]]:
    """The first `count` samples of Detectron2's training loader, four in a row.

    It is seeded with SEED: the same configuration gives the same pictures. A run draws others, for
    its model and its workers draw numbers too. Seeds the generators of this process.

    Raises:
        ValueError: a picture that cannot be used, under the name of its file; see also
            `split.train_records` and `split.make_split`.
    """
    cfg = _in_process(cfg)
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else None)
    labeled, _ = split_records(cfg, train_records(cfg))
    mapper = _naming(DatasetMapper(cfg, is_train=True))
    loader = build_detection_train_loader(cfg, mapper=mapper, dataset=labeled)
    samples = islice(chain.from_iterable(loader), count)
    views = [_view(sample, "image", cfg.INPUT.FORMAT) for sample in samples]
    return [views[i : i + COLUMNS] for i in range(0, count, COLUMNS)]


def semi_rows(cfg: CfgNode, count: int) -> list[list[View]]:
    """The first samples of a semi-supervised run, half labelled, half unlabelled (from its step
    after burn-in): in a row the weak and the strong view of one of each.

    With SEED of 0 or more they are those of the run itself.

    Raises:
        ValueError: see `build_semi_loader` and `SemiMapper`.
    """
    cfg = _in_process(cfg)
    loader = build_semi_loader(cfg)
    streams = {"labelled": (loader.labeled, count)}
    if loader.unlabeled is not None:
        streams = {
            "labelled": (loader.labeled, count - count // 2),
            "unlabelled": (loader.unlabeled, count // 2),
        }
    pairs = [list(_pairs(*stream, name, cfg.INPUT.FORMAT)) for name, stream in streams.items()]
    if len(pairs) == 1:
        pairs = [pairs[0][::2], pairs[0][1::2]]
    pairs[1] += [[]] * (len(pairs[0]) - len(pairs[1]))
    return [[*left, *right] for left, right in zip(*pairs, strict=True)]


def write_grid(path: Path, rows: Sequence[Sequence[tuple[np.ndarray, str]]]) -> None:
    """Write pictures with their captions, pixel by pixel, from left to right and top to bottom.

    Args:
        path: the file.
        rows: (picture in RGB order, caption of two lines); its sides at most `CELL`, in pixels.
    """
    width = _GAP + max(map(len, rows)) * (CELL + _GAP)
    heights = [_CAPTION + max(picture.shape[0] for picture, _ in row) + _GAP for row in rows]
    total = _GAP + sum(heights)
    with figure(path, width / DPI, total / DPI) as drawn:
        drawn.set_layout_engine("none")  # every picture has its place
        top = total - _GAP
        for row, height in zip(rows, heights, strict=True):
            for column, (picture, caption) in enumerate(row):
                h, w = picture.shape[:2]
                left = _GAP + column * (CELL + _GAP)
                place = (left / width, (top - _CAPTION - h) / total, w / width, h / total)
                axes = drawn.add_axes(place)
                axes.imshow(picture, interpolation="nearest", aspect="auto")
                axes.set_axis_off()
                drawn.text(left / width, top / total, caption, fontsize=7.5, va="top")
            top -= height


def _in_process(cfg: CfgNode) -> CfgNode:
    """A copy whose loaders start no processes and use no GPU."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _naming(mapper: DatasetMapper) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    def map_record(record: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return mapper(record)
        except Exception as error:
            name = type(error).__name__
            raise ValueError(f"{record['file_name']} cannot be used: {name}: {error}") from error

    return map_record


def _pairs(stream: ImageStream, count: int, group: str, channels: str) -> Iterator[list[View]]:
    """The weak and the strong view of the first samples of a stream."""
    batches: Iterable[list[dict[str, Any]]] = stream.batches(0, num_workers=0)
    for sample in islice(chain.from_iterable(batches), count):
        yield [
            _view(sample, key, channels, f"{group}, {kind} view")
            for key, kind in (("image", "weak"), ("strong_image", "strong"))
        ]


def _view(sample: dict[str, Any], key: str, channels: str, title: str = "") -> View:
    image = convert_image_to_rgb(sample[key].permute(1, 2, 0), channels)[:, :, ::-1]
    height, width = image.shape[:2]
    facts = [f"{width} x {height} px"]
    annotations: list[dict[str, Any]] = []
    if "instances" in sample:
        annotations = _annotations(sample["instances"])
        facts.append(f"{len(annotations)} object{'s' * (len(annotations) != 1)}")
    name = shorten(Path(sample["file_name"]).name, _LINE_LENGTH // 2 if title else _LINE_LENGTH)
    lines = (title, ", ".join([name, *facts])) if title else (name, ", ".join(facts))
    return View(np.ascontiguousarray(image), annotations, "\n".join(lines))


def _annotations(instances: Instances) -> list[dict[str, Any]]:
    boxes, classes = instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist()
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category}
        for box, category in zip(boxes, classes, strict=True)
    ]
    if instances.has("gt_masks"):
        masks = instances.gt_masks
        for i, annotation in enumerate(annotations):
            if isinstance(masks, PolygonMasks):
                annotation["segmentation"] = masks.polygons[i]
            else:
                bits = masks.tensor[i].numpy().astype(np.uint8)
                annotation["segmentation"] = mask_util.encode(np.asfortranarray(bits))
    return annotations
