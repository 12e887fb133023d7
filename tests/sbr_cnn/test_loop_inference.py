"""Inference of the looped heads (methods 4.4 and 5.3).

The predictors get zero weights, so that their biases are the logits and deltas of every box.
"""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances

SIZE = (96, 128)  # of the pictures that conftest.py makes


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x) for x in logits]
    return [p / sum(powers) for p in powers]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def make_constant(make_loops):
    """``make_constant("ab", {"a": {"logits": ..., "deltas": ..., "mask": ...}, ...}, ...)``."""

    def make(order: str, outputs: dict[str, dict[str, list[float]]], *opts):
        heads = make_loops(order, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *opts)
        for letter, pair in heads.pairs.items():
            given = outputs.get(letter, {})
            predictor = pair.box_predictor
            layers = {"logits": predictor.cls_score, "deltas": predictor.bbox_pred}
            if heads.mask_on:
                layers["mask"] = pair.mask_head.predictor
            for name, layer in layers.items():
                torch.nn.init.zeros_(layer.weight)
                with torch.no_grad():
                    layer.bias.copy_(torch.tensor(given.get(name, [0.0] * len(layer.bias))))
        return heads

    return make


def one_proposal(*box: float) -> list[Instances]:
    return [Instances(SIZE, proposal_boxes=Boxes(torch.tensor([box])))]


def test_logits_are_averaged_before_the_softmax(make_constant, detect):
    """a: (2, 6), b: (2, -4). The mean logits (2, 1) favour class 0, the mean probabilities class 1:
    (.02 + .86) / 2 against (.98 + .002) / 2."""
    a, b = [2.0, 6.0, -9.0, 0.0], [2.0, -4.0, -9.0, 0.0]
    mean_of_softmax = [(p + q) / 2 for p, q in zip(softmax(a), softmax(b), strict=True)]
    assert mean_of_softmax[1] > mean_of_softmax[0]
    heads = make_constant("ab", {"a": {"logits": a}, "b": {"logits": b}}, "MODEL.MASK_ON", False)
    (found,) = detect(heads, one_proposal(20, 20, 60, 60))
    expected = softmax([2.0, 1.0, -9.0, 0.0])[:3]
    assert found.pred_classes[0] == 0
    by_class = dict(zip(found.pred_classes.tolist(), found.scores.tolist(), strict=True))
    assert [by_class[c] for c in range(3)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("order", "test_loops", "shares"),
    [
        ("aab", 0, (2 / 3, 1 / 3)),
        ("aab", 2, (1.0, 0.0)),
        ("aab", 4, (2 / 4, 2 / 4)),  # aabb
        ("aba", 5, (4 / 5, 1 / 5)),  # abaaa
    ],
)
def test_every_test_loop_counts_once_in_the_mean(
    order, test_loops, shares, make_constant, detect
):
    heads = make_constant(
        order,
        {"a": {"logits": [1.0, 0.0, 0.0, 0.0]}, "b": {"logits": [0.0, 4.0, 0.0, 0.0]}},
        *("MODEL.MASK_ON", False, "MODEL.ROI_LOOP_HEAD.TEST_LOOPS", test_loops),
    )
    (found,) = detect(heads, one_proposal(20, 20, 60, 60))
    by_class = dict(zip(found.pred_classes.tolist(), found.scores.tolist(), strict=True))
    expected = softmax([shares[0] * 1.0, shares[1] * 4.0, 0.0, 0.0])
    assert [by_class[c] for c in range(3)] == pytest.approx(expected[:3], rel=1e-5)


