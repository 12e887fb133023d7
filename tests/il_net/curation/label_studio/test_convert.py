"""Label Studio's own JSON: hand-written exports for each point that a converter has to handle.

The points are those of the reference on the format: units, kinds of shape, joined results, other
results, choice of an annotation, labels, sizes, bad shapes, ids, order. Names of pictures are in
test_images.py.
"""

import json
import re
import time
from datetime import datetime

import pytest
from PIL import Image

from il_net.curation.label_studio.convert import convert, read_export, read_table
from il_net.curation.label_studio.records import Choices
from il_net.data.report import Severity

SQUARE = [[10, 20], [50, 20], [50, 60], [10, 60]]  # percent
# The same in a picture of 200 x 100.
SQUARE_PX = [20, 20, 100, 20, 100, 60, 20, 60]


@pytest.fixture
def run(tmp_path):
    """Convert an export of pictures a.jpg, b.jpg, c.jpg of 200 x 100; returns (coco, account)."""
    (tmp_path / "p").mkdir()
    for name in "abc":
        Image.new("RGB", (200, 100)).save(tmp_path / "p" / f"{name}.jpg")

    def call(export: object, **choices: object):
        text = export if isinstance(export, str) else json.dumps(export)
        (tmp_path / "export.json").write_text(text, encoding="utf-8")
        done = convert(tmp_path / "export.json", tmp_path / "p", Choices(**choices))
        return done.coco, done.account

    call.folder = tmp_path / "p"
    return call


def result(kind="polygonlabels", labels=("leaf",), region="r1", **value) -> dict:
    """A result; a polygon, unless the value of something else is given."""
    value = value or {"points": SQUARE, "closed": True}
    if kind.endswith("labels") and labels is not None:
        value = {**value, kind: list(labels)}
    size = {"original_width": 200, "original_height": 100, "image_rotation": 0}
    return {
        "id": region,
        "type": kind,
        "from_name": "label",
        "to_name": "image",
        "value": value,
    } | size


def annotation(*results: dict, **fields) -> dict:
    return {"id": 1, "result": list(results), "was_cancelled": False, **fields}


def task(*annotations: dict, id=1, image="a.jpg", **fields) -> dict:
    return {"id": id, "data": {"image": image}, "annotations": list(annotations), **fields}


def export(*results: dict) -> list:
    return [task(annotation(*results))]


def rectangle(x, y, width, height, rotation=0, **fields) -> dict:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": rotation}
    return result("rectanglelabels", **value, **fields)


def changes(account) -> dict[str, int]:
    return {p.kind: p.count for p in account.problems(Severity.WARNING)}


# --- 1, 2: units and shapes ---


def test_polygon_in_percent(run):
    coco, account = run(export(result()))
    assert coco["images"] == [{"id": 1, "file_name": "a.jpg", "width": 200, "height": 100}]
    assert coco["annotations"] == [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [20, 20, 80, 40],
            "area": 3200,
            "segmentation": [SQUARE_PX],
            "iscrowd": 0,
        }
    ]
    assert coco["categories"] == [{"id": 1, "name": "leaf"}]
    assert coco["licenses"] == [] and "export.json" in coco["info"]["description"]
    assert changes(account) == {}


def test_upright_rectangles_alone_are_boxes(run):
    coco, account = run(export(rectangle(10, 20, 40, 30)))
    (found,) = coco["annotations"]
    assert (found["bbox"], found["area"], found["segmentation"]) == ([20, 20, 80, 30], 2400, [])
    assert changes(account) == {}


def test_rectangles_beside_polygons_get_four_corners(run):
    coco, account = run(export(rectangle(10, 20, 40, 30), result(region="r2")))
    assert coco["annotations"][0]["segmentation"] == [[20, 20, 100, 20, 100, 50, 20, 50]]
    assert changes(account) == {}


