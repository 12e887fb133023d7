"""Every mistake a COCO file can have is counted, named and rightly fatal or not."""

import json
import time
from pathlib import Path

import pytest

from il_net.data.coco_file import parsed_once, read_coco_json
from il_net.data.report import Findings, Report, Severity
from il_net.data.validate import validate_coco, validate_datasets

REPO = Path(__file__).parents[3]
DATA = REPO.parent / "shared" / "data"


def good_coco() -> dict:
    """Two images of 100 x 50 px, two classes with a gap in the ids, three boxes."""
    return {
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 100, "height": 50},
            {"id": 2, "file_name": "sub/b.jpg", "width": 100, "height": 50},
        ],
        "annotations": [
            {"id": 11, "image_id": 1, "category_id": 3, "bbox": [0, 0, 100, 50]},
            {"id": 12, "image_id": 1, "category_id": 7, "bbox": [10.5, 10, 5, 5], "iscrowd": 1},
            {"id": 13, "image_id": 2, "category_id": 3, "bbox": [90, 40, 10, 10]},
        ],
        "categories": [{"id": 3, "name": "leaf"}, {"id": 7, "name": "rust"}],
    }


def check(tmp_path: Path, data: object, *, labeled: bool = True):
    """Write the file and its pictures, and validate."""
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True, exist_ok=True)
    (root / "a.jpg").touch()
    (root / "sub" / "b.jpg").touch()
    json_file = tmp_path / "data.json"
    json_file.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return validate_coco(str(json_file), str(root), labeled=labeled)


def test_good_file_has_no_problems(tmp_path):
    report = check(tmp_path, good_coco())
    assert report.problems == ()
    counts = (report.num_images, report.num_annotations, report.num_categories, report.num_crowd)
    assert counts == (2, 3, 2, 1)
    assert report.num_images_without_annotations == 0
    assert "2 images (0 without annotations), 3 annotations (1 crowd)" in report.summary()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not JSON"),
        ("\ufeff{}", "is not JSON"),
        ("[1]", "holds a JSON list"),
        ("{}", "'images' is missing"),
        ('{"images": [], "annotations": []}', "'categories' is missing"),
        ('{"images": [], "categories": []}', "'annotations' is missing"),
        ('{"images": {}, "annotations": [], "categories": []}', "'images' is of type dict"),
    ],
)
def test_broken_structure_is_fatal(tmp_path, text, expected):
    report = check(tmp_path, text)
    assert expected in "\n".join(map(str, report.fatal))
    assert str(tmp_path / "data.json") in report.summary()


def test_missing_json_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        validate_coco(str(tmp_path / "nothing.json"), str(tmp_path), labeled=True)


def change(path: tuple, value: object):
    """An edit of the good file: set, or with `...` delete, the entry at `path`."""

    def edit(data: dict) -> None:
        for key in path[:-1]:
            data = data[key]
        if value is ...:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return edit


NEW_BOX = {"id": 14, "image_id": 2, "category_id": 3}