# A delta dx = 1 moves a box by width / 10 in head a and by width / 20 in head b: a box of
# 20 pixels by 2 and by 1.
@pytest.mark.parametrize(
    ("order", "test_loops", "moved"),
    [
        ("a", 0, 2),
        ("aaa", 0, 6),
        ("ab", 0, 3),
        ("aba", 0, 5),  # the coder of the head that ran last, not of the last head
        ("aba", 1, 2),
        ("aba", 2, 3),
        ("aba", 5, 9),  # a b a a a
        ("aab", 5, 7),  # a a b b b
        ("abc", 0, 2 + 1 + 20 / 30.3),
    ],
)
def test_boxes_are_the_last_loops_decoded_by_its_own_head(
    order, test_loops, moved, make_constant, detect
):
    step = {"deltas": [1.0, 0.0, 0.0, 0.0]}
    heads = make_constant(
        order,
        {"a": step, "b": step, "c": step},
        *("MODEL.MASK_ON", False, "MODEL.ROI_LOOP_HEAD.TEST_LOOPS", test_loops),
    )
    (found,) = detect(heads, one_proposal(20, 30, 40, 60))
    expected = torch.tensor([20.0 + moved, 30.0, 40.0 + moved, 60.0])
    assert len(found) == 3  # one agnostic box for all classes
    torch.testing.assert_close(found.pred_boxes.tensor, expected.expand(3, 4), rtol=0, atol=1e-3)


def test_refined_boxes_are_clipped_between_loops(make_constant, detect):
    """Twice half a width to the right from 20 pixels before the edge. Clipped in between, the
    box has lost half its width by the second loop: [118, 128] moves by 5 to [123, 133]."""
    heads = make_constant("aa", {"a": {"deltas": [5.0, 0.0, 0.0, 0.0]}}, "MODEL.MASK_ON", False)
    (found,) = detect(heads, one_proposal(108, 30, 128, 60))
    expected = torch.tensor([123.0, 30.0, 128.0, 60.0])
    torch.testing.assert_close(found.pred_boxes.tensor[0], expected, rtol=0, atol=1e-3)


def test_boxes_that_leave_the_picture_stay_in_line(make_constant, detect):
    """A box without area is kept between loops: the logits of its neighbours stay theirs."""
    heads = make_constant(
        "aaa",
        {"a": {"deltas": [10.0, 0.0, 0.0, 0.0], "logits": [1.0, 0.0, 0.0, 0.0]}},
        *("MODEL.MASK_ON", False),
    )
    boxes = Boxes(torch.tensor([[100.0, 10.0, 128.0, 40.0], [10.0, 50.0, 20.0, 60.0]]))
    sizes = []
    heads.pairs["a"].box_predictor.register_forward_hook(
        lambda _, __, out: sizes.append(len(out[0]))
    )
    (found,) = detect(heads, [Instances(SIZE, proposal_boxes=boxes)])
    assert sizes == [2, 2, 2]
    assert found.scores[0].item() == pytest.approx(softmax([1.0, 0.0, 0.0, 0.0])[0])
    assert [40.0, 50.0, 50.0, 60.0] in found.pred_boxes.tensor.round().tolist()


@pytest.mark.parametrize(
    ("order", "test_loops", "expected"),
    [
        ("ab", 0, (sigmoid(3) + sigmoid(-1)) / 2),
        ("ab", 1, sigmoid(3)),
        ("ab", 4, (sigmoid(3) + 3 * sigmoid(-1)) / 4),
    ],
)
def test_mask_probabilities_are_averaged(order, test_loops, expected, make_constant, detect):
    """Class 1 is detected; its channel says 3 in head a and -1 in head b."""
    heads = make_constant(
        order,
        {
            "a": {"logits": [0.0, 9.0, 0.0, 0.0], "mask": [-5.0, 3.0, 7.0]},
            "b": {"logits": [0.0, 9.0, 0.0, 0.0], "mask": [5.0, -1.0, -7.0]},
        },
        *("MODEL.ROI_LOOP_HEAD.TEST_LOOPS", test_loops, "TEST.DETECTIONS_PER_IMAGE", 1),
    )
    (found,) = detect(heads, one_proposal(20, 20, 60, 60))
    assert found.pred_classes.tolist() == [1]
    assert found.pred_masks.shape == (1, 1, 28, 28)
    torch.testing.assert_close(found.pred_masks, torch.full((1, 1, 28, 28), expected))


