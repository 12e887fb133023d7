"""The command lines as a user types them: train, resume, evaluate, predict, count; and mistakes."""

import json
import math
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
import yaml
from pycocotools.coco import COCO

from il_net.data.synthetic import CATEGORIES
from tests.e2e.runner import REPO, Result

RUN_FILES = {"config.yaml", "log.txt", "metrics.json", "model_final.pth", "last_checkpoint"}


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def predictions(folder: Path) -> list[dict]:
    path = folder / "inference" / "tiny_val" / "coco_instances_results.json"
    return json.loads(path.read_text())


def logged_results(output: str) -> dict[str, float]:
    """The numbers that Detectron2 logs for copying: {"bbox/AP": ..., "segm/AP50": ...}."""
    results, task, names = {}, "", []
    for line in output.splitlines():
        _, found, text = line.partition("copypaste: ")
        if not found:
            continue
        if text.startswith("Task: "):
            task = text.removeprefix("Task: ")
        elif text.startswith("AP,"):
            names = text.split(",")
        else:
            values = map(float, text.split(","))
            results.update({f"{task}/{n}": v for n, v in zip(names, values, strict=True)})
    return results


@pytest.fixture(scope="session")
def first(run, config, tmp_path_factory) -> tuple[Path, Result, dict]:
    """A run of two iterations: its folder, its output, and its files' contents then."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = run("train_net.py", "--config-file", config, "OUTPUT_DIR", folder)
    assert result.code == 0, result.output
    contents = {
        "files": {path.name for path in folder.iterdir()},
        "metrics": read_metrics(folder),
        "iteration": torch.load(folder / "model_final.pth", weights_only=False)["iteration"],
    }
    return folder, result, contents


@pytest.fixture(scope="session")
def trained(run, config, first) -> tuple[Path, Result]:
    """The same run, resumed to four iterations."""
    folder = first[0]
    options = ("OUTPUT_DIR", folder, "SOLVER.MAX_ITER", 4)
    result = run("train_net.py", "--config-file", config, "--resume", *options)
    assert result.code == 0, result.output
    return folder, result


# ---- training ----


def test_training_writes_its_files(first):
    files = first[2]["files"]
    assert files >= RUN_FILES
    assert any(name.startswith("events.out.tfevents") for name in files)


def test_training_logs_losses_and_scores(first):
    lines = first[2]["metrics"]
    losses = [line for line in lines if "total_loss" in line]
    assert losses
    for line in losses:
        parts = [value for name, value in line.items() if name.startswith("loss_")]
        assert line["total_loss"] == pytest.approx(sum(parts), rel=1e-4)
        # Three loops of class, box and mask losses, and the RPN's two.
        assert len(parts) == 11
    scores = [line for line in lines if "bbox/AP50" in line]
    assert len(scores) == 1
    assert {"bbox/AP", "segm/AP", "segm/AP50"} <= set(scores[0])
    assert {f"bbox/AP50-{name}" for name in CATEGORIES} <= set(scores[0])


def test_training_says_once_that_it_runs_on_the_cpu(first):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert first[1].output.count("Running on the CPU") == 1


def test_config_of_the_run_names_the_classes(first):
    config = yaml.safe_load((first[0] / "config.yaml").read_text())
    assert config["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 4
    assert tuple(config["DATASETS"]["CLASSES"]) == CATEGORIES
    assert config["DATASETS"]["TRAIN"] == ["tiny_train"]


def test_interrupted_run_goes_on_where_it_stopped(first, trained):
    folder, result = trained
    assert "Resumed" not in first[1].output
    assert "Resumed at iteration 2 of 4" in result.output
    assert "Starting training from iteration 2" in result.output
    assert first[2]["iteration"] == 1  # the last that was done, from 0
    final = torch.load(folder / "model_final.pth", weights_only=False)
    assert final["iteration"] == 3
    # The same metrics.json goes on: last iteration of each part, from 0.
    iterations = [line["iteration"] for line in read_metrics(folder) if "total_loss" in line]
    assert iterations[:2] == [1, 3]


def test_checkpoint_holds_what_a_resumed_run_needs(trained):
    """Momentum of every trained parameter, or the run that goes on is another one."""
    checkpoint = torch.load(trained[0] / "model_final.pth", weights_only=False)
    optimizer = _find(checkpoint["trainer"], "optimizer")
    assert optimizer is not None, list(checkpoint["trainer"])
    momenta = [s for s in optimizer["state"].values() if s.get("momentum_buffer") is not None]
    assert len(momenta) == len(optimizer["state"]) > 0


def _find(node: dict, key: str) -> dict | None:
    """The first entry of that name in nested dictionaries."""
    if key in node:
        return node[key]
    found = (_find(value, key) for value in node.values() if isinstance(value, dict))
    return next((value for value in found if value is not None), None)


def test_finished_run_is_not_trained_further(run, config, trained):
    folder = trained[0]
    before = torch.load(folder / "model_final.pth", weights_only=False)["model"]
    options = ("OUTPUT_DIR", folder, "SOLVER.MAX_ITER", 4)
    result = run("train_net.py", "--config-file", config, "--resume", *options)
    assert result.code == 0, result.output
    after = torch.load(folder / "model_final.pth", weights_only=False)["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_evaluation_of_the_weights_repeats_the_last_scores_of_training(
    run, config, trained, tmp_path
):
    folder = trained[0]
    result = run(
        *("train_net.py", "--config-file", config, "--eval-only"),
        *("MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", tmp_path),
    )
    assert result.code == 0, result.output
    assert predictions(tmp_path) == predictions(folder)
    assert len(predictions(folder)) > 0
    scores = [line for line in read_metrics(folder) if "bbox/AP50" in line][-1]
    logged = logged_results(result.output)
    assert {"bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50"} <= set(logged)
    for name in logged:
        expected = scores[name]
        if math.isnan(expected):
            assert math.isnan(logged[name]), name
        else:
            assert logged[name] == pytest.approx(expected, abs=5e-5), name  # four decimals
    assert not (tmp_path / "model_final.pth").exists()


def test_evaluation_leaves_the_trainings_configuration(run, config, trained, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    text = (trained[0] / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text)
    weights = ("MODEL.WEIGHTS", trained[0] / "model_final.pth", "OUTPUT_DIR", folder)
    result = run(
        *("train_net.py", "--config-file", config, "--eval-only"),
        *weights,
        *("TEST.DETECTIONS_PER_IMAGE", 3),
    )
    assert result.code == 0, result.output
    assert (folder / "config.yaml").read_text() == text
    assert "DETECTIONS_PER_IMAGE: 3" in (folder / "config_eval.yaml").read_text()


def test_nothing_is_written_beside_the_output_folder(elsewhere, trained):
    assert list(elsewhere.iterdir()) == []


# ---- prediction ----


@pytest.fixture(scope="session")
def pictures(tmp_path_factory, datasets) -> Path:
    """A folder with a good picture, a subfolder with another, a broken one and a text file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub").mkdir()
    picture = cv2.imread(str(datasets / "leaves" / "val" / "000000.jpg"))
    cv2.imwrite(str(folder / "a.jpg"), picture)
    cv2.imwrite(str(folder / "sub" / "b.png"), picture[:70, :90])
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("no picture")
    return folder


