"""Deterministic pictures of leaves with disease spots, in COCO format, for tests and the demo.

Categories: 1 `leaf`, 2 `miner` (pale winding trail), 3 `rust` (small orange pustule with a yellow
halo), 4 `blight` (dark irregular patch with rings). Most spots lie inside a leaf; a few lie on the
background and are annotated as spots of their kind all the same, because the C2SSL branch has to
tell an isolated spot from one inside a leaf. A mask is the visible part: later leaves hide earlier
ones. Stalks, twigs, pebbles and blades are clutter, without annotation.
"""

import argparse
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from .synthetic_drawing import CATEGORIES, LEAF, SUPERSAMPLE, render

_MARKER = ".generated"  # in the picture folder: what is here may be replaced
GENERATOR_VERSION = "1"  # raise it when the pictures change: cached ones are then drawn again
_MIN_SIDE = 64


@dataclass(frozen=True)
class SyntheticDataset:
    """A split on disk: `json` (COCO), `images` (folder), `categories` in the order of their ids."""

    json: Path
    images: Path
    categories: tuple[str, ...] = CATEGORIES


def _polygons(mask: np.ndarray, smallest: float) -> list[list[float]]:
    """Polygons [x, y, x, y, ...] in pixels of the picture around a uint8 mask (h, w).

    COCO polygons have no holes, so a mask with one is cut in two through the hole: filled, it would
    claim the leaf on top. Parts below `smallest` square pixels are dropped.
    """
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return []
    y0, x0 = ys[0], xs[0]
    # findContours goes through pixel centres; on twice the size the lost border is half as wide.
    fine = mask[y0 : ys[-1] + 1, x0 : xs[-1] + 1].repeat(2, 0).repeat(2, 1)
    contours, tree = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    scale, found = 2 * SUPERSAMPLE, []
    for contour, (_, _, _, parent) in zip(contours, tree[0], strict=True):
        if cv2.contourArea(contour) < smallest * scale**2:
            continue
        if parent >= 0:
            hole_x, _, hole_width, _ = cv2.boundingRect(contour)
            column = int(x0 + (hole_x + hole_width // 2) // 2)
            column += -column % SUPERSAMPLE  # between two pixels, so that the seam swallows none
            left, right = mask.copy(), mask.copy()
            left[:, column:], right[:, :column] = 0, 0
            return _polygons(left, smallest) + _polygons(right, smallest)
        points = cv2.approxPolyDP(contour, 0.2 * scale, True)[:, 0]
        if len(points) >= 3:
            corner = np.array([x0, y0]) / SUPERSAMPLE
            found.append(((points + 0.5) / scale + corner).round(2).ravel().tolist())
    return found


def _annotate(masks: list, size: tuple[int, int]) -> list[dict]:
    """COCO annotations, without ids; box and area are those of the rasterised polygons."""
    scale, annotations = (min(size) / 192) ** 2, []
    for category, mask in masks:
        # Nobody sees what is thinner than a pixel, and without it box and polygons agree. The two
        # anchors mirror each other, or an even kernel would shift the mask.
        square = np.ones((SUPERSAMPLE, SUPERSAMPLE), np.uint8)
        mask = cv2.erode(mask.astype(np.uint8), square, anchor=(0, 0))
        mask = cv2.dilate(mask, square, anchor=(SUPERSAMPLE - 1, SUPERSAMPLE - 1))
        polygons = _polygons(mask, smallest=(40 if category == LEAF else 8) * scale)
        if polygons:
            rle = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
            annotations.append({
                "category_id": category, "iscrowd": 0, "segmentation": polygons,
                "bbox": coco_mask.toBbox(rle).tolist(), "area": float(coco_mask.area(rle)),
            })
    return annotations


def _is_complete(json_path: Path, images: Path, info: dict) -> bool:
    try:
        data = json.loads(json_path.read_text())
    except (FileNotFoundError, ValueError):
        return False
    same = isinstance(data, dict) and data.get("info") == info
    return same and all((images / image["file_name"]).is_file() for image in data["images"])


def _check_ours(json_path: Path, images: Path) -> None:
    """Refuse to replace what is not ours: a foreign json, or pictures without our marker."""
    used = json_path.exists() or (images.is_dir() and any(images.iterdir()))
    if used and not (images / _MARKER).is_file():
        raise FileExistsError(
            f"{json_path} or {images} exist and were not written by the generator; choose another "
            "folder or name"
        )


def _check(num_images: int, size: tuple[int, int], seed: int, name: str) -> None:
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}, expected at least 1")
    if len(size) != 2 or min(size) < _MIN_SIDE:
        raise ValueError(f"image_size is {size}, expected height, width of at least {_MIN_SIDE}")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more")
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"name is {name!r}, expected letters, digits, - and _ (it names a folder)")


