"""Runs on image files of every bad and every odd kind, and runs whose readers are killed."""

import json
import os
import re
import signal
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.runner import REPO, Result

# Files that cannot be used, and what is said of them.
BAD = {
    "truncated.jpg": "truncated",
    "text.jpg": "not an image",
    "empty.png": "not an image",
    "bomb.png": "DecompressionBombError",
    "nan.tif": "floating-point pixels go from nan to nan",
}
BAD_LABELED = {**BAD, "resized.png": "SizeMismatchError"}
BAD_UNLABELED = {**BAD, "gone.jpg": "FileNotFoundError"}
GRAY16 = np.arange(0, 60_000, 1000, dtype=np.uint16)[None].repeat(40, 0)
CONFIG = """
_BASE_: {base}
MODEL:
  WEIGHTS: ""
  META_ARCHITECTURE: {architecture}
  MASK_ON: {masks}
  FPN: {{OUT_CHANNELS: 32}}
  RPN: {{POST_NMS_TOPK_TRAIN: 30, BATCH_SIZE_PER_IMAGE: 16}}
  ROI_HEADS: {{BATCH_SIZE_PER_IMAGE: 16}}
  ROI_BOX_HEAD: {{FC_DIM: 32}}
  ROI_MASK_HEAD: {{CONV_DIM: 16, NUM_CONV: 1}}
  ROI_IOU_HEAD: {{ENABLED: False}}
DATASETS:
  REGISTER:
    - {{name: odd, type: coco, json: {root}/odd.json, images: {root}/labeled}}
    - {{name: more, type: images, images: {root}/unlabeled}}
  TRAIN: odd
  UNLABELED: more
  TEST: []
SOLVER:
  IMS_PER_BATCH: 4
  IMS_PER_BATCH_UNLABELED: 4
  BASE_LR: 0.0001
  MAX_ITER: 6
  WARMUP_ITERS: 1
  STEPS: []
  CHECKPOINT_PERIOD: 1
SEMISUP: {{BURN_IN_ITERS: 1, PSEUDO: {{SCORE_THRESH: 0.05}}}}
INPUT: {{MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 128}}
DATALOADER: {{NUM_WORKERS: 0, ASPECT_RATIO_GROUPING: False, FILTER_EMPTY_ANNOTATIONS: False}}
TEST: {{EVAL_PERIOD: 0}}
SEED: 1
"""


