"""tools/diagnose.py: a whole diagnosis of untrained models, of a run's logs, and mistakes."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import cv2
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from il_net.checkpoint import Checkpointer
from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.data.synthetic import generate
from il_net.evaluation import diagnosis
from sbr_cnn import add_sbr_cnn_config

REPO = Path(__file__).parents[2]
BACKBONE = ["res2", "res3", "res4", "res5"]
TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
    *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 8),
    *("MODEL.RESNETS.OUT_FEATURES", BACKBONE, "MODEL.FPN.IN_FEATURES", BACKBONE),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 8),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [48], [64]]),
    *("MODEL.PIXEL_STD", [60.0, 60.0, 60.0]),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 0),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
    *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 1),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14, "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 1),
    *("INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0),
]
LOOPED = [
    *("MODEL.ROI_HEADS.NAME", "LoopROIHeads", "MODEL.ROI_MASK_HEAD.NAME", "LoopMaskHead"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "MODEL.MASK_ON", True),
]
SEMI = [
    *("MODEL.META_ARCHITECTURE", "TeacherStudentRCNN", "SEMISUP.BURN_IN_ITERS", 5),
    *("MODEL.ROI_IOU_HEAD.ENABLED", True, "MODEL.ROI_IOU_HEAD.FILTER", False),
    *("MODEL.ROI_IOU_HEAD.HIDDEN_DIM", 8),
]
MODEL_PICTURES = ["anchors.png", "counts.png", "proposals.png", "sizes.png"]


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    """tools/diagnose.py as a module."""
    spec = importlib.util.spec_from_file_location("diagnose_tool", REPO / "tools/diagnose.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path) -> Iterator[None]:
    """In an empty folder, on one thread; what is registered is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    torch.manual_seed(0)
    before, threads = set(DatasetCatalog), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def call(tool, monkeypatch, capsys) -> Callable[..., str]:
    """Run the tool as if typed; returns what it printed."""
    monkeypatch.setattr(tool, "setup_logger", lambda **_: None)  # handlers outlive the test

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["diagnose.py", *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def make_run() -> Callable[..., tuple[CfgNode, nn.Module]]:
    """Write run/config.yaml and run/model_final.pth on three pictures of leaves."""

    def make(*options: object, iterations: int = 0) -> tuple[CfgNode, nn.Module]:
        generate("leaves", num_images=3, image_size=(80, 96), name="val")
        cfg = load_config("", [str(o) for o in (*TINY, *options)], add_sbr_cnn_config)
        entry = {"name": "val", "type": "coco", "json": "leaves/val.json", "images": "leaves/val"}
        cfg.DATASETS.REGISTER = [entry]
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("val",)
        register_datasets(cfg)
        model = build_model(cfg).eval()
        for name, parameter in model.named_parameters():
            if "bbox_pred" in name:
                nn.init.normal_(parameter, std=0.02)
        for iteration in range(iterations):
            model.update_teacher(iteration)
            for parameter in model.student.parameters():
                nn.init.normal_(parameter, std=0.1)
        Checkpointer(model, "run").save("model_final")
        Path("run/config.yaml").write_text(cfg.dump())
        return cfg, model

    Path("run").mkdir()
    return make


MODEL = ("--config-file", "run/config.yaml", "--output", "out")
WEIGHTS = ("MODEL.WEIGHTS", "run/model_final.pth")


def strict(path: str) -> dict:
    """JSON as the standard has it: without NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path} has {word}")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def pictures(folder: str) -> list[str]:
    found = sorted(Path(folder).glob("*.png"))
    for path in found:
        pixels = cv2.imread(str(path))
        assert min(pixels.shape[:2]) > 400 and pixels.std() > 5, path
    return [path.name for path in found]


# ---- a model ----


def test_looped_model(call, make_run):
    cfg, model = make_run(*LOOPED)
    printed = call(*MODEL, "--images", 2, *WEIGHTS)
    assert pictures("out") == sorted([*MODEL_PICTURES, "loops.png"])
    found = strict("out/diagnosis.json")
    assert found["dataset"] == "val"

    images = list(diagnosis.labelled_images(cfg, "val", 2))
    assert len(images) == 2
    assert found["loops"] == diagnosis.loop_histograms(model, iter(images))
    assert found["anchors"] == diagnosis.unmatched_by_anchors(model, iter(images))
    assert found["anchors"]["objects"] == sum(len(image["instances"]) for image in images)
    for number, counts in enumerate(found["loops"], start=1):
        share = sum(counts[14:]) / sum(counts)  # bins of 0.05
        text = f"loop {number}: {sum(counts)} boxes, {share:.1%} with an IoU of 0.7 or more"
        assert text in printed

    assert list(found["by_loops"]) == ["1", "2", "3", "4"]
    assert set(found["results"]) == {"bbox", "segm"}
    for task, metrics in found["results"].items():
        assert found["by_loops"]["3"][task] == metrics["AP"]
    # What the evaluator wrote last is the evaluation as trained.
    assert strict("out/inference/val/results.json") == found["results"]
    numbers = [len(image["annotations"]) for image in DatasetCatalog.get("val")]
    groups = {sum(number >= low for low in (1, 2, 4, 8, 16, 32)) for number in numbers}
    assert len(found["by_count"]) == len(groups)
    assert printed.endswith("out/diagnosis.json\n")


def test_numbers_of_loops_may_be_named(call, make_run):
    make_run(*LOOPED, "MODEL.MASK_ON", False, "MODEL.ROI_LOOP_HEAD.TEST_LOOPS", 2)
    printed = call(*MODEL, "--loops", "5,2,5", *WEIGHTS)
    found = strict("out/diagnosis.json")
    assert list(found["by_loops"]) == ["2", "5"]
    assert found["by_loops"]["2"] == {"bbox": found["results"]["bbox"]["AP"]}
    assert len(found["loops"]) == 2
    assert "5 loops at test: bbox AP" in printed


@pytest.mark.parametrize(("configured", "evaluated"), [(0, [1, 2, 4, 3]), (2, [1, 3, 4, 2])])
def test_each_number_of_loops_is_evaluated_once(call, make_run, monkeypatch, configured, evaluated):
    """The evaluation as configured comes last and is one of them."""
    make_run(*LOOPED, "MODEL.ROI_LOOP_HEAD.TEST_LOOPS", configured)
    done = []

    def evaluate(cfg: CfgNode, model: nn.Module, name: str, groups: dict | None = None) -> tuple:
        done.append(len(model.roi_heads.schedule.test))
        row = {"AP": 10.0 * done[-1], "APs": 1.0, "APm": 2.0, "APl": 3.0}
        return {"bbox": row}, {title: {"bbox": 5.0} for title in groups or {}}

    monkeypatch.setattr(diagnosis, "evaluate", evaluate)
    call(*MODEL, *WEIGHTS)
    assert done == evaluated
    found = strict("out/diagnosis.json")
    assert found["by_loops"] == {str(n): {"bbox": 10.0 * n} for n in (1, 2, 3, 4)}
    assert found["results"]["bbox"]["AP"] == 10 * evaluated[-1]


def test_plain_model_that_finds_nothing(call, make_run):
    """Its AP is no number: a gap in the pictures, null in the file."""
    make_run("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.1)
    Path("out").mkdir()
    Path("out/kept.txt").touch()
    call(*MODEL, *WEIGHTS)
    assert pictures("out") == MODEL_PICTURES
    found = strict("out/diagnosis.json")
    assert found["results"]["bbox"]["AP"] is None
    assert all(row == {"bbox": 0.0} for row in found["by_count"].values())
    assert len(found["loops"]) == 1 and sum(found["loops"][0]) == 3 * 20  # POST_NMS_TOPK_TEST
    assert "by_loops" not in found
    assert Path("out/kept.txt").exists()


@pytest.mark.parametrize(("iterations", "which"), [(7, "teacher"), (3, "student")])
def test_the_teacher_is_examined_and_before_it_is_one_the_student(
    tool, make_run, iterations, which
):
    _, run = make_run(*SEMI, iterations=iterations)
    assert bool(run.burned_in) == (which == "teacher")
    _, model = tool.load_model("run/config.yaml", list(WEIGHTS), Path("out"))
    expected = getattr(run, which).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    other = (run.student if which == "teacher" else run.teacher).state_dict()
    assert not all(torch.equal(other[name], tensor) for name, tensor in expected.items())
    assert not any(module.training for module in model.modules())


def test_semi_supervised_model(call, make_run):
    make_run(*SEMI, iterations=7)
    call(*MODEL, *WEIGHTS)
    assert pictures("out") == MODEL_PICTURES


def test_plain_weights_in_a_semi_supervised_configuration(tool, make_run):
    """Weights from elsewhere have no ``burned_in``; student and teacher both get them."""
    _, run = make_run(*SEMI, iterations=3)
    torch.save({"model": run.student.state_dict()}, "plain.pth")
    _, model = tool.load_model("run/config.yaml", ["MODEL.WEIGHTS", "plain.pth"], Path("out"))
    for name, tensor in run.student.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


# ---- a run's logs ----


def quality(iteration: int, precision: float | None) -> dict:
    view = {"iou_histogram": [5, 1, 1, 2, 3, 4, 6, 9, 12, 7]}
    return {
        "iteration": iteration,
        "pseudo": {"precision": precision, **view},
        "truth": {"recall": 0.5, **view},
    }


def counts(iteration: int, **loops: list[int]) -> dict:
    rows = {name[1:]: {"iou_histogram": row, "positives": 3} for name, row in loops.items()}
    return {"iteration": iteration, "loops": rows}


def write_lines(path: str, lines: list) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def logs() -> None:
    write_lines("run/pseudo_quality.json", [quality(100, None), quality(200, 0.75)])
    first, second = [10, *[1] * 19], [5, *[2] * 19]
    lines = [
        counts(100, _1=[1000] * 20, _2=[1000] * 20),
        counts(300, _1=[1000] * 20, _2=[1000] * 20),  # three quarters: not the last one
        counts(350, _1=first, _2=second),
        counts(400, _1=second, _2=second),
    ]
    write_lines("run/roi_statistics.json", lines)


def test_logs_alone(call, logs):
    printed = call("--run", "run", "--output", "new/out")
    assert pictures("new/out") == ["pseudo_labels.png", "training_proposals.png"]
    found = strict("new/out/diagnosis.json")
    assert found == {
        "pseudo_labels": [quality(100, None), quality(200, 0.75)],
        "training_proposals": [[15, *[3] * 19], [10, *[4] * 19]],
    }
    assert printed == "new/out/diagnosis.json\n"


@pytest.mark.parametrize(
    ("gone", "left"),
    [("roi_statistics", "pseudo_labels"), ("pseudo_quality", "training_proposals")],
)
def test_one_of_the_logs(call, logs, gone, left):
    Path(f"run/{gone}.json").write_text("")
    call("--run", "run", "--output", "out")
    assert pictures("out") == [f"{left}.png"]
    assert list(strict("out/diagnosis.json")) == [left]


def test_ten_loops_are_in_order(call):
    rows = {f"_{n}": [n] * 20 for n in range(1, 11)}
    write_lines("run/roi_statistics.json", [counts(1, **rows)])
    call("--run", "run", "--output", "out")
    found = strict("out/diagnosis.json")["training_proposals"]
    assert [row[0] for row in found] == list(range(1, 11))


def test_model_and_logs(call, make_run, logs):
    make_run()
    call(*MODEL, "--run", "run", *WEIGHTS)
    expected = [*MODEL_PICTURES, "pseudo_labels.png", "training_proposals.png"]
    assert pictures("out") == sorted(expected)
    assert {"anchors", "pseudo_labels", "training_proposals"} <= set(strict("out/diagnosis.json"))


def test_nothing_that_json_lacks_is_written(tool):
    nan, inf = float("nan"), float("inf")
    found = tool.without_nan({"a": [nan, 1.5, {"b": -inf}], "c": 0, "d": "nan"})
    assert found == {"a": [None, 1.5, {"b": None}], "c": 0, "d": "nan"}


# ---- mistakes ----


def mistake(call: Callable[..., str], *arguments: object, lines: int = 1) -> str:
    """What the tool ends with, at exit code 1; three lines where they are of `validate.py`."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    message = stop.value.code  # a text is printed, and the exit code is then 1
    assert isinstance(message, str) and message.startswith("error: ")
    assert len(message.splitlines()) == lines
    assert not Path("out/diagnosis.json").exists()
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a --config-file, a --run, or both"),
        (("--run", "run", "MODEL.WEIGHTS", "x.pth"), "go with a --config-file"),
        (("--run", "run", "--loops", "2"), "go with a --config-file"),
        (("--config-file", "gone.yaml"), "gone.yaml"),
        (("--run", "gone"), "--run gone has no lines in pseudo_quality.json"),
        (("--run", "run", "--images", 0), "--images is 1 or more, got 0"),
    ],
)
def test_wrong_arguments(call, arguments, message):
    assert message in mistake(call, "--output", "out", *arguments)


