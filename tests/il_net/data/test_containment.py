"""Containers and contents, counted in a data set."""

import logging
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from il_net.data.containment import count_inside, infer_groups

DATA = Path(__file__).parents[4] / "shared" / "data"
CLASSES = ["spot", "leaf", "pot", "bird"]
SPOT, LEAF, POT, BIRD = range(4)


def record(*objects: tuple[int, list[float]], crowd: tuple[int, ...] = ()) -> dict:
    """Objects as (class, corner and size); those at the positions ``crowd`` are crowds."""
    annotations = [
        {
            "bbox": box,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": kind,
            "iscrowd": int(i in crowd),
        }
        for i, (kind, box) in enumerate(objects)
    ]
    return {"annotations": annotations}


PLANT = record(
    (LEAF, [10, 10, 50, 50]),
    (SPOT, [20, 20, 10, 10]),
    (SPOT, [30, 30, 5, 5]),
    (BIRD, [80, 80, 9, 9]),
)


def test_counts_of_a_picture():
    half = record((LEAF, [0, 0, 50, 50]), (SPOT, [45, 0, 10, 10]), (SPOT, [41, 0, 10, 10]))
    inside, objects = count_inside([PLANT, half, {}, record()], 4)
    assert objects.tolist() == [4, 2, 0, 1]
    assert inside[LEAF, SPOT] == 3  # 9 of 10 pixels suffice, 5 do not
    assert inside.sum() == 3


def test_crowds_and_boxes_without_area_do_not_count():
    crowd = record((LEAF, [0, 0, 50, 50]), (SPOT, [5, 5, 9, 9]), crowd=(0,))
    empty = record((LEAF, [0, 0, 50, 50]), (SPOT, [5, 5, 0, 9]))
    inside, objects = count_inside([crowd, empty], 4)
    assert objects.tolist() == [2, 1, 0, 0] and not inside.any()


def test_a_leaf_contains_its_spots(caplog):
    with caplog.at_level(logging.INFO):
        groups = infer_groups([PLANT] * 3, CLASSES, 0.9)
    assert groups == [{"containers": ["leaf"], "contents": ["spot"]}]
    assert "leaf contains spot (100% of 6)" in caplog.text


def test_the_share_is_asked_for():
    lost = record((SPOT, [0, 0, 5, 5]), (LEAF, [50, 50, 5, 5]))  # 2 of 3 spots are inside
    assert infer_groups([PLANT, lost], CLASSES, 0.66)
    with pytest.raises(ValueError, match=r"at most 67% .*\(spot inside leaf\), and 90% are asked"):
        infer_groups([PLANT, lost], CLASSES, 0.9)


def test_the_outermost_is_the_container_and_equal_boxes_are_none():
    potted = record((POT, [0, 0, 90, 90]), (LEAF, [10, 10, 50, 50]), (SPOT, [20, 20, 10, 10]))
    groups = infer_groups([potted], CLASSES, 0.9)
    assert groups == [{"containers": ["pot"], "contents": ["spot", "leaf"]}]
    same = record((LEAF, [0, 0, 9, 9]), (BIRD, [0, 0, 9, 9]))
    with pytest.raises(ValueError, match="no class of"):
        infer_groups([same], CLASSES, 0.9)


def test_against_a_count_object_by_object():
    rng = np.random.default_rng(0)
    records = []
    for _ in range(20):
        sizes = rng.uniform(1, 60, (8, 2)).round(2)
        corners = rng.uniform(0, 60, (8, 2)).round(2)
        kinds = rng.integers(4, size=8).tolist()
        boxes = np.hstack([corners, sizes]).tolist()
        records.append(record(*zip(kinds, boxes, strict=True)))
    expected = np.zeros((4, 4), dtype=int)
    for each in records:
        own = each["annotations"]
        for inner in own:
            x, y, w, h = inner["bbox"]
            around = set()
            for outer in own:
                a, b, c, d = outer["bbox"]
                wide = max(0.0, min(x + w, a + c) - max(x, a))
                high = max(0.0, min(y + h, b + d) - max(y, b))
                if outer is not inner and wide * high >= 0.9 * w * h:
                    around.add(outer["category_id"])
            for kind in around:
                expected[kind, inner["category_id"]] += 1
    assert expected.sum() > 20
    assert (count_inside(records, 4)[0] == expected).all()


def test_coffee_leaves():
    folder = DATA / "coffee_leaf"
    if not folder.is_dir():
        pytest.skip("needs the public data set coffee_leaf in ../shared/data beside the repository")
    records = load_coco_json(
        str(folder / "annotations" / "instances_train.json"), str(folder / "images"), "coffee_c2ssl"
    )
    classes = ["leaf", "miner", "rust", "phoma", "cercospora"]
    groups = infer_groups(records, classes, 0.9)
    assert groups == [{"containers": ["leaf"], "contents": classes[1:]}]  # the set's README
