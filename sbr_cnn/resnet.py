"""ResNet with a choice of BatchNorm, deformable convolution (DCN) and global context (GC-Net).

Thesis section 2.1 (BatchNorm with fixed statistics) and the baselines of Tables 2.9 and 2.20: Dai
et al., "Deformable Convolutional Networks", and Cao et al., "GCNet: Non-local Networks Meet
Squeeze-Excitation Networks and Beyond". The blocks take the places of Detectron2's layers and keep
their names, so that weights of a plain ResNet load.

Shape shorthand: N images, C channels, D inner channels, H and W height and width, P = H * W.
"""

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, NaiveSyncBatchNorm, ShapeSpec
from detectron2.modeling import ResNet, build_resnet_backbone
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

# The additional value of MODEL.RESNETS.NORM: fixed running statistics, trainable affine.
FROZEN_STATS = "FrozenStatsBN"


class FrozenStatsBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that always normalises with its running statistics; weight and bias train."""

    def train(self, mode: bool = True) -> "FrozenStatsBatchNorm2d":
        """Stay in evaluation mode whatever ``mode`` is."""
        return super().train(False)

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """Turn every ``nn.BatchNorm2d`` inside ``module`` into this class, in place.

        The modules keep their parameters, buffers and names; subclasses of BatchNorm that do
        more than normalise are left alone.
        """
        for layer in module.modules():
            if type(layer) is nn.BatchNorm2d:
                layer.__class__ = cls
                layer.train(False)
        return module


class CpuSyncBatchNorm2d(NaiveSyncBatchNorm):
    """BatchNorm over the batches of all processes on the CPU, where ``nn.SyncBatchNorm`` refuses.

    Differs from Detectron2's: computes in fp32 also under bf16, whose E[x^2] - E[x]^2 can be off
    by more than the variance. As there, all processes count alike, and with several of them
    ``running_var`` averages the biased variance.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape and type."""
        return super().forward(x.float()).to(x.dtype)


class DeformConv2d(Conv2d):
    """Detectron2's ``Conv2d`` as a deformable convolution, version 1 (no modulation).

    A plain convolution ``offset`` of the same geometry says for every output pixel how far, in
    input pixels, each kernel position moves: (N, 2 * kernel positions, H', W'), y before x. It
    starts at zero, so a new layer is the plain convolution of the same weight.

    Differs from Detectron2's: torchvision's operator, which needs no compiled Detectron2.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.offset = nn.Conv2d(
            self.in_channels,
            2 * self.kernel_size[0] * self.kernel_size[1],
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H', W'), normalisation and activation included.

        The weight's precision throughout, under autocast too: the operator has no bf16 on the CPU,
        and a bf16 offset of 4 pixels is off by up to 1/64.
        """
        with torch.autocast(x.device.type, enabled=False):
            exact = x.to(self.weight.dtype)
            out = deform_conv2d(
                exact,
                self.offset(exact),
                self.weight,
                self.bias,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
            )
        out = out.to(x.dtype)
        if self.norm is not None:
            out = self.norm(out)
        return out if self.activation is None else self.activation(out)


class GlobalContextBlock(nn.Module):
    """Adds to every position the same vector, made of an attention-weighted mean of the map.

    ``out = x + expand(relu(norm(reduce(sum_p softmax_p(attention(x))_p x_p))))`` with 1x1
    convolutions and LayerNorm over the D = C * ratio channels. The last convolution starts at zero,
    so a new block is the identity.

    Args:
        channels: C.
        ratio: D / C, rounded down.

    Raises:
        ValueError: the ratio leaves no inner channel.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        inner = int(channels * ratio)
        if inner < 1:
            raise ValueError(
                f"MODEL.GC_BLOCK.RATIO {ratio} of {channels} channels leaves none; at least "
                f"{1 / channels:g} is needed"
            )
        self.attention = nn.Conv2d(channels, 1, 1)
        self.reduce = nn.Conv2d(channels, inner, 1)
        self.norm = nn.LayerNorm([inner, 1, 1])
        self.expand = nn.Conv2d(inner, channels, 1)
        nn.init.kaiming_normal_(self.attention.weight, mode="fan_in", nonlinearity="relu")
        for parameter in (self.attention.bias, self.expand.weight, self.expand.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        weights = self.attention(x).flatten(2).softmax(2)  # (N, 1, P)
        context = torch.matmul(x.flatten(2), weights.transpose(1, 2))  # (N, C, 1)
        inner = F.relu(self.norm(self.reduce(context.unsqueeze(3))))
        return x + self.expand(inner)


class ContextConv2d(Conv2d):
    """Detectron2's ``Conv2d`` with a global-context block after its normalisation."""

    def __init__(self, *args, ratio: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.context = GlobalContextBlock(self.out_channels, ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H', W')."""
        return self.context(super().forward(x))


def block_stages(cfg: CfgNode) -> dict[str, list[bool]]:
    """The keys that put blocks into a ResNet, each with its values for res2 to res5."""
    return {
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE,
        "MODEL.GC_BLOCK.ON_PER_STAGE": cfg.MODEL.GC_BLOCK.ON_PER_STAGE,
    }


def build_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ``build_resnet_backbone`` with more kinds of normalisation and blocks.

    * ``MODEL.RESNETS.NORM``: "FrozenStatsBN" beside Detectron2's. "SyncBN" works on the CPU too.
    * ``MODEL.RESNETS.DEFORM_ON_PER_STAGE``: the 3x3 convolution of every bottleneck of the stage is
      deformable, those with stride 2 included.
    * ``MODEL.GC_BLOCK``: a global-context block in every bottleneck of the stage, after the third
      convolution's normalisation, before the shortcut is added.

    Stages that ``MODEL.BACKBONE.FREEZE_AT`` freezes are frozen whole: statistics, affine, and the
    blocks put there.

    Raises:
        ValueError: a block that cannot be built.
    """
    _check_blocks(cfg)
    norm, on_cpu = cfg.MODEL.RESNETS.NORM, cfg.MODEL.DEVICE == "cpu"
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    if norm == FROZEN_STATS:
        plain.MODEL.RESNETS.NORM = "BN"
    elif norm == "SyncBN" and on_cpu:
        plain.MODEL.RESNETS.NORM = "naiveSyncBN"
    network = build_resnet_backbone(plain, input_shape)
    if norm == FROZEN_STATS:
        FrozenStatsBatchNorm2d.convert(network)
    for layer in network.modules():
        if on_cpu and type(layer) is NaiveSyncBatchNorm:
            layer.__class__ = CpuSyncBatchNorm2d
    deform, context = block_stages(cfg).values()
    for i, stage in enumerate(network.stages):
        for block in stage:
            if deform[i]:
                block.conv2 = _rebuild(block.conv2, DeformConv2d)
            if context[i]:
                block.conv3 = _rebuild(block.conv3, ContextConv2d, ratio=cfg.MODEL.GC_BLOCK.RATIO)
    return network.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)  # again, for the new blocks


def _rebuild(conv: Conv2d, kind: type[Conv2d], **kwargs) -> Conv2d:
    """A ``kind`` of the same geometry, with ``conv``'s own weight and normalisation."""
    new = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=False,
        norm=conv.norm,
        **kwargs,
    )
    new.weight = conv.weight
    return new


def _check_blocks(cfg: CfgNode) -> None:
    resnets = cfg.MODEL.RESNETS
    for key, stages in block_stages(cfg).items():
        if len(stages) != 4:
            raise ValueError(f"{key} has four values, for res2 to res5; got {list(stages)}")
        if any(stages) and resnets.DEPTH < 50:
            raise ValueError(
                f"{key} is {list(stages)}, but MODEL.RESNETS.DEPTH {resnets.DEPTH} has no "
                "bottlenecks; set all to False or take a depth of 50, 101 or 152"
            )
    if not any(resnets.DEFORM_ON_PER_STAGE):
        return
    if resnets.DEFORM_MODULATED:
        raise ValueError(
            "MODEL.RESNETS.DEFORM_MODULATED is True; deformable convolution is version 1 here, "
            "without modulation: set it to False"
        )
    if resnets.DEFORM_NUM_GROUPS != 1:
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_NUM_GROUPS is {resnets.DEFORM_NUM_GROUPS}; all channels share "
            "their offsets here: set it to 1"
        )
