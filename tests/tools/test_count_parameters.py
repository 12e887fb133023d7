"""Counting trainable parameters; the command line itself is in tests/e2e."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from torch import nn

REPO = Path(__file__).parents[2]


def load_tool():
    path = REPO / "tools" / "count_parameters.py"
    spec = importlib.util.spec_from_file_location("count_parameters_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_what_trains_counts_and_shared_parameters_once():
    count = load_tool().count_trainable
    first = nn.Linear(3, 5)  # 15 + 5
    assert count(first) == 20
    assert count(nn.Sequential(first, first)) == 20
    frozen = nn.Linear(5, 7).requires_grad_(False)
    assert count(nn.Sequential(first, frozen)) == 20
    assert count(nn.Sequential(first, nn.BatchNorm2d(4))) == 28  # buffers are no parameters
    assert count(nn.Identity()) == 0


@pytest.mark.parametrize(
    ("options", "output"),
    [
        # A plain Faster R-CNN predictor on FC_DIM inputs: K + 1 scores, 4 K deltas, with biases.
        (["MODEL.ROI_HEADS.NUM_CLASSES", "3"], 3),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "5"], 5),
    ],
)
def test_two_classes_more_cost_their_share_of_the_predictor(monkeypatch, capsys, options, output):
    """Base-small is class-agnostic for boxes: a class costs FC_DIM + 1 and CONV_DIM + 1."""
    pytest.importorskip("timm")
    config = REPO / "configs" / "quickstart" / "Base-small.yaml"
    counts = []
    for opts in (["MODEL.ROI_HEADS.NUM_CLASSES", "1"], options):
        argv = ["count_parameters.py", "--config-file", str(config), *opts]
        monkeypatch.setattr("sys.argv", argv)
        load_tool().main()
        counts.append(int(capsys.readouterr().out.strip().splitlines()[-1]))
    fc, conv = 256, 64
    assert counts[1] - counts[0] == (output - 1) * (fc + 1 + conv + 1)
