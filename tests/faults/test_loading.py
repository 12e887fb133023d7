"""Hostile files: weights, checkpoints, configurations and datasets that reach beyond data."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.e2e.runner import Result


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def hostile(path: Path, mark: Path) -> Path:
    """Weights with a payload beside them."""
    if path.suffix == ".pkl":
        content = {"model": {"w": np.zeros(3)}, "__author__": Payload(mark)}
        path.write_bytes(pickle.dumps(content))
    else:
        content = {"model": {"w": torch.zeros(3)}, "trainer": {"iteration": Payload(mark)}}
        torch.save(content, path, _use_new_zipfile_serialization=path.suffix == ".pth")
    return path


def check_refused(result: Result, *parts: str) -> None:
    """A message that names what is wrong."""
    assert result.code == 1, result.output[-3000:]
    assert "Traceback" not in result.output
    _, found, message = f"\n{result.output}".rpartition("\nerror: ")
    assert found
    for part in parts:
        assert part in message


@pytest.fixture
def train(run, config, tmp_path) -> Callable[..., Result]:
    def start(*options: object) -> Result:
        return run(
            *("train_net.py", "--config-file", config, *options),
            *("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path / "run"),
        )

    return start


# ---- weights ----


@pytest.mark.parametrize("name", ["w.pth", "w.pkl", "w.old"])
def test_weights_that_would_run_a_program(train, tmp_path, injected, name):
    """To start from; the last of the three is in torch's format of before 2020."""
    injected(1)
    mark = tmp_path / "mark"
    path = hostile(tmp_path / name, mark)
    result = train("MODEL.WEIGHTS", path)
    check_refused(result, f"{path} was not read: it holds", ".mkdir", "--trust-checkpoint")
    assert not mark.exists()
    assert not list((tmp_path / "run").glob("*.pth"))


def test_proposals_that_would_run_a_program(train, tmp_path, injected):
    """Detectron2 unpickles them."""
    injected(1)
    mark = tmp_path / "mark"
    path = hostile(tmp_path / "proposals.pkl", mark)
    keys = ("MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN", f"('{path}',)")
    result = train(*keys, "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    check_refused(result, f"{path} was not read: it holds", ".mkdir")
    assert not mark.exists()


def test_the_payload_of_a_file_that_is_trusted_runs(train, tmp_path, injected):
    """So the tests around this one could fail."""
    injected(1)
    mark = tmp_path / "mark"
    result = train("--trust-checkpoint", "MODEL.WEIGHTS", hostile(tmp_path / "w.pth", mark))
    check_refused(result, "weights fit")  # there are none of this model in it
    assert mark.exists()
    assert "was read with --trust-checkpoint" in result.output


def test_prediction_with_weights_that_would_run_a_program(
    run, config, datasets, tmp_path, injected
):
    injected(1)
    mark = tmp_path / "mark"
    path = hostile(tmp_path / "w.pth", mark)
    result = run(
        *("tools/predict.py", "--config-file", config, "--input", datasets / "leaves" / "val"),
        *("--output", tmp_path / "out", "MODEL.WEIGHTS", path),
    )
    check_refused(result, f"{path} was not read")
    assert not mark.exists()


@pytest.mark.parametrize("option", ["--resume", "--resume-or-start"])
def test_a_checkpoint_that_would_run_a_program(train, tmp_path, injected, option):
    injected(1)
    mark, folder = tmp_path / "mark", tmp_path / "run"
    folder.mkdir()
    hostile(folder / "model_0000000.pth", mark)
    (folder / "last_checkpoint").write_text("model_0000000.pth")
    check_refused(train(option), "model_0000000.pth", "was not read: it holds")
    assert not mark.exists()


def test_a_name_of_the_last_checkpoint_in_another_folder(train, tmp_path, injected):
    injected(1)
    mark, folder = tmp_path / "mark", tmp_path / "run"
    folder.mkdir()
    hostile(tmp_path / "model_0000000.pth", mark)
    (folder / "last_checkpoint").write_text("../model_0000000.pth")
    check_refused(train("--resume"), f"{folder / 'model_0000000.pth'}", "there is no such file")
    assert not mark.exists()


# ---- configurations ----


@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir", "python/object/new:os.mkdir"])
def test_a_configuration_that_would_run_a_program(run, config, tmp_path, injected, tag):
    injected(1)
    mark, path = tmp_path / "mark", tmp_path / "c.yaml"
    path.write_text(f"_BASE_: {config}\nSEED: !!{tag} [{mark}]\n")
    with pytest.raises(FileExistsError):  # the payload would work
        mark.mkdir()
        yaml.unsafe_load(path.read_text())
    mark.rmdir()
    result = run("train_net.py", "--config-file", path, "OUTPUT_DIR", tmp_path / "run")
    check_refused(result, str(path), "can run code")
    assert not mark.exists()


# ---- datasets ----

LEAVING = {
    "absolute": "{outside}/secret.png",
    "upwards": "../outside/secret.png",
    "down and up": "more/../../outside/secret.png",
}


@pytest.mark.parametrize("kind", LEAVING)
def test_file_names_that_leave_the_image_folder(train, datasets, tmp_path, injected, kind):
    injected(1)
    root, outside = tmp_path / "images", tmp_path / "outside"
    (root / "more").mkdir(parents=True)
    outside.mkdir()
    truth = json.loads((datasets / "leaves" / "train.json").read_text())
    for image in truth["images"]:
        os.link(datasets / "leaves" / "train" / image["file_name"], root / image["file_name"])
    os.link(root / truth["images"][0]["file_name"], outside / "secret.png")
    truth["images"][0]["file_name"] = LEAVING[kind].format(outside=outside)
    (tmp_path / "d.json").write_text(json.dumps(truth))
    entry = {"name": "d", "type": "coco", "json": f"{tmp_path}/d.json", "images": f"{root}"}
    options = ("DATASETS.REGISTER", str([entry]), "DATASETS.TRAIN", "d")
    result = train(*options)
    check_refused(result, "leave the image folder", truth["images"][0]["file_name"])


def test_a_file_name_cannot_go_through_a_link_and_up(train, datasets, tmp_path, injected):
    """The system would go up from where the link leads to."""
    injected(1)
    root, outside = tmp_path / "images", tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    root.mkdir()
    truth = json.loads((datasets / "leaves" / "train.json").read_text())
    for image in truth["images"]:
        os.link(datasets / "leaves" / "train" / image["file_name"], root / image["file_name"])
    os.link(root / truth["images"][0]["file_name"], outside / "secret.png")
    (root / "link").symlink_to(outside / "deep")
    truth["images"][0]["file_name"] = "link/../secret.png"
    assert (root / "link/../secret.png").exists()
    (tmp_path / "d.json").write_text(json.dumps(truth))
    entry = {"name": "d", "type": "coco", "json": f"{tmp_path}/d.json", "images": f"{root}"}
    result = train("DATASETS.REGISTER", str([entry]), "DATASETS.TRAIN", "d")
    check_refused(result, "link/../secret.png")
