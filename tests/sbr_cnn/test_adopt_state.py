"""Weights of Detectron2's heads in the looped heads."""

import torch


def adopted(heads, source: dict) -> dict:
    state = {f"roi_heads.{name}": tensor for name, tensor in source.items()}
    heads.adopt_state(state, "roi_heads.")
    return {name.removeprefix("roi_heads."): tensor for name, tensor in state.items()}


def test_mask_r_cnn_goes_to_every_pair(make_loops, make_heads):
    source = make_heads(
        "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
        "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
    ).state_dict()  # fmt: skip
    heads = make_loops("aab")
    result = heads.load_state_dict(adopted(heads, source), strict=False)
    c1 = {f"pairs.{p}.mask_head.conv_res.{n}" for p in "ab" for n in ("weight", "bias")}
    assert set(result.missing_keys) == c1 and not result.unexpected_keys
    for pair in heads.pairs.values():
        for name in ("box_head.fc1.weight", "box_predictor.cls_score.bias", "mask_head.mask_fcn2.weight"):  # noqa: E501
            assert torch.equal(pair.get_parameter(name), source[name])


def test_stages_of_a_cascade_go_to_their_pairs(make_loops, make_heads):
    source = make_heads(
        "MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
        "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
    ).state_dict()  # fmt: skip
    heads = make_loops("ab")
    result = heads.load_state_dict(adopted(heads, source), strict=False)
    assert all("conv_res" in name for name in result.missing_keys)
    assert {name.split(".")[1] for name in result.unexpected_keys} == {"2"}  # no third pair
    for stage, pair in enumerate(heads.pairs.values()):
        for name in ("box_head{}.fc2.weight", "box_predictor{}.bbox_pred.weight"):
            expected = source[name.format(f".{stage}")]
            assert torch.equal(pair.get_parameter(name.format("")), expected)


def test_groie_s_extractors_and_other_names(make_loops, make_heads):
    groie = ("MODEL.ROI_BOX_HEAD.EXTRACTOR", "groie", "MODEL.ROI_MASK_HEAD.EXTRACTOR", "groie")
    source = make_heads(
        "MODEL.ROI_HEADS.NAME", "ExtractorROIHeads", *groie,
        "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.MASK_IOU_HEAD.ENABLED", True,
    ).state_dict()  # fmt: skip
    heads = make_loops("aa", *groie, "MODEL.MASK_IOU_HEAD.ENABLED", True)
    state = adopted(heads, {**source, "other.weight": torch.zeros(1)})
    result = heads.load_state_dict(state, strict=False)
    assert all("conv_res" in name for name in result.missing_keys)
    assert result.unexpected_keys == ["other.weight"]


def test_the_heads_own_weights_stay(make_loops):
    heads = make_loops("aab")
    source = heads.state_dict()
    assert list(adopted(heads, source)) == list(source)


def test_stages_without_a_pair_stay_and_are_reported(make_loops, make_heads):
    source = make_heads("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.MASK_ON", False)
    heads = make_loops("aaa", "MODEL.MASK_ON", False)
    result = heads.load_state_dict(adopted(heads, source.state_dict()), strict=False)
    assert not result.missing_keys
    stages = {name.split(".")[1] for name in result.unexpected_keys}
    assert stages == {"1", "2"}


def test_a_pair_that_looped_heads_lack_starts_as_their_first(make_loops):
    source, heads = make_loops("aaa").state_dict(), make_loops("aab")
    result = heads.load_state_dict(adopted(heads, source), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    for name, tensor in source.items():
        assert torch.equal(heads.state_dict()[name.replace("pairs.a.", "pairs.b.")], tensor)
