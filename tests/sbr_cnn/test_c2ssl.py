"""C2SSL: targets, weights and losses (datasets-and-c2ssl 4.4 to 4.6), and heads that have it."""

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_roi_heads
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from sbr_cnn.c2ssl import ContainmentHead, balanced_weights, relate, resolve_groups

DATA = Path(__file__).parents[3] / "shared" / "data"
LEAF, RUST, GRAPE, MOULD, SOIL, NOTHING = range(6)
CLASSES = ["leaf", "rust", "grape", "mould", "soil"]
GROUPS = [
    {"containers": ["leaf"], "contents": ["rust"]},
    {"containers": ["grape"], "contents": ["mould"]},
]
WHOLE = [0.0, 0, 100, 100]
FOUR = (0.33, 0.29, 0.33, 0.05)  # thesis 2.7.3


def make_head(**kwargs) -> ContainmentHead:
    kwargs = {"in_features": 3, "related": relate(GROUPS, CLASSES), "class_weights": FOUR} | kwargs
    return ContainmentHead(**kwargs)


def image(boxes: list, classes: list, size=(200, 200)) -> Instances:
    found = Instances(size, gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
    found.gt_classes = torch.tensor(classes, dtype=torch.long)
    return found


def sample(boxes: list, classes: list, **fields) -> Instances:
    found = Instances((200, 200), proposal_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
    found.gt_classes = torch.tensor(classes, dtype=torch.long)
    for name, value in fields.items():
        found.set(name, value)
    return found


def assigned(proposals: Instances, target: Instances, **kwargs) -> list[int]:
    make_head(**kwargs).assign([proposals], [target])
    return proposals.situation.tolist()


# ---- targets ----


@pytest.mark.parametrize(
    ("disease", "leaf_is", "disease_is"),
    [  # the facts' vectors for mu 0.45: shares 1.00, 0.64, 0.444, 0.25
        ([10.0, 10, 20, 20], 1, 3),
        ([80.0, 80, 105, 105], 1, 3),
        ([80.0, 80, 110, 110], 0, 2),
        ([90.0, 90, 110, 110], 0, 2),
    ],
)
def test_vectors_of_the_facts(disease, leaf_is, disease_is):
    target = image([WHOLE, disease], [LEAF, RUST])
    assert assigned(sample([WHOLE, disease], [LEAF, RUST]), target) == [leaf_is, disease_is]
    # Of another plant part: neither sick nor inside.
    target = image([WHOLE, disease], [LEAF, MOULD])
    assert assigned(sample([WHOLE, disease], [LEAF, MOULD]), target) == [0, 2]


def test_the_content_divides_and_the_proposal_counts_not_the_object():
    target = image([WHOLE, [0.0, 0, 40, 40]], [LEAF, RUST])
    boxes = [[0.0, 0, 20, 40], [0.0, 0, 15, 40], [90.0, 0, 130, 40], [0.0, 0, 40, 40]]
    # The rust's share in a leaf proposal: 1/2, 3/8. A rust proposal's share in the leaf: 1/4, 1.
    assert assigned(sample(boxes, [LEAF, LEAF, RUST, RUST]), target) == [1, 0, 2, 3]


def test_other_classes_background_and_images_without_objects():
    target = image([WHOLE, [10.0, 10, 20, 20]], [LEAF, RUST])
    assert assigned(sample([WHOLE] * 3, [SOIL, NOTHING, GRAPE]), target) == [-1, -1, 0]
    assert assigned(sample([WHOLE], [NOTHING]), image([], [])) == [-1]
    assert assigned(sample([], []), target) == []
    assert assigned(sample([WHOLE], [LEAF]), image([WHOLE], [LEAF])) == [0]  # alone: healthy


def test_the_largest_share_decides_and_the_threshold_belongs_to_inside():
    target = image([WHOLE, [0.0, 0, 10, 10], [95.0, 0, 115, 10]], [LEAF, RUST, RUST])
    boxes = [[5.0, 0, 100, 100], [95.0, 0, 115, 10]]  # shares 1/2 and 1/4; 1/4
    proposals = sample(boxes, [LEAF, RUST])
    assert assigned(proposals, target, mu=0.5) == [1, 2]
    assert assigned(proposals, target, mu=0.51) == [0, 2]
    assert assigned(proposals, target, mu=0.25) == [1, 3]


def test_targets_equal_a_brute_force_of_eq_2_13():
    generator = torch.Generator().manual_seed(0)

    def boxes(count: int) -> list:
        start = torch.rand(count, 2, generator=generator) * 90
        return torch.cat(
            [start, start + 5 + torch.rand(count, 2, generator=generator) ** 2 * 110], 1
        ).tolist()

    def share(content: list, container: list) -> float:
        width = min(content[2], container[2]) - max(content[0], container[0])
        height = min(content[3], container[3]) - max(content[1], container[1])
        area = (content[2] - content[0]) * (content[3] - content[1])
        return max(width, 0) * max(height, 0) / area

    objects, proposals = boxes(12), boxes(200)
    kinds = torch.randint(5, (12,), generator=generator).tolist()
    matched = torch.randint(6, (200,), generator=generator).tolist()
    partner = {LEAF: RUST, RUST: LEAF, GRAPE: MOULD, MOULD: GRAPE}
    expected = []
    for box, kind in zip(proposals, matched, strict=True):
        if kind not in partner:
            expected.append(-1)
            continue
        others = [b for b, k in zip(objects, kinds, strict=True) if k == partner[kind]]
        is_container = kind in (LEAF, GRAPE)
        shares = [share(o, box) if is_container else share(box, o) for o in others]
        expected.append((0 if is_container else 2) + (max(shares, default=0) >= 0.45))
    assert set(expected) == {-1, 0, 1, 2, 3}
    assert assigned(sample(proposals, matched), image(objects, kinds)) == expected


@pytest.mark.parametrize("kind", ["bitmaps", "polygons"])
def test_masks_instead_of_boxes(kind):
    """An L of 300 px whose box (20 x 20) holds the spot, which the L itself does not touch."""
    target = image([[0.0, 0, 20, 20], [10.0, 10, 20, 20], [0.0, 0, 4, 4]], [LEAF, RUST, RUST])
    if kind == "bitmaps":
        bitmaps = torch.zeros(3, 200, 200, dtype=torch.bool)
        bitmaps[0, :20, :20] = bitmaps[1, 10:20, 10:20] = bitmaps[2, :4, :4] = True
        bitmaps[0, 10:20, 10:20] = False
        target.gt_masks = BitMasks(bitmaps)
    else:
        corner = [0.0, 0, 20, 0, 20, 10, 10, 10, 10, 20, 0, 20]
        spots = [[10.0, 10, 20, 10, 20, 20, 10, 20], [0.0, 0, 4, 0, 4, 4, 0, 4]]
        target.gt_masks = PolygonMasks([[corner], *([spot] for spot in spots)])
    boxes, classes = [[0.0, 0, 20, 20], [10.0, 10, 20, 20], [0.0, 0, 4, 4]], [LEAF, RUST, RUST]
    index = torch.tensor([0, 1, 2])
    assert assigned(sample(boxes, classes), target) == [1, 3, 3]
    assert assigned(sample(boxes, classes, gt_index=index), target, use_masks=True) == [1, 2, 3]
    del_second = target[[0, 1]]
    found = assigned(sample(boxes[:2], classes[:2], gt_index=index[:2]), del_second, use_masks=True)
    assert found == [0, 2]


def test_coffee_leaves():
    """The facts' count on real data: every spot is inside, every leaf with spots sick."""
    path = DATA / "coffee_leaf" / "annotations" / "instances_train.json"
    if not path.is_file():
        pytest.skip("needs the public data set coffee_leaf in ../shared/data beside the repository")
    by_image: dict[int, list] = {}
    for annotation in json.loads(path.read_text())["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    counts: dict[int, int] = {}
    for own in by_image.values():
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
        kinds = [LEAF if a["category_id"] == 1 else RUST for a in own]
        for found in assigned(sample(corners, kinds), image(corners, kinds)):
            counts[found] = counts.get(found, 0) + 1
    assert counts == {0: 80, 1: 258, 3: 1179}


# ---- weights ----


def test_balanced_weights_reproduce_the_thesis():
    weights = balanced_weights(torch.tensor([1, 13, 1, 85]))
    assert [round(w, 2) for w in weights.tolist()] == list(FOUR)
    assert weights.sum().item() == pytest.approx(1)
    assert balanced_weights(torch.zeros(4, dtype=torch.long)).tolist() == [0.25] * 4


def test_weights_follow_the_targets_counted_so_far():
    head = make_head(class_weights=())
    torch.nn.init.zeros_(head.logits.weight), torch.nn.init.zeros_(head.logits.bias)
    proposals = sample([WHOLE] * 4, [LEAF] * 4, situation=torch.tensor([1, 3, 3, -1]))
    entropy = 0.75**1.5 * math.log(4)
    # Shares 0, 1/3, 0, 2/3: weights 1/3, 2/9, 1/3, 1/9; twice the same batch, the same shares.
    for _ in range(2):
        loss = head(torch.zeros(4, 3), [proposals])
        assert loss.item() == pytest.approx((2 / 9 + 2 / 9) * entropy / 4, rel=1e-5)
    assert head.counts.tolist() == [0, 2, 0, 4] and "counts" in head.state_dict()


# ---- losses ----


@pytest.mark.parametrize(
    ("situation", "cost"), [(0, 0.2971), (1, 0.2611), (2, 0.2971), (3, 0.0450)]
)
def test_check_values_of_the_facts(situation, cost):
    head = make_head()
    torch.nn.init.zeros_(head.logits.weight), torch.nn.init.zeros_(head.logits.bias)
    # Divided by all sampled boxes, the negatives among them.
    proposals = sample([WHOLE] * 4, [LEAF] * 4, situation=torch.tensor([situation, -1, -1, -1]))
    assert head(torch.zeros(4, 3), [proposals]).item() * 4 == pytest.approx(cost, abs=5e-5)


def test_gamma_0_is_weighted_cross_entropy():
    head = make_head(gamma=0.0, loss_weight=2.0)
    x, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 3, 0])
    loss = head(x, [sample([WHOLE] * 6, [LEAF] * 6, situation=target)])
    expected = torch.nn.functional.cross_entropy(
        head.logits(x), target, weight=torch.tensor(FOUR), reduction="sum"
    )
    torch.testing.assert_close(loss, 2 * expected / 6)


@pytest.mark.parametrize(("mode", "free", "taken"), [("container", 0, 1), ("content", 2, 3)])
def test_one_situation_has_one_logit(mode, free, taken):
    head = make_head(mode=mode, alpha=0.9)
    assert sum(p.numel() for p in head.parameters()) == 3 + 1
    torch.nn.init.zeros_(head.logits.weight), torch.nn.init.constant_(head.logits.bias, 2.0)
    other = 2 if mode == "container" else 0
    target = torch.tensor([free, taken, other, other + 1, -1])
    loss = head(torch.zeros(5, 3), [sample([WHOLE] * 5, [LEAF] * 5, situation=target)])
    p = 1 / (1 + math.exp(-2.0))  # that nothing is contained
    expected = 0.9 * (1 - p) ** 1.5 * -math.log(p) + 0.1 * p**1.5 * -math.log(1 - p)
    assert loss.item() == pytest.approx(expected / 5, rel=1e-5)


@pytest.mark.parametrize("mode", ["both", "container", "content"])
@pytest.mark.parametrize("count", [0, 3])
def test_without_a_usable_sample_the_loss_is_a_zero_with_a_gradient(mode, count):
    head = make_head(mode=mode, class_weights=())
    ignored = torch.full((count,), -1)
    loss = head(
        torch.randn(count, 3), [sample([WHOLE] * count, [NOTHING] * count, situation=ignored)]
    )
    assert loss.item() == 0
    loss.backward()
    assert head.logits.weight.grad is not None and not head.logits.weight.grad.any()


def test_a_sure_answer_has_a_finite_gradient():
    head = make_head(gamma=0.5)
    x = torch.full((1, 3), 1e4, requires_grad=True)
    with torch.no_grad():
        head.logits.weight.copy_(torch.eye(4)[:, :3])
    head(x, [sample([WHOLE], [LEAF], situation=torch.tensor([0]))]).backward()
    assert torch.isfinite(x.grad).all()


# ---- groups ----


def test_groups_are_inferred_where_asked_for(make_config):
    asked = []

    def infer(share: float) -> list[dict]:
        asked.append(share)
        return GROUPS

    for groups, enabled in ((None, True), ("auto", False), (GROUPS[:1], True)):
        cfg = make_config("MODEL.C2SSL.ENABLED", enabled)
        cfg.MODEL.C2SSL.GROUPS = groups
        resolve_groups(cfg, infer)
        assert groups == cfg.MODEL.C2SSL.GROUPS
    cfg = make_config(*ENABLED, "MODEL.C2SSL.GROUPS", "auto", "MODEL.C2SSL.AUTO_SHARE", 0.8)
    resolve_groups(cfg, infer)
    assert (cfg.MODEL.C2SSL.GROUPS, asked) == (GROUPS, [0.8])


def test_relation_of_the_groups():
    related = relate(GROUPS, CLASSES)
    assert related.nonzero().tolist() == [[LEAF, RUST], [GRAPE, MOULD]]
    assert related.shape == (6, 6)  # and the background


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"containers": ["leave"], "contents": ["rust"]}], r"got \['leave'\]; the classes are"),
        ([{"containers": "leaf", "contents": ["rust"]}], "needs lists of class names, got 'leaf'"),
        ([{"containers": ["leaf"], "contents": []}], r"needs lists of class names, got \[\]"),
        ([{"leaf": ["rust"]}], r"is a list of \{containers"),
        ([{"containers": None, "contents": ["rust"]}], "needs lists of class names, got None"),
        ([{"containers": [["leaf"]], "contents": ["rust"]}], "needs lists of class names"),
        ([*GROUPS, {"containers": ["rust"], "contents": ["soil"]}], r"\['rust'\] cannot be"),
    ],
)
def test_groups_that_do_not_fit(groups, message):
    with pytest.raises(ValueError, match=rf"MODEL\.C2SSL\.GROUPS.*{message}"):
        relate(groups, CLASSES)