def test_a_turned_rectangle_turns_in_pixels(run):
    # 40 x 10 pixels at (100, 20), a quarter turn clockwise: to (90..100, 20..60) pixels. Turned in
    # percent space, 20 x 10 percent, it would be 20 pixels wide and 20 high.
    coco, _ = run(export(rectangle(50, 20, 20, 10, rotation=90)))
    assert coco["annotations"][0]["bbox"] == [90, 20, 10, 40]
    # 45 degrees: sides 20 and 20, so half a diagonal is 14.14.
    coco, _ = run(export(rectangle(50, 20, 10, 20, rotation=45)))
    (found,) = coco["annotations"]
    assert found["bbox"] == [85.86, 20, 28.28, 28.28]
    assert found["area"] == pytest.approx(400, abs=0.5)
    assert len(found["segmentation"][0]) == 8


# --- 3, 4: joined results, and results that are no shapes ---


@pytest.mark.parametrize("reverse", [False, True])
def test_geometry_and_labels_of_one_id_are_one_region(run, reverse):
    results = [
        result("polygon", None, points=SQUARE),
        result("labels", ["rust"], points=SQUARE),
        result("rectangle", None, "r2", x=0, y=0, width=10, height=10),
        result("labels", ["leaf"], "r2", x=0, y=0, width=10, height=10),
    ]
    coco, account = run(export(*(results[::-1] if reverse else results)))
    found = {(a["category_id"], tuple(a["bbox"])) for a in coco["annotations"]}
    assert found == {(2, (20, 20, 80, 40)), (1, (0, 0, 20, 10))}
    assert len(coco["annotations"]) == 2
    assert changes(account) == {}


def test_other_results_are_skipped(run):
    others = [
        {"id": "r1", "type": "choices", "from_name": "quality", "to_name": "image",
         "value": {"choices": ["sharp"], "points": SQUARE}},
        {"id": "t", "type": "textarea", "value": {"text": ["a note"]}},
        {"id": "n", "type": "rating", "value": {"rating": 3}},
        {"type": "relation", "from_id": "r1", "to_id": "r2", "direction": "right"},
    ]  # fmt: skip
    coco, account = run(export(others[0], result(), *others[1:]))
    assert len(coco["annotations"]) == 1
    assert changes(account) == {}
    assert account.notes["results that are no shapes (choices, texts, relations)"] == 4


@pytest.mark.parametrize("kind", ["brushlabels", "ellipselabels", "keypointlabels"])
def test_shapes_without_an_outline_are_left_out_and_told(run, kind):
    coco, account = run(export(result(kind, x=5, y=5, width=2), result(region="r2")))
    assert len(coco["annotations"]) == 1
    assert list(changes(account).values()) == [1]
    assert kind in next(iter(changes(account)))


def test_labels_of_one_control_only(run):
    other = {**result(labels=["sunny"], region="r2"), "from_name": "weather"}
    coco, account = run(export(result(), other), label_from=("label",))
    assert [c["name"] for c in coco["categories"]] == ["leaf"]
    assert changes(account) == {}
    coco, _ = run(export(result(), other | {"id": "r1"}), label_from=("weather",))
    assert [c["name"] for c in coco["categories"]] == ["sunny"]


# --- 5: which annotation ---


def three_annotations() -> list:
    def one(number: int, label: str, **fields) -> dict:
        region = result(
            labels=[label], region=label, points=[[p[0] + number, p[1]] for p in SQUARE]
        )
        return annotation(region, **{**fields, "id": number})

    return [
        task(
            one(1, "early", updated_at="2022-03-01T10:00:00.500000Z"),
            one(2, "late", updated_at="2022-03-01T13:00:00+02:00"),
            one(3, "middle", updated_at="2022-03-01T10:30:00Z"),
            one(4, "cancelled", updated_at="2023-01-01T00:00:00Z", was_cancelled=True),
            predictions=[{"result": [result(labels=["guess"])]}],
            drafts=[{"result": [result(labels=["draft"])]}],
        )
    ]


def used(coco) -> list[str]:
    names = {c["id"]: c["name"] for c in coco["categories"]}
    return [names[a["category_id"]] for a in coco["annotations"]]


