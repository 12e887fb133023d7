"""Every extractor against torchvision's RoIAlign per level and the options written out."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from sbr_cnn.attention import NonLocal2d, RelativePositionAttention
from sbr_cnn.extractors import GenericRoIExtractor, select_maps

STRIDES = (4, 8, 16, 32)
NONE = ("none", 1)
MODULES = [
    NONE,
    *[("conv", kernel) for kernel in (1, 3, 5, 7)],
    ("rect", 1),
    ("non_local", 1),
    ("non_local", 7),
    ("attention", 1),
]
# sum, pre only, post only, both, concat, one pre-module per level, extra ReLU with and without.
OPTIONS = [
    *[(pre, NONE, "sum", True, False) for pre in MODULES],
    *[(NONE, post, "sum", True, False) for post in MODULES[1:]],
    (("conv", 5), ("attention", 1), "sum", True, True),  # GRoIE v1
    (("conv", 7), ("non_local", 7), "sum", True, False),  # GRoIE v2
    (NONE, NONE, "concat", True, False),
    (NONE, NONE, "concat", False, True),
    (("conv", 3), ("conv", 1), "concat", False, False),
    *[(pre, NONE, "sum", False, False) for pre in MODULES],
    (NONE, NONE, "sum", True, True),
    (NONE, ("conv", 3), "sum", True, True),
    (("non_local", 1), NONE, "sum", True, True),
    (("attention", 1), NONE, "sum", False, True),
]
IDS = [
    f"{pre[0]}{pre[1]}-{post[0]}{post[1]}-{aggregate}{'' if share else '-per_level'}"
    f"{'-relu' if relu else ''}"
    for pre, post, aggregate, share, relu in OPTIONS
]
every_option = pytest.mark.parametrize("option", OPTIONS, ids=IDS)


@pytest.fixture
def maps(make_maps) -> list[Tensor]:
    return list(make_maps().values())


@pytest.fixture
def boxes(make_boxes) -> list[Boxes]:
    return [make_boxes(3), make_boxes(4)]


@pytest.fixture
def make_groie(make_extractor, randomize):
    def make(option: tuple) -> nn.Module:
        pre, post, aggregate, share, relu = option
        extractor = make_extractor(
            "groie",
            *("MODEL.GROIE.PRE", pre[0], "MODEL.GROIE.PRE_KERNEL", pre[1]),
            *("MODEL.GROIE.POST", post[0], "MODEL.GROIE.POST_KERNEL", post[1]),
            *("MODEL.GROIE.AGGREGATE", aggregate, "MODEL.GROIE.SHARE_PRE", share),
            *("MODEL.GROIE.EXTRA_RELU", relu),
        )
        return randomize(extractor)

    return make


def pool_levels(maps: list[Tensor], boxes: list[Boxes], side: int = 7) -> list[Tensor]:
    rois = [
        torch.cat([torch.full((len(image), 1), float(n)), image.tensor], dim=1)
        for n, image in enumerate(boxes)
    ]
    return [
        roi_align(feature, torch.cat(rois), side, 1 / stride, sampling_ratio=2, aligned=True)
        for feature, stride in zip(maps, STRIDES, strict=True)
    ]


def convolve(conv: nn.Conv2d, x: Tensor, padding: int) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=padding).relu()


def reference_module(kind: str, kernel: int, module: nn.Module, x: Tensor) -> Tensor:
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if kind == "none":
        assert not list(module.parameters())
        return x
    if kind == "conv":
        (conv,) = convs
        assert conv.weight.shape == (8, 8, kernel, kernel)
        return convolve(conv, x, (kernel - 1) // 2)
    if kind == "rect":
        tall, wide = convs
        assert (tall.weight.shape[2:], wide.weight.shape[2:]) == ((7, 3), (3, 7))
        middle = convolve(tall, x, 1)
        assert middle.shape[2:] == (x.shape[2] - 4, x.shape[3])  # 7x7 -> 3x7
        return convolve(wide, middle, 3)
    # The blocks themselves are compared with their formulas in test_attention.py.
    if kind == "non_local":
        assert isinstance(module, NonLocal2d)
        assert {conv.kernel_size for conv in convs} == {(kernel, kernel)}
    else:
        assert isinstance(module, RelativePositionAttention)
        assert module.num_heads == 6
    return module(x)


def reference_groie(extractor: GenericRoIExtractor, option: tuple, pooled: list[Tensor]) -> Tensor:
    pre, post, aggregate, share, relu = option
    own = [extractor.pre] * 4 if share or pre == NONE else list(extractor.pre)
    assert len(own) == 4
    levels = [reference_module(*pre, own[level], x) for level, x in enumerate(pooled)]
    if relu:
        levels = [x.clamp(min=0) for x in levels]
    if aggregate == "sum":
        merged = levels[0] + levels[1] + levels[2] + levels[3]
    else:
        (reduce,) = (m for m in extractor.reduce.modules() if isinstance(m, nn.Conv2d))
        assert reduce.weight.shape == (8, 32, 1, 1)
        merged = convolve(reduce, torch.cat(levels, dim=1), 0)
    return reference_module(*post, extractor.post, merged)


@every_option
def test_groie_equals_its_definition(option, make_groie, maps, boxes):
    extractor = make_groie(option)
    out = extractor(maps, boxes)
    expected = reference_groie(extractor, option, pool_levels(maps, boxes))
    assert out.shape == (7, 8, 7, 7)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["rect", "attention"])
def test_modules_keep_the_14x14_of_the_mask_branch(kind, make_groie, maps, boxes):
    option = ((kind, 1), (kind, 1), "sum", True, False)
    extractor = make_groie(option)
    extractor.output_size = 14
    expected = reference_groie(extractor, option, pool_levels(maps, boxes, side=14))
    torch.testing.assert_close(extractor(maps, boxes), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ratio", "kind"), [(2, "ROIAlignV2"), (0, "ROIAlignV2"), (2, "ROIAlign")])
def test_single_is_detectron2s_pooler(ratio, kind, make_extractor, maps, boxes):
    extractor = make_extractor(
        "single",
        *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", ratio),
        *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", kind),
    )
    pooler = ROIPooler(7, [1 / stride for stride in STRIDES], ratio, kind)
    # Besides the random boxes: a box on each side of every change of level (112, 224, 448).
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 2000.0])
    squares = Boxes(torch.stack([sides * 0, sides * 0, sides, sides], dim=1))
    mixed = [boxes[0], Boxes.cat([boxes[1], squares])]
    assert extractor.assign_levels([squares]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    out, expected = extractor(maps, mixed), pooler(maps, mixed)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_selected_maps_have_their_channels_innermost():
    features = {name: torch.randn(2, 8, 6, 4) for name in ("p2", "p3", "p4")}
    with torch.autocast("cpu", dtype=torch.bfloat16):  # torchvision's operator follows
        assert all(m.is_contiguous() for m in select_maps(features, ["p2", "p3"]))
    maps = select_maps(features, ["p4", "p2"])
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    assert torch.equal(maps[0], features["p4"]) and torch.equal(maps[1], features["p2"])


def test_random_takes_one_level_per_box_anew_in_every_call(make_extractor, make_boxes, maps):
    extractor = make_extractor("random").eval()
    boxes = [make_boxes(20), make_boxes(20)]
    pooled = torch.stack(pool_levels(maps, boxes))
    picks = []
    for _ in range(2):
        close = torch.isclose(extractor(maps, boxes), pooled, rtol=1e-4, atol=1e-5)
        same = close.flatten(2).all(dim=2)  # (level, box)
        assert (same.sum(dim=0) == 1).all()
        picks.append(same.int().argmax(dim=0))
    assert len(picks[0].unique()) == 4
    assert (picks[0] != picks[1]).any()


def test_random_is_uniform(make_extractor):
    levels = make_extractor("random").assign_levels([Boxes(torch.zeros(2000, 4))] * 2)
    # Binomial(4000, 1/4): mean 1000, standard deviation 27.4; five of them either side.
    counts = levels.bincount(minlength=4)
    assert len(counts) == 4
    assert ((counts - 1000).abs() < 137).all()


@pytest.mark.parametrize("kind", ["single", "random"])
def test_single_level_extractors_without_boxes(kind, make_extractor, make_boxes, maps):
    extractor = make_extractor(kind)
    for feature in maps:
        feature.requires_grad_()
    empty = make_boxes(0)
    assert extractor(maps, [empty, make_boxes(3)]).shape == (3, 8, 7, 7)
    out = extractor(maps, [empty, empty])
    assert out.shape == (0, 8, 7, 7)
    out.sum().backward()
    assert all(feature.grad is not None and not feature.grad.any() for feature in maps)


@every_option
def test_groie_without_boxes(option, make_groie, make_boxes, maps):
    extractor = make_groie(option)
    some, none = make_boxes(3), make_boxes(0)
    with torch.no_grad():
        alone = extractor([feature[1:] for feature in maps], [some])
        torch.testing.assert_close(extractor(maps, [none, some]), alone, rtol=1e-4, atol=1e-5)
    for feature in maps:
        feature.requires_grad_()
    out = extractor(maps, [none, none])
    assert out.shape == (0, 8, 7, 7)
    out.sum().backward()
    for name, parameter in extractor.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert all(feature.grad is not None for feature in maps)


@every_option
def test_gradients_reach_every_level_and_parameter(option, make_groie, maps, boxes):
    extractor = make_groie(option)
    for feature in maps:
        feature.requires_grad_()
    extractor(maps, boxes).square().sum().backward()
    assert all(feature.grad.any() for feature in maps)
    for name, parameter in extractor.named_parameters():
        # phi's bias adds the same energy to all keys of a query; the softmax cancels it.
        if not name.endswith("phi.bias"):
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    "option",
    [
        "single",
        (NONE, NONE, "sum", True, False),
        (NONE, NONE, "concat", True, True),
        *[(("conv", 3), post, "sum", True, False) for post in MODULES],
        (("non_local", 1), NONE, "sum", False, False),
    ],
    ids=str,
)
def test_autocast_keeps_dtype_and_boxes(option, make_extractor, make_groie, make_boxes):
    extractor = make_extractor("single") if option == "single" else make_groie(option)
    maps = [torch.randn(1, 8, 1200 // stride, 1200 // stride) for stride in STRIDES]
    # bf16 counts in steps of 8 from 1024: boxes of at most 40 pixels would be far off.
    boxes = [Boxes(make_boxes(20, (40, 40)).tensor + 1041.3)]
    with torch.no_grad():
        exact = extractor(maps, boxes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = extractor([feature.bfloat16() for feature in maps], boxes)
    assert out.isfinite().all()
    # Rounding to 8 bits costs some tenths of a percent in each of a few steps.
    assert ((out.float() - exact).norm() / exact.norm()).item() < 0.02
    assert out.dtype == torch.bfloat16
