#!/usr/bin/env python
"""Train two small models on generated leaf pictures, score them and draw what they find.

python tools/demo.py [KEY VALUE ...]      (what `make demo` runs)

First R3-CNN with GRoIE on 400 labelled pictures; then IL-net, student and teacher, on 20 labelled
pictures and the 400 without their labels.
"""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.data.synthetic import generate
from il_net.predict import Predictor, draw, draw_truth
from sbr_cnn import add_sbr_cnn_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = [ROOT / "configs" / "quickstart" / name for name in ("demo.yaml", "il_net.yaml")]
# Pictures by split and the seed that draws them; "few" are other pictures than "train".
SPLITS = {"train": (400, 1), "few": (20, 2), "val": (60, 1)}
PICTURES = 8
MIN_SCORE = 0.5
DRAWING_SCALE = 2.0


def main(opts: list[str]) -> None:
    """Run the demo; ``opts`` are KEY VALUE pairs over the configurations of both parts."""
    data = ROOT / "datasets"  # not the user's own dataset root
    os.environ["DETECTRON2_DATASETS"] = str(data)
    print(f"Generating pictures in {data / 'synthetic'} ...")
    for name, (count, seed) in SPLITS.items():
        generate(data / "synthetic", num_images=count, seed=seed, name=name)
    for config in CONFIGS:
        train(config, opts)


def train(config: Path, opts: list[str]) -> None:
    """Train one configuration and draw its predictions; ``opts`` are KEY VALUE pairs over it."""
    output = ROOT / load_config(str(config), opts, add_sbr_cnn_config).OUTPUT_DIR
    if "OUTPUT_DIR" in opts:  # one folder for both parts would mix them
        output = output / config.stem
        opts = [*opts, "OUTPUT_DIR", str(output)]
    for old in output.glob("events.out.tfevents.*"):
        old.unlink()  # TensorBoard would draw a second run into the first one's curves
    command = ["train_net.py", "--config-file", str(config.relative_to(ROOT)), *opts]
    print("Training:", " ".join(["python", *command]), flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    pictures = compare(output, PICTURES)
    print(f"\nPredictions (left) beside the truth (right): {pictures}")
    print(f"Metrics: {output / 'metrics.json'}; curves: tensorboard --logdir {output}")


def compare(output: Path, count: int) -> Path:
    """Draw predictions beside the truth for the first ``count`` validation pictures.

    Args:
        output: folder of a finished run.
        count: number of pictures.

    Returns:
        The folder with the pictures.
    """
    weights = str(output / "model_final.pth")
    cfg = load_config(str(output / "config.yaml"), ["MODEL.WEIGHTS", weights], add_sbr_cnn_config)
    register_datasets(cfg)
    predictor, classes = Predictor(cfg), cfg.DATASETS.CLASSES
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    for record in DatasetCatalog.get(cfg.DATASETS.TEST[0])[:count]:
        image = read_image(record["file_name"], "BGR")
        found = predictor(image)
        found = found[found.scores >= MIN_SCORE]
        pair = [
            draw(image, found, classes, DRAWING_SCALE),
            draw_truth(image, record, classes, DRAWING_SCALE),
        ]
        cv2.imwrite(str(folder / Path(record["file_name"]).name), np.hstack(pair))
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
