"""What surrounds a step: the step's random numbers, reports on pseudo labels, the best model."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import cv2
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from il_net.checkpoint import Checkpointer
from il_net.engine import hooks as hooks_module
from il_net.engine.hooks import BestModel, PseudoLabelReport, TeacherUpdate
from il_net.engine.resumable import ResumableTrainer
from il_net.modeling.monitor import PseudoLabelMonitor

METRIC = "teacher/bbox/AP"
CLASSES = ["leaf", "rust", "blight"]


class Steps(TrainerBase):
    """Detectron2's loop around a function of the iteration."""

    def __init__(self, step: Callable[[int], None], *own: HookBase) -> None:
        super().__init__()
        self.step = step
        self.register_hooks(list(own))

    def run_step(self) -> None:
        self.step(self.iter)


# ---- the teacher's update and the step's random numbers ----


@pytest.fixture
def update(monkeypatch):
    """What a step draws: ``update(seed, iteration, rank, ranks)``; and the calls so far."""
    calls: list[int] = []

    def draw(seed: int, iteration: int, rank: int = 0, ranks: int = 1) -> float:
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: ranks)
        trainer = object.__new__(ResumableTrainer)
        trainer.cfg, trainer.iter, trainer._hooks = SimpleNamespace(SEED=seed), iteration, []
        trainer.preemption = SimpleNamespace(step_begins=lambda: None)
        trainer.storage = SimpleNamespace()
        hook = TeacherUpdate(SimpleNamespace(update_teacher=calls.append))
        trainer.register_hooks([hook])
        trainer.before_step()
        return torch.rand(()).item()

    draw.calls = calls
    return draw


def test_a_steps_random_numbers_follow_from_seed_iteration_and_rank(update):
    places = itertools.product((0, 1, 2), range(4), (0, 1))  # seed, iteration, rank of two
    drawn = {place: update(*place, 2) for place in places}
    assert len(set(drawn.values())) == len(drawn) == 24
    torch.rand(7)  # what happened before does not matter
    for place, value in drawn.items():
        assert update(*place, 2) == value


def test_steps_without_seed_are_left_alone(update):
    torch.manual_seed(0)
    expected = torch.rand(2).tolist()
    torch.manual_seed(0)
    assert [update(-1, 5), update(-1, 5)] == expected


def test_the_largest_seed_of_numpy_is_one_of_the_steps(update):
    assert update(2**32 - 1, 10**6) != update(2**32 - 1, 10**6 + 1)


def test_the_teacher_is_updated_once_before_every_step(update):
    for iteration in (3, 4, 5):
        update(1, iteration)
    assert update.calls == [3, 4, 5]
    hook, order = TeacherUpdate(SimpleNamespace(update_teacher=lambda i: order.append(i))), []
    Steps(lambda i: order.append(f"step {i}"), hook).train(1, 3)
    assert order == [1, "step 1", 2, "step 2"]


# ---- the best model ----


def train(
    folder: Path, scores: list[float], start: int = 0, end: int = 6, metric: str = METRIC
) -> None:
    """Steps from ``start``, an evaluation after every second one; the weight is the steps done."""
    model, values = nn.Linear(1, 1, bias=False), iter(scores)

    def step(iteration: int) -> None:
        nn.init.constant_(model.weight, iteration + 1)

    def evaluate() -> dict:
        return {"teacher": {"bbox": {"AP": next(values)}}}

    best = BestModel(metric, model, folder)
    Steps(step, hooks.EvalHook(2, evaluate), best).train(start, end)
    assert next(values, None) is None, "not all evaluations took place"


def read(folder: Path) -> tuple[float, int, float]:
    """Steps done, last iteration and value of the kept model."""
    content = torch.load(folder / "model_best.pth", weights_only=True)
    value = content["metrics"][METRIC]
    return content["model"]["weight"].item(), content["iteration"], value


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([3.0, 5.0, 4.0], (4, 3, 5.0)),
        ([3.0, 5.0, 9.0], (6, 5, 9.0)),  # Detectron2 evaluates the last model after training
        ([5.0, 3.0, 5.0], (2, 1, 5.0)),  # the first of equals
        ([0.0, 0.0, 0.0], (2, 1, 0.0)),
        ([math.nan, 2.0, math.nan], (4, 3, 2.0)),
    ],
)
def test_the_model_with_the_highest_value_is_kept(tmp_path, scores, kept):
    train(tmp_path, scores)
    assert read(tmp_path) == kept


