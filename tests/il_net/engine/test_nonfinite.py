"""Numbers that are not finite: found, kept, told; and a skipped step as if it had not been."""

import math
import os
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from il_net.config import load_config
from il_net.data.loader import SemiBatch
from il_net.engine.nonfinite import (
    BOXES,
    GRADIENTS,
    KEPT,
    NonFiniteGuard,
    file_names,
    gradients_are_finite,
    pack_batch,
    rng_state,
    set_rng_state,
    unpack_batch,
)
from il_net.engine.train_step import TrainStep
from il_net.engine.trainer import Trainer

RATE, MOMENTUM = 0.125, 0.5


class Shaky(nn.Module):
    """Loss x w from w = 0, so the gradient is x; and what a record's ``fault`` does to it.

    Counts its forward passes in a buffer, as running statistics are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.register_buffer("passes", torch.zeros(1))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, records: list[dict]) -> dict[str, Tensor]:
        (record,) = records
        fault = record.get("fault", "")
        self.passes += 1
        self.mean += math.nan if fault else 1.0
        losses = {"loss_a": record["x"] * self.w.sum(), "loss_b": 0.0 * self.w.sum()}
        if fault == "loss":
            losses["loss_b"] = losses["loss_b"] * math.nan
        elif fault == "root":  # of zero: the slope is infinite, times zero no number
            losses["loss_b"] = (self.w * 0.0).sqrt().sum()
        elif fault == "boxes":
            Boxes(torch.full((1, 4), math.nan)).clip((9, 9))
        elif fault == "gives up":
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        elif fault == "mistake":
            raise AssertionError("an invariant")
        return losses


def record(x: float = 1.0, fault: str = "") -> list[dict]:
    """A batch of one image whose file is named after its number and its fault."""
    return [{"file_name": f"{x}{fault}.jpg", "x": x, "fault": fault}]


def make_step(
    folder: Path,
    batches: list,
    *,
    action: str = "skip",
    limit: int = 10,
    accumulate: int = 1,
    dtype: torch.dtype | None = None,
) -> TrainStep:
    model = Shaky()
    guard = NonFiniteGuard(model, folder, action=action, limit=limit)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    return TrainStep(model, batches, optimizer, amp_dtype=dtype, accumulate=accumulate, guard=guard)


def run(step: TrainStep, count: int) -> EventStorage:
    with EventStorage() as storage:
        for step.iter in range(count):
            storage.iter = step.iter
            step.run_step()
    return storage


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def load(folder: Path, iteration: int, rank: int = 0) -> dict:
    path = folder / "nonfinite" / f"iter_{iteration:07d}_rank{rank}.pt"
    return torch.load(path, weights_only=True)


# ---- finding ----


@pytest.mark.parametrize(
    ("fault", "name"),
    [("loss", "loss_b"), ("root", GRADIENTS), ("gives up", BOXES), ("boxes", BOXES)],
)
def test_stop_names_what_is_not_finite_and_the_file(tmp_path, caplog, fault, name):
    step = make_step(tmp_path, [record(), record(3.0, fault)], action="stop")
    with pytest.raises(SystemExit) as stopped:
        run(step, 2)
    (message,) = str(stopped.value).splitlines()
    place = tmp_path / "nonfinite" / "iter_0000001_rank0.pt"
    found = f"error: iteration 1: not finite: {name} on rank 0 with 3.0{fault}.jpg. "
    assert message.startswith(f"{found}Inputs and weights: {place}. ")
    for key in ("BASE_LR", "WARMUP_ITERS", "CLIP_GRADIENTS.ENABLED", "NONFINITE.ACTION"):
        assert f"SOLVER.{key}" in message
    assert "1.0.jpg" not in message
    assert caplog.messages == [message.removeprefix("error: ")]  # for log.txt
    assert step.model.w.item() == -RATE  # of the first step
    content = load(tmp_path, 1)
    assert content["bad"] == [name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_number_formats(tmp_path, dtype):
    step = make_step(tmp_path, [record(3.0, "loss"), record()], dtype=dtype)
    run(step, 2)
    assert step.model.w.item() == -RATE
    assert load(tmp_path, 0)["bad"] == ["loss_b"]


def test_overflow_is_left_to_the_scaler_but_not_what_is_left_at_scale_1(tmp_path):
    """65,536 is halved sixteen times; the seventeenth step is no overflow of the scale."""
    step = make_step(tmp_path, [record(1.0, "root")] * 17 + [record()], dtype=torch.float16)
    run(step, 16)
    assert step.grad_scaler.get_scale() == 1
    assert kept(tmp_path) == []
    step.iter = 16
    with EventStorage():
        step.run_step()
        assert load(tmp_path, 16)["bad"] == [GRADIENTS]
        step.run_step()
    assert step.model.w.item() == -RATE


def test_a_mistake_of_ours_is_no_number(tmp_path):
    with pytest.raises(AssertionError, match="an invariant"):
        run(make_step(tmp_path, [record(1.0, "mistake")]), 1)


def test_a_model_in_evaluation_gives_up_as_before(tmp_path):
    step = make_step(tmp_path, [])
    with pytest.raises(FloatingPointError, match="Predicted boxes"):
        step.model.eval()(record(1.0, "gives up"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_bad_number_among_gradients(value, dtype):
    parameters = [nn.Parameter(torch.zeros(5, dtype=dtype)) for _ in range(3)]
    for parameter in parameters[:2]:  # the third has none
        parameter.grad = torch.full((5,), 1e30, dtype=dtype)  # its square would be infinite
    parameters.append(nn.Parameter(torch.zeros(0)))
    parameters[-1].grad = torch.zeros(0)
    assert gradients_are_finite(parameters)
    parameters[1].grad[3] = value
    assert not gradients_are_finite(parameters)


# ---- skipping ----


def sgd(gradients: list[float]) -> float:
    """w after plain SGD with momentum from 0."""
    w = velocity = 0.0
    for gradient in gradients:
        velocity = MOMENTUM * velocity + gradient
        w -= RATE * velocity
    return w


@pytest.mark.parametrize("fault", ["loss", "root", "gives up", "boxes"])
def test_a_skipped_step_is_as_if_it_had_not_been(tmp_path, caplog, fault):
    step = make_step(tmp_path, [record(1.0), record(5.0, fault), record(2.0), record(3.0)])
    storage = run(step, 4)
    assert step.model.w.item() == sgd([1, 2, 3])
    (state,) = step.optimizer.state_dict()["state"].values()
    assert state["momentum_buffer"].item() == (1 * MOMENTUM + 2) * MOMENTUM + 3
    # What the forward pass changed is put back, too.
    assert step.model.passes.item() == 3
    assert step.model.mean.item() == 3
    # The step has no losses in the metrics; those of the others are there.
    assert [i for _, i in storage.history("total_loss").values()] == [0, 2, 3]
    assert all(math.isfinite(v) for v, _ in storage.latest().values())
    (warning,) = caplog.messages
    assert warning.startswith("iteration 1: not finite: ")
    assert "1 so far" in warning


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize(
    ("fault", "name"), [("loss", "loss_b"), ("root", GRADIENTS), ("gives up", BOXES)]
)
def test_accumulated_batches_are_skipped_together(tmp_path, caplog, bad, fault, name):
    batches = [record(2.0), record(4.0), record(6.0), record(8.0)]
    batches[bad] = record(7.0, fault)
    step = make_step(tmp_path, batches, accumulate=2)
    run(step, 2)
    assert step.model.w.item() == sgd([(6 + 8) / 2])
    files = ["7.0" + fault + ".jpg", batches[1 - bad][0]["file_name"]]
    assert f" with {', '.join(sorted(files))}. " in caplog.text
    content = load(tmp_path, 0)
    assert content["bad"] == [name]
    assert [packed[""] for packed in content["batches"]] == batches[:2]


@pytest.mark.parametrize("limit", [0, 2])
def test_the_limit_of_skipped_steps(tmp_path, limit):
    step = make_step(tmp_path, [record(1.0, "loss")] * 9, limit=limit)
    with pytest.raises(SystemExit) as stopped:
        run(step, 9)
    assert step.iter == limit
    assert f"SOLVER.NONFINITE.LIMIT {limit} steps were skipped before" in str(stopped.value)


def test_only_the_first_steps_are_kept(tmp_path):
    step = make_step(tmp_path, [record(1.0, "loss")] * 9, limit=8)
    with pytest.raises(SystemExit) as stopped:
        run(step, 9)
    assert kept(tmp_path) == [f"iter_{i:07d}_rank0.pt" for i in range(KEPT)]
    assert f"Inputs and weights: {tmp_path / 'nonfinite'}. " in str(stopped.value)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_does_not_hide_the_message(tmp_path):
    (tmp_path / "nonfinite").mkdir()
    partial = tmp_path / "nonfinite" / "iter_0000000_rank0.partial"
    partial.symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stopped:
        run(make_step(tmp_path, [record(1.0, "loss")], action="stop"), 1)
    (message,) = str(stopped.value).splitlines()
    assert "not finite: loss_b on rank 0 with 1.0loss.jpg" in message
    assert "not kept (" in message and "No space left" in message
    assert not list((tmp_path / "nonfinite").iterdir())


# ---- what is kept ----


def test_the_kept_step_has_the_state_from_before_it(tmp_path):
    torch.manual_seed(3)
    step = make_step(tmp_path, [record(1.0), record(5.0, "loss")], action="stop")
    expected = rng_state()["cpu"]
    with pytest.raises(SystemExit):
        run(step, 2)
    content = load(tmp_path, 1)
    assert content.keys() == {"iteration", "bad", "batches", "rng", "model"}
    assert content["iteration"] == 1
    assert content["batches"] == [{"": record(5.0, "loss")}]
    assert [r["cpu"].tolist() for r in content["rng"]] == [expected.tolist()]  # nothing was drawn
    assert {name: tensor.item() for name, tensor in content["model"].items()} == {
        "w": -RATE, "passes": 1, "mean": 1
    }  # fmt: skip


def test_random_numbers_repeat():
    state = rng_state()
    first = torch.rand(3)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


class Kind(IntEnum):
    XYXY = 0


def labels(**fields: object) -> Instances:
    boxes = Boxes(torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.5, 1.0, 9.0, 8.0]]))
    return Instances((10, 20), gt_boxes=boxes, gt_classes=torch.tensor([2, 0]), **fields)


def image(value: int, **entries: object) -> dict:
    pixels = torch.full((3, 10, 20), value, dtype=torch.uint8)
    return {"file_name": f"{value}.jpg", "image": pixels, "height": 10, "width": 20, **entries}


def through_a_file(batch: object, folder: Path) -> dict[str, list[dict]]:
    torch.save(pack_batch(batch), folder / "batch.pt")
    return unpack_batch(torch.load(folder / "batch.pt", weights_only=True))


def check_labels(ours: Instances, theirs: Instances) -> None:
    assert ours.image_size == theirs.image_size
    assert ours.get_fields().keys() == theirs.get_fields().keys()
    assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
    assert torch.equal(ours.gt_classes, theirs.gt_classes)


def test_a_plain_batch_comes_back(tmp_path):
    polygons = [[np.array([0.0, 0, 2, 0, 2, 3])], [np.arange(6.0), np.arange(8.0) / 3]]
    bits = torch.rand(2, 10, 20) > 0.5
    batch = [
        image(1, instances=labels(gt_masks=PolygonMasks(polygons))),
        image(2, instances=labels(gt_masks=BitMasks(bits))),
        image(3, instances=labels(gt_keypoints=Keypoints(torch.rand(2, 4, 3)))),
        image(4, instances=labels(situation=torch.tensor([3, 1]))),
        image(5),
    ]
    back = through_a_file(batch, tmp_path)[""]
    assert [r["file_name"] for r in back] == [f"{i}.jpg" for i in range(1, 6)]
    for ours, theirs in zip(back, batch, strict=True):
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours["image"], theirs["image"])
        if "instances" in theirs:
            check_labels(ours["instances"], theirs["instances"])
    masks = back[0]["instances"].gt_masks
    assert isinstance(masks, PolygonMasks)
    for ours, theirs in zip(masks.polygons, polygons, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(back[1]["instances"].gt_masks.tensor, bits)
    keypoints = batch[2]["instances"].gt_keypoints.tensor
    assert torch.equal(back[2]["instances"].gt_keypoints.tensor, keypoints)
    assert back[3]["instances"].situation.tolist() == [3, 1]


def test_images_without_objects_come_back(tmp_path):
    empty = Instances((10, 20), gt_boxes=Boxes(torch.zeros(0, 4)), gt_masks=PolygonMasks([]))
    (back,) = through_a_file([image(1, instances=empty)], tmp_path)[""]
    assert len(back["instances"].gt_boxes) == len(back["instances"].gt_masks) == 0


def test_a_batch_of_two_groups_comes_back(tmp_path):
    strong = torch.zeros(3, 10, 20, dtype=torch.uint8)
    one, other = image(1, instances=labels(), strong_image=strong), image(2, strong_image=strong)
    batch = SemiBatch([one], [other])
    assert list(file_names([batch, SemiBatch([image(3)], [])])) == ["1.jpg", "2.jpg", "3.jpg"]
    back = through_a_file(batch, tmp_path)
    assert back.keys() == {"labeled", "unlabeled"}
    check_labels(back["labeled"][0]["instances"], one["instances"])
    assert torch.equal(back["unlabeled"][0]["strong_image"], strong)


def test_proposals_that_were_loaded_come_back(tmp_path):
    boxes = Boxes(torch.rand(4, 4))
    proposals = Instances((10, 20), proposal_boxes=boxes, objectness_logits=torch.rand(4))
    (back,) = through_a_file([image(1, proposals=proposals)], tmp_path)[""]
    assert torch.equal(back["proposals"].proposal_boxes.tensor, boxes.tensor)
    assert torch.equal(back["proposals"].objectness_logits, proposals.objectness_logits)


def test_what_a_mapper_of_ones_own_may_add_does_not_spoil_the_file(tmp_path):
    entries = {
        "image_id": np.int64(7), "path": Path("a/b.jpg"), "kind": Kind.XYXY, "none": None,
        "turned": np.arange(6)[::-1], "names": np.array(["a", "b"]), "pair": (1, np.float32(0.5)),
        "thing": SimpleNamespace(x=1),
    }  # fmt: skip
    (back,) = through_a_file([image(1, **entries)], tmp_path)[""]
    assert type(back["image_id"]) is int and back["image_id"] == 7
    assert back["path"] == "a/b.jpg"
    assert back["none"] is None
    assert back["turned"].tolist() == [5, 4, 3, 2, 1, 0]
    assert back["names"] == ["a", "b"]
    assert back["pair"] == [1, 0.5]
    assert "x=1" in back["thing"]


# ---- several processes ----


@pytest.fixture
def gathered(monkeypatch) -> Callable[[int, tuple], None]:
    """``gathered(rank, other)``: this is ``rank`` of two, and ``other`` is what the other found."""

    def pretend(rank: int, other: tuple) -> None:
        def all_gather(data: object) -> list:
            theirs = other if isinstance(data, tuple) else "elsewhere.pt"
            return [data, theirs] if rank == 0 else [theirs, data]

        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "is_main_process", lambda: rank == 0)
        monkeypatch.setattr(comm, "all_gather", all_gather)

    return pretend


def stop(folder: Path, bad: list[str]) -> SystemExit:
    guard = NonFiniteGuard(Shaky(), folder, action="stop", limit=0)
    with pytest.raises(SystemExit) as stopped:
        guard.handle(4, bad, [record(1.0)], [rng_state()])
    return stopped.value


def test_the_main_process_tells_of_another(gathered, tmp_path):
    """Its own gradients are not finite because the other's loss is in them."""
    gathered(0, (["loss_cls", "loss_mask"], ["a.jpg", "b.jpg"]))
    message = str(stop(tmp_path, [GRADIENTS]))
    assert "not finite: loss_cls, loss_mask on rank 1 with a.jpg, b.jpg. " in message
    assert "Inputs and weights: elsewhere.pt. " in message
    assert "rank 0" not in message
    assert kept(tmp_path) == []


