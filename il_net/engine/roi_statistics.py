"""Reports on what RoI heads count in training: IoU of the proposals, positives, targets.

Thesis Figs. 2.8, 2.11 and 2.34.
"""

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..json_lines import drop_later_lines

Loops = dict[int, dict[str, int | list[int]]]


@runtime_checkable
class Counts(Protocol):
    """What a module counts, as ``sbr_cnn.statistics.RoIStatistics``; recognised by the method."""

    period: int

    def read(self) -> Loops:
        """Counts since the last call by loop: numbers, or a list of them as a histogram."""


def counting_modules(model: nn.Module) -> list[Counts]:
    """The ``statistics`` of all modules that train and have some."""
    found = [getattr(module, "statistics", None) for module in model.modules() if module.training]
    return [statistics for statistics in found if isinstance(statistics, Counts)]


class RoIStatisticsReport(HookBase):
    """Write the counts of the main process' images every ``period`` steps and after the last.

    TensorBoard gets a histogram for each list, ``roi_loop1/iou_histogram`` over 0 to 1 and others
    over their positions; the file a line of JSON: {"iteration": ..., "loops": {"1": {...}}}.

    Args:
        sources: whose counts; all have the same period.
        path: the file.
    """

    def __init__(self, sources: list[Counts], path: Path) -> None:
        self.sources = sources
        self.path = path

    def before_train(self) -> None:
        """Runs once; a resumed run writes the lines that it repeats anew."""
        if comm.is_main_process():
            drop_later_lines(self.path, self.trainer.start_iter)

    def after_step(self) -> None:
        """Runs after the optimizer's step."""
        done = self.trainer.iter + 1
        if done % self.sources[0].period and done != self.trainer.max_iter:
            return
        for source in self.sources:
            loops = source.read()
            if loops and comm.is_main_process():
                self._write(done, loops)

    def _write(self, done: int, loops: Loops) -> None:
        for loop, counts in loops.items():
            for name, values in counts.items():
                if isinstance(values, list) and sum(values):
                    place = torch.arange(len(values), dtype=torch.float32)
                    if name == "iou_histogram":
                        place = (place + 0.5) / len(values)
                    drawn = place.repeat_interleave(torch.tensor(values))
                    self.trainer.storage.put_histogram(f"roi_loop{loop}/{name}", drawn)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": done, "loops": loops}) + "\n")
