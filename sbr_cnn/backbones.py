"""Backbones with FPN: the ResNet of this package, and any timm model.

Thesis section 2.1: all detectors stand on ResNet-50 with FPN. Other networks, transformers among
them, are its future work: ConvNeXt and Swin under FPN, a plain ViT under a simple pyramid.
"""

import difflib
import re
from types import ModuleType

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor, nn

from .resnet import block_stages, build_resnet
from .vit_pyramid import MapNorm, SimplePyramid

PYRAMIDS = ("fpn", "simple")
# How timm's families are told that pictures differ in size: Swin, whose last stage would also not
# shift its windows where the pictures of its pretraining had just one there; plain ViTs, which
# then resize their position embedding; the rest, if of a fixed size at all.
_ANY_SIZE = (
    {"strict_img_size": False, "always_partition": True},
    {"dynamic_img_size": True},
    {},
)


@BACKBONE_REGISTRY.register()
def build_norm_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ``build_resnet_fpn_backbone`` with :func:`sbr_cnn.resnet.build_resnet` below."""
    return _build_fpn(cfg, build_resnet(cfg, input_shape))


class TimmBackbone(Backbone):
    """The feature maps of a timm model, with all BatchNorm frozen.

    Gives "res2" to "res5" for strides 4 to 32. Frozen BatchNorm (statistics and affine) because
    detectors train with few images per device. Networks with LayerNorm in its place (ConvNeXt,
    Swin) end their stages without a norm: each map gets a new LayerNorm, as in the detectors that
    were published with them.

    A plain ViT gives "res4" alone, its last map. It attends globally: its time grows with the
    square of the picture's area, and so does its memory where PyTorch has no fused attention
    (800 x 1216 pixels are 3,801 tokens: in fp32 0.7 GB per layer of ViT-B and picture).

    Args:
        name: a timm model that supports ``features_only``.
        in_channels: channels of the input picture.
        out_features: which of "res2" to "res5" to return.
        freeze_at: 0 trains everything; k >= 2 freezes the stem and the stages up to "res{k}",
            as Detectron2's ``MODEL.BACKBONE.FREEZE_AT``; 1 freezes what comes before "res2". Only
            0 for a plain ViT, which has no stages.

    Attributes:
        plain: all maps have stride 16.

    Raises:
        ValueError: timm does not know the model, it takes pictures of one size, or lacks a stride.
    """

    STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}

    @configurable
    def __init__(
        self, *, name: str, in_channels: int, out_features: list[str], freeze_at: int
    ) -> None:
        super().__init__()
        self.body = _create_body(name, in_channels)
        info = self.body.feature_info
        strides = info.reduction()
        self.plain = set(strides) == {16}
        missing = [f for f in out_features if self.STRIDES.get(f) not in strides]
        if missing:
            hint = "; a plain ViT needs MODEL.TIMM.PYRAMID simple" if self.plain else ""
            raise ValueError(
                "MODEL.RESNETS.OUT_FEATURES (res4 alone with MODEL.TIMM.PYRAMID simple): "
                f"MODEL.TIMM.NAME {name} has strides {strides}, no {missing}{hint}"
            )
        last = {stride: index for index, stride in enumerate(strides)}
        self._index = {f: last[self.STRIDES[f]] for f in out_features}
        self._out_features = list(out_features)
        self._out_feature_strides = {f: self.STRIDES[f] for f in out_features}
        self._out_feature_channels = {f: info.channels()[i] for f, i in self._index.items()}
        output_format = getattr(self.body, "output_fmt", "NCHW")
        self._channels_last = getattr(output_format, "value", output_format) == "NHWC"
        self._norms = [m for m in self.body.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in self._norms:
            norm.requires_grad_(False)
        layer_norms = any(isinstance(m, nn.LayerNorm) for m in self.body.modules())
        self.map_norms = nn.ModuleDict()
        if layer_norms and not self._norms and not self.plain:
            widths = self._out_feature_channels
            self.map_norms.update({f: MapNorm(width) for f, width in widths.items()})
        self._freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Read ``MODEL.TIMM``, ``MODEL.RESNETS.OUT_FEATURES`` and ``MODEL.BACKBONE.FREEZE_AT``."""
        pyramid = cfg.MODEL.TIMM.PYRAMID
        if pyramid not in PYRAMIDS:
            raise ValueError(
                f"MODEL.TIMM.PYRAMID is {pyramid!r}; write fpn, or simple for a plain ViT"
            )
        return {
            "name": cfg.MODEL.TIMM.NAME,
            "in_channels": input_shape.channels,
            "out_features": ["res4"] if pyramid == "simple" else cfg.MODEL.RESNETS.OUT_FEATURES,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        }

    def _freeze(self, freeze_at: int) -> None:
        """Freeze what ``freeze_at`` says and the stages that no output uses."""
        parameters = list(self.body.parameters())
        frozen = []
        if freeze_at > 0:
            start, end = self._span(f"res{max(freeze_at, 2)}")
            if end == 0:
                raise ValueError(
                    f"MODEL.BACKBONE.FREEZE_AT {freeze_at}: this timm model has no such stage to "
                    "freeze; 0 trains everything"
                )
            frozen += parameters[: start if freeze_at == 1 else end]
        _, end = self._span(max(self._out_features))
        frozen += parameters[end:] if end else []
        for parameter in frozen:
            parameter.requires_grad_(False)

    def _span(self, feature: str) -> tuple[int, int]:
        """First and one past the last parameter of a stage, in the order of the network.

        (0, 0) where there is no such stage or it has no parameters of its own (a pooling layer).
        """
        info = self.body.feature_info
        stages = dict(zip(info.reduction(), info.module_name(), strict=True))
        stage = stages.get(self.STRIDES.get(feature, 0), "")
        # Some models keep their module tree ("blocks.1"), others are flattened ("stages_1").
        prefixes = (stage + ".", stage.replace(".", "_") + ".")
        names = [name for name, _ in self.body.named_parameters()]
        inside = [i for i, name in enumerate(names) if name.startswith(prefixes)]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """As usual, but BatchNorm stays in evaluation mode."""
        super().train(mode)
        for norm in self._norms:
            norm.eval()
        return self

    def adopt_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Rename the tensors of the same network as timm itself saves it, classifier and all.

        Args:
            state: a checkpoint's tensors, changed in place.
            prefix: what comes before this module's names, with a dot at its end.
        """
        parents = prefix.split(".")[:-1]
        # A detector's names may have been put before timm's (a student's and a teacher's).
        roots = ["".join(f"{p}." for p in parents[:i]) for i in range(len(parents) + 1)]
        for own in self.body.state_dict():
            names = (root + name for root in roots for name in _timm_names(own))
            found = next((name for name in names if name in state), None)
            if found:
                state[f"{prefix}body.{own}"] = state.pop(found)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, in_channels, H, W) to the named maps, each (N, C, H / stride, W / stride)."""
        maps = self.body(x)
        if self._channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        maps = {name: maps[index] for name, index in self._index.items()}
        if self.map_norms:
            maps = {name: self.map_norms[name](m) for name, m in maps.items()}
        return maps


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """FPN over the timm model ``MODEL.TIMM.NAME``; widths as in ``MODEL.FPN``.

    With ``MODEL.TIMM.PYRAMID`` "simple" a ``SimplePyramid`` over a plain ViT, with the strides of
    ``MODEL.FPN.IN_FEATURES``.

    Raises:
        ValueError: a block that only ResNets get is asked for, or ``TimmBackbone`` and
            ``MODEL.TIMM.PYRAMID`` do not go together.
    """
    for key, stages in block_stages(cfg).items():
        if any(stages):
            raise ValueError(
                f"{key} is {list(stages)}, but MODEL.BACKBONE.NAME is build_timm_fpn_backbone; "
                "set all to False or take build_norm_resnet_fpn_backbone"
            )
    bottom_up = TimmBackbone(cfg, input_shape)
    if cfg.MODEL.TIMM.PYRAMID == "fpn":
        return _build_fpn(cfg, bottom_up)
    if not bottom_up.plain:
        raise ValueError(
            "MODEL.TIMM.PYRAMID is simple, which makes the strides that a plain ViT lacks; "
            f"MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME} has strides "
            f"{bottom_up.body.feature_info.reduction()}: write fpn"
        )
    return SimplePyramid(
        bottom_up=bottom_up,
        levels=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
    )