def test_another_process_keeps_its_own_and_leaves_the_talking_to_the_main_one(gathered, tmp_path):
    gathered(1, ([GRADIENTS], ["a.jpg"]))
    assert stop(tmp_path, ["loss_b"]).code == 1
    assert kept(tmp_path) == ["iter_0000004_rank1.pt"]


def test_gradients_alone_may_come_from_any_process(gathered, tmp_path):
    gathered(0, ([GRADIENTS], ["a.jpg"]))
    expected = f"{GRADIENTS} on rank 0 with 1.0.jpg; {GRADIENTS} on rank 1 with a.jpg. "
    assert expected in str(stop(tmp_path, [GRADIENTS]))
    assert kept(tmp_path) == ["iter_0000004_rank0.pt"]


# ---- configuration and the whole trainer ----


def test_the_keys():
    cfg = load_config("", [])
    guard = NonFiniteGuard.from_config(cfg, Shaky())
    assert (guard.action, guard.limit) == ("stop", 10)
    assert guard.folder == Path(cfg.OUTPUT_DIR, "nonfinite")


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [("ACTION", "ignore", ["stop", "skip", "'ignore'"]), ("LIMIT", "-1", ["0 or more", "-1"])],
)
def test_mistakes_in_the_keys(key, value, parts):
    cfg = load_config("", [f"SOLVER.NONFINITE.{key}", value])
    with pytest.raises(ValueError) as error:
        NonFiniteGuard.from_config(cfg, Shaky())
    for part in (f"SOLVER.NONFINITE.{key}", *parts):
        assert part in str(error.value)


