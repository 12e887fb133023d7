"""Parameter counts, initialisation and mistakes in the configuration of the extractors."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from sbr_cnn.extractors import GenericRoIExtractor, build_roi_extractor

NONE = ("none", 1)


# Methods 2.3 at 256 channels; GRoIE v1 and v2 are sums of two of its rows.
@pytest.mark.parametrize(
    ("pre", "post", "aggregate", "share", "count"),
    [
        (NONE, NONE, "sum", True, 0),
        (NONE, NONE, "concat", True, 262_400),
        (NONE, ("conv", 1), "sum", True, 65_792),
        (("conv", 1), NONE, "sum", True, 65_792),
        (("conv", 3), NONE, "sum", True, 590_080),
        (("conv", 5), NONE, "sum", True, 1_638_656),
        (NONE, ("conv", 7), "sum", True, 3_211_520),
        (("rect", 1), NONE, "sum", True, 2_753_024),
        (NONE, ("rect", 1), "sum", True, 2_753_024),
        (NONE, ("non_local", 1), "sum", True, 131_712),
        (NONE, ("non_local", 7), "sum", True, 6_423_168),
        (NONE, ("attention", 1), "sum", True, 258_305),
        (("conv", 5), ("attention", 1), "sum", True, 1_896_961),
        (("conv", 7), ("non_local", 7), "sum", True, 9_634_688),
        (("conv", 7), ("non_local", 7), "sum", False, 19_269_248),
    ],
)
def test_parameter_counts_at_256_channels(pre, post, aggregate, share, count):
    with torch.device("meta"):
        extractor = GenericRoIExtractor(
            channels=256,
            pre=pre,
            post=post,
            aggregate=aggregate,
            share_pre=share,
            output_size=7,
            strides=(4, 8, 16, 32),
            sampling_ratio=2,
            aligned=True,
        )
    assert sum(p.numel() for p in extractor.parameters() if p.requires_grad) == count


def test_convolutions_start_kaiming_normal(make_config):
    cfg = make_config(
        *("MODEL.ROI_BOX_HEAD.EXTRACTOR", "groie", "MODEL.GROIE.PRE_KERNEL", 3),
        *("MODEL.GROIE.POST", "none", "MODEL.GROIE.AGGREGATE", "concat"),
    )
    wide = {f"p{i}": ShapeSpec(channels=64, stride=2**i) for i in range(2, 6)}
    extractor = build_roi_extractor(cfg, "ROI_BOX_HEAD", wide)
    pre, reduce = (m for m in extractor.modules() if isinstance(m, nn.Conv2d))
    for conv, fan_out in ((pre, 64 * 9), (reduce, 64)):
        # At least 16,384 draws: the standard error of the deviation is 0.6 %.
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
        assert not conv.bias.any()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ROI_BOX_HEAD.EXTRACTOR", "all"),
        ("MODEL.GROIE.PRE", "convolution"),
        ("MODEL.GROIE.POST", "Attention"),
        ("MODEL.GROIE.PRE_KERNEL", 4),
        ("MODEL.GROIE.POST_KERNEL", 2),
        ("MODEL.GROIE.AGGREGATE", "mean"),
    ],
)
def test_bad_values_name_their_key(key, value, make_extractor):
    node, name = key.rsplit(".", 1)
    with pytest.raises(ValueError, match=rf"{name}\b.*{value}") as error:
        make_extractor("groie", key, value)
    assert node in str(error.value)


def test_unknown_pooler_type(make_extractor):
    with pytest.raises(ValueError, match="POOLER_TYPE.*ROIPool'"):
        make_extractor("groie", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool")


def test_levels_of_unequal_width(make_config, shapes):
    cfg = make_config()
    shapes["p4"] = ShapeSpec(channels=16, stride=16)
    with pytest.raises(ValueError, match="MODEL.ROI_HEADS.IN_FEATURES"):
        build_roi_extractor(cfg, "ROI_BOX_HEAD", shapes)


def test_levels_that_leave_one_out(make_extractor):
    """The size rule counts levels by powers of two: a gap would leave boxes without features."""
    with pytest.raises(ValueError, match="MODEL.ROI_HEADS.IN_FEATURES"):
        make_extractor("single", "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p4"])
