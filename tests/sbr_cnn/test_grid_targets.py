"""Grid points, heat-map targets, jitter and the vote of Grid R-CNN (methods 9.5)."""

import math

import pytest
import torch
from detectron2.structures import Boxes
from torch import Tensor
from torch.nn import functional as F

from sbr_cnn.grid_targets import decode_boxes, grid_targets, jitter_boxes, neighbors

# 0 1 2
# 3 4 5
# 6 7 8
NEIGHBORS = {
    **{0: {1, 3}, 1: {0, 2, 4}, 2: {1, 5}},
    **{3: {0, 4, 6}, 4: {1, 3, 5, 7}, 5: {2, 4, 8}},
    **{6: {3, 7}, 7: {4, 6, 8}, 8: {5, 7}},
}


def test_neighbors():
    for point, expected in NEIGHBORS.items():
        assert set(neighbors(point)) == expected
        assert len(neighbors(point)) == len(expected)
    assert sum(len(neighbors(point)) for point in range(9)) == 24  # 4 * 2 + 4 * 3 + 4


# ---- targets ----

# Enlarged: x from 0 to 80, y from 0 to 40. 56 cells on either axis: 0.7 cells to a pixel in x,
# 1.4 in y.
BOX = torch.tensor([[20.0, 10.0, 60.0, 30.0]])


