"""ConvNeXt, Swin and a plain ViT under R3-CNN and SBR-CNN: the configurations, trained and counted.

Trained are small networks of the same families, built by the same files.
"""

from pathlib import Path

import pytest

pytest.importorskip("timm", reason="timm is not installed (extra 'small')")

import timm
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from il_net.checkpoint import Checkpointer
from il_net.config import load_config
from sbr_cnn import add_sbr_cnn_config
from sbr_cnn.config_checks import check_sbr_cnn_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "backbones"
HEADS = ("r3_cnn", "sbr_cnn")
# timm's small ones; of Swin there is none, so that one is built narrower.
SMALL = {"convnext_tiny": "test_convnext", "swin_tiny": None, "vit_base": "test_vit"}
NARROW_SWIN = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 4)}
CLASSES = 3

TINY = [
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[8],[16],[32],[64],[96]]"),
    *("MODEL.RPN.CONV_DIMS", "[16]", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "30"),
    # So many that some are of the coarse levels, which then learn in every step.
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "2048"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "1"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    *("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", "1"),
]


def load(heads: str, backbone: str, *opts: str) -> CfgNode:
    opts = ("MODEL.ROI_HEADS.NUM_CLASSES", str(CLASSES), *opts)
    return load_config(str(CONFIGS / f"{heads}_{backbone}.yaml"), list(opts), add_sbr_cnn_config)


@pytest.fixture
def make_small(monkeypatch):
    """``make_small("r3_cnn", "swin_tiny")``: that file's model, a hundredth as large."""

    def make(heads: str, backbone: str, *opts: str) -> nn.Module:
        name, create = SMALL[backbone], timm.create_model
        if name:
            opts += ("MODEL.TIMM.NAME", name)
        else:
            monkeypatch.setattr(
                timm, "create_model", lambda *a, **k: create(*a, **k, **NARROW_SWIN)
            )
        return build_model(load(heads, backbone, *TINY, *opts)).train()

    return make


