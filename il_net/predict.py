"""Run a trained model on pictures and write what it finds."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from .checkpoint import Checkpointer
from .data.sources import PICTURE_ENDINGS

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm"}


class Predictor:
    """A model in evaluation mode with the test-time resizing of its configuration.

    Args:
        cfg: a configuration whose ``DATASETS.CLASSES`` are set.
        model: the model; None builds it and loads ``MODEL.WEIGHTS``.

    Raises:
        ValueError: less than 90 % of the model's weights are in ``MODEL.WEIGHTS``.
    """

    def __init__(self, cfg: CfgNode, model: torch.nn.Module | None = None) -> None:
        if model is None:
            model = build_model(cfg)
            Checkpointer(model).load_complete(cfg.MODEL.WEIGHTS)
        self.model = model.eval()
        self.input_format = cfg.INPUT.FORMAT
        self.resize = transforms.ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST
        )

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """Detections of one picture, in its own pixels, on the CPU.

        Args:
            image: (H, W, 3) uint8 in BGR order, as OpenCV reads it.
        """
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        resized = self.resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        inputs = [{"image": tensor, "height": height, "width": width}]
        return self.model(inputs)[0]["instances"].to("cpu")


def draw(
    image: np.ndarray, instances: Instances, classes: Sequence[str], scale: float = 1.0
) -> np.ndarray:
    """Boxes, masks, class names and scores over a picture, one colour per class.

    Args:
        image: (H, W, 3) uint8, BGR.
        instances: predictions (``pred_*``) in the picture's pixels.
        classes: names in the model's order.
        scale: size of the drawing relative to the picture; small pictures need more than 1.

    Returns:
        (H * scale, W * scale, 3) uint8, BGR.
    """
    categories = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    labels = [f"{classes[c]} {score:.0%}" for c, score in zip(categories, scores, strict=True)]
    masks = np.asarray(instances.pred_masks) if instances.has("pred_masks") else None
    return _overlay(image, classes, scale, categories, labels, instances.pred_boxes, masks)


def draw_truth(
    image: np.ndarray, record: dict, classes: Sequence[str], scale: float = 1.0
) -> np.ndarray:
    """Like :func:`draw` for a Detectron2 dataset dict with ``annotations``."""
    annotations = record["annotations"]
    categories = [a["category_id"] for a in annotations]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    masks = [a.get("segmentation") for a in annotations]
    return _overlay(
        image,
        classes,
        scale,
        categories,
        [classes[c] for c in categories],
        np.array(boxes).reshape(-1, 4),
        masks if all(masks) else None,
    )


def _overlay(
    image: np.ndarray,
    classes: Sequence[str],
    scale: float,
    categories: Sequence[int],
    labels: Sequence[str],
    boxes: Boxes | np.ndarray,
    masks: np.ndarray | list | None,
) -> np.ndarray:
    # Detectron2's own drawing of instances varies a class' colour and hides what is below.
    palette = class_colors(len(classes)) / 255
    visualizer = Visualizer(convert_image_to_rgb(image, "BGR"), scale=scale)
    visualizer.overlay_instances(
        boxes=boxes,
        masks=masks,
        labels=labels,
        assigned_colors=[palette[c] for c in categories],
        alpha=0.4,
    )
    return visualizer.get_output().get_image()[:, :, ::-1]


def class_colors(count: int) -> np.ndarray:
    """``count`` distinct colours: (count, 3) uint8, RGB, the same on every call."""
    hues = (0.58 + np.arange(count) * 0.618034) % 1.0  # golden ratio: neighbours differ
    channels = np.abs((hues[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return (np.clip(channels, 0, 1) * 190 + 50).astype(np.uint8)


def to_coco(instances: Instances, image_id: int) -> list[dict]:
    """COCO annotations of one picture, without ids; boxes are x, y, width, height in pixels.

    ``category_id`` is the class index + 1; masks are run-length encoded. ``mask_score`` is there
    where the model rates masks by themselves (the field ``mask_scores``).
    """
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    records = []
    for i, box in enumerate(boxes.tolist()):
        record = {
            "image_id": image_id,
            "category_id": int(instances.pred_classes[i]) + 1,
            "bbox": [round(value, 2) for value in box],
            "area": round(box[2] * box[3], 2),
            "score": round(float(instances.scores[i]), 5),
            "iscrowd": 0,
        }
        if instances.has("pred_masks"):
            mask = np.asfortranarray(instances.pred_masks[i].numpy().astype(np.uint8))
            rle = mask_util.encode(mask)
            record["area"] = float(mask_util.area(rle))
            record["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        if instances.has("mask_scores"):
            record["mask_score"] = round(float(instances.mask_scores[i]), 5)
        records.append(record)
    return records


def find_inputs(pattern: str, output: Path) -> list[Path]:
    """Pictures and videos that a file, folder (searched to the bottom) or glob names, sorted.

    Args:
        pattern: a file (of any ending), a folder or a glob.
        output: where results will go; what lies there is no input.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: the results would replace the inputs.
    """
    path, output = Path(pattern).expanduser(), output.resolve()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = list(path.rglob("*"))
    else:
        anchor = Path(path.anchor) if path.anchor else Path()
        found = list(anchor.glob(str(path.relative_to(path.anchor))))
    if not path.is_file():
        suffixes = VIDEO_SUFFIXES.union(PICTURE_ENDINGS)
        found = [p for p in found if p.is_file() and p.suffix.lower() in suffixes]
    if not found:
        raise FileNotFoundError(f"--input {pattern}: no picture or video there")
    folder = path if path.is_dir() else None
    if any(output == (folder or p.parent).resolve() for p in found):
        raise ValueError(f"--output {output} is the folder of --input: it would be overwritten")
    return sorted(p for p in found if folder is None or output not in p.resolve().parents)


def read_picture(path: Path) -> np.ndarray:
    """A picture turned as its EXIF says, (H, W, 3) uint8 in BGR order.

    Raises:
        ValueError: the file can't be read as a picture.
    """
    try:
        return read_image(str(path), "BGR")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} can't be read as a picture: {error}") from error


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video, (H, W, 3) uint8 in BGR order.

    Raises:
        ValueError: the file can't be opened as a video.
    """
    import cv2

    video = cv2.VideoCapture(str(path))
    try:
        if not video.isOpened():
            raise ValueError(f"{path} can't be read as a video")
        while True:
            more, frame = video.read()
            if not more:
                return
            yield frame
    finally:
        video.release()
