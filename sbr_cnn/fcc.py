"""Fully convolutional layers in place of a RoI head's two fully connected ones (FCC).

Thesis section 2.3.4, Fig. 2.12 and Table 2.10: large kernels that narrow the 7x7 RoI features
from C over C/2 to C/4 channels ("L2C"), with or without 7x7 non-local blocks around them.

Shape shorthand: R RoIs, C channels, S the pooled side (7).
"""

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY
from torch import Tensor, nn

from .attention import NonLocal2d
from .roi_convs import conv_relu, rectangular_pair

LAYERS = ("square", "rect", "rect_early")
KERNEL = 7


def build_fcc_layers(
    channels: int,
    side: int,
    layers: str,
    *,
    non_local_before: bool = False,
    non_local_after: bool = False,
) -> nn.Sequential:
    """The layers from (R, C, S, S) to (R, C / 4, S, S); a ReLU follows each, non-local ones too.

    Args:
        channels: C, a multiple of 4.
        side: S.
        layers: "square": two 7x7 convolutions (thesis' versions b and d); "rect": each replaced
            by a (7, 3) and a (3, 7) one, narrower in the second (c, e); "rect_early": narrower in
            the first (e').
        non_local_before, non_local_after: 7x7 non-local blocks on C and on C / 4 channels
            (NLb, NLa).

    Raises:
        ValueError: unknown ``layers``, C is no multiple of 4, or S too small for the kernels.
    """
    if layers not in LAYERS:
        raise ValueError(f"FCC layers are one of {LAYERS}, got {layers!r}")
    if layers != "square" and side < 5:
        raise ValueError(
            f"FCC layers {layers!r} need maps of 5 x 5 or more, got {side} x {side}: raise "
            "POOLER_RESOLUTION of MODEL.ROI_BOX_HEAD (ROI_MASK_HEAD for the Mask-IoU branch)"
        )
    if channels % 4:
        raise ValueError(f"FCC layers need channels that divide by 4, got {channels}")
    half, quarter = channels // 2, channels // 4
    if layers == "square":
        convs = [conv_relu(channels, half, KERNEL), conv_relu(half, quarter, KERNEL)]
    elif layers == "rect":
        convs = [
            *rectangular_pair(channels, channels, half),
            *rectangular_pair(half, half, quarter),
        ]
    else:
        convs = [*rectangular_pair(channels, half, half), *rectangular_pair(half, quarter, quarter)]
    before = [NonLocal2d(channels, KERNEL), nn.ReLU(inplace=True)] if non_local_before else []
    after = [NonLocal2d(quarter, KERNEL), nn.ReLU(inplace=True)] if non_local_after else []
    return nn.Sequential(*before, *convs, *after)


@ROI_BOX_HEAD_REGISTRY.register()
class FCCBoxHead(nn.Module):
    """Box head of FCC layers; class and box predictors read the flattened C / 4 * S * S numbers.

    Args:
        input_shape: C and S of the pooled features.
        layers, non_local_before, non_local_after: see :func:`build_fcc_layers`.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        layers: str,
        non_local_before: bool = False,
        non_local_after: bool = False,
    ) -> None:
        super().__init__()
        self.layers = build_fcc_layers(
            input_shape.channels,
            input_shape.height,
            layers,
            non_local_before=non_local_before,
            non_local_after=non_local_after,
        )
        self._input_shape = input_shape

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Read ``MODEL.FCC``."""
        node = cfg.MODEL.FCC
        if node.LAYERS not in LAYERS:
            raise ValueError(f"MODEL.FCC.LAYERS is one of {LAYERS}, got {node.LAYERS!r}")
        return {
            "input_shape": input_shape,
            "layers": node.LAYERS,
            "non_local_before": node.NON_LOCAL_BEFORE,
            "non_local_after": node.NON_LOCAL_AFTER,
        }

    @property
    def output_shape(self) -> ShapeSpec:
        """(C / 4, S, S), which Detectron2's predictors flatten."""
        shape = self._input_shape
        return ShapeSpec(channels=shape.channels // 4, height=shape.height, width=shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, S, S) to (R, C / 4, S, S)."""
        return self.layers(x)