def test_a_value_is_looked_at_once(tmp_path, caplog):
    """The storage shows it until the next evaluation; the model has changed by then."""
    with caplog.at_level("INFO", logger=hooks_module.__name__):
        train(tmp_path, [3.0, 5.0, 4.0])
    assert [r.getMessage() for r in caplog.records] == [
        f"{METRIC} 3.00 is the best so far: saved model_best.pth",
        f"{METRIC} 5.00 is the best so far: saved model_best.pth",
    ]


def test_without_the_metric_nothing_is_kept(tmp_path):
    train(tmp_path, [3.0, 5.0, 4.0], metric="student/bbox/AP")
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_replaces_the_model_by_a_better_one_only(tmp_path):
    train(tmp_path, [3.0, 5.0], end=4)
    train(tmp_path, [4.0, 4.5], start=4, end=8)
    assert read(tmp_path) == (4, 3, 5.0)
    train(tmp_path, [5.5], start=8, end=10)
    assert read(tmp_path) == (10, 9, 5.5)


def test_a_run_resumed_from_before_the_best_model_keeps_it(tmp_path):
    """It was stopped after the evaluation, and goes on from an older checkpoint."""
    train(tmp_path, [3.0, 5.0], end=4)
    train(tmp_path, [4.0, 4.5], start=2, end=6)
    assert read(tmp_path) == (4, 3, 5.0)


def test_a_finished_run_that_is_resumed_leaves_the_model_alone(tmp_path):
    train(tmp_path, [3.0, 5.0, 9.0])
    before = (tmp_path / "model_best.pth").stat().st_mtime_ns
    train(tmp_path, [9.0], start=6)  # evaluates, and trains nothing
    assert (tmp_path / "model_best.pth").stat().st_mtime_ns == before


def test_a_new_run_in_the_same_folder_starts_anew(tmp_path):
    train(tmp_path, [3.0, 9.0, 4.0])
    train(tmp_path, [2.0, 1.0, 1.0])
    assert read(tmp_path) == (2, 1, 2.0)


def test_a_file_of_another_metric_is_replaced(tmp_path):
    torch.save({"model": {}, "metrics": {"student/bbox/AP": 50.0}}, tmp_path / "model_best.pth")
    train(tmp_path, [3.0], start=4)
    assert read(tmp_path) == (6, 5, 3.0)


def test_the_best_model_is_no_checkpoint_to_resume_from(tmp_path):
    train(tmp_path, [3.0, 5.0, 4.0])
    assert [path.name for path in tmp_path.iterdir()] == ["model_best.pth"]


