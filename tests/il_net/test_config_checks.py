"""Configurations that cannot work, or not as they read: what is said, and that good ones pass."""

import importlib
import logging
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import detectron2
import torch
from detectron2.config import CfgNode

from il_net.config import load_config
from il_net.config_checks import check_il_net_config
from sbr_cnn import add_sbr_cnn_config
from sbr_cnn.config_checks import check_sbr_cnn_config

REPO = Path(__file__).parents[2]
FILES = sorted(set((REPO / "configs").rglob("*.yaml")) - {REPO / "configs" / "thesis_tables.yaml"})
ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
SEMI = ("MODEL.META_ARCHITECTURE", "TeacherStudentRCNN")
TRAIN = ("DATASETS.TRAIN", "leaves")


def check(*opts: object, eval_only: bool = False) -> None:
    cfg = load_config("", [*TRAIN, *map(str, opts)])
    check_il_net_config(cfg, eval_only=eval_only)


def check_both(cfg: CfgNode, caplog: pytest.LogCaptureFixture) -> None:
    """Neither an error nor a warning; a base for own data names no datasets yet."""
    cfg.DATASETS.TRAIN = cfg.DATASETS.TRAIN or ("leaves",)
    with caplog.at_level(logging.WARNING):
        check_il_net_config(cfg)
        check_sbr_cnn_config(cfg)
    assert caplog.messages == []


# ---- good ones ----


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(REPO / "configs").as_posix())
def test_our_configurations_pass(path, caplog):
    cfg = load_config(str(path), [], add_sbr_cnn_config)
    check_both(cfg, caplog)
    assert len(FILES) > 20


def test_config_yaml_of_a_run_passes(tmp_path, caplog):
    """All keys with their values, lists in lists where the defaults have tuples."""
    path = REPO / "configs" / "sbr_cnn" / "sbr_cnn_r50_fpn_1x.yaml"
    cfg = load_config(str(path), [], add_sbr_cnn_config)
    copy = tmp_path / "config.yaml"
    copy.write_text(cfg.dump())
    check_both(load_config(str(copy), [], add_sbr_cnn_config), caplog)


def test_all_rows_of_the_thesis_pass(monkeypatch, caplog):
    monkeypatch.syspath_prepend(REPO / "tools")
    rows = importlib.import_module("thesis_tables").read_rows().values()
    setups = {row.setup: row for row in rows if not row.external}
    assert len(setups) > 80
    for row in setups.values():
        check_both(row.resolve([]), caplog)


def test_plain_detectron2_configurations_pass(caplog):
    """Those of its model zoo, but for a few whose anchors are YAML that runs code."""
    texts = {path: path.read_text() for path in sorted(ZOO.rglob("*.yaml"))}
    paths = [path for path in texts if "etina" not in path.name]
    assert not [path for path in paths if "!!python" in texts[path]]
    for path in paths:
        check_both(load_config(str(path), [], add_sbr_cnn_config), caplog)


# ---- values ----


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("SOLVER.MAX_ITER", 0, "1 or more"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "1 or more"),
        ("SOLVER.BASE_LR", -0.01, "0 or more"),
        ("SOLVER.WEIGHT_DECAY_BIAS", -1.0, "0 or more"),
        ("SOLVER.MOMENTUM", 1.0, "in [0, 1)"),
        ("SOLVER.STEPS", "(-5,)", "0 or more"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0, "above 0"),
        ("INPUT.MIN_SIZE_TRAIN", "(640, -1)", "0 or more"),
        ("MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]", "above 0"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [0]]", "above 0"),
        ("MODEL.RPN.NMS_THRESH", 1.5, "in [0, 1]"),
        ("MODEL.RPN.IOU_LABELS", "[0, 2, 1]", "-1, 0 or 1"),
        ("MODEL.ROI_IOU_HEAD.TEST_THRESH", 1.0, "in [0, 1)"),
        ("SEMISUP.BURN_IN_ITERS", -1, "0 or more"),
        ("SEMISUP.PSEUDO.MAX_PER_IMAGE", 0, "1 or more"),
        ("SEED", 2**32, "below 4294900000"),
        ("SOLVER.BASE_LR", "1e999", "finite"),
        ("INPUT.FORMAT", "rgb", "one of BGR, RGB"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosine", "did you mean WarmupCosineLR?"),
        ("MODEL.DEVICE", "gpu", "cuda or cpu"),
        ("MODEL.PIXEL_MEAN", "[127.0]", "3 numbers"),
        ("INPUT.MIN_SIZE_TRAIN", "()", "at least one"),
        ("INPUT.CROP.SIZE", "[0.9]", "height and width"),
        ("MODEL.RPN.IOU_THRESHOLDS", "[0.7, 0.3]", "rising"),
        ("MODEL.ROI_HEADS.IOU_LABELS", "[0, -1, 1]", "one label more"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", "(1.0, 1.0)", "four numbers"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "(1.0, 1.0)", "four numbers"),
    ],
)
def test_value_that_cannot_be(key, value, wanted):
    with pytest.raises(ValueError) as error:
        check(key, value)
    message = str(error.value)
    node, _, name = key.rpartition(".")
    assert node in message and name in message
    assert "write" in message and wanted in message


def test_not_a_number_is_refused(tmp_path):
    path = tmp_path / "nan.yaml"
    path.write_text("DATASETS: {TRAIN: leaves}\nSEMISUP: {LOSS_WEIGHT: {IOU: .nan}}")
    with pytest.raises(ValueError, match=r"SEMISUP\.LOSS_WEIGHT\.IOU is nan; write a finite"):
        check_il_net_config(load_config(str(path), []))


