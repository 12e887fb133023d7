"""Checks of the masks of a COCO file: polygons against their image, and against box and area.

Thousands of polygons are measured together, as one array of points; only what looks wrong is
looked at alone. Coordinates are pixels of the upright image. A annotations, R rings.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import shapely
from pycocotools import mask as coco_mask

from ..data.coco_checks import EDGE_TOLERANCE_PX, Sizes, image_limits, image_sizes, name_annotation
from ..data.coco_values import is_area, is_box, is_polygon
from ..data.masks import read_rle
from ..data.report import Findings, Severity
from .polygons import MIN_AREA_PX, clip_polygon

# Boxes are often rounded: first the corner, then the side, each by less than a pixel.
BOX_TOLERANCE_PX = 2 * EDGE_TOLERANCE_PX
_CHUNK = 5000  # annotations measured together: of a hundred thousand the points fill gigabytes


@dataclass(frozen=True)
class OutlineFaults:
    """What is wrong with outlines, (A,) bool each; an annotation may have several faults.

    `malformed`: no list of lists of finite numbers, or an RLE that `masks.to_rle` refuses. `short`:
    a polygon with an odd number of coordinates or fewer than three points. `empty`: one without
    area. `outside`: one that leaves its image by more than a pixel. `rle_size`: an RLE mask of
    another size than its image. `crossing`: a polygon that crosses or touches itself, which is no
    mistake by itself. `area`, `box`: the stored one is not that of the polygons. Of an annotation
    with another fault these two are not looked at.
    """

    malformed: np.ndarray
    short: np.ndarray
    empty: np.ndarray
    outside: np.ndarray
    rle_size: np.ndarray
    crossing: np.ndarray
    area: np.ndarray
    box: np.ndarray


@dataclass(frozen=True)
class _Rings:
    """Well-formed polygons of all annotations: whose they are, corners and measures.

    `owner` (R,); `low`, `high` (R, 2): the corners of their boxes; `area`, `length` (R,);
    `simple` (R,) bool: whether they neither cross nor touch themselves.
    """

    owner: np.ndarray
    low: np.ndarray
    high: np.ndarray
    area: np.ndarray
    length: np.ndarray
    simple: np.ndarray

    @classmethod
    def measure(cls, rings: Sequence[list[float]], owner: Sequence[int]) -> "_Rings":
        """Measure polygons [x, y, x, y, ...] of finite numbers, three points and more each."""
        sizes = np.array([len(ring) // 2 for ring in rings], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        numbers = np.fromiter(chain.from_iterable(rings), np.float64, 2 * int(sizes.sum()))
        points = numbers.reshape(-1, 2)
        following = np.arange(1, len(points) + 1)
        following[starts + sizes - 1] = starts
        # Relative to the ring's first point fewer digits cancel.
        local = points - np.repeat(points[starts], sizes, axis=0)
        after = local[following]
        cross = local[:, 0] * after[:, 1] - after[:, 0] * local[:, 1]
        return cls(
            np.asarray(owner, dtype=np.int64),
            np.minimum.reduceat(points, starts, axis=0),
            np.maximum.reduceat(points, starts, axis=0),
            np.abs(np.add.reduceat(cross, starts)) / 2,
            np.add.reduceat(np.hypot(*(after - local).T), starts),
            shapely.is_valid(
                shapely.polygons(
                    shapely.linearrings(points, indices=np.repeat(np.arange(len(sizes)), sizes))
                )
            ),
        )


def find_outline_faults(annotations: Sequence[dict], sizes: Sizes) -> OutlineFaults:
    """Check polygons and RLE masks; objects without `segmentation` have no fault.

    Args:
        annotations: well-formed ones.
        sizes: (width, height) by image id; outlines of other images cannot leave theirs.
    """
    chunks = [
        vars(_find_faults(annotations[start : start + _CHUNK], sizes))
        for start in range(0, max(1, len(annotations)), _CHUNK)
    ]
    fields = [field.name for field in dataclasses.fields(OutlineFaults)]
    return OutlineFaults(*(np.concatenate([c[name] for c in chunks]) for name in fields))


def _find_faults(annotations: Sequence[dict], sizes: Sizes) -> OutlineFaults:
    none = np.zeros(len(annotations), dtype=bool)
    malformed, short, rle_size = none.copy(), none.copy(), none.copy()
    rings: list[list[float]] = []
    owner: list[int] = []
    for row, a in enumerate(annotations):
        outline = a.get("segmentation")
        if isinstance(outline, dict):
            malformed[row], rle_size[row] = _rle_faults(outline, sizes.get(a["image_id"]))
        elif outline and not (isinstance(outline, list) and all(map(is_polygon, outline))):
            malformed[row] = True
        elif outline:
            good = [ring for ring in outline if len(ring) % 2 == 0 and len(ring) >= 6]
            short[row] = len(good) < len(outline)
            rings += good
            owner += [row] * len(good)
    if not rings:
        return OutlineFaults(malformed, short, none, none, rle_size, none, none, none)
    measured = _Rings.measure(rings, owner)
    limits = image_limits(annotations, sizes)
    over = np.maximum(-measured.low, measured.high - limits[measured.owner]).max(axis=1)
    outside = none.copy()
    outside[measured.owner[over > EDGE_TOLERANCE_PX]] = True
    empty = none.copy()
    for i in np.flatnonzero(measured.area < MIN_AREA_PX):
        empty[measured.owner[i]] |= _has_no_area(rings[i])
    whole = ~(malformed | short | empty)
    crossing = none.copy()
    crossing[measured.owner[~measured.simple]] = True
    area, box = _disagreements(annotations, measured, whole & ~outside, limits)
    return OutlineFaults(malformed, short, empty, outside, rle_size, crossing & whole, area, box)


def _rle_faults(rle: dict, size: tuple[float, float] | None) -> tuple[bool, bool]:
    """Whether it is malformed, and whether its size is another one."""
    if read_rle(rle) is None:
        return True, False
    return False, size is not None and tuple(rle["size"]) != size[::-1]


def _has_no_area(ring: list[float]) -> bool:
    """Whether nothing is inside a ring of which the shoelace formula says so.

    The two loops of a figure of eight cancel each other in that formula.
    """
    points = np.array(ring, dtype=np.float64).reshape(-1, 2)
    points -= points.min(axis=0)
    return not clip_polygon(points, *points.max(axis=0))


def _disagreements(
    annotations: Sequence[dict], rings: _Rings, among: np.ndarray, limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(A,) twice: where area, and where box are not those of the polygons."""
    count = len(annotations)
    has_rings = np.zeros(count, dtype=bool)
    has_rings[rings.owner] = True
    low, high = np.full((count, 2), np.inf), np.full((count, 2), -np.inf)
    np.minimum.at(low, rings.owner, rings.low)
    np.maximum.at(high, rings.owner, rings.high)
    boxes = np.array([a["bbox"] if is_box(a.get("bbox")) else [np.nan] * 4 for a in annotations])
    stored = stored_areas(annotations)
    area = np.bincount(rings.owner, rings.area, count)
    length = np.bincount(rings.owner, rings.length, count)
    wrong_area, wrong_box = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    with np.errstate(invalid="ignore"):  # NaN, for what is missing, differs from nothing
        box_is_far = (_box_distance(boxes, low, high) > BOX_TOLERANCE_PX) & among
        # Rasterising moves an outline by up to a pixel.
        area_is_far = (np.abs(stored - area) > EDGE_TOLERANCE_PX * length) & among & (stored > 0)
    for row in np.flatnonzero(has_rings & (box_is_far | area_is_far)):
        polygons = annotations[row]["segmentation"]
        drawn_area, drawn_box = draw_outline(polygons, *limits[row])
        tolerance = EDGE_TOLERANCE_PX * length[row]
        wrong_area[row] = area_is_far[row] and abs(stored[row] - drawn_area) > tolerance
        distance = _box_distance(boxes[row], drawn_box[:2], drawn_box[:2] + drawn_box[2:])
        wrong_box[row] = box_is_far[row] and distance > BOX_TOLERANCE_PX
    return wrong_area, wrong_box


