"""The strong view's steps against formulas, and how often and where they act."""

import colorsys

import numpy as np
import pytest

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from PIL import Image

from il_net.config import add_il_net_config
from il_net.data import augment
from il_net.data.augment import StrongAugment

RED = {"RGB": (255, 0, 0), "BGR": (0, 0, 255)}
GREEN = {"RGB": (0, 255, 0), "BGR": (0, 255, 0)}
CHANNELS = ["BGR", "RGB"]
NOTHING = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0, "erase": False}


def noise(height: int = 40, width: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rounded(levels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(levels), 0, 255)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return np.abs(a.astype(float) - b.astype(float)).max()


# --- the steps ---


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_brightness(factor):
    image = noise()
    assert difference(augment.adjust_brightness(image, factor), rounded(factor * image)) <= 1


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_contrast_and_saturation(channels, factor):
    image = noise()
    rgb = image if channels == "RGB" else image[..., ::-1]
    # ITU-R BT.601, as PIL computes it by itself.
    luma = np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).convert("L"), dtype=float)
    around_mean = factor * image + (1 - factor) * luma.mean()
    assert difference(augment.adjust_contrast(image, factor, channels), rounded(around_mean)) <= 1
    around_luma = factor * image + (1 - factor) * luma[..., None]
    result = augment.adjust_saturation(image, factor, channels)
    assert difference(result, rounded(around_luma)) <= 1
    gray = augment.adjust_saturation(image, 0.0, channels)
    assert difference(gray, luma[..., None].repeat(3, 2)) <= 1
    assert (gray == gray[..., :1]).all()


@pytest.mark.parametrize("channels", CHANNELS)
def test_hue_turns_the_color_circle(channels):
    red = np.full((4, 5, 3), RED[channels], np.uint8)
    # A third of a turn, rounded to 85 / 256: red becomes green, save for the rounding.
    assert difference(augment.shift_hue(red, 1 / 3, channels)[0, 0], np.array(GREEN[channels])) <= 6
    gray = np.full((4, 5, 3), 77, np.uint8)
    assert (augment.shift_hue(gray, 0.1, channels) == 77).all()
    image = noise(20, 20)
    rgb = image if channels == "RGB" else image[..., ::-1]
    for turns in (-0.1, 0.1):
        expected = []
        for pixel in rgb.reshape(-1, 3) / 255:
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            expected.append(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value))
        result = augment.shift_hue(image, turns, channels)
        result = result if channels == "RGB" else result[..., ::-1]
        error = np.abs(result.reshape(-1, 3) - 255 * np.array(expected))
        # Hue and saturation are rounded to 8 bits: half of 6 * 255 / 256 levels, twice.
        assert error.max() <= 10
        assert error.mean() < 2