@pytest.mark.parametrize("name", ["pseudo_quality.json", "roi_statistics.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{\n", "is not one JSON value a line"),
        (b"\xff\xfe\n", "is not one JSON value a line"),
        (b"[]\n", "line 1 lacks 'iteration'"),
        (b'{"iteration": 3}\n', "line 1 lacks"),
    ],
)
def test_unreadable_logs(call, name, text, message):
    Path("run").mkdir()
    Path("run", name).write_bytes(text)
    found = mistake(call, "--run", "run", "--output", "out")
    assert f"run/{name}" in found and message in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.WEIGHTS", ""), "MODEL.WEIGHTS"),
        (("MODEL.WEIGHTS", "gone.pth"), "there is no file gone.pth"),
        ((*WEIGHTS, "MODEL.ROI_BOX_HEAD.FC_DIM", "512"), "less than 90%"),
        ((*WEIGHTS, "DATASETS.TEST", "()"), "DATASETS.TEST is empty"),
        ((*WEIGHTS, "DATASETS.TEST", "('elsewhere',)"), "no dataset 'elsewhere'"),
        ((*WEIGHTS, "MODEL.NO_KEY", "1"), "MODEL.NO_KEY"),
    ],
)
def test_wrong_configurations(call, make_run, options, message):
    make_run()
    assert message in mistake(call, *MODEL, *options)


