"""RoIAlign as an embedding bag against torchvision's operator."""

import pytest
import torch
from torchvision.ops import roi_align

from sbr_cnn import extractors
from sbr_cnn import roi_align as roi_align_module
from sbr_cnn.roi_align import bag_roi_align

HEIGHT, WIDTH = 12, 16  # of the map, at stride 8

# Inside, across every edge, just beyond the last pixel, wholly outside, degenerate, image 1.
ROIS = torch.tensor(
    [
        [0, 10.3, 20.7, 60.1, 70.9],
        [0, -30.0, -20.0, 40.0, 30.0],
        [1, 80.0, 50.0, 150.0, 120.0],
        [1, 120.0, 90.0, 129.5, 97.0],
        [0, -90.0, -90.0, -40.0, -40.0],
        [0, 200.0, 10.0, 260.0, 60.0],
        [1, 50.0, 40.0, 50.0, 40.0],
        [0, 60.0, 60.0, 40.0, 30.0],
        [1, 0.0, 0.0, 128.0, 96.0],
        [0, 64.0, 64.0, 65.0, 90.0],
    ]
)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("side", [7, 14])
def test_equals_torchvision(aligned, sampling_ratio, side):
    feature = torch.randn(2, 5, HEIGHT, WIDTH, requires_grad=True)
    arguments = (feature, ROIS, side, 1 / 8, sampling_ratio, aligned)
    output, reference = bag_roi_align(*arguments), roi_align(*arguments)
    torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-5)
    noise = torch.randn_like(reference)
    (grad,) = torch.autograd.grad(output, feature, noise)
    (expected,) = torch.autograd.grad(reference, feature, noise)
    assert expected.abs().max() > 1
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def test_random_boxes():
    feature = torch.randn(3, 4, HEIGHT, WIDTH)
    start = torch.rand(500, 2) * torch.tensor([150.0, 120.0]) - 15
    rois = torch.cat([torch.randint(3, (500, 1)), start, start + torch.rand(500, 2) * 90], dim=1)
    arguments = (feature, rois, 7, 1 / 8, 2, True)
    torch.testing.assert_close(
        bag_roi_align(*arguments), roi_align(*arguments), rtol=1e-4, atol=1e-5
    )


def test_no_boxes_stay_in_the_graph():
    feature = torch.randn(1, 4, HEIGHT, WIDTH, requires_grad=True)
    output = bag_roi_align(feature, ROIS[:0], 7, 1 / 8, 2, True)
    assert output.shape == (0, 4, 7, 7)
    output.sum().backward()
    assert feature.grad.shape == feature.shape and not feature.grad.any()


def test_too_many_terms_go_to_torchvision(monkeypatch):
    feature = torch.randn(2, 4, HEIGHT, WIDTH)
    arguments = (feature, ROIS, 7, 1 / 8, 0, True)
    # Whole map in 7 x 7 bins: 3 x 2 samples of 4 neighbours each, 49 * 24 terms; that box alone.
    alone = (feature, ROIS[8:9], *arguments[2:])
    monkeypatch.setattr(roi_align_module, "MAX_TERMS", 49 * 24)
    monkeypatch.setattr(roi_align_module, "roi_align", lambda *args: "torchvision")
    assert bag_roi_align(*arguments) == "torchvision"
    torch.testing.assert_close(bag_roi_align(*alone), roi_align(*alone), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(roi_align_module, "MAX_TERMS", 49 * 24 - 1)
    assert bag_roi_align(*alone) == "torchvision"


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_extractors_use_it_in_fp32(
    training, ratio, autocast, make_extractor, make_boxes, monkeypatch
):
    calls = []
    monkeypatch.setattr(
        extractors, "bag_roi_align", lambda *args: calls.append(1) or bag_roi_align(*args)
    )
    extractor = make_extractor("single", "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", ratio)
    maps = [torch.randn(1, 8, 32 // 2**i, 32 // 2**i, requires_grad=training) for i in range(4)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        extractor(maps, [make_boxes(9, (128, 128))])
    assert len(calls) == (0 if autocast else 4)


def test_what_records_operators_sees_torchvisions(make_extractor, make_boxes):
    extractor = make_extractor("single")
    maps = [torch.randn(1, 8, 32 // 2**i, 32 // 2**i) for i in range(4)]
    boxes = make_boxes(9, (128, 128))
    traced = torch.jit.trace(lambda *maps: extractor(list(maps), [boxes]), maps)
    assert "torchvision::roi_align" in str(traced.inlined_graph)
    assert "embedding_bag" not in str(traced.inlined_graph)
