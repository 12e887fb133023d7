"""Polygons of pixels: mended, cut to their image, measured; and corners of turned rectangles.

Coordinates are pixels of the upright image, x to the right and y down, (0, 0) the corner of the
first pixel. A shape is a list of parts, each a ring (P, 2) that is not closed by a repeated point;
its parts do not overlap. A point is inside if the ring winds around it, as drawing programs fill
an outline: where its ends overlap, or it is drawn twice, there is no hole.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

# Less than this is no object but what rounding left of an edge.
MIN_AREA_PX = 1e-3


def clip_polygon(points: np.ndarray, width: float, height: float) -> list[np.ndarray]:
    """The part of a polygon that lies in its image, as rings with area.

    A ring inside the image that does not cross itself comes back as it is, without repeated points;
    also one that only touches itself, such as an outline joined to that of its hole by a slit. Else
    it may fall into several parts. COCO has no holes: a part with one is cut in two through it.

    Args:
        points: (P, 2), in order; P may be anything.
        width, height: of the image.

    Returns:
        rings in an order of their own; none if nothing of at least `MIN_AREA_PX` is left.

    Raises:
        ValueError: a coordinate that is not finite.
    """
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(points).all():
        raise ValueError("polygon coordinates must be finite numbers")
    points = without_repeats(points)
    if len(points) < 3:
        return []
    shape: BaseGeometry = shapely.Polygon(points)
    sound = shapely.is_valid(shape)
    if not sound:
        shape = _wound_area(points)
        bounds = (*points.min(axis=0), *points.max(axis=0))
        # A ring that runs to and fro without area there, but further out, is not sound.
        sound = shape.bounds == bounds and abs(shape.area - polygon_area([points])) < MIN_AREA_PX
    if shape.area < MIN_AREA_PX:
        return []
    if sound and points.min() >= 0 and (points.max(axis=0) <= (width, height)).all():
        return [points]
    # Normalized: the order of rings and points then does not depend on the version of GEOS.
    inside = shape.intersection(shapely.box(0, 0, width, height)).normalize()
    return [shapely.get_coordinates(part.exterior)[:-1] for part in _cut_holes(inside)]


def without_repeats(points: np.ndarray) -> np.ndarray:
    """A ring (P, 2) without the points that equal the next one; the last is next to the first."""
    differs = np.empty(len(points), dtype=bool)
    differs[:-1] = (points[:-1] != points[1:]).any(axis=1)
    differs[-1:] = (points[-1:] != points[:1]).any(axis=1)
    return points[differs]


def _wound_area(points: np.ndarray) -> BaseGeometry:
    """The faces that a ring (P, 2) cuts the plane into, those that it winds around."""
    edges = shapely.unary_union(shapely.LinearRing(points))
    faces = shapely.get_parts(shapely.polygonize(shapely.get_parts(edges)))
    inner = shapely.get_coordinates(shapely.point_on_surface(faces))
    wound = [f for f, p in zip(faces, inner, strict=True) if _winding_number(points - p)]
    return shapely.MultiPolygon(_polygons(shapely.unary_union(wound)))


def _winding_number(points: np.ndarray) -> int:
    """How often a ring (P, 2) goes around the origin: crossings of the half-axis y = 0, x > 0."""
    (x1, y1), (x2, y2) = points.T, np.roll(points, -1, axis=0).T
    side = x1 * y2 - x2 * y1
    return int(
        ((y1 <= 0) & (y2 > 0) & (side > 0)).sum() - ((y1 > 0) & (y2 <= 0) & (side < 0)).sum()
    )


def _polygons(shape: BaseGeometry) -> list[shapely.Polygon]:
    """The polygons of a geometry; its lines, points and slivers are left out."""
    if shape.geom_type == "Polygon":
        return [shape] if shape.area >= MIN_AREA_PX else []
    parts = shapely.get_parts(shape) if hasattr(shape, "geoms") else ()
    return [polygon for part in parts for polygon in _polygons(part)]


def _cut_holes(shape: BaseGeometry) -> Iterator[shapely.Polygon]:
    """The polygons of a geometry, those with a hole cut from top to bottom through it."""
    for polygon in _polygons(shape):
        holes = (h for h in polygon.interiors if shapely.Polygon(h).area >= MIN_AREA_PX)
        hole = next(holes, None)
        if hole is None:
            yield polygon
            continue
        x_min, y_min, x_max, y_max = polygon.bounds
        middle = (hole.bounds[0] + hole.bounds[2]) / 2
        yield from _cut_holes(polygon.intersection(shapely.box(x_min, y_min, middle, y_max)))
        yield from _cut_holes(polygon.intersection(shapely.box(middle, y_min, x_max, y_max)))


def polygon_area(parts: Sequence[np.ndarray]) -> float:
    """Pixels² covered by rings that neither cross themselves nor overlap: shoelace formula."""
    area = 0.0
    for ring in parts:
        # From its first point, so that fewer digits cancel and the closing edge adds nothing.
        x, y = (ring - ring[0]).T
        area += abs(float(x[:-1] @ y[1:] - y[:-1] @ x[1:])) / 2
    return area


def polygon_box(parts: Sequence[np.ndarray]) -> tuple[float, float, float, float]:
    """COCO's box (x, y, width, height) around all rings."""
    points = np.concatenate(list(parts))
    (x_min, y_min), (x_max, y_max) = points.min(axis=0), points.max(axis=0)
    return float(x_min), float(y_min), float(x_max - x_min), float(y_max - y_min)


def rectangle_corners(
    x: float, y: float, width: float, height: float, degrees: float = 0.0
) -> np.ndarray:
    """Corners (4, 2) of a rectangle turned clockwise about its top-left corner (x, y).

    Everything is in pixels: in percent of an image that is not square a turn would shear.
    The first corner is (x, y), the second ends its top edge.
    """
    turn = np.radians(degrees)
    along = width * np.array([np.cos(turn), np.sin(turn)])
    down = height * np.array([-np.sin(turn), np.cos(turn)])
    corner = np.array([x, y], dtype=np.float64)
    return np.stack([corner, corner + along, corner + along + down, corner + down])
