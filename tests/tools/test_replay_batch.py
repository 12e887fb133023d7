"""The replay of a step: the same losses again, where the bad number begins, and mistakes."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from il_net.config import load_config
from il_net.data.loader import SemiBatch
from il_net.engine.nonfinite import NonFiniteGuard, rng_state
from sbr_cnn import add_sbr_cnn_config

REPO = Path(__file__).parents[2]
SIZE = (64, 80)
# A detector of a few narrow layers; the looped head draws at random among levels of the pyramid.
TINY = """
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  DEVICE: cpu
  WEIGHTS: ""
  MASK_ON: True
  BACKBONE: {NAME: build_resnet_fpn_backbone}
  RESNETS:
    WIDTH_PER_GROUP: 8
    RES2_OUT_CHANNELS: 8
    STEM_OUT_CHANNELS: 8
    OUT_FEATURES: [res2, res3, res4, res5]
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 8}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32], [64], [128]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6], BATCH_SIZE_PER_IMAGE: 16, POST_NMS_TOPK_TRAIN: 30}
  ROI_HEADS:
    NAME: LoopROIHeads
    NUM_CLASSES: 2
    IN_FEATURES: [p2, p3, p4, p5]
    BATCH_SIZE_PER_IMAGE: 8
  ROI_BOX_HEAD:
    NAME: FastRCNNConvFCHead
    NUM_FC: 1
    FC_DIM: 8
    POOLER_RESOLUTION: 7
    POOLER_SAMPLING_RATIO: 1
    CLS_AGNOSTIC_BBOX_REG: True
    EXTRACTOR: random
  ROI_MASK_HEAD:
    NAME: LoopMaskHead
    NUM_CONV: 1
    CONV_DIM: 8
    POOLER_RESOLUTION: 14
    POOLER_SAMPLING_RATIO: 1
DATASETS: {CLASSES: [leaf, rust]}
"""
SEMI = """
_BASE_: tiny.yaml
MODEL:
  META_ARCHITECTURE: TeacherStudentRCNN
  MASK_ON: False
  ROI_IOU_HEAD: {ENABLED: True, HIDDEN_DIM: 8}
SEMISUP: {PSEUDO: {SCORE_THRESH: 0.05}}
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """With the configurations tiny.yaml and semi.yaml."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "semi.yaml").write_text(SEMI)
    return tmp_path


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/replay_batch.py as a module."""
    path = REPO / "tools" / "replay_batch.py"
    spec = importlib.util.spec_from_file_location("replay_batch_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def replay(tool, folder, monkeypatch, capsys) -> Callable[..., tuple[int, list[str]]]:
    """``replay("step.pt", *options)``: exit code and lines printed."""

    def call(step: Path | str, *options: object, config: str = "tiny.yaml") -> tuple:
        arguments = ["--config-file", folder / config, "--step", folder / step, *options]
        monkeypatch.setattr("sys.argv", ["replay_batch.py", *map(str, arguments)])
        return tool.main(), capsys.readouterr().out.splitlines()

    return call


def record(number: int, **entries: object) -> dict:
    objects = Instances(SIZE, gt_boxes=Boxes(torch.tensor([[4.0, 6, 40, 50], [30, 20, 70, 60]])))
    objects.gt_classes = torch.tensor([0, 1])
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 10:45, 8:36] = masks[1, 25:55, 35:65] = True
    objects.gt_masks = BitMasks(masks)
    image = torch.randint(0, 255, (3, *SIZE), dtype=torch.uint8)
    names = {"file_name": f"{number}.jpg", "height": SIZE[0], "width": SIZE[1]}
    return {**names, "image": image, "strong_image": image, "instances": objects, **entries}


def make_model(folder: Path, config: str = "tiny.yaml") -> tuple[CfgNode, nn.Module]:
    cfg = load_config(str(folder / config), [], add_sbr_cnn_config)
    return cfg, build_model(cfg).train()