def test_the_latest_annotation_is_used(run):
    coco, account = run(three_annotations())
    assert used(coco) == ["late"]  # 13:00 in a zone two hours ahead is 11:00
    assert changes(account) == {}
    assert account.notes["annotations that were cancelled, not used"] == 1


def test_a_time_without_a_zone_is_the_same_everywhere(run, monkeypatch):
    tasks = three_annotations()
    tasks[0]["annotations"][0]["updated_at"] = "2022-03-01T11:30:00"  # half an hour after "late"
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert used(run(tasks)[0]) == ["early"]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("fraction", [".5", ".50", ".5000", ".5000001", ".500000000"])
def test_fractions_of_a_second_of_any_length(run, monkeypatch, fraction):
    """Python 3.10 reads those of 3 or 6 digits only, which later versions are made to do here."""

    class Strict(datetime):
        @classmethod
        def fromisoformat(cls, text: str) -> datetime:
            assert re.fullmatch(r"[^.]*(\.(\d{3}|\d{6}))?(\+[\d:]+)?", text), text
            return datetime.fromisoformat(text)

    monkeypatch.setattr("il_net.curation.label_studio.tasks.datetime", Strict)
    found = three_annotations()
    found[0]["annotations"][0]["updated_at"] = f"2022-03-01T11:00:00{fraction}Z"
    assert used(run(found)[0]) == ["early"]  # half a second after "late"
    found[0]["annotations"][0]["updated_at"] = f"2022-03-01T10:59:59{fraction}Z"
    assert used(run(found)[0]) == ["late"]


def test_an_empty_annotation_after_one_with_regions_is_told(run):
    """It may be a correction, or a slip that loses everything: --strict refuses it."""
    found = three_annotations()
    found[0]["annotations"][1]["result"] = []
    found.append(task(annotation(result()), id=2, image="b.jpg"))
    coco, account = run(found)
    assert used(coco) == ["leaf"] and len(coco["images"]) == 2
    kind = "pictures whose best annotation has no regions, though another one has"
    assert changes(account) == {kind: 1}
    assert changes(run(found, annotations="all")[1]) == {}
    for one in found[0]["annotations"]:
        one["result"] = []
    assert changes(run(found)[1]) == {}


def test_ground_truth_comes_before_the_latest(run):
    tasks = three_annotations()
    tasks[0]["annotations"][0]["ground_truth"] = True
    assert used(run(tasks)[0]) == ["early"]


def test_all_annotations_on_request_but_each_object_once(run):
    tasks = three_annotations()
    tasks[0]["annotations"][2]["result"].append(tasks[0]["annotations"][0]["result"][0])
    coco, account = run(tasks, annotations="all")
    assert sorted(used(coco)) == ["early", "late", "middle"]
    assert changes(account) == {"regions drawn twice": 1}
    assert len(coco["images"]) == 1


def test_what_nobody_labelled_is_left_out_and_what_is_empty_is_kept(run):
    tasks = [
        task(annotation(result())),
        task(id=2, image="b.jpg"),
        task(annotation(), id=3, image="c.jpg"),
    ]
    coco, account = run(tasks)
    assert [i["file_name"] for i in coco["images"]] == ["a.jpg", "c.jpg"]
    assert account.notes["tasks without annotations, left out"] == 1
    assert changes(account) == {}


def test_a_task_with_cancelled_annotations_only_is_left_out(run):
    cancelled = task(annotation(result(), was_cancelled=True), id=2, image="b.jpg")
    coco, account = run([task(annotation(result())), cancelled])
    assert [i["file_name"] for i in coco["images"]] == ["a.jpg"]
    assert account.notes["tasks whose annotations are all cancelled, left out"] == 1


def test_completions_of_old_exports(run):
    old = {
        "id": 7,
        "data": {"image": "a.jpg"},
        "completions": [
            {"id": 1, "result": [result(labels=["old"])], "created_at": 1590000000},
            {"id": 2, "result": [result(labels=["new"])], "created_at": 1600000000},
            {"id": 3, "result": [result(labels=["no"])], "created_at": 1700000000, "skipped": True},
        ],
    }
    coco, _ = run([old])
    assert used(coco) == ["new"]
    assert coco["images"][0]["id"] == 7
    old["completions"][0]["honeypot"] = True  # ground truth, in those days
    assert used(run([old])[0]) == ["old"]