def predict(run, trained, source: object, output: Path, *options: object) -> Result:
    folder = trained[0]
    weights = ("MODEL.WEIGHTS", folder / "model_final.pth")
    return run(
        *("tools/predict.py", "--config-file", folder / "config.yaml"),
        *("--input", source, "--output", output, "--min-score", "0", *(options or weights)),
    )


def check_detections(output: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """A COCO file that pycocotools reads, with the pictures of ``sizes`` ({name: (h, w)})."""
    content = json.loads((output / "detections.json").read_text())
    assert {i["file_name"]: (i["height"], i["width"]) for i in content["images"]} == sizes
    assert [(c["id"], c["name"]) for c in content["categories"]] == list(enumerate(CATEGORIES, 1))
    coco = COCO(str(output / "detections.json"))
    assert len(coco.anns) == len(content["annotations"]) > 0  # no id twice
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        height, width = image["height"], image["width"]
        x, y, w, h = annotation["bbox"]
        assert min(x, y, w, h) >= 0
        assert x + w <= width + 0.01
        assert y + h <= height + 0.01
        assert annotation["category_id"] in coco.cats
        assert 0 <= annotation["score"] <= 1
        assert annotation["segmentation"]["size"] == [height, width]
        mask = coco_mask.decode(annotation["segmentation"])
        assert annotation["area"] == mask.sum()
        rows, columns = np.nonzero(mask)
        if len(rows):  # the mask lies in its box, but for the rounding of its border
            assert columns.min() >= x - 1
            assert columns.max() <= x + w + 1
            assert rows.min() >= y - 1
            assert rows.max() <= y + h + 1
    assert len(coco.getAnnIds(catIds=[])) == len(coco.anns)


def test_prediction_of_a_folder_skips_a_broken_picture(run, trained, pictures, tmp_path):
    result = predict(run, trained, pictures, tmp_path)
    assert result.code == 1
    assert "Traceback" not in result.output
    assert "skipped" in result.output
    assert str(pictures / "broken.jpg") in result.output
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {"a.jpg", "sub/b.png", "detections.json"}
    check_detections(tmp_path, {"a.jpg": (96, 96), "sub/b.png": (70, 90)})
    for name in ("a.jpg", "sub/b.png"):
        assert cv2.imread(str(tmp_path / name)) is not None


def test_prediction_of_one_picture(run, trained, pictures, tmp_path):
    result = predict(run, trained, pictures / "sub" / "b.png", tmp_path)
    assert result.code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == {"b.png", "detections.json"}
    check_detections(tmp_path, {"b.png": (70, 90)})
    # --min-score 0: everything is drawn, so the picture differs from the input.
    drawn = cv2.imread(str(tmp_path / "b.png"))
    source = cv2.imread(str(pictures / "sub" / "b.png"))
    assert np.abs(cv2.resize(drawn, source.shape[1::-1]).astype(int) - source).mean() > 2


def test_prediction_of_a_video(run, trained, tmp_path):
    source, output = tmp_path / "clip.avi", tmp_path / "out"
    video = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"MJPG"), 5.0, (96, 64))
    if not video.isOpened():
        pytest.skip("this OpenCV writes no video")
    rng = np.random.default_rng(0)
    for _ in range(3):
        video.write(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8))
    video.release()
    result = predict(run, trained, source, output)
    assert result.code == 0, result.output
    check_detections(output, {f"clip.avi#{n}": (64, 96) for n in range(3)})
    written = cv2.VideoCapture(str(output / "clip.avi.mp4"))
    assert written.get(cv2.CAP_PROP_FPS) == pytest.approx(5.0)
    frames = 0
    while written.read()[0]:
        frames += 1
    assert frames == 3


