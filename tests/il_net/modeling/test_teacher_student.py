"""The teacher-student module: burn-in, averages, losses by group (methods-il-net 1, appendix A)."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import rpn
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from il_net.config import add_il_net_config
from il_net.modeling import box_predictor
from il_net.modeling.ema import update_average
from il_net.modeling.teacher_student import TeacherStudentRCNN

SIZE = (96, 128)
TINY = [
    *("MODEL.META_ARCHITECTURE", "TeacherStudentRCNN", "MODEL.DEVICE", "cpu"),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 16),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [48], [64], [96]]),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 100, "MODEL.RPN.POST_NMS_TOPK_TEST", 50),
    *("MODEL.RPN.HEAD_NAME", "StandardRPNHead"),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 3),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
    *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *(
        "SEMISUP.BURN_IN_ITERS",
        2,
        "SEMISUP.EMA.KEEP_RATE",
        0.75,
        "SEMISUP.PSEUDO.SCORE_THRESH",
        0.3,
    ),
    *("SEMISUP.LOSS_WEIGHT.BOX_REG", 0.5, "SEMISUP.LOSS_WEIGHT.RPN_LOC", 2.0),
    *("MODEL.ROI_IOU_HEAD.ENABLED", True, "MODEL.ROI_IOU_HEAD.HIDDEN_DIM", 16),
    *("MODEL.ROI_IOU_HEAD.TEST_THRESH", -1.0),
]
WEIGHTS = {
    **{"loss_cls": 4.0, "loss_rpn_cls": 4.0, "loss_box_iou": 4.0},
    **{"loss_box_reg": 0.5, "loss_rpn_loc": 2.0},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(*opts) -> TeacherStudentRCNN:
    cfg = get_cfg()
    add_il_net_config(cfg)
    cfg.merge_from_list([*TINY, *opts])
    return build_model(cfg).train()


def sure(model: TeacherStudentRCNN) -> TeacherStudentRCNN:
    """Let the teacher find something: an untrained classifier is sure of nothing."""
    for detector in (model.student, model.teacher):
        torch.nn.init.normal_(detector.roi_heads.box_predictor.cls_score.weight, std=3.0)
    model.burned_in.fill_(True)
    return model


def instances(masks: bool) -> Instances:
    boxes = torch.tensor([[10.0, 10, 60, 50], [64, 20, 120, 90]])
    found = Instances(SIZE, gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 2]))
    if masks:
        bitmaps = torch.zeros(2, *SIZE, dtype=torch.bool)
        for bitmap, (x1, y1, x2, y2) in zip(bitmaps, boxes.int().tolist(), strict=True):
            bitmap[y1:y2, x1:x2] = True
        found.gt_masks = BitMasks(bitmaps)
    return found


def make_batch(labeled: int = 1, unlabeled: int = 2, masks: bool = False) -> SimpleNamespace:
    def record(number: int) -> dict:
        views = torch.randint(256, (2, 3, *SIZE), dtype=torch.uint8)
        names = {"file_name": f"{number}.jpg", "image_id": number, "height": 96, "width": 128}
        return {"image": views[0], "strong_image": views[1], **names}

    return SimpleNamespace(
        labeled=[{**record(i), "instances": instances(masks)} for i in range(labeled)],
        unlabeled=[record(10 + i) for i in range(unlabeled)],
    )


def losses_of(model, batch) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # the sampling of anchors and RoIs
    with EventStorage():
        return model(batch)


# ---- the teacher's weights ----


def test_teacher_is_copied_at_the_end_of_burn_in_and_averaged_after():
    model = make_model()
    name = "roi_heads.box_head.fc1.weight"
    student, teacher = model.student.get_parameter(name), model.teacher.get_parameter(name)
    values, expected = [], None
    for iteration in range(6):
        with torch.no_grad():
            student += 1.0
        values.append(student.clone())
        model.update_teacher(iteration)
        if iteration == 2:  # a copy
            expected = values[2]
        elif iteration > 2:
            expected = 0.75 * expected + 0.25 * values[iteration]
        if iteration >= 2:
            torch.testing.assert_close(teacher, expected)
        assert bool(model.burned_in) == (iteration >= 2)
    # In closed form: the weights of the values seen at 2, 3, 4, 5 add up to one.
    shares = {2: 27 / 64, 3: 9 / 64, 4: 12 / 64, 5: 16 / 64}
    closed = sum(share * values[i] for i, share in shares.items())
    torch.testing.assert_close(teacher, closed)


def test_everything_is_copied_and_only_what_trains_is_averaged():
    model = make_model()
    with torch.no_grad():
        for tensor in model.student.state_dict().values():
            tensor.copy_(torch.rand_like(tensor.float()))
    model.update_teacher(2)
    for name, tensor in model.student.state_dict().items():
        assert torch.equal(model.teacher.state_dict()[name], tensor), name
    frozen = dict(model.student.named_parameters())["backbone.bottom_up.stem.conv1.weight"]
    assert not frozen.requires_grad
    with torch.no_grad():
        frozen += 1
    model.update_teacher(3)
    assert not torch.equal(model.teacher.backbone.bottom_up.stem.conv1.weight, frozen)


def test_ema_period():
    model = make_model("SEMISUP.EMA.PERIOD", 3)
    model.update_teacher(2)
    before = model.teacher.state_dict()["proposal_generator.rpn_head.conv.weight"].clone()
    with torch.no_grad():
        model.student.proposal_generator.rpn_head.conv.weight.add_(1.0)
    now = model.teacher.proposal_generator.rpn_head.conv.weight
    for iteration in (3, 4):
        model.update_teacher(iteration)
        assert torch.equal(now, before)
    model.update_teacher(5)
    torch.testing.assert_close(now, before + 0.25)


def test_average_leaves_integers_whole():
    ours, theirs = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    theirs.num_batches_tracked.fill_(7)
    theirs.running_mean.fill_(3.0)
    torch.nn.init.constant_(theirs.weight, 3.0)
    update_average(ours, theirs, 0.75)
    assert ours.num_batches_tracked.item() == 7 and ours.running_mean.tolist() == [3.0, 3.0]
    assert ours.weight.tolist() == [1.5, 1.5]


def test_no_gradient_reaches_the_teacher():
    model = sure(make_model())
    sum(losses_of(model, make_batch()).values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    trained = [p for p in model.student.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert not model.teacher.training and model.student.training


# ---- losses ----


def test_burn_in_trains_on_both_labelled_views_alone():
    model, batch = make_model(), make_batch(labeled=2, unlabeled=0)
    losses = losses_of(model, batch)
    assert set(losses) == set(WEIGHTS)
    views = [{**r, "image": r["strong_image"]} for r in batch.labeled] + batch.labeled
    torch.manual_seed(1)
    with EventStorage():
        expected = model.student(views)
    for name in losses:
        torch.testing.assert_close(losses[name], expected[name])


@pytest.mark.parametrize("merged", [True, False])
def test_losses_are_the_groups_weighted_sum_term_by_term(merged):
    """As two separate passes through Detectron2's own forward would give (appendix A 3)."""
    model, batch = sure(make_model("SEMISUP.MERGED_FORWARD", merged)), make_batch()
    losses = losses_of(model, batch)
    pseudo = model.pseudo_label(batch.unlabeled)
    assert sum(map(len, pseudo)) > 0
    torch.manual_seed(1)
    with EventStorage():
        views = [{**r, "image": r["strong_image"]} for r in batch.labeled] + batch.labeled
        expected = model.student(views)
        strong = [
            {**r, "image": r["strong_image"], "instances": p}
            for r, p in zip(batch.unlabeled, pseudo, strict=True)
        ]
        for name, loss in model.student(strong).items():
            expected[f"{name}_pseudo"] = WEIGHTS[name] * loss
    assert set(losses) == set(expected)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-4, atol=1e-6)


