"""The statistics against plain loops over the same records, and their pictures."""

import csv
import json
from collections import Counter
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from il_net.curation.statistics import (
    SplitObjects,
    Table,
    categories_in_image,
    class_names,
    coco_sizes,
    collect,
    instance_size,
    instances_in_image,
    num_instances,
    per_category,
    size_bins,
    write_table,
)
from il_net.curation.statistics_figures import (
    category_figure,
    count_figure,
    shorten_tail,
    size_figure,
)
from il_net.data.sound_coco import check_sound
from il_net.data.synthetic import generate
from il_net.figures import COLOURS, shorten

DATA = Path(__file__).parents[4] / "shared" / "data"


def coco(
    boxes: list[tuple],
    size: tuple[int, int] = (100, 20),
    num_images: int = 1,
    names: tuple[str, ...] = ("leaf", "rust"),
) -> dict:
    """A COCO file; boxes are (image id, category id, w, h, further fields)."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": size[0], "height": size[1]}
            for i in range(1, num_images + 1)
        ],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": [0, 0, w, h], **more}
            for i, (image, category, w, h, *rest) in enumerate(boxes, 1)
            for more in [rest[0] if rest else {}]
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }


def objects(boxes: list[tuple], **arguments) -> SplitObjects:
    data = coco(boxes, **arguments)
    return collect("train", data, class_names({"train": data}))


def rows(table: Table) -> dict[str, list[int]]:
    return dict(zip(table.rows, table.counts.tolist(), strict=True))


# ---- tables ----


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> dict[str, dict]:
    """Two splits of generated pictures; of "val" one picture has no object."""
    root = tmp_path_factory.mktemp("statistics")
    sizes = {"train": 12, "val": 5}
    made = {
        name: json.loads(
            generate(root, num_images=n, image_size=(96, 128), name=name).json.read_text()
        )
        for name, n in sizes.items()
    }
    made["val"]["annotations"] = [a for a in made["val"]["annotations"] if a["image_id"] != 2]
    return made


def test_tables_against_plain_loops(generated):
    names = class_names(generated)
    assert names == ("leaf", "miner", "rust", "blight")
    for name, content in generated.items():
        check_sound(content, name, boxes=True)
    splits = [collect(name, data, names) for name, data in generated.items()]
    tables = {
        "categories": per_category(splits, names),
        "categories in image": categories_in_image(splits),
        "instances in image": instances_in_image(splits),
        "size": instance_size(splits, 0.05),
        "coco": coco_sizes(splits),
    }
    for column, data in enumerate(generated.values()):
        expected = {name: Counter() for name in tables}
        area = {i["id"]: i["width"] * i["height"] for i in data["images"]}
        for image in data["images"]:
            own = [a for a in data["annotations"] if a["image_id"] == image["id"]]
            expected["instances in image"][str(len(own))] += 1
            expected["categories in image"][str(len({a["category_id"] for a in own}))] += 1
        for a in data["annotations"]:
            expected["categories"][names[a["category_id"] - 1]] += 1
            size = Fraction(a["bbox"][2]) * Fraction(a["bbox"][3]) / area[a["image_id"]]
            edge = min(floor(size * 20) + 1, 20) / 20
            expected["size"][f"{edge:.3f}"] += 1
            coco_name = "small" if a["area"] < 1024 else "medium" if a["area"] < 9216 else "large"
            expected["coco"][coco_name] += 1
        for name, table in tables.items():
            counts = {row.split(",")[0]: n[column] for row, n in rows(table).items() if n[column]}
            assert counts == expected[name], name
    assert rows(tables["instances in image"])["0"][1] == 1
    for table in tables.values():
        assert table.splits == ("train", "val")
        np.testing.assert_allclose(table.shares.sum(axis=0), 1)


@pytest.mark.parametrize(
    ("name", "split", "images", "counts"),
    [  # the READMEs of the data sets
        ("coffee_leaf", "train", 338, [338, 227, 676, 228, 48]),
        ("coffee_leaf", "val", 42, [42, 19, 111, 36, 1]),
        ("bccd", "train", 205, [2381, 214, 209]),
        ("bccd", "val", 87, [967, 87, 83]),
    ],
)
def test_real_data(name, split, images, counts):
    json_file = DATA / name / "annotations" / f"instances_{split}.json"
    if not json_file.is_file():
        pytest.skip(f"needs the public data set {name} in ../shared/data beside the repository")
    data = {split: json.loads(json_file.read_text())}
    for name, content in data.items():
        check_sound(content, name, boxes=True)
    names = class_names(data)
    own = collect(split, data[split], names)
    assert own.num_images == images
    assert per_category([own], names).counts[:, 0].tolist() == counts
    assert instances_in_image([own]).counts.sum() == images
    if name == "coffee_leaf":
        # One leaf in every photo and one kind of spot at most; 80 and 10 leaves have no spot.
        spotless = 80 if split == "train" else 10
        assert categories_in_image([own]).counts[:, 0].tolist() == [0, spotless, images - spotless]
        assert instances_in_image([own]).counts[1, 0] == spotless


@pytest.mark.parametrize("fifths", range(21))
def test_size_on_an_edge_is_in_the_next_bin(fifths):
    # 5 k x 20 pixels of 100 x 20 are k twentieths; in binary 3 / 20 / 0.05 is below 3.
    table = instance_size([objects([(1, 1, 5 * fifths, 20)])], 0.05)
    assert np.flatnonzero(table.counts[:, 0]).tolist() == [min(fifths, 19)]


def test_size_just_below_an_edge_and_beyond_the_image():
    table = instance_size([objects([(1, 1, 4.99, 20), (1, 1, 120, 30)])], 0.05)
    assert np.flatnonzero(table.counts[:, 0]).tolist() == [0, 19]


@given(
    st.integers(1, 4000), st.integers(1, 4000), st.data(), st.sampled_from(["0.05", "0.3", "0.001"])
)
@settings(max_examples=100, deadline=None)
def test_bins_are_those_of_exact_arithmetic(width, height, draw, delta):
    w, h = draw.draw(st.integers(0, width)), draw.draw(st.integers(0, height))
    table = instance_size([objects([(1, 1, w, h)], size=(width, height))], float(delta))
    exact = floor(Fraction(w * h, width * height) / Fraction(delta))
    assert np.flatnonzero(table.counts[:, 0]).tolist() == [min(exact, len(table.rows) - 1)]


def test_bins_are_labelled_by_their_upper_edge():
    assert instance_size([objects([])], 0.25).rows == ("0.250", "0.500", "0.750", "1.000")
    assert size_bins(0.3) == pytest.approx((0.3, 0.6, 0.9, 1.0))
    assert len(size_bins(0.05)) == 20
    assert size_bins(1.0) == (1.0,)
    assert len(size_bins(0.001)) == 1000


@pytest.mark.parametrize("width", [0, -0.1, 1.5, 0.0005, float("nan")])
def test_impossible_bins(width):
    with pytest.raises(ValueError, match="--bins is the width of a bin"):
        size_bins(width)


def test_crowds_are_counted_apart():
    crowd = {"iscrowd": 1}
    split = objects([(1, 1, 5, 5), (1, 2, 90, 20, crowd), (2, 2, 90, 20, crowd)], num_images=3)
    assert split.num_crowd == 2
    assert num_instances(split).tolist() == [1, 0, 0]
    assert rows(per_category([split], ("leaf", "rust"))) == {"leaf": [1], "rust": [0]}
    assert rows(instances_in_image([split])) == {"0": [2], "1": [1]}
    assert instance_size([split], 0.5).counts.tolist() == [[1], [0]]


def test_images_without_objects_and_one_class():
    split = objects([], num_images=3, names=("leaf",))
    assert per_category([split], ("leaf",)).counts.tolist() == [[0]]
    assert per_category([split], ("leaf",)).shares.tolist() == [[0]]
    assert rows(categories_in_image([split])) == rows(instances_in_image([split])) == {"0": [3]}
    assert instance_size([split], 0.05).counts.sum() == 0
    split = objects([(1, 1, 1, 1), (1, 1, 2, 2)], names=("leaf",))
    assert rows(categories_in_image([split])) == {"0": [0], "1": [1]}
    assert rows(instances_in_image([split])) == {"0": [0], "1": [0], "2": [1]}


def test_classes_are_matched_by_name():
    train = coco([(1, 1, 5, 5), (1, 2, 5, 5), (1, 2, 5, 5)])
    val = coco([(1, 1, 5, 5), (1, 3, 5, 5), (1, 3, 5, 5)], names=("rust", "leaf", "mold"))
    data = {"train": train, "val": val}
    names = class_names(data)
    assert names == ("leaf", "rust", "mold")
    splits = [collect(name, own, names) for name, own in data.items()]
    assert per_category(splits, names).counts.tolist() == [[1, 0], [2, 1], [0, 2]]


def test_first_files_classes_are_sorted_by_id():
    data = coco([])
    data["categories"] = [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}]
    assert class_names({"x": data}) == ("a", "b")


def test_groups_of_classes():
    split = objects([(1, 1, 90, 20), (2, 2, 1, 1), (2, 2, 2, 1)], num_images=2)
    leaves, spots = split.of([0]), split.of([1])
    assert (leaves.num_images, spots.num_images) == (2, 2)
    assert num_instances(leaves).tolist() == [1, 0]
    assert instance_size([spots], 0.5).counts.tolist() == [[2], [0]]
    assert instance_size([leaves], 0.5).counts.tolist() == [[0], [1]]


def test_coco_sizes_at_their_limits():
    areas = [1023.9, 1024, 9215, 9216]
    split = objects([(1, 1, 1, 1, {"area": area}) for area in areas])
    assert coco_sizes([split]).counts[:, 0].tolist() == [1, 2, 1]
    # Without an area the box's.
    split = objects([(1, 1, 32, 31), (1, 1, 32, 32), (1, 1, 96, 96)], size=(100, 100))
    assert coco_sizes([split]).counts[:, 0].tolist() == [1, 1, 1]


def test_what_cannot_be_counted_is_named():
    data = coco([(1, 3, 5, 5), (9, 1, 5, 5), (1, 1, -5, 5)])
    with pytest.raises(ValueError, match=r"^val\.json: ") as error:
        check_sound(data, "val.json", boxes=True)
    for part in ("unknown category ids: 3 in", "an image that is not in", "negative size"):
        assert part in str(error.value)


def test_csv_has_counts_and_shares(tmp_path):
    table = Table(
        "category", "instances", ("leaf, big", "rust"), ("a", "b"), np.array([[3, 0], [1, 0]])
    )
    write_table(tmp_path / "new" / "t.csv", table)
    with open(tmp_path / "new" / "t.csv", newline="", encoding="utf-8") as f:
        assert list(csv.reader(f)) == [
            ["category", "a", "b", "a share", "b share"],
            ["leaf, big", "3", "0", "0.750000", "0.000000"],
            ["rust", "1", "0", "0.250000", "0.000000"],
        ]


# ---- pictures ----


def check_picture(path: Path, most_pixels: int = 5000) -> None:
    """A PNG of a sensible size that is not blank."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert 500 <= image.width <= most_pixels
        assert 300 <= image.height <= most_pixels
        pixels = np.asarray(image.convert("L"))
    assert pixels.std() > 10
    assert (pixels > 250).mean() > 0.2  # bars on a white ground