def test_two_tasks_of_one_picture_are_one_image(run):
    tasks = [
        task(annotation(result(labels=["first"]), updated_at="2022-01-01T00:00:00Z"), id=5),
        task(annotation(result(labels=["second"]), updated_at="2022-01-02T00:00:00Z"), id=6),
    ]
    coco, account = run(tasks)
    assert [i["id"] for i in coco["images"]] == [5]
    assert used(coco) == ["second"]
    assert changes(account) == {"pictures that are in the export more than once": 1}
    assert sorted(used(run(tasks, annotations="all")[0])) == ["first", "second"]


# --- 6, 10: labels and class ids ---


def test_regions_without_a_label_are_dropped_and_told(run):
    coco, account = run(
        export(result(), result(labels=[], region="r2"), result("polygon", None, "r3"))
    )
    assert len(coco["annotations"]) == 1
    assert changes(account) == {"regions without a label": 2}


def test_several_labels(run):
    both = export(result(labels=["rust", "leaf"]))
    coco, account = run(both)
    assert used(coco) == ["rust"]
    assert changes(account) == {"regions with several labels": 1}
    coco, account = run(both, several_labels="each")
    assert sorted(used(coco)) == ["leaf", "rust"]
    assert changes(account) == {}


def test_ignored_labels(run):
    tasks = export(
        result(),
        result(labels=["other"], region="r2"),
        result(labels=["other", "rust"], region="r3"),
    )
    coco, _ = run(tasks, ignore_labels=("other",))
    assert used(coco) == ["leaf", "rust"]
    assert [c["name"] for c in coco["categories"]] == ["leaf", "rust"]


def test_class_ids_are_alphabetical_whatever_the_order(run):
    tasks = export(result(labels=["rust"]), rectangle(0, 0, 9, 9, labels=["Leaf"], region="r2"))
    coco, _ = run(tasks)
    assert coco["categories"] == [{"id": 1, "name": "Leaf"}, {"id": 2, "name": "rust"}]
    assert [a["category_id"] for a in coco["annotations"]] == [2, 1]
    coco, _ = run(tasks, first_id=0)
    assert coco["categories"] == [{"id": 0, "name": "Leaf"}, {"id": 1, "name": "rust"}]


LDD = {"black_rot_foglia": 1, "foglia_vite": 6, "peronospora_grappolo": 13}


def test_a_table_fixes_ids_with_gaps_and_unused_classes(run):
    coco, _ = run(export(result(labels=["foglia_vite"])), table=LDD)
    assert coco["annotations"][0]["category_id"] == 6
    assert coco["categories"] == [{"id": i, "name": n} for n, i in LDD.items()]


def test_a_label_that_the_table_lacks(run):
    tasks = export(result(labels=["foglia_vite"]), result(labels=["oidio"], region="r2"))
    with pytest.raises(ValueError, match=r"lacks 1 labels.*\['oidio'\].*--ignore-labels"):
        run(tasks, table=LDD)
    assert used(run(tasks, table=LDD, ignore_labels=("oidio",))[0]) == ["foglia_vite"]


@pytest.mark.parametrize(
    "content",
    [
        LDD,
        [{"id": i, "name": n} for n, i in LDD.items()],
        {"categories": [{"id": i, "name": n, "supercategory": ""} for n, i in LDD.items()]},
    ],
)
def test_forms_of_a_table(tmp_path, content):
    (tmp_path / "table.json").write_text(json.dumps(content))
    assert read_table(tmp_path / "table.json") == LDD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"leaf": "1"}', r"categories\[0\] must have an integer 'id'"),
        ('{"leaf": 1, "rust": 1}', r"categories\[1\] repeats"),
        ("[]", "must be"),
        ("3", "must be"),
        ("{", "is not JSON"),
    ],
)
def test_a_table_that_is_none(tmp_path, content, message):
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "table.json")


# --- 8: sizes ---


