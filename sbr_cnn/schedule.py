"""Which head pair, IoU threshold and loss weight each loop of a looped RoI head uses.

Thesis section 2.2 (R3-CNN) and Tables 2.6-2.14: one head ("aaa"), two with any alternation
("aab", "abab", ...), or one per loop ("abc", the HTC baseline).
"""

from dataclasses import dataclass
from string import ascii_lowercase

from detectron2.config import CfgNode


@dataclass(frozen=True)
class Loop:
    """One training loop.

    Attributes:
        number: 1 for the first loop (the thesis' t).
        pair: letter of the head pair.
        iou: a proposal is positive when its best IoU is at least this (u_t).
        loss_weight: factor of this loop's losses (alpha_t).
    """

    number: int
    pair: str
    iou: float
    loss_weight: float


@dataclass(frozen=True)
class LoopSchedule:
    """The loops of training and of inference.

    Attributes:
        order: one letter per training loop, the head pair used in it; the letters used are the
            first of the alphabet.
        ious: IoU threshold per training loop, rising or falling, each in (0, 1).
        loss_weights: loss weight per training loop.
        test_loops: loops at inference; 0 means as many as in training. Loops beyond the
            trained ones repeat the last head pair.

    Raises:
        ValueError: naming the key under ``MODEL.ROI_LOOP_HEAD`` that does not fit.
    """

    order: str
    ious: tuple[float, ...]
    loss_weights: tuple[float, ...]
    test_loops: int = 0

    def __post_init__(self) -> None:
        node = "MODEL.ROI_LOOP_HEAD"
        letters = sorted(set(self.order))
        if not letters or "".join(letters) != ascii_lowercase[: len(letters)]:
            raise ValueError(
                f"{node}.ORDER needs one letter per loop, the first letters of the alphabet "
                f"('aaa', 'aab', 'abc'), got {self.order!r}"
            )
        for key, values in (("IOUS", self.ious), ("LOSS_WEIGHTS", self.loss_weights)):
            if len(values) != len(self.order):
                raise ValueError(
                    f"{node}.{key} needs one value per loop: {node}.ORDER {self.order!r} has "
                    f"{len(self.order)} loops, {key} is {tuple(values)}"
                )
        if not all(0 < iou < 1 for iou in self.ious):
            raise ValueError(f"{node}.IOUS lie between 0 and 1, got {tuple(self.ious)}")
        if min(self.loss_weights) < 0:
            raise ValueError(f"{node}.LOSS_WEIGHTS are not negative, got {self.loss_weights}")
        if self.test_loops < 0:
            raise ValueError(f"{node}.TEST_LOOPS is 0 (as trained) or more, got {self.test_loops}")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "LoopSchedule":
        """Read ``cfg.MODEL.ROI_LOOP_HEAD``."""
        node = cfg.MODEL.ROI_LOOP_HEAD
        return cls(node.ORDER, tuple(node.IOUS), tuple(node.LOSS_WEIGHTS), node.TEST_LOOPS)

    @property
    def pairs(self) -> tuple[str, ...]:
        """The letters of the head pairs, without repeats."""
        return tuple(sorted(set(self.order)))

    @property
    def train(self) -> tuple[Loop, ...]:
        """The training loops in order."""
        rows = zip(self.order, self.ious, self.loss_weights, strict=True)
        return tuple(Loop(number, *row) for number, row in enumerate(rows, start=1))

    @property
    def test(self) -> str:
        """The head pair's letter of every loop at inference."""
        count = self.test_loops or len(self.order)
        return (self.order + self.order[-1] * count)[:count]
