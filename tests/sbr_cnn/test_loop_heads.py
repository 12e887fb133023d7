"""Losses and gradients of the looped heads (methods 4.3 and 5.2)."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from sbr_cnn.attention import NonLocal2d, RelativePositionAttention

KINDS = ("loss_cls", "loss_box_reg", "loss_mask")
TAKE_ALL = (
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1000),
    *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
)


def names(loops: int) -> set[str]:
    return {f"{kind}_loop{t}" for kind in KINDS for t in range(1, loops + 1)}


# ---- one loop is a plain Mask R-CNN head ----


@pytest.fixture
def twins(make_loops, make_heads):
    """One loop without extras, and Detectron2's class-agnostic head with the same weights.

    All candidates are sampled, so that the losses' means don't depend on the order of draws.
    """
    keys = (*TAKE_ALL, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    looped = make_loops("a", *keys, "MODEL.ROI_LOOP_HEAD.INTERLEAVED", False)
    plain = make_heads(
        *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
        *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", *keys),
    )
    pair = looped.pairs["a"]
    nn.init.normal_(pair.box_predictor.bbox_pred.weight, std=0.2)
    plain.box_head.load_state_dict(pair.box_head.state_dict())
    plain.box_predictor.load_state_dict(pair.box_predictor.state_dict())
    missing, extra = plain.mask_head.load_state_dict(pair.mask_head.state_dict(), strict=False)
    assert not missing and set(extra) == {"conv_res.weight", "conv_res.bias"}
    return looped, plain


def test_one_loop_trains_as_detectron2s_head(
    twins, make_maps, make_proposals, make_targets, train_step
):
    looped, plain = twins
    proposals, targets = make_proposals(50, 40), make_targets(3, 2)
    results = []
    for heads in twins:
        torch.manual_seed(1)
        maps = {name: x.requires_grad_() for name, x in make_maps().items()}
        losses = train_step(heads, proposals, targets, maps)
        gradients = torch.autograd.grad(sum(losses.values()), list(maps.values()))
        results.append((losses, gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert set(theirs) == set(KINDS)
    assert set(ours) == names(1)
    for kind in KINDS:
        assert theirs[kind].item() > 1e-3
        torch.testing.assert_close(ours[f"{kind}_loop1"], theirs[kind], rtol=1e-5, atol=1e-6)
    for ours_at_level, theirs_at_level in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(ours_at_level, theirs_at_level, rtol=1e-3, atol=1e-7)


def test_one_loop_detects_as_detectron2s_head(twins, make_maps, make_proposals, detect):
    proposals, maps = make_proposals(20, 20), make_maps()
    ours, theirs = (detect(heads, proposals, maps) for heads in twins)
    for image, expected in zip(ours, theirs, strict=True):
        assert len(expected) > 10
        assert torch.equal(image.pred_classes, expected.pred_classes)
        for field in ("scores", "pred_masks"):
            torch.testing.assert_close(
                image.get(field), expected.get(field), rtol=1e-5, atol=1e-5
            )
        torch.testing.assert_close(
            image.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-5, atol=1e-4
        )


# ---- names and weights of the losses ----


@pytest.mark.parametrize("order", ["a", "aab", "abc", "aabbb"])
def test_loss_names(order, make_loops, make_proposals, make_targets, train_step):
    losses = train_step(make_loops(order), make_proposals(20, 20), make_targets(2, 2))
    assert set(losses) == names(len(order))


def test_loss_names_without_masks(make_loops, make_proposals, make_targets, train_step):
    heads = make_loops("aa", "MODEL.MASK_ON", False)
    losses = train_step(heads, make_proposals(20, 20), make_targets(2, 2))
    assert set(losses) == {name for name in names(2) if "mask" not in name}


def test_loss_weights_scale_their_loop(
    make_loops, make_maps, make_proposals, make_targets, train_step
):
    heads = make_loops("aab", *TAKE_ALL)
    twice = make_loops("aab", *TAKE_ALL, "MODEL.ROI_LOOP_HEAD.LOSS_WEIGHTS", (1.0, 1.5, 0.5))
    unit = make_loops("aab", *TAKE_ALL, "MODEL.ROI_LOOP_HEAD.LOSS_WEIGHTS", (1.0, 1.0, 1.0))
    maps, proposals, targets = make_maps(), make_proposals(20, 20), make_targets(2, 2)
    for other in (twice, unit):
        other.load_state_dict(heads.state_dict())
    # make_loops weights the loops 1, 0.75, 0.5.
    base, doubled, plain = (train_step(h, proposals, targets, maps) for h in (heads, twice, unit))
    for name, loss in base.items():
        loop = int(name[-1])
        assert doubled[name].item() == pytest.approx(loss.item() * (2 if loop == 2 else 1))
        assert loss.item() == pytest.approx(plain[name].item() * {1: 1, 2: 0.75, 3: 0.5}[loop])


# ---- gradients ----


def test_gradients_are_not_scaled_by_the_number_of_loops(
    make_loops, make_maps, make_proposals, make_targets, train_step
):
    """Detectron2's cascade divides by it; here loop 1 of three has the gradient of a lone one."""
    one, three = make_loops("a", *TAKE_ALL), make_loops("aaa", *TAKE_ALL)
    three.load_state_dict(one.state_dict())
    maps = {name: x.requires_grad_() for name, x in make_maps().items()}
    proposals, targets = make_proposals(20, 20), make_targets(2, 2)
    gradients = []
    for heads in (one, three):
        losses = train_step(heads, proposals, targets, maps)
        first = sum(losses[f"{kind}_loop1"] for kind in KINDS)
        gradients.append(torch.autograd.grad(first, list(maps.values())))
    for alone, among_three in zip(*gradients, strict=True):
        torch.testing.assert_close(alone, among_three, rtol=1e-4, atol=1e-7)