def test_prediction_with_the_weights_of_another_model_is_refused(run, trained, pictures, tmp_path):
    """Of the numbers, not of the tensors, at least 90 % must be there. All counters of BatchNorm
    stay in: torch fills in those that a file lacks."""
    weights = tmp_path / "other.pth"
    state = torch.load(trained[0] / "model_final.pth", weights_only=False)["model"]
    kept = {
        name: tensor
        for number, (name, tensor) in enumerate(state.items())
        if number % 2 or name.endswith("num_batches_tracked")
    }
    torch.save({"model": kept}, weights)
    output = tmp_path / "out"
    result = predict(run, trained, pictures, output, "MODEL.WEIGHTS", weights)
    assert result.code != 0
    assert "Traceback" not in result.output
    assert result.last_line.startswith("error: ")
    matched, total = (sum(t.numel() for t in tensors.values()) for tensors in (kept, state))
    assert f"{matched:,} of the model's {total:,}" in result.last_line
    assert str(weights) in result.last_line
    assert not output.exists()


@pytest.mark.parametrize("source", ["", "nowhere.jpg", "*.png"])
def test_prediction_of_nothing(run, trained, tmp_path, source):
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out"
    result = predict(run, trained, tmp_path / "empty" / source, output)
    assert result.code != 0
    assert "Traceback" not in result.output
    assert "--input" in result.last_line
    assert str(tmp_path / "empty") in result.last_line
    assert not output.exists()


