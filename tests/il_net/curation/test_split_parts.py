"""Train and val parts: sizes as promised, whole groups, every class in proportion, repeatable."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from il_net.curation.split_parts import (
    count_objects,
    count_train,
    draw_train,
    drop_empty_images,
    group_images,
    objects_by_image,
    share_table,
    take_part,
)
from il_net.data.coco_file import read_coco
from il_net.data.sound_coco import read_sound_coco
from il_net.data.stratify import PossibleSums, order_by_hash

REPO = Path(__file__).parents[3]
DATA = REPO.parent / "shared" / "data"


def single(total: int) -> dict[int, list[int]]:
    """Every image a group of its own."""
    return {i: [i] for i in range(total)}


def make_coco(objects: dict[int, Counter], files: dict[int, str] | None = None) -> dict:
    """A COCO file with these objects in each image."""
    pairs = [(i, c) for i, own in objects.items() for c in own.elements()]
    return {
        "images": [
            {"id": i, "file_name": (files or {}).get(i, f"{i}.jpg"), "width": 64, "height": 48}
            for i in objects
        ],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": [1, 2, 3, 4], "iscrowd": 0}
            for k, (i, c) in enumerate(pairs, start=1)
        ],
        "categories": [{"id": c, "name": f"class {c}"} for c in range(8)],
    }


def make_objects(rng: random.Random, total: int) -> dict[int, Counter]:
    """Class k in every image with probability 0.5 ** k, then 1 to 40 objects, few rather."""
    return {
        i: Counter(
            {c: min(40, 1 + int(rng.expovariate(0.3))) for c in range(8) if rng.random() < 0.5**c}
        )
        for i in range(total)
    }


# --- sizes ---


@pytest.mark.parametrize("fraction", ["0.8", "0.29", "0.7", "0.57", "0.001", "0.999", "1e-2"])
def test_floor_of_the_decimal_as_written(fraction):
    for total in range(1, 1001):
        assert count_train(float(fraction), total) == int(Decimal(fraction) * total)


def test_asnd():
    assert count_train(0.8, 3999) == 3199  # facts 2.1
    assert len(draw_train(single(3999), 0.8, 1)) == 3199


@pytest.mark.parametrize("fraction", [0.8, 0.29])
def test_parts_have_the_promised_sizes(fraction):
    for total in (*range(1, 150), *range(150, 1001, 17)):
        count = int(Decimal(str(fraction)) * total)
        if count == 0:
            with pytest.raises(ValueError, match=r"--fraction .* 0 would be in train"):
                draw_train(single(total), fraction, 1)
            continue
        train = draw_train(single(total), fraction, total)
        assert len(train) == count
        assert train < set(range(total))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 80.0, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="--fraction must be above 0 and below 1"):
        count_train(fraction, 10)


def test_one_group_cannot_be_split():
    with pytest.raises(ValueError, match="of 3 images in 1 groups"):
        draw_train({0: [0, 1, 2]}, 0.8, 1)
    # Two can, however unequal: no part may be empty.
    assert draw_train({0: list(range(98)), 98: [98, 99]}, 0.5, 1) == {98, 99}


# --- sums of group sizes ---


def reachable_sums(sizes: list[int]) -> set[int]:
    return {sum(some) for r in range(len(sizes) + 1) for some in combinations(sizes, r)}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_possible_sums(sizes):
    sums = PossibleSums(sizes)
    for start in range(len(sizes) + 1):
        expected = reachable_sums(sizes[start:])
        found = {s for s in range(-3, sum(sizes) + 4) if sums.can_make(start, s)}
        assert found == expected


@st.composite
def grouped(draw) -> dict[int, list[int]]:
    sizes = draw(st.lists(st.integers(1, 12), min_size=2, max_size=10))
    ids = iter(range(sum(sizes)))
    members = [[next(ids) for _ in range(size)] for size in sizes]
    return {own[0]: own for own in members}


@given(grouped(), st.sampled_from([0.2, 0.5, 0.8]), st.integers(0, 9), st.booleans())
@settings(max_examples=300, deadline=None)
def test_whole_groups_come_as_near_as_they_can(groups, fraction, seed, stratified):
    total = sum(map(len, groups.values()))
    count = int(Decimal(str(fraction)) * total)
    if count == 0:
        return
    objects = {i: Counter({i % 3: 1 + i % 5}) for i in range(total)} if stratified else None
    train = draw_train(groups, fraction, seed, objects)
    for ids in groups.values():
        assert train.issuperset(ids) or train.isdisjoint(ids)
    proper = reachable_sums([len(ids) for ids in groups.values()]) - {0, total}
    assert abs(len(train) - count) == min(abs(s - count) for s in proper)


# --- chance and repeatability ---


def test_every_image_has_the_same_chance():
    drawn = Counter(i for seed in range(1000) for i in draw_train(single(50), 0.2, seed))
    # Binomial: mean 200, standard deviation sqrt(1000 * 0.2 * 0.8) = 12.6.
    assert all(abs(drawn[i] - 200) < 4.5 * 12.6 for i in range(50))


def test_seeds_draw_differently_stratified_or_not():
    objects = make_objects(random.Random(3), 100)
    for own in (None, objects):
        draws = {frozenset(draw_train(single(100), 0.8, seed, own)) for seed in range(6)}
        assert len(draws) == 6


SCRIPT = """
import json, sys
from il_net.data.sound_coco import read_sound_coco
from il_net.curation.split_parts import *
data = read_sound_coco(sys.argv[1])
groups = group_images(data["images"], pattern="[a-z]+")
print(json.dumps([sorted(draw_train(g, 0.7, 5, o)) for o in (None, objects_by_image(data))
                  for g in (groups, group_images(data["images"]))]))
