"""Counts of several processes: added up once a step; a skipped step adds nothing."""

import pytest
import torch
from detectron2.utils import comm
from torch import nn

from il_net.engine.launch import launch
from il_net.engine.summed_counts import SummedCounts, summed_buffers


class Counting(nn.Module):
    summed_buffers = ("counts",)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2, dtype=torch.long))


def count_and_compare() -> None:
    """Rank 0 counts (1, 0) and rank 1 (0, 10) in each of three steps, of which one is undone."""
    module = Counting()
    hook, rank = SummedCounts(summed_buffers(module)), comm.get_rank()
    for step in range(3):
        hook.before_step()
        before = module.counts.clone()
        module.counts[rank] += (1, 10)[rank]
        if step == 1:
            module.counts.copy_(before)
        hook.after_step()
    assert module.counts.tolist() == [2, 20], module.counts


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU")
def test_two_processes_have_the_same_counts():
    launch(count_and_compare, 2)


def test_only_modules_that_train_are_summed():
    student, teacher = Counting(), Counting().eval()
    (found,) = summed_buffers(nn.ModuleList([student, teacher, nn.Linear(1, 1)]))
    assert found is student.counts
