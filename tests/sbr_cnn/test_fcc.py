"""FCC layers and box head (methods 7, thesis Table 2.10)."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_box_head
from torch import nn
from torch.nn import functional as F

from sbr_cnn.fcc import build_fcc_layers

# Kernel (height, width), padding, channels in and out of every convolution; C = 256.
CONVS = {
    "square": [((7, 7), (3, 3), 256, 128), ((7, 7), (3, 3), 128, 64)],
    "rect": [
        ((7, 3), (1, 1), 256, 256),
        ((3, 7), (3, 3), 256, 128),
        ((7, 3), (1, 1), 128, 128),
        ((3, 7), (3, 3), 128, 64),
    ],
    "rect_early": [
        ((7, 3), (1, 1), 256, 128),
        ((3, 7), (3, 3), 128, 128),
        ((7, 3), (1, 1), 128, 64),
        ((3, 7), (3, 3), 64, 64),
    ],
}


def convs(layers: nn.Module) -> list[nn.Conv2d]:
    return [m for m in layers.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("name", CONVS)
def test_convolutions_are_the_thesis(name):
    with torch.device("meta"):
        found = convs(build_fcc_layers(256, 7, name))
    shapes = [(c.kernel_size, c.padding, c.in_channels, c.out_channels) for c in found]
    assert shapes == CONVS[name]
    assert all(c.stride == (1, 1) and c.bias is not None for c in found)


def test_parameters_of_table_2_10():
    with torch.device("meta"):
        square, rect = (convs(build_fcc_layers(256, 7, name)) for name in ("square", "rect"))
    counts = [sum(p.numel() for p in c.parameters()) for c in (*square, *rect)]
    assert counts == [1_605_760, 401_472, 1_376_512, 688_256, 344_192, 172_096]


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_layers_equal_a_chain_of_functions(name, before, after, randomize):
    layers = build_fcc_layers(8, 7, name, non_local_before=before, non_local_after=after)
    randomize(layers, gain=1.5)
    x = torch.randn(3, 8, 7, 7)
    expected = x
    if before:
        expected = layers[0](expected).relu()
    modules = [c for c in layers.modules() if isinstance(c, nn.Sequential) and len(c) == 2]
    assert len(modules) >= len(CONVS[name])
    for conv, (kernel, padding, *_) in zip(
        (m[0] for m in modules if isinstance(m[0], nn.Conv2d)), CONVS[name], strict=True
    ):
        assert conv.kernel_size == kernel
        expected = F.conv2d(expected, conv.weight, conv.bias, padding=padding).relu()
    if after:
        expected = layers[-2](expected).relu()
    output = layers(x)
    assert output.shape == (3, 2, 7, 7)  # C / 4, and rectangular paddings keep 7x7
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert (output >= 0).all()


def test_rectangular_pair_is_3x7_in_between():
    layers = build_fcc_layers(8, 7, "rect")
    assert layers[0](torch.randn(2, 8, 7, 7)).shape == (2, 8, 3, 7)


def test_initialisation():
    # Kaiming-normal, fan out: variance 2 / (64 channels out * 49).
    conv = convs(build_fcc_layers(128, 7, "square"))[0]
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.02)
    assert not conv.bias.any()


@pytest.mark.parametrize(
    ("opts", "head_params"),
    [
        (("square", False, False), 2_273_877),
        (("rect", False, False), 2_847_701),
        (("square", True, False), 8_697_045),
        (("rect", True, False), 9_270_869),
        (("rect_early", True, False), 7_980_437),
        (("square", True, True), 9_098_613),
    ],
    ids=["b", "c", "d", "e", "e'", "d+NLa"],
)
def test_head_parameters(opts, head_params, make_config):
    """Methods 7, with class and box predictors: 81 and 4 outputs from 3136 numbers each."""
    cfg = make_config(
        *("MODEL.ROI_BOX_HEAD.NAME", "FCCBoxHead", "MODEL.FCC.LAYERS", opts[0]),
        *("MODEL.FCC.NON_LOCAL_BEFORE", opts[1], "MODEL.FCC.NON_LOCAL_AFTER", opts[2]),
    )
    with torch.device("meta"):
        head = build_box_head(cfg, ShapeSpec(channels=256, height=7, width=7))
    shape = head.output_shape
    assert shape.channels * shape.height * shape.width == 3136
    predictors = 85 * (3136 + 1)
    assert sum(p.numel() for p in head.parameters()) + predictors == head_params


@pytest.mark.parametrize("layers", CONVS)
def test_box_head_trains_and_detects_in_a_loop(
    layers, make_loops, make_proposals, make_targets, train_step, detect
):
    heads = make_loops(
        "aa", "MODEL.ROI_BOX_HEAD.NAME", "FCCBoxHead", "MODEL.FCC.LAYERS", layers
    )
    losses = train_step(heads, make_proposals(20, 20), make_targets(3, 2))
    losses["loss_cls_loop1"].backward()
    for name, parameter in heads.pairs["a"].box_head.named_parameters():
        assert parameter.grad.any(), name
    assert len(detect(heads, make_proposals(9, 4))) == 2


def test_mistakes_are_named(make_heads):
    with pytest.raises(ValueError, match=r"MODEL\.FCC\.LAYERS is one of .*'round'"):
        make_heads("MODEL.ROI_BOX_HEAD.NAME", "FCCBoxHead", "MODEL.FCC.LAYERS", "round")
    with pytest.raises(ValueError, match="divide by 4, got 6"):
        build_fcc_layers(6, 7, "square")
    with pytest.raises(ValueError, match="rect.*5 x 5 or more, got 4 x 4: raise POOLER_RESOLUTION"):
        build_fcc_layers(8, 4, "rect")