def test_prediction_needs_class_names(run, config, trained, pictures, tmp_path):
    """A file without data sets and classes: say what to use instead."""
    bare = tmp_path / "bare.yaml"
    bare.write_text(f"_BASE_: {config}\nDATASETS: {{REGISTER: [], TRAIN: [], TEST: []}}\n")
    result = run(
        *("tools/predict.py", "--config-file", bare, "--input", pictures),
        *("--output", tmp_path / "out", "MODEL.ROI_HEADS.NUM_CLASSES", 4),
    )
    assert result.code != 0
    assert "Traceback" not in result.output
    assert "DATASETS.CLASSES" in result.last_line


# ---- counting ----


def test_count_parameters_ends_with_the_number(run, config):
    from detectron2.modeling import build_model

    from il_net.config import load_config
    from sbr_cnn import add_sbr_cnn_config

    options = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", "4"]
    model = build_model(load_config(str(config), options, add_sbr_cnn_config))
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    assert expected < everything  # BatchNorm is frozen
    # Once from the data (four classes), once from the option.
    for opts in ([], options[2:]):
        result = run("tools/count_parameters.py", "--config-file", config, *opts)
        assert result.code == 0, result.output
        assert int(result.last_line) == expected


# ---- mistakes ----


def break_annotations(datasets: Path, folder: Path) -> Path:
    """A copy of the annotations whose first object has a category that does not exist."""
    data = json.loads((datasets / "leaves" / "train.json").read_text())
    data["annotations"][0]["category_id"] = 99
    path = folder / "broken.json"
    path.write_text(json.dumps(data))
    return path