def photo(path, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)


def test_a_photo_stored_turned_has_its_upright_size(run):
    photo(run.folder / "a.jpg", (100, 200), 6)  # stored 100 x 200, shown 200 x 100
    coco, account = run(export(result()))
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == (200, 100)
    assert coco["annotations"][0]["segmentation"] == [SQUARE_PX]
    assert changes(account) == {}


def test_swapped_sides_in_the_export(run):
    swapped = result() | {"original_width": 100, "original_height": 200}
    coco, account = run(export(swapped))
    assert coco["annotations"][0]["segmentation"] == [SQUARE_PX]
    (kind,) = changes(account)
    assert "swapped" in kind


def test_a_resized_picture_is_scaled_and_another_one_is_dropped(run):
    larger = result() | {"original_width": 400, "original_height": 201}
    coco, account = run(export(larger))
    assert coco["annotations"][0]["segmentation"] == [SQUARE_PX]
    assert changes(account) == {"pictures of another size than when they were labelled": 1}
    other = task(annotation(result() | {"original_width": 300}), id=2, image="b.jpg")
    coco, account = run([*export(result()), other])
    assert [i["file_name"] for i in coco["images"]] == ["a.jpg"]
    assert changes(account) == {"files of another shape than the labelled picture": 1}


def test_a_picture_turned_by_hand_is_left_out(run):
    turned = task(annotation(result() | {"image_rotation": 90}), id=2, image="b.jpg")
    coco, account = run([*export(result()), turned])
    # Not kept without regions: what is on it would be taught as background.
    assert [i["file_name"] for i in coco["images"]] == ["a.jpg"]
    assert changes(account) == {
        "regions drawn on a picture turned by hand": 1,
        "pictures of which no region is usable": 1,
    }


def test_a_broken_picture_is_left_out(run):
    (run.folder / "b.jpg").write_bytes(b"no picture")
    coco, account = run([*export(result()), task(annotation(result()), id=2, image="b.jpg")])
    assert [i["file_name"] for i in coco["images"]] == ["a.jpg"]
    assert changes(account) == {"pictures that can't be read": 1}


# --- 9: bad shapes ---


@pytest.mark.parametrize(
    ("points", "kind", "box", "area"),
    [
        ([[-5, 20], [50, 20], [50, 60], [-5, 60]], "reach out", [0, 20, 100, 40], 4000),
        ([*SQUARE[:2], SQUARE[1], *SQUARE[2:]], "repeated points", [20, 20, 80, 40], 3200),
        ([*SQUARE, SQUARE[0]], "repeated points", [20, 20, 80, 40], 3200),
        # Two triangles, 40 and 40 high and 40 wide: together 1600.
        ([[10, 20], [50, 60], [50, 20], [10, 60]], "cross", [20, 20, 80, 40], 1600),
    ],
)
def test_shapes_that_are_mended(run, points, kind, box, area):
    coco, account = run(export(result(points=points)))
    (found,) = coco["annotations"]
    assert (found["bbox"], found["area"]) == (box, area)
    ((told, count),) = changes(account).items()
    assert kind in told and count == 1


def test_percent_with_rounding_errors_is_not_outside(run):
    edge = 100.00000000001
    coco, account = run(export(result(points=[[-1e-12, 0], [edge, 0], [edge, edge]])))
    assert coco["annotations"][0]["bbox"] == [0, 0, 200, 100]
    assert changes(account) == {}


@pytest.mark.parametrize(
    "points",
    [
        [],
        [[10, 10], [20, 20]],
        [[10, 10], [20, 20], [30, 30]],
        [[110, 10], [120, 10], [120, 20]],
        [[10, 10], [10.2, 10], [10.2, 10.2]],  # 0.4 x 0.2 pixels
    ],
)
def test_shapes_of_less_than_a_pixel_are_dropped(run, points):
    coco, account = run(export(result(), result(region="r2", points=points)))
    assert len(coco["annotations"]) == 1
    ((told, count),) = changes(account).items()
    assert "less than a pixel" in told and count == 1


NAN, HUGE = float("nan"), 10**400