def bars(figure: Figure, panel: int = 0, *, lying: bool = False) -> list[list[float]]:
    """The lengths of the bars of every split."""
    groups = figure.axes[panel].containers
    return [[b.get_width() if lying else b.get_height() for b in group] for group in groups]


def legend(figure: Figure, panel: int = 0) -> list[str]:
    return [text.get_text() for text in figure.axes[panel].get_legend().get_texts()]


def make_table(counts: list, unit: str = "images", label: str = "x") -> Table:
    array = np.array(counts)
    names = tuple(f"s{i}" for i in range(array.shape[1]))
    return Table(label, unit, tuple(str(i) for i in range(len(array))), names, array)


def test_category_picture(tmp_path):
    counts = np.array([[1, 0], [6, 1], [3, 1]])
    table = Table("category", "instances", ("a", "$b$", "c"), ("train", "val"), counts)
    drawn = category_figure(tmp_path / "c.png", table)
    check_picture(tmp_path / "c.png")
    axes = drawn.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["$b$", "c", "a"]
    assert np.allclose(bars(drawn, lying=True), [[60, 30, 10], [50, 50, 0]])
    assert legend(drawn) == ["train (10 instances)", "val (2 instances)"]
    assert {"6 (60.0 %)", "1 (50.0 %)", "0 (0.0 %)"} < {t.get_text() for t in axes.texts}
    assert axes.yaxis_inverted()  # the most frequent on top


