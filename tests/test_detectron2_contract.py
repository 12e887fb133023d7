"""What this project relies on inside Detectron2: every imported name, and the seams it overrides.

A new Detectron2 that moves or renames one of these fails here, with its name, instead of somewhere
inside a training run.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import Metadata, MetadataCatalog
from detectron2.engine import DefaultTrainer, SimpleTrainer
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.modeling.sampling import subsample_labels
from detectron2.solver.build import GradientClipType
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

REPO = Path(__file__).parents[1]
FILES = [
    REPO / "train_net.py",
    *sorted(p for folder in ("il_net", "sbr_cnn", "tools") for p in (REPO / folder).rglob("*.py")),
]


def detectron2_imports(source: str) -> set[tuple[str, str]]:
    """(module, name) of every ``from detectron2... import name``; name is "" for a plain import."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            if node.module.split(".")[0] == "detectron2":
                found |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(a.name, "") for a in node.names if a.name.split(".")[0] == "detectron2"}
    return found


def resolves(module: str, name: str) -> bool:
    """Whether ``from module import name`` would work."""
    try:
        if not hasattr(importlib.import_module(module), name or "__name__"):
            importlib.import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


USED = sorted(set().union(*(detectron2_imports(path.read_text()) for path in FILES)))


def test_the_search_finds_imports():
    source = "from detectron2.layers import ShapeSpec as S\ndef f():\n import detectron2.utils.comm"
    expected = {("detectron2.layers", "ShapeSpec"), ("detectron2.utils.comm", "")}
    assert detectron2_imports(source) == expected
    assert detectron2_imports("from detectron import x\nfrom .detectron2 import y") == set()
    assert len(USED) > 20  # it looked into the right folders


def test_the_check_of_a_name_can_fail():
    assert resolves("detectron2.utils", "comm")  # a submodule
    assert not resolves("detectron2.layers", "NoSuchLayer")
    assert not resolves("detectron2.no_such_module", "x")


@pytest.mark.parametrize(("module", "name"), USED, ids=lambda part: part)
def test_imported_name_exists(module, name):
    assert resolves(module, name)


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (SimpleTrainer.__init__, ["self", "model", "data_loader", "optimizer"]),
        (SimpleTrainer.run_step, ["self"]),
        (SimpleTrainer._write_metrics, ["self", "loss_dict", "data_time"]),
        (SimpleTrainer.state_dict, ["self"]),
        (SimpleTrainer.load_state_dict, ["self", "state_dict"]),
        (DefaultTrainer.build_model, ["cfg"]),
        (DefaultTrainer.build_optimizer, ["cfg", "model"]),
        (DefaultTrainer.build_lr_scheduler, ["cfg", "optimizer"]),
        (DefaultTrainer.build_train_loader, ["cfg"]),
        (DefaultTrainer.build_test_loader, ["cfg", "dataset_name"]),
        (DefaultTrainer.build_evaluator, ["cfg", "dataset_name"]),
        (DefaultTrainer.test, ["cfg", "model"]),
        (DefaultTrainer.build_hooks, ["self"]),
        (DefaultTrainer.build_writers, ["self"]),
        (DefaultTrainer.resume_or_load, ["self", "resume"]),
        (DefaultTrainer.auto_scale_workers, ["cfg", "num_workers"]),
        (DefaultTrainer.state_dict, ["self"]),
        (DefaultTrainer.load_state_dict, ["self", "state_dict"]),
        (DetectionCheckpointer.__init__, ["self", "model", "save_dir"]),
        (DetectionCheckpointer.load, ["self", "path"]),
        (DetectionCheckpointer._load_file, ["self", "filename"]),
        (DetectionCheckpointer._load_model, ["self", "checkpoint"]),
        (DetectionCheckpointer._convert_ndarray_to_tensor, ["self", "state_dict"]),
        (DetectionCheckpointer._log_incompatible_keys, ["self", "incompatible"]),
        (DetectionCheckpointer.has_checkpoint, ["self"]),
        (DetectionCheckpointer.get_checkpoint_file, ["self"]),
        (COCOEvaluator.process, ["self", "inputs", "outputs"]),
        (COCOEvaluator.evaluate, ["self", "img_ids"]),
        (COCOEvaluator._eval_predictions, ["self", "predictions", "img_ids"]),
        (COCOEvaluator._tasks_from_predictions, ["self", "predictions"]),
        (COCOEvaluator._derive_coco_results, ["self", "coco_eval", "iou_type", "class_names"]),
        (StandardROIHeads._init_box_head, ["cfg", "input_shape"]),
        (StandardROIHeads._init_mask_head, ["cfg", "input_shape"]),
        (ROIHeads.from_config, ["cfg"]),
        (ROIHeads.forward, ["self", "images", "features", "proposals", "targets"]),
        (StandardROIHeads.forward_with_given_boxes, ["self", "features", "instances"]),
        (FastRCNNOutputLayers.losses, ["self", "predictions", "proposals"]),
        (FastRCNNOutputLayers.predict_boxes, ["self", "predictions", "proposals"]),
        (FastRCNNOutputLayers.inference, ["self", "predictions", "proposals"]),
        (MaskRCNNConvUpsampleHead.layers, ["self", "x"]),
        (
            subsample_labels,
            ["labels", "num_samples", "positive_fraction", "bg_label"],
        ),
        (Matcher.__init__, ["self", "thresholds", "labels", "allow_low_quality_matches"]),
        (comm.gather, ["data"]),
        (comm.all_gather, ["data"]),
    ],
    ids=lambda part: getattr(part, "__qualname__", ""),
)
def test_signature_starts_as_expected(function, first):
    assert parameters(function)[: len(first)] == first


