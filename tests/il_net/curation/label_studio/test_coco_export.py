"""Label Studio's COCO export: each thing that is known to be wrong in it is mended and told."""

import json

import pytest
from detectron2.data.datasets import load_coco_json
from PIL import Image

from il_net.curation.label_studio.convert import convert
from il_net.curation.label_studio.records import Choices
from il_net.data.report import Severity
from il_net.data.validate import validate_coco

CORNERS = [20, 20, 100, 20, 100, 60, 20, 60]


@pytest.fixture
def run(tmp_path):
    """Convert an export of pictures a.jpg, b.jpg of 200 x 100; returns (coco, account)."""
    (tmp_path / "p").mkdir()
    for name in "ab":
        Image.new("RGB", (200, 100)).save(tmp_path / "p" / f"{name}.jpg")

    def call(export: object, **choices: object):
        (tmp_path / "result.json").write_text(json.dumps(export))
        done = convert(tmp_path / "result.json", tmp_path / "p", Choices(**choices))
        return done.coco, done.account

    call.folder = tmp_path
    return call


def image(id=0, name="images/1a2b3c4d-a.jpg", width=200, height=100) -> dict:
    return {"id": id, "file_name": name, "width": width, "height": height}


def polygon(id=0, image_id=0, category_id=0, corners=CORNERS, **fields) -> dict:
    return {
        "id": id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": [list(corners)],
        "bbox": [20, 20, 80, 40],
        "ignore": 0,
        "iscrowd": 0,
        "area": 3200,
        **fields,
    }


def box(id=0, image_id=0, category_id=0, sides=(10, 20, 30, 40), **fields) -> dict:
    area = sides[2] * sides[3]
    record = polygon(id, image_id, category_id, bbox=list(sides), area=area)
    return {**record, "segmentation": [], **fields}


def export(*annotations: dict, images=None) -> dict:
    return {
        "images": images or [image()],
        "categories": [{"id": 0, "name": "leaf"}, {"id": 1, "name": "rust"}],
        "annotations": list(annotations),
        "info": {"year": 2022, "version": "1.0", "contributor": "Label Studio"},
    }


def changes(account) -> dict[str, int]:
    return {p.kind: p.count for p in account.problems(Severity.WARNING)}


def test_a_usual_export(run):
    coco, account = run(export(polygon(0), polygon(1, category_id=1)))
    assert coco["images"] == [{"id": 1, "file_name": "a.jpg", "width": 200, "height": 100}]
    assert [a["id"] for a in coco["annotations"]] == [1, 2]
    assert [a["category_id"] for a in coco["annotations"]] == [0, 1]
    assert coco["annotations"][0] == {
        "id": 1,
        "image_id": 1,
        "category_id": 0,
        "bbox": [20, 20, 80, 40],
        "area": 3200,
        "segmentation": [CORNERS],
        "iscrowd": 0,
    }
    assert coco["licenses"] == []
    assert changes(account) == {}
    assert any("id 0" in note for note in account.notes)


def test_the_result_is_sound_for_detectron2(run):
    coco, _ = run(export(polygon(0), box(1, category_id=1)))
    json_file = run.folder / "clean.json"
    json_file.write_text(json.dumps(coco))
    report = validate_coco(str(json_file), str(run.folder / "p"), labeled=True)
    assert report.problems == ()
    (record,) = load_coco_json(str(json_file), str(run.folder / "p"))
    assert [len(a["segmentation"][0]) for a in record["annotations"]] == [8, 8]


def test_class_ids_are_kept_renumbered_or_given(run):
    tasks = export(polygon(category_id=1))
    assert run(tasks)[0]["categories"] == [{"id": 0, "name": "leaf"}, {"id": 1, "name": "rust"}]
    ids = [c["id"] for c in run(tasks, first_id=5)[0]["categories"]]
    assert ids == [5, 6]
    coco, _ = run(tasks, table={"rust": 13, "leaf": 6})
    assert coco["categories"] == [{"id": 6, "name": "leaf"}, {"id": 13, "name": "rust"}]
    assert coco["annotations"][0]["category_id"] == 13
    coco, _ = run(export(polygon(0), polygon(1, category_id=1)), ignore_labels=("leaf",))
    assert coco["categories"] == [{"id": 1, "name": "rust"}]
    assert len(coco["annotations"]) == 1


def test_a_class_that_the_table_lacks_matters_only_if_used(run):
    assert run(export(polygon()), table={"leaf": 3})[0]["categories"] == [{"id": 3, "name": "leaf"}]
    with pytest.raises(ValueError, match=r"--categories lacks 1 labels.*rust"):
        run(export(polygon(category_id=1)), table={"leaf": 3})


@pytest.mark.parametrize(
    ("sides", "expected"),
    [((10, 20, 30, 40), [10, 20, 40, 20, 40, 60, 10, 60]), ((10.5, 0, 3.25, 9), None)],
)
def test_rectangles_get_corners_only_beside_polygons(run, sides, expected):
    alone, account = run(export(box(sides=sides)))
    assert (alone["annotations"][0]["segmentation"], alone["annotations"][0]["bbox"]) == (
        [],
        list(sides),
    )
    beside, _ = run(export(box(sides=sides), polygon(1)))
    if expected:
        assert beside["annotations"][0]["segmentation"] == [expected]
    assert changes(account) == {}


@pytest.mark.parametrize(
    "name",
    [
        "images/1a2b3c4d-a.jpg",
        "images/7/1a2b3c4d-a.jpg",
        "images\\1a2b3c4d-a.jpg",
        "/home/somebody/a.jpg",
        "../../label-studio/data/media/upload/7/1a2b3c4d-a.jpg",
        "images/1a2b3c4d-%61.jpg",
    ],
)
def test_forms_of_file_names(run, name):
    coco, account = run(export(polygon(), images=[image(name=name)]))
    assert coco["images"][0]["file_name"] == "a.jpg"
    assert changes(account) == {}


