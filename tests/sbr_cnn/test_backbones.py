"""BatchNorm with fixed statistics, and timm models under an FPN."""

import logging

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch import Tensor, nn

from sbr_cnn.backbones import TimmBackbone
from sbr_cnn.config_checks import check_sbr_cnn_config
from sbr_cnn.resnet import FrozenStatsBatchNorm2d

RGB = ShapeSpec(channels=3)
LITE = "tf_efficientnet_lite0"
SWIN = "swin_tiny_patch4_window7_224"
STAGES = ("res2", "res3", "res4", "res5")


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
        out: tuple[str, ...] = STAGES,
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


# The ViTs: with a class token, with a register, with attention pooling before the classifier.
@pytest.mark.parametrize(
    ("name", "out"),
    [
        (LITE, STAGES),
        (LITE, ("res3", "res4")),
        ("test_convnext", STAGES),
        ("test_convnext", ("res3", "res4")),
        (SWIN, STAGES),
        *((f"test_vit{version}", ("res4",)) for version in ("", 2, 3)),
    ],
)
def test_timm_has_no_parameters_that_its_outputs_do_not_use(name, out, make_timm):
    """Multi-GPU training stops at trainable parameters that get no gradient."""
    model = make_timm(name, out=out, device="cpu")
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
        (SWIN, ("patch_embed.",), ("layers_0.",)),
    ],
)
def test_timm_freezes_up_to_the_stage(name, stem, second, make_timm):
    zero, one, two, five = (make_timm(name, freeze_at) for freeze_at in (0, 1, 2, 5))
    assert not [p for p in five.body.parameters() if p.requires_grad]

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
    with pytest.raises(ValueError, match=r"MODEL.TIMM.NAME: .* 'convnext_ato'; near:.*_atto"):
        make_timm("convnext_ato")


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


def test_timm_plain_vit_has_no_stage_to_freeze(make_timm):
    for freeze_at in (1, 2):
        with pytest.raises(ValueError, match=f"MODEL.BACKBONE.FREEZE_AT {freeze_at}.*0 trains"):
            make_timm("test_vit", freeze_at=freeze_at, out=("res4",))


def test_timm_model_of_one_size(make_timm):
    """An MLP-Mixer mixes a fixed number of patches."""
    with pytest.raises(ValueError, match="MODEL.TIMM.NAME: mixer_s16_224 .*one size.*convnext"):
        make_timm("mixer_s16_224", out=("res4",))


# Neither square nor multiples of Swin's windows (7 patches of 4 pixels).
SIZES = [(64, 96), (160, 32)]


@pytest.fixture(scope="module")
def swin() -> TimmBackbone:
    pytest.importorskip("timm", reason="timm is not installed (extra 'small')")
    torch.manual_seed(0)
    return TimmBackbone(name=SWIN, in_channels=3, out_features=list(STAGES), freeze_at=0).eval()


