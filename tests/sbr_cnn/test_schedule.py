"""The schedule's values (methods 4.1) and its refusal of keys that do not fit together."""

import dataclasses

import pytest
from detectron2.config import get_cfg

from sbr_cnn import add_sbr_cnn_config
from sbr_cnn.schedule import Loop, LoopSchedule

NODE = "MODEL.ROI_LOOP_HEAD"


def schedule(order: str, test_loops: int = 0) -> LoopSchedule:
    return LoopSchedule(order, (0.5,) * len(order), (1.0,) * len(order), test_loops)


def test_defaults_are_the_thesis_three_increasing_loops():
    cfg = get_cfg()
    add_sbr_cnn_config(cfg)
    assert LoopSchedule.from_config(cfg).train == (
        Loop(number=1, pair="a", iou=0.5, loss_weight=1.0),
        Loop(number=2, pair="a", iou=0.6, loss_weight=0.75),
        Loop(number=3, pair="a", iou=0.7, loss_weight=0.5),
    )
    # Methods 4.1: stds (0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067).
    inverse = [[1 / w for w in weights] for weights in cfg.MODEL.ROI_LOOP_HEAD.BBOX_REG_WEIGHTS]
    assert inverse[0] == pytest.approx([0.1, 0.1, 0.2, 0.2])
    assert inverse[1] == pytest.approx([0.05, 0.05, 0.1, 0.1])
    assert inverse[2] == pytest.approx([0.033, 0.033, 0.067, 0.067], rel=1e-3)


def test_loops_follow_the_position_and_pairs_the_letters():
    made = LoopSchedule("aba", (0.7, 0.6, 0.5), (1.0, 0.75, 0.5))  # decreasing: Table 2.6 row 5
    assert [(loop.number, loop.pair, loop.iou, loop.loss_weight) for loop in made.train] == [
        (1, "a", 0.7, 1.0),
        (2, "b", 0.6, 0.75),
        (3, "a", 0.5, 0.5),
    ]
    assert made.pairs == ("a", "b")


@pytest.mark.parametrize(
    ("order", "pairs"), [("a", "a"), ("aaaaa", "a"), ("aabbb", "ab"), ("abc", "abc")]
)
def test_pairs(order, pairs):
    assert schedule(order).pairs == tuple(pairs)
    assert len(schedule(order).train) == len(order)


@pytest.mark.parametrize(
    ("order", "test_loops", "expected"),
    [
        ("aaa", 0, "aaa"),
        ("aab", 0, "aab"),
        ("aaa", 1, "a"),
        ("aab", 2, "aa"),
        ("aba", 2, "ab"),
        ("aaa", 5, "aaaaa"),
        ("aab", 5, "aabbb"),
        ("aba", 4, "abaa"),
        ("a", 3, "aaa"),
    ],
)
def test_order_at_inference(order, test_loops, expected):
    assert schedule(order, test_loops).test == expected


@pytest.mark.parametrize("order", ["", "b", "bb", "ac", "abd", "AA", "a a", "a1"])
def test_bad_order(order):
    with pytest.raises(ValueError, match=rf"{NODE}\.ORDER"):
        schedule(order)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=rf"{NODE}\.IOUS.*3 loops"):
        LoopSchedule("aaa", (0.5, 0.6), (1.0, 0.75, 0.5))
    with pytest.raises(ValueError, match=rf"{NODE}\.LOSS_WEIGHTS.*2 loops"):
        LoopSchedule("ab", (0.5, 0.6), (1.0, 0.75, 0.5))


@pytest.mark.parametrize("iou", [0.0, 1.0, -0.1, 50, float("nan")])
def test_iou_outside_the_unit_interval(iou):
    with pytest.raises(ValueError, match=rf"{NODE}\.IOUS"):
        LoopSchedule("aa", (0.5, iou), (1.0, 1.0))


def test_negative_test_loops():
    with pytest.raises(ValueError, match=rf"{NODE}\.TEST_LOOPS"):
        schedule("aaa", -1)


def test_schedule_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule("aa").order = "ab"