def keep(folder: Path, model: nn.Module, batches: list, rng: list[dict] | None = None) -> Path:
    """What a run would keep of a step with these batches."""
    guard = NonFiniteGuard(model, folder, action="skip", limit=1)
    guard.handle(7, ["loss_x"], batches, rng or [rng_state()] * len(batches))
    return folder / "nonfinite" / "iter_0000007_rank0.pt"


def shown(losses: dict[str, Tensor]) -> list[str]:
    return [f"{name}: {loss.item():.6g}" for name, loss in losses.items()]


# ---- the same step ----


def test_a_step_of_two_batches_repeats(folder, replay):
    """Draws of proposals, and of pyramid levels by the "random" extractor, are the run's."""
    _, model = make_model(folder)
    batches = [[record(1), record(2)], [record(3)]]
    rng, expected = [], []
    for batch in batches:
        torch.rand(5)  # as a loader in this process may draw
        rng.append(rng_state())
        with EventStorage():
            expected.append(shown(model(batch)))
    path = keep(folder, model, batches, rng)
    torch.manual_seed(99)
    code, lines = replay(path)
    images = [f"image: {i}.jpg, 80 x 64, 2 objects" for i in (1, 2, 3)]
    assert lines == [
        "iteration 7; not finite then: loss_x",
        *(*images[:2], *expected[0], images[2], *expected[1]),
        "all numbers are finite this time: another device or number format?",
    ]
    assert code == 1
    with EventStorage():  # what is compared depends on the draws
        torch.manual_seed(99)
        assert shown(model(batches[0])) != expected[0]


def test_a_semi_supervised_step_repeats(folder, replay):
    _, model = make_model(folder, "semi.yaml")
    model.update_teacher(model.burn_in_iters)
    one, other = record(1), record(2)
    del other["instances"]
    batch = SemiBatch([one], [other])
    rng = [rng_state()]
    with EventStorage():
        expected = shown(model(batch))
    code, lines = replay(keep(folder, model, [batch], rng), config="semi.yaml")
    assert lines[1:-1] == [
        "labeled: 1.jpg, 80 x 64, 2 objects",
        "unlabeled: 2.jpg, 80 x 64, no labels",
        *expected,
    ]
    assert any(line.startswith("loss_box_iou_loop3_pseudo: ") for line in lines)
    assert code == 1


# ---- where it begins ----

LAYERS = ("backbone.bottom_up.res3.0.conv1", "roi_heads.pairs.a.box_head.fc1",
          "roi_heads.pairs.a.box_predictor.bbox_pred")  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_first_bad_module_is_named(folder, replay, layer, value):
    """Also where the forward pass gives up: in the RPN, and where boxes are clipped."""
    _, model = make_model(folder)
    model.get_submodule(layer).weight.data.view(-1)[0] = value
    code, lines = replay(keep(folder, model, [[record(1)]]))
    assert f"first module with a non-finite output: {layer}" in lines
    assert any(line.endswith(": nan") for line in lines)
    assert code == 0


def test_a_loss_outside_of_modules_names_what_is_around_it(folder, replay, monkeypatch):
    from detectron2.modeling.roi_heads import FastRCNNOutputLayers

    _, model = make_model(folder)
    path = keep(folder, model, [[record(1)]])
    losses = FastRCNNOutputLayers.losses
    monkeypatch.setattr(
        FastRCNNOutputLayers,
        "losses",
        lambda *args: {**losses(*args), "loss_cls": torch.tensor(math.nan, requires_grad=True)},
    )
    code, lines = replay(path)
    assert "loss_cls_loop2: nan" in lines
    assert "first module with a non-finite output: roi_heads" in lines
    assert code == 0


def test_an_image_that_is_bad_itself_is_named(folder, replay):
    _, model = make_model(folder)
    bad = record(2, image=torch.full((3, *SIZE), math.nan))
    code, lines = replay(keep(folder, model, [[record(1), bad]]))
    assert "image: 1.jpg, 80 x 64, 2 objects" in lines
    assert "image: 2.jpg, 80 x 64, 2 objects, not finite itself" in lines
    assert "the predicted boxes: nan" in lines
    assert code == 0


