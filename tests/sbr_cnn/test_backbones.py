"""BatchNorm with fixed statistics, and timm models under an FPN."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from sbr_cnn.backbones import TimmBackbone
from sbr_cnn.resnet import FrozenStatsBatchNorm2d

RGB = ShapeSpec(channels=3)
LITE = "tf_efficientnet_lite0"


# ---- FrozenStatsBN ----


@pytest.fixture
def make_resnet(make_config):
    """A ResNet-18-FPN with random BatchNorm statistics."""

    def make(norm: str, freeze_at: int = 2) -> nn.Module:
        cfg = make_config(
            *("MODEL.BACKBONE.NAME", "build_norm_resnet_fpn_backbone"),
            *("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.FPN.OUT_CHANNELS", 8),
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.RESNETS.NORM", norm),
        )
        model = build_backbone(cfg, RGB)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.uniform_(-0.1, 0.1)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        return model

    return make


def test_frozen_stats_normalises_with_its_buffers_in_training():
    norm = FrozenStatsBatchNorm2d(3).train()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.0, 0.5, 1.0]))
        norm.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
        norm.running_var.copy_(torch.tensor([1.0, 4.0, 0.25]))
    x = torch.randn(2, 3, 4, 4)
    out = norm(x)
    for c, (weight, bias, mean, var) in enumerate(
        [(1.0, 0.0, 0.1, 1.0), (2.0, 0.5, -0.2, 4.0), (-1.0, 1.0, 0.3, 0.25)]
    ):
        expected = (x[:, c] - mean) / (var + 1e-5) ** 0.5 * weight + bias
        torch.testing.assert_close(out[:, c], expected)


def test_training_leaves_the_statistics_and_reaches_the_affine(make_resnet):
    model = make_resnet("FrozenStatsBN").train()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, FrozenStatsBatchNorm2d)}
    # Two blocks of two norms per stage and one of the shortcut, in res3 to res5.
    assert len(norms) == 3 * 5
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.randn(2, 3, 64, 64)
    outputs = model(x)
    sum(out.square().sum() for out in outputs.values()).backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    for name, norm in norms.items():
        assert norm.weight.grad.any() and norm.bias.grad.any(), name
    for name, out in model.eval()(x).items():
        torch.testing.assert_close(out, outputs[name])


def test_frozen_stages_are_frozen_whole(make_resnet):
    model = make_resnet("FrozenStatsBN", freeze_at=2)
    frozen = [model.bottom_up.stem, model.bottom_up.res2]
    assert not [p for stage in frozen for p in stage.parameters() if p.requires_grad]
    assert all(p.requires_grad for p in model.bottom_up.res3.parameters())
    everything = make_resnet("FrozenStatsBN", freeze_at=0)
    assert all(p.requires_grad for p in everything.parameters())


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_other_norms_are_detectron2s(norm, make_resnet):
    model = make_resnet(norm)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    kind = FrozenBatchNorm2d if norm == "FrozenBN" else nn.GroupNorm
    assert any(isinstance(m, kind) for m in model.bottom_up.res5.modules())


def test_norm_choices_share_their_checkpoint(make_resnet):
    """Weights of one load into the other, apart from nn.BatchNorm2d's step counter."""
    frozen, trainable = make_resnet("FrozenBN"), make_resnet("FrozenStatsBN")
    missing, unexpected = trainable.load_state_dict(frozen.state_dict(), strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name, out in frozen(x).items():
            torch.testing.assert_close(trainable(x)[name], out, rtol=1e-4, atol=1e-4)


def test_convert_leaves_subclasses_alone():
    class Special(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(2), Special(2), nn.GroupNorm(1, 2))
    assert FrozenStatsBatchNorm2d.convert(model) is model
    assert [type(m) for m in model] == [FrozenStatsBatchNorm2d, Special, nn.GroupNorm]
    assert [m.training for m in model] == [False, True, True]


# ---- timm ----


@pytest.fixture
def make_timm():
    """Without values (on the meta device) unless asked: most tests look at structure only."""
    pytest.importorskip("timm", reason="timm is not installed (extra 'small')")

    def make(
        name: str = LITE,
        freeze_at: int = 0,
        out: tuple[str, ...] = ("res2", "res3", "res4", "res5"),
        device: str = "meta",
    ) -> TimmBackbone:
        with torch.device(device):
            return TimmBackbone(
                name=name, in_channels=3, out_features=list(out), freeze_at=freeze_at
            )

    return make


def frozen_names(model: TimmBackbone) -> set[str]:
    """Frozen parameters outside BatchNorm, which is always frozen."""
    norms = {
        f"{name}.{part}"
        for name, module in model.body.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    named = model.body.named_parameters()
    return {name for name, p in named if not p.requires_grad} - norms


def test_timm_channels_and_strides(make_timm):
    model = make_timm()
    # The widths of EfficientNet-Lite0's stages, as its paper and design 9 list them.
    widths = {"res2": 24, "res3": 40, "res4": 112, "res5": 320}
    strides = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    assert {n: (s.channels, s.stride) for n, s in model.output_shape().items()} == {
        name: (widths[name], strides[name]) for name in widths
    }
    maps = model(torch.zeros(1, 3, 64, 96, device="meta"))
    assert {name: tuple(x.shape) for name, x in maps.items()} == {
        name: (1, widths[name], 64 // s, 96 // s) for name, s in strides.items()
    }


@pytest.mark.parametrize("out", [("res2", "res3", "res4", "res5"), ("res3", "res4")])
def test_timm_has_no_parameters_that_its_outputs_do_not_use(out, make_timm):
    """Multi-GPU training stops at trainable parameters that get no gradient."""
    model = make_timm(out=out, device="cpu")
    maps = model(torch.randn(1, 3, 64, 64))
    assert tuple(maps) == tuple(model.output_shape()) == out
    sum(x.square().sum() for x in maps.values()).backward()
    named = model.named_parameters()
    assert not [name for name, p in named if p.requires_grad and p.grad is None]


def test_timm_batchnorm_is_frozen_in_training(make_timm):
    model = make_timm(device="cpu").train()
    assert model.training
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert not norm.training
        assert not norm.weight.requires_grad and not norm.bias.requires_grad
    before = [buffer.clone() for buffer in model.buffers()]
    model(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


# What a prefix freezes. Lite0: block 0 has stride 2, block 1 stride 4. ResNet-18: layer1 has
# stride 4. ConvNeXt has no BatchNorm, and its first stage is the stride-4 one.
@pytest.mark.parametrize(
    ("name", "stem", "second"),
    [
        (LITE, ("conv_stem.", "blocks.0."), ("blocks.1.",)),
        ("resnet18", ("conv1.",), ("layer1.",)),
        ("convnext_atto", ("stem_",), ("stages_0.",)),
    ],
)
def test_timm_freezes_up_to_the_stage(name, stem, second, make_timm):
    zero, one, two, five = (make_timm(name, freeze_at) for freeze_at in (0, 1, 2, 5))
    assert not [p for p in five.parameters() if p.requires_grad]

    def starting_with(prefixes: tuple[str, ...]) -> set[str]:
        return {n for n in frozen_names(five) if n.startswith(prefixes)}

    assert starting_with(stem) and starting_with(second)
    assert frozen_names(zero) == set()
    assert frozen_names(one) == starting_with(stem)
    assert frozen_names(two) == starting_with(stem + second)


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3])
def test_timm_gradients_stop_where_frozen(freeze_at, make_timm):
    maps = make_timm(freeze_at=freeze_at)(torch.zeros(1, 3, 64, 64, device="meta"))
    needs = {name: x.requires_grad for name, x in maps.items()}
    assert needs == {f"res{i}": i > freeze_at or freeze_at < 2 for i in range(2, 6)}


def test_timm_unknown_model(make_timm):
    with pytest.raises(ValueError, match="MODEL.TIMM.NAME.*no_such_lite0.*lite0"):
        make_timm("no_such_lite0")


def test_timm_unknown_feature(make_timm):
    with pytest.raises(ValueError, match="MODEL.RESNETS.OUT_FEATURES.*res6"):
        make_timm(out=("res2", "res6"))


def test_timm_freeze_at_beyond_the_stages(make_timm):
    with pytest.raises(ValueError, match="MODEL.BACKBONE.FREEZE_AT"):
        make_timm(freeze_at=6)


def test_timm_stage_without_parameters_to_freeze(make_timm):
    """VGG reaches stride 4 in a pooling layer: there is no stage by that name to freeze."""
    with pytest.raises(ValueError, match="MODEL.BACKBONE.FREEZE_AT"):
        make_timm("vgg11", freeze_at=2)


def test_timm_channels_last_models_are_turned_or_refused(make_timm):
    """Swin's maps are (N, H, W, C)."""
    try:
        model = make_timm("swin_tiny_patch4_window7_224")
    except ValueError as error:
        assert "MODEL.TIMM.NAME" in str(error)
        return
    maps = model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert maps["res5"].shape == (1, 768, 7, 7)


def test_timm_fpn_from_the_configuration(make_config):
    pytest.importorskip("timm", reason="timm is not installed (extra 'small')")
    cfg = make_config(
        *("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", LITE),
        *("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.FPN.OUT_CHANNELS", 8),
        *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
        *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
    )
    model = build_backbone(cfg, RGB)
    assert {n: (s.channels, s.stride) for n, s in model.output_shape().items()} == {
        f"p{i}": (8, 2**i) for i in range(2, 7)
    }
    assert frozen_names(model.bottom_up)
    maps = model(torch.zeros(1, 3, 64, 64))
    assert [maps[f"p{i}"].shape[-1] for i in range(2, 7)] == [16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    "key", ["MODEL.GC_BLOCK.ON_PER_STAGE", "MODEL.RESNETS.DEFORM_ON_PER_STAGE"]
)
def test_timm_models_get_no_blocks_of_resnets(key, make_config):
    cfg = make_config("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", key, [False] * 3 + [True])
    with pytest.raises(ValueError, match=f"{key} .*build_timm_fpn_backbone.*False"):
        build_backbone(cfg, RGB)
