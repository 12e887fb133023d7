"""The training step against arithmetic, and what a checkpoint of the trainer brings back."""

import math

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from il_net.config import load_config
from il_net.engine import trainer as trainer_module
from il_net.engine.train_step import TrainStep, amp_dtype
from il_net.engine.trainer import Trainer, check_batch_size

DTYPES = [None, torch.bfloat16, torch.float16]


class Line(nn.Module):
    """y = w x with a squared error and a penalty: gradient 2 (w x - y) x + 2 for x = the input.

    Starts at w = 2. Remembers in which number format the product was computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 2.0)
        self.seen: torch.dtype | None = None

    @property
    def w(self) -> float:
        return self.layer.weight.item()

    def forward(self, batch: tuple[float, float]) -> dict[str, Tensor]:
        x, y = batch
        out = self.layer(torch.tensor([[x]]))
        self.seen = out.dtype
        return {
            "loss_fit": (out.float() - y).square().sum(),
            "loss_penalty": 2 * self.layer.weight.sum(),
        }


def make_step(
    batches: list, *, dtype: torch.dtype | None = None, momentum: float = 0.0, scale: float = 64.0
) -> tuple[Line, TrainStep]:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=momentum)
    step = TrainStep(model, batches, optimizer, amp_dtype=dtype)
    if dtype == torch.float16:
        set_scale(step, scale)
    return model, step


def set_scale(step: TrainStep, scale: float) -> None:
    step.grad_scaler.load_state_dict({**step.grad_scaler.state_dict(), "scale": scale})


def run(step: TrainStep, count: int = 1) -> EventStorage:
    with EventStorage() as storage:
        for _ in range(count):
            step.run_step()
            storage.step()
    return storage


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_step_is_gradient_descent_on_the_sum_of_the_losses(dtype):
    # All numbers are exact in bf16 and fp16. x = 1, y = 1, w = 2: losses 1 and 4; gradient
    # 2 (2 - 1) + 2 = 4; w becomes 2 - 0.125 * 4 = 1.5.
    model, step = make_step([(1.0, 1.0)], dtype=dtype)
    storage = run(step)
    assert model.w == 1.5
    latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest["loss_fit"] == 1.0
    assert latest["loss_penalty"] == 4.0
    assert latest["total_loss"] == 5.0
    assert latest["data_time"] >= 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_model_runs_in_the_number_format_asked_for(dtype):
    model, step = make_step([(1.0, 1.0)], dtype=dtype)
    run(step)
    assert model.seen == (dtype or torch.float32)
    assert model.layer.weight.dtype == torch.float32  # master weights stay


def test_gradients_do_not_add_up_over_steps():
    # Second step from w = 1.5: gradient 2 * 0.5 + 2 = 3; w = 1.5 - 0.375.
    model, step = make_step([(1.0, 1.0)] * 2)
    run(step, 2)
    assert model.w == 1.125


def test_batches_are_drawn_in_order_one_a_step():
    # Second batch (0, 1): gradient is the penalty's 2; w = 1.5 - 0.25.
    model, step = make_step([(1.0, 1.0), (0.0, 1.0), (9.0, 9.0)])
    run(step, 2)
    assert model.w == 1.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_loss_stops_before_the_weights_change(dtype, bad):
    model, step = make_step([(1.0, bad)], dtype=dtype, momentum=0.9)
    with pytest.raises(FloatingPointError, match="not finite: loss_fit"):
        run(step)
    assert model.w == 2.0
    assert step.optimizer.state_dict()["state"] == {}


def test_only_fp16_scales_the_loss():
    for dtype in DTYPES:
        _, step = make_step([(1.0, 1.0)], dtype=dtype)
        assert step.grad_scaler.is_enabled() == (dtype == torch.float16)


def test_fp16_overflow_of_a_gradient_skips_the_step_and_lowers_the_scale():
    # The loss is finite, its gradient times 2^127 is not.
    model, step = make_step([(1.0, 1.0)], dtype=torch.float16, scale=2.0**127)
    run(step)
    assert model.w == 2.0
    assert step.grad_scaler.get_scale() == 2.0**126


def test_loss_scale_and_momentum_are_saved_and_restored():
    _, step = make_step([(1.0, 1.0)], dtype=torch.float16, momentum=0.5, scale=32.0)
    run(step)
    model, other = make_step([(1.0, 1.0)], dtype=torch.float16, momentum=0.5)
    other.load_state_dict(step.state_dict())
    assert other.grad_scaler.get_scale() == 32.0
    # The first gradient, 4, is in the momentum: from w = 2 now 4 + 0.5 * 4 = 6 times 0.125.
    run(other)
    assert model.w == 2.0 - 0.75


@pytest.mark.parametrize("before", [None, torch.bfloat16], ids=str)
def test_a_run_may_go_on_in_fp16(before):
    """A checkpoint without a loss scale starts a new one."""
    _, step = make_step([(1.0, 1.0)], dtype=before)
    run(step)
    model, other = make_step([(1.0, 1.0)], dtype=torch.float16, scale=128.0)
    other.load_state_dict(step.state_dict())
    assert other.grad_scaler.get_scale() == 128.0
    run(other)
    assert model.w == 1.5


def test_a_run_may_go_on_without_fp16():
    _, step = make_step([(1.0, 1.0)], dtype=torch.float16)
    run(step)
    model, other = make_step([(1.0, 1.0)])
    other.load_state_dict(step.state_dict())
    run(other)
    assert model.w == 1.5


def test_a_checkpoint_of_detectron2s_own_step_can_be_resumed():
    _, step = make_step([(1.0, 1.0)])
    run(step)
    state = step.state_dict()
    del state["grad_scaler"]
    _, other = make_step([(1.0, 1.0)])
    other.load_state_dict(state)


# ---- the optimizer ----


class Slopes(nn.Module):
    """Loss 30 a + 40 b from a = b = 0: gradients 30 and 40, together of norm 50."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, _: object) -> dict[str, Tensor]:
        return {"loss_a": 30 * self.a.sum(), "loss_b": 40 * self.b.sum()}