def test_a_run_that_is_stopped_while_it_writes_leaves_the_old_file(tmp_path, monkeypatch):
    train(tmp_path, [3.0], start=0, end=2)

    def stop(_: object, file: IO[bytes]) -> None:
        file.write(b"half a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [5.0], start=2, end=4)
    assert read(tmp_path) == (2, 1, 3.0)


def test_the_best_model_serves_as_weights(tmp_path):
    train(tmp_path, [3.0, 5.0, 4.0])
    model = nn.Linear(1, 1, bias=False)
    Checkpointer(model).load_complete(str(tmp_path / "model_best.pth"))
    assert model.weight.item() == 4


# ---- reports on pseudo labels ----

SIZE = (120, 160)


def labels(*classes: int, score: float = 0.75) -> Instances:
    """Pseudo labels of one image, all of the same box."""
    found = Instances(SIZE)
    found.gt_boxes = Boxes(torch.tensor([[10.0, 5, 50, 35]] * len(classes)).reshape(-1, 4))
    found.gt_classes = torch.tensor(classes, dtype=torch.long)
    found.scores = torch.full((len(classes),), score)
    return found


def report(
    step: Callable[[PseudoLabelMonitor, int], None],
    steps: int,
    *,
    start: int = 0,
    period: int = 20,
    end: int | None = None,
    **options: object,
) -> dict[int, dict[str, float]]:
    """Numbers by the iteration at which they were written."""
    monitor, written = PseudoLabelMonitor(len(CLASSES)), {}
    hook = PseudoLabelReport(
        SimpleNamespace(monitor=monitor),
        CLASSES,
        period=period,
        **{"picture_period": 0, "folder": Path("nowhere"), "bgr": True, **options},
    )
    hook.trainer = SimpleNamespace(max_iter=end or 10**6)
    with EventStorage(start) as storage:
        for iteration in range(start, start + steps):
            hook.trainer.iter, hook.trainer.storage = iteration, storage
            step(monitor, iteration)
            hook.after_step()
            storage.step()
            for name, (value, when) in storage.latest_with_smoothing_hint(20).items():
                written.setdefault(when, {})[name] = value
    return written


def test_reports_hold_the_means_since_the_last_one():
    # Boxes per image: (1 + 0) / 2, then (3 + 1) / 2; in the second report 1 and 0.
    images = [
        [labels(0), labels()],
        [labels(0, 0, 2), labels(1)],
        [labels(1), labels(1)],
        [labels(), labels()],
    ]

    def step(monitor: PseudoLabelMonitor, iteration: int) -> None:
        monitor.labels([], images[iteration])
        monitor.losses({"loss_cls": torch.tensor(float(iteration))})

    first, second = report(step, 4, period=2).items()
    assert (first[0], second[0]) == (1, 3)
    assert first[1] == {
        "pseudo/boxes_per_image": pytest.approx(1.25),
        "pseudo/images_without_boxes": pytest.approx(0.25),
        "pseudo/class_histogram/leaf": pytest.approx(3 / 5),
        "pseudo/class_histogram/rust": pytest.approx(1 / 5),
        "pseudo/class_histogram/blight": pytest.approx(1 / 5),
        "pseudo/class_score": pytest.approx(0.75),
        "pseudo/raw_loss_cls": pytest.approx(0.5),
    }
    # Not the median of both, as writers take of numbers that come every step.
    assert second[1]["pseudo/boxes_per_image"] == pytest.approx(0.5)
    assert second[1]["pseudo/class_histogram/rust"] == 1
    assert second[1]["pseudo/raw_loss_cls"] == 2.5


def test_the_last_steps_are_reported_too():
    written = report(lambda m, i: m.labels([], [labels(0)] * (i + 1)), 5, period=2, end=5)
    assert sorted(written) == [1, 3, 4]


def test_burn_in_has_nothing_to_report():
    assert report(lambda *_: None, 6, period=2, end=6) == {}


def test_no_boxes_at_all_are_zeros_not_an_error():
    written = report(lambda m, _: m.labels([], [labels()]), 2, period=2)
    assert written[1]["pseudo/boxes_per_image"] == 0
    assert [written[1][f"pseudo/class_histogram/{name}"] for name in CLASSES] == [0, 0, 0]


def warnings(caplog, found: Callable[[int], bool], steps: int, start: int = 0) -> list[str]:
    caplog.clear()
    with caplog.at_level("WARNING", logger=hooks_module.__name__):
        report(lambda m, i: m.labels([], [labels(*[0] * found(i))]), steps, start=start)
    return [record.getMessage() for record in caplog.records]


def test_a_warning_after_500_steps_without_any_pseudo_box(caplog):
    assert warnings(caplog, lambda _: False, 499) == []
    (message,) = warnings(caplog, lambda _: False, 500, start=2000)
    for part in ("500 steps", "SEMISUP.PSEUDO.SCORE_THRESH", "SEMISUP.BURN_IN_ITERS"):
        assert part in message
    assert len(warnings(caplog, lambda _: False, 1000)) == 2  # again after as many
    # One box within them is enough.
    assert warnings(caplog, lambda i: i == 250, 600) == []


@pytest.mark.parametrize("bgr", [True, False])
def test_pictures_of_the_weak_view(tmp_path, bgr):
    red = torch.zeros(3, *SIZE, dtype=torch.uint8)
    red[2 if bgr else 0] = 200
    records = [
        {"image": red, "file_name": "far/away/twig.png"},
        {"image": torch.zeros_like(red), "file_name": "other.png"},
    ]

    def step(monitor: PseudoLabelMonitor, iteration: int) -> None:
        if iteration >= 2:  # the end of burn-in
            monitor.labels(records, [labels(1), labels()])

    report(step, 6, picture_period=2, folder=tmp_path / "pseudo_labels", bgr=bgr)
    names = sorted(path.name for path in (tmp_path / "pseudo_labels").iterdir())
    assert names == ["0000004_twig.jpg", "0000006_twig.jpg"]
    picture = cv2.imread(str(tmp_path / "pseudo_labels" / names[0])).astype(int)
    assert picture.shape == (*SIZE, 3)
    blue, green, red_seen = picture[70:, 90:].reshape(-1, 3).mean(0)  # far from the box
    assert red_seen == pytest.approx(200, abs=10) and max(blue, green) < 20
    assert abs(picture[5, 30] - [0, 0, 200]).max() > 40  # its upper border


def test_no_pictures_without_a_period(tmp_path):
    record = {"image": torch.zeros(3, *SIZE, dtype=torch.uint8), "file_name": "a.png"}
    report(lambda m, _: m.labels([record], [labels(0)]), 4, folder=tmp_path / "no")
    assert not (tmp_path / "no").exists()