def count_calls(monkeypatch, owner: object, name: str) -> list[int]:
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def test_losses_of_weight_zero_are_neither_computed_nor_logged(monkeypatch):
    keys = [f"SEMISUP.LOSS_WEIGHT.{group}" for group in ("BOX_REG", "RPN_LOC", "IOU")]
    model, batch = sure(make_model(*(part for key in keys for part in (key, 0.0)))), make_batch()
    encodings = [
        count_calls(monkeypatch, rpn, "_dense_box_regression_loss"),
        count_calls(monkeypatch, FastRCNNOutputLayers, "box_reg_loss"),
        count_calls(monkeypatch, box_predictor, "decoded_ious"),
    ]
    losses = losses_of(model, batch)
    pseudo = {name for name in losses if name.endswith("_pseudo")}
    assert pseudo == {"loss_cls_pseudo", "loss_rpn_cls_pseudo"}
    assert set(WEIGHTS) <= set(losses)  # of the labelled images, all
    assert [len(calls) for calls in encodings] == [1, 1, 1]
    raw = {name for name in model.monitor.read() if name.startswith("pseudo/raw_")}
    assert raw == {"pseudo/raw_loss_cls", "pseudo/raw_loss_rpn_cls"}


def test_what_stays_is_the_same_when_the_rest_is_skipped():
    batch = make_batch()
    skipping = sure(
        make_model("SEMISUP.LOSS_WEIGHT.BOX_REG", 0.0, "SEMISUP.LOSS_WEIGHT.RPN_LOC", 0.0)
    )
    whole = make_model()
    whole.load_state_dict(skipping.state_dict())
    expected = losses_of(whole, batch)
    for name, loss in losses_of(skipping, batch).items():
        torch.testing.assert_close(loss, expected[name])


