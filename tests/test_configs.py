"""Every configuration merges and builds; every key we add is read somewhere; off by default."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from il_net.config import add_il_net_config, load_config
from sbr_cnn import add_sbr_cnn_config

REPO = Path(__file__).parents[1]
CONFIGS = REPO / "configs"
FILES = sorted(set(CONFIGS.rglob("*.yaml")) - {CONFIGS / "thesis_tables.yaml"})
# Files that may mention a key without using it.
DEFINITIONS = {REPO / "il_net" / "config.py", REPO / "sbr_cnn" / "config.py"}
NUM_CLASSES = 3


def load(path: Path) -> CfgNode:
    cfg = load_config(str(path), [], add_sbr_cnn_config)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    return cfg


def test_there_are_configurations():
    names = {path.relative_to(CONFIGS).as_posix() for path in FILES}
    assert {
        "Base-RCNN-FPN.yaml",
        "quickstart/Base-small.yaml",
        "quickstart/demo.yaml",
        "quickstart/coffee_leaf.yaml",
        "datasets/ldd_mask_rcnn.yaml",
        "datasets/ldd_r3_cnn.yaml",
        "datasets/asnd_supervised.yaml",
        "datasets/asnd_unbiased_teacher.yaml",
        "datasets/asnd_il_net.yaml",
    } <= names
    assert any(name.startswith("sbr_cnn/") for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_configuration_merges_and_builds(path):
    cfg = load(path)
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    if "timm" in cfg.MODEL.BACKBONE.NAME:
        pytest.importorskip("timm")
    model = build_model(cfg)
    assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE
    if cfg.MODEL.META_ARCHITECTURE == "TeacherStudentRCNN":
        assert type(model.teacher).__name__ == cfg.SEMISUP.DETECTOR
        model = model.student
    assert type(model.roi_heads).__name__ == cfg.MODEL.ROI_HEADS.NAME
    assert model.roi_heads.num_classes == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    # One score per class and background, in every predictor.
    scores = [m.cls_score.out_features for m in model.modules() if hasattr(m, "cls_score")]
    assert scores
    assert set(scores) == {cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1}
    masks = [name for name, _ in model.named_parameters() if "mask_head" in name]
    assert bool(masks) == cfg.MODEL.MASK_ON


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_schedule_of_a_configuration_is_consistent(path):
    cfg = load(path)
    assert cfg.SOLVER.WARMUP_ITERS < cfg.SOLVER.MAX_ITER
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":  # the cosine has no steps
        steps = list(cfg.SOLVER.STEPS)
        assert steps == sorted(set(steps))
        assert steps[0] > cfg.SOLVER.WARMUP_ITERS
        assert steps[-1] < cfg.SOLVER.MAX_ITER
    assert cfg.VERSION == 2
    # No fraction of a batch per level: one anchor size a level, as many levels as the RPN reads.
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == len(cfg.MODEL.RPN.IN_FEATURES)


def test_sbr_cnn_configurations_follow_the_1x_schedule():
    # COCO 2017 has 117,266 training images with annotations; 1x is 12 epochs, steps at 8 and 11.
    iterations_per_epoch = 117266 / 16
    for path in (CONFIGS / "sbr_cnn").glob("*.yaml"):
        cfg = load(path)
        assert cfg.SOLVER.IMS_PER_BATCH == 16, path.name
        assert cfg.SOLVER.BASE_LR == 0.02, path.name
        epochs = [n / iterations_per_epoch for n in (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)]
        assert epochs == pytest.approx([8, 11, 12], abs=0.01), path.name


def test_ldd_configurations_follow_the_recipe_of_section_2_5():
    """12 epochs of 881 images, decays after 8 and 11; the learning rate is linear in the batch."""
    for name in ("ldd_mask_rcnn", "ldd_r3_cnn"):
        cfg = load(CONFIGS / "datasets" / f"{name}.yaml")
        solver = cfg.SOLVER
        batch = solver.IMS_PER_BATCH
        epochs = [n * batch / 881 for n in (*solver.STEPS, solver.MAX_ITER)]
        assert epochs == [8, 11, 12], name
        assert solver.BASE_LR == 0.02 * batch / 16 == 0.00125, name
        assert (solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.9, 0.0001), name
        assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (500, 0.001), name
        sizes = (*cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST)
        assert (*sizes, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST) == (800, 800, 1333, 1333)
        rpn, heads = cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
        assert (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST) == (2000, 1000), name
        assert (heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION) == (512, 0.25), name
        assert (heads.SCORE_THRESH_TEST, heads.NMS_THRESH_TEST) == (0.001, 0.5), name
        assert cfg.TEST.DETECTIONS_PER_IMAGE == 100, name


@pytest.mark.parametrize(
    ("name", "like", "different"),
    [
        # The Mask R-CNN of COCO does not test down to 0.001 nor train on 2000 proposals.
        (
            "ldd_mask_rcnn",
            "sbr_cnn/mask_rcnn_r50_fpn_1x",
            {"RPN.POST_NMS_TOPK_TRAIN", "ROI_HEADS.SCORE_THRESH_TEST"},
        ),
        ("ldd_r3_cnn", "sbr_cnn/r3_cnn_r50_fpn_1x", set()),
        ("asnd_unbiased_teacher", "il_net/unbiased_teacher_r50_fpn_coco10", set()),
        ("asnd_il_net", "il_net/il_net_r50_fpn_coco10", set()),
        ("asnd_supervised", "il_net/unbiased_teacher_r50_fpn_coco10", {"META_ARCHITECTURE"}),
    ],
)
def test_models_on_ldd_and_asnd_are_those_on_coco(name, like, different):
    ours, theirs = load(CONFIGS / "datasets" / f"{name}.yaml"), load(CONFIGS / f"{like}.yaml")
    values = dict(leaves(theirs.MODEL))
    found = {key for key, value in leaves(ours.MODEL) if values[key] != value}
    assert found == {"ROI_HEADS.NUM_CLASSES", *different}
    assert ours.SEMISUP == theirs.SEMISUP


def test_a_key_that_does_not_exist_fails(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text(f"_BASE_: {CONFIGS / 'Base-RCNN-FPN.yaml'}\nSOLVER:\n  MAX_ITERS: 10\n")
    with pytest.raises(ValueError, match=r"SOLVER\.MAX_ITERS"):
        load(path)


# ---- every key is read ----


def added_keys(*functions) -> list[str]:
    """Dotted names of the leaves that the functions add to Detectron2's defaults."""
    before, cfg = dict(leaves(get_cfg())), get_cfg()
    for function in functions:
        function(cfg)
    return [key for key, _ in leaves(cfg) if key not in before]


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def unread(keys: list[str], sources: list[str]) -> list[str]:
    """Keys that no source reads.

    ``X.Y.PARENT.KEY`` counts as read where ``<something>.PARENT.KEY`` is loaded, or where
    ``name.KEY`` is and the sources pass ``<something>.PARENT`` around by itself (as in
    ``node = cfg.MODEL.PARENT``). Assignments do not count, comments and strings neither.
    """
    chains, on_names, nodes = set(), set(), set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
                continue
            nodes.add(node.attr)
            if isinstance(node.value, ast.Attribute):
                chains.add((node.value.attr, node.attr))
            elif isinstance(node.value, ast.Name):
                on_names.add(node.attr)
    missing = []
    for key in keys:
        parent, leaf = key.split(".")[-2:]
        if (parent, leaf) not in chains and not (leaf in on_names and parent in nodes):
            missing.append(key)
    return missing