def test_80_classes_are_readable(tmp_path):
    counts = np.random.default_rng(0).integers(1, 1000, (80, 2))
    drawn = category_figure(tmp_path / "c.png", make_table(counts, "instances"))
    check_picture(tmp_path / "c.png")
    assert len(drawn.axes[0].get_yticklabels()) == 80
    # A row is higher than its name's letters (8 points).
    assert 72 * drawn.get_figheight() / 80 > 9
    assert not drawn.axes[0].texts


def test_more_classes_than_fit_are_told(tmp_path):
    counts = [[10]] * 100 + [[5]] * 50
    drawn = category_figure(tmp_path / "c.png", make_table(counts, "instances"))
    check_picture(tmp_path / "c.png")
    assert len(drawn.axes[0].get_yticklabels()) == 100
    # 50 * 5 of 1250
    assert "the 100 most frequent of 150; the others have 20.0%" in drawn.axes[0].get_title("left")


def test_few_counts_are_drawn_as_they_are(tmp_path):
    table = make_table([[1, 0], [2, 3], [1, 1]], label="instances in an image")
    drawn = count_figure(tmp_path / "i.png", "Instances in an image", table)
    check_picture(tmp_path / "i.png")
    axes = drawn.axes[0]
    assert np.allclose(bars(drawn), [[25, 50, 25], [0, 75, 25]])
    assert axes.get_title("left") == "Instances in an image"
    assert {t.get_text() for t in axes.texts} == {"25.0", "50.0", "75.0", ""}


