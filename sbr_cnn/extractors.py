"""RoI extractors: by size, at random, or from every FPN level (GRoIE).

Thesis section 2.1 (Fig. 2.3) and 2.3.5: GRoIE pools every box from all FPN levels, passes each
through a pre-processing module, aggregates them and passes the result through a post-processing
module. All extractors take what Detectron2's ``ROIPooler`` takes and return what it returns.

Shape shorthand: L levels, N images, R boxes of all images, C channels, S the pooled side.
"""

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import assign_boxes_to_levels, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from .attention import NonLocal2d, RelativePositionAttention
from .roi_align import bag_roi_align
from .roi_convs import conv_relu, has_cpu_path, rectangular_pair

EXTRACTORS = ("single", "random", "groie")
MODULES = ("none", "conv", "rect", "non_local", "attention")
AGGREGATES = ("sum", "concat")


def select_maps(features: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    """The maps that extractors pool from; on the CPU in the memory format that is read fastest."""
    maps = [features[name] for name in names]
    return [
        m.contiguous(memory_format=torch.channels_last) if has_cpu_path(m) else m for m in maps
    ]


class RoIExtractor(nn.Module):
    """Pools boxes from feature maps with RoIAlign; subclasses say from which levels.

    Args:
        output_size: S.
        strides: input pixels per feature pixel, finest level first; powers of two.
        sampling_ratio: samples per bin and axis; 0 means as many as the bin has pixels.
        aligned: RoIAlign with the half-pixel shift (Detectron2's "ROIAlignV2").
    """

    def __init__(
        self, *, output_size: int, strides: tuple[int, ...], sampling_ratio: int, aligned: bool
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.strides = strides
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def pool(self, feature: Tensor, rois: Tensor, level: int) -> Tensor:
        """RoIAlign of one level: (N, C, H, W) and (R, 5) to (R, C, S, S).

        ``rois`` stay in fp32 under autocast (torchvision casts the features instead): a bf16
        coordinate is off by up to 4 pixels at 1000.
        """
        autocast = torch.is_autocast_enabled(feature.device.type)
        align = bag_roi_align if has_cpu_path(feature) else roi_align
        return align(
            feature,
            rois if autocast else rois.to(feature.dtype),
            self.output_size,
            1.0 / self.strides[level],
            self.sampling_ratio,
            self.aligned,
        )


class SingleLevelExtractor(RoIExtractor):
    """Each box from one level: by its size (FPN's rule), or at random in every call.

    ``level_choice="random"`` is the thesis' control experiment (Tables 2.1 and 2.2): a uniform
    level for each box, drawn anew in every call, in training and at test.
    """

    def __init__(self, *, level_choice: str = "size", **kwargs) -> None:
        super().__init__(**kwargs)
        if level_choice not in ("size", "random"):
            raise ValueError(f"level_choice is 'size' or 'random', got {level_choice!r}")
        if any(b != 2 * a for a, b in zip(self.strides, self.strides[1:], strict=False)):
            raise ValueError(
                f"MODEL.ROI_HEADS.IN_FEATURES have strides {self.strides}; the level of a box is "
                "chosen among strides that double"
            )
        self.level_choice = level_choice

    def assign_levels(self, box_lists: list[Boxes]) -> Tensor:
        """Level index in [0, L) of every box: (R,) int64."""
        if self.level_choice == "random":
            total = sum(len(boxes) for boxes in box_lists)
            return torch.randint(len(self.strides), (total,), device=box_lists[0].device)
        first, last = (stride.bit_length() - 1 for stride in (self.strides[0], self.strides[-1]))
        return assign_boxes_to_levels(box_lists, first, last, 224, 4)

    def forward(self, features: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """L maps (N, C, H, W) and N ``Boxes`` to (R, C, S, S)."""
        rois = convert_boxes_to_pooler_format(box_lists)
        levels = self.assign_levels(box_lists)
        output = features[0].new_zeros(
            len(rois), features[0].shape[1], self.output_size, self.output_size
        )
        for level, feature in enumerate(features):
            (index,) = (levels == level).nonzero(as_tuple=True)
            pooled = self.pool(feature, rois[index], level)
            output.index_put_((index,), pooled.to(output.dtype))
        return output


class GenericRoIExtractor(RoIExtractor):
    """GRoIE: every box from all levels, pre-processed, aggregated, post-processed.

    The pre-module is shared by the levels (all published code) unless ``share_pre`` is False
    (one per level, as the thesis' Fig. 2.3 can be read). A shared one runs once over the L*R
    stacked features. Zero boxes pass through the modules too, so that every parameter stays in
    the graph on every rank.

    Args:
        channels: C.
        pre, post: (kind, kernel size) of the modules, see :func:`build_roi_module`.
        share_pre: one pre-module for all levels.
        aggregate: "sum", or "concat" followed by a 1x1 convolution L*C -> C with ReLU.
        num_heads: of "attention" modules.
        extra_relu: a ReLU after the pre-module on every level, also without a pre-module
            (section 2.1's code generation; off in section 2.3's).
    """

    def __init__(
        self,
        *,
        channels: int,
        pre: tuple[str, int],
        post: tuple[str, int],
        share_pre: bool = True,
        aggregate: str = "sum",
        num_heads: int = 6,
        extra_relu: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if aggregate not in AGGREGATES:
            raise ValueError(f"MODEL.GROIE.AGGREGATE is one of {AGGREGATES}, got {aggregate!r}")
        num_levels = len(self.strides)
        if share_pre or pre[0] == "none":
            self.pre = build_roi_module(*pre, channels, num_heads)
        else:
            self.pre = nn.ModuleList(
                build_roi_module(*pre, channels, num_heads) for _ in range(num_levels)
            )
        self.reduce = (
            conv_relu(num_levels * channels, channels, 1) if aggregate == "concat" else None
        )
        self.post = build_roi_module(*post, channels, num_heads)
        self.extra_relu = extra_relu

    def forward(self, features: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """L maps (N, C, H, W) and N ``Boxes`` to (R, C, S, S)."""
        rois = convert_boxes_to_pooler_format(box_lists)
        pooled = [self.pool(feature, rois, level) for level, feature in enumerate(features)]
        if isinstance(self.pre, nn.ModuleList):
            levels = torch.stack([pre(x) for pre, x in zip(self.pre, pooled, strict=True)])
        else:
            levels = self.pre(torch.cat(pooled)).unflatten(0, (len(pooled), -1))  # (L, R, C, S, S)
        if self.extra_relu:
            levels = F.relu(levels)
        if self.reduce is None:
            merged = levels.sum(dim=0)
        else:
            merged = self.reduce(levels.transpose(0, 1).flatten(1, 2))
        return self.post(merged)


def build_roi_module(kind: str, kernel_size: int, channels: int, num_heads: int = 6) -> nn.Module:
    """A pre- or post-module that keeps (R, C, S, S).

    Args:
        kind: one of ``MODULES``: nothing, one convolution with ReLU, the rectangular pair
            (7, 3) then (3, 7), a non-local block, or relative-position attention.
        kernel_size: side of the square kernel (conv, non_local); ignored by the others.
        channels: C.
        num_heads: of "attention".

    Raises:
        ValueError: unknown ``kind``, or an even kernel, which would change S.
    """
    if kind in ("conv", "non_local") and (kernel_size < 1 or kernel_size % 2 == 0):
        raise ValueError(
            "MODEL.GROIE.PRE_KERNEL and POST_KERNEL are odd and positive, "
            f"got {kernel_size} for {kind!r}"
        )
    if kind == "none":
        return nn.Identity()
    if kind == "conv":
        return conv_relu(channels, channels, kernel_size)
    if kind == "rect":
        return nn.Sequential(*rectangular_pair(channels, channels, channels))
    if kind == "non_local":
        return NonLocal2d(channels, kernel_size)
    if kind == "attention":
        return RelativePositionAttention(channels, num_heads)
    raise ValueError(f"MODEL.GROIE.PRE and POST are one of {MODULES}, got {kind!r}")


def build_roi_extractor(
    cfg: CfgNode, head_name: str, input_shape: dict[str, ShapeSpec]
) -> RoIExtractor:
    """The extractor that ``MODEL.<head_name>.EXTRACTOR`` names.

    Args:
        cfg: the whole configuration.
        head_name: "ROI_BOX_HEAD", "ROI_MASK_HEAD" or "ROI_GRID_HEAD".
        input_shape: channels and stride of every feature map.

    Raises:
        ValueError: an unknown extractor or pooler type, or levels of unequal width.
    """
    head = cfg.MODEL[head_name]
    shapes = [input_shape[name] for name in cfg.MODEL.ROI_HEADS.IN_FEATURES]
    if len({shape.channels for shape in shapes}) != 1:
        raise ValueError(f"MODEL.ROI_HEADS.IN_FEATURES differ in channels: {shapes}")
    if head.POOLER_TYPE not in ("ROIAlignV2", "ROIAlign"):
        raise ValueError(
            f"MODEL.{head_name}.POOLER_TYPE is ROIAlignV2 or ROIAlign, got {head.POOLER_TYPE!r}"
        )
    common = {
        "output_size": head.POOLER_RESOLUTION,
        "strides": tuple(shape.stride for shape in shapes),
        "sampling_ratio": head.POOLER_SAMPLING_RATIO,
        "aligned": head.POOLER_TYPE == "ROIAlignV2",
    }
    if head.EXTRACTOR == "single":
        return SingleLevelExtractor(level_choice="size", **common)
    if head.EXTRACTOR == "random":
        return SingleLevelExtractor(level_choice="random", **common)
    if head.EXTRACTOR == "groie":
        groie = cfg.MODEL.GROIE
        if len(groie.ATTENTION_HEADS) != 2:
            raise ValueError(
                "MODEL.GROIE.ATTENTION_HEADS has two numbers, for the box and for the mask "
                f"extractor, got {groie.ATTENTION_HEADS}"
            )
        box_heads, mask_heads = groie.ATTENTION_HEADS
        return GenericRoIExtractor(
            channels=shapes[0].channels,
            pre=(groie.PRE, groie.PRE_KERNEL),
            post=(groie.POST, groie.POST_KERNEL),
            share_pre=groie.SHARE_PRE,
            aggregate=groie.AGGREGATE,
            num_heads=box_heads if head_name == "ROI_BOX_HEAD" else mask_heads,
            extra_relu=groie.EXTRA_RELU,
            **common,
        )
    raise ValueError(f"MODEL.{head_name}.EXTRACTOR is one of {EXTRACTORS}, got {head.EXTRACTOR!r}")