def write_bomb(path: Path) -> None:
    """A PNG of a few bytes that claims to have 900 million pixels."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"0" * 99)), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(data)) + kind + data)
        parts.append(struct.pack(">I", zlib.crc32(kind + data)))
    path.write_bytes(b"".join(parts))


def write_pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Every kind of file; (width, height) of those that can be used, as they are to be seen."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    color, gray = Image.fromarray(noise), Image.fromarray(noise[..., 0])
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "plain.jpg": (color, {}),
        "gray.png": (gray, {}),
        "bits.png": (gray.convert("1"), {}),
        "gray16.png": (Image.fromarray(GRAY16), {}),
        "gray16.tif": (Image.fromarray(GRAY16), {}),
        "float.tif": (gray.convert("F"), {}),
        "cmyk.jpg": (color.convert("CMYK"), {}),
        "alpha.png": (color.convert("RGBA"), {}),
        "gray_alpha.png": (gray.convert("LA"), {}),
        "palette.png": (color.convert("P"), {"transparency": 3}),
        "turned.jpg": (color, {"exif": turned}),
        "turned.png": (color, {"exif": turned}),
        "turned.tif": (color, {"exif": turned}),
        "pixel.png": (color.crop((0, 0, 1, 1)), {}),
        "long.png": (gray.resize((20_000, 10)), {}),
        "high.png": (gray.resize((2, 3000)), {}),
        "huge.jpg": (Image.new("L", (8000, 6000), 90), {}),
    }
    sizes = {}
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
        sizes[name] = image.size[::-1] if "turned" in name else image.size
    whole = (folder / "plain.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.png").touch()
    Image.fromarray(np.full((40, 60), np.nan, np.float32)).save(folder / "nan.tif")
    write_bomb(folder / "bomb.png")
    return sizes


def write_json(path: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Records with a box each, and others with none, crowds alone, boxes without area."""
    images = [
        {"id": i, "file_name": name, "width": width, "height": height}
        for i, (name, (width, height)) in enumerate(sizes.items(), 1)
    ]
    boxes = {image["file_name"]: [[0, 0, image["width"], image["height"]]] for image in images}
    boxes["gray.png"] = []
    boxes["palette.png"] = [[5, 5, 0, 9], [5, 5, 9, 0], [70, 50, 5, 5], [8, 8, 1, 1]]
    annotations = [
        {
            "image_id": image["id"],
            "category_id": 1,
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": int(image["file_name"] == "cmyk.jpg"),
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for image in images
        for x, y, w, h in boxes[image["file_name"]]
    ]
    for i, annotation in enumerate(annotations, 1):
        annotation["id"] = i
    categories = [{"id": 1, "name": "leaf"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(data))


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A folder with ``labeled``, ``odd.json`` and ``few.json`` for it, ``unlabeled``, and YAMLs."""
    root = tmp_path_factory.mktemp("odd")
    sizes = write_pictures(root / "labeled")
    write_pictures(root / "unlabeled")
    Image.new("L", (60, 40)).save(root / "labeled" / "resized.png")
    (root / "unlabeled" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    few = ("plain.jpg", "alpha.png", "gray16.png", "turned.jpg")
    write_json(root / "few.json", {name: sizes[name] for name in few})
    bad = {**dict.fromkeys(BAD, (60, 40)), "resized.png": (61, 40)}
    write_json(root / "odd.json", {**sizes, **bad})
    kinds = {"plain": ("GeneralizedRCNN", True), "semi": ("TeacherStudentRCNN", False)}
    for name, (architecture, masks) in kinds.items():
        base = "il_net" if name == "semi" else "Base-small"
        text = CONFIG.format(
            base=REPO / "configs" / "quickstart" / f"{base}.yaml",
            **{"root": root, "architecture": architecture, "masks": masks},
        )
        (root / f"{name}.yaml").write_text(text)
    return root


def names(kind: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{kind}/{name}": problem for name, problem in files.items()}


def check_one_error(result: Result, *parts: str) -> None:
    """Exit code 1, and one line that says what to change."""
    assert result.code == 1, result.output[-3000:]
    assert "Traceback" not in result.output, result.output[-3000:]
    assert [line for line in result.output.splitlines() if line.startswith("error:")] == [
        result.last_line
    ]
    for part in parts:
        assert part in result.last_line


# 23 labelled images in batches of 4, 23 unlabelled ones from the second step on.
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["plain", "semi"])
def test_bad_files_are_skipped_and_odd_ones_train(run, odd, tmp_path, injected, kind, workers):
    bad = names("labeled", BAD_LABELED)
    if kind == "semi":
        bad |= names("unlabeled", BAD_UNLABELED)
    injected(len(bad))
    result = run(
        *("train_net.py", "--config-file", odd / f"{kind}.yaml", "OUTPUT_DIR", tmp_path / "run"),
        *("DATALOADER.NUM_WORKERS", workers, "SOLVER.MAX_ITER", 7 if kind == "semi" else 6),
    )
    assert result.code == 0, result.output[-3000:]
    told = re.findall(r"odd\d*/(\S+) cannot be used: (.*?)\. Another image", result.output)
    assert sorted(name for name, _ in told) == sorted(bad)
    for name, problem in told:
        assert bad[name] in problem
    assert (tmp_path / "run" / "model_final.pth").is_file()
    if kind == "semi":  # a truncated file has a good header, and so has one of bad numbers
        looked = re.search(r"DATASETS\.UNLABELED: (\d+) of 23 images looked at", result.output)
        assert int(looked[1]) == len(BAD_UNLABELED) - 2


def few(odd: Path, unlabeled: str) -> tuple[str, str]:
    """Some small good labelled pictures, and unlabelled ones of a pattern."""
    register = [
        {"name": "odd", "type": "coco", "json": f"{odd}/few.json", "images": f"{odd}/labeled"},
        {"name": "more", "type": "images", "images": f"{odd}/unlabeled/{unlabeled}"},
    ]
    return "DATASETS.REGISTER", str(register)


def test_limit_stops_with_the_last_checkpoint_intact(run, odd, tmp_path, injected):
    injected(2)
    command = (
        *("--config-file", odd / "semi.yaml", "OUTPUT_DIR", tmp_path / "run"),
        # truncated.jpg, text.jpg, turned.jpg: the first has a good header.
        *(*few(odd, "t*.jpg"), "SEMISUP.BURN_IN_ITERS", 2, "SOLVER.MAX_ITER", 4),
    )
    result = run("train_net.py", *command, "DATALOADER.MAX_UNREADABLE", 1)
    check_one_error(result, "DATALOADER.MAX_UNREADABLE is 1", "truncated.jpg", "text.jpg")
    assert (tmp_path / "run" / "model_0000001.pth").is_file()
    result = run("train_net.py", "--resume", *command)
    assert result.code == 0, result.output[-3000:]
    assert "Resumed at iteration 2 of 4" in result.output


def workers_of(parent: int) -> list[int]:
    """Forked children of the server's one child, oldest first."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    return sorted(w for child in children.get(parent, []) for w in children.get(child, []))


@pytest.mark.parametrize(("kind", "group"), [("plain", "labelled"), ("semi", "unlabelled")])
def test_a_killed_worker_is_one_clear_error(run, odd, tmp_path, injected, kind, group):
    injected(1)
    killed: list[float] = []

    def kill() -> None:
        started, deadline = tmp_path / "run" / "model_0000003.pth", time.monotonic() + 60
        while time.monotonic() < deadline and not started.exists():
            time.sleep(0.05)
        # Those of the unlabelled stream are started first.
        os.kill(workers_of(run._server.pid)[0], signal.SIGKILL)
        killed.append(time.monotonic())

    killer = threading.Thread(target=kill)
    killer.start()
    result = run(
        *("train_net.py", "--config-file", odd / f"{kind}.yaml", "OUTPUT_DIR", tmp_path / "run"),
        *("DATALOADER.NUM_WORKERS", 2, "SOLVER.MAX_ITER", 2000, "SOLVER.CHECKPOINT_PERIOD", 4),
        *few(odd, "gray*"),
    )
    seconds = time.monotonic() - killed[0]
    killer.join()
    process = r"a worker that reads {} images \(process \d+\) was killed by SIGKILL"
    assert re.search(process.format(group), result.last_line)
    check_one_error(result, "memory", "DATALOADER.NUM_WORKERS", "INPUT.MAX_SIZE_TRAIN")
    assert seconds < 20