def clip_once(dtype: torch.dtype | None = None, **clip: object) -> Slopes:
    """One step at rate 1/8 with the trainer's optimizer; the gradients stay as clipped."""
    cfg = make_cfg(BASE_LR=0.125, MOMENTUM=0.0, WEIGHT_DECAY=0.0)
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_other_cfg(CfgNode({"ENABLED": True, **clip}))
    cfg.freeze()
    model = Slopes()
    run(TrainStep(model, [None], Trainer.build_optimizer(cfg, model), amp_dtype=dtype))
    return model


def test_adamw_moves_every_weight_by_the_rate():
    """Its first step divides each gradient by its own size."""
    cfg = make_cfg(BASE_LR=0.125, OPTIMIZER="AdamW", WEIGHT_DECAY=0.5)
    model = Slopes()
    nn.init.ones_(model.a)  # decays by 1/8 of a half, not through the gradient
    run(TrainStep(model, [None], Trainer.build_optimizer(cfg, model)))
    assert [model.a.item(), model.b.item()] == pytest.approx([1 - 0.125 / 2 - 0.125, -0.125])


def test_other_optimizers_are_refused():
    with pytest.raises(ValueError, match=r"SOLVER.OPTIMIZER .*'SGD', 'AdamW'.*'Adam'"):
        Trainer.build_optimizer(make_cfg(OPTIMIZER="Adam"), Slopes())


