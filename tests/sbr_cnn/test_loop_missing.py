"""What a picture can lack, and mistakes in the looped heads' configuration."""

import numpy as np
import pytest
from detectron2.data import DatasetMapper
from PIL import Image
from torch import Tensor, nn

EXTRACTORS = {
    "single": (),
    "non_local": ("groie", "non_local"),
    "attention": ("groie", "attention"),
}
LOSSES = {
    f"{kind}_loop{loop}" for kind in ("loss_cls", "loss_box_reg", "loss_mask") for loop in (1, 2)
}


def assert_finite_with_gradients(heads: nn.Module, losses: dict[str, Tensor]) -> None:
    """DDP needs a gradient, if only of zeros, for every parameter in every step."""
    for name, loss in losses.items():
        assert loss.isfinite() and loss.dim() == 0, name
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize(
    ("proposals", "truths", "append_gt"),
    [
        ((20, 20), (2, 0), True),
        ((20, 20), (0, 0), True),
        ((0, 20), (2, 2), True),
        ((0, 0), (2, 2), True),
        ((0, 0), (0, 0), True),
        ((20, 0), (0, 2), False),
    ],
)
def test_missing_proposals_and_ground_truth(
    proposals, truths, append_gt, extractor, make_loops, make_proposals, make_targets, train_step
):
    kind, post = EXTRACTORS[extractor] or ("single", "none")
    heads = make_loops(
        "ab",
        *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", append_gt, "MODEL.GROIE.POST", post),
        *("MODEL.ROI_BOX_HEAD.EXTRACTOR", kind, "MODEL.ROI_MASK_HEAD.EXTRACTOR", kind),
    )
    losses = train_step(heads, make_proposals(*proposals), make_targets(*truths))
    assert set(losses) == LOSSES
    assert_finite_with_gradients(heads, losses)
    # Boxes and masks train on positives only; here the ground truth makes the only ones.
    positives = append_gt and any(truths)
    for loop in (1, 2):
        assert bool(losses[f"loss_mask_loop{loop}"] > 0) is positives
        assert positives or losses[f"loss_box_reg_loop{loop}"] == 0


@pytest.mark.parametrize("mask_format", ["bitmask", "polygon"])
def test_crowds_are_no_ground_truth(
    mask_format, tmp_path, make_config, make_loops, make_proposals, train_step
):
    """Through Detectron2's mapper: a picture with a crowd only, and one with one object more."""
    cfg = make_config("INPUT.MASK_FORMAT", mask_format)
    Image.fromarray(np.zeros((96, 128, 3), dtype=np.uint8)).save(tmp_path / "black.png")
    square = {"bbox": [20, 20, 60, 60], "bbox_mode": 0, "category_id": 1}
    polygon = [[20.0, 20.0, 60.0, 20.0, 60.0, 60.0, 20.0, 60.0]]
    crowd = {**square, "iscrowd": 1, "segmentation": {"size": [96, 128], "counts": [96 * 128]}}
    item = {**square, "iscrowd": 0, "segmentation": polygon}
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[],
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format=cfg.INPUT.MASK_FORMAT,
    )
    targets = [
        mapper({"file_name": str(tmp_path / "black.png"), "annotations": annotations})["instances"]
        for annotations in ([crowd], [crowd, item])
    ]
    assert [len(target) for target in targets] == [0, 1]
    heads = make_loops("ab")
    proposals = make_proposals(20, 20)
    losses = train_step(heads, proposals, targets)
    assert set(losses) == LOSSES
    assert losses["loss_mask_loop1"] > 0
    assert_finite_with_gradients(heads, losses)
    alone = train_step(heads, proposals[:1], targets[:1])
    assert set(alone) == LOSSES
    assert_finite_with_gradients(heads, alone)
    assert alone["loss_mask_loop1"] == 0


# ---- mistakes in the configuration ----


def test_class_specific_boxes_are_refused(make_loops):
    with pytest.raises(ValueError, match="MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"):
        make_loops("a", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False)


def test_every_pair_needs_a_box_coder(make_loops):
    with pytest.raises(ValueError, match="MODEL.ROI_LOOP_HEAD.BBOX_REG_WEIGHTS"):
        make_loops("ab", "MODEL.ROI_LOOP_HEAD.BBOX_REG_WEIGHTS", ((10.0, 10.0, 5.0, 5.0),))


def test_a_mask_head_that_cannot_loop_is_refused(make_loops):
    with pytest.raises(ValueError, match="MODEL.ROI_MASK_HEAD.NAME"):
        make_loops("a", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")


def test_training_without_targets(make_loops, make_maps, make_proposals):
    with pytest.raises(ValueError, match="targets"):
        make_loops("a").train()(None, make_maps(), make_proposals(3, 3))