def test_class_methods_are_class_methods():
    for owner, names in (
        (StandardROIHeads, ["_init_box_head", "_init_mask_head", "from_config"]),
        (
            DefaultTrainer,
            [
                "build_model",
                "build_optimizer",
                "build_lr_scheduler",
                "build_train_loader",
                "build_test_loader",
                "build_evaluator",
                "test",
            ],
        ),
    ):
        for name in names:
            assert inspect.ismethod(getattr(owner, name)), f"{owner.__name__}.{name}"
    assert isinstance(inspect.getattr_static(DefaultTrainer, "auto_scale_workers"), staticmethod)


def test_coco_evaluator_can_use_plain_pycocotools():
    assert "use_fast_impl" in parameters(COCOEvaluator.__init__)
    assert {"output_dir", "tasks"} <= set(parameters(COCOEvaluator.__init__))


def test_coco_evaluators_fast_scoring_has_the_name_that_we_replace():
    assert callable(coco_evaluation.COCOeval_opt)
    source = inspect.getsource(coco_evaluation._evaluate_predictions_on_coco)
    assert "COCOeval_opt if use_fast_impl else COCOeval" in source


def test_gradient_clipping_keys_are_those_we_read():
    clip = get_cfg().SOLVER.CLIP_GRADIENTS
    assert {"ENABLED", "CLIP_TYPE", "CLIP_VALUE", "NORM_TYPE"} <= set(clip)
    assert {kind.value for kind in GradientClipType} >= {"value", "norm"}


