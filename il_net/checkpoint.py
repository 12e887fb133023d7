"""Loading weights: what matched, and names that the file or the model has from elsewhere.

And saving them, whole or not at all (see ``checkpoint_files``).
"""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.error import URLError

from detectron2.checkpoint import DetectionCheckpointer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint_files import tag_last, thin_out, write_state
from .safe_load import load_pkl, load_pth
from .weights import LITE0_WEIGHTS, lite0_file, rename_foreign

logger = logging.getLogger(__name__)


@runtime_checkable
class AdoptsState(Protocol):
    """A module of the model that knows its tensors by other names as well.

    Recognised by the method: a module need not inherit from this class.
    """

    def adopt_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Rename in ``state``, in place, tensors that are this module's under another name.

        Called before names are matched, for every file, a checkpoint of this very model included.
        A tensor whose shape turns out not to fit is reported and left out.

        Args:
            state: all tensors of the file, on the CPU.
            prefix: the module's name in the model with a trailing dot, "" for the model itself.
        """


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave a model.

    Attributes:
        matched: numbers (elements of tensors) of the model that were loaded.
        total: numbers of the model.
        matched_tensors: tensors of the model that were loaded.
        total_tensors: tensors of the model.
        missing: names that the file lacks.
        misshapen: name to (shape in the file, shape in the model), where they differ.
        unexpected: names that only the file has.
    """

    matched: int
    total: int
    matched_tensors: int
    total_tensors: int
    missing: tuple[str, ...]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unexpected: tuple[str, ...]

    def differences(self) -> list[str]:
        """A phrase per kind of name that did not match: the first ones, and how many more."""
        shapes = [f"{name} {file} for {model}" for name, (file, model) in self.misshapen.items()]
        kinds = {
            "not found in the checkpoint": self.missing,
            "of another shape in the checkpoint": shapes,
            "only in the checkpoint": self.unexpected,
        }
        return [f"{kind}: {_first_of(names)}" for kind, names in kinds.items() if names]