"""


def test_same_parts_in_any_process_and_for_any_order_of_the_file(tmp_path):
    rng = random.Random(1)
    objects = make_objects(rng, 300)
    data = make_coco(objects, {i: f"{'abcdefghij'[i % 10] * (1 + i % 7)}{i}.jpg" for i in objects})
    found = []
    for hash_seed in ("0", "4242"):
        for records in ("images", "annotations", "categories"):
            rng.shuffle(data[records])
        (tmp_path / "all.json").write_text(json.dumps(data))
        out = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "all.json")],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPO)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        found.append(json.loads(out))
    assert found[0] == found[1]
    assert all(len(train) == 210 for train in found[0][1::2])
    assert len({str(train) for train in found[0]}) == 4


# --- stratification ---


def errors(groups: dict, train: set, share: float, objects: dict[int, Counter]) -> dict:
    """For every class: objects that train has too many or too few, over the most in one group."""
    amounts = [sum((objects[i] for i in ids), Counter()) for ids in groups.values()]
    total = sum(amounts, Counter())
    most = {c: max(own[c] for own in amounts) for c in total}
    found = sum((objects[i] for i in train), Counter())
    return {c: abs(found[c] - share * total[c]) / most[c] for c in total}


@pytest.mark.parametrize("group_sizes", [(1,), (1, 1, 1, 2, 3, 5)])
def test_classes_are_off_by_less_than_two_groups(group_sizes):
    rng = random.Random(0)
    plain = []
    for seed in range(30):
        total = rng.randrange(100, 500)
        objects = make_objects(rng, total)
        groups, first = {}, 0
        while first < total:
            ids = range(first, min(total, first + rng.choice(group_sizes)))
            groups[first], first = list(ids), ids.stop
        fraction = rng.choice([0.5, 0.7, 0.8, 0.9])
        train = draw_train(groups, fraction, seed, objects)
        assert len(train) == count_train(fraction, total)
        # Of few groups every class gets one, whatever its share.
        off = errors(groups, train, len(train) / total, objects)
        assert max(off.values()) < 2, (seed, off)
        train = draw_train(groups, fraction, seed)
        plain.append(max(errors(groups, train, len(train) / total, objects).values()))
    assert max(plain) > 2  # the bound says something


@pytest.mark.parametrize("name", ["coffee_leaf", "bccd"])
def test_classes_of_real_data(name):
    json_file = DATA / name / "annotations" / "instances_train.json"
    if not json_file.is_file():
        pytest.skip(f"needs the public data set {name} in ../shared/data beside the repository")
    data = read_coco(json_file)
    objects, groups = objects_by_image(data), group_images(data["images"])
    plain = []
    for seed in range(10):
        train = draw_train(groups, 0.8, seed, objects)
        assert max(errors(groups, train, len(train) / len(objects), objects).values()) < 2
        train = draw_train(groups, 0.8, seed)
        plain.append(max(errors(groups, train, len(train) / len(objects), objects).values()))
    assert max(plain) > 2


def test_a_class_of_three_images_is_on_both_sides():
    for seed in range(10):
        objects = {i: Counter({0: 5}) for i in range(100)}
        objects |= {i: Counter({0: 5, 1: 2}) for i in (10, 50, 90)}
        train = draw_train(single(100), 0.8, seed, objects)
        assert len(train & {10, 50, 90}) == 2
        assert len(train) == 80


def test_a_hundred_thousand_annotations():
    rng = random.Random(0)
    objects = {i: Counter(rng.choices(range(8), k=4)) for i in range(25_000)}
    data = make_coco(objects, {i: f"{i // 3}_{i}.jpg" for i in objects})
    start = time.process_time()
    groups = group_images(data["images"], pattern=r"^(\d+)_")
    train = draw_train(groups, 0.8, 1, objects_by_image(data))
    part = take_part(data, train, {})
    assert time.process_time() - start < 20
    # 8333 groups of three and one of one.
    assert len(part["images"]) == len(train) == 20_000 - 20_000 % 3 + 1


# --- groups ---


def make_images(**columns: list) -> list[dict]:
    names = ["p1/a_0.jpg", "p1/b_1.jpg", "p2/a_2.jpg", "p10/c_3.jpg"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    for column, values in columns.items():
        for image, value in zip(images, values, strict=True):
            image[column] = value
    return images


def test_groups_by_file_name_and_column():
    images = make_images(plant=["x", 7, "x", 7])
    assert group_images(images) == {0: [0], 1: [1], 2: [2], 3: [3]}
    assert group_images(images, "plant") == {0: [0, 2], 1: [1, 3]}
    assert group_images(images, pattern=r"/([a-z])_") == {0: [0, 2], 1: [1], 3: [3]}


def test_group_of_the_whole_match_or_the_first_capture_group():
    images = make_images()
    assert group_images(images, pattern=r"p\d+") == {0: [0, 1], 2: [2], 3: [3]}
    assert group_images(images, pattern=r"(p\d)\d*/(.)") == {0: [0, 1, 3], 2: [2]}


def test_one_file_under_two_ids_stays_together():
    names = ["a.jpg", "b.jpg", "./a.jpg", "d/a.jpg", "d\\a.jpg", "d/e/../a.jpg"]
    images = [{"id": 10 - i, "file_name": name} for i, name in enumerate(names)]
    groups = group_images(images)
    assert groups == {8: [8, 10], 9: [9], 5: [5, 6, 7]}
    for seed in range(20):
        train = draw_train(groups, 0.5, seed)
        assert len(train) == 3
        assert len(train & {8, 10}) in (0, 2)
        assert len(train & {5, 6, 7}) in (0, 3)
    for number, image in enumerate(images):
        image["plant"] = number
    with pytest.raises(ValueError, match=r"image 8 \(\./a\.jpg\): the file .* group 0 and .* 2"):
        group_images(images, "plant")


@pytest.mark.parametrize("value", [None, "", 1.5, ["x"]])
def test_an_image_without_a_column(value):
    images = make_images(plant=["x", "y", value, "x"])
    with pytest.raises(ValueError, match=r"--group-by plant: .* in image 2 \(p2/a_2\.jpg\)"):
        group_images(images, "plant")
    del images[2]["plant"]
    with pytest.raises(ValueError, match=r"is None in image 2 \(p2/a_2\.jpg\)"):
        group_images(images, "plant")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("^p[12]/", r"finds nothing in image 3 \(p10/c_3\.jpg\)"),
        ("(a)|b|c", r"finds nothing in image 1 \(p1/b_1\.jpg\)"),  # the group took no part
        ("(x*)", r"finds nothing in image 0 \(p1/a_0\.jpg\)"),
        ("(p", "not a regular expression"),
    ],
)
def test_an_image_that_does_not_match(pattern, message):
    with pytest.raises(ValueError, match=message) as e:
        group_images(make_images(), pattern=pattern)
    assert e.match("--group-regex")


# --- files ---


def test_parts_are_disjoint_complete_and_untouched():
    objects = make_objects(random.Random(2), 90)
    data = {"licenses": [{"id": 1}], "info": {"year": 2022}, **make_coco(objects), "extra": 5}
    before = json.dumps(data)
    train = draw_train(group_images(data["images"]), 0.8, 1, objects_by_image(data))
    parts = [take_part(data, ids, {"seed": 1}) for ids in (train, set(objects) - train)]
    assert json.dumps(data) == before
    for part in parts:
        assert part["categories"] == data["categories"]
        assert (part["licenses"], part["extra"]) == ([{"id": 1}], 5)
        assert part["info"] == {"year": 2022, "split": {"seed": 1}}
        assert {a["image_id"] for a in part["annotations"]} <= {i["id"] for i in part["images"]}
    for records in ("images", "annotations"):
        ids = [[r["id"] for r in part[records]] for part in parts]
        assert all(own == sorted(own) for own in ids)  # the order of the file
        assert not set(ids[0]) & set(ids[1])
        together = sorted((r for part in parts for r in part[records]), key=lambda r: r["id"])
        assert together == data[records]
    # Label Studio's info is an object, but nothing says that it must be.
    assert take_part({**data, "info": None}, train, {"seed": 1})["info"] == {"split": {"seed": 1}}


def test_objects_and_empty_images():
    data = make_coco({0: Counter({1: 2}), 1: Counter(), 2: Counter({1: 1, 3: 1})})
    data["annotations"][3]["iscrowd"] = 1
    assert count_objects(data["annotations"]) == {1: 3}
    assert objects_by_image(data) == {0: {1: 2}, 1: {}, 2: {1: 1}}
    assert [i["id"] for i in drop_empty_images(data)["images"]] == [0, 2]
    data["annotations"][2]["iscrowd"] = 1  # an image with a crowd is not empty
    assert [i["id"] for i in drop_empty_images(data)["images"]] == [0, 2]


def test_share_table():
    parts = {
        "train": [Counter({1: 5}), Counter({1: 1, 3: 1}), Counter()],
        "val": [Counter({1: 2})],
    }
    lines = share_table({1: "leaf", 3: "rust", 7: "unseen"}, parts).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["class", "train", "share", "images", "val", "share", "images"],
        ["leaf", "6", "75.0", "%", "2", "2", "25.0", "%", "1"],
        ["rust", "1", "100.0", "%", "1", "0", "0.0", "%", "0"],
        ["unseen", "0", "-", "0", "0", "-", "0"],
        ["all", "7", "77.8", "%", "3", "2", "22.2", "%", "1"],
    ]
    assert lines[5:] == ["no object in train: unseen", "no object in val: rust, unseen"]
    assert len({len(line) for line in lines[:5]}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "no images; .*annotations of an image that is not in the file"),
        ({"annotations": [{"id": 1, "image_id": 9, "category_id": 1}]}, "an image that is not in"),
        ({"annotations": [{"id": 1, "image_id": 0, "category_id": 9}]}, "unknown category ids: 9"),
        ({"annotations": [{"id": 1, "category_id": 1}]}, r"annotations\[0\]"),
        ({"images": [{"id": 0, "width": 4, "height": 4}]}, r"images\[0\]"),
        ({"categories": {}}, "a list 'categories'"),
    ],
)
def test_unsound_files(tmp_path, change, message):
    path = tmp_path / "all.json"
    path.write_text(json.dumps({**make_coco({0: Counter({1: 1})}), **change}))
    with pytest.raises(ValueError, match=rf"all\.json: .*{message}"):
        read_sound_coco(str(path))


def test_images_used_twice_are_refused(tmp_path):
    data = make_coco({0: Counter({1: 1})})
    data["images"] *= 2
    (tmp_path / "all.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="image ids used twice: 0"):
        read_sound_coco(str(tmp_path / "all.json"))


def test_order_depends_on_salt_and_id_alone():
    ids = list(range(40))
    assert order_by_hash(ids[::-1], "1") == order_by_hash(ids, "1") != order_by_hash(ids, "2")
    assert [i for i in order_by_hash(ids, "1") if i < 20] == order_by_hash(ids[:20], "1")
