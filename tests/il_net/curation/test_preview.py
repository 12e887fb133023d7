"""The grid of samples: labels where the pictures show the objects, and a run's own views."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from PIL import Image

from il_net.config import load_config
from il_net.curation.preview import CELL, View, semi_rows, supervised_rows, write_grid
from il_net.data.datasets import register_datasets
from il_net.data.loader import build_semi_loader
from il_net.data.synthetic import generate

SIZE = (64, 96)  # height, width


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Twelve generated pictures."""
    folder = tmp_path_factory.mktemp("preview")
    generate(folder, num_images=12, image_size=SIZE)
    return folder


@pytest.fixture
def make_cfg(clean_catalogs, root):
    """A configuration that resizes pictures to their own size: only the flip is left."""

    def make(*opts: object) -> CfgNode:
        cfg = load_config("", [])
        cfg.MODEL.DEVICE = "cpu"
        entry = {"type": "coco", "json": str(root / "train.json"), "images": str(root / "train")}
        cfg.DATASETS.REGISTER = [{"name": "train", **entry}]
        cfg.DATASETS.TRAIN = ("train",)
        cfg.MODEL.MASK_ON, cfg.MODEL.ROI_HEADS.NUM_CLASSES = True, 0
        cfg.INPUT.MIN_SIZE_TRAIN = (SIZE[0],)
        cfg.SEED, cfg.SOLVER.IMS_PER_BATCH = 5, 2
        cfg.merge_from_list(list(opts))
        register_datasets(cfg)
        cfg.freeze()
        return cfg

    return make


@pytest.fixture
def make_semi(make_cfg):
    def make(*opts: object) -> CfgNode:
        settings = ["SOLVER.IMS_PER_BATCH_UNLABELED", 3, "DATASETS.SPLIT.PERCENT", 50.0]
        return make_cfg(*settings, *opts)

    return make


def flat(rows: list[list[View]]) -> list[View]:
    return list(chain.from_iterable(rows))


def as_bytes(rows: list[list[View]]) -> list[bytes]:
    return [view.image.tobytes() for view in flat(rows)]


def truth(root: Path) -> dict[str, list[tuple[int, list[float]]]]:
    """(class, x1, y1, x2, y2) by file name."""
    data = json.loads((root / "train.json").read_text())
    names = {image["id"]: image["file_name"] for image in data["images"]}
    found = {name: [] for name in names.values()}
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        found[names[a["image_id"]]].append((a["category_id"] - 1, [x, y, x + w, y + h]))
    return found


def file_name(view: View) -> str:
    return next(word.strip(",") for word in view.caption.split() if ".jpg" in word)


# ---- supervised ----


@pytest.mark.parametrize("channels", ["BGR", "RGB"])
def test_labels_go_with_the_picture(make_cfg, root, channels):
    rows = supervised_rows(make_cfg("INPUT.FORMAT", channels), 10)
    assert [len(row) for row in rows] == [4, 4, 2]
    expected, flips = truth(root), 0
    for view in flat(rows):
        name = file_name(view)
        stored = read_image(str(root / "train" / name), "BGR")
        flipped = not np.array_equal(view.image, stored)
        flips += flipped
        assert np.array_equal(view.image, stored[:, ::-1] if flipped else stored)
        for annotation, (category, box) in zip(view.annotations, expected[name], strict=True):
            x1, y1, x2, y2 = box
            shown = [SIZE[1] - x2, y1, SIZE[1] - x1, y2] if flipped else box
            assert annotation["category_id"] == category
            assert annotation["bbox"] == pytest.approx(shown, abs=0.01)
        count = len(expected[name])
        assert view.caption == f"{name}\n96 x 64 px, {count} object{'' if count == 1 else 's'}"
    assert 0 < flips < 10


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_masks_lie_in_their_boxes(make_cfg, mask_format):
    views = flat(supervised_rows(make_cfg("INPUT.MASK_FORMAT", mask_format), 6))
    for annotation in chain.from_iterable(view.annotations for view in views):
        mask = annotation["segmentation"]
        if mask_format == "polygon":
            mask = mask_util.merge(mask_util.frPyObjects([p.tolist() for p in mask], *SIZE))
        x, y, w, h = mask_util.toBbox(mask)
        assert [x, y, x + w, y + h] == pytest.approx(annotation["bbox"], abs=1.01)


def test_without_masks_there_are_none(make_cfg):
    views = flat(supervised_rows(make_cfg("MODEL.MASK_ON", False), 4))
    assert all("segmentation" not in a for view in views for a in view.annotations)
    assert any(view.annotations for view in views)


def test_seed_decides_what_is_shown(make_cfg):
    first = as_bytes(supervised_rows(make_cfg(), 6))
    np.random.seed(1234)  # what was drawn before does not matter
    # A run's workers do not either.
    assert as_bytes(supervised_rows(make_cfg("DATALOADER.NUM_WORKERS", 3), 6)) == first
    assert as_bytes(supervised_rows(make_cfg("SEED", 6), 6)) != first


