"""Draws the pictures of ``synthetic``: leaves with disease spots on textured grounds.

Shapes: H, W picture; h, w the same times ``SUPERSAMPLE`` (all is drawn larger, then averaged
down). Colours are float32 RGB in 0..255 until the file is written. ``unit`` is the number of drawn
pixels per 1/192 of the picture's shorter side: pictures of any size show the same things at the
same relative size.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np

CATEGORIES = ("leaf", "miner", "rust", "blight")
LEAF, _MINER, _RUST, _BLIGHT = 1, 2, 3, 4
SUPERSAMPLE = 2
_MIN_VISIBLE = 0.3  # of a leaf: with less than this in sight nobody would annotate it

# dark, middle, light
_GROUNDS = {
    "soil": ((52, 38, 28), (112, 86, 62), (164, 136, 106)),
    "grass": ((24, 42, 18), (66, 98, 38), (128, 146, 72)),
    "foliage": ((18, 34, 26), (58, 92, 58), (150, 168, 118)),
    "straw": ((96, 76, 44), (166, 142, 92), (214, 196, 150)),
    "stone": ((84, 82, 80), (138, 134, 128), (188, 184, 176)),
    "paper": ((178, 174, 166), (202, 198, 188), (222, 218, 208)),
}
# per area of a square picture: pebbles, blurred greenery, blades, twigs
_CLUTTER = {
    "soil": (26, 0, 8, 4), "grass": (2, 0, 230, 2), "foliage": (0, 24, 20, 2),
    "straw": (4, 0, 50, 14), "stone": (30, 0, 3, 3), "paper": (5, 0, 1, 1),
}
_LEAF_COLOURS = (
    ((38, 84, 34), (86, 138, 52)),
    ((54, 104, 40), (118, 164, 66)),
    ((36, 78, 46), (88, 132, 76)),
    ((92, 124, 40), (160, 176, 70)),
    ((142, 132, 44), (198, 178, 74)),
    ((110, 72, 40), (150, 132, 58)),
)
# range of the number of teeth on a side, their depth as a share of the half width
_EDGES = {
    "smooth": ((1, 2), 0.0), "wavy": ((5, 9), 0.07), "serrate": ((12, 22), 0.12),
    "spiny": ((2.5, 4.5), 0.32), "lobed": ((2.5, 4.5), 0.42),
}


@dataclass
class _Canvas:
    image: np.ndarray  # (h, w, 3)
    owner: np.ndarray  # (h, w) number of the visible leaf, -1 on the background
    spots: np.ndarray  # (h, w) True where a spot was drawn
    unit: float
    centres: list = field(default_factory=list)  # (x, y) of the leaves drawn so far


def _noise(rng: np.random.Generator, shape: tuple[int, int], cells: float, octaves: int = 4):
    """Smooth noise (h, w), zero mean, unit deviation; `cells` bumps along the shorter side."""
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        cell = max(1.0, min(shape) / (cells * 2**octave))
        grid = [max(2, round(side / cell)) for side in shape]
        values = rng.standard_normal(grid, dtype=np.float32)
        total += cv2.resize(values, shape[::-1], interpolation=cv2.INTER_CUBIC) * 0.6**octave
    return total / max(float(total.std()), 1e-6)


def _curve(rng: np.random.Generator, n: int, waves: int) -> np.ndarray:
    """Periodic random curve (n,) around zero with deviation of about 1."""
    k = np.arange(1, waves + 1)[:, None]
    height, shift = rng.normal(size=k.shape) / k**0.7, rng.uniform(0, 2 * np.pi, k.shape)
    return (height * np.cos(k * np.arange(n) * (2 * np.pi / n) + shift)).sum(0)


def _blend(image: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> None:
    image += (colour - image) * alpha[..., None]


def _stroke(image: np.ndarray, points: np.ndarray, width: float, colour: np.ndarray) -> None:
    """Tapering stroke through `points` (n, 2); a darker edge on one side gives it a body."""
    thick = np.maximum(1, np.round(width * np.linspace(1, 0.35, len(points)))).astype(int).tolist()
    for offset, tone in ((max(1, round(width * 0.3)), 0.55), (0, 1.0)):
        dots, shade = np.round(points + offset).astype(int).tolist(), (colour * tone).tolist()
        for a, b, wide in zip(dots, dots[1:], thick, strict=False):
            cv2.line(image, a, b, shade, wide)


def _clutter(rng: np.random.Generator, image: np.ndarray, kind: str, unit: float) -> None:
    """Things no one annotates; pebbles and crumbs share their colours with the spots on purpose."""
    size = np.array(image.shape[1::-1])
    area = size.prod() / (192 * unit) ** 2
    stones = ((150, 128, 104), (128, 82, 48), (176, 160, 134), (92, 66, 44))
    greens = ((74, 116, 42), (112, 142, 58), (46, 84, 36), (150, 152, 82))
    browns = ((96, 70, 48), (132, 104, 72), (186, 166, 120), (70, 50, 38))
    pebbles, bokeh, blades, twigs = _CLUTTER[kind]
    for count, radius, palette in ((bokeh, 15, greens), (pebbles, 2.7, stones)):
        for _ in range(rng.poisson(count * area)):
            centre, turn = rng.uniform(0, size), rng.uniform(0, 180)
            axes = rng.gamma(3.0, radius / 3, 2) * unit
            colour = np.array(palette[rng.integers(4)]) * rng.uniform(0.55, 1.3)
            for shift, scale, light in ((1.2, 1.1, 0.4), (0, 1.0, 0.85), (-0.6, 0.6, 1.1)):
                at = (centre + shift * unit).astype(int).tolist()
                radii = np.maximum(1, axes * scale).astype(int).tolist()
                cv2.ellipse(image, at, radii, turn, 0, 360, (colour * light).tolist(), -1)
    for count, spread, width, palette in ((blades, 0.25, 2.6, greens), (twigs, 0.4, 3.2, browns)):
        for _ in range(rng.poisson(count * area)):
            heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, spread, 6))
            step = rng.uniform(4, 14) * unit
            path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1) * step, 0)
            colour = np.array(palette[rng.integers(4)]) * rng.uniform(0.65, 1.2)
            _stroke(image, path + rng.uniform(0, size), rng.uniform(1, width) * unit, colour)


def _background(rng: np.random.Generator, shape: tuple[int, int], unit: float) -> np.ndarray:
    kind = tuple(_GROUNDS)[rng.integers(len(_GROUNDS))]
    coarse = _noise(rng, shape, rng.uniform(2, 5), 3)
    fine = _noise(rng, shape, rng.uniform(14, 40), 4)
    mix = np.clip(110 + 30 * coarse + rng.uniform(22, 44) * fine, 0, 255).astype(np.uint8)
    palette = np.array(_GROUNDS[kind]) * rng.uniform(0.85, 1.1) + rng.normal(0, 4, 3)
    ramp = np.linspace(0, 2, 256)
    table = np.stack([np.interp(ramp, (0, 1, 2), palette[:, c]) for c in range(3)], 1)
    image = table.astype(np.float32)[mix]
    _clutter(rng, image, kind, unit)
    depth = rng.uniform(2.0, 5.0) if kind == "foliage" else rng.uniform(0.3, 1.6)
    return cv2.GaussianBlur(image, (0, 0), depth * unit)


def _outline(rng: np.random.Generator, n: int = 512) -> np.ndarray:
    """Half widths (2, n) of the two sides from stalk to tip, 1 at the widest point."""
    u = np.linspace(0, 1, n)
    body = np.sin(np.pi * u ** rng.uniform(0.65, 1.15)) ** rng.uniform(0.6, 1.0)
    body *= 1 - rng.uniform(0, 0.5) * u ** rng.uniform(2, 4)  # draws the tip out to a point
    edge = str(rng.choice(tuple(_EDGES), p=(0.26, 0.22, 0.22, 0.14, 0.16)))
    (low, high), depth = _EDGES[edge]
    teeth, depth, sides = rng.uniform(low, high), depth * rng.uniform(0.75, 1.1), []
    for _ in range(2):
        phase = u * teeth + rng.uniform(0, 0.3)
        arch = np.abs(np.cos(np.pi * phase)) ** 0.8
        tooth = {"serrate": phase % 1, "lobed": 1 - arch}.get(edge, arch)
        side = body * (1 - depth * tooth) * (1 + 0.035 * _curve(rng, n, 5))
        sides.append(side * rng.uniform(0.88, 1.0))
    return np.maximum(0, sides) / np.max(sides)


def _leaf_colour(rng: np.random.Generator, u, v, side, rough) -> np.ndarray:
    """Colour (n, 3) of n leaf pixels from their own coordinates, all (n,): `u` along the leaf
    (0..1), `v` away from the midrib (0..1), `side` of it (-1..1), `rough` noise."""
    pick = rng.choice(len(_LEAF_COLOURS), p=(0.27, 0.27, 0.2, 0.12, 0.08, 0.06))
    dark, light = np.float32(_LEAF_COLOURS[pick]) + np.float32(rng.normal(0, (7, 7, 3)))
    count, slant = rng.uniform(5, 10), rng.uniform(1.0, 2.4)
    phase = u * count - slant * v**1.2 + 0.25 * side + 0.1 * rough
    gap = np.abs(phase - np.round(phase))
    tone = 0.5 + rng.uniform(-0.2, 0.2) * side + 0.16 * rough - rng.uniform(0.0, 0.3) * v**3
    tone += rng.uniform(0, 0.5) * (gap - 0.25)  # the tissue bulges between the veins
    colour = dark + (light - dark) * np.clip(tone, -0.3, 1.4)[:, None]
    lateral = rng.uniform(0.25, 0.6) * np.exp(-((gap / 0.07) ** 2)) * (1 - 0.8 * v)
    midrib = rng.uniform(0.6, 0.95) * np.exp(-((v / (0.075 - 0.055 * u)) ** 2))
    _blend(colour, light * 0.7 + np.float32((70, 72, 40)), np.maximum(lateral, midrib))
    return colour


def _add_leaf(rng: np.random.Generator, canvas: _Canvas, number: int, count: int) -> float:
    """Draw leaf `number` of `count` over what is there; returns its area if nothing hid it."""
    h, w = canvas.owner.shape
    length = 192 * canvas.unit * rng.uniform(0.66, 0.98) * (1.05, 0.85, 0.72, 0.64)[count - 1]
    half = length * rng.uniform(0.17, 0.34)
    # Of a few places the one farthest from other leaves: they overlap, but rarely hide each other.
    spread = 0.12 if count == 1 else 0.36
    places = (0.5 + rng.uniform(-spread, spread, (6, 2))) * (w, h)
    gaps = [min((np.hypot(*(p - c)) for c in canvas.centres), default=0.0) for p in places]
    cx, cy = places[int(np.argmax(gaps))]
    canvas.centres.append((cx, cy))
    turn, bend = rng.uniform(0, 2 * np.pi), rng.triangular(-0.18, 0, 0.18) * length
    along, across = np.float32([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    base = np.array([cx, cy]) - along * length / 2 - across * bend * 0.6
    stalk = np.stack([base + along * length * 0.06, base - along * length * rng.uniform(0.08, 0.2)])
    _stroke(canvas.image, stalk[::-1], 3.4 * canvas.unit, np.array(_LEAF_COLOURS[1][1]) * 0.9)

    reach = 0.66 * length
    y0, y1 = int(max(0, cy - reach)), int(min(h, cy + reach))
    x0, x1 = int(max(0, cx - reach)), int(min(w, cx + reach))
    ys, xs = np.ogrid[y0:y1, x0:x1]
    dy, dx = (ys - cy).astype(np.float32), (xs - cx).astype(np.float32)
    u = (dx * along[0] + dy * along[1]).astype(np.float32) / np.float32(length) + np.float32(0.5)
    inside = np.clip(u, 0, 1)
    q = (dx * across[0] + dy * across[1] - bend * (np.sin(np.pi * inside) - 0.6)).astype(np.float32)
    widths = (_outline(rng) * half).astype(np.float32)
    position = (inside * (widths.shape[1] - 1)).astype(np.int32)
    edge = np.where(q > 0, widths[0][position], widths[1][position])
    alpha = np.clip(edge - np.abs(q) + 0.5, 0, 1) * (u == inside)

    part = canvas.image[y0:y1, x0:x1]
    shift = rng.normal(0, 3.5, 2) * canvas.unit
    move = np.array([[1, 0, shift[0]], [0, 1, shift[1]]])
    blurred = cv2.GaussianBlur(alpha, (0, 0), rng.uniform(2, 6) * canvas.unit)
    part *= 1 - rng.uniform(0.25, 0.6) * cv2.warpAffine(blurred, move, alpha.shape[::-1])[..., None]
    at = alpha > 0
    v = np.minimum(np.abs(q[at]) / np.float32(half), 1)
    side = np.tanh(q[at] / np.float32(0.02 * length))
    colour = _leaf_colour(rng, u[at], v, side, _noise(rng, at.shape, rng.uniform(3, 7))[at])
    part[at] += (colour - part[at]) * alpha[at][:, None]
    canvas.owner[y0:y1, x0:x1][alpha > 0.5] = number
    return float(widths.sum() * length / widths.shape[1])


def _radial(rng: np.random.Generator, radius: float, waves: int, rough: float) -> np.ndarray:
    """Distance from the centre (n, n) in units of an irregular outline: below 1 is inside."""
    reach = int(np.ceil(radius * 1.9))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    turn, squash = rng.uniform(0, np.pi), rng.uniform(0.75, 1.0) if waves > 4 else 1.0
    x, y = x * np.cos(turn) + y * np.sin(turn), (y * np.cos(turn) - x * np.sin(turn)) / squash
    wobble = np.clip(1 + rough * _curve(rng, 128, waves), 0.6, 1.45)
    sector = ((np.arctan2(y, x) / (2 * np.pi) + 0.5) * 127).astype(int)
    return np.hypot(x, y) / (radius * wobble[sector])


# Each kind of spot returns opacity (n, n), annotated part (n, n) bool and colour (n, n, 3).
def _rust(rng: np.random.Generator, unit: float):
    rel = _radial(rng, rng.uniform(3.4, 7.0) * unit, 4, 0.09)
    aged = rng.random() < 0.25  # as brown as blight
    core = np.array((126, 70, 34) if aged else (190, 92, 28)) + rng.normal(0, 12, 3)
    halo = np.array((206, 188, 80)) + rng.normal(0, 10, 3)
    inner = np.clip((rng.uniform(0.5, 0.85) - rel) * rng.uniform(3, 6), 0, 1)
    colour = halo + (core - halo) * inner[..., None] + 7 * _noise(rng, rel.shape, 6, 2)[..., None]
    lit = np.roll(rel, (-round(unit), -round(unit)), (0, 1))  # it stands up from the leaf
    colour += 55 * np.clip(0.35 - lit, 0, 1)[..., None]
    glow = np.clip((1.15 - rel) * rng.uniform(2.5, 4.5), 0, rng.uniform(0.5, 0.9))
    return np.maximum(inner, glow) * 0.95, rel < 1, colour


def _blight(rng: np.random.Generator, unit: float):
    rel = _radial(rng, rng.uniform(6.5, 16.0) * unit, 9, 0.16)
    middle = np.array(((112, 74, 46), (92, 66, 46), (146, 118, 84))[rng.integers(3)])
    rings = np.cos(2 * np.pi * rel * rng.uniform(1.8, 3.2) + rng.uniform(0, 6.3))
    shade = rings * rng.uniform(4, 16) - 16 * rel + 8 * _noise(rng, rel.shape, 8, 2)
    colour = middle + rng.normal(0, 4, 3) + shade[..., None]
    rim = rng.uniform(0.5, 0.95) * np.exp(-(((rel - 0.9) / 0.14) ** 2))
    _blend(colour, np.array((46, 30, 22)), rim)
    _blend(colour, np.array((176, 160, 66)), np.clip((rel - 1.0) * 8, 0, 1))
    margin = rng.uniform(0.2, 0.6) * np.clip((1.35 - rel) * 3, 0, 1)  # yellowed, not annotated
    return np.where(rel < 1.03, 0.95, margin), rel < 1, colour


def _miner(rng: np.random.Generator, unit: float):
    steps, reach = 26, rng.uniform(8.0, 16.0) * unit
    wave = np.sin(np.linspace(0, rng.uniform(6, 15), steps) + rng.uniform(0, 6.3))
    drift = rng.uniform(0, 6.3) + np.cumsum(rng.normal(0, 0.2, steps))
    heading = rng.uniform(0.5, 1.5) * wave + drift
    path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1), 0)
    path -= (path.max(0) + path.min(0)) / 2
    width = rng.uniform(2.6, 4.2) * unit * np.linspace(0.75, 1.6, steps)
    path *= (reach - width.max() / 2) / max(np.abs(path).max(), 1e-6)
    middle = int(np.ceil(reach + width.max()))  # room for the blotch
    shape, frass = np.zeros((2, 2 * middle + 1, 2 * middle + 1), np.float32)
    dots = np.round(path + middle).astype(int).tolist()
    for a, b, wide in zip(dots, dots[1:], width, strict=False):
        cv2.line(shape, a, b, 1.0, max(2, round(wide)))
        cv2.line(frass, a, b, 1.0, max(1, round(wide * 0.28)))
    if rng.random() < 0.5:  # the trail ends in a blotch
        cv2.circle(shape, dots[-1], round(width[-1] * rng.uniform(0.7, 1.3)), 1.0, -1)
    pale = np.array(((206, 204, 164), (188, 196, 140), (204, 190, 158))[rng.integers(3)])
    colour = pale + rng.normal(0, 8, 3) + 9 * _noise(rng, shape.shape, 10, 2)[..., None]
    soft = cv2.GaussianBlur(shape, (0, 0), 0.5 * unit)
    _blend(colour, np.array((104, 92, 58)), 0.8 * (1 - soft) * (soft > 0))  # browned rim
    frass = cv2.GaussianBlur(frass, (0, 0), 0.4 * unit)
    _blend(colour, np.array((112, 96, 62)), rng.uniform(0.2, 0.7) * frass)  # dark thread within
    return np.clip(soft * 1.3, 0, 1) * rng.uniform(0.75, 0.95), shape > 0.5, colour


_SPOTS = {_MINER: _miner, _RUST: _rust, _BLIGHT: _blight}


def _add_spot(
    rng: np.random.Generator, canvas: _Canvas, kind: int, place: np.ndarray,
    centre: tuple[int, int], share: float,
) -> np.ndarray | None:
    """Draw a spot at `centre` (y, x), clipped to `place` (h, w). Returns its visible mask (h, w),
    or None and draws nothing if less than `share` of it would show or it would touch another."""
    alpha, mask, colour = _SPOTS[kind](rng, canvas.unit)
    n, (h, w), (cy, cx) = mask.shape[0] // 2, place.shape, centre
    y0, y1, x0, x1 = max(0, cy - n), min(h, cy + n + 1), max(0, cx - n), min(w, cx + n + 1)
    if y0 >= y1 or x0 >= x1:
        return None
    cut = np.s_[y0 - cy + n : y1 - cy + n, x0 - cx + n : x1 - cx + n]
    here = np.s_[y0:y1, x0:x1]
    seen = mask[cut] & place[here]
    if seen.sum() < share * mask.sum() or (seen & canvas.spots[here]).any():
        return None
    _blend(canvas.image[here], colour[cut], (alpha[cut] * place[here]).astype(np.float32))
    canvas.spots[here] |= seen
    visible = np.zeros((h, w), bool)
    visible[here] = seen
    return visible


def _infect(
    rng: np.random.Generator, canvas: _Canvas, place: np.ndarray, wanted: int, isolated: bool
) -> list[tuple[int, np.ndarray]]:
    """Draw about `wanted` spots, mostly of one kind, in `place`; (category, visible mask) pairs."""
    main, free, done = int(rng.integers(_MINER, _BLIGHT + 1)), np.flatnonzero(place), []
    for _ in range(wanted):
        kind = main if rng.random() < 0.65 else int(rng.integers(_MINER, _BLIGHT + 1))
        centre = np.array(divmod(int(free[rng.integers(len(free))]), place.shape[1]))
        cluster = int(rng.integers(1, 5)) if kind == _RUST and not isolated else 1
        for extra in range(cluster):
            shift = rng.normal(0, 13 * canvas.unit, 2) * (extra > 0)
            at = tuple(np.round(centre + shift).astype(int).tolist())
            # an isolated spot is a whole one: nothing of it may reach a leaf or leave the picture
            mask = _add_spot(rng, canvas, kind, place, at, share=1.0 if isolated else 0.72)
            if mask is not None:
                done.append((kind, mask))
    return done


def _develop(rng: np.random.Generator, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Lighting, exposure, blur and grain; (h, w, 3) float to (H, W, 3) uint8."""
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    ys, xs = np.ogrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    turn = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0, 0.22) * (ys * np.sin(turn) + xs * np.cos(turn))
    light -= rng.uniform(0, 0.12) * (ys**2 + xs**2)
    if rng.random() < 0.3:  # dappled shade
        light *= 1 - rng.uniform(0.15, 0.35) / (1 + np.exp(-5 * _noise(rng, size, 2, 2)))
    cast = rng.uniform(0.84, 1.14) * (1 + rng.normal(0, 0.015, 3))
    image = image * (light[..., None] * cast).astype(np.float32)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9) * min(size) / 192)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(1, 7))
    return np.clip(image, 0, 255).astype(np.uint8)


def render(
    rng: np.random.Generator, size: tuple[int, int]
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One picture (H, W, 3) uint8 and its (category, visible mask (h, w)) pairs, leaves first."""
    shape, unit = (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE), SUPERSAMPLE * min(size) / 192
    owner = np.full(shape, -1, np.int16)
    canvas = _Canvas(_background(rng, shape, unit), owner, np.zeros(shape, bool), unit)
    count = int(rng.choice((1, 2, 3, 4), p=(0.32, 0.36, 0.24, 0.08)))
    full = [_add_leaf(rng, canvas, number, count) for number in range(count)]
    leaves, spots = [], []
    for number, area in enumerate(full):
        place = owner == number
        if place.sum() >= _MIN_VISIBLE * area:
            leaves.append((LEAF, place))
            wanted = min(5, int(rng.poisson(1.0 + 5.0 * place.sum() / (96 * unit) ** 2)))
            spots += _infect(rng, canvas, place, wanted, isolated=False)
    if rng.random() < 0.35 and (owner < 0).any():
        spots += _infect(rng, canvas, owner < 0, int(rng.integers(1, 4)), isolated=True)
    return _develop(rng, canvas.image, size), leaves + spots