@pytest.mark.parametrize(
    ("add", "package"), [(add_il_net_config, "il_net"), (add_sbr_cnn_config, "sbr_cnn")]
)
def test_every_key_we_add_is_read(add, package):
    keys = added_keys(add)
    assert keys
    sources = [p.read_text() for p in (REPO / package).rglob("*.py") if p not in DEFINITIONS]
    assert unread(keys, sources) == []


def test_a_key_that_nothing_reads_is_found():
    def add(cfg: CfgNode) -> None:
        cfg.MODEL.MADE_UP = CfgNode({"NOWHERE": 1, "ASSIGNED": 2, "CHAIN": 3, "ALIAS": 4})

    keys = added_keys(add)
    assert sorted(keys) == [f"MODEL.MADE_UP.{k}" for k in ("ALIAS", "ASSIGNED", "CHAIN", "NOWHERE")]
    sources = [
        '"MADE_UP.NOWHERE"  # cfg.MODEL.MADE_UP.NOWHERE\ncfg.MODEL.MADE_UP.ASSIGNED = 3',
        "x = cfg.MODEL.MADE_UP.CHAIN\nnode = cfg.MODEL.MADE_UP\ny = node.ALIAS",
    ]
    missing = unread(keys, sources)
    assert sorted(missing) == ["MODEL.MADE_UP.ASSIGNED", "MODEL.MADE_UP.NOWHERE"]
    # The same name under another node is another key.
    assert unread(["MODEL.MADE_UP.CHAIN"], ["x = cfg.MODEL.OTHER.CHAIN"]) == ["MODEL.MADE_UP.CHAIN"]


def uncommented(source: str) -> list[str]:
    """Keys set in ``add_*_config`` without a comment above them or above their group."""
    lines, found = source.splitlines(), []
    for function in ast.parse(source).body:
        if not (isinstance(function, ast.FunctionDef) and function.name.startswith("add_")):
            continue
        explained = False
        for statement in function.body[1:]:  # after the docstring
            starts_group = isinstance(getattr(statement, "value", None), ast.Call)
            above = lines[statement.lineno - 2].strip()
            explained = not starts_group and (above.startswith("#") or (explained and above != ""))
            if not (starts_group or explained):
                found.append(ast.unparse(statement.targets[0]))
    return found


@pytest.mark.parametrize("path", sorted(DEFINITIONS), ids=lambda p: p.parent.name)
def test_every_key_has_a_comment(path):
    assert uncommented(path.read_text()) == []


def test_a_key_without_comment_is_found():
    source = """
def add_x_config(cfg):
    'Doc.'
    cfg.A = CfgNode()
    # Two of a kind.
    cfg.A.B = 1
    cfg.A.C = 2

    cfg.A.D = 3
    cfg.E = CfgNode()
    cfg.E.F = 4
"""
    assert uncommented(source) == ["cfg.A.D", "cfg.E.F"]


# ---- off by default ----


def structure(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def shrink(cfg: CfgNode) -> CfgNode:
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    return cfg


def use_fpn(cfg: CfgNode) -> None:
    """Detectron2's own Mask R-CNN with FPN."""
    levels = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = levels
    cfg.MODEL.FPN.IN_FEATURES = levels
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.MASK_ON = True


@pytest.mark.parametrize("change", [lambda cfg: None, use_fpn], ids=["defaults", "fpn"])
def test_our_keys_alone_change_nothing(change):
    plain, ours = get_cfg(), get_cfg()
    add_il_net_config(ours)
    add_sbr_cnn_config(ours)
    for key, value in leaves(plain):
        assert dict(leaves(ours))[key] == value, key
    models = []
    for cfg in (plain, ours):
        change(cfg)
        torch.manual_seed(0)
        models.append(build_model(shrink(cfg)))
    assert structure(models[0]) == structure(models[1])
    assert not any(
        t.__module__.startswith(("sbr_cnn", "il_net")) for t in structure(models[1]).values()
    )
    for (name, a), b in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