def test_limits_themselves_are_good():
    check("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", 0, "SEED", -1)
    check("MODEL.RPN.NMS_THRESH", 1.0, "INPUT.MIN_SIZE_TEST", 0, "DATALOADER.NUM_WORKERS", 0)
    check("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[127.0]", "MODEL.PIXEL_STD", "[1.0]")
    check("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.3, 0.5]", "MODEL.ROI_HEADS.IOU_LABELS", "[0,-1,1]")


def test_sizes_to_draw_between_are_two():
    sampling = ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN")
    check(*sampling, "(640, 800)")
    with pytest.raises(ValueError, match=r"INPUT\.MIN_SIZE_TRAIN .*shortest and the longest"):
        check(*sampling, "(640, 672, 800)")


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check("MODEL.DEVICE", "cuda")  # load_config takes the CPU
    with pytest.raises(ValueError, match=r"MODEL\.DEVICE is 'cuda:1'.*write cpu"):
        check("MODEL.DEVICE", "cuda:1")


# ---- schedule and data ----


@pytest.mark.parametrize("steps", ["(80, 60)", "(60, 100)"])
def test_steps_out_of_order_or_at_the_end(steps):
    with pytest.raises(ValueError, match=r"SOLVER\.STEPS is .*rising.*MAX_ITER 100"):
        check("SOLVER.STEPS", steps, "SOLVER.MAX_ITER", 100)


def test_steps_that_are_never_reached(caplog):
    check("SOLVER.STEPS", "(60, 80, 101)", "SOLVER.MAX_ITER", 100)
    (message,) = caplog.messages
    assert "SOLVER.STEPS has [101]" in message and "SOLVER.MAX_ITER 100" in message
    caplog.clear()
    # The cosine has no steps.
    check("SOLVER.MAX_ITER", 100, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR")
    assert caplog.messages == []


def test_nothing_to_train_or_to_test_on():
    cfg = load_config("", ["DATASETS.TEST", "leaves"])
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is \(\): write"):
        check_il_net_config(cfg)
    check_il_net_config(cfg, eval_only=True)
    with pytest.raises(ValueError, match=r"DATASETS\.TEST is \(\): write"):
        check(eval_only=True)


def test_ways_to_draw_where_nothing_is_drawn(caplog):
    check("DATASETS.SPLIT.STRATIFIED", True, "DATASETS.SPLIT.PERCENT", 10)
    assert caplog.messages == []
    check("DATASETS.SPLIT.STRATIFIED", True)
    check("DATASETS.SPLIT.NESTED", True, "DATASETS.SPLIT.PERCENT", 10, "DATASETS.SPLIT.FILE", "x")
    assert [text.count("DATASETS.SPLIT.STRATIFIED") for text in caplog.messages] == [1, 1]


# ---- semi-supervised keys ----


def test_pseudo_masks_without_masks():
    mask = (*SEMI, "SEMISUP.LOSS_WEIGHT.MASK", 1.0)
    with pytest.raises(ValueError, match=r"LOSS_WEIGHT\.MASK is 1\.0.*MODEL\.MASK_ON True"):
        check(*mask)
    check(*mask, "MODEL.MASK_ON", True)
    check(*SEMI)  # the weight of the branch's loss, without the branch, is the default


def test_theta_without_the_branch(caplog):
    theta = (*SEMI, "MODEL.ROI_IOU_HEAD.TEST_THRESH", 0.5)
    with pytest.raises(ValueError, match=r"TEST_THRESH is 0\.5.*MODEL\.ROI_IOU_HEAD\.ENABLED True"):
        check(*theta)
    check(*theta, "MODEL.ROI_IOU_HEAD.ENABLED", True)
    assert caplog.messages == []


def test_settings_of_what_is_off(caplog):
    check(*SEMI, "MODEL.ROI_IOU_HEAD.FILTER", False, "MODEL.ROI_IOU_HEAD.HIDDEN_DIM", 8)
    check(*SEMI, "INPUT.STRONG_AUG.ENABLED", False, "INPUT.STRONG_AUG.BLUR_PROB", 0.1)
    branch, view = caplog.messages
    assert "MODEL.ROI_IOU_HEAD.HIDDEN_DIM 8, MODEL.ROI_IOU_HEAD.FILTER False" in branch
    assert "MODEL.ROI_IOU_HEAD.ENABLED is False; write True" in branch
    assert view.startswith("Not read: INPUT.STRONG_AUG.BLUR_PROB 0.1, because")


def test_the_branch_in_a_plain_detector():
    with pytest.raises(ValueError, match=r"ROI_IOU_HEAD\.ENABLED is True.*TeacherStudentRCNN"):
        check("MODEL.ROI_IOU_HEAD.ENABLED", True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SEMISUP.EMA.KEEP_RATE", 0.5),
        ("SEMISUP.EVAL", "('teacher',)"),
        ("MODEL.ROI_IOU_HEAD.TEST_THRESH", 0.3),
        ("INPUT.STRONG_AUG.ERASE", False),
        ("SOLVER.IMS_PER_BATCH_UNLABELED", 2),
    ],
)
def test_semi_supervised_keys_of_a_plain_detector(caplog, key, value):
    check(key, value)
    (message,) = caplog.messages
    assert f"{key} {value}" in message
    assert "MODEL.META_ARCHITECTURE is GeneralizedRCNN; write TeacherStudentRCNN" in message
    caplog.clear()
    semi = (*SEMI, "MODEL.ROI_IOU_HEAD.ENABLED", True)
    check(*semi, key, value)
    assert caplog.messages == []