class ShakyTrainer(Trainer):
    """The trainer with that model; in step 2 of 4 its loss is no number."""

    evaluations = 0

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return Shaky()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> list:
        return [record(), record(), record(9.0, "loss"), record(), record()]

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> dict:
        cls.evaluations += 1
        return {}

    def build_writers(self) -> list:
        return []


def make_trainer(folder: Path, steps: int, *opts: str) -> ShakyTrainer:
    cfg = load_config("", list(opts))
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.SOLVER.IMS_PER_BATCH = "", str(folder), 1
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY = RATE, MOMENTUM, 0.0
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.GAMMA = 0, 0.5
    cfg.SOLVER.STEPS = (3,) if steps > 3 else ()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = steps, 1
    trainer = ShakyTrainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer


def test_the_schedule_goes_on_by_iterations(tmp_path):
    """The rate is halved after three iterations, of which one was skipped."""
    trainer = make_trainer(tmp_path, 4, "SOLVER.NONFINITE.ACTION", "skip")
    trainer.train()
    velocity = 1 * MOMENTUM + 1
    expected = -RATE * (1 + velocity) - RATE / 2 * (velocity * MOMENTUM + 1)
    assert trainer.model.w.item() == expected
    assert trainer.optimizer.param_groups[0]["lr"] == RATE / 2


@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_that_stops_is_not_evaluated_nor_saved(tmp_path, monkeypatch, steps):
    """Detectron2 would evaluate where the last step of all failed."""
    monkeypatch.setattr(ShakyTrainer, "evaluations", 0)
    with pytest.raises(SystemExit, match="iteration 2: not finite"):
        make_trainer(tmp_path, steps).train()
    assert ShakyTrainer.evaluations == 0
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    state = torch.load(tmp_path / "model_0000001.pth", weights_only=True)["model"]
    assert state["w"].item() == sgd([1, 1])
    assert not list(tmp_path.glob("model_final*"))
