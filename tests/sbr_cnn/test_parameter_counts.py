"""Trainable parameters of the configurations equal the thesis' (methods 11), K = 80.

The models are built on the meta device: counting needs shapes, not values.
"""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from il_net.config import load_config
from sbr_cnn import add_sbr_cnn_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "sbr_cnn"
# Affine parameters of the BatchNorms in res3 to res5, trained by the thesis (methods 1.1).
AFFINE = 50_176

GROIE_V1 = 1_896_961
GROIE_V2 = 9_634_688
FASTER, MASK, NAIVE, DEEPER = 41_527_712, 44_170_992, 43_912_884, 60_604_761


def count(file: str, *opts: str) -> int:
    cfg = load_config(
        str(CONFIGS / file),
        ["MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.DEVICE", "meta", *opts],
        add_sbr_cnn_config,
    )
    with torch.device("meta"):
        model = build_model(cfg)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("file", "opts", "expected"),
    [
        ("faster_rcnn_r50_fpn_1x.yaml", (), FASTER),
        ("mask_rcnn_r50_fpn_1x.yaml", (), MASK),
        ("mask_rcnn_groie_v1_r50_fpn_1x.yaml", (), 47_964_914),
        ("mask_rcnn_groie_v1_r50_fpn_1x.yaml", ("MODEL.MASK_ON", "False"), 43_424_673),
        ("faster_rcnn_groie_r50_fpn_1x.yaml", (), 51_162_400),
        ("r3_cnn_r50_fpn_1x.yaml", (), NAIVE),
        ("r3_cnn_r50_fpn_1x.yaml", ("MODEL.ROI_LOOP_HEAD.ORDER", "aab"), DEEPER),
        # Only the number of pairs counts, not how they alternate (methods 6).
        ("r3_cnn_r50_fpn_1x.yaml", ("MODEL.ROI_LOOP_HEAD.ORDER", "aba"), DEEPER),
        ("r3_cnn_groie_r50_fpn_1x.yaml", (), NAIVE + 2 * GROIE_V2),
        # An extractor of its own for either branch of either pair (methods 2.5).
        (
            "r3_cnn_groie_r50_fpn_1x.yaml",
            ("MODEL.ROI_LOOP_HEAD.ORDER", "aab"),
            DEEPER + 4 * GROIE_V2,
        ),
    ],
)
def test_counts_equal_the_thesis(file, opts, expected):
    assert count(file, "MODEL.RESNETS.NORM", "FrozenStatsBN", *opts) == expected
    assert count(file, "MODEL.RESNETS.NORM", "FrozenBN", *opts) == expected - AFFINE


def test_the_table_adds_up():
    """The constants above, by methods 1.4, 2.3 and 11: a typing error would show here."""
    assert FASTER + GROIE_V1 == 43_424_673
    assert FASTER + GROIE_V2 == 51_162_400
    assert MASK + 2 * GROIE_V1 == 47_964_914
    assert NAIVE == MASK - 323_900 + 65_792  # agnostic boxes, C1
    # A pair more: agnostic FC head, mask head with C1.
    assert DEEPER == NAIVE + 13_982_805 + 2_643_280 + 65_792
    # Weight and bias of every BatchNorm: per stage the blocks' two narrow and one wide norm
    # and the shortcut's.
    stages = ((4, 128, 512), (6, 256, 1024), (3, 512, 2048))
    assert 2 * sum(n * (2 * mid + out) + out for n, mid, out in stages) == AFFINE


def test_frozen_batchnorm_is_the_default():
    assert count("mask_rcnn_r50_fpn_1x.yaml") == MASK - AFFINE  # design 5