def test_a_picture_labelled_twice_is_one_image(run):
    # Two people, one file: the later entry; of an entry without regions, the other one.
    images = [image(0), image(1), image(2)]
    tasks = export(polygon(0, 0), polygon(1, 1, 1), images=images)
    coco, account = run(tasks)
    assert len(coco["images"]) == 1
    assert [a["category_id"] for a in coco["annotations"]] == [1]
    assert changes(account) == {"pictures that are in the export more than once": 1}
    coco, _ = run(tasks, annotations="all")
    assert [a["category_id"] for a in coco["annotations"]] == [0, 1]
    assert len(coco["images"]) == 1


def test_swapped_sides_of_a_photo_stored_turned(run):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 200)).save(run.folder / "p" / "a.jpg", exif=exif)
    # The exporter multiplied percent of the upright picture by the stored size, 100 x 200.
    corners = [10, 40, 50, 40, 50, 120, 10, 120]
    tasks = export(
        polygon(corners=corners, bbox=[10, 40, 40, 80]), images=[image(width=100, height=200)]
    )
    coco, account = run(tasks)
    assert coco["images"][0]["width"] == 200
    assert coco["annotations"][0]["segmentation"] == [CORNERS]
    assert coco["annotations"][0]["bbox"] == [20, 20, 80, 40]
    ((kind, count),) = changes(account).items()
    assert "swapped" in kind and count == 1


def test_pictures_without_a_size(run):
    unread = image(1, "images/b.jpg", None, None)
    coco, account = run(export(polygon(), images=[image(), unread]))
    assert [(i["width"], i["height"]) for i in coco["images"]] == [(200, 100)] * 2
    assert changes(account) == {}
    coco, account = run(export(polygon(), polygon(1, 1), images=[image(), unread]))
    assert [i["file_name"] for i in coco["images"]] == ["a.jpg"]
    assert changes(account)["annotations of a picture without a size"] == 1


@pytest.mark.parametrize("fields", [{"area": None}, {"area": 0}])
def test_a_missing_area_is_measured(run, fields):
    coco, account = run(export(polygon(**fields)))
    assert coco["annotations"][0]["area"] == 3200
    assert changes(account) == {"annotations without an area": 1}


def test_area_and_box_are_those_of_the_outline(run):
    coco, _ = run(export(polygon(area=1, bbox=[0, 0, 1, 1])))
    assert coco["annotations"][0]["area"] == 3200
    assert coco["annotations"][0]["bbox"] == [20, 20, 80, 40]


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        (box(1, sides=(10, 20, 0, 40)), "regions of less than a pixel"),
        (box(1, sides=(10, 20, float("nan"), 40)), "annotations without usable coordinates"),
        (box(1, sides=(210, 20, 10, 40)), "regions of less than a pixel"),
        (box(1, bbox=None), "annotations without usable coordinates"),
        (polygon(1, segmentation=[[1, 2, 3, 4, 5]]), "annotations without usable coordinates"),
        (polygon(1, segmentation=[1, 2, 3, 4, 5, 6]), "annotations without usable coordinates"),
        (polygon(1, segmentation={"size": [1, 1]}), "annotations without usable coordinates"),
        (polygon(1, segmentation=[[1, 2, 3, 4]]), "regions of less than a pixel"),
        (polygon(1, image_id=9), "annotations of a picture that is not in the file"),
        (polygon(1, iscrowd=1), "annotations with 'iscrowd' or 'ignore'"),
        (polygon(1, ignore=1), "annotations with 'iscrowd' or 'ignore'"),
        (polygon(1), "regions drawn twice"),
    ],
)
def test_what_is_dropped_is_told(run, annotation, kind):
    coco, account = run(export(polygon(), annotation))
    assert len(coco["annotations"]) == 1
    told = [count for told, count in changes(account).items() if told.startswith(kind)]
    assert told == [1]


def test_a_box_is_cut_to_the_picture(run):
    coco, account = run(export(box(sides=(-10, 20, 30, 40))))
    assert coco["annotations"][0]["bbox"] == [0, 20, 20, 40]
    assert coco["annotations"][0]["area"] == 800
    assert changes(account) == {"regions that reach out of their picture": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {}}, "'images' must be a list"),
        ({"annotations": None}, "'annotations' must be a list"),
        ({"categories": "leaf"}, "'categories' must be a list"),
        ({"images": [3]}, r"images\[0\] must be an object with a 'file_name'"),
        ({"images": [{"id": 0, "file_name": None}]}, r"images\[0\]"),
        ({"images": [image(), image()]}, r"images\[1\].*no other image has"),
        ({"images": [image("0")]}, r"images\[0\].*whole number"),
        ({"categories": [{"id": "0", "name": "leaf"}]}, r"categories\[0\] must have an integer"),
        ({"categories": [{"id": 0, "name": "a"}] * 2}, r"categories\[1\] repeats"),
        ({"annotations": ["x"]}, r"annotations\[0\] must be an object"),
        ({"annotations": [polygon(category_id=7)]}, "category_id 7, which 'categories' lacks"),
        ({"annotations": [polygon(category_id=None)]}, "whole numbers"),
        ({"images": [image(name="images/none.jpg")]}, "none of the 1 pictures.*--images"),
    ],
)
def test_malformed_exports(run, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        run({**export(polygon()), **change})
    assert "\n" not in str(caught.value)


def test_options_that_a_coco_export_cannot_serve(run):
    with pytest.raises(ValueError, match="--label-from"):
        run(export(polygon()), label_from=("label",))
