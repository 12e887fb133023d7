"""The strong view: colour jitter, grayscale, blur and erased rectangles on a uint8 image.

Thesis section 2.4; the parameters are Unbiased Teacher's (torchvision's operations). Differs from
the published code: the channel order is known, so that hue, saturation and luma are those of the
picture (there BGR was taken for RGB); OpenCV instead of PIL, which takes an eighth of the time.

Shapes: images are (H, W, 3) uint8, contiguous.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from detectron2.config import CfgNode

CHANNEL_ORDERS = ("BGR", "RGB")
JITTER = 0.4  # brightness, contrast and saturation: factors within 1 -+ JITTER
HUE = 0.1  # turns
BLUR_SIGMA = (0.1, 2.0)  # pixels
# Probability, share of the area, height / width.
ERASE = (
    (0.7, (0.05, 0.2), (0.3, 3.3)),
    (0.5, (0.02, 0.2), (0.1, 6.0)),
    (0.3, (0.02, 0.2), (0.05, 8.0)),
)
_ERASE_ATTEMPTS = 10
_LUMA_RGB = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class StrongAugment:
    """The photometric changes of the strong view, in the published order.

    Args:
        channels: "BGR" or "RGB".
        jitter_prob: of the colour jitter: brightness, contrast, saturation and hue, shuffled.
        gray_prob: of grayscale.
        blur_prob: of the Gaussian blur.
        erase: whether rectangles are filled with noise. Labels stay as they are.
    """

    channels: str
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    blur_prob: float = 0.5
    erase: bool = True

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "StrongAugment | None":
        """As `INPUT.STRONG_AUG` says; None when it is off.

        Raises:
            ValueError: `INPUT.FORMAT` is neither BGR nor RGB, or a probability is none.
        """
        node = cfg.INPUT.STRONG_AUG
        if not node.ENABLED:
            return None
        if cfg.INPUT.FORMAT not in CHANNEL_ORDERS:
            raise ValueError(
                f"INPUT.FORMAT {cfg.INPUT.FORMAT!r}: the strong view needs one of "
                f"{list(CHANNEL_ORDERS)}; or set INPUT.STRONG_AUG.ENABLED False"
            )
        for key in ("JITTER_PROB", "GRAY_PROB", "BLUR_PROB"):
            if not 0 <= node[key] <= 1:
                raise ValueError(f"INPUT.STRONG_AUG.{key} is a probability, got {node[key]}")
        return cls(cfg.INPUT.FORMAT, node.JITTER_PROB, node.GRAY_PROB, node.BLUR_PROB, node.ERASE)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A changed copy of `image` (H, W, 3); every random number comes from `rng`."""
        if rng.random() < self.jitter_prob:
            image = jitter_color(image, self.channels, rng)
        if rng.random() < self.gray_prob:
            image = adjust_saturation(image, 0.0, self.channels)
        if rng.random() < self.blur_prob:
            image = blur(image, rng.uniform(*BLUR_SIGMA))
        if self.erase:
            image = image.copy()
            for probability, area, aspect in ERASE:
                if rng.random() < probability:
                    erase(image, area, aspect, rng)
        return image


def jitter_color(image: np.ndarray, channels: str, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue by random amounts, in random order."""
    brightness, contrast, saturation = rng.uniform(1 - JITTER, 1 + JITTER, 3)
    turns = rng.uniform(-HUE, HUE)
    for step in rng.permutation(4):
        if step == 0:
            image = adjust_brightness(image, brightness)
        elif step == 1:
            image = adjust_contrast(image, contrast, channels)
        elif step == 2:
            image = adjust_saturation(image, saturation, channels)
        else:
            image = shift_hue(image, turns, channels)
    return image


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """factor * image, clipped to 0..255."""
    return cv2.convertScaleAbs(image, alpha=factor)


def adjust_contrast(image: np.ndarray, factor: float, channels: str) -> np.ndarray:
    """factor * image + (1 - factor) * mean luma, clipped to 0..255."""
    mean = round(float(np.dot(cv2.mean(image)[:3], luma_weights(channels))))
    levels = factor * np.arange(256) + (1 - factor) * mean
    return cv2.LUT(image, np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def adjust_saturation(image: np.ndarray, factor: float, channels: str) -> np.ndarray:
    """factor * image + (1 - factor) * luma, clipped to 0..255; factor 0 is grayscale."""
    matrix = factor * np.eye(3) + (1 - factor) * luma_weights(channels)
    return cv2.transform(image, matrix)


def shift_hue(image: np.ndarray, turns: float, channels: str) -> np.ndarray:
    """Turn the hue of the HSV hexcone; it is rounded to 1 / 256 of the circle."""
    to_hsv, back = {
        "BGR": (cv2.COLOR_BGR2HSV_FULL, cv2.COLOR_HSV2BGR_FULL),
        "RGB": (cv2.COLOR_RGB2HSV_FULL, cv2.COLOR_HSV2RGB_FULL),
    }[channels]
    hsv = cv2.cvtColor(image, to_hsv)
    hsv[..., 0] += np.uint8(round(turns * 256) % 256)  # wraps around, as hues do
    return cv2.cvtColor(hsv, back)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur by `sigma` pixels, in the plane only; the edge is repeated outside."""
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)


def erase(
    image: np.ndarray,
    area: tuple[float, float],
    aspect: tuple[float, float],
    rng: np.random.Generator,
) -> None:
    """Fill a random rectangle with uniform random bytes, in place; none if ten do not fit.

    Differs from the published code, whose normal noise wrapped around to the same bytes.

    Args:
        image: (H, W, 3).
        area: range of the rectangle's share of the image.
        aspect: range of its height / width, drawn evenly on a logarithmic scale.
        rng: source of everything random.
    """
    height, width = image.shape[:2]
    for _ in range(_ERASE_ATTEMPTS):
        pixels = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < h < height and 0 < w < width:
            y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = np.frombuffer(rng.bytes(h * w * 3), np.uint8)
            image[y : y + h, x : x + w] = noise.reshape(h, w, 3)
            return


def luma_weights(channels: str) -> np.ndarray:
    """ITU-R BT.601 weights (3,) in the order of the channels."""
    return np.array(_LUMA_RGB if channels == "RGB" else _LUMA_RGB[::-1])
