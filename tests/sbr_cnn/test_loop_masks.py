"""The internal loop of the mask branch in training (methods 5.2 and 5.4)."""

import pytest
import torch
from torch.nn import functional as F

SIDE = 28


@pytest.fixture
def record(monkeypatch):
    """``record(heads)``: what runs in the mask heads and extractors, in order.

    Entries are (kind, letter, ...): ("pool", letter, features), ("iterate", letter, x, previous,
    output) and ("logits", letter, features, logits).
    """

    def start(heads) -> list[tuple]:
        calls: list[tuple] = []
        for letter, pair in heads.pairs.items():
            head = pair.mask_head
            iterate, logits = head.iterate, head.logits

            def spy_iterate(x, previous, letter=letter, iterate=iterate):
                out = iterate(x, previous)
                calls.append(("iterate", letter, x, previous, out))
                return out

            def spy_logits(features, letter=letter, logits=logits):
                out = logits(features)
                calls.append(("logits", letter, features, out))
                return out

            monkeypatch.setattr(head, "iterate", spy_iterate)
            monkeypatch.setattr(head, "logits", spy_logits)
            pair.mask_pooler.register_forward_hook(
                lambda _, __, out, letter=letter: calls.append(("pool", letter, out))
            )
        return calls

    return start


@pytest.mark.parametrize(
    ("order", "mask_loop", "iterations", "poolers"),
    [
        ("aaa", True, "a aa aaa", "aaa"),
        ("aab", True, "a aa aab", "aab"),
        ("aba", True, "a ab aba", "aba"),
        ("aab", False, "a a b", "aab"),
    ],
)
def test_loop_t_iterates_t_times(
    order,
    mask_loop,
    iterations,
    poolers,
    make_loops,
    make_proposals,
    make_targets,
    train_step,
    record,
):
    heads = make_loops(order, "MODEL.ROI_LOOP_HEAD.MASK_LOOP", mask_loop)
    calls = record(heads)
    train_step(heads, make_proposals(20, 20), make_targets(3, 2))
    for loop, letters in zip(order, iterations.split(), strict=True):
        kind, letter, pooled = calls.pop(0)
        assert (kind, letter) == ("pool", loop)
        previous = None
        for expected in letters:
            kind, letter, x, given, out = calls.pop(0)
            assert (kind, letter) == ("iterate", expected)
            assert x is pooled and given is previous  # the same RoI features, m passed on
            previous = out
        kind, letter, features, _ = calls.pop(0)
        assert (kind, letter) == ("logits", loop)  # only the last pass has logits
        assert features is previous
    assert not calls


def test_loss_is_taken_on_the_final_pass_of_the_positives(
    make_loops, make_proposals, make_targets, train_step, record, monkeypatch
):
    heads = make_loops("ab")
    calls, samples = record(heads), []
    label_and_sample = heads.label_and_sample
    monkeypatch.setattr(
        heads,
        "label_and_sample",
        lambda *args: samples.append(label_and_sample(*args)) or samples[-1],
    )
    targets = make_targets(3, 2)
    losses = train_step(heads, make_proposals(30, 30), targets)
    logits = [call[3] for call in calls if call[0] == "logits"]
    for loop, weight in ((1, 1.0), (2, 0.75)):  # make_loops' weights
        predicted, wanted = [], []
        rows = iter(logits[loop - 1])
        for image, target in zip(samples[2 * loop - 1], targets, strict=True):
            for i in range(len(image)):
                c = int(image.gt_classes[i])
                if c == 3:
                    continue
                predicted.append(next(rows)[c])
                masks = target.gt_masks[image.gt_index[i : i + 1]]
                box = image.proposal_boxes.tensor[i : i + 1]
                wanted.append(masks.crop_and_resize(box, SIDE)[0].float())
        assert next(rows, None) is None and len(predicted) >= 2
        expected = F.binary_cross_entropy_with_logits(torch.stack(predicted), torch.stack(wanted))
        torch.testing.assert_close(losses[f"loss_mask_loop{loop}"], expected * weight)