@pytest.mark.parametrize("mask_loop", [True, False])
def test_mask_iterations_chain_over_the_test_loops(
    mask_loop, make_loops, detect, make_proposals, monkeypatch, randomize
):
    """Also where training ran a single iteration; RoI features come from the last head's
    extractor, once, for the final boxes."""
    heads = make_loops(
        *("aab", "MODEL.ROI_LOOP_HEAD.MASK_LOOP", mask_loop),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5),
    )
    calls, pooled = [], []
    for letter, pair in heads.pairs.items():
        randomize(pair.mask_head)
        original = pair.mask_head.iterate

        def spy(x, previous, letter=letter, original=original):
            out = original(x, previous)
            calls.append((letter, x, previous, out))
            return out

        monkeypatch.setattr(pair.mask_head, "iterate", spy)
        pair.mask_pooler.register_forward_hook(
            lambda _, args, out, letter=letter: pooled.append((letter, args[1], out))
        )
    found = detect(heads, make_proposals(8, 8))
    assert [letter for letter, *_ in calls] == ["a", "a", "b"]
    ((letter, boxes, features),) = pooled
    assert letter == "b"
    for image, given in zip(found, boxes, strict=True):
        assert torch.equal(given.tensor, image.pred_boxes.tensor)
    previous = None
    for _, x, given, out in calls:
        assert x is features and given is previous
        previous = out
    # What the detections carry is the mean over the chain, of each detection's class.
    classes = torch.cat([image.pred_classes for image in found])
    probabilities = torch.stack(
        [heads.pairs[letter].mask_head.logits(out).sigmoid() for letter, _, _, out in calls]
    ).mean(dim=0)
    expected = torch.stack([mask[c] for mask, c in zip(probabilities, classes, strict=True)])
    masks = torch.cat([image.pred_masks for image in found])[:, 0]
    torch.testing.assert_close(masks, expected)
    assert not torch.allclose(masks[:5], masks[5:])


def test_masks_of_given_boxes(make_loops, make_maps, detect, make_proposals):
    """``forward_with_given_boxes`` gives the masks that detection gave."""
    heads = make_loops("aab", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    maps = make_maps()
    found = detect(heads, make_proposals(5, 3), maps)
    assert sum(map(len, found))
    given = [
        Instances(SIZE, pred_boxes=image.pred_boxes, pred_classes=image.pred_classes)
        for image in found
    ]
    with torch.no_grad():
        again = heads.forward_with_given_boxes(maps, given)
    for image, expected in zip(again, found, strict=True):
        torch.testing.assert_close(image.pred_masks, expected.pred_masks)


EXTRACTORS = ["single", "random", "groie"]


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("counts", [(0, 5), (0, 0)])
def test_pictures_without_proposals(counts, extractor, make_loops, detect, make_proposals):
    heads = make_loops(
        "aab",
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
        *("MODEL.ROI_BOX_HEAD.EXTRACTOR", extractor),
        *("MODEL.ROI_MASK_HEAD.EXTRACTOR", extractor),
    )
    found = detect(heads, make_proposals(*counts))
    for image, count in zip(found, counts, strict=True):
        assert bool(len(image)) is bool(count)
        assert image.pred_masks.shape == (len(image), 1, 28, 28)


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_no_detections(extractor, make_loops, detect, make_proposals):
    """Proposals, but none of them scores high enough."""
    heads = make_loops(
        "aaa",
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0),
        *("MODEL.ROI_MASK_HEAD.EXTRACTOR", extractor),
    )
    for image in detect(heads, make_proposals(5, 5)):
        assert len(image) == 0
        assert image.pred_masks.shape == (0, 1, 28, 28)