def gradients_and_weights(model: Slopes) -> list[float]:
    return [model.a.grad.item(), model.b.grad.item(), model.a.item(), model.b.item()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_model_clips_the_norm_of_all_gradients(dtype):
    # Norm 50 to 35: all times 0.7. fp16 scales the loss by 65536, which must not count.
    model = clip_once(dtype, CLIP_TYPE="full_model", CLIP_VALUE=35.0)
    assert math.hypot(model.a.grad.item(), model.b.grad.item()) == pytest.approx(35)
    expected = [21, 28, -21 / 8, -28 / 8]
    assert gradients_and_weights(model) == pytest.approx(expected)


@pytest.mark.parametrize("clip", [{"CLIP_VALUE": 50.5}, {"ENABLED": False}], ids=str)
def test_full_model_leaves_a_smaller_norm_alone_and_may_be_off(clip):
    expected = [30, 40, -30 / 8, -40 / 8]
    assert gradients_and_weights(clip_once(CLIP_TYPE="full_model", **clip)) == expected


def test_full_model_takes_the_norm_of_the_configuration():
    # The largest of 30 and 40, down to 20.
    model = clip_once(CLIP_TYPE="full_model", CLIP_VALUE=20.0, NORM_TYPE=math.inf)
    assert gradients_and_weights(model)[:2] == pytest.approx([15, 20])


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_detectron2s_clip_types_stay(kind):
    # Each gradient by itself: 30 passes, 40 becomes 35.
    model = clip_once(CLIP_TYPE=kind, CLIP_VALUE=35.0)
    assert gradients_and_weights(model)[:2] == pytest.approx([30, 35])


@pytest.mark.parametrize("enabled", [True, False])
def test_unknown_clip_type_names_the_key_and_the_choice(enabled):
    with pytest.raises(ValueError) as error:
        clip_once(CLIP_TYPE="whole", ENABLED=enabled)
    for part in ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value", "norm", "full_model", "whole"):
        assert part in str(error.value)


# ---- configuration ----


def make_cfg(**solver: object) -> CfgNode:
    cfg = load_config("", [])
    cfg.SOLVER.merge_from_other_cfg(CfgNode(solver))
    return cfg


def test_amp_dtype():
    assert amp_dtype(load_config("", [])) is None
    on = ["SOLVER.AMP.ENABLED", "True"]
    assert amp_dtype(load_config("", on)) is torch.bfloat16
    assert amp_dtype(load_config("", [*on, "SOLVER.AMP.DTYPE", "fp16"])) is torch.float16


@pytest.mark.parametrize("enabled", ["True", "False"])
def test_unknown_amp_dtype_names_the_key_and_the_choice(enabled):
    opts = ["SOLVER.AMP.ENABLED", enabled, "SOLVER.AMP.DTYPE", "float16"]
    with pytest.raises(ValueError) as error:
        amp_dtype(load_config("", opts))
    for part in ("SOLVER.AMP.DTYPE", "bf16", "fp16", "float16"):
        assert part in str(error.value)


@pytest.mark.parametrize(("batch", "processes"), [(1, 1), (4, 1), (4, 2), (2, 2), (6, 3)])
def test_batch_that_can_be_shared(monkeypatch, batch, processes):
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    check_batch_size(make_cfg(IMS_PER_BATCH=batch))


@pytest.mark.parametrize(("batch", "processes"), [(3, 2), (1, 2), (0, 1), (0, 2), (16, 3)])
def test_batch_that_cannot_be_shared(monkeypatch, batch, processes):
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    with pytest.raises(ValueError) as error:
        check_batch_size(make_cfg(IMS_PER_BATCH=batch))
    message = str(error.value)
    assert f"SOLVER.IMS_PER_BATCH {batch} " in message
    assert str(processes) in message.split("IMS_PER_BATCH")[1].split("of all")[1]


# ---- the whole trainer ----


class LineTrainer(Trainer):
    """The trainer with the line for a model and endless equal batches."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return Line()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> list:
        return [(1.0, 1.0)] * 100

    def build_writers(self) -> list:
        return []


def trainer_cfg(folder, *opts: str) -> CfgNode:
    cfg = load_config("", list(opts))
    cfg.MODEL.WEIGHTS = ""
    cfg.OUTPUT_DIR = str(folder)
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.SOLVER.BASE_LR = 0.03125
    cfg.SOLVER.MOMENTUM = 0.5
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.STEPS = (4,)
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    cfg.SOLVER.MAX_ITER = 6
    return cfg


def train(folder, iterations: int, *opts: str, resume: bool = False) -> LineTrainer:
    cfg = trainer_cfg(folder, *opts)
    cfg.SOLVER.MAX_ITER = iterations
    trainer = LineTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def expected_w(iterations: int) -> float:
    """SGD with momentum 0.5 on 2 (w - 1) + 2 = 2 w, rate 1/32, a tenth of it after 4 steps."""
    w, velocity = 2.0, 0.0
    for i in range(iterations):
        velocity = 0.5 * velocity + 2 * w
        w -= velocity / 32 / (10 if i >= 4 else 1)
    return w


def test_training_follows_the_schedule(tmp_path):
    assert train(tmp_path, 6).model.w == pytest.approx(expected_w(6), rel=1e-6)


@pytest.mark.parametrize("stop", [2, 5])
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, stop):
    """Weights, momentum and learning rate come back; the model keeps no other state."""
    train(tmp_path, stop)
    trainer = train(tmp_path, 6, resume=True)
    assert trainer.start_iter == stop
    assert trainer.model.w == pytest.approx(expected_w(6), rel=1e-6)


def test_loss_scale_comes_back_with_the_checkpoint(tmp_path):
    opts = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "fp16")
    trainer = LineTrainer(trainer_cfg(tmp_path, *opts))
    set_scale(trainer._trainer, 64.0)
    trainer.iter = 1
    trainer.checkpointer.save("model_0000001", iteration=1)
    again = LineTrainer(trainer_cfg(tmp_path, *opts))
    again.resume_or_load(resume=True)
    assert again._trainer.grad_scaler.get_scale() == 64.0


def test_resuming_says_where_it_goes_on(tmp_path, caplog):
    train(tmp_path, 2)
    caplog.clear()
    with caplog.at_level("INFO", logger=trainer_module.__name__):
        LineTrainer(trainer_cfg(tmp_path)).resume_or_load(resume=True)
    (message,) = [r.getMessage() for r in caplog.records if r.name == trainer_module.__name__]
    assert message.startswith("Resumed at iteration 2 of 6")
    assert "model_final.pth" in message


def test_without_resume_it_starts_anew(tmp_path, caplog):
    train(tmp_path, 2)
    trainer = LineTrainer(trainer_cfg(tmp_path))
    with caplog.at_level("INFO", logger=trainer_module.__name__):
        trainer.resume_or_load(resume=False)
    assert trainer.start_iter == 0
    assert trainer.model.w == 2.0
    assert "Resumed" not in caplog.text


def test_wrong_batch_stops_before_a_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(LineTrainer, "build_model", None)
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH"):
        LineTrainer(trainer_cfg(tmp_path))