def _box_distance(boxes: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Of (..., 4) COCO boxes to corners (..., 2): by how much the worst edge is off."""
    end = boxes[..., :2] + boxes[..., 2:]
    return np.maximum(np.abs(boxes[..., :2] - low), np.abs(end - high)).max(axis=-1)


def draw_outline(
    polygons: list[list[float]], width: float, height: float
) -> tuple[float, np.ndarray]:
    """Area and box (4,) of the mask that COCO draws in an image; NaN if its size is not finite.

    Sums and extremes are wrong where polygons cross, overlap, or have spikes too thin to draw.
    """
    if not np.isfinite((width, height)).all():
        return np.nan, np.full(4, np.nan)
    mask = coco_mask.merge(coco_mask.frPyObjects(polygons, int(height), int(width)))
    return float(coco_mask.area(mask)), coco_mask.toBbox(mask)


def stored_areas(annotations: Sequence[dict]) -> np.ndarray:
    """(A,) float: the numbers `area`, NaN where there is none."""
    areas = [a["area"] if is_area(a.get("area")) else np.nan for a in annotations]
    return np.array(areas, dtype=np.float64)


def check_outlines(annotations: list[dict], images: list[dict], findings: Findings) -> None:
    """`find_outline_faults` in words, areas of nothing, and masks that only some objects have."""
    faults = find_outline_faults(annotations, image_sizes(images))
    without = np.array([not a.get("segmentation") for a in annotations], dtype=bool)
    if without.all():
        without[:] = False  # boxes only
    areas = stored_areas(annotations)

    def name(row: int) -> str:
        return name_annotation(annotations[row])

    warning, error = Severity.WARNING, Severity.ERROR
    for kind, mask, severity, consequence in (
        ("RLE masks of another size than their image", faults.rle_size, error, ""),
        (
            "polygons with an odd number of coordinates or fewer than three points",
            faults.short, warning, "Detectron2 leaves them out",
        ),
        ("polygons without area", faults.empty, warning, ""),
        (
            "polygons that leave the image by more than 1 px", faults.outside, warning,
            "their masks are cut",
        ),
        ("annotations whose 'area' is not above 0", areas <= 0, warning, ""),
        (
            "areas that are not those of the polygons", faults.area, warning,
            "COCO's small, medium and large go by the stored area",
        ),
        ("boxes that are not those of the polygons", faults.box, warning, ""),
        (
            "objects whose outline crosses or touches itself", faults.crossing, Severity.NOTE,
            "what is wound around twice is not in the mask",
        ),
        (
            "objects without 'segmentation' beside others that have one", without, warning,
            "MODEL.MASK_ON refuses the file",
        ),
    ):  # fmt: skip
        rows = np.flatnonzero(mask)
        findings.add_rows(kind, rows, name, severity=severity, consequence=consequence)