def _build_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _create_body(name: str, in_channels: int) -> nn.Module:
    """timm's feature extractor for pictures of any size."""
    timm = _import_timm()
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5))
        raise ValueError(
            f"MODEL.TIMM.NAME: timm {timm.__version__} has no {name!r}; near: {near or 'none'}"
        )
    published = timm.models.get_pretrained_cfg(name)
    fixed = published is not None and published.fixed_input_size
    for options in _ANY_SIZE if fixed else ({},):
        try:
            body = timm.create_model(name, features_only=True, in_chans=in_channels, **options)
            break
        except TypeError as error:  # another family's option
            if not any(option in str(error) for option in options):
                raise
    if any(getattr(module, "strict_img_size", False) for module in body.modules()):
        raise ValueError(
            f"MODEL.TIMM.NAME: {name} takes pictures of one size only; write a model that takes "
            "any, as convnext_tiny, swin_tiny_patch4_window7_224 or vit_base_patch16_224"
        )
    return body


def _timm_names(own: str) -> tuple[str, ...]:
    """What timm's whole network may call a tensor of its feature extractor."""
    flattened = re.sub(r"^(\w+?)_(\d+)\.", r"\1.\2.", own)  # "stages_0.x" of "stages.0.x"
    return own, own.removeprefix("model."), flattened


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "build_timm_fpn_backbone needs timm: pip install timm (the extra 'small' has it)"
        ) from error
    return timm
