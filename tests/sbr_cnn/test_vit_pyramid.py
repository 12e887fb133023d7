"""The simple feature pyramid, level by level against the arithmetic of its layers."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from sbr_cnn.vit_pyramid import MapNorm, SimplePyramid

D, C = 8, 6  # widths of the plain map and of the pyramid
ALL = ("res2", "res3", "res4", "res5")


class Patches(Backbone):
    """The mean of every 16 x 16 patch, D times."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"res4": F.avg_pool2d(x.mean(1, keepdim=True), 16).repeat(1, D, 1, 1) * self.scale}

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.arange(1.0, D + 1)[:, None, None] ** 2)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res4": ShapeSpec(channels=D, stride=16)}


def make_pyramid(levels: tuple[str, ...] = ALL) -> SimplePyramid:
    """With noise in every parameter: LayerNorm starts as the identity's affine."""
    pyramid = SimplePyramid(bottom_up=Patches(), levels=levels, out_channels=C)
    for parameter in pyramid.parameters():
        nn.init.normal_(parameter, std=0.5)
    return pyramid


def normed(x: Tensor, norm: MapNorm) -> Tensor:
    """LayerNorm over the channels, by its definition."""
    mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    x = (x - mean) / (var + 1e-6).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def enlarged(x: Tensor, deconv: nn.ConvTranspose2d) -> Tensor:
    """A deconvolution of kernel and stride 2: every pixel becomes a 2 x 2 block by itself."""
    n, _, h, w = x.shape
    blocks = torch.einsum("nihw,ioab->nohawb", x, deconv.weight)
    return blocks.reshape(n, -1, 2 * h, 2 * w) + deconv.bias[:, None, None]


def finished(x: Tensor, conv1: nn.Conv2d, norm1: MapNorm, conv3: nn.Conv2d, norm3: MapNorm):
    assert conv1.bias is None and conv3.bias is None
    x = normed(torch.einsum("nihw,oi->nohw", x, conv1.weight[:, :, 0, 0]), norm1)
    return normed(F.conv2d(x, conv3.weight, padding=1), norm3)


@pytest.mark.parametrize("size", [(64, 96), (128, 32)])
def test_every_level_by_its_layers(size):
    pyramid, pictures = make_pyramid(), torch.randn(2, 3, *size)
    source = Patches()(pictures)["res4"]
    first, norm, gelu, second, *rest2 = pyramid.levels["p2"]
    x = F.gelu(normed(enlarged(source, first), norm))
    assert isinstance(gelu, nn.GELU)
    expected = {"p2": finished(enlarged(x, second), *rest2)}
    deconv, *rest3 = pyramid.levels["p3"]
    expected["p3"] = finished(enlarged(source, deconv), *rest3)
    expected["p4"] = finished(source, *pyramid.levels["p4"])
    n, d, h, w = source.shape
    halved = source.reshape(n, d, h // 2, 2, w // 2, 2).amax((3, 5))
    expected["p5"] = finished(halved, *list(pyramid.levels["p5"])[1:])
    expected["p6"] = expected["p5"][:, :, ::2, ::2]
    maps = pyramid(pictures)
    assert list(maps) == list(expected)
    for name, x in maps.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("levels", "strides", "divisor"),
    [
        (ALL, {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}, 32),
        # The patches' size, though the pyramid's largest stride is smaller.
        (("res2", "res3"), {"p2": 4, "p3": 8, "p4": 16}, 16),
        (("res4", "res5"), {"p4": 16, "p5": 32, "p6": 64}, 32),
    ],
)
def test_shapes_are_as_announced(levels, strides, divisor):
    pyramid = make_pyramid(levels)
    assert pyramid.size_divisibility == divisor
    assert {n: (s.channels, s.stride) for n, s in pyramid.output_shape().items()} == {
        name: (C, stride) for name, stride in strides.items()
    }
    maps = pyramid(torch.zeros(1, 3, 192, 128))
    assert {name: tuple(x.shape) for name, x in maps.items()} == {
        name: (1, C, 192 // stride, 128 // stride) for name, stride in strides.items()
    }


def test_no_level_reads_another():
    """Differs from FPN's: a change to one level's layers leaves the other levels."""
    pyramid, pictures = make_pyramid(), torch.randn(1, 3, 64, 64)
    before = pyramid(pictures)
    with torch.no_grad():
        pyramid.levels["p4"][0].weight.neg_()
    after = pyramid(pictures)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"p4"}