@pytest.mark.parametrize(("height", "passes"), [(SIZE[0], 1), (2 * SIZE[0], 2)])
def test_groups_are_not_merged_where_padding_would_cost_more(height, passes):
    """One labelled image (two views) of 96 x 128, one unlabelled: 3 x 192 x 128 against 4 x 96."""
    model, batch, seen = make_model(), make_batch(unlabeled=1), []
    (record,) = batch.unlabeled
    views = torch.randint(256, (2, 3, height, SIZE[1]), dtype=torch.uint8)
    record |= {"image": views[0], "strong_image": views[1], "height": height}
    model.student.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    losses_of(model, batch)
    assert seen == ([3] if passes == 1 else [2, 1])


def test_images_without_pseudo_labels_train_as_background():
    model, batch = make_model("SEMISUP.PSEUDO.SCORE_THRESH", 0.999), make_batch()
    losses = losses_of(model, batch)
    assert losses["loss_cls_pseudo"].item() > 0 and losses["loss_rpn_cls_pseudo"].item() > 0
    for name in ("loss_box_reg_pseudo", "loss_rpn_loc_pseudo", "loss_box_iou_pseudo"):
        assert losses[name].item() == 0
    assert set(losses) == set(losses_of(sure(model), batch))  # the same keys with and without
    sum(losses_of(model, batch).values()).backward()


@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_pseudo_masks_train_the_mask_branch_where_weighted(weight):
    model = sure(make_model("MODEL.MASK_ON", True, "SEMISUP.LOSS_WEIGHT.MASK", weight))
    batch = make_batch(masks=True)
    losses = losses_of(model, batch)
    assert "loss_mask" in losses
    assert ("loss_mask_pseudo" in losses) == (weight > 0)
    (pseudo, *_) = model.pseudo_label(batch.unlabeled)
    assert pseudo.has("gt_masks") == (weight > 0)
    assert model.student.roi_heads.mask_on and model.teacher.roi_heads.mask_on
    sum(losses.values()).backward()