def test_every_loop_reaches_the_shared_head_and_the_maps(
    make_loops, make_maps, make_proposals, make_targets, train_step
):
    heads = make_loops("aa")
    maps = {name: x.requires_grad_() for name, x in make_maps().items()}
    losses = train_step(heads, make_proposals(60, 60), make_targets(3, 3), maps)
    pair = heads.pairs["a"]
    box, mask = [*pair.box_head.parameters()], [*pair.mask_head.deconv.parameters()]
    for loop in (1, 2):
        of_boxes = torch.autograd.grad(
            losses[f"loss_cls_loop{loop}"] + losses[f"loss_box_reg_loop{loop}"],
            [*box, maps["p2"]],
            retain_graph=True,
        )
        of_masks = torch.autograd.grad(
            losses[f"loss_mask_loop{loop}"], [*mask, maps["p2"]], retain_graph=True
        )
        assert all(g.any() for g in (*of_boxes, *of_masks))


@pytest.mark.parametrize("mask_loop", [True, False])
def test_c1_learns_through_the_mask_loop_only(
    mask_loop, make_loops, make_proposals, make_targets, train_step
):
    """Methods 5.4: with one pass C1 sees zeros, its weight gets none and its bias a gradient."""
    heads = make_loops("aa", "MODEL.ROI_LOOP_HEAD.MASK_LOOP", mask_loop)
    c1 = heads.pairs["a"].mask_head.conv_res
    nn.init.constant_(c1.bias, 0.1)  # the ReLU's slope at 0 is 0
    losses = train_step(heads, make_proposals(20, 20), make_targets(3, 3))
    losses["loss_mask_loop2"].backward()
    assert c1.bias.grad.any()
    assert bool(c1.weight.grad.any()) is mask_loop


@pytest.mark.parametrize("post", ["non_local", "attention"])
@pytest.mark.usefixtures("storage")
def test_one_step_of_a_whole_model_reaches_every_parameter(post, make_config, make_targets):
    """Backbone, FPN, RPN, and two head pairs with GRoIE."""
    cfg = make_config(
        *("MODEL.BACKBONE.NAME", "build_norm_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 8),
        *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
        *("MODEL.RESNETS.NORM", "FrozenStatsBN"),
        *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
        *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [48], [64], [96]]),
        *("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.RPN.POST_NMS_TOPK_TRAIN", 100),
        *("MODEL.ROI_BOX_HEAD.EXTRACTOR", "groie", "MODEL.ROI_MASK_HEAD.EXTRACTOR", "groie"),
        *("MODEL.ROI_LOOP_HEAD.ORDER", "aab", "MODEL.GROIE.POST", post),
    )
    model = build_model(cfg).train()
    for name, parameter in model.named_parameters():
        # The blocks start as the identity: until these have moved from zero, no gradient
        # passes the output convolution or gamma to what lies before. C1's ReLU is flat at 0.
        if name.endswith(("conv_out.weight", "gamma", "conv_res.bias")):
            nn.init.constant_(parameter, 0.1)
    kind = {"non_local": NonLocal2d, "attention": RelativePositionAttention}[post]
    assert sum(isinstance(m, kind) for m in model.modules()) == 4
    images = torch.rand(2, 3, 96, 128) * 255
    losses = model(
        [
            {"image": image, "instances": target}
            for image, target in zip(images, make_targets(3, 2), strict=True)
        ]
    )
    assert set(losses) == names(3) | {"loss_rpn_cls", "loss_rpn_loc"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # phi's bias adds the same to a query's energy with every key; the softmax cancels it.
            assert parameter.grad.any() or name.endswith("phi.bias"), name
