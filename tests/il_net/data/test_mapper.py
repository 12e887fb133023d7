"""Weak and strong view of one image: one geometry, own colours, and randomness by position."""

import random
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import detection_utils
from detectron2.structures import BitMasks, BoxMode
from PIL import Image

from il_net.config import add_il_net_config
from il_net.data.mapper import SemiMapper, TrainMapper, UnreadableImage, read_size

HEIGHT, WIDTH = 40, 60
BOX = (6, 10, 24, 30)  # x0, y0, x1, y1: white on black


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_il_net_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (80,)
    cfg.INPUT.STRONG_AUG.ERASE = False
    cfg.MODEL.MASK_ON = False
    return cfg


def turn_off(cfg: CfgNode) -> None:
    """A strong view without any change."""
    node = cfg.INPUT.STRONG_AUG
    node.JITTER_PROB = node.GRAY_PROB = node.BLUR_PROB = 0.0


@pytest.fixture
def record(tmp_path) -> dict:
    """A black picture with a white box, annotated, and a crowd."""
    x0, y0, x1, y1 = BOX
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[y0:y1, x0:x1] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    annotation = {
        "bbox": list(BOX),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 3,
        "iscrowd": 0,
        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
    }
    return {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 7,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [annotation, {**annotation, "iscrowd": 1}],
    }


def white_box(view: torch.Tensor) -> list[int]:
    ys, xs = np.nonzero((view.numpy() > 127).all(0))
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_both_views_and_the_targets_have_one_geometry(cfg, record):
    turn_off(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN = (80, 120, 160)
    mapper, sizes, flipped = SemiMapper(cfg, labeled=True, seed=0), set(), 0
    for position in range(30):
        mapped = mapper(record, position)
        weak, strong, found = mapped["image"], mapped["strong_image"], mapped["instances"]
        assert weak.dtype == strong.dtype == torch.uint8
        assert torch.equal(weak, strong)
        scale = weak.shape[1] / HEIGHT
        assert weak.shape == (3, HEIGHT * scale, WIDTH * scale)
        assert found.image_size == weak.shape[1:]
        sizes.add(weak.shape[1])
        x0, y0, x1, y1 = BOX
        flips = white_box(weak)[0] > x0 * scale + 2
        flipped += flips
        expected = np.array([WIDTH - x1, y0, WIDTH - x0, y1] if flips else BOX) * scale
        assert np.abs(np.array(white_box(weak)) - expected).max() <= 1
        np.testing.assert_allclose(found.gt_boxes.tensor[0], expected)
        assert found.gt_classes.tolist() == [3]  # without the crowd
        polygon = found.gt_masks.polygons[0][0].reshape(-1, 2)
        np.testing.assert_allclose([*polygon.min(0), *polygon.max(0)], expected)
        assert (mapped["file_name"], mapped["image_id"]) == (record["file_name"], 7)
        assert (mapped["height"], mapped["width"]) == (HEIGHT, WIDTH)
        assert "annotations" not in mapped
    assert sizes == {80, 120, 160}
    assert 5 < flipped < 25


def test_weak_view_is_left_alone_and_strong_view_differs(cfg, record):
    cfg.INPUT.STRONG_AUG.ERASE = True
    mapper = SemiMapper(cfg, labeled=True, seed=0)
    changed = 0
    for position in range(20):
        mapped = mapper(record, position)
        assert set(mapped["image"].unique().tolist()) >= {0, 255}
        assert mapped["strong_image"].shape == mapped["image"].shape
        assert mapped["strong_image"].is_contiguous()
        levels = mapped["image"].float().mean(dim=(1, 2))
        assert (levels[0] == levels).all()  # still gray
        changed += not torch.equal(mapped["image"], mapped["strong_image"])
    # A black and white picture keeps its look under hue, grayscale and saturation only.
    assert changed > 10
    cfg.INPUT.STRONG_AUG.ENABLED = False
    mapped = SemiMapper(cfg, labeled=True, seed=0)(record, 0)
    assert torch.equal(mapped["image"], mapped["strong_image"])


@pytest.mark.parametrize("channels", ["BGR", "RGB"])
def test_channel_order(cfg, record, channels):
    Image.new("RGB", (WIDTH, HEIGHT), (200, 100, 50)).save(record["file_name"])
    cfg.INPUT.FORMAT = channels
    turn_off(cfg)
    expected = [200, 100, 50] if channels == "RGB" else [50, 100, 200]
    mapped = SemiMapper(cfg, labeled=False, seed=0)(record, 0)
    assert mapped["image"][:, 5, 5].tolist() == mapped["strong_image"][:, 5, 5].tolist() == expected
    # Grayscale weighs red with 0.299, green with 0.587, blue with 0.114: 124.2.
    cfg.INPUT.STRONG_AUG.GRAY_PROB = 1.0
    mapped = SemiMapper(cfg, labeled=False, seed=0)(record, 0)
    assert mapped["strong_image"][:, 5, 5].tolist() == [124, 124, 124]


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[view], b[view]) for view in ("image", "strong_image"))