@pytest.mark.parametrize("size", SIZES)
def test_swin_is_timms_for_pictures_of_that_size(size, swin):
    """timm's, built for one size, has masks made for it; ours makes them anew for each."""
    import timm

    fixed = timm.create_model(SWIN, features_only=True, img_size=size, always_partition=True)
    fixed.load_state_dict(swin.body.state_dict())
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps, expected = swin(x), fixed.eval()(x)
    for name, theirs in zip(STAGES, expected, strict=True):
        norm = swin.map_norms[name]
        mean, var = theirs.mean(-1, keepdim=True), theirs.var(-1, unbiased=False, keepdim=True)
        theirs = (theirs - mean) / (var + 1e-6).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(maps[name], theirs.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


def test_swin_shifts_the_windows_of_every_other_block(swin):
    """Also in the last stage, all of which is one window in the pictures of its pretraining."""
    blocks = [m for m in swin.modules() if type(m).__name__ == "SwinTransformerBlock"]
    # Depths 2, 2, 6, 2; half a window of 7.
    assert [tuple(block.shift_size) for block in blocks] == [(0, 0), (3, 3)] * 6


@pytest.mark.parametrize("size", SIZES)
def test_plain_vit_is_timms_resized_to_that_size(size, make_timm):
    import timm

    ours = make_timm("test_vit", out=("res4",), device="cpu").eval()
    assert ours.plain
    fixed = timm.create_model("test_vit", num_classes=0, dynamic_img_size=False)
    fixed.load_state_dict(ours.body.model.state_dict(), strict=False)
    fixed.set_input_size(img_size=size)  # its position embedding becomes another parameter
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = fixed.eval().forward_intermediates(x, indices=1, intermediates_only=True)[0]
        (result,) = ours(x).values()
    assert result.shape == (2, 64, size[0] // 16, size[1] // 16)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "out", "normed"),
    [
        ("convnext_atto", STAGES, STAGES),
        (SWIN, ("res3", "res4"), ("res3", "res4")),
        (LITE, STAGES, ()),
        ("resnet18", STAGES, ()),
        ("vgg11", STAGES, ()),
        ("test_vit", ("res4",), ()),  # its pyramid has norms
    ],
)
def test_timm_norms_of_maps(name, out, normed, make_timm):
    """LayerNorm nets alone: BatchNorm's end their stages with what FPN expects."""
    assert tuple(make_timm(name, out=out).map_norms) == normed


# ---- weights that timm saved ----


@pytest.mark.parametrize(
    "prefixes", [("",), ("backbone.bottom_up.",), ("student.x.", "teacher.x.")]
)
@pytest.mark.parametrize(
    ("name", "out"),
    [("convnext_atto", STAGES), (SWIN, STAGES), (LITE, STAGES), ("test_vit", ("res4",))],
)
def test_timms_own_checkpoint_is_renamed(name, out, prefixes, make_timm):
    import timm

    model = make_timm(name, out=out)
    with torch.device("meta"):
        source = timm.create_model(name).state_dict()
    # As TeacherStudentRCNN hands a plain detector's tensors to both.
    roots = [p.split(".")[0] + "." for p in prefixes] if len(prefixes) > 1 else [""]
    state = {root + key: tensor for root in roots for key, tensor in source.items()}
    for prefix in prefixes:
        model.adopt_state(state, prefix)
    wanted = model.body.state_dict()
    for prefix in prefixes:
        for key, tensor in wanted.items():
            assert state[f"{prefix}body.{key}"].shape == tensor.shape, key
    # What is left belongs to the classifier, and to its norm.
    rest = set(state) - {f"{prefix}body.{key}" for prefix in prefixes for key in wanted}
    assert rest
    parts = {key.removeprefix("student.").removeprefix("teacher.").split(".")[0] for key in rest}
    assert parts <= {"head", "norm", "conv_head", "bn2", "classifier"}


def test_values_of_timms_checkpoint_arrive(make_timm):
    import timm

    source = timm.create_model("test_convnext")
    model = make_timm("test_convnext", device="cpu")
    state = source.state_dict()
    model.adopt_state(state, "")
    result = model.load_state_dict(state, strict=False)
    assert {key.split(".")[0] for key in result.missing_keys} == {"map_norms"}
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        _, expected = source.eval().forward_intermediates(x)
        for ours, theirs in zip(model.eval().body(x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_detectors_own_checkpoint_stays(make_timm):
    model = make_timm("test_convnext")
    state = {f"backbone.bottom_up.{key}": value for key, value in model.state_dict().items()}
    before: dict[str, Tensor] = dict(state)
    model.adopt_state(state, "backbone.bottom_up.")
    assert list(state) == list(before)


# ---- from the configuration ----


@pytest.fixture
def timm_config(make_config):
    """``timm_config(name, pyramid, KEY, VALUE, ...)``."""
    pytest.importorskip("timm", reason="timm is not installed (extra 'small')")

    def make(name: str, pyramid: str, *opts):
        return make_config(
            *("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.TIMM.NAME", name, "MODEL.TIMM.PYRAMID", pyramid),
            *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.FPN.IN_FEATURES", list(STAGES)),
            *("MODEL.RESNETS.OUT_FEATURES", list(STAGES)),
            *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
            *opts,
        )

    return make


@pytest.mark.parametrize(
    ("name", "pyramid"), [("test_convnext", "fpn"), (SWIN, "fpn"), ("test_vit", "simple")]
)
def test_maps_of_pictures_of_any_size(name, pyramid, timm_config):
    with torch.device("meta"):
        model = build_backbone(timm_config(name, pyramid), RGB)
    assert model.size_divisibility == 32
    for h, w in SIZES:
        maps = model(torch.zeros(2, 3, h, w, device="meta"))
        sizes = {f"p{i}": (2, 8, h // 2**i, w // 2**i) for i in range(2, 6)}
        sizes["p6"] = (2, 8, -(-h // 64), -(-w // 64))
        assert {key: tuple(x.shape) for key, x in maps.items()} == sizes


@pytest.mark.parametrize(
    ("name", "pyramid", "message"),
    [
        (
            "test_vit",
            "fpn",
            "OUT_FEATURES.*test_vit has strides .16.*a plain ViT needs MODEL.TIMM.PYRAMID simple",
        ),
        ("test_convnext", "simple", "PYRAMID is simple.*test_convnext has strides .4, 8.*fpn"),
        ("test_convnext", "bifpn", "MODEL.TIMM.PYRAMID is 'bifpn'; write fpn, or simple"),
        ("test_vitt", "simple", "MODEL.TIMM.NAME.*no 'test_vitt'"),
        ("vit_base_patch32_224", "simple", "res4 alone.*vit_base_patch32_224 has strides .32"),
    ],
)
def test_pyramid_and_model_that_do_not_go_together(name, pyramid, message, timm_config):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_backbone(timm_config(name, pyramid), RGB)


def test_checks_of_the_simple_pyramid(timm_config, caplog):
    with caplog.at_level(logging.WARNING):
        check_sbr_cnn_config(timm_config("test_vit", "simple"))
    assert caplog.messages == []
    freeze = ("MODEL.BACKBONE.FREEZE_AT", 2)
    with pytest.raises(ValueError, match="MODEL.BACKBONE.FREEZE_AT is 2.*simple.*write 0"):
        check_sbr_cnn_config(timm_config("test_vit", "simple", *freeze))
    check_sbr_cnn_config(timm_config("test_convnext", "fpn", *freeze))
    # GN's 32 groups would not go into 8 channels, but nothing builds them.
    check_sbr_cnn_config(timm_config("test_vit", "simple", "MODEL.FPN.NORM", "GN"))
    (text,) = caplog.messages
    assert text.startswith("Not read: MODEL.FPN.NORM GN, because MODEL.TIMM.PYRAMID is simple")


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