def generate(
    root: str | os.PathLike, *, num_images: int, image_size: tuple[int, int] = (192, 192),
    seed: int = 0, name: str = "train",
) -> SyntheticDataset:
    """Write `root/name/*.jpg` and `root/name.json`, unless they are there for the same arguments.

    Image k depends on `image_size`, `seed`, `name` and k alone: more images add to the same ones. A
    different request under the same root and name replaces the old pictures. Not meant for two
    processes at once. `image_size` is (height, width) in pixels.

    Raises:
        ValueError: num_images below 1, a side below 64, seed below 0, a name that is no plain word.
        FileExistsError: there is something under this name that this module did not write.
    """
    size = tuple(int(side) for side in image_size)
    _check(num_images, size, seed, name)
    json_path, folder = Path(root) / f"{name}.json", Path(root) / name
    arguments = {"num_images": num_images, "image_size": list(size), "seed": seed, "name": name}
    info = {"description": "synthetic leaves", "version": GENERATOR_VERSION, "arguments": arguments}
    if _is_complete(json_path, folder, info):
        return SyntheticDataset(json_path, folder)
    _check_ours(json_path, folder)
    json_path.unlink(missing_ok=True)  # first: an old json never lies beside new pictures
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()
    for stale in folder.glob("[0-9]" * 6 + ".jpg"):
        stale.unlink()
    images, annotations = [], []
    for k in range(num_images):
        picture, masks = render(np.random.default_rng([seed, zlib.crc32(name.encode()), k]), size)
        file_name = f"{k:06d}.jpg"
        Image.fromarray(picture).save(folder / file_name, quality=92)
        images.append({"id": k + 1, "file_name": file_name, "height": size[0], "width": size[1]})
        for annotation in _annotate(masks, size):
            annotations.append({"id": len(annotations) + 1, "image_id": k + 1, **annotation})
    categories = [{"id": i, "name": n} for i, n in enumerate(CATEGORIES, 1)]
    data = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    partial = json_path.with_suffix(".json.partial")
    partial.write_text(json.dumps(data))
    os.replace(partial, json_path)
    return SyntheticDataset(json_path, folder)


def main(arguments: list[str] | None = None) -> None:
    """Command line: write a training and a validation split under one folder."""
    parser = argparse.ArgumentParser(description="Draw leaves with disease spots in COCO format.")
    parser.add_argument("--root", required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=200, metavar="N", help="training images")
    parser.add_argument("--val", type=int, default=50, metavar="M", help="validation images")
    parser.add_argument("--size", type=int, nargs=2, default=(192, 192), metavar=("H", "W"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    for name, count in (("train", args.train), ("val", args.val)):
        try:
            made = generate(
                args.root, num_images=count, image_size=args.size, seed=args.seed, name=name
            )
        except ValueError as error:
            parser.error(f"{name}: {error}")
        print(f"{name}: {count} images in {made.images}, annotations in {made.json}")


if __name__ == "__main__":
    main()
