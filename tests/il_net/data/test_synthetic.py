"""The synthetic leaves: same bytes for the same request, valid COCO, spots inside and outside."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from il_net.data import synthetic
from il_net.data.synthetic import SyntheticDataset, generate, main

REPOSITORY = Path(__file__).resolve().parents[3]
SIZE = (128, 160)  # not square: swapped height and width must show
LEAF = 1


def read_tree(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("[!.]*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def read_json(made: SyntheticDataset) -> dict:
    return json.loads(made.json.read_text())


def rasterise(annotation: dict, size: tuple[int, int], zoom: int = 8) -> np.ndarray:
    """Mask (H*zoom, W*zoom) by Pillow, which shares no code with pycocotools. Pillow's pixel k
    spans k - 0.5 to k + 0.5, so half a fine pixel comes off."""
    picture = Image.new("1", (size[1] * zoom, size[0] * zoom))
    for polygon in annotation["segmentation"]:
        points = np.array(polygon).reshape(-1, 2) * zoom - 0.5
        ImageDraw.Draw(picture).polygon([tuple(point) for point in points], fill=1)
    return np.array(picture)


@pytest.fixture(scope="module")
def forty(tmp_path_factory) -> tuple[SyntheticDataset, dict]:
    made = generate(tmp_path_factory.mktemp("forty"), num_images=40, image_size=SIZE, seed=3)
    return made, read_json(made)


@pytest.fixture(scope="module")
def masks(forty) -> dict[int, list[tuple[int, np.ndarray]]]:
    """Image id to (category, mask (H, W)) pairs, decoded by pycocotools."""
    coco = COCO(str(forty[0].json))
    return {
        image: [
            (a["category_id"], coco.annToMask(a).astype(bool))
            for a in coco.loadAnns(coco.getAnnIds(image))
        ]
        for image in coco.getImgIds()
    }


def test_same_bytes_in_two_folders_and_another_process(tmp_path):
    generate(tmp_path / "a", num_images=3, image_size=SIZE, seed=5)
    np.random.seed(1)  # the global generator must not matter
    generate(tmp_path / "b", num_images=3, image_size=SIZE, seed=5)
    code = (
        "import sys; from il_net.data.synthetic import generate;"
        f"generate(sys.argv[1], num_images=3, image_size={SIZE}, seed=5)"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", code, str(tmp_path / f"hash{hash_seed}")]
        subprocess.run(command, check=True, env=environment)
    trees = [read_tree(tmp_path / name) for name in ("a", "b", "hash1", "hash2")]
    assert len(trees[0]) == 4
    assert trees[0] == trees[1] == trees[2] == trees[3]


def test_first_pictures_do_not_depend_on_how_many_there_are(tmp_path):
    few = generate(tmp_path / "few", num_images=2, image_size=SIZE, seed=5)
    many = generate(tmp_path / "many", num_images=4, image_size=SIZE, seed=5)
    for name in ("000000.jpg", "000001.jpg"):
        assert (few.images / name).read_bytes() == (many.images / name).read_bytes()
    a, b = read_json(few), read_json(many)
    assert a["images"] == b["images"][:2]
    assert a["annotations"] == [x for x in b["annotations"] if x["image_id"] <= 2]


def test_pictures_differ_by_index_seed_and_name(tmp_path):
    made = [
        generate(tmp_path / "0", num_images=2, image_size=SIZE, seed=0),
        generate(tmp_path / "1", num_images=2, image_size=SIZE, seed=1),
        generate(tmp_path / "0", num_images=2, image_size=SIZE, seed=0, name="val"),
    ]
    contents = [path.read_bytes() for one in made for path in one.images.glob("*.jpg")]
    assert len(set(contents)) == len(contents) == 6


def stamp(made: SyntheticDataset) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in [made.json, *made.images.iterdir()]}


def age(made: SyntheticDataset) -> dict[str, int]:
    """Give every file an old time, so that a rewrite shows however coarse the clock is."""
    for path in [made.json, *made.images.iterdir()]:
        os.utime(path, ns=(10**18, 10**18))
    return stamp(made)


def test_a_complete_request_is_not_drawn_again(tmp_path):
    made = generate(tmp_path, num_images=3, image_size=SIZE, seed=0)
    before = age(made)
    assert generate(tmp_path, num_images=3, image_size=SIZE, seed=0) == made
    assert stamp(made) == before


@pytest.mark.parametrize(
    "change",
    [{"num_images": 2}, {"image_size": (160, 128)}, {"seed": 1}],
    ids=["fewer", "size", "seed"],
)
def test_another_request_replaces_the_old_one(tmp_path, change):
    first = {"num_images": 3, "image_size": SIZE, "seed": 0}
    generate(tmp_path / "used", **first)
    generate(tmp_path / "used", **{**first, **change})
    generate(tmp_path / "fresh", **{**first, **change})
    assert read_tree(tmp_path / "used") == read_tree(tmp_path / "fresh")


def test_another_generator_version_replaces_the_old_one(tmp_path, monkeypatch):
    made = generate(tmp_path, num_images=1, image_size=SIZE, seed=0)
    before = age(made)
    monkeypatch.setattr(synthetic, "GENERATOR_VERSION", "next")
    generate(tmp_path, num_images=1, image_size=SIZE, seed=0)
    assert all(stamp(made)[name] != time for name, time in before.items())


@pytest.mark.parametrize("damage", ["picture", "json", "cut json"])
def test_an_incomplete_set_is_drawn_again(tmp_path, damage):
    made = generate(tmp_path, num_images=2, image_size=SIZE, seed=0)
    before = read_tree(tmp_path)
    if damage == "cut json":
        made.json.write_text(made.json.read_text()[:100])
    else:
        (made.json if damage == "json" else made.images / "000001.jpg").unlink()
    generate(tmp_path, num_images=2, image_size=SIZE, seed=0)
    assert read_tree(tmp_path) == before


def test_an_interrupted_run_leaves_no_json(tmp_path, monkeypatch):
    made = generate(tmp_path, num_images=2, image_size=SIZE, seed=0)
    render, calls = synthetic.render, []

    def fail_on_second(rng, size):
        calls.append(size)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return render(rng, size)

    monkeypatch.setattr(synthetic, "render", fail_on_second)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, num_images=3, image_size=SIZE, seed=1)
    assert not made.json.exists()


def test_foreign_files_survive(tmp_path):
    generate(tmp_path, num_images=1, image_size=SIZE, seed=0)
    (tmp_path / "train" / "notes.txt").write_text("mine")
    generate(tmp_path, num_images=1, image_size=SIZE, seed=1)
    assert (tmp_path / "train" / "notes.txt").read_text() == "mine"


def test_json_is_valid_coco(forty):
    made, data = forty
    assert [c["name"] for c in data["categories"]] == ["leaf", "miner", "rust", "blight"]
    assert [c["id"] for c in data["categories"]] == [1, 2, 3, 4]
    assert made.categories == ("leaf", "miner", "rust", "blight")
    image_ids = {image["id"] for image in data["images"]}
    assert len(image_ids) == len(data["images"]) == 40
    ids = [a["id"] for a in data["annotations"]]
    assert len(set(ids)) == len(ids)
    for image in data["images"]:
        with Image.open(made.images / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (160, 128)
    for a in data["annotations"]:
        assert a["image_id"] in image_ids and a["category_id"] in (1, 2, 3, 4)
        assert a["iscrowd"] == 0 and a["segmentation"]
        assert all(len(p) >= 6 and len(p) % 2 == 0 for p in a["segmentation"])
    assert data["info"]["arguments"] == {
        "num_images": 40, "image_size": [128, 160], "seed": 3, "name": "train",
    }


def test_boxes_and_areas_are_those_of_the_polygons(forty):
    for a in forty[1]["annotations"]:
        fine = rasterise(a, SIZE)
        ys, xs = np.flatnonzero(fine.any(1)) / 8, np.flatnonzero(fine.any(0)) / 8
        x, y, w, h = a["bbox"]
        expected = (xs[0], ys[0], xs[-1] + 1 / 8, ys[-1] + 1 / 8)
        assert np.abs(np.subtract((x, y, x + w, y + h), expected)).max() <= 1.0, a["id"]
        # Rounding to whole pixels moves the border by well under a pixel along its length.
        assert abs(a["area"] - fine.sum() / 64) <= 0.25 * perimeter(a) + 1, a["id"]
        assert x >= 0 and y >= 0 and x + w <= SIZE[1] and y + h <= SIZE[0]
        points = np.concatenate([np.array(p).reshape(-1, 2) for p in a["segmentation"]])
        assert (points >= 0).all() and (points <= (SIZE[1], SIZE[0])).all()


def perimeter(annotation: dict) -> float:
    rings = (np.array(p).reshape(-1, 2) for p in annotation["segmentation"])
    return sum(np.hypot(*(ring - np.roll(ring, 1, 0)).T).sum() for ring in rings)


def test_every_class_occurs_and_spots_have_a_learnable_size(forty):
    annotations = forty[1]["annotations"]
    counts = Counter(a["category_id"] for a in annotations)
    fewest = min(counts[category] for category in (1, 2, 3, 4))
    assert fewest >= 15, counts
    assert {a["image_id"] for a in annotations if a["category_id"] == LEAF} == set(range(1, 41))
    sides = [max(a["bbox"][2:]) * 192 / SIZE[0] for a in annotations if a["category_id"] != LEAF]
    assert np.percentile(sides, 5) >= 6 and max(sides) <= 45
    assert np.percentile(sides, 90) >= 20  # sizes vary


def test_leaves_of_one_picture_do_not_overlap(masks):
    crowded = 0
    for pairs in masks.values():
        leaves = [mask for category, mask in pairs if category == LEAF]
        crowded += len(leaves) > 1
        claimed = np.sum(leaves, axis=0)
        assert (claimed > 1).sum() <= 0.01 * (claimed > 0).sum()
    assert crowded >= 10


def test_a_leaf_on_top_of_another_is_cut_out_of_it():
    lower = np.zeros((200, 200), bool)
    lower[20:180, 20:180] = True
    upper = np.zeros_like(lower)
    upper[60:100, 70:130] = True
    (annotation,) = synthetic._annotate([(LEAF, lower & ~upper)], (100, 100))
    assert len(annotation["segmentation"]) == 2
    assert annotation["area"] == pytest.approx((160 * 160 - 40 * 60) / 4, rel=0.03)
    fine = rasterise(annotation, (100, 100), zoom=2)
    assert not fine[62:98, 72:128].any()


def test_most_spots_lie_inside_a_leaf_and_some_outside(masks):
    inside = outside = 0
    for pairs in masks.values():
        leaf = np.any([mask for category, mask in pairs if category == LEAF], axis=0)
        for category, mask in pairs:
            if category != LEAF:
                share = (mask & leaf).sum() / mask.sum()
                inside, outside = inside + (share > 0.8), outside + (share < 0.1)
    spots = sum(category != LEAF for pairs in masks.values() for category, _ in pairs)
    assert inside + outside >= 0.98 * spots  # a spot is on a leaf or off it
    assert inside >= 0.75 * spots
    assert 5 <= outside <= 0.25 * spots


def test_masks_lie_on_what_was_drawn(forty, masks):
    """Rust is redder than the leaf round it: fails if masks and pictures are shifted or swapped."""
    made, data = forty
    redder = []
    for image in data["images"]:
        with Image.open(made.images / image["file_name"]) as picture:
            red, green, _ = np.moveaxis(np.asarray(picture, np.float32), 2, 0)
        pairs = masks[image["id"]]
        leaf = np.any([mask for category, mask in pairs if category == LEAF], axis=0)
        for category, mask in pairs:
            if category == 3 and (mask & leaf).sum() > 0.8 * mask.sum():
                redder.append((red - green)[mask].mean() > (red - green)[leaf].mean() + 10)
    assert np.mean(redder) > 0.9


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"num_images": 0}, "num_images"),
        ({"image_size": (63, 192)}, "image_size"),
        ({"image_size": (192, 63)}, "image_size"),
        ({"seed": -1}, "seed"),
        ({"name": "../elsewhere"}, "name"),
        ({"name": ""}, "name"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, word):
    with pytest.raises(ValueError, match=f"^{word} is "):
        generate(tmp_path, **{"num_images": 1, "image_size": SIZE, "seed": 0, **arguments})
    assert not list(tmp_path.iterdir())


def test_command_line_writes_both_splits(tmp_path, capsys):
    root = str(tmp_path)
    main(["--root", root, "--train", "2", "--val", "1", "--size", "64", "96", "--seed", "4"])
    assert "train: 2 images" in capsys.readouterr().out
    direct = generate(tmp_path / "x", num_images=1, image_size=(64, 96), seed=4, name="val")
    assert (tmp_path / "val.json").read_bytes() == direct.json.read_bytes()
    assert len(list((tmp_path / "train").glob("*.jpg"))) == 2
    with pytest.raises(SystemExit):
        main(["--root", root, "--train", "0"])


def test_foreign_files_are_not_replaced(tmp_path):
    own = tmp_path / "train.json"
    own.write_text("mine")
    with pytest.raises(FileExistsError, match="train.json"):
        generate(tmp_path, num_images=1, image_size=SIZE)
    assert own.read_text() == "mine"
    picture = tmp_path / "val" / "000000.jpg"
    picture.parent.mkdir()
    picture.write_text("mine")
    with pytest.raises(FileExistsError, match="val"):
        generate(tmp_path, num_images=1, image_size=SIZE, name="val")
    assert picture.read_text() == "mine"
