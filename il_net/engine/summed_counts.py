"""Counts that a module keeps in buffers, added up over all processes.

Outside the forward pass, in which one process may fail while another waits for it.
"""

from typing import Protocol, runtime_checkable

from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.distributed import all_reduce


@runtime_checkable
class Summed(Protocol):
    """A module that counts, as ``sbr_cnn.c2ssl.ContainmentHead``; recognised by the attribute."""

    # Names of buffers that a forward pass adds to.
    summed_buffers: tuple[str, ...]


def summed_buffers(model: nn.Module) -> list[Tensor]:
    """The ``summed_buffers`` of all modules that train."""
    modules = [m for m in model.modules() if m.training and isinstance(m, Summed)]
    return [module.get_buffer(name) for module in modules for name in module.summed_buffers]


class SummedCounts(HookBase):
    """After each step every process has what all of them have counted, and so a checkpoint too.

    Every process has the same hook; it comes before those that read the model.

    Args:
        counts: of this process, equal in all before the first step; changed in place.
    """

    def __init__(self, counts: list[Tensor]) -> None:
        self.counts = counts

    def before_step(self) -> None:
        """Runs before the forward pass."""
        self._before = [count.clone() for count in self.counts]

    def after_step(self) -> None:
        """Runs after the optimizer's step, also after one that was skipped."""
        for count, before in zip(self.counts, self._before, strict=True):
            own = count - before
            all_reduce(own)
            count.copy_(before + own)