# ---- in the RoI heads ----

NAMES = ("leaf", "rust", "soil")
ENABLED = ("MODEL.C2SSL.ENABLED", True)
STANDARD = (
    *("MODEL.ROI_HEADS.NAME", "ExtractorROIHeads"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
)
FCC = ("MODEL.ROI_BOX_HEAD.NAME", "FCCBoxHead", "MODEL.FCC.LAYERS", "rect")


@pytest.fixture
def make(make_config, shapes):
    """The heads that the keys describe, for three named classes."""

    def build(*opts):
        cfg = make_config(*opts)
        cfg.DATASETS.CLASSES = NAMES
        cfg.MODEL.C2SSL.GROUPS = [{"containers": ["leaf"], "contents": ["rust"]}]
        return build_roi_heads(cfg, shapes)

    return build


@pytest.fixture
def pictures(make_proposals, make_targets):
    """Two pictures with two leaves and two rusts each, all among the sampled boxes."""
    targets = make_targets(4, 4)
    for target in targets:
        target.gt_classes = torch.tensor([0, 1, 0, 1])
    return make_proposals(20, 20), targets


LOOPS = ["loss_c2ssl_loop1", "loss_c2ssl_loop2", "loss_c2ssl_loop3"]


@pytest.mark.parametrize(
    ("opts", "names"),
    [
        ((), LOOPS),
        (FCC, LOOPS),
        (("MODEL.C2SSL.MASKS", True), LOOPS),
        (STANDARD, ["loss_c2ssl"]),
        ((*STANDARD, *FCC), ["loss_c2ssl"]),
        ((*STANDARD, "MODEL.C2SSL.MASKS", True), ["loss_c2ssl"]),
    ],
)
def test_every_box_head_in_every_loop(make, pictures, train_step, opts, names):
    heads = make(*ENABLED, *opts)
    losses = train_step(heads, *pictures)
    assert [name for name in losses if "c2ssl" in name] == names
    assert all(losses[name].item() > 0 for name in names)
    sum(losses[name] for name in names).backward()
    box_head = heads.pairs["a"].box_head if names == LOOPS else heads.box_head
    assert all(p.grad is not None and p.grad.any() for p in box_head.parameters())


@pytest.mark.parametrize("opts", [(), STANDARD])
def test_loops_weigh_the_branch_and_the_other_losses_stay(
    make, pictures, train_step, make_maps, opts
):
    plain, heads, maps = make(*opts), make(*ENABLED, *opts), make_maps()
    missing = heads.load_state_dict(plain.state_dict(), strict=False).missing_keys
    prefix = "" if opts else "pairs.a."
    assert missing == [
        f"{prefix}c2ssl_head.{n}" for n in ("counts", "logits.weight", "logits.bias")
    ]
    results = []
    for each in (plain, heads):
        torch.manual_seed(1)
        results.append(train_step(each, *pictures, maps))
    for name, loss in results[0].items():
        assert torch.equal(loss, results[1][name]), name


@pytest.mark.parametrize("opts", [(), STANDARD])
def test_nothing_runs_at_inference(make, make_proposals, make_maps, detect, opts):
    plain, heads, maps, proposals = (
        make(*opts),
        make(*ENABLED, *opts),
        make_maps(),
        make_proposals(20, 9),
    )
    heads.load_state_dict(plain.state_dict(), strict=False)
    calls = []
    for module in heads.modules():
        if isinstance(module, ContainmentHead):
            module.register_forward_hook(lambda *_: calls.append(1))
            module.logits.register_forward_hook(lambda *_: calls.append(1))
    for one, other in zip(
        detect(plain, proposals, maps), detect(heads, proposals, maps), strict=True
    ):
        assert len(one) and torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.pred_masks, other.pred_masks)
    assert calls == []


