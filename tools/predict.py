#!/usr/bin/env python
"""Detect objects in pictures and videos with a trained model.

python tools/predict.py --config-file F --input IMAGE|FOLDER|GLOB|VIDEO --output DIR \\
    [--min-score S] [MODEL.WEIGHTS W]

Writes one picture (or video) per input with what was found at --min-score or better, and
detections.json, a COCO file with every detection that the model keeps (from
MODEL.ROI_HEADS.SCORE_THRESH_TEST on), masks run-length encoded. Category ids are 1, 2, ... in the
order of the model's classes. Exit code 1: a mistake, or some input could not be read.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.errors import plain_errors
from il_net.predict import (
    VIDEO_SUFFIXES,
    Predictor,
    draw,
    find_inputs,
    read_frames,
    read_picture,
    to_coco,
)
from il_net.safe_load import add_trust_option
from sbr_cnn import add_sbr_cnn_config


class Writer:
    """Draws detections and collects them as one COCO file.

    Args:
        predictor, classes: the model and its class names.
        output: folder for everything written.
        min_score: detections below it are not drawn.
    """

    def __init__(
        self, predictor: Predictor, classes: list[str], output: Path, min_score: float
    ) -> None:
        self.predictor = predictor
        self.classes = classes
        self.output = output
        self.min_score = min_score
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def picture(self, source: Path, name: Path) -> None:
        """Detect in one picture file and write ``output/name``."""
        image = read_picture(source)
        instances = self.predictor(image)
        if not cv2.imwrite(str(self._target(name)), self.draw(image, instances)):
            raise ValueError(f"{self._target(name)} can't be written")
        self.record(image, instances, name.as_posix())

    def video(self, source: Path, name: Path) -> None:
        """Detect in every frame of a video file and write ``output/name`` as mp4."""
        rate = cv2.VideoCapture(str(source)).get(cv2.CAP_PROP_FPS) or 25.0
        target = str(self._target(name)).removesuffix(".mp4") + ".mp4"
        video = None
        try:
            for number, frame in enumerate(read_frames(source)):
                instances = self.predictor(frame)
                drawn = self.draw(frame, instances)
                if video is None:
                    code, size = cv2.VideoWriter.fourcc(*"mp4v"), drawn.shape[1::-1]
                    video = cv2.VideoWriter(target, code, rate, size)
                video.write(np.ascontiguousarray(drawn))
                self.record(frame, instances, f"{name.as_posix()}#{number}")
        finally:
            if video is not None:
                video.release()
        if video is None:
            raise ValueError(f"{source} holds no frame")

    def draw(self, image: np.ndarray, instances: Instances) -> np.ndarray:
        """The picture (BGR) with the detections that are sure enough."""
        return draw(image, instances[instances.scores >= self.min_score], self.classes)

    def record(self, image: np.ndarray, instances: Instances, name: str) -> None:
        """Keep all detections of one picture for ``detections.json``."""
        image_id = len(self.images) + 1
        height, width = image.shape[:2]
        self.images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for record in to_coco(instances, image_id):
            self.annotations.append({"id": len(self.annotations) + 1, **record})

    def _target(self, name: Path) -> Path:
        target = self.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def save(self) -> None:
        """Write ``detections.json``."""
        categories = [{"id": i, "name": name} for i, name in enumerate(self.classes, start=1)]
        content = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }
        (self.output / "detections.json").write_text(json.dumps(content))


def main() -> int:
    """Predict all inputs; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--input", required=True, metavar="IMAGE|FOLDER|GLOB|VIDEO")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--min-score", type=float, default=0.5, help="draw from here (0.5)")
    add_trust_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    setup_logger(name="il_net")
    with plain_errors():
        inputs = find_inputs(args.input, args.output)
        cfg = load_config(args.config_file, args.opts, add_sbr_cnn_config)
        if not cfg.DATASETS.CLASSES:
            register_datasets(cfg)
        if not cfg.DATASETS.CLASSES:
            raise ValueError("DATASETS.CLASSES is empty: use the config.yaml of the training run")
        cfg.freeze()
        predictor = Predictor(cfg)
    args.output.mkdir(parents=True, exist_ok=True)
    writer = Writer(predictor, list(cfg.DATASETS.CLASSES), args.output, args.min_score)
    root = Path(args.input).expanduser()
    if not root.is_dir():
        root = Path(os.path.commonpath([source.parent for source in inputs]))
    unreadable = 0
    for source in tqdm(inputs, unit="file"):
        name = source.relative_to(root)
        run = writer.video if source.suffix.lower() in VIDEO_SUFFIXES else writer.picture
        try:
            run(source, name)
        except (OSError, ValueError, cv2.error) as error:
            tqdm.write(f"skipped {source}: {error}", file=sys.stderr)
            unreadable += 1
    writer.save()
    found = len(writer.annotations)
    drawn = sum(record["score"] >= args.min_score for record in writer.annotations)
    print(
        f"{found} detections in {len(writer.images)} pictures, {drawn} of them drawn (score "
        f"{args.min_score:g} or more), {unreadable} inputs skipped"
    )
    print(f"written to {args.output}")
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
