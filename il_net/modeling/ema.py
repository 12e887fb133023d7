"""The teacher's weights: a copy of the student's, then their exponential moving average.

Thesis section 2.4.3 (Unbiased Teacher's EMA).
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def copy_state(target: nn.Module, source: nn.Module) -> None:
    """Make all parameters and buffers of ``target`` equal ``source``'s."""
    target.load_state_dict(source.state_dict())


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, keep_rate: float) -> None:
    """``average = keep_rate * average + (1 - keep_rate) * model`` where the model trains.

    Parameters that do not train are equal since the copy and are left alone; buffers (statistics,
    counters) are copied, as an average of integers means nothing.

    Args:
        average, model: of the same architecture.
        keep_rate: in [0, 1].
    """
    ours, theirs = dict(average.named_parameters()), dict(model.named_parameters())
    moving: list[Tensor] = [ours[name] for name, p in theirs.items() if p.requires_grad]
    latest: list[Tensor] = [p for p in theirs.values() if p.requires_grad]
    torch._foreach_lerp_(moving, latest, 1.0 - keep_rate)  # one launch for all
    if copied := list(average.buffers()):
        torch._foreach_copy_(copied, list(model.buffers()))