@pytest.mark.parametrize(
    "bad",
    [
        result(region="r2", points=[[NAN, 1], [5, 5], [9, 1]]),
        result(region="r2", points=[[HUGE, 1], [5, 5], [9, 1]]),
        result(region="r2", points=[["1", "2"], [5, 5], [9, 1]]),
        result(region="r2", points=[[1, 2, 3], [5, 5], [9, 1]]),
        result(region="r2", points="1,2"),
        result(region="r2", points=[[True, 2], [5, 5], [9, 1]]),
        rectangle(NAN, 1, 5, 5, region="r2"),
        rectangle(1, 1, None, 5, region="r2"),
        rectangle(1, 1, 5, 5, rotation="a", region="r2"),
        rectangle(1, 1, 5, 5, rotation=float("inf"), region="r2"),
        result("rectanglelabels", region="r2", x=1),
    ],
)
def test_coordinates_that_are_none(run, bad):
    coco, account = run(export(result(), bad))
    assert len(coco["annotations"]) == 1
    assert changes(account) == {"regions without usable coordinates": 1}


# --- 11: order and ids ---


def test_tasks_by_id_and_annotations_from_1(run):
    tasks = [
        task(annotation(result(), rectangle(0, 0, 9, 9, region="r2")), id=30, image="a.jpg"),
        task(annotation(result()), id=4, image="b.jpg"),
        task(annotation(result()), id=20, image="c.jpg"),
    ]
    coco, _ = run(tasks)
    assert [(i["id"], i["file_name"]) for i in coco["images"]] == [
        (4, "b.jpg"),
        (20, "c.jpg"),
        (30, "a.jpg"),
    ]
    assert [(a["id"], a["image_id"]) for a in coco["annotations"]] == [
        (1, 4),
        (2, 20),
        (3, 30),
        (4, 30),
    ]
    assert run(tasks[::-1])[0] == coco


@pytest.mark.parametrize("ids", [(None, None), (0, 1), ("x", "y")])
def test_tasks_without_usable_ids_count_from_1(run, ids):
    tasks = [
        task(annotation(result()), id=i, image=f"{n}.jpg") for i, n in zip(ids, "ba", strict=True)
    ]
    coco, _ = run(tasks)
    assert [(i["id"], i["file_name"]) for i in coco["images"]] == [(1, "b.jpg"), (2, "a.jpg")]


# --- JSON_MIN ---


def record(id=1, image="a.jpg", **fields) -> dict:
    return {"image": image, "id": id, "annotator": 1, "annotation_id": id, **fields}


def test_json_min(run):
    size = {"original_width": 200, "original_height": 100}
    records = [
        record(
            label=[
                {"points": SQUARE, "closed": True, "polygonlabels": ["leaf"], **size},
                {"x": 0, "y": 0, "width": 10, "height": 10, "rotation": 0,
                 "rectanglelabels": ["rust"], **size},
            ],
            choice="sharp",
        ),
        record(2, "b.jpg"),
    ]  # fmt: skip
    coco, account = run(records)
    assert used(coco) == ["leaf", "rust"]
    assert coco["annotations"][0]["segmentation"] == [SQUARE_PX]
    assert [i["file_name"] for i in coco["images"]] == ["a.jpg", "b.jpg"]
    assert changes(account) == {}


def test_json_min_of_a_separate_labels_control(run):
    shape = {"points": SQUARE, "original_width": 200, "original_height": 100}
    labels = [{**shape, "labels": ["leaf"]}]
    quality = [{**shape, "choices": ["sharp"]}]
    for controls in (
        {"polygon": [shape], "label": labels, "quality": quality},
        {"quality": quality, "label": labels, "polygon": [shape]},
    ):
        coco, account = run([record(**controls)])
        assert used(coco) == ["leaf"]
        assert changes(account) == {}


