"""Small inputs and helpers that the tests of ``sbr_cnn`` share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_roi_heads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from sbr_cnn import add_sbr_cnn_config
from sbr_cnn.extractors import build_roi_extractor

CHANNELS = 8
STRIDES = (4, 8, 16, 32)
LEVELS = ("p2", "p3", "p4", "p5")
SIZE = (96, 128)  # height and width of the pictures; not square, so that a swap shows

# A looped head that builds in milliseconds. Lists of the keys as merge_from_list takes them.
TINY = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.MASK_ON", True),
    *("MODEL.ROI_HEADS.NAME", "LoopROIHeads"),
    *("MODEL.ROI_HEADS.IN_FEATURES", list(LEVELS)),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 3),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    *("MODEL.ROI_BOX_HEAD.NUM_FC", 2),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
    *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    *("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 1.0),
    *("MODEL.ROI_MASK_HEAD.NAME", "LoopMaskHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 2),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", CHANNELS),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14),
    *("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 2),
]


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """The tensors are tiny: on a busy machine a second thread costs ten times what it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def storage() -> Iterator[EventStorage]:
    """Detectron2's heads log into one while they train."""
    with EventStorage() as opened:
        yield opened


@pytest.fixture
def shapes() -> dict[str, ShapeSpec]:
    return {
        name: ShapeSpec(channels=CHANNELS, stride=stride)
        for name, stride in zip(LEVELS, STRIDES, strict=True)
    }


@pytest.fixture
def make_config() -> Callable[..., CfgNode]:
    """``make_config(KEY, VALUE, ...)``: the tiny looped head with some keys changed."""

    def make(*opts) -> CfgNode:
        cfg = get_cfg()
        add_sbr_cnn_config(cfg)
        cfg.merge_from_list(TINY)
        cfg.merge_from_list(list(opts))
        return cfg

    return make


@pytest.fixture
def make_extractor(make_config, shapes) -> Callable[..., nn.Module]:
    """``make_extractor("groie", KEY, VALUE, ...)``: the box branch's extractor."""

    def make(kind: str, *opts) -> nn.Module:
        cfg = make_config("MODEL.ROI_BOX_HEAD.EXTRACTOR", kind, *opts)
        return build_roi_extractor(cfg, "ROI_BOX_HEAD", shapes)

    return make


@pytest.fixture
def make_heads(make_config, shapes) -> Callable[..., nn.Module]:
    """``make_heads(KEY, VALUE, ...)``: the RoI heads that the keys describe."""
    return lambda *opts: build_roi_heads(make_config(*opts), shapes)


@pytest.fixture
def make_loops(make_heads) -> Callable[..., nn.Module]:
    """``make_loops(order, KEY, VALUE, ...)``: looped heads with rising IoUs and falling weights."""

    def make(order: str, *opts) -> nn.Module:
        loops = range(len(order))
        return make_heads(
            *("MODEL.ROI_LOOP_HEAD.ORDER", order),
            *("MODEL.ROI_LOOP_HEAD.IOUS", tuple(0.5 + 0.1 * t for t in loops)),
            *("MODEL.ROI_LOOP_HEAD.LOSS_WEIGHTS", tuple(1.0 - 0.25 * t for t in loops)),
            *opts,
        )

    return make


@pytest.fixture
def make_maps() -> Callable[..., dict[str, Tensor]]:
    """Random feature maps p2 to p5 of two pictures of ``SIZE``."""

    def make(num_images: int = 2, size: tuple[int, int] = SIZE) -> dict[str, Tensor]:
        return {
            name: torch.randn(num_images, CHANNELS, size[0] // stride, size[1] // stride)
            for name, stride in zip(LEVELS, STRIDES, strict=True)
        }

    return make


@pytest.fixture
def make_boxes() -> Callable[..., Boxes]:
    """``make_boxes(count)``: random boxes inside ``SIZE``, sides from 6 pixels to all of it."""

    def make(count: int, size: tuple[int, int] = SIZE) -> Boxes:
        extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
        start = torch.rand(count, 2) * (extent - 6)
        end = start + 6 + torch.rand(count, 2) * (extent - 6 - start)
        return Boxes(torch.cat([start, end], dim=1))

    return make


@pytest.fixture
def make_proposals(make_boxes) -> Callable[..., list[Instances]]:
    """``make_proposals(20, 0)``: that many random proposals in each picture."""

    def make(*counts: int) -> list[Instances]:
        return [
            Instances(
                SIZE, proposal_boxes=make_boxes(count), objectness_logits=torch.zeros(count)
            )
            for count in counts
        ]

    return make


@pytest.fixture
def make_targets() -> Callable[..., list[Instances]]:
    """``make_targets(3, 0)``: ground truth with bitmap masks; ellipses in random boxes."""

    def make(*counts: int) -> list[Instances]:
        return [_make_target(count) for count in counts]

    return make


def _make_target(count: int) -> Instances:
    target = Instances(SIZE)
    start = torch.rand(count, 2) * torch.tensor([80.0, 50.0])
    box = torch.cat([start, start + 16 + torch.rand(count, 2) * 24], dim=1)
    target.gt_boxes = Boxes(box)
    target.gt_classes = torch.randint(3, (count,))
    if count:
        y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
        center, radius = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]) / 2
        dx = (x + 0.5 - center[:, 0, None, None]) / radius[:, 0, None, None]
        dy = (y + 0.5 - center[:, 1, None, None]) / radius[:, 1, None, None]
        target.gt_masks = BitMasks(dx**2 + dy**2 <= 1)
    return target  # without masks when empty, as Detectron2's mapper leaves it


@pytest.fixture
def train_step(make_maps) -> Callable[..., dict[str, Tensor]]:
    """``train_step(heads, proposals, targets)``: the losses of one forward in training mode."""

    def step(
        heads: nn.Module,
        proposals: list[Instances],
        targets: list[Instances],
        maps: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        maps = make_maps(len(targets)) if maps is None else maps
        images = ImageList(torch.zeros(len(targets), 3, *SIZE), [SIZE] * len(targets))
        with EventStorage():
            return heads.train()(images, maps, proposals, targets)[1]

    return step


@pytest.fixture
def detect(make_maps) -> Callable[..., list[Instances]]:
    """``detect(heads, proposals)``: the detections of one forward in evaluation mode."""

    def run(
        heads: nn.Module, proposals: list[Instances], maps: dict[str, Tensor] | None = None
    ) -> list[Instances]:
        maps = make_maps(len(proposals)) if maps is None else maps
        images = ImageList(torch.zeros(len(proposals), 3, *SIZE), [SIZE] * len(proposals))
        with torch.no_grad():
            return heads.eval()(images, maps, proposals)[0]

    return run


@pytest.fixture
def randomize() -> Callable[[nn.Module], nn.Module]:
    """Replace every parameter, zero-initialised ones too, by noise of the scale of its fan-in."""

    def run(module: nn.Module, gain: float = 1.0) -> nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
                parameter.normal_(std=gain * fan_in**-0.5)
        return module

    return run