class Losses(torch.nn.Module):
    """Two losses of the one parameter w = 3: w and 2 w, hence 3 and 6."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, factor: float) -> dict[str, torch.Tensor]:
        return {"loss_a": self.w * factor, "loss_b": 2 * self.w * factor}


def test_simple_trainer_iterates_its_loader_and_sums_the_losses():
    model = Losses()
    trainer = SimpleTrainer(model, [1.0, 2.0], torch.optim.SGD(model.parameters(), lr=0.0))
    assert next(trainer._data_loader_iter) == 1.0
    with EventStorage() as storage:
        trainer._write_metrics(model(1.0), data_time=0.5)
        assert storage.latest()["total_loss"][0] == pytest.approx(9.0)
        assert storage.latest()["data_time"][0] == pytest.approx(0.5)
        bad = {"loss_a": torch.tensor(float("nan"))}
        with pytest.raises(FloatingPointError):
            trainer._write_metrics(bad, data_time=0.5)
    assert "optimizer" in trainer.state_dict()


@pytest.fixture
def shapes() -> dict[str, ShapeSpec]:
    return {f"p{level}": ShapeSpec(channels=4, stride=2**level) for level in (2, 3, 4, 5)}


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 2
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    return cfg


def test_standard_roi_heads_return_their_parts_by_name(cfg, shapes):
    parts = StandardROIHeads._init_box_head(cfg, shapes)
    assert {"box_in_features", "box_pooler", "box_head", "box_predictor"} <= set(parts)
    parts = StandardROIHeads._init_mask_head(cfg, shapes)
    assert {"mask_in_features", "mask_pooler", "mask_head"} <= set(parts)
    cfg.MODEL.MASK_ON = False
    assert StandardROIHeads._init_mask_head(cfg, shapes) == {}


def test_roi_heads_configuration_and_attributes(cfg):
    ret = ROIHeads.from_config(cfg)
    assert set(ret) == {
        "batch_size_per_image",
        "positive_fraction",
        "num_classes",
        "proposal_matcher",
        "proposal_append_gt",
    }
    heads = ROIHeads(**{**ret, "proposal_matcher": None})
    assert heads.num_classes == 2
    assert heads.proposal_append_gt is True


def test_mask_head_parts(cfg):
    head = MaskRCNNConvUpsampleHead(cfg, ShapeSpec(channels=4, height=7, width=7))
    assert len(head.conv_norm_relus) == 2
    assert head.deconv.in_channels == 8
    x = torch.rand(3, 4, 7, 7)
    y = x
    for conv in head.conv_norm_relus:
        y = conv(y)
    torch.testing.assert_close(head.predictor(head.deconv_relu(head.deconv(y))), head.layers(x))


def test_box_predictor_takes_logits_and_deltas(cfg):
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    coder = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    predictor = FastRCNNOutputLayers(cfg, ShapeSpec(channels=8), box2box_transform=coder)
    sample = Instances((50, 50))
    sample.proposal_boxes = Boxes(torch.tensor([[10.0, 10.0, 20.0, 30.0], [0.0, 0.0, 5.0, 5.0]]))
    sample.gt_boxes = sample.proposal_boxes
    sample.gt_classes = torch.tensor([1, 2])  # the second is background
    predictions = (torch.zeros(2, 3), torch.zeros(2, 4))
    with EventStorage():
        losses = predictor.losses(predictions, [sample])
    # Three equal logits: ln 3 for every row. Deltas and targets are both zero.
    assert losses["loss_cls"].item() == pytest.approx(1.0986123)
    assert losses["loss_box_reg"].item() == 0.0
    (boxes,) = predictor.predict_boxes(predictions, [sample])
    torch.testing.assert_close(boxes, sample.proposal_boxes.tensor)
    detections, kept = predictor.inference(predictions, [sample])
    assert len(detections) == len(kept) == 1
    assert {"pred_boxes", "scores", "pred_classes"} <= set(detections[0].get_fields())


def test_matcher_and_sampler():
    # Rows are truths, columns candidates.
    iou = torch.tensor([[0.9, 0.5, 0.1], [0.0, 0.2, 0.3]])
    index, labels = Matcher([0.5], [0, 1], allow_low_quality_matches=False)(iou)
    assert index.tolist() == [0, 0, 1]
    assert labels.tolist() == [1, 1, 0]  # exactly the threshold counts as a match
    index, labels = Matcher([0.5], [0, 1], allow_low_quality_matches=False)(iou[:0])
    assert index.tolist() == labels.tolist() == [0, 0, 0]
    positive, negative = subsample_labels(torch.tensor([0, 7, 7, 7, 1]), 4, 0.25, 7)
    assert len(positive) == 1
    assert set(positive.tolist()) <= {0, 4}
    assert sorted(negative.tolist()) == [1, 2, 3]


def test_metadata_may_be_made_and_removed():
    assert Metadata(thing_classes=["a"]).thing_classes == ["a"]
    MetadataCatalog.get("contract_test").set(thing_classes=["a"])
    assert MetadataCatalog.pop("contract_test").thing_classes == ["a"]


def test_local_process_group_can_be_set():
    # Release 0.6 has the variable, later versions the function; launch.py uses either.
    assert hasattr(comm, "create_local_process_group") or hasattr(comm, "_LOCAL_PROCESS_GROUP")