@pytest.mark.parametrize("loops", ["0", "1,x", "2,,3", "-1", "1 2"])
def test_wrong_numbers_of_loops(call, make_run, loops):
    make_run(*LOOPED)
    assert "--loops are numbers from 1 on" in mistake(call, *MODEL, f"--loops={loops}", *WEIGHTS)


def test_loops_of_a_model_without(call, make_run):
    make_run()
    assert "LoopROIHeads" in mistake(call, *MODEL, "--loops", "1,2", *WEIGHTS)


def test_dataset_without_objects(call, make_run):
    make_run()
    path = Path("leaves/val.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    assert "no annotations" in mistake(call, *MODEL, *WEIGHTS, lines=3)


def test_dataset_without_masks(call, make_run):
    make_run(*LOOPED)
    path = Path("leaves/val.json")
    data = json.loads(path.read_text())
    for annotation in data["annotations"]:
        del annotation["segmentation"]
    path.write_text(json.dumps(data))
    assert "objects without 'segmentation'" in mistake(call, *MODEL, *WEIGHTS, lines=3)
    call(*MODEL, "--loops", 1, *WEIGHTS, "MODEL.MASK_ON", False)  # only the box branch is read
    assert set(strict("out/diagnosis.json")["results"]) == {"bbox"}


def test_picture_that_is_gone(call, make_run):
    make_run()
    Path("leaves/val/000001.jpg").unlink()
    assert "000001.jpg" in mistake(call, *MODEL, *WEIGHTS, lines=3)


def test_one_stage_detector(call, make_run):
    cfg, _ = make_run()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    Checkpointer(build_model(cfg), "run").save("model_final")
    Path("run/config.yaml").write_text(cfg.dump())
    assert "RetinaNet has no RPN" in mistake(call, *MODEL, *WEIGHTS)