def test_randomness_follows_from_seed_group_and_position(cfg, record):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (80, 160), "range"
    first = SemiMapper(cfg, labeled=True, seed=3)
    samples = [first(record, position) for position in range(12)]
    sizes = {sample["image"].shape[1] for sample in samples}
    assert len(sizes) > 6
    assert 80 <= min(sizes) <= max(sizes) <= 160
    again = SemiMapper(cfg, labeled=True, seed=3)
    np.random.seed(8)  # whatever happened before
    random.seed(8)
    for position in reversed(range(12)):
        assert same(again(record, position), samples[position])
    for other in (SemiMapper(cfg, True, seed=4), SemiMapper(cfg, False, seed=3)):
        assert not any(same(other(record, p), samples[p]) for p in range(12))


def test_global_generators_are_put_back(cfg, record):
    mapper = SemiMapper(cfg, labeled=True, seed=0)

    def draw() -> tuple:
        return np.random.rand(), random.random(), torch.rand(()).item()

    def restart() -> None:
        np.random.seed(1)
        random.seed(1)
        torch.manual_seed(1)

    restart()
    expected = draw()
    restart()
    mapper(record, 5)
    assert draw() == expected
    restart()
    with pytest.raises(ValueError, match="gone"):
        mapper({**record, "file_name": "gone.png"}, 5)
    assert draw() == expected


def test_unlabeled_samples_know_nothing_of_objects(cfg, record):
    mapped = SemiMapper(cfg, labeled=False, seed=0)({**record, "sem_seg_file_name": "x.png"}, 0)
    fields = {"file_name", "image_id", "height", "width", "image", "strong_image"}
    assert set(mapped) == fields
    assert len(record["annotations"]) == 2  # the caller's record is as it was
    bare = {"file_name": record["file_name"], "image_id": "a.png"}
    mapped = SemiMapper(cfg, labeled=False, seed=0)(bare, 0)
    assert set(mapped) == fields
    assert (mapped["height"], mapped["width"]) == (HEIGHT, WIDTH)
    assert set(bare) == {"file_name", "image_id"}


def test_bit_masks_and_crops(cfg, record):
    turn_off(cfg)
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, "bitmask"
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [20, 30]
    mapper, kept = SemiMapper(cfg, labeled=True, seed=0), 0
    for position in range(20):
        mapped = mapper(record, position)
        assert mapped["image"].shape == (3, 80, 120)
        assert torch.equal(mapped["image"], mapped["strong_image"])
        found = mapped["instances"]
        if len(found):
            assert isinstance(found.gt_masks, BitMasks)
            white = (mapped["image"] > 127).all(0)
            assert (white != found.gt_masks.tensor[0]).float().mean() < 0.03
            kept += 1
    assert kept > 5
    crops = [
        white_box(mapper(record, p)["image"])
        for p in range(20)
        if len(mapper(record, p)["instances"])
    ]
    assert len({tuple(box) for box in crops}) > 3


def test_an_object_outside_of_the_crop_is_left_out(cfg, record):
    record["annotations"][0]["bbox"] = [0, 0, 2, 2]
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [10, 10]
    counts = [len(SemiMapper(cfg, True, 0)(record, p)["instances"]) for p in range(20)]
    assert counts.count(0) > 10


# --- files as they come ---


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_other_color_modes(cfg, record, mode):
    Image.open(record["file_name"]).convert(mode).save(record["file_name"])
    mapped = SemiMapper(cfg, labeled=True, seed=0)(record, 0)
    assert mapped["image"].shape == mapped["strong_image"].shape == (3, 80, 120)
    assert white_box(mapped["image"])[1::2] == [BOX[1] * 2, BOX[3] * 2]