def test_long_tail_is_cut_and_told(tmp_path):
    # 995 images with 1 object, four with 60 and one with 214.
    counts = np.zeros((215, 1), int)
    counts[1], counts[60], counts[214] = 995, 4, 1
    short, note = shorten_tail(make_table(counts))
    assert rows(short) == {"0": [0], "1": [995], "2+": [5]}
    assert note == "the last bar: 5 of 1000 images, with 2 to 214"
    drawn = count_figure(tmp_path / "i.png", "Instances", make_table(counts))
    check_picture(tmp_path / "i.png")
    assert drawn.axes[0].get_title("left") == f"Instances\n{note}"


def test_the_tail_has_at_most_one_percent():
    # 985 + 8 of 1000 images have 50 objects or fewer.
    counts = np.zeros((61, 1), int)
    counts[1], counts[50], counts[60] = 985, 8, 7
    short, note = shorten_tail(make_table(counts))
    assert rows(short)["49–50"] == [8]
    assert rows(short)["51+"] == [7]
    assert note == "bars span 2 counts; the last bar: 7 of 1000 images, with 51 to 60"


def test_crowded_images_share_bars():
    # 1, 2, ..., 200 objects in an image each; 99 % have 198 or fewer: 40 bars of 5.
    counts = np.array([[0]] + [[1]] * 200)
    short, note = shorten_tail(make_table(counts))
    assert short.rows[:3] == ("0", "1–5", "6–10")
    assert short.rows[-1] == "196–200"
    assert short.counts[:, 0].tolist() == [0] + [5] * 40
    assert note == "bars span 5 counts"


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 0, 1, 50])), min_size=1, max_size=400)
)
@settings(max_examples=50, deadline=None)
def test_shortening_loses_no_image(counts):
    table = make_table([list(row) for row in counts])
    short, note = shorten_tail(table)
    assert short.counts.sum(axis=0).tolist() == table.counts.sum(axis=0).tolist()
    assert len(short.rows) == len(short.counts) <= 42
    assert bool(note) == (len(table.rows) > 41)
    if short.rows[-1].endswith("+"):
        # At most 1 % of each split is in the last bar.
        assert (short.counts[-1] <= 0.01 * table.counts.sum(axis=0) + 1e-9).all()


def test_size_picture_has_a_panel_for_each_group(tmp_path):
    split = objects([(1, 1, 90, 20), (1, 2, 1, 1), (1, 2, 2, 1)])
    tables = {"all": instance_size([split], 0.05), "spots": instance_size([split.of([1])], 0.05)}
    drawn = size_figure(tmp_path / "s.png", tables)
    check_picture(tmp_path / "s.png")
    assert [axes.get_title("left") for axes in drawn.axes] == ["all", "spots"]
    assert bars(drawn, 1)[0][0] == pytest.approx(100)
    assert legend(drawn, 1) == ["train (2 instances)"]
    assert [t.get_text() for t in drawn.axes[0].get_xticklabels()][::19] == ["0.050", "1.000"]


def test_a_split_has_one_colour_everywhere(tmp_path):
    table = make_table([[1, 2], [3, 4]])
    figures = [
        category_figure(tmp_path / "a.png", table),
        count_figure(tmp_path / "b.png", "b", table),
        size_figure(tmp_path / "c.png", {"c": table}),
    ]
    for drawn in figures:
        found = [group[0].get_facecolor() for group in drawn.axes[0].containers]
        expected = [tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)) for c in COLOURS[:2]]
        np.testing.assert_allclose([f[:3] for f in found], expected)


def test_pictures_of_nothing(tmp_path):
    split = objects([], num_images=2)
    category_figure(tmp_path / "a.png", per_category([split], ("leaf", "rust")))
    count_figure(tmp_path / "b.png", "b", instances_in_image([split]))
    size_figure(tmp_path / "c.png", {"c": instance_size([split], 0.05)})
    for name in "abc":
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width == 1500  # 10 inches of 150 pixels


def test_same_tables_same_bytes(tmp_path):
    table = make_table([[1, 2], [3, 4]])
    for name in ("a.png", "b.png"):
        count_figure(tmp_path / name, "t", table)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_long_names_are_shortened():
    assert shorten("two\nlines", 20) == "two lines"
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"
