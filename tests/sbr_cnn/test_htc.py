"""HTC through the looped heads (methods 9.1): information flow, one stage, parameters."""

import pytest
import torch
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from torch import nn

HTC = ("MODEL.ROI_LOOP_HEAD.FIRST_FEEDBACK", False)


def test_the_first_mask_head_has_no_feedback(make_loops):
    pairs = make_loops("abc", *HTC).pairs
    has = {letter: pair.mask_head.conv_res is not None for letter, pair in pairs.items()}
    assert has == {"a": False, "b": True, "c": True}
    assert all(p.mask_head.conv_res is not None for p in make_loops("abc").pairs.values())


@pytest.mark.usefixtures("storage")
def test_one_stage_is_mask_r_cnn(
    make_loops, make_heads, make_proposals, make_targets, make_maps, train_step, detect
):
    """The mask path of Detectron2's heads with the same weights: same masks, same loss."""
    htc = make_loops("a", *HTC, "MODEL.ROI_LOOP_HEAD.INTERLEAVED", False)
    mask_rcnn = make_heads(
        *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
        *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"),
    )
    nn.init.normal_(htc.pairs["a"].mask_head.predictor.weight)
    state = {n.removeprefix("pairs.a."): t for n, t in htc.state_dict().items()}
    mask_rcnn.load_state_dict(state)
    maps, proposals, targets = make_maps(2), make_proposals(30, 30), make_targets(3, 2)
    found = detect(htc, proposals, maps)
    given = [type(f)(f.image_size, **f.get_fields()) for f in found]
    for image in given:
        image.remove("pred_masks")
    expected = mask_rcnn.eval().forward_with_given_boxes(maps, given)
    assert sum(map(len, found)) > 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.pred_masks, other.pred_masks)

    samples = []
    label_and_sample = htc.label_and_sample
    htc.label_and_sample = lambda *a: samples.append(label_and_sample(*a)) or samples[-1]
    losses = train_step(htc, proposals, targets, maps)
    (sample,) = samples
    positives = []
    for image, target in zip(sample, targets, strict=True):
        image = image[image.gt_classes < 3]
        image.gt_masks = target.gt_masks[image.gt_index]
        positives.append(image)
    x = mask_rcnn.mask_pooler(list(maps.values()), [p.proposal_boxes for p in positives])
    loss = mask_rcnn_loss(mask_rcnn.mask_head.layers(x), positives)
    torch.testing.assert_close(losses["loss_mask_loop1"], loss)


@pytest.mark.parametrize("changed", ["b", "c"])
def test_the_flow_changes_stages_two_and_three_only(
    changed, make_loops, make_proposals, make_targets, make_maps, train_step
):
    """Another C1 in one head: no loss before that head's stage changes, its own does."""
    maps, proposals, targets = make_maps(2), make_proposals(30, 30), make_targets(3, 2)
    heads = make_loops("abc", *HTC)
    losses = []
    for bias in (0.0, 1.0):
        nn.init.constant_(heads.pairs[changed].mask_head.conv_res.bias, bias)
        torch.manual_seed(3)
        losses.append(train_step(heads, proposals, targets, maps))
    before, after = losses
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        "b": {"loss_mask_loop2", "loss_mask_loop3"},
        "c": {"loss_mask_loop3"},
    }[changed]


def test_gradients_flow_to_the_heads_of_earlier_stages(
    make_loops, make_proposals, make_targets, train_step
):
    heads = make_loops("abc", *HTC)
    for letter in "bc":
        nn.init.constant_(heads.pairs[letter].mask_head.conv_res.bias, 0.1)
    losses = train_step(heads, make_proposals(30, 30), make_targets(3, 2))
    losses["loss_mask_loop3"].backward()
    for letter in "abc":
        convs = heads.pairs[letter].mask_head.conv_norm_relus
        assert all(p.grad.any() for conv in convs for p in conv.parameters()), letter
        # Logits are the last head's own.
        assert (heads.pairs[letter].mask_head.predictor.weight.grad is None) == (letter != "c")


def test_further_test_loops_repeat_the_last_head(make_loops, make_proposals, detect):
    heads = make_loops("abc", *HTC, "MODEL.ROI_LOOP_HEAD.TEST_LOOPS", 4)
    assert len(detect(heads, make_proposals(9, 4))) == 2


def test_a_first_head_without_feedback_runs_first_only(make_loops):
    assert make_loops("a", *HTC)
    with pytest.raises(ValueError, match=r"FIRST_FEEDBACK False .*ORDER 'aab' uses it again"):
        make_loops("aab", *HTC)