def test_exif_orientation(cfg, tmp_path):
    turn_off(cfg)
    cfg.INPUT.RANDOM_FLIP = "none"
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:, : WIDTH // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left half comes to the top
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif)
    record = {"file_name": str(tmp_path / "a.jpg"), "image_id": 1}
    mapped = SemiMapper(cfg, labeled=False, seed=0)(record, 0)
    assert (mapped["height"], mapped["width"]) == (WIDTH, HEIGHT)
    assert mapped["image"].shape == mapped["strong_image"].shape == (3, 120, 80)
    assert mapped["image"][:, :55].float().mean() > 250
    assert mapped["image"][:, 65:].float().mean() < 5


@pytest.mark.parametrize(
    ("content", "size", "message"),
    [
        (None, WIDTH, "FileNotFoundError"),
        (b"no picture", WIDTH, "UnidentifiedImageError"),
        ("half", WIDTH, "OSError: .*truncated"),
        ("whole", WIDTH + 1, r"SizeMismatchError.*expect \(61, 40\)"),
    ],
)
def test_what_goes_wrong_is_told_with_the_file(cfg, record, tmp_path, content, size, message):
    path = Path(record["file_name"])
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes({"half": whole[: len(whole) // 2], "whole": whole}.get(content, content))
    mapper = SemiMapper(cfg, labeled=True, seed=0)
    with pytest.raises(UnreadableImage, match=rf"a\.png cannot be used: {message}"):
        mapper({**record, "width": size}, 0)


def test_a_picture_of_too_many_pixels(cfg, record, monkeypatch):
    # Pillow warns above this number and refuses above twice as many.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH / 2 - 1)
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be used: DecompressionBombError"):
        SemiMapper(cfg, labeled=True, seed=0)(record, 0)


def test_unusable_labels_are_no_unreadable_image(cfg, record):
    del record["annotations"][0]["bbox"]
    with pytest.raises(ValueError, match=r"a\.png cannot be used: KeyError: 'bbox'") as e:
        SemiMapper(cfg, labeled=True, seed=0)(record, 0)
    assert e.type is ValueError


RAMP = np.linspace(0, 2**16 - 1, WIDTH).astype(np.uint16)[None].repeat(HEIGHT, 0)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("channels", ["BGR", "RGB"])
def test_sixteen_bit_gray_keeps_its_levels(cfg, tmp_path, ending, channels):
    turn_off(cfg)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.FORMAT = "none", (HEIGHT,), channels
    path = tmp_path / f"a.{ending}"
    Image.fromarray(RAMP).save(path)
    view = SemiMapper(cfg, labeled=False, seed=0)({"file_name": str(path), "image_id": 1}, 0)
    for channel in view["image"]:
        np.testing.assert_array_equal(channel, RAMP // 256)


def test_sixteen_bit_gray_of_other_orders_and_old_pillows(cfg, tmp_path):
    for mode, kind in (("I;16B", ">u2"), ("I", "i4")):
        image = Image.frombytes(mode, (WIDTH, HEIGHT), RAMP.astype(kind).tobytes())
        converted = detection_utils.convert_PIL_to_numpy(image, "RGB")
        np.testing.assert_array_equal(converted[..., 1], RAMP // 256)
    # Class maps keep their numbers, and eight bits in a wider type their levels.
    few = Image.fromarray((RAMP // 256).astype(np.int32))
    np.testing.assert_array_equal(detection_utils.convert_PIL_to_numpy(few, "BGR")[..., 0], few)
    low = Image.fromarray(RAMP // 256)
    np.testing.assert_array_equal(detection_utils.convert_PIL_to_numpy(low, "L")[..., 0], low)


def write_odd(path: Path, kind: str) -> None:
    """A picture with a dark left and a light right half, WIDTH x HEIGHT."""
    half = np.full((HEIGHT, WIDTH), 40, np.uint8)
    half[:, WIDTH // 2 :] = 200
    gray = Image.fromarray(half)
    if kind == "palette":
        gray.convert("P").save(path, transparency=3)
    elif kind == "cmyk":
        gray.convert("RGB").convert("CMYK").save(path, quality=95)
    else:
        alpha = Image.fromarray(half.T.copy()).resize((WIDTH, HEIGHT))
        Image.merge(
            "RGBA" if kind == "rgba" else "LA", [gray] * (3 if kind == "rgba" else 1) + [alpha]
        ).save(path)


@pytest.mark.parametrize(
    ("kind", "ending"),
    [("palette", "png"), ("cmyk", "jpg"), ("rgba", "png"), ("gray alpha", "png")],
)
def test_colors_below_transparency_and_inks(cfg, tmp_path, kind, ending):
    turn_off(cfg)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN = "none", (HEIGHT,)
    write_odd(tmp_path / f"a.{ending}", kind)
    record = {"file_name": str(tmp_path / f"a.{ending}"), "image_id": 1}
    view = SemiMapper(cfg, labeled=False, seed=0)(record, 0)["image"].float()
    assert (view[:, :, : WIDTH // 2 - 4] - 40).abs().max() < 6
    assert (view[:, :, WIDTH // 2 + 4 :] - 200).abs().max() < 6


@pytest.mark.parametrize(
    ("size", "view"),
    # Shortest edge 80, unless the longest would be above 1333; no side below 1.
    [((1, 1), (80, 80)), ((30000, 10), (1, 1333)), ((10, 30000), (1333, 1)), ((1, 7), (560, 80))],
)
def test_no_side_is_rounded_to_nothing(cfg, tmp_path, size, view):
    cfg.INPUT.STRONG_AUG.ERASE = True
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "a.png")
    box = {"bbox": [0, 0, *size], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 1, "annotations": [box]}
    for position in range(8):
        mapped = SemiMapper(cfg, labeled=True, seed=0)(record, position)
        assert mapped["image"].shape == mapped["strong_image"].shape == (3, *view)
        boxes = mapped["instances"].gt_boxes.tensor
        assert boxes.tolist() == [[0, 0, view[1], view[0]]]


@pytest.mark.parametrize("kind", ["relative", "relative_range"])
def test_crop_of_a_narrow_picture(cfg, record, kind):
    Image.new("RGB", (WIDTH, 1)).save(record["file_name"])
    record = {"file_name": record["file_name"], "image_id": 1}
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, kind, [0.1, 0.1]
    for position in range(8):
        assert min(SemiMapper(cfg, False, 0)(record, position)["image"].shape) >= 1


@pytest.mark.parametrize("crowds", [0, 2])
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_crop_of_a_picture_without_objects(cfg, record, crowds, mask_format):
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT, cfg.INPUT.CROP.ENABLED = True, mask_format, True
    record["annotations"] = [record["annotations"][1]] * crowds
    mapped = TrainMapper(cfg)(record)
    assert len(mapped["instances"]) == 0
    assert mapped["instances"].gt_boxes.tensor.shape == (0, 4)
    assert mapped["instances"].image_size == tuple(mapped["image"].shape[1:])
    assert "annotations" not in mapped


def test_boxes_without_area_are_left_out(cfg, record):
    whole = record["annotations"][0]
    flat, thin, outside = [5, 5, 5, 20], [5, 5, 20, 5], [WIDTH + 1, 2, WIDTH + 9, 9]
    record["annotations"] = [{**whole, "bbox": b} for b in (flat, thin, outside, whole["bbox"])]
    assert len(TrainMapper(cfg)(record)["instances"]) == 1


# --- sizes from headers ---


# EXIF 2.3, 4.6.4: where row 0 and column 0 of what is stored belong in the upright picture.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.transpose(a), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_size_and_pixels_after_rotation(tmp_path, orientation, ending):
    stored = np.zeros((32, 48), np.uint8)
    stored[:16, :16] = 255  # no two orientations look alike
    stored[:16, 16:] = 128
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f"a.{ending}")
    Image.fromarray(stored).convert("RGB").save(path, exif=exif, quality=95)
    expected = UPRIGHT[orientation](stored)
    assert read_size(path) == expected.shape[::-1]
    read = detection_utils.read_image(path, "BGR")[..., 0]
    assert np.abs(read.astype(int) - expected).mean() < 3


def test_size_of_a_png_takes_the_header_only(tmp_path, monkeypatch):
    Image.new("L", (24, 16)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    assert read_size(str(tmp_path / "a.png")) == (24, 16)


def test_size_of_what_is_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be used: .*not an image"):
        read_size(str(tmp_path / "a.png"))
    with pytest.raises(UnreadableImage, match=r"b\.png cannot be used: FileNotFoundError"):
        read_size(str(tmp_path / "b.png"))
