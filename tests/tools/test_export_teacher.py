"""tools/export_teacher.py: a run's teacher as a detector that stock Detectron2 loads and runs."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import yaml

pytest.importorskip("detectron2")

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import GeneralizedRCNN, build_model
from safetensors.torch import load_file
from torch import nn

from il_net.checkpoint import Checkpointer
from il_net.config import load_config
from il_net.modeling import TeacherStudentRCNN
from il_net.predict import Predictor
from sbr_cnn import add_sbr_cnn_config

REPO = Path(__file__).parents[2]
LEVELS = ["res2", "res3", "res4", "res5"]
# A Faster R-CNN with FPN in Detectron2's own words.
STOCK = [
    *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.DEVICE", "cpu"),
    *("MODEL.WEIGHTS", "", "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", LEVELS, "MODEL.FPN.IN_FEATURES", LEVELS),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]),
]
TINY = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.FPN.OUT_CHANNELS", 8),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [48], [64]]),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_HEADS.NUM_CLASSES", 2),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 10),
    *("MODEL.PIXEL_STD", [60.0, 60.0, 60.0], "INPUT.MIN_SIZE_TEST", 64),
]
SEMI = [
    *("MODEL.META_ARCHITECTURE", "TeacherStudentRCNN", "DATASETS.CLASSES", ("leaf", "spot")),
    *("MODEL.ROI_IOU_HEAD.ENABLED", True, "MODEL.ROI_IOU_HEAD.FILTER", False),
    *("MODEL.ROI_IOU_HEAD.HIDDEN_DIM", 8, "SEMISUP.BURN_IN_ITERS", 5),
]


def texts(options: list) -> list[str]:
    return [str(option) for option in options]


def stock_config(*options) -> CfgNode:
    """Of a Detectron2 that knows nothing of this project."""
    cfg = get_cfg()
    cfg.merge_from_list(texts([*STOCK, *options]))
    return cfg


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/export_teacher.py as a module."""
    yield from load_tool("export_teacher")