FATAL = {
    "no images": (change(("images",), []), "no images", 1, ""),
    "no annotations": (change(("annotations",), []), "no annotations to train on", 1, ""),
    "missing file": (change(("images", 0, "file_name"), "c.jpg"), "files missing", 1, "c.jpg"),
    "missing folder": (change(("images", 0, "file_name"), "x/a.jpg"), "missing", 1, "x/a.jpg"),
    "dot dot": (change(("images", 0, "file_name"), "../a.jpg"), "leave the", 1, "../a.jpg"),
    "hidden dot dot": (
        change(("images", 0, "file_name"), "sub/../../a.jpg"), "leave the", 1, "sub/../../a.jpg",
    ),
    "dot dot inside": (
        change(("images", 1, "file_name"), "sub/../a.jpg"), "leave the", 1, "sub/../a.jpg",
    ),
    "absolute": (change(("images", 0, "file_name"), "/etc/hosts"), "leave the", 1, "/etc/hosts"),
    "image id twice": (change(("images", 1, "id"), 1), "image ids used twice", 1, "1"),
    "image id missing": (change(("images", 1, "id"), ...), "images without 'id'", 1, "images[1]"),
    "image width": (change(("images", 1, "width"), 0), "images without", 1, "images[1]"),
    "image part": (change(("images", 1, "width"), 99.5), "images without", 1, "images[1]"),
    "image no record": (change(("images", 1), 5), "images without 'id'", 1, "images[1]"),
    "mixed image ids": (change(("images", 1, "id"), "b"), "partly numbers, partly strings", 1, ""),
    "annotation id twice": (
        change(("annotations", 2, "id"), 11), "annotation ids used twice", 1, "11",
    ),
    "annotation without id": (
        change(("annotations", 2, "id"), ...), "annotations without 'id'", 1, "annotations[2]",
    ),
    "dangling": (
        change(("annotations", 2, "image_id"), 9), "image that is not in the file", 1,
        "annotation 13 (image 9)",
    ),
    "unknown category": (
        change(("annotations", 2, "category_id"), 4), "unknown category ids", 1,
        "4 in annotation 13 (image 2)",
    ),
    "category id twice": (change(("categories", 1, "id"), 3), "category ids used twice", 1, "3"),
    "category name twice": (
        change(("categories", 1, "name"), "leaf"), "category names used twice", 1, "'leaf'",
    ),
    "category no name": (
        change(("categories", 1, "name"), ...), "categories without", 1, "categories[1]",
    ),
    "ignore": (change(("annotations", 2, "ignore"), 1), "'ignore' set", 1, "annotation 13"),
    **{
        f"crowd {value}": (
            change(("annotations", 2, "iscrowd"), value), "neither 0 nor 1", 1, "annotation 13",
        )
        for value in (None, "no", 2, [0], float("nan"))
    },
    **{
        f"keypoints {value}": (
            change(("annotations", 2, "keypoints"), value), "'keypoints' are no", 1, "annotation 13"
        )
        for value in ("abc", 7, [1, 2, "2"], {"a": 1}, [float("nan"), 1, 2])
    },
    **{
        f"segmentation {value}": (
            change(("annotations", 2, "segmentation"), value), "neither lists", 1, "annotation 13",
        )
        for value in (
            "abc", 7, [1, 2, 3, 4, 5, 6], [["1"] * 6], [[1, 2, 3, 4, 5, float("inf")]], [None],
            {"counts": [5000]}, {"size": [50, 100], "counts": [5]}, {"size": [50], "counts": "zz"},
        )
    },
    **{
        f"box {box}": (
            change(("annotations", 2, "bbox"), box), "not four finite numbers", 1,
            f"annotation 13 (image 2) {box}",
        )
        for box in (
            [1, 2, 3], [1, 2, 3, "4"], None, [1, 2, 3, True], [1, 2, 3, float("nan")],
            [1, float("inf"), 3, 4],
        )
    },
    "negative size": (
        change(("annotations", 2, "bbox"), [50, 20, -5, 5]), "boxes of negative size", 1,
        "annotation 13 (image 2) [50, 20, -5, 5]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FATAL)
def test_fatal_problem_is_counted_and_named(tmp_path, case):
    edit, kind, count, offender = FATAL[case]
    data = good_coco()
    edit(data)
    found = [p for p in check(tmp_path, data).fatal if kind in p.kind]
    assert len(found) == 1
    assert found[0].count == count
    assert offender in str(found[0])


WARNINGS = {
    "zero size": ([10, 10, 0, 5], "boxes of zero size"),
    "right of the image": ([100, 10, 5, 5], "boxes wholly outside the image"),
    "above the image": ([10, -5, 5, 5], "boxes wholly outside the image"),
    "over the right edge": ([90, 10, 11.5, 5], "boxes partly outside the image"),
    "over the upper edge": ([10, -1.5, 5, 5], "boxes partly outside the image"),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_box_warning_is_counted_and_named(tmp_path, case):
    box, kind = WARNINGS[case]
    data = good_coco()
    data["annotations"].append({**NEW_BOX, "bbox": box})
    report = check(tmp_path, data)
    assert report.fatal == ()
    assert [(p.kind, p.count) for p in report.warnings] == [(kind, 1)]
    assert f"annotation 14 (image 2) {box}" in report.summary()


@pytest.mark.parametrize("box", [[90, 10, 11, 5], [-1, -1, 5, 5]])
def test_one_pixel_over_the_edge_is_tolerated(tmp_path, box):
    data = good_coco()
    data["annotations"].append({**NEW_BOX, "bbox": box})
    assert check(tmp_path, data).problems == ()


def test_annotation_id_zero_is_a_warning(tmp_path):
    data = good_coco()
    data["annotations"][0]["id"] = 0
    report = check(tmp_path, data)
    assert [(p.kind, p.count, p.fatal) for p in report.problems] == [
        ("annotations with id 0", 1, False)
    ]


def test_first_five_of_many_are_named(tmp_path):
    data = good_coco()
    data["annotations"] += [
        {"id": 100 + i, "image_id": 2, "category_id": 3, "bbox": [0, 0, 0, 0]} for i in range(8)
    ]
    text = str(check(tmp_path, data).warnings[0])
    assert text.startswith("warning: 8 boxes of zero size")
    assert "annotation 104" in text
    assert "annotation 105" not in text
    assert text.endswith("...")


def test_the_worst_comes_first():
    findings = Findings()
    for severity in (Severity.NOTE, Severity.ERROR, Severity.WARNING):
        findings.add("things", ["a"], severity=severity)
    report = Report("data.json", "pictures", problems=tuple(findings.problems))
    assert [line.split(":")[0].strip() for line in report.summary().splitlines()[1:]] == [
        "error",
        "warning",
        "note",
    ]
    assert len(report.fatal) == len(report.warnings) == 1


def test_missing_image_folder_is_fatal(tmp_path):
    json_file = tmp_path / "data.json"
    json_file.write_text(json.dumps(good_coco()))
    report = validate_coco(str(json_file), str(tmp_path / "nowhere"), labeled=True)
    assert [p.kind for p in report.fatal] == [f"there is no image folder {tmp_path / 'nowhere'}"]


def test_only_crowd_is_nothing_to_train_on(tmp_path):
    data = good_coco()
    data["annotations"] = [data["annotations"][1]]
    assert "no annotations to train on (1 crowd" in check(tmp_path, data).summary()
    report = check(tmp_path, data, labeled=False)
    assert report.problems == ()
    assert report.num_images_without_annotations == 1


def test_test_file_may_lack_annotations(tmp_path):
    data = good_coco()
    del data["annotations"]
    report = check(tmp_path, data, labeled=False)
    assert report.problems == ()
    assert (report.num_annotations, report.num_images_without_annotations) == (0, 2)


def test_masks_need_segmentation(tmp_path):
    data = good_coco()
    for annotation in data["annotations"]:
        annotation["segmentation"] = [[0, 0, 5, 0, 5, 5]]
    data["annotations"][2]["segmentation"] = []  # as sets with boxes only have it
    check(tmp_path, data)
    files = str(tmp_path / "data.json"), str(tmp_path / "pictures")
    report = validate_coco(*files, labeled=True, masks=True)
    assert [str(problem) for problem in report.fatal if "MODEL.MASK_ON" in str(problem)]
    assert "annotation 13" in report.summary()
    assert validate_coco(*files, labeled=True).problems == ()


@pytest.mark.parametrize(
    ("segmentation", "fatal", "only_scored"),
    [  # an image of 100 x 50 px
        ([[0, 0, 5, 0, 5, 5]], "", False),
        ({"size": [50, 100], "counts": [0, 5000]}, "", False),
        ({"size": [50.0, 100], "counts": [0, 5000]}, "", False),
        ({"size": [100, 50], "counts": [0, 5000]}, "RLE masks of another size", False),
        # pycocotools takes four numbers for a box, and refuses fewer; training leaves them out.
        ([[0, 0, 5, 5]], "polygons with an odd number", True),
        ([[0, 0, 5, 0, 5, 5], []], "polygons with an odd number", True),
        ([[0, 0, 5, 0, 5, 5, 7]], "polygons with an odd number", True),
    ],
)
def test_masks_that_are_compared(tmp_path, segmentation, fatal, only_scored):
    data = good_coco()
    for annotation in data["annotations"]:
        annotation.update(segmentation=[[0, 0, 5, 0, 5, 5]], area=12.5, iscrowd=0)
    data["annotations"][2]["segmentation"] = segmentation
    check(tmp_path, data)
    files = str(tmp_path / "data.json"), str(tmp_path / "pictures")
    for masks in (False, True):
        for scored in (False, True):
            report = validate_coco(*files, labeled=True, scored=scored, masks=masks)
            expected = [fatal] if fatal and masks and (scored or not only_scored) else []
            assert [p.kind[: len(fatal)] for p in report.fatal] == expected
            assert all(p.offenders == ("annotation 13 (image 2)",) for p in report.fatal)


def test_a_mask_without_its_image_is_of_no_other_size(tmp_path):
    """One fault is told once."""
    data = good_coco()
    for annotation in data["annotations"]:
        annotation["segmentation"] = [[0, 0, 5, 0, 5, 5]]
    rle = {"size": [50, 100], "counts": [0, 5000]}
    data["annotations"][2].update(image_id=9, segmentation=rle)
    check(tmp_path, data)
    files = str(tmp_path / "data.json"), str(tmp_path / "pictures")
    (problem,) = validate_coco(*files, labeled=True, masks=True).fatal
    assert str(problem).startswith("error: 1 annotations of an image that is not in the file")


@pytest.mark.parametrize("annotation_id", ["13", 2**53 + 1, 10**400])
def test_scored_file_needs_ids_that_are_numbers(tmp_path, annotation_id):
    """COCO's metrics put them into an array of floating-point numbers."""
    data = good_coco()
    for annotation in data["annotations"]:
        annotation.update(area=25, iscrowd=0)
    data["annotations"][2]["id"] = annotation_id
    check(tmp_path, data)
    files = str(tmp_path / "data.json"), str(tmp_path / "pictures")
    assert validate_coco(*files, labeled=True).problems == ()
    (problem,) = validate_coco(*files, labeled=False, scored=True).fatal
    assert "'id' is no integer up to 9007199254740992" in problem.kind
    assert problem.offenders == (f"annotation {annotation_id} (image 2)",)


def test_scored_file_needs_areas_and_iscrowd(tmp_path):
    data = good_coco()
    check(tmp_path, data)
    files = str(tmp_path / "data.json"), str(tmp_path / "pictures")
    assert validate_coco(*files, labeled=True).problems == ()
    report = validate_coco(*files, labeled=True, scored=True)
    assert str(report.fatal[0]).startswith("error: 3 annotations without a number 'area'")
    assert "annotation 12 (image 1)" in report.summary()
    assert str(report.fatal[1]).startswith("error: 2 annotations without 'iscrowd'")
    for annotation in data["annotations"]:
        annotation["area"] = 25
        annotation.setdefault("iscrowd", 0)
    check(tmp_path, data)
    assert validate_coco(*files, labeled=False, scored=True).problems == ()


def test_detectron2_treats_boxes_as_the_warnings_say():
    """Zero-size and outside boxes vanish, a negative one is mirrored: hence its being fatal."""
    utils = pytest.importorskip("detectron2.data.detection_utils")
    transforms = pytest.importorskip("detectron2.data.transforms")
    structures = pytest.importorskip("detectron2.structures")
    flip = transforms.TransformList([transforms.HFlipTransform(100)])

    def trained_on(box: list[float]) -> list[list[float]]:
        record = {"bbox": box, "bbox_mode": structures.BoxMode.XYWH_ABS, "category_id": 0}
        record = utils.transform_instance_annotations(record, flip, (50, 100))
        instances = utils.annotations_to_instances([record], (50, 100))
        return utils.filter_empty_instances(instances).gt_boxes.tensor.tolist()

    assert trained_on([10, 10, 0, 5]) == []
    assert trained_on([100, 10, 5, 5]) == []
    assert trained_on([90, 10, 20, 5]) == [[0, 10, 10, 15]]  # clipped to 90..100, then flipped
    assert trained_on([50, 20, -5, 5]) == [[50, 20, 55, 25]]  # 45..50, flipped in 100 px


def test_validate_datasets_names_dataset_file_and_counts(tmp_path):
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.data import MetadataCatalog

    data = good_coco()
    data["annotations"][0]["category_id"] = 99
    check(tmp_path, data)
    json_file = str(tmp_path / "data.json")
    MetadataCatalog.get("validate_me").set(
        json_file=json_file, image_root=str(tmp_path / "pictures"), evaluator_type="coco"
    )
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("validate_me",), ()
    try:
        with pytest.raises(ValueError, match="validate_me") as e:
            validate_datasets(cfg)
        assert json_file in str(e.value)
        assert "error: 1 unknown category ids: 99 in annotation 11 (image 1)" in str(e.value)
        check(tmp_path, good_coco())
        validate_datasets(cfg)
        # Labels are asked of training sets only.
        check(tmp_path, {**good_coco(), "annotations": []})
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("validate_me",)
        validate_datasets(cfg)
        check(tmp_path, good_coco())
        with pytest.raises(ValueError, match="3 annotations without a number 'area'"):
            validate_datasets(cfg)
        check(tmp_path, {**good_coco(), "annotations": []})
        cfg.DATASETS.TRAIN = ("validate_me",)
        with pytest.raises(ValueError, match="no annotations to train on"):
            validate_datasets(cfg)
        (tmp_path / "data.json").unlink()
        with pytest.raises(FileNotFoundError, match="validate_me.*data.json"):
            validate_datasets(cfg)
    finally:
        MetadataCatalog.pop("validate_me")


def test_what_others_read_is_left_alone(tmp_path):
    """Lists that a file of images may lack are not added to what `parsed_once` shares."""
    (tmp_path / "data.json").write_text('{"images": []}')
    with parsed_once():
        validate_coco(str(tmp_path / "data.json"), str(tmp_path), labeled=False)
        assert read_coco_json(tmp_path / "data.json") == {"images": []}


def test_time_grows_slowly(tmp_path):
    """A twentieth of COCO's train2017 within 3 s, so that the whole takes a minute at most."""
    num_images, per_image = 5900, 7
    data = good_coco()
    data["images"] = [
        {"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(num_images)
    ]
    data["annotations"] = [
        {"id": 1 + i, "image_id": i // per_image, "category_id": 3, "bbox": [i % 600, 5, 9, 9.5]}
        for i in range(num_images * per_image)
    ]
    (tmp_path / "pictures").mkdir()
    for i in range(num_images):
        (tmp_path / "pictures" / f"{i}.jpg").touch()
    start = time.process_time()
    report = check(tmp_path, data)
    assert time.process_time() - start < 3
    assert report.problems == ()
    assert report.num_annotations == 41300


@pytest.mark.parametrize(
    ("name", "split", "images", "annotations", "categories"),
    [  # counts: the READMEs of the data sets
        ("coffee_leaf", "train", 338, 1517, 5),
        ("coffee_leaf", "val", 42, 209, 5),
        ("bccd", "train", 205, 2804, 3),
        ("bccd", "val", 87, 1137, 3),
    ],
)
def test_real_data_is_sound(name, split, images, annotations, categories):
    json_file = DATA / name / "annotations" / f"instances_{split}.json"
    if not json_file.is_file():
        pytest.skip(f"needs the public data set {name} in ../shared/data beside the repository")
    report = validate_coco(str(json_file), str(DATA / name / "images"), labeled=True)
    assert report.problems == ()
    counts = (report.num_images, report.num_annotations, report.num_categories)
    assert counts == (images, annotations, categories)