MISTAKES = {
    "missing config": (["--config-file", "nowhere.yaml"], ["--config-file", "nowhere.yaml"]),
    "unknown key": (["SOLVER.MAX_ITERS", "3"], ["SOLVER.MAX_ITERS"]),
    "wrong type": (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER"]),
    "key without value": (["SOLVER.MAX_ITER"], ["KEY VALUE", "SOLVER.MAX_ITER"]),
    "wrong number of classes": (
        ["MODEL.ROI_HEADS.NUM_CLASSES", "7"],
        ["MODEL.ROI_HEADS.NUM_CLASSES", "7", "4"],
    ),
    "unknown dataset": (["DATASETS.TEST", "tiny_vall"], ["DATASETS.TEST", "tiny_vall", "tiny_val"]),
    "no weights to evaluate": (["--eval-only"], ["MODEL.WEIGHTS"]),
    "weights that are not there": (
        ["MODEL.WEIGHTS", "nowhere.pth"],
        ["MODEL.WEIGHTS", "nowhere.pth"],
    ),
    "number format": (["SOLVER.AMP.DTYPE", "float16"], ["SOLVER.AMP.DTYPE", "float16"]),
    "empty batch": (["SOLVER.IMS_PER_BATCH", "0"], ["SOLVER.IMS_PER_BATCH"]),
    "loops that do not agree": (
        ["MODEL.ROI_LOOP_HEAD.IOUS", "(0.5,)"],
        ["MODEL.ROI_LOOP_HEAD.IOUS"],
    ),
    "unknown extractor": (["MODEL.ROI_BOX_HEAD.EXTRACTOR", "groi"], ["EXTRACTOR", "groi"]),
    "unknown timm model": (["MODEL.TIMM.NAME", "no_such_net"], ["MODEL.TIMM.NAME", "no_such_net"]),
    "unknown timm model, evaluating": (
        ["--eval-only", "MODEL.TIMM.NAME", "no_such_net"],
        ["MODEL.TIMM.NAME", "no_such_net"],
    ),
    "machines without an address": (
        ["--num-machines", "2", "--dist-url", "auto"],
        ["--dist-url", "--num-machines"],
    ),
    "no checkpoint": (["MODEL.WEIGHTS", str(REPO / "README.md")], ["MODEL.WEIGHTS", "README.md"]),
}


def check_mistake(result: Result, parts: list[str]) -> None:
    """Exit code, no traceback, and an error at the end that says where to look."""
    assert result.code not in (0, None)
    assert "Traceback" not in result.output, result.output[-2000:]
    # It may have several lines, and the log above it lines with "error: " further right.
    *_, message = ["", *re.split("^error: ", result.output, flags=re.MULTILINE)[1:]]
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_on_the_command_line(run, config, tmp_path, name):
    arguments, parts = MISTAKES[name]
    options = ["--config-file", config] if "--config-file" not in arguments else []
    # Options come before KEY VALUE pairs; of a key given twice the last one counts.
    flags = [a for a in arguments if a.startswith("--")]
    if flags:
        command = [*options, *arguments, "OUTPUT_DIR", tmp_path]
    else:
        command = [*options, "OUTPUT_DIR", tmp_path, *arguments]
    check_mistake(run("train_net.py", *command), parts)
    assert not (tmp_path / "model_final.pth").exists()


def test_missing_annotations(run, config, tmp_path):
    result = run(
        *("train_net.py", "--config-file", config, "OUTPUT_DIR", tmp_path / "out"),
        DETECTRON2_DATASETS=str(tmp_path),
    )
    check_mistake(result, ["DATASETS.REGISTER[0].json", str(tmp_path / "leaves" / "train.json")])


def test_broken_annotations(run, config, datasets, tmp_path):
    broken = break_annotations(datasets, tmp_path)
    entry = {
        "name": "tiny_train",
        "type": "coco",
        "json": str(broken),
        "images": str(datasets / "leaves" / "train"),
    }
    path = tmp_path / "broken.yaml"
    path.write_text(f"_BASE_: {config}\nDATASETS: {{REGISTER: [{json.dumps(entry)}], TEST: []}}\n")
    result = run("train_net.py", "--config-file", path, "OUTPUT_DIR", tmp_path / "out")
    check_mistake(result, [str(broken), "unknown category ids", "99 in annotation 1"])


def test_training_without_detectron2_gives_advice(run):
    code = (
        "import runpy, sys; sys.modules['detectron2'] = None; sys.argv = ['train_net.py'];"
        f"runpy.run_path({str(REPO / 'train_net.py')!r}, run_name='__main__')"
    )
    result = run.alone(sys.executable, "-c", code)
    assert result.code == 1
    assert "Traceback" not in result.output
    assert "tools/install_detectron2.py" in result.output
    assert "il_net.check" in result.last_line


# ---- several processes ----


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU")
def test_two_processes_train(run, config, tmp_path):
    result = run.alone(
        *(sys.executable, REPO / "train_net.py", "--config-file", config, "--num-gpus", 2),
        *("OUTPUT_DIR", tmp_path),
    )
    check_two_processes(result, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU")
def test_torchrun_trains(run, config, tmp_path):
    result = run.alone(
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone"),
        *(REPO / "train_net.py", "--config-file", config, "OUTPUT_DIR", tmp_path),
    )
    check_two_processes(result, tmp_path)


def check_two_processes(result: Result, folder: Path) -> None:
    assert result.code == 0, result.output[-5000:]
    assert (folder / "log.txt.rank1").exists()
    assert not (folder / "log.txt.rank2").exists()
    assert torch.load(folder / "model_final.pth", weights_only=False)["iteration"] == 1
    scores = [line for line in read_metrics(folder) if "bbox/AP50" in line]
    assert len(scores) == 1
    assert "segm/AP50" in scores[0]
    assert result.output.count("Running on the CPU") == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on the CPU")
def test_mistake_with_two_processes(run, config, tmp_path):
    """One of the processes reports it; the launcher may add its own lines, but nothing waits."""
    result = run(
        *("train_net.py", "--config-file", config, "--num-gpus", 2),
        *("OUTPUT_DIR", tmp_path, "SOLVER.IMS_PER_BATCH", 3),
    )
    assert result.code not in (0, None)
    assert "SOLVER.IMS_PER_BATCH 3 " in result.output