def test_targets_by_hand():
    # In cells: x 21.35, 32.375, 43.4; y 20.3, 29.05, 37.8. Windows begin at 0, 14 and 28.
    gt = torch.tensor([[30.5, 14.5, 62.0, 27.0]])
    columns, rows = (21, 32 - 14, 43 - 28), (20, 29 - 14, 37 - 28)
    expected = torch.zeros(1, 9, 28, 28)
    for point in range(9):
        row, column = rows[point // 3], columns[point % 3]
        for dy, dx in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
            expected[0, point, row + dy, column + dx] = 1
    targets = grid_targets(BOX, gt, 28)
    assert targets.dtype == torch.float32
    assert torch.equal(targets, expected)


@pytest.mark.parametrize(
    ("x1", "columns"),
    [
        (39.5, [26, 27, 27, 27]),  # 27.65 cells: the last column; a neighbour is cut off
        (41.0, [27]),  # 28.7: outside, but one column of the disc is in
        (43.5, []),  # 30.45
        (-1.0, [0]),  # -0.7
        (-3.0, []),
    ],
)
def test_discs_end_with_the_window(x1, columns):
    target = grid_targets(BOX, torch.tensor([[x1, 14.5, 62.0, 27.0]]), 28)[0, 0]
    assert sorted(target.nonzero()[:, 1].tolist()) == columns


def test_targets_of_no_boxes():
    assert grid_targets(torch.zeros(0, 4), torch.zeros(0, 4), 28).shape == (0, 9, 28, 28)


# ---- decoding ----


def ideal_logits(targets: Tensor) -> Tensor:
    """Heat maps with their peak in the disc's centre: in how many cells the disc covers itself."""
    plus = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    return F.conv2d(targets.flatten(0, 1)[:, None], plus[None, None], padding=1).view_as(targets)


@pytest.mark.parametrize("side", [28, 12])
def test_ideal_heat_maps_decode_to_the_box(side):
    start, size = torch.rand(50, 2) * 400, 20 + torch.rand(50, 2) * 200
    boxes = torch.cat([start, start + size], dim=1)
    # Borders off by up to 0.3 of the size: 0.2 to 0.8 of it inside the enlarged box.
    gt = boxes + (torch.rand(50, 4) - 0.5) * 0.6 * size.repeat(1, 2)
    decoded = decode_boxes(ideal_logits(grid_targets(boxes, gt, side)), boxes)
    cell = (size / side).repeat(1, 2)
    assert ((decoded - gt).abs() <= 0.501 * cell).all()
    assert ((boxes - gt).abs() > cell).any(dim=1).sum() > 40  # there was something to find


def test_borders_are_voted_by_score():
    # Row, column in the point's window, and probability.
    peaks = [
        *((5, 4, 0.5), (6, 9, 0.25), (7, 1, 0.25)),
        *((0, 8, 0.8), (3, 3, 0.9), (9, 5, 0.25)),
        *((10, 12, 0.2), (11, 20, 0.5), (15, 13, 0.3)),
    ]
    logits = torch.full((1, 9, 28, 28), -20.0)
    for point, (row, column, probability) in enumerate(peaks):
        logits[0, point, row, column] = math.log(probability / (1 - probability))
    # 28 by 56 pixels: enlarged from (-14, -28), cells of 1 by 2 pixels.
    decoded = decode_boxes(logits, torch.tensor([[0.0, 0.0, 28.0, 56.0]]))
    # Left 0, 3, 6: (0.5 * 4 + 0.8 * 8 + 0.2 * 12) / 1.5 = 7.2. Top 0, 1, 2: 2.5 + 1.5 + 1.75.
    # Right 2, 5, 8: (0.25 * 1 + 0.25 * 5 + 0.3 * 13) / 0.8 = 6.75. Bottom 6, 7, 8: 2 + 5.5 + 4.5.
    expected = [
        *(-14 + 7.2 + 0.5, -28 + (5.75 + 0.5) * 2),
        *(-14 + 28 + 6.75 + 0.5, -28 + (28 + 12 + 0.5) * 2),
    ]
    assert decoded[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_highest_logit_wins_where_probabilities_are_equal():
    logits = torch.full((1, 9, 28, 28), 30.0)  # sigmoid(30) is 1 in float32
    logits[:, :, 7, 9] = 31.0
    box = torch.tensor([[0.0, 0.0, 28.0, 28.0]])
    expected = [-14 + 9.5, -14 + 7.5, 14 + 9.5, 14 + 7.5]
    assert decode_boxes(logits, box)[0].tolist() == expected


def test_decoded_boxes_are_finite_float32_and_not_empty():
    boxes = torch.tensor([[5.0, 5.0, 6.0, 9.0], [0.0, 0.0, 300.0, 20.0]])
    for scale in (1.0, 1e4):
        logits = -scale * (1 + torch.rand(2, 9, 28, 28))
        for kind in (torch.float32, torch.bfloat16):
            decoded = decode_boxes(logits.to(kind), boxes)
            assert decoded.dtype == torch.float32
            assert decoded.isfinite().all()
            assert (decoded[:, 2:] > decoded[:, :2]).all()


def test_decoding_no_boxes():
    assert decode_boxes(torch.zeros(0, 9, 28, 28), torch.zeros(0, 4)).shape == (0, 4)


# ---- jitter ----


def test_jitter_is_independent_and_within_its_amplitude():
    box = torch.tensor([100.0, 200.0, 140.0, 220.0])
    boxes = Boxes(box.expand(4000, 4).clone())
    jittered = jitter_boxes(boxes, 0.15, (1000, 1000)).tensor
    size = torch.tensor([40.0, 20.0])
    center = (jittered[:, :2] + jittered[:, 2:]) / 2 - torch.tensor([120.0, 210.0])
    offsets = torch.cat([center, jittered[:, 2:] - jittered[:, :2] - size], dim=1)
    offsets /= size.repeat(2)
    assert (offsets.abs() <= 0.15 + 1e-5).all()
    # Uniform on [-0.15, 0.15]: standard deviation 0.15 / sqrt(3), standard error of it 0.7 %.
    assert offsets.std(dim=0).tolist() == pytest.approx([0.15 / math.sqrt(3)] * 4, rel=0.04)
    assert (offsets.T.corrcoef() - torch.eye(4)).abs().max() < 0.08  # five standard errors
    assert torch.equal(boxes.tensor, box.expand(4000, 4))


def test_jitter_of_nothing_by_nothing_and_at_the_border():
    assert jitter_boxes(Boxes(torch.zeros(0, 4)), 0.15, (96, 128)).tensor.shape == (0, 4)
    boxes = Boxes(torch.tensor([[0.0, 0.0, 128.0, 96.0], [120.0, 90.0, 128.0, 96.0]]))
    assert torch.equal(jitter_boxes(boxes, 0.0, (96, 128)).tensor, boxes.tensor)
    for _ in range(20):
        jittered = jitter_boxes(boxes, 0.15, (96, 128))
        assert (jittered.tensor >= 0).all()
        assert (jittered.tensor <= torch.tensor([128, 96, 128, 96])).all()
        assert jittered.nonempty().all()