def test_the_branch_of_a_plain_head_goes_to_the_loops(make):
    plain, loops = make(*ENABLED, *STANDARD), make(*ENABLED)
    state = dict(plain.state_dict())
    loops.adopt_state(state, "")
    assert torch.equal(state["pairs.a.c2ssl_head.logits.weight"], plain.c2ssl_head.logits.weight)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODE", "all", r"MODE is one of \['both', 'container', 'content'\], got 'all'"),
        ("THRESHOLD", 45.0, r"THRESHOLD is a share in \(0, 1\], got 45.0"),
        ("GAMMA", -1.0, "GAMMA is 0 or more"),
        ("ALPHA", 1.5, r"ALPHA in \[0, 1\]"),
        ("CLASS_WEIGHTS", (1.0, 1.0), "CLASS_WEIGHTS has four weights or none"),
    ],
)
def test_mistakes_are_named(make, key, value, message):
    with pytest.raises(ValueError, match=message):
        make(*ENABLED, f"MODEL.C2SSL.{key}", value)


def test_masks_and_groups_must_be_there(make, make_config, shapes):
    with pytest.raises(ValueError, match=r"MODEL\.C2SSL\.MASKS needs masks: set MODEL\.MASK_ON"):
        make(*ENABLED, "MODEL.C2SSL.MASKS", True, "MODEL.MASK_ON", False)
    cfg = make_config(*ENABLED)
    cfg.DATASETS.CLASSES = NAMES
    with pytest.raises(ValueError, match=r"MODEL\.C2SSL\.ENABLED needs MODEL\.C2SSL\.GROUPS"):
        build_roi_heads(cfg, shapes)


@pytest.mark.parametrize(("classes", "groups"), [((), None), (NAMES, "auto")])
def test_without_groups_it_predicts_but_does_not_train(
    make_config, shapes, pictures, detect, train_step, classes, groups
):
    cfg = make_config(*ENABLED)
    cfg.DATASETS.CLASSES, cfg.MODEL.C2SSL.GROUPS = classes, groups
    heads = build_roi_heads(cfg, shapes)
    assert len(detect(heads, pictures[0])) == 2
    with pytest.raises(ValueError, match=r"trains nothing: DATASETS\.CLASSES is empty or MODEL"):
        train_step(heads, *pictures)