def test_only_images_with_labels_are_shown(make_cfg):
    cfg = make_cfg("DATASETS.SPLIT.PERCENT", 17.0)  # 2 of 12
    assert len({file_name(view) for view in flat(supervised_rows(cfg, 8))}) == 2


def test_broken_picture_is_named(make_cfg, root, tmp_path):
    for path in (root / "train").glob("*.jpg"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:300])
    entry = {"name": "broken", "type": "coco", "json": str(root / "train.json")}
    cfg = make_cfg(
        *("DATASETS.REGISTER", [{**entry, "images": str(tmp_path)}]),
        *("DATASETS.TRAIN", ("broken",)),
    )
    with pytest.raises(ValueError, match=r"0000\d\d\.jpg cannot be used"):
        supervised_rows(cfg, 4)


def test_no_training_set(make_cfg):
    cfg = make_cfg("DATASETS.TRAIN", (), "MODEL.ROI_HEADS.NUM_CLASSES", 4)
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty"):
        supervised_rows(cfg, 4)


# ---- semi-supervised ----


def test_views_are_those_of_the_run(make_semi):
    cfg = make_semi("SEMISUP.BURN_IN_ITERS", 0, "DATALOADER.NUM_WORKERS", 0)
    batch = next(iter(build_semi_loader(cfg)))
    # Two labelled and three unlabelled samples a step; after a burn-in the unlabelled start anew.
    rows = semi_rows(make_semi("SEMISUP.BURN_IN_ITERS", 7), 4)
    assert [len(row) for row in rows] == [4, 4]
    for row, labeled, unlabeled in zip(rows, batch.labeled, batch.unlabeled[:2], strict=True):
        samples = [(r, key) for r in (labeled, unlabeled) for key in ("image", "strong_image")]
        for view, (record, key) in zip(row, samples, strict=True):
            assert np.array_equal(view.image, record[key].permute(1, 2, 0).numpy())
        boxes = labeled["instances"].gt_boxes.tensor.tolist()
        for view in row[:2]:
            assert [a["bbox"] for a in view.annotations] == boxes
        for view in row[2:]:
            assert view.annotations == []


def test_captions_tell_group_and_view(make_semi):
    views = ("weak", "strong")
    captions = [view.caption for view in semi_rows(make_semi(), 2)[0]]
    heads = [caption.split("\n")[0] for caption in captions]
    assert heads == [f"{g}, {v} view" for g in ("labelled", "unlabelled") for v in views]
    assert all("object" in caption for caption in captions[:2])
    assert not any("object" in caption for caption in captions[2:])


def test_strong_view_differs_in_colours_only(make_semi):
    off = ["INPUT.STRONG_AUG.ERASE", False, "INPUT.STRONG_AUG.BLUR_PROB", 0.0]
    rows = semi_rows(make_semi(*off, "INPUT.STRONG_AUG.GRAY_PROB", 1.0), 8)
    for row in rows:
        weak, strong = row[0].image, row[1].image
        assert not np.array_equal(weak, strong)
        assert np.array_equal(strong[..., 0], strong[..., 2])  # gray
        # Same geometry: bright is bright.
        assert np.corrcoef(weak.mean(2).ravel(), strong.mean(2).ravel())[0, 1] > 0.9


@pytest.mark.parametrize(("count", "lengths"), [(1, [2]), (3, [4, 2]), (5, [4, 4, 2])])
def test_odd_counts(make_semi, count, lengths):
    assert [len(row) for row in semi_rows(make_semi(), count)] == lengths


def test_labelled_images_alone(make_cfg):
    rows = semi_rows(make_cfg("SOLVER.IMS_PER_BATCH_UNLABELED", 0), 5)
    assert [len(row) for row in rows] == [4, 4, 2]
    assert all(view.caption.startswith("labelled") for view in flat(rows))
    names = [file_name(view) for view in flat(rows)[::2]]
    assert len(set(names)) == 5  # in the first epoch every image is new


# ---- the grid ----


def test_pictures_are_in_the_grid_pixel_by_pixel(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [[(CELL, 120), (77, CELL)], [(50, 33)]]
    rows = [
        [(rng.integers(0, 256, (h, w, 3), dtype=np.uint8), "name\nfacts") for h, w in row]
        for row in sizes
    ]
    write_grid(tmp_path / "grid.png", rows)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.format == "PNG"
        grid = np.asarray(image.convert("RGB"))
    # Two cells with a gap of 12 around; captions of 44 above each row.
    assert grid.shape == (12 + 44 + CELL + 12 + 44 + 50 + 12, 12 + 2 * (CELL + 12), 3)
    places = [(12 + 44, 12), (12 + 44, 24 + CELL), (12 + 44 + CELL + 12 + 44, 12)]
    for (top, left), (picture, _) in zip(places, chain.from_iterable(rows), strict=True):
        h, w = picture.shape[:2]
        assert np.array_equal(grid[top : top + h, left : left + w], picture)
        caption = grid[top - 44 : top, left : left + CELL]
        assert caption.min() < 100  # letters
        assert (caption > 250).mean() > 0.7
