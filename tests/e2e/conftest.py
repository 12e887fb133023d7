"""Command lines as processes, and a data set and a configuration small enough for seconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("detectron2")
pytest.importorskip("timm")

from il_net.data.synthetic import generate
from tests.e2e.runner import REPO, ForkRunner

# SOLVER.STEPS of the base lie beyond the few iterations here.
CONFIG = """
_BASE_: {base}
MODEL:
  WEIGHTS: ""
  FPN: {{OUT_CHANNELS: 32}}
  RPN: {{POST_NMS_TOPK_TRAIN: 30, POST_NMS_TOPK_TEST: 20, BATCH_SIZE_PER_IMAGE: 16}}
  ROI_HEADS: {{BATCH_SIZE_PER_IMAGE: 16, SCORE_THRESH_TEST: 0.0}}
  ROI_BOX_HEAD: {{FC_DIM: 32}}
  ROI_MASK_HEAD: {{CONV_DIM: 16, NUM_CONV: 1}}
DATASETS:
  REGISTER:
    - {{name: tiny_train, type: coco, json: leaves/train.json, images: leaves/train}}
    - {{name: tiny_val, type: coco, json: leaves/val.json, images: leaves/val}}
  TRAIN: tiny_train
  TEST: tiny_val
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 2, STEPS: [], WARMUP_ITERS: 1, CHECKPOINT_PERIOD: 1}}
INPUT: {{MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96}}
TEST: {{DETECTIONS_PER_IMAGE: 10}}
DATALOADER: {{NUM_WORKERS: 0}}
"""


@pytest.fixture(scope="session")
def datasets(tmp_path_factory) -> Path:
    """The dataset root: four training and three validation pictures of 96 px."""
    root = tmp_path_factory.mktemp("datasets")
    generate(root / "leaves", num_images=4, image_size=(96, 96), name="train")
    generate(root / "leaves", num_images=3, image_size=(96, 96), seed=1, name="val")
    return root


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    """A YAML file on top of the repository's small configuration."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG.format(base=REPO / "configs" / "quickstart" / "Base-small.yaml"))
    return path


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory) -> Path:
    """The working folder of all command lines; nothing may appear in it."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="session")
def run(tmp_path_factory, datasets, elsewhere) -> Iterator[ForkRunner]:
    """``run("train_net.py", ...)`` forks, ``run.alone(command, ...)`` starts afresh."""
    with ForkRunner(elsewhere, datasets, tmp_path_factory.mktemp("output")) as runner:
        yield runner
