"""The report on what RoI heads count: when it is written, and what of."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage
from torch import nn

from il_net.engine.roi_statistics import RoIStatisticsReport, counting_modules


class Source:
    """Counts the steps since it was read."""

    period = 2

    def __init__(self) -> None:
        self.steps = 0

    def read(self) -> dict:
        steps, self.steps = self.steps, 0
        return {1: {"iou_histogram": [steps, 0, 0, 1], "positives": steps}} if steps else {}


def run(source: Source, path: Path, start: int, stop: int, max_iter: int = 5) -> EventStorage:
    hook = RoIStatisticsReport([source], path)
    with EventStorage(start) as storage:
        hook.trainer = SimpleNamespace(start_iter=start, max_iter=max_iter, storage=storage)
        hook.before_train()
        for hook.trainer.iter in range(start, stop):
            source.steps += 1
            hook.after_step()
    return storage


def test_a_line_every_period_after_the_last_step_and_none_twice(tmp_path):
    path = tmp_path / "run" / "roi_statistics.json"
    storage = run(Source(), path, 0, 5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 5]
    assert [line["loops"]["1"]["positives"] for line in lines] == [2, 2, 1]
    with path.open("a") as file:
        file.write('{"iteration": 5, "loo')  # killed while it wrote
    run(Source(), path, 3, 5)  # resumed from the checkpoint of the third step
    again = [json.loads(line)["iteration"] for line in path.read_text().splitlines()]
    assert again == [2, 4, 5]
    (name, limits, counts) = [
        (h["tag"], h["bucket_limits"], h["bucket_counts"]) for h in storage._histograms
    ][0]
    assert name == "roi_loop1/iou_histogram"
    # Bins of 1/4: two proposals in the middle of the first, one in that of the last.
    assert sum(counts) == 3 and counts[0] == 2 and counts[-1] == 1
    assert limits[-1] == pytest.approx(0.875)


def test_only_what_trains_is_asked():
    counting, silent, frozen = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1).eval()
    counting.statistics, silent.statistics, frozen.statistics = Source(), None, Source()
    assert counting_modules(nn.Sequential(counting, silent, frozen)) == [counting.statistics]
