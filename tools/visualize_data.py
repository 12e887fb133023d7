#!/usr/bin/env python
"""Draw what the model will see: training samples, augmented, with boxes, masks and class names.

python tools/visualize_data.py --config-file FILE --output grid.png [--count 16] [KEY VALUE ...]

A semi-supervised configuration (MODEL.META_ARCHITECTURE TeacherStudentRCNN) shows the weak and the
strong view of every sample: on the left of labelled ones with their labels, on the right of
unlabelled ones. The same SEED gives the same picture.
"""

import argparse
from pathlib import Path

import numpy as np
from detectron2.utils.logger import setup_logger

from il_net.config import load_config
from il_net.curation.preview import View, semi_rows, supervised_rows, write_grid
from il_net.data.datasets import register_datasets
from il_net.data.validate import validate_datasets
from il_net.errors import check_output, plain_errors
from il_net.modeling.teacher_student import TeacherStudentRCNN
from il_net.predict import draw_truth
from sbr_cnn import add_sbr_cnn_config

MOST_SAMPLES = 100  # a grid of more is too high for a picture


def draw(view: View, classes: list[str]) -> tuple[np.ndarray, str]:
    """The picture in the size of the grid, RGB, and its caption."""
    record = {"annotations": view.annotations}
    return draw_truth(view.image, record, classes, view.scale)[:, :, ::-1], view.caption


def main() -> None:
    """Draw the grid and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="PNG")
    parser.add_argument("--count", type=int, default=16, help="samples (16)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    setup_logger(name="il_net")
    with plain_errors():
        if args.output.suffix.lower() != ".png":
            raise ValueError(f"--output is the name of a picture, grid.png, got {args.output}")
        check_output(args.output, is_folder=False)
        if not 1 <= args.count <= MOST_SAMPLES:
            raise ValueError(f"--count is from 1 to {MOST_SAMPLES}, got {args.count}")
        cfg = load_config(args.config_file, args.opts, add_sbr_cnn_config)
        register_datasets(cfg)
        validate_datasets(cfg)
        semi = TeacherStudentRCNN.__name__ == cfg.MODEL.META_ARCHITECTURE
        rows = (semi_rows if semi else supervised_rows)(cfg, args.count)
    classes = list(cfg.DATASETS.CLASSES)
    grid = [[draw(view, classes) for view in row] for row in rows]
    with plain_errors():
        write_grid(args.output, grid)
    print(f"{args.count} samples: {args.output}")


if __name__ == "__main__":
    main()