def _first_of(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with counts of what matched and more kinds of weights.

    Also reads ``.safetensors`` files, ``LITE0_WEIGHTS`` and torchvision's ResNets (see
    :mod:`il_net.weights`), and lets the model's modules rename foreign tensors (see
    :class:`AdoptsState`). No file is read that could run code (see :mod:`il_net.safe_load`).

    Args:
        model, save_dir, checkpointables: as Detectron2's.
        kept: checkpoints of a run to keep, at least 2; 0: all.

    Attributes:
        report: the ``LoadReport`` of the last file loaded, None before.
        saved: the name that was saved last, "" before.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, kept: int = 0, **checkpointables: Any
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        if kept < 0 or kept == 1:
            raise ValueError(
                f"SOLVER.CHECKPOINTS_KEPT is 0 (all) or at least 2, got {kept}: a run whose only "
                "checkpoint turns out to be damaged is lost"
            )
        self.kept = kept
        self.report: LoadReport | None = None
        self.saved = ""

    def save(self, name: str, **extra: Any) -> None:
        """As Detectron2's, but every file is whole or not there, and old ones may be deleted.

        Raises:
            UnwrittenError: the disk is full, or the like; the checkpoints before are as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = Path(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint %s", path)
        write_state(path, {"model": self.model.state_dict(), **state, **extra})
        tag_last(path)
        self.saved = name
        thin_out(path, self.kept)

    def load(self, path: str, *args, **kwargs) -> dict:
        """As Detectron2's.

        Raises:
            FileNotFoundError: no such file, or it cannot be downloaded.
            ValueError: not a file of weights, or none of them fits the model.
        """
        if path == LITE0_WEIGHTS:
            path = lite0_file()
        elif path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise FileNotFoundError(f"MODEL.WEIGHTS: there is no file {path}")
        try:
            loaded = super().load(path, *args, **kwargs)
        except URLError as error:
            raise FileNotFoundError(
                f"MODEL.WEIGHTS {path} can't be downloaded: {error}. Without a network, name a "
                "file, or take the backbone of configs/quickstart/Base-small.yaml"
            ) from error
        if path and not self.report.matched_tensors:
            raise ValueError(self._misfit(path))
        return loaded

    def load_complete(self, path: str, min_matched: float = 0.9) -> None:
        """Load weights for evaluation or prediction, where a part of them is no use.

        Raises:
            ValueError: no path, or less than ``min_matched`` of the model's weights matched.
        """
        if path in ("", LITE0_WEIGHTS):
            raise ValueError(
                f"MODEL.WEIGHTS is {path!r}: name the trained weights to evaluate or predict with"
            )
        self.load(path, checkpointables=[])
        if self.report.matched < min_matched * self.report.total:
            raise ValueError(f"{self._misfit(path)}, less than {min_matched:.0%}")

    def _misfit(self, path: str) -> str:
        report = self.report
        return (
            f"MODEL.WEIGHTS {path}: {'; '.join(report.differences())}. Is this the configuration "
            f"the weights were trained with? {report.matched:,} of the model's {report.total:,} "
            "weights fit"
        )

    def _load_file(self, filename: str) -> dict:
        try:
            loaded = self._read(filename)
        except SafetensorError as error:
            raise ValueError(f"MODEL.WEIGHTS: {filename} can't be read: {error}") from error
        except ValueError as error:
            raise ValueError(f"MODEL.WEIGHTS: {error}") from error
        if "model" not in loaded:
            loaded = {"model": loaded}
        state = loaded["model"]
        state = state.get("state_dict", state)  # as other trainers nest it
        if state and all(name.startswith("module.") for name in state):  # saved inside DDP
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        loaded["model"] = rename_foreign(state, self.model)
        return loaded

    def _read(self, filename: str) -> dict:
        if filename.endswith(".safetensors"):
            return load_file(filename)
        own_format = filename.endswith((".pkl", ".pyth"))
        content = load_pkl(filename) if filename.endswith(".pkl") else load_pth(filename)
        if not isinstance(content, dict):
            raise ValueError(f"{filename} holds a {type(content).__name__}, not named weights")
        # Detectron2 knows what its own formats mean, and reads again what was found harmless.
        return super()._load_file(filename) if own_format else content

    def _load_model(self, checkpoint: dict):
        state = checkpoint["model"]
        self._convert_ndarray_to_tensor(state)
        for name, module in self.model.named_modules():
            if isinstance(module, AdoptsState):
                module.adopt_state(state, f"{name}." if name else "")
        incompatible = super()._load_model(checkpoint)
        sizes = {name: tensor.numel() for name, tensor in self.model.state_dict().items()}
        misshapen = {name: (file, model) for name, file, model in incompatible.incorrect_shapes}
        # torch counts a tensor that was left out for its shape as missing, too.
        missing = sizes.keys() & set(incompatible.missing_keys) - misshapen.keys()
        found = sizes.keys() - missing - misshapen.keys()
        if all(name.endswith("num_batches_tracked") for name in found):
            # BatchNorm fills in its counter itself where a file has none: nothing was loaded.
            missing |= found
        lacking = missing | misshapen.keys()
        total = sum(sizes.values())
        self.report = LoadReport(
            matched=total - sum(sizes[name] for name in lacking),
            total=total,
            matched_tensors=len(sizes) - len(lacking),
            total_tensors=len(sizes),
            missing=tuple(sorted(missing)),
            misshapen=dict(sorted(misshapen.items())),
            unexpected=tuple(sorted(incompatible.unexpected_keys)),
        )
        return incompatible

    def _log_incompatible_keys(self, incompatible) -> None:
        """One message with counts in place of fvcore's long lists."""
        report = self.report
        logger.log(
            logging.INFO if report.matched == report.total else logging.WARNING,
            "Loaded %s of the model's %s weights (%d of %d tensors)%s",
            f"{report.matched:,}",
            f"{report.total:,}",
            report.matched_tensors,
            report.total_tensors,
            "".join(f"\n  {difference}" for difference in report.differences()),
        )