def test_json_min_has_one_record_for_each_annotation(run):
    def one(number: int, label: str, when: str) -> dict:
        label = [{"points": SQUARE, "polygonlabels": [label]}]
        return record(annotation_id=number, updated_at=when, label=label)

    records = [one(8, "late", "2022-01-02T00:00:00Z"), one(9, "early", "2022-01-01T00:00:00Z")]
    coco, account = run(records)
    assert used(coco) == ["late"]
    assert len(coco["images"]) == 1
    assert changes(account) == {}
    assert sorted(used(run(records, annotations="all")[0])) == ["early", "late"]


# --- which field is the picture ---


def test_the_picture_under_another_name(run):
    tasks = [{**task(annotation(result())), "data": {"photo": "a.jpg", "plant": "7"}}]
    assert run(tasks)[0]["images"][0]["file_name"] == "a.jpg"
    tasks[0]["data"]["thumb"] = "b.jpg"
    with pytest.raises(ValueError, match=r"2 fields.*'photo', 'thumb'.*--image-key"):
        run(tasks)
    assert run(tasks, image_key="thumb")[0]["images"][0]["file_name"] == "b.jpg"


def test_tasks_of_several_pictures_are_refused(run):
    with pytest.raises(ValueError, match="several pictures"):
        run(export(result(), {**result(region="r2"), "to_name": "second"}))
    with pytest.raises(ValueError, match="several pictures"):
        run([task(annotation(result()), image=["a.jpg", "b.jpg"])])


# --- malformed exports ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('[{"id": 1, "data"', "is not JSON"),
        ("\ud83d".encode("utf-16", "surrogatepass").decode("latin-1"), "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1e5, " + "9" * 5000 + "]", "is not JSON"),
        ("[]", "is no export"),
        ('"text"', "is no export"),
        ('{"a": 1}', "is no export"),
        ("[1, 2]", r"export\.json: \[0\] must be an object"),
        ('[{"data": {"image": "a.jpg"}}, 3]', r"\[1\] must be an object"),
        ('[{"data": ["a.jpg"], "annotations": []}]', r"\[0\]\['data'\] must be an object"),
        ('[{"data": {"image": 5}, "annotations": []}]', "'image' must be a text"),
        ('[{"data": {"image": "a.jpg"}, "annotations": {"id": 1}}]', "must be a list"),
        ('[{"data": {"image": "a.jpg"}, "annotations": [7]}]', r"\[0\] must be an object, found 7"),
        (
            '[{"data": {"image": "a.jpg"}, "annotations": [{"result": ["x"]}]}]',
            r"\['result'\]\[0\] must be an object",
        ),
        ('[{"data": {"image": "a.jpg"}, "annotations": []}]', "no task has an annotation"),
        ('[{"data": {"text": "x"}, "annotations": []}]', "0 fields that look like pictures"),
    ],
)
def test_malformed_exports(run, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_no_such_export(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_export(tmp_path / "none.json")


def test_half_a_character_in_a_label(run):
    with pytest.raises(ValueError, match="half a character"):
        run(json.dumps(export(result(labels=["leaf\ud83d"]))))


def test_names_in_any_script(run):
    Image.new("RGB", (200, 100)).save(run.folder / "Blätter 葉.jpg")
    tasks = [task(annotation(result(labels=["Rebenblätter 🍇"])), image="Blätter 葉.jpg")]
    coco, _ = run(tasks)
    assert coco["images"][0]["file_name"] == "Blätter 葉.jpg"
    assert coco["categories"][0]["name"] == "Rebenblätter 🍇"


def test_labels_that_are_ignored_are_none_of_several(run):
    coco, account = run(export(result(labels=["rust", "unsure"])), ignore_labels=("unsure",))
    assert used(coco) == ["rust"] and changes(account) == {}
    several = export(result(labels=["unsure", "rust", "leaf"]))
    coco, account = run(several, ignore_labels=("unsure",))
    assert used(coco) == ["rust"] and changes(account) == {"regions with several labels": 1}


def test_a_byte_order_mark_does_not_matter(run):
    coco, _ = run("\ufeff" + json.dumps(export(result())))
    assert len(coco["annotations"]) == 1


def test_one_task_alone(run):
    coco, _ = run(task(annotation(result())))
    assert len(coco["annotations"]) == 1
