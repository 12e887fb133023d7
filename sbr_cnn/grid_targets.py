"""Geometry of Grid R-CNN: grid points, jitter, heat-map targets and the vote that makes a box.

Host of rows 3 and 4 of thesis Table 2.5 (section 2.1); Grid R-CNN (arXiv 1811.12030) with the
half-size heat maps of Grid R-CNN Plus (arXiv 1906.05688), as the thesis' code.

A box is enlarged to twice its width and height around its centre and divided into 2M x 2M cells.
Every grid point has its own M x M window of them, where its heat map lies: at 0, M/2 or M on
either axis for the left (upper), middle and right (lower) points.

Shape shorthand: R boxes of all images, P = 9 grid points, row by row from the upper left (the
published code counts column by column), M the side of a heat map (28).
"""

import torch
from detectron2.structures import Boxes
from torch import Tensor

SIDE = 3  # grid points on a border of the box
NUM_POINTS = SIDE * SIDE
RADIUS = 1  # of a target's disc, in cells


def neighbors(point: int) -> list[int]:
    """Grid points one step above, left, right and below: 2 of a corner, 3 of an edge, 4 inside."""
    y, x = divmod(point, SIDE)
    steps = ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x))
    return [row * SIDE + column for row, column in steps if {row, column} <= set(range(SIDE))]


def point_fractions(device: torch.device) -> Tensor:
    """Where the grid points lie in their box: (P, 2), x and y, each 0, 0.5 or 1."""
    index = torch.arange(NUM_POINTS, device=device)
    return torch.stack([index % SIDE, index // SIDE], dim=1) / (SIDE - 1)


def jitter_boxes(boxes: Boxes, amplitude: float, image_size: tuple[int, int]) -> Boxes:
    """Move each centre and change each side at random, independently on both axes.

    Args:
        boxes: in the image's pixels.
        amplitude: greatest change, relative to the box' width (height); below 1.
        image_size: height and width, to which the result is clipped.
    """
    start, end = boxes.tensor.split(2, dim=1)
    offsets = torch.empty_like(boxes.tensor).uniform_(-amplitude, amplitude)
    center = (start + end) / 2 + (end - start) * offsets[:, :2]
    half = (end - start) * (1 + offsets[:, 2:]) / 2
    jittered = Boxes(torch.cat([center - half, center + half], dim=1))
    jittered.clip(image_size)
    return jittered


def grid_targets(boxes: Tensor, gt_boxes: Tensor, side: int) -> Tensor:
    """Heat maps with a disc around each grid point of the ground truth.

    Args:
        boxes: (R, 4), the boxes that the head sees, x1 y1 x2 y2 in pixels, not empty.
        gt_boxes: (R, 4), the box to find from each.
        side: M.

    Returns:
        (R, P, M, M) float32 of zeros and ones; all zeros for a point outside its window.
    """
    origin, size = _enlarged_origin(boxes)
    fractions = point_fractions(boxes.device)
    gt_start, gt_end = gt_boxes[:, None].split(2, dim=2)
    points = gt_start + (gt_end - gt_start) * fractions
    cells = ((points - origin) / size * side).floor()  # (R, P, 2)
    in_window = cells - fractions * side
    index = torch.arange(side, device=boxes.device)
    dx, dy = (index - in_window[..., None]).square().unbind(dim=2)  # (R, P, M) each
    return (dy[..., :, None] + dx[..., None, :] <= RADIUS**2).float()


def decode_boxes(logits: Tensor, boxes: Tensor) -> Tensor:
    """Boxes from heat maps: each border is voted by the three grid points that lie on it.

    A point is the centre of the cell with the highest logit, its score that cell's probability; a
    border's coordinate is the mean of its points' weighted with their scores.

    Args:
        logits: (R, P, M, M).
        boxes: (R, 4), the boxes that the features were pooled from, x1 y1 x2 y2 in pixels.

    Returns:
        (R, 4) float32, not clipped to the image; never empty if ``boxes`` are not.
    """
    side = logits.shape[-1]
    # Compared as logits: probabilities near 1 are equal in float32. The clamp keeps 0 / 0 away.
    best, index = logits.float().flatten(2).max(dim=2)
    scores = best.clamp(min=-50).sigmoid().unflatten(1, (SIDE, SIDE))  # (R, row, column)
    origin, size = _enlarged_origin(boxes.float())
    in_window = torch.stack([index % side, index // side], dim=2)
    cells = in_window + point_fractions(boxes.device) * side
    points = (origin + (cells + 0.5) / side * size).unflatten(1, (SIDE, SIDE))
    xs, ys = points.unbind(dim=3)
    borders = [
        (values * weights).sum(dim=1) / weights.sum(dim=1)
        for values, weights in (
            (xs[:, :, 0], scores[:, :, 0]),
            (ys[:, 0], scores[:, 0]),
            (xs[:, :, -1], scores[:, :, -1]),
            (ys[:, -1], scores[:, -1]),
        )
    ]
    return torch.stack(borders, dim=1)


def _enlarged_origin(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Upper left corner of the enlarged boxes and the boxes' own size: (R, 1, 2) each."""
    start, end = boxes[:, None].split(2, dim=2)
    size = end - start
    return start - size / 2, size
