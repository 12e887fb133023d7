"""Any polygon or turned rectangle in percent units against an independent rasterisation.

The picture is sampled at the centres of cells of 1/4 pixel, without a geometry library. A cell that
the outline does not come near is wholly inside or outside; so the area differs from that of the
inside cells by no more than the cells near the outline, and the box lies between the box of the
inside cells and that of inside and near cells: within a pixel for all but needles.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from il_net.curation.label_studio.convert import convert
from il_net.curation.label_studio.records import Choices

WIDTH, HEIGHT = 30, 20
CELL = 0.25
# From its centre, the corners of a cell are this far; 1/100: what the output is rounded to.
NEAR = CELL * 2**0.5 / 2 + 0.01
ACROSS, DOWN = np.meshgrid(
    np.arange(CELL / 2, WIDTH, CELL), np.arange(CELL / 2, HEIGHT, CELL), indexing="xy"
)
# Never dropped, so that a picture is left when the drawn shape is; a polygon, so that all have one.
ANCHOR = {"points": [[0, 0], [100, 0], [50, 100]], "polygonlabels": ["z"]}

percent = st.floats(-30, 130, allow_nan=False)
grid_percent = st.integers(-2, 12).map(lambda n: n * 10.0)
points = st.lists(st.tuples(percent, percent), min_size=3, max_size=8)
# On a coarse grid edges overlap, points coincide and lines touch, which random ones never do.
grid_points = st.lists(st.tuples(grid_percent, grid_percent), min_size=3, max_size=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (WIDTH, HEIGHT)).save(path / "a.png")
    return path


def converted(folder, kind: str, value: dict) -> dict | None:
    """The annotation that one region gives, if it is not dropped."""
    results = [
        {"id": "anchor", "type": "polygonlabels", "value": ANCHOR},
        {"id": "drawn", "type": kind, "value": {**value, kind: ["leaf"]}},
    ]
    tasks = [{"id": 1, "data": {"image": "a.png"}, "annotations": [{"id": 1, "result": results}]}]
    (folder / "export.json").write_text(json.dumps(tasks))
    coco = convert(folder / "export.json", folder, Choices()).coco
    leaf = [c["id"] for c in coco["categories"] if c["name"] == "leaf"]
    found = [a for a in coco["annotations"] if [a["category_id"]] == leaf]
    return found[0] if found else None


def wound(corners: np.ndarray) -> np.ndarray:
    """Cells around whose centre the outline turns: the angles under which its edges are seen."""
    angle = np.zeros(ACROSS.shape)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        dx1, dy1, dx2, dy2 = x1 - ACROSS, y1 - DOWN, x2 - ACROSS, y2 - DOWN
        angle += np.arctan2(dx1 * dy2 - dx2 * dy1, dx1 * dx2 + dy1 * dy2)
    return np.abs(angle) > np.pi


def near_outline(corners: np.ndarray) -> np.ndarray:
    """Cells whose centre is within NEAR of an edge."""
    near = np.zeros(ACROSS.shape, dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        length = (x2 - x1) ** 2 + (y2 - y1) ** 2
        along = ((ACROSS - x1) * (x2 - x1) + (DOWN - y1) * (y2 - y1)) / max(length, 1e-12)
        along = along.clip(0, 1)
        near |= np.hypot(ACROSS - x1 - along * (x2 - x1), DOWN - y1 - along * (y2 - y1)) <= NEAR
    return near


def check(annotation: dict | None, inside: np.ndarray, near: np.ndarray) -> None:
    """Area and box of an annotation against the cells of the picture."""
    area, bound = inside.sum() * CELL**2, near.sum() * CELL**2
    if annotation is None:
        assert area <= 1 + bound  # dropped are shapes of less than a pixel
        return
    assert abs(annotation["area"] - area) <= bound + 0.01
    x, y, w, h = annotation["bbox"]
    sure, touched = inside & ~near, inside | near
    slack = CELL / 2 + 0.02
    if sure.any():
        assert x <= ACROSS[sure].min() and x + w >= ACROSS[sure].max()
        assert y <= DOWN[sure].min() and y + h >= DOWN[sure].max()
    assert x >= ACROSS[touched].min() - slack and x + w <= ACROSS[touched].max() + slack
    assert y >= DOWN[touched].min() - slack and y + h <= DOWN[touched].max() + slack
    check_outline(annotation)


def check_outline(annotation: dict) -> None:
    """Rings that COCO can read, inside the picture, which fill the box and the area."""
    rings = [np.array(ring).reshape(-1, 2) for ring in annotation["segmentation"]]
    assert all(len(ring) >= 3 for ring in rings)
    corners = np.concatenate(rings)
    assert corners.min() >= 0 and (corners.max(axis=0) <= (WIDTH, HEIGHT)).all()
    x, y, w, h = annotation["bbox"]
    np.testing.assert_allclose([x, y], corners.min(axis=0), atol=1e-9)
    np.testing.assert_allclose([x + w, y + h], corners.max(axis=0), atol=1e-9)
    filled = np.zeros(ACROSS.shape, dtype=int)
    near = np.zeros(ACROSS.shape, dtype=bool)
    for ring in rings:
        filled += wound(ring)
        near |= near_outline(ring)
    assert filled[~near].max(initial=0) <= 1  # parts do not overlap
    assert abs(annotation["area"] - filled.sum() * CELL**2) <= near.sum() * CELL**2 + 0.01


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shape=st.one_of(points, grid_points))
def test_any_polygon(folder, shape):
    annotation = converted(folder, "polygonlabels", {"points": [list(p) for p in shape]})
    corners = np.array(shape) / 100 * (WIDTH, HEIGHT)
    check(annotation, wound(corners), near_outline(corners))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    x=percent,
    y=percent,
    width=st.floats(0, 120),
    height=st.floats(0, 120),
    degrees=st.one_of(st.floats(-400, 400), st.sampled_from([0.0, 90.0, 180.0, 270.0, 360.0])),
)
def test_any_turned_rectangle(folder, x, y, width, height, degrees):
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": degrees}
    annotation = converted(folder, "rectanglelabels", value)
    # In the frame of the rectangle: `along` its top edge, and at a right angle `below` it.
    turn = np.deg2rad(degrees)
    dx, dy = ACROSS - x * WIDTH / 100, DOWN - y * HEIGHT / 100
    along, below = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    w, h = width * WIDTH / 100, height * HEIGHT / 100
    # How far outside (positive) or inside the nearest edge.
    depth = np.maximum(np.maximum(-along, along - w), np.maximum(-below, below - h))
    check(annotation, depth < 0, np.abs(depth) <= NEAR)
