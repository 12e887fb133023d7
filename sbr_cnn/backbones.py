"""Backbones with FPN: the ResNet of this package, and any timm model.

Thesis section 2.1: all detectors stand on ResNet-50 with FPN.
"""

from types import ModuleType

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor, nn

from .resnet import block_stages, build_resnet


@BACKBONE_REGISTRY.register()
def build_norm_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ``build_resnet_fpn_backbone`` with :func:`sbr_cnn.resnet.build_resnet` below."""
    return _build_fpn(cfg, build_resnet(cfg, input_shape))


class TimmBackbone(Backbone):
    """The feature maps of a timm model, with all BatchNorm frozen.

    Gives "res2" to "res5" for strides 4 to 32. Frozen BatchNorm (statistics and affine) because
    detectors train with few images per device.

    Args:
        name: a timm model that supports ``features_only``.
        in_channels: channels of the input picture.
        out_features: which of "res2" to "res5" to return.
        freeze_at: 0 trains everything; k >= 2 freezes the stem and the stages up to "res{k}",
            as Detectron2's ``MODEL.BACKBONE.FREEZE_AT``; 1 freezes what comes before "res2".

    Raises:
        ValueError: timm does not know the model, or it lacks a stride.
    """

    STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}

    @configurable
    def __init__(
        self, *, name: str, in_channels: int, out_features: list[str], freeze_at: int
    ) -> None:
        super().__init__()
        timm = _import_timm()
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('_')[-1]}*")[:5])
            raise ValueError(
                f"MODEL.TIMM.NAME: timm {timm.__version__} has no {name!r}; near: {near or 'none'}"
            )
        self.body = timm.create_model(name, features_only=True, in_chans=in_channels)
        info = self.body.feature_info
        strides = info.reduction()
        missing = [f for f in out_features if self.STRIDES.get(f) not in strides]
        if missing:
            raise ValueError(
                f"MODEL.RESNETS.OUT_FEATURES: {name} has strides {strides}, no {missing}"
            )
        self._index = {f: strides.index(self.STRIDES[f]) for f in out_features}
        self._out_features = list(out_features)
        self._out_feature_strides = {f: self.STRIDES[f] for f in out_features}
        self._out_feature_channels = {f: info.channels()[i] for f, i in self._index.items()}
        output_format = getattr(self.body, "output_fmt", "NCHW")
        self._channels_last = getattr(output_format, "value", output_format) == "NHWC"
        self._norms = [m for m in self.body.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in self._norms:
            norm.requires_grad_(False)
        self._freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Read ``MODEL.TIMM``, ``MODEL.RESNETS.OUT_FEATURES`` and ``MODEL.BACKBONE.FREEZE_AT``."""
        return {
            "name": cfg.MODEL.TIMM.NAME,
            "in_channels": input_shape.channels,
            "out_features": cfg.MODEL.RESNETS.OUT_FEATURES,
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

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, in_channels, H, W) to the named maps, each (N, C, H / stride, W / stride)."""
        maps = self.body(x)
        if self._channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return {name: maps[index] for name, index in self._index.items()}


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN over the timm model ``MODEL.TIMM.NAME``; widths as in ``MODEL.FPN``.

    Raises:
        ValueError: a block that only ResNets get is asked for.
    """
    for key, stages in block_stages(cfg).items():
        if any(stages):
            raise ValueError(
                f"{key} is {list(stages)}, but MODEL.BACKBONE.NAME is build_timm_fpn_backbone; "
                "set all to False or take build_norm_resnet_fpn_backbone"
            )
    return _build_fpn(cfg, TimmBackbone(cfg, input_shape))


def _build_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "build_timm_fpn_backbone needs timm: pip install timm (the extra 'small' has it)"
        ) from error
    return timm
