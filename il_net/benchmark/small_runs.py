"""Runs the small benchmark: one training at a time, each once, choices before what needs them.

Below the output folder: ``tuning/`` with the parts of the training files and the runs on them,
``chosen.json``, a folder per run with its ``result.json``, ``report.md`` and its pictures. A run
with a ``result.json`` is finished; every other one goes on where it was, or starts.
"""

import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import yaml

from ..curation.split_parts import count_objects
from ..data.sound_coco import read_sound_coco
from ..engine.preemption import PREEMPTED, SIGNALS
from .small_protocol import (
    Choice,
    Pairs,
    Run,
    Table,
    final_run,
    needed_choices,
    planned,
    tuning_run,
    write_tuning_part,
)
from .small_table import TASKS, class_mean, read_metrics, seconds_per_step

logger = logging.getLogger(__name__)

RESULT = "result.json"
SETTINGS = "settings.json"
CHOSEN = "chosen.json"


class Stopped(Exception):
    """The benchmark was told to stop, or its time is over; started again, it goes on."""


class Trainings:
    """Starts ``train_net.py``, a process at a time; while it is entered, signals are passed on.

    Args:
        script: train_net.py.
        configs: the folder of the configurations.
        threads: of each process.
        hours: after which the training under way is told to save itself and stop.
    """

    def __init__(self, script: Path, configs: Path, *, threads: int, hours: float) -> None:
        self.script = script
        self.configs = configs
        self.threads = threads
        self.deadline = time.monotonic() + 3600 * hours
        self.stopping = False
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Trainings":
        self._handlers = {number: signal.signal(number, self._relay) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _relay(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        if self._process is not None:
            self._process.send_signal(number)

    def __call__(self, run: Run, settings: Sequence[str], folder: Path) -> int:
        """Train in a folder, or go on there; returns the exit code.

        Raises:
            Stopped: by a signal or the deadline, before the training or during it.
        """
        if self.stopping or time.monotonic() >= self.deadline:
            raise Stopped
        config = str(self.configs / f"{run.config}.yaml")
        command = [sys.executable, str(self.script), "--config-file", config, "--resume-or-start"]
        command += [*settings, "OUTPUT_DIR", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with (folder / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
            if self.stopping:  # since it was looked at
                self._process.send_signal(signal.SIGTERM)
            code = self._wait(self._process)
        self._process = None
        if code and (code == PREEMPTED or self.stopping):
            raise Stopped
        return code

    def _wait(self, process: subprocess.Popen) -> int:
        left = self.deadline - time.monotonic()
        try:
            return process.wait(None if math.isinf(left) else max(left, 0))
        except subprocess.TimeoutExpired:
            self.stopping = True
            process.send_signal(signal.SIGTERM)
            return process.wait()


class SmallBenchmark:
    """The runs of an output folder.

    Args:
        folder: the output folder.
        train: trains a run with settings in a folder and returns an exit code; see ``Trainings``.
        count_parameters: of the model (or the student) of a configuration, by name, and settings.
        extra: settings of every run, which win over the others.
    """

    def __init__(
        self,
        folder: Path,
        train: Callable[[Run, Sequence[str], Path], int],
        count_parameters: Callable[[str, Sequence[str]], int],
        extra: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.train = train
        self.count_parameters = count_parameters
        self.extra = tuple(extra)
        self.failed: list[str] = []

    def run(
        self, tables: Sequence[Table], seeds: Sequence[int], finished: Callable[[], None]
    ) -> None:
        """Train everything that is not finished, after choosing what it needs.

        Args:
            tables, seeds: what to run.
            finished: called after each training of a table.

        Raises:
            Stopped: see ``Trainings``.
            ValueError: a folder was begun with other settings, or no candidate can be chosen.
        """
        _claim(self.folder, {"extra": list(self.extra)})
        for table, method, seed in planned(tables, seeds):
            for choice in needed_choices([method]):
                self.choose(choice)
            run = final_run(table, method, seed, chosen_settings(self.folder))
            if self.result(run) is None:
                self._train(run)
                finished()

    def choose(self, choice: Choice) -> None:
        """Train the candidates and keep the best in ``chosen.json``; nothing if that was done."""
        chosen = chosen_settings(self.folder)
        if choice.name in chosen:
            return
        part = write_tuning_part(choice.table.dataset, self.folder / "tuning")
        classes = list(counted_classes(part / "val.json"))
        scores: dict[str, dict[str, float]] = {}
        for label in choice.candidates:
            scores[label] = {}
            for judge in choice.judges:
                run = tuning_run(choice, judge, label, chosen, part)
                result = self.result(run) or self._train(run)
                # A training that failed, as one that diverged, is no candidate.
                scores[label][judge.name] = math.nan if result is None else main_ap(result, classes)
        means = {label: statistics.fmean(by.values()) for label, by in scores.items()}
        valid = {label: mean for label, mean in means.items() if not math.isnan(mean)}
        if not valid:
            raise ValueError(
                f"{choice.name}: none of {list(scores)} has a result; see output.txt in the "
                f"folders of {self.folder / 'tuning' / choice.name}"
            )
        best = max(valid, key=valid.__getitem__)
        logger.info("%s: %s of %s", choice.name, best, {k: round(v, 2) for k, v in means.items()})
        settings = list(choice.candidates[best])
        entry = {"label": best, "settings": settings, "scores": scores}
        _write_json(self.folder / CHOSEN, {**read_chosen(self.folder), choice.name: entry})

    def result(self, run: Run) -> dict | None:
        """What a finished run left, None of any other one."""
        path = self.folder / run.folder / RESULT
        return json.loads(path.read_text()) if path.is_file() else None

    def _train(self, run: Run) -> dict | None:
        folder = self.folder / run.folder
        settings = (*run.settings, *self.extra)
        _claim(folder, {"config": run.config, "settings": list(settings)})
        logger.info("%s", run.folder)
        start = time.monotonic()
        code = self.train(run, settings, folder)
        if code:
            logger.error("%s failed with exit code %d: see output.txt there", folder, code)
            self.failed.append(run.folder)
            return None
        steps = yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]["MAX_ITER"]
        metrics = folder / "metrics.json"
        result = {
            "steps": steps,
            "parameters": self.count_parameters(run.config, settings),
            "seconds_per_step": seconds_per_step(metrics),
            "curves": read_metrics(metrics, steps),
        }
        _write_json(folder / RESULT, result)
        for path in (*folder.glob("model_[0-9]*.pth"), *folder.glob("model_best.pth")):
            path.unlink()  # the final model stays
        logger.info("%s done in %.0f s", run.folder, time.monotonic() - start)
        return self.result(run)


def read_chosen(folder: Path) -> dict[str, dict]:
    """``chosen.json``: by the choice's name its label, settings and the scores of all labels."""
    path = folder / CHOSEN
    return json.loads(path.read_text()) if path.is_file() else {}


def extra_settings(folder: Path) -> list[str]:
    """Keys and values that all runs of the output folder have beside the protocol's."""
    path = folder / SETTINGS
    return json.loads(path.read_text())["extra"] if path.is_file() else []


def chosen_settings(folder: Path) -> dict[str, Pairs]:
    """The settings that were chosen so far, by the choice's name."""
    return {name: tuple(entry["settings"]) for name, entry in read_chosen(folder).items()}


def main_ap(result: dict, classes: Sequence[str]) -> float:
    """What candidates are compared by: the final mask AP, without masks box AP, of the student."""
    model = "student" if "student" in result["curves"] else ""
    metrics = result["curves"][model][str(result["steps"])]
    task = [task for task in TASKS if f"{task}/AP" in metrics][-1]
    return class_mean(metrics, task, "AP", classes)


def counted_classes(json_file: Path) -> dict[str, int]:
    """The classes of a COCO file with more than one object, and how many; crowds are none.

    The AP of a single object is 0 or near 100 by its rank alone.
    """
    return {name: count for name, count in all_classes(json_file).items() if count > 1}


def all_classes(json_file: Path) -> dict[str, int]:
    """The number of objects of every class of a COCO file, in the order of their ids."""
    data = read_sound_coco(json_file)
    counts = count_objects(data["annotations"])
    return {c["name"]: counts[c["id"]] for c in sorted(data["categories"], key=lambda c: c["id"])}


def _claim(folder: Path, settings: dict) -> None:
    """Write down what a folder's run is; raises ValueError if it is another one's."""
    path = folder / SETTINGS
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(
            f"--output: {folder} was begun with other settings ({SETTINGS} there); name another "
            "folder, or delete that one to train it anew"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(path, settings)


def _write_json(path: Path, data: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
