"""Polygons: what is kept as it is, what is cut or mended, and areas that can be done in the head.

That any polygon keeps the area of an independent rasterisation is in label_studio/test_shapes.py.
"""

import numpy as np
import pytest

from il_net.curation.polygons import (
    clip_polygon,
    polygon_area,
    polygon_box,
    rectangle_corners,
    without_repeats,
)

SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30]]


def clip(points, width=100, height=50):
    return clip_polygon(np.array(points, dtype=float), width, height)


@pytest.mark.parametrize("points", [SQUARE, SQUARE[::-1], [[0, 0], [100, 0], [100, 50]]])
def test_a_sound_polygon_comes_back_as_it_is(points):
    (ring,) = clip(points)
    assert ring.tolist() == points


def test_repeated_points_are_left_out_also_a_closing_one():
    (ring,) = clip([*SQUARE[:2], SQUARE[1], *SQUARE[2:], SQUARE[0]])
    assert ring.tolist() == SQUARE
    assert without_repeats(np.array([[1.0, 2.0]] * 3)).tolist() == []


def test_a_polygon_is_cut_to_its_image():
    parts = clip([[-10, -10], [30, -10], [30, 30], [-10, 30]])
    assert polygon_area(parts) == 900  # 30 x 30 of 40 x 40 are inside
    assert polygon_box(parts) == (0, 0, 30, 30)


def test_cutting_may_leave_two_parts():
    # A "U" of which only the two arms, 10 x 20 and 20 x 20, are above the lower edge at y = 50.
    u = [[10, 30], [20, 30], [20, 60], [40, 60], [40, 30], [60, 30], [60, 70], [10, 70]]
    parts = clip(u)
    assert sorted(polygon_area([part]) for part in parts) == [200, 400]
    assert polygon_area(parts) == 600
    assert polygon_box(parts) == (10, 30, 50, 20)


def test_a_bow_tie_is_two_triangles():
    parts = clip([[0, 0], [10, 10], [10, 0], [0, 10]])
    assert [polygon_area([part]) for part in parts] == [25, 25]
    assert polygon_box(parts) == (0, 0, 10, 10)


def test_overlapping_ends_and_a_second_round_make_no_hole():
    twice = [[0, 0], [20, 0], [20, 20], [0, 20], [0, 0], [5, 5], [15, 5], [15, 15], [5, 15], [5, 5]]
    parts = clip(twice)
    assert polygon_area(parts) == 400
    assert len(parts) == 1
    assert polygon_area(clip(SQUARE * 2)) == 400


# 20 x 20 with a hole of 10 x 10: inner ring the other way round, joined by a slit.
SLIT = [[0, 0], [20, 0], [20, 20], [0, 20], [0, 0], [5, 5], [5, 15], [15, 15], [15, 5], [5, 5]]


def test_a_ring_that_joins_its_hole_by_a_slit_is_kept():
    (ring,) = clip(SLIT)
    assert ring.tolist() == SLIT
    assert polygon_area([ring]) == 300


def test_a_hole_is_cut_open():
    parts = clip([[x - 1, y] for x, y in SLIT])  # one column is outside
    assert len(parts) == 2
    assert polygon_area(parts) == 300 - 20
    assert polygon_box(parts) == (0, 0, 19, 20)


def test_a_spike_without_area_does_not_widen_the_box():
    parts = clip([[0, 0], [10, 0], [40, 0], [10, 0], [10, 10], [0, 10]])
    assert polygon_box(parts) == (0, 0, 10, 10)
    assert polygon_area(parts) == 100


@pytest.mark.parametrize(
    "points",
    [
        [],
        [[5, 5]],
        [[5, 5], [9, 9]],
        [[5, 5], [9, 9], [5, 5]],
        [[1, 1], [2, 2], [3, 3]],
        [[-5, 5], [-1, 5], [-1, 9]],
        [[100, 5], [110, 5], [110, 9]],  # touches the image with an edge's end only
    ],
)
def test_nothing_is_left_of_what_has_no_area_inside(points):
    assert clip(points) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_coordinate_is_refused(value):
    with pytest.raises(ValueError, match="must be finite numbers"):
        clip([[0, 0], [value, 0], [5, 5]])


def test_area_far_from_the_origin_keeps_its_digits():
    assert polygon_area([np.array(SQUARE, dtype=float) + 1e8]) == 400


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (0, [[10, 20], [40, 20], [40, 25], [10, 25]]),
        (90, [[10, 20], [10, 50], [5, 50], [5, 20]]),  # clockwise: the top edge now runs down
        (180, [[10, 20], [-20, 20], [-20, 15], [10, 15]]),
        (-90, [[10, 20], [10, -10], [15, -10], [15, 20]]),
    ],
)
def test_a_rectangle_turns_clockwise_about_its_top_left_corner(degrees, expected):
    np.testing.assert_allclose(rectangle_corners(10, 20, 30, 5, degrees), expected, atol=1e-12)


def test_a_rectangle_turned_by_45_degrees():
    corners = rectangle_corners(0, 0, 2, 2, 45)
    half = 2**0.5
    expected = [[0, 0], [half, half], [0, 2 * half], [-half, half]]
    np.testing.assert_allclose(corners, expected, atol=1e-12)
