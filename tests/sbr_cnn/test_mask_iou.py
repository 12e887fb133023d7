"""The Mask-IoU branch: target, loss, layers and score (methods 8)."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import nn
from torch.nn import functional as F

from sbr_cnn import standard_heads
from sbr_cnn.mask_heads import train_masks
from sbr_cnn.mask_iou import MaskIoUHead, fraction_inside, mask_iou_targets

ON = ("MODEL.MASK_IOU_HEAD.ENABLED", True)


def square(side: int, y1: int, x1: int, y2: int, x2: int) -> torch.Tensor:
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return mask


# ---- the target ----


def test_target_counts_the_whole_object():
    # Prediction 10 x 10; truth 10 x 10 shifted by 5 (overlap 50). The box holds half of the
    # object, so the whole has 200: union 100 + 200 - 50.
    predicted = square(28, 0, 0, 10, 10)[None]
    truth = square(28, 0, 5, 10, 15)[None].float()
    target = mask_iou_targets(predicted, truth, torch.tensor([0.5]))
    assert target.item() == pytest.approx(50 / 250, rel=1e-5)
    whole = mask_iou_targets(predicted, truth, torch.tensor([1.0]))
    assert whole.item() == pytest.approx(50 / 150, rel=1e-5)


def test_target_of_empty_and_perfect_masks():
    empty, full = square(4, 0, 0, 0, 0), square(4, 0, 0, 4, 4)
    predicted = torch.stack([empty, full, empty, full])
    truth = torch.stack([empty, full, full, empty]).float()
    targets = mask_iou_targets(predicted, truth, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(targets, torch.tensor([0.0, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("box", "share"),
    [
        ((0, 0, 20, 10), 1.0),
        ((4.9, 2.9, 8.9, 20.0), 2 / 4),  # truncated to 4..8: columns 4, 5 of 2 to 5
        ((3, 4, 5, 6), 4 / 16),
        ((-3.2, -1.0, 4.0, 5.0), 2 * 2 / 16),  # outside parts hold nothing
        ((4.2, 3.1, 4.7, 3.9), 1 / 16),  # at least one pixel
        ((10, 0, 20, 10), 0.0),
        ((25, 12, 30, 14), 0.0),  # wholly outside
    ],
)
def test_fraction_inside_truncates_the_box(box, share):
    masks = torch.zeros(2, 10, 20, dtype=torch.bool)
    masks[1, 3:7, 2:6] = True  # 16 pixels
    inside = fraction_inside(masks, torch.tensor([box]).float(), torch.tensor([1]))
    assert inside.item() == pytest.approx(share, abs=1e-6)


def test_fraction_inside_equals_counting():
    masks = torch.rand(3, 40, 50) > 0.6
    start = torch.rand(30, 2) * torch.tensor([45.0, 35.0])
    boxes = torch.cat([start, start + 1 + torch.rand(30, 2) * 20], dim=1)
    index = torch.randint(3, (30,))
    expected = []
    for box, i in zip(boxes.tolist(), index.tolist(), strict=True):
        x1, y1, x2, y2 = (int(v) for v in box)
        x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
        expected.append(masks[i, y1:y2, x1:x2].sum().item() / masks[i].sum().item())
    torch.testing.assert_close(fraction_inside(masks, boxes, index), torch.tensor(expected))


# ---- loss ----


def make_head(**kwargs) -> MaskIoUHead:
    return MaskIoUHead(ShapeSpec(channels=8, height=14, width=14), num_classes=3, **kwargs)


@pytest.mark.parametrize("threshold_logits", [True, False])
def test_loss_is_the_mean_squared_error_of_counted_positives(threshold_logits):
    head = make_head(layers="square", threshold_logits=threshold_logits)
    x = torch.randn(3, 8, 14, 14)
    # RoI 0: logits of 0.4 in the truth's place (probability 0.6, yet below a logit of 0.5) and
    # 0.6 in as many pixels beside; RoI 1: nothing predicted; RoI 2: a perfect mask.
    truth = torch.stack([square(28, 0, 0, 10, 10)] * 3).float()
    logits = torch.full((3, 28, 28), -3.0)
    logits[0, 0:10, 0:5], logits[0, 0:10, 5:15] = 0.4, 0.6
    logits[2, 0:10, 0:10] = 3.0
    # With logits: P = columns 5 to 14, overlap 50, union 150. With probabilities: overlap 100 of
    # 150. RoI 1 has target 0 and does not count.
    target = 50 / 150 if threshold_logits else 100 / 150
    classes, inside = torch.tensor([2, 0, 1]), torch.ones(3)
    predicted = head(x, logits, classes)
    expected = 0.5 * ((predicted[0] - target) ** 2 + (predicted[2] - 1) ** 2) / 2
    torch.testing.assert_close(head.loss(x, logits, classes, truth, inside), expected)


def test_loss_reaches_features_and_mask_logits():
    head = make_head(layers="square")
    x = torch.randn(2, 8, 14, 14, requires_grad=True)
    logits = torch.randn(2, 28, 28, requires_grad=True)
    truth = (torch.rand(2, 28, 28) > 0.5).float()
    head.loss(x, logits, torch.tensor([0, 1]), truth, torch.ones(2)).backward()
    assert x.grad.any() and logits.grad.any()


@pytest.mark.parametrize("count", [0, 2])
def test_loss_without_a_counted_positive_is_zero_and_connected(count):
    head = make_head(layers="square")
    empty = torch.zeros(count, 28, 28)
    classes = torch.zeros(count, dtype=torch.long)
    x = torch.randn(count, 8, 14, 14)
    loss = head.loss(x, empty - 3.0, classes, empty, torch.ones(count))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("polygons", [True, False])
def test_train_masks_takes_the_whole_instance(polygons):
    """A box over the left half of a 16 x 8 object whose prediction fills the box."""
    corners = [[4.0, 4.0, 20.0, 4.0, 20.0, 12.0, 4.0, 12.0]]
    masks = PolygonMasks([corners])
    if not polygons:
        masks = BitMasks.from_polygon_masks(masks, 32, 32)
    positives = Instances((32, 32))
    positives.proposal_boxes = Boxes(torch.tensor([[4.0, 4.0, 12.0, 12.0]]))
    positives.gt_classes, positives.gt_index = torch.tensor([1]), torch.tensor([0])
    head = make_head(layers="square")
    seen = []
    head.loss = lambda *args: seen.append(args) or torch.zeros(())
    x, logits = torch.randn(1, 8, 14, 14), torch.full((1, 3, 28, 28), 3.0)
    train_masks(x, logits, [positives], [masks], head)
    _, selected, classes, targets, inside = seen[0]
    assert selected.shape == (1, 28, 28) and classes.tolist() == [1]
    assert targets.mean() > 0.99  # RoIAlign's corner
    assert inside.item() == pytest.approx(0.5, abs=0.04)  # a polygon's border pixels
    assert mask_iou_targets(selected > 0.5, targets, inside).item() == pytest.approx(0.5, abs=0.04)


# ---- layers ----


@pytest.mark.parametrize(
    ("opts", "params"),
    [
        (("fc", False, False), 16_340_304),
        (("square", False, False), 4_620_816),
        (("rect", False, False), 5_194_640),
        (("square", True, False), 11_043_984),
        (("rect", True, False), 11_617_808),
        (("square", True, True), 11_445_552),
    ],
    ids=["original", "b", "c", "d", "e", "b+NLb+NLa"],
)
def test_parameters(opts, params):
    """Methods 8.1 and 8.2, 80 classes."""
    with torch.device("meta"):
        head = MaskIoUHead(
            ShapeSpec(channels=256, height=14, width=14),
            num_classes=80,
            layers=opts[0],
            non_local_before=opts[1],
            non_local_after=opts[2],
        )
    assert sum(p.numel() for p in head.parameters()) == params


def test_original_head_equals_a_chain_of_functions(randomize):
    head = randomize(make_head(), gain=1.5)
    x, logits = torch.randn(2, 8, 14, 14), torch.randn(2, 28, 28)
    h = torch.cat([x, F.max_pool2d(logits[:, None].sigmoid(), 2)], dim=1)
    convs = [m for m in head.convs if isinstance(m, nn.Conv2d)]
    for conv, stride in zip(convs, (1, 1, 1, 2), strict=True):
        h = F.conv2d(h, conv.weight, conv.bias, stride=stride, padding=1).relu()
    for linear in (m for m in head.layers if isinstance(m, nn.Linear)):
        h = F.linear(h.flatten(1), linear.weight, linear.bias).relu()
    expected = F.linear(h, head.predictor.weight, head.predictor.bias)
    classes = torch.tensor([2, 0])
    output = head(x, logits, classes)
    torch.testing.assert_close(output, torch.stack([expected[0, 2], expected[1, 0]]))


# ---- in the heads ----


@pytest.mark.parametrize("order", ["a", "aab", "abc"])
def test_looped_heads_train_it_in_the_last_loop_only(
    order, make_loops, make_proposals, make_targets, train_step
):
    plain = make_loops(order)
    heads = make_loops(order, *ON)
    # One head, whatever the number of pairs.
    extra = {n for n, _ in heads.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert extra == {f"mask_iou_head.{n}" for n, _ in heads.mask_iou_head.named_parameters()}
    passes = []
    heads.mask_iou_head.register_forward_hook(lambda *_: passes.append(1))
    losses = train_step(heads, make_proposals(30, 30), make_targets(3, 2))
    assert len(passes) == 1
    names = {f"{n}_loop{t}" for n in ("loss_cls", "loss_box_reg", "loss_mask") for t in (1, 2, 3)}
    expected = {n for n in names if int(n[-1]) <= len(order)} | {"loss_mask_iou"}
    assert set(losses) == expected
    losses["loss_mask_iou"].backward()
    assert all(p.grad.any() for p in heads.mask_iou_head.layers.parameters())


def test_loss_is_not_scaled_by_the_loops_weight(
    make_loops, make_proposals, make_targets, train_step, make_maps
):
    proposals, targets, maps = make_proposals(30, 30), make_targets(3, 2), make_maps(2)
    heads = make_loops("aa", *ON)
    values = []
    for weights in ((1.0, 0.75), (1.0, 0.25)):
        torch.manual_seed(5)
        other = make_loops("aa", *ON, "MODEL.ROI_LOOP_HEAD.LOSS_WEIGHTS", weights)
        other.load_state_dict(heads.state_dict())
        torch.manual_seed(6)  # the sampling
        values.append(train_step(other, proposals, targets, maps))
    first, second = values
    assert first["loss_mask_iou"].item() > 0
    torch.testing.assert_close(first["loss_mask_iou"], second["loss_mask_iou"])
    torch.testing.assert_close(first["loss_mask_loop2"], 3 * second["loss_mask_loop2"])


@pytest.mark.parametrize("standard", [True, False])
def test_detections_carry_a_mask_score_and_keep_the_class_score(
    standard, make_loops, make_heads, make_proposals, make_maps, detect, randomize
):
    mask_rcnn = (
        *("MODEL.ROI_HEADS.NAME", "ExtractorROIHeads"),
        *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    )
    make = (lambda *o: make_heads(*mask_rcnn, *o)) if standard else lambda *o: make_loops("aa", *o)
    plain, scored = make(), make(*ON)
    randomize(scored)
    plain.load_state_dict(scored.state_dict(), strict=False)
    proposals, maps = make_proposals(20, 5), make_maps(2)
    heads_seen = []
    scored.mask_iou_head.register_forward_hook(lambda _, args, out: heads_seen.append((args, out)))
    expected, found = detect(plain, proposals, maps), detect(scored, proposals, maps)
    assert sum(map(len, found)) > 4
    ((x, logits, classes), ious) = heads_seen[0]
    assert torch.equal(classes, torch.cat([f.pred_classes for f in found]))
    assert x.shape[1:] == (8, 14, 14) and logits.shape[1:] == (28, 28)
    rows = iter(ious.tolist())
    for one, other in zip(expected, found, strict=True):
        assert not one.has("mask_scores")
        assert torch.equal(one.scores, other.scores)  # ranking, boxes and masks do not change
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        torch.testing.assert_close(one.pred_masks, other.pred_masks)
        wanted = [score * next(rows) for score in other.scores.tolist()]
        torch.testing.assert_close(other.mask_scores, torch.tensor(wanted))


def test_it_reads_the_last_iterations_logits(make_loops, make_proposals, detect, randomize):
    heads = randomize(make_loops("aaa", *ON))
    seen, read = [], []
    head = heads.pairs["a"].mask_head
    logits = head.class_logits
    head.class_logits = lambda *args: seen.append(logits(*args)) or seen[-1]
    heads.mask_iou_head.register_forward_hook(lambda _, args, out: read.append(args))
    detect(heads, make_proposals(20, 5))
    assert len(seen) == 3
    assert torch.equal(read[0][1], seen[2])


def test_mask_scoring_r_cnn_trains_as_mask_r_cnn_plus_the_branch(
    make_heads, make_proposals, make_targets, train_step, make_maps, randomize
):
    standard = (
        *("MODEL.ROI_HEADS.NAME", "ExtractorROIHeads"),
        *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    )
    plain, scored = make_heads(*standard), randomize(make_heads(*standard, *ON))
    plain.load_state_dict(scored.state_dict(), strict=False)
    proposals, targets, maps = make_proposals(30, 30), make_targets(3, 2), make_maps(2)
    torch.manual_seed(6)
    expected = train_step(plain, proposals, targets, maps)
    torch.manual_seed(6)
    losses = train_step(scored, proposals, targets, maps)
    assert set(losses) == {*expected, "loss_mask_iou"}
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)
    assert losses["loss_mask_iou"].item() > 0


def test_it_needs_masks(make_loops):
    assert make_loops("aa", *ON, "MODEL.MASK_ON", False).mask_iou_head is None


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.MASK_IOU_HEAD.LAYERS", "conv"), r"MODEL\.MASK_IOU_HEAD\.LAYERS.*'conv'"),
        (("MODEL.MASK_IOU_HEAD.NON_LOCAL_AFTER", True), r"NON_LOCAL_AFTER need convolutions"),
    ],
)
def test_mistakes_are_named(opts, message, make_loops):
    with pytest.raises(ValueError, match=message):
        make_loops("aa", *ON, *opts)


def test_given_boxes_without_scores_get_masks_only(make_loops, make_proposals, make_maps):
    heads, proposals = make_loops("aa", *ON).eval(), make_proposals(3, 0)
    given = [Instances(p.image_size, pred_boxes=p.proposal_boxes) for p in proposals]
    for image in given:
        image.pred_classes = torch.zeros(len(image), dtype=torch.long)
    with torch.no_grad():
        found = heads.forward_with_given_boxes(make_maps(2), given)
    assert [len(f.pred_masks) for f in found] == [3, 0]
    assert not any(f.has("mask_scores") for f in found)


def test_mask_scoring_r_cnn_hands_over_each_objects_mask_once(
    make_heads, make_proposals, make_targets, train_step, monkeypatch
):
    """Detectron2 copies a mask per positive; the areas are summed per object."""
    heads = make_heads(
        *("MODEL.ROI_HEADS.NAME", "ExtractorROIHeads"),
        *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", *ON),
    )
    seen = []
    monkeypatch.setattr(
        standard_heads, "train_masks", lambda *args: seen.append(args) or train_masks(*args)
    )
    targets, proposals = make_targets(3, 2), make_proposals(6, 6)
    for image, target in zip(proposals, targets, strict=True):  # two or three on every object
        image.proposal_boxes = Boxes(target.gt_boxes.tensor.repeat(3, 1)[:6] + 0.5)
    train_step(heads, proposals, targets)
    _, _, positives, masks, _ = seen[0]
    for image, image_masks, target in zip(positives, masks, targets, strict=True):
        assert len(image_masks) <= len(target) < len(image)
        for box, index in zip(image.gt_boxes.tensor, image.gt_index, strict=True):
            (number,) = (target.gt_boxes.tensor == box).all(dim=1).nonzero()[:, 0].tolist()
            assert torch.equal(image_masks.tensor[index], target.gt_masks.tensor[number])


def test_objects_without_masks_are_named(make_loops, make_proposals, make_targets, train_step):
    heads, targets = make_loops("aa"), make_targets(3, 2)
    targets[1].remove("gt_masks")
    with pytest.raises(ValueError, match=r"MODEL\.MASK_ON is True, but an image's objects have no"):
        train_step(heads, make_proposals(30, 30), targets)