@pytest.fixture(scope="module")
def predict() -> ModuleType:
    """tools/predict.py as a module."""
    yield from load_tool("predict")


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_tool", REPO / "tools" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def call(tool, monkeypatch, capsys, tmp_path):
    """Run the tool as if typed in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> str:
        monkeypatch.setattr("sys.argv", ["export_teacher.py", *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def make_run(tmp_path):
    """Write a run's folder with a checkpoint after ``iterations`` steps; returns the model."""

    def make(iterations: int = 6, config: bool = True) -> TeacherStudentRCNN:
        torch.manual_seed(0)
        cfg = load_config("", texts([*STOCK, *TINY, *SEMI]), add_sbr_cnn_config)
        model = build_model(cfg).eval()
        for iteration in range(iterations):
            model.update_teacher(iteration)
            for parameter in model.student.parameters():
                nn.init.normal_(parameter, std=0.1)
        Checkpointer(model, str(tmp_path / "run")).save("model_final", iteration=iterations - 1)
        if config:
            (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
        return model

    (tmp_path / "run").mkdir()
    return make


def detections(model: nn.Module) -> dict[str, torch.Tensor]:
    image = torch.randint(256, (3, 64, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (found,) = model.eval()([{"image": image.to(torch.uint8), "height": 64, "width": 96}])
    found = found["instances"]
    return {
        "boxes": found.pred_boxes.tensor,
        "scores": found.scores,
        "classes": found.pred_classes,
    }


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_stock_detectron2_finds_what_the_model_finds(call, make_run, which):
    run = make_run()
    choice = ["--model", "student"] if which == "student" else []  # the teacher is the default
    call("--checkpoint", "run/model_final.pth", *choice, "--output", "out/model.pth")
    detector = build_model(stock_config(*TINY))
    assert type(detector) is GeneralizedRCNN
    DetectionCheckpointer(detector).load("out/model.pth")
    expected, found = detections(getattr(run, which)), detections(detector)
    assert len(expected["scores"]) == 10
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    other = run.student if which == "teacher" else run.teacher
    assert not torch.equal(detections(other)["scores"], expected["scores"])


def test_both_files_hold_the_teachers_tensors_and_nothing_else(call, make_run):
    expected = make_run().teacher.state_dict()
    printed = call("--checkpoint", "run/model_final.pth", "--output", "out/teacher.pth")
    names = ["teacher.pth", "teacher.safetensors", "teacher.yaml"]
    assert sorted(path.name for path in Path("out").iterdir()) == names
    assert printed.split() == [word for name in names for word in ("wrote", f"out/{name}")]
    plain = torch.load("out/teacher.pth", weights_only=True)
    assert list(plain) == ["model"]
    for state in (plain["model"], load_file("out/teacher.safetensors")):
        assert set(state) == set(expected)
        assert any(".iou_head." in name for name in state)
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_only_the_branch_is_unexpected(call, make_run, suffix):
    make_run()
    call("--checkpoint", "run/model_final.pth", "--output", "teacher.pth")
    checkpointer = Checkpointer(build_model(stock_config(*TINY)))
    checkpointer.load_complete(f"teacher.{suffix}", min_matched=1.0)
    report = checkpointer.report
    assert (report.matched, report.missing, report.misshapen) == (report.total, (), {})
    assert len(report.unexpected) == 4  # two layers, weight and bias
    assert all(".iou_head." in name for name in report.unexpected)


def test_teacher_of_the_published_configuration_fits_stock_faster_rcnn():
    """Names and shapes; the configuration's own backbone and RoI heads are this project's."""
    path = REPO / "configs" / "il_net" / "il_net_r50_fpn_coco10.yaml"
    options = ["MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.DEVICE", "meta"]
    stock = stock_config("MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        run = build_model(load_config(str(path), options, add_sbr_cnn_config))
        detector = build_model(stock)
    shapes = {name: tensor.shape for name, tensor in run.teacher.state_dict().items()}
    expected = {name: tensor.shape for name, tensor in detector.state_dict().items()}
    assert {name: s for name, s in shapes.items() if ".iou_head." not in name} == expected


def test_configuration_is_the_plain_detectors(call, make_run):
    run = make_run()
    call("--checkpoint", "run/model_final.pth", "--output", "out/teacher.pth")
    written = yaml.safe_load(Path("out/teacher.yaml").read_text())
    assert written["MODEL"]["META_ARCHITECTURE"] == "GeneralizedRCNN"
    assert written["DATASETS"]["CLASSES"] == ["leaf", "spot"]
    assert written["MODEL"]["WEIGHTS"] == "out/teacher.pth"
    assert written["MODEL"]["DEVICE"] == "cuda"
    assert written["OUTPUT_DIR"] == "out/teacher_output"
    assert not written["MODEL"]["ROI_IOU_HEAD"]["ENABLED"]
    cfg = load_config("out/teacher.yaml", ["MODEL.DEVICE", "cpu"], add_sbr_cnn_config)
    predictor = Predictor(cfg)
    for name, values in detections(run.teacher).items():
        assert torch.equal(detections(predictor.model)[name], values), name


def test_predicting_with_the_export(call, make_run, predict, monkeypatch):
    make_run()
    call("--checkpoint", "run/model_final.pth", "--output", "teacher.pth")
    Path("in").mkdir()
    cv2.imwrite("in/leaf.png", np.random.default_rng(0).integers(256, size=(64, 96, 3)))
    arguments = ["--config-file", "teacher.yaml", "--input", "in", "--output", "found"]
    monkeypatch.setattr("sys.argv", ["predict.py", *arguments, "MODEL.DEVICE", "cpu"])
    assert predict.main() == 0
    content = json.loads(Path("found/detections.json").read_text())
    assert [category["name"] for category in content["categories"]] == ["leaf", "spot"]
    assert len(content["annotations"]) == 10


def test_without_configuration_it_says_so(call, make_run):
    make_run(config=False)
    printed = call("--checkpoint", "run/model_final.pth", "--output", "run/teacher.pth")
    assert "no config.yaml beside run/model_final.pth" in printed
    assert not Path("run/teacher.yaml").exists()
    assert Path("run/teacher.safetensors").exists()


def test_export_into_the_runs_folder_leaves_its_files(call, make_run):
    make_run()
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    call("--checkpoint", "run/model_final.pth", "--output", "run/teacher.pth")
    assert {path: path.read_bytes() for path in before} == before
    for name in ("model_final.pth", "config.pth"):
        with pytest.raises(SystemExit, match=f"--output run/{name} would replace the run's"):
            call("--checkpoint", "run/model_final.pth", "--output", f"run/{name}")
    assert {path: path.read_bytes() for path in before} == before


def test_tensors_of_two_names_are_written_twice(tool, tmp_path):
    """Modules that are shared, as pairs of a loop, have every name in a checkpoint."""
    shared = torch.arange(6.0).view(2, 3)
    state = {"teacher.a": shared, "teacher.b": shared, "teacher.c": shared.t()}
    state |= {"student.a": shared + 1, "burned_in": torch.tensor(True)}
    torch.save({"model": state}, tmp_path / "w.pth")
    tool.export(tmp_path / "w.pth", "teacher", tmp_path / "out.pth")
    found = load_file(tmp_path / "out.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "b": [[0, 1, 2], [3, 4, 5]],
        "c": [[0, 3], [1, 4], [2, 5]],
    }


# ---- mistakes ----


def test_a_teacher_of_burn_in_is_refused(call, make_run):
    make_run(iterations=5)  # 0 to 4: the copy would be made before step 5
    arguments = ("--checkpoint", "run/model_final.pth", "--output", "out.pth")
    with pytest.raises(SystemExit, match=r"SEMISUP\.BURN_IN_ITERS.*--model student"):
        call(*arguments)
    assert not Path("out.pth").exists()
    call(*arguments, "--model", "student")
    assert Path("out.pth").exists()


def test_other_files_are_refused(call, tmp_path):
    with pytest.raises(SystemExit, match="--checkpoint: there is no file gone.pth"):
        call("--checkpoint", "gone.pth", "--output", "out.pth")
    torch.save({"model": {"backbone.weight": torch.zeros(1)}}, "plain.pth")
    with pytest.raises(SystemExit, match=r"plain\.pth holds no teacher; .*TeacherStudentRCNN"):
        call("--checkpoint", "plain.pth", "--output", "out.pth")
    torch.save([torch.zeros(1)], "list.pth")
    with pytest.raises(SystemExit, match=r"list\.pth holds no teacher"):
        call("--checkpoint", "list.pth", "--output", "out.pth")
    Path("text.pth").write_text("no weights")
    with pytest.raises(SystemExit, match=r"text\.pth can't be read"):
        call("--checkpoint", "text.pth", "--output", "out.pth")
    with pytest.raises(SystemExit, match=r"--output is the name of a \.pth file, got out\.pt"):
        call("--checkpoint", "plain.pth", "--output", "out.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list.pth", "plain.pth", "text.pth"]