@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.0])
def test_blur_is_a_gaussian_within_each_channel(sigma):
    impulse = np.zeros((41, 41, 3), np.uint8)
    impulse[20, 20, 1] = 255
    x = np.arange(-20, 21)
    kernel = np.exp(-(x**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    result = augment.blur(impulse, sigma)
    assert difference(result[..., 1], 255 * np.outer(kernel, kernel)) <= 1.5
    assert not result[..., [0, 2]].any()
    # A corner goes on outside of the image: a flat one stays as it is.
    assert (augment.blur(np.full((9, 9, 3), 200, np.uint8), sigma) == 200).all()


def erased(image: np.ndarray) -> tuple[int, int, int, int] | None:
    """y, x, height, width of what is no longer black."""
    changed = image.any(axis=2)
    if not changed.any():
        return None
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


@pytest.mark.parametrize(("area", "aspect"), [rest for _, *rest in augment.ERASE])
def test_erased_rectangles(area, aspect):
    rng = np.random.default_rng(0)
    ratios, shares, values, tops = [], [], [], []
    for _ in range(200):
        image = np.zeros((60, 80, 3), np.uint8)
        augment.erase(image, area, aspect, rng)
        y, x, h, w = erased(image)
        ratios.append(h / w)
        shares.append(h * w / 4800)
        tops.append(y / (60 - h))
        inside = image[y : y + h, x : x + w]
        values.append(inside.ravel())
        assert not image[:y].any()
        assert not image[:, x + w :].any()
    # Sides are rounded to whole pixels.
    assert area[0] * 0.85 <= min(shares)
    assert max(shares) <= area[1] * 1.15
    assert aspect[0] * 0.7 <= min(ratios)
    assert max(ratios) <= aspect[1] * 1.4
    # Even on a logarithmic scale, save for the extremes that do not fit.
    middle = np.exp(np.mean(np.log(aspect)))
    assert abs(np.mean(np.array(ratios) > middle) - 0.5) < 0.15
    assert abs(np.mean(tops) - 0.5) < 0.1
    # Uniform bytes: mean 127.5, standard deviation sqrt((256 ** 2 - 1) / 12) = 73.9.
    values = np.concatenate(values)
    assert abs(values.mean() - 127.5) < 1
    assert abs(values.std() - 73.9) < 0.5
    counts = np.bincount(values, minlength=256)
    assert counts.min() > 0.7 * counts.mean()


def test_no_rectangle_fits():
    # 5 % of 1 x 1000 pixels at ratio 0.3 .. 3.3 is at least 3.9 px high.
    image = np.zeros((1, 1000, 3), np.uint8)
    augment.erase(image, (0.05, 0.2), (0.3, 3.3), np.random.default_rng(0))
    assert not image.any()


# --- the pipeline ---


@pytest.mark.parametrize(
    ("step", "probability"), [("jitter_prob", 0.8), ("gray_prob", 0.2), ("blur_prob", 0.5)]
)
def test_how_often_a_step_acts(step, probability):
    image, rng = noise(12, 12), np.random.default_rng(0)
    for chance in (probability, 0.0, 1.0):
        strong = StrongAugment("BGR", **{**NOTHING, step: chance})
        changed = np.mean([(strong(image, rng) != image).any() for _ in range(1000)])
        # Four standard deviations of a binomial; blurring by 0.1 px changes nothing.
        expected = chance * (0.9 if step == "blur_prob" else 1.0)
        assert abs(changed - expected) <= 4 * 0.0158 + (0.1 if step == "blur_prob" else 0.01)


def test_how_often_rectangles_are_erased():
    rng, image = np.random.default_rng(0), np.zeros((60, 80, 3), np.uint8)
    strong = StrongAugment("BGR", **{**NOTHING, "erase": True})
    untouched = np.mean([erased(strong(image, rng)) is None for _ in range(2000)])
    # (1 - 0.7) (1 - 0.5) (1 - 0.3) = 0.105, standard deviation 0.0069.
    assert abs(untouched - 0.105) < 4 * 0.0069
    assert not image.any()


def test_defaults_are_the_published_ones():
    strong = StrongAugment("BGR")
    assert (strong.jitter_prob, strong.gray_prob, strong.blur_prob) == (0.8, 0.2, 0.5)
    assert augment.ERASE == (
        (0.7, (0.05, 0.2), (0.3, 3.3)),
        (0.5, (0.02, 0.2), (0.1, 6)),
        (0.3, (0.02, 0.2), (0.05, 8)),
    )
    cfg = get_cfg()
    add_il_net_config(cfg)
    assert StrongAugment.from_config(cfg) == strong


def test_jitter_amounts_and_order(monkeypatch):
    calls = []
    for name in ("adjust_brightness", "adjust_contrast", "adjust_saturation", "shift_hue"):
        monkeypatch.setattr(
            augment, name, lambda image, x, *_, name=name: (calls.append((name, x)), image)[1]
        )
    rng = np.random.default_rng(0)
    for _ in range(500):
        augment.jitter_color(noise(2, 2), "BGR", rng)
    orders = {tuple(n for n, _ in calls[i : i + 4]) for i in range(0, 2000, 4)}
    assert len(orders) == 24
    for name in {n for n, _ in calls}:
        low, high = (-0.1, 0.1) if name == "shift_hue" else (0.6, 1.4)
        amounts = [x for n, x in calls if n == name]
        assert len(amounts) == 500
        margin = (high - low) / 40
        assert low <= min(amounts) < low + margin
        assert high - margin < max(amounts) <= high


def test_result_is_a_copy_that_the_generator_decides():
    image = noise()
    before = image.copy()
    strong = StrongAugment("RGB")
    results = [strong(image, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (image == before).all()
    assert (results[0] == results[1]).all()
    assert (results[0] != results[2]).any()
    assert all(r.dtype == np.uint8 and r.shape == image.shape for r in results)


def test_channel_order_changes_nothing_but_the_order():
    image = noise()
    flipped = np.ascontiguousarray(image[..., ::-1])
    for seed in range(20):
        rgb = StrongAugment("RGB", 1.0, 0.3, 0.5, erase=False)(image, np.random.default_rng(seed))
        bgr = StrongAugment("BGR", 1.0, 0.3, 0.5, erase=False)(flipped, np.random.default_rng(seed))
        assert difference(rgb, bgr[..., ::-1]) <= 1


def test_from_config():
    cfg = get_cfg()
    add_il_net_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    node = cfg.INPUT.STRONG_AUG
    node.JITTER_PROB, node.GRAY_PROB, node.BLUR_PROB, node.ERASE = 0.1, 0.3, 0.4, False
    assert StrongAugment.from_config(cfg) == StrongAugment("RGB", 0.1, 0.3, 0.4, erase=False)
    node.BLUR_PROB = 1.5
    with pytest.raises(ValueError, match=r"INPUT\.STRONG_AUG\.BLUR_PROB is a probability"):
        StrongAugment.from_config(cfg)
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT 'L'.*BGR"):
        StrongAugment.from_config(cfg)
    node.ENABLED = False
    assert StrongAugment.from_config(cfg) is None
