"""A pyramid of maps from the only map of a plain ViT (the thesis' future work: transformers).

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet, arXiv
2203.16527), section 3: the last map, of stride 16, is resized to every stride by itself; nothing
flows between the levels.

Shape shorthand: N images, C channels, H and W height and width.
"""

from collections.abc import Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of every pixel, (N, C, H, W) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each pixel by itself."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimplePyramid(Backbone):
    """ViTDet's simple feature pyramid.

    Deconvolutions make strides 4 and 8, max-pooling stride 32. A 1x1 and a 3x3 convolution, each
    with LayerNorm, follow at every level; one level more takes every second pixel of the last.

    Args:
        bottom_up: gives one map, of stride 16.
        levels: the strides to make, as names of stages: "res2" (4) to "res5" (32).
        out_channels: C of all maps.
    """

    def __init__(self, *, bottom_up: Backbone, levels: Sequence[str], out_channels: int) -> None:
        super().__init__()
        ((self._source, shape),) = bottom_up.output_shape().items()
        assert shape.stride == 16, shape
        self.bottom_up = bottom_up
        numbers = [int(level.removeprefix("res")) for level in levels]
        self.levels = nn.ModuleDict(
            {f"p{n}": _build_level(shape.channels, n, out_channels) for n in numbers}
        )
        self.top_block = LastLevelMaxPool()
        numbers.append(numbers[-1] + 1)
        self._out_features = [f"p{n}" for n in numbers]
        self._out_feature_strides = {f"p{n}": 2**n for n in numbers}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._size_divisibility = max(16, 2 ** numbers[-2])

    @property
    def size_divisibility(self) -> int:
        """What the sides of a picture must be multiples of."""
        return self._size_divisibility

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Pictures (N, 3, H, W) to the named maps, each (N, C, H / stride, W / stride)."""
        source = self.bottom_up(x)[self._source]
        maps = [level(source) for level in self.levels.values()]
        maps += self.top_block(maps[-1])
        return dict(zip(self._out_features, maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every map."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=stride)
            for name, stride in self._out_feature_strides.items()
        }


def _build_level(channels: int, level: int, out_channels: int) -> nn.Sequential:
    """From the map of stride 16 to that of stride 2 ** ``level`` (4, 8, 16 or 32)."""
    width, resize = channels, []
    if level < 4:
        width //= 2
        resize = [nn.ConvTranspose2d(channels, width, 2, stride=2)]
    if level == 2:
        resize += [MapNorm(width), nn.GELU(), nn.ConvTranspose2d(width, width // 2, 2, stride=2)]
        width //= 2
    if level == 5:
        resize = [nn.MaxPool2d(2)]
    return nn.Sequential(
        *resize,
        nn.Conv2d(width, out_channels, 1, bias=False),
        MapNorm(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        MapNorm(out_channels),
    )