def make_record(height: int, width: int) -> dict:
    """A noisy picture with a bright ellipse of each class, in the class's own colour."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image, boxes, masks = torch.rand(3, height, width) * 60, [], []
    for label in range(CLASSES):
        cx, cy = width * (1 + 2 * label) / 6, height * (1 + label) / 4
        rx, ry = width / 8, height / (5 + label)
        mask = ((x + 0.5 - cx) / rx) ** 2 + ((y + 0.5 - cy) / ry) ** 2 <= 1
        image[label][mask] += 180
        boxes.append([cx - rx, cy - ry, cx + rx, cy + ry])
        masks.append(mask)
    instances = Instances((height, width))
    instances.gt_boxes, instances.gt_masks = (
        Boxes(torch.tensor(boxes)),
        BitMasks(torch.stack(masks)),
    )
    instances.gt_classes = torch.arange(CLASSES)
    return {"image": image, "height": height, "width": width, "instances": instances}


def total_loss(model: nn.Module, batch: list[dict]) -> Tensor:
    with EventStorage():
        losses = model(batch)
    for name, loss in losses.items():
        assert loss.isfinite(), name
    return sum(losses.values())


@pytest.mark.parametrize("backbone", SMALL)
@pytest.mark.parametrize("heads", HEADS)
def test_a_few_steps_lower_the_loss(heads, backbone, make_small):
    torch.manual_seed(0)
    model = make_small(heads, backbone)
    # Of two shapes, neither square; together they are padded to 128 x 128.
    batch = [make_record(96, 128), make_record(128, 64)]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == len(list(model.parameters()))
    optimizer = torch.optim.SGD(trainable.values(), lr=0.02, momentum=0.9)

    def fixed_sample_loss() -> float:
        torch.manual_seed(1)
        with torch.no_grad():
            return total_loss(model, batch).item()

    before = fixed_sample_loss()
    for step in range(8):
        optimizer.zero_grad()
        total_loss(model, batch).backward()
        if step == 0:
            assert not [name for name, p in trainable.items() if p.grad is None]
            backbone_grads = {n: p.grad for n, p in trainable.items() if n.startswith("backbone.")}
            assert not [name for name, grad in backbone_grads.items() if not grad.any()]
        nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()
    assert fixed_sample_loss() < 0.8 * before
    # Another size than those trained on.
    with torch.no_grad():
        (result,) = model.eval()([make_record(64, 160)])
    assert result["instances"].image_size == (64, 160)


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "TeacherStudentRCNN"])
@pytest.mark.parametrize("backbone", SMALL)
def test_weights_that_timm_saved_load(backbone, architecture, make_small, tmp_path):
    """As the files say that one gets them."""
    model = make_small("r3_cnn", backbone, "MODEL.META_ARCHITECTURE", architecture)
    source = timm.create_model(SMALL[backbone] or load("r3_cnn", backbone).MODEL.TIMM.NAME)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    checkpointer = Checkpointer(model)
    checkpointer.load(str(tmp_path / "weights.pth"))
    assert not [name for name in checkpointer.report.missing if ".bottom_up.body." in name]
    detectors = [model] if architecture == "GeneralizedRCNN" else [model.student, model.teacher]
    for detector in detectors:
        # In the networks' order; what timm's has more comes last: norm and classifier.
        loaded = list(detector.backbone.bottom_up.body.parameters())
        for ours, theirs in zip(loaded, source.parameters(), strict=False):
            assert torch.equal(ours, theirs)


# ---- the full size ----


@pytest.mark.parametrize("backbone", SMALL)
@pytest.mark.parametrize("heads", HEADS)
def test_checks_have_nothing_to_say(heads, backbone, caplog):
    check_sbr_cnn_config(load(heads, backbone))
    assert caplog.messages == []


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def fpn_size(widths: tuple[int, ...], c: int = 256) -> int:
    """A 1x1 convolution from each width and a 3x3 one, with biases."""
    return sum(width * c + c + 9 * c * c + c for width in widths)


def simple_pyramid_size(d: int, c: int = 256) -> int:
    """Deconvolutions with biases and a LayerNorm between two; convolutions without, LayerNorms."""
    p2 = (4 * d * d // 2 + d // 2) + 2 * d // 2 + (4 * d // 2 * d // 4 + d // 4)
    p3 = 4 * d * d // 2 + d // 2
    widths = (d // 4, d // 2, d, d)
    return p2 + p3 + sum(width * c + 2 * c + 9 * c * c + 2 * c for width in widths)


# RPN and RoI heads of K = 80: the thesis' models (Tables 2.11, row 4, and 2.20, row 4) without
# their ResNet-50, of which res3 to res5 train, and its FPN.
THESIS = {"r3_cnn": 43_912_884, "sbr_cnn": 61_800_708}
STAGE_WIDTHS = (96, 192, 384, 768)  # of ConvNeXt-T and of Swin-T


@pytest.mark.parametrize(
    ("backbone", "extra"),
    [
        # FPN, and a LayerNorm on each of its inputs.
        ("convnext_tiny", fpn_size(STAGE_WIDTHS) + 2 * sum(STAGE_WIDTHS)),
        ("swin_tiny", fpn_size(STAGE_WIDTHS) + 2 * sum(STAGE_WIDTHS)),
        ("vit_base", simple_pyramid_size(768)),
    ],
)
@pytest.mark.parametrize("heads", HEADS)
def test_trainable_parameters(heads, backbone, extra):
    cfg = load(heads, backbone, "MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        model = build_model(cfg)
        body = timm.create_model(cfg.MODEL.TIMM.NAME, num_classes=0)
        resnet = torchvision.models.resnet50()
    resnet_size = sum(count(stage) for stage in (resnet.layer2, resnet.layer3, resnet.layer4))
    heads_size = THESIS[heads] - resnet_size - fpn_size((256, 512, 1024, 2048))
    last_norm = 2 * 768  # before the classifier that there is not
    assert count(model) == count(body) - last_norm + extra + heads_size


def test_timms_networks_have_the_published_sizes():
    """Liu et al. 2022 and 2021, Dosovitskiy et al. 2021: 29, 28 and 86 million with classifier."""
    for backbone, millions in (("convnext_tiny", 29), ("swin_tiny", 28), ("vit_base", 86)):
        with torch.device("meta"):
            network = timm.create_model(load("r3_cnn", backbone).MODEL.TIMM.NAME)
        assert round(count(network) / 1e6) in (millions, millions + 1)
