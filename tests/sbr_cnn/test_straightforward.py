"""SBR-CNN's fast training step gives what the straightforward one gives.

Straightforward: torchvision's RoIAlign, torch's convolutions, three separate convolutions and a
softmax over an explicit attention matrix in the non-local block.
"""

import math

import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

from sbr_cnn import extractors, roi_convs
from sbr_cnn.attention import NonLocal2d

SBR_CNN = (
    *("MODEL.ROI_BOX_HEAD.EXTRACTOR", "groie", "MODEL.ROI_MASK_HEAD.EXTRACTOR", "groie"),
    *("MODEL.ROI_BOX_HEAD.NAME", "FCCBoxHead", "MODEL.FCC.LAYERS", "rect_early"),
    *("MODEL.FCC.NON_LOCAL_BEFORE", True),
    *("MODEL.MASK_IOU_HEAD.ENABLED", True, "MODEL.MASK_IOU_HEAD.LAYERS", "square"),
)


def straightforward_non_local(block: NonLocal2d, x):
    embedded = [conv(x).flatten(2) for conv in (block.theta, block.phi, block.g)]
    theta, phi, g = embedded
    weights = (theta.transpose(1, 2) @ phi / math.sqrt(theta.shape[1])).softmax(dim=2)
    return x + block.conv_out((g @ weights.transpose(1, 2)).view_as(block.theta(x)))


def one_step(heads, proposals, targets, maps, train_step):
    heads.zero_grad()
    leaves = {name: m.clone().requires_grad_() for name, m in maps.items()}
    torch.manual_seed(1)
    losses = train_step(heads, proposals, targets, leaves)
    sum(losses.values()).backward()
    grads = {name: p.grad.clone() for name, p in heads.named_parameters()}
    return losses, grads | {name: leaf.grad for name, leaf in leaves.items()}


def test_a_training_step_is_the_same(
    make_loops, make_proposals, make_targets, make_maps, train_step, randomize, monkeypatch
):
    heads = randomize(make_loops("aaa", *SBR_CNN), gain=1.6)
    work = (heads, make_proposals(30, 30), make_targets(3, 2), make_maps(2), train_step)
    used = {"fourier": 0, "bag": 0}

    def count(name, function):
        def counted(*args):
            used[name] += 1
            return function(*args)

        return counted

    monkeypatch.setattr(roi_convs, "MIN_GAIN", 0.0)  # these maps are too small to gain anything
    monkeypatch.setattr(roi_convs, "fourier_conv2d", count("fourier", roi_convs.fourier_conv2d))
    monkeypatch.setattr(extractors, "bag_roi_align", count("bag", extractors.bag_roi_align))
    losses, grads = one_step(*work)
    # Per loop: pre-convolutions and non-local blocks of two extractors, the box head's six; once
    # the Mask-IoU head's two. Four levels for boxes and masks.
    assert used == {"fourier": 3 * (2 * 3 + 2 + 4) + 2, "bag": 3 * 2 * 4}

    monkeypatch.setattr(roi_convs, "MIN_GAIN", math.inf)
    monkeypatch.setattr(extractors, "bag_roi_align", roi_align)
    monkeypatch.setattr(NonLocal2d, "forward", straightforward_non_local)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    expected, expected_grads = one_step(*work)
    assert set(losses) == set(expected) and len(losses) == 10
    assert furthest(losses, expected) < 1e-5
    assert furthest(grads, expected_grads) < 1e-3  # rounding, through three loops and their ReLUs


def furthest(values: dict, expected: dict) -> float:
    """Largest relative difference of two sets of tensors, each measured as a whole."""
    distances = []
    for name, reference in expected.items():
        if name.endswith("phi.bias"):
            continue  # zero but for rounding: the softmax cancels it
        assert reference.norm() > 0, name
        distances.append(((values[name] - reference).norm() / reference.norm()).item())
    return max(distances)


def test_a_wrong_fast_path_would_show(
    make_loops, make_proposals, make_targets, make_maps, train_step, randomize, monkeypatch
):
    heads = randomize(make_loops("aaa", *SBR_CNN), gain=1.6)
    work = (heads, make_proposals(30, 30), make_targets(3, 2), make_maps(2), train_step)
    expected, expected_grads = one_step(*work)
    wrong = extractors.bag_roi_align
    monkeypatch.setattr(extractors, "bag_roi_align", lambda *args: 1.01 * wrong(*args))
    losses, grads = one_step(*work)
    assert furthest(losses, expected) > 1e-4
    assert furthest(grads, expected_grads) > 5e-3