class Root(nn.Module):
    """The root of (w x)^2, whose slope at w = 0 is infinite times 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 1), nn.Linear(1, 1)
        for layer in (self.first, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, records: list[dict]) -> dict[str, Tensor]:
        x = records[0]["image"].float().mean().reshape(1, 1)
        loss = self.last(x).square().sum().sqrt()
        return {"loss_root": loss, "loss_plain": self.first(x).sum()}


def test_gradients_that_are_not_finite_are_named(folder, replay, tool, monkeypatch):
    monkeypatch.setattr(tool, "build_model", lambda _: Root())
    code, lines = replay(keep(folder, Root(), [[record(1)]]))
    assert lines[2:] == [
        "loss_root: 0",
        "loss_plain: 0",
        "gradients that are not finite: last.weight, last.bias",
    ]
    assert code == 0


class Large(nn.Module):
    """1,000 times 100 is beyond fp16's 65,504."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 1000.0)

    def forward(self, records: list[dict]) -> dict[str, Tensor]:
        return {"loss": self.layer(torch.full((1, 1), 100.0)).sum()}


@pytest.mark.parametrize(("dtype", "code"), [("fp16", 0), ("bf16", 1), (None, 1)])
def test_another_number_format(folder, replay, tool, monkeypatch, dtype, code):
    monkeypatch.setattr(tool, "build_model", lambda _: Large())
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype) if dtype else ()
    found, lines = replay(keep(folder, Large(), [[record(1)]]), *amp)
    assert found == code
    assert ("first module with a non-finite output: layer" in lines) == (code == 0)


# ---- mistakes ----


def check_mistake(replay: Callable, parts: list[object], *arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        replay(*arguments)
    (message,) = str(stopped.value).splitlines()
    assert message.startswith("error: ")
    for part in parts:
        assert str(part) in message


def test_no_such_file(folder, replay):
    check_mistake(replay, ["--step", folder / "nowhere.pt"], "nowhere.pt")


@pytest.mark.parametrize("content", [b"", b"no step", b"PK\x03\x04 half a file"])
def test_a_file_that_cannot_be_read(folder, replay, content):
    (folder / "step.pt").write_bytes(content)
    check_mistake(replay, ["--step", folder / "step.pt", "can't be read"], "step.pt")


def test_a_file_that_was_cut_off(folder, replay):
    path = keep(folder, Large(), [[record(1)]])
    path.write_bytes(path.read_bytes()[:-100])
    check_mistake(replay, ["--step", path, "can't be read"], path)


def test_a_file_that_would_run_code_is_not_read(folder, replay):
    torch.save({"batches": SimpleNamespace()}, folder / "step.pt")
    with pytest.raises(SystemExit) as stopped:
        replay("step.pt")
    assert "weights_only" not in str(stopped.value)  # torch's advice to switch that off
    check_mistake(replay, [folder / "step.pt", "can't be read"], "step.pt")


@pytest.mark.parametrize("content", [{"model": {}, "iteration": 3}, [1, 2]])
def test_another_file_of_torch(folder, replay, content):
    torch.save(content, folder / "model.pth")
    check_mistake(replay, [folder / "model.pth", "nonfinite/iter_*.pt"], "model.pth")


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        # Weight and bias of the layer, weights of the two after it; by name the bias comes first.
        (("ROI_BOX_HEAD.FC_DIM", 9), ["4 tensors", "box_head.fc1.bias, (8,) in", "(9,) in"]),
        (("MASK_ON", False), ["mask_head.", "in the step and missing in the model"]),
    ],
)
def test_the_step_of_another_model(folder, replay, option, parts):
    _, model = make_model(folder)
    path = keep(folder, model, [[record(1)]])
    parts = ["--step does not fit the model of --config-file", *parts]
    check_mistake(replay, parts, path, f"MODEL.{option[0]}", option[1])


def test_a_missing_configuration(folder, replay):
    path = keep(folder, Large(), [[record(1)]])
    with pytest.raises(SystemExit, match="error: --config-file: there is no file"):
        replay(path, config="nowhere.yaml")