def test_the_teacher_reads_the_weak_view_and_no_label():
    model, batch, seen = sure(make_model()), make_batch(), []
    inference = model.teacher.inference
    model.teacher.inference = lambda records, **kw: seen.append(records) or inference(records, **kw)
    losses_of(model, batch)
    assert all(r["image"] is b["image"] for r, b in zip(seen[0], batch.unlabeled, strict=True))
    assert not any("instances" in record for record in seen[0])


def test_train_time_proposals_for_the_teacher():
    counts = []
    for train in (True, False):
        model = sure(make_model("SEMISUP.TEACHER_TRAIN_PROPOSALS", train))
        model.teacher.roi_heads.register_forward_pre_hook(
            lambda _, args: counts.append(max(map(len, args[2])))
        )
        model.pseudo_label(make_batch().unlabeled)
        assert model.teacher.proposal_generator.post_nms_topk[False] == 50
    assert counts[0] > 50 >= counts[1]


def test_monitor_reads_means_once():
    model, batch = sure(make_model()), make_batch()
    losses_of(model, batch)
    boxes = sum(map(len, model.monitor.latest[1]))
    losses_of(model, batch)
    means = model.monitor.read()
    assert means["pseudo/boxes_per_image"] == pytest.approx(boxes / 2)
    assert means["pseudo/raw_loss_cls"] > 0
    assert model.monitor.read() == {}


# ---- evaluation and checkpoints ----


def test_evaluation_is_the_students_until_burn_in_ends():
    model = make_model().eval()
    torch.nn.init.normal_(model.student.roi_heads.box_predictor.cls_score.weight, std=3.0)
    record = {"image": make_batch().labeled[0]["image"], "height": 96, "width": 128}
    for burned_in, expected in ((False, model.student), (True, model.teacher)):
        model.burned_in.fill_(burned_in)
        with torch.no_grad():
            (found,), (wanted,) = model([record]), expected([record])
        assert torch.equal(found["instances"].scores, wanted["instances"].scores)


def test_a_detectors_weights_go_to_both():
    model = make_model()
    state = {name: torch.rand_like(t.float()) for name, t in model.student.state_dict().items()}
    adopted = dict(state)
    model.adopt_state(adopted, "")
    result = model.load_state_dict(adopted, strict=False)
    assert result.missing_keys == ["burned_in"] and not result.unexpected_keys
    for detector in (model.student, model.teacher):
        assert torch.equal(detector.state_dict()["proposal_generator.rpn_head.conv.weight"],
                           state["proposal_generator.rpn_head.conv.weight"])  # fmt: skip
    own = model.state_dict()
    model.adopt_state(own, "")
    assert set(own) == set(model.state_dict())


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SEMISUP.DETECTOR", "Nothing"), "SEMISUP.DETECTOR: there is no detector 'Nothing'"),
        (("SEMISUP.DETECTOR", "TeacherStudentRCNN"), "there is no detector 'TeacherStudentRCNN'"),
        (("SEMISUP.DETECTOR", "ProposalNetwork"), "ProposalNetwork has no .*roi_heads"),
        (("SEMISUP.EMA.KEEP_RATE", 1.5), r"SEMISUP\.EMA\.KEEP_RATE lies in \[0, 1\], got 1.5"),
        (("SEMISUP.EMA.PERIOD", 0), r"SEMISUP\.EMA\.PERIOD is 1 or more"),
        (("SEMISUP.LOSS_WEIGHT.MASK", -1.0), r"SEMISUP\.LOSS_WEIGHT\.MASK is 0 or more"),
        (("SEMISUP.PSEUDO.SCORE_THRESH", 70.0), r"SCORE_THRESH lies in \[0, 1\), got 70"),
        (("MODEL.KEYPOINT_ON", True), "no pseudo labels of keypoints"),
    ],
)
def test_mistakes_are_named(opts, message):
    with pytest.raises(ValueError, match=message):
        make_model(*opts)
