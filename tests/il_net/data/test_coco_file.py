"""Reading and writing COCO files."""

import json

import pytest

from il_net.data.coco_file import read_coco, write_coco

DOCUMENT = {
    "info": {"description": "Blätter"},
    "images": [{"id": 1, "file_name": "ä.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [],
    "categories": [{"id": 1, "name": "leaf"}],
}


@pytest.mark.parametrize("document", [DOCUMENT, {}, {"images": []}])
def test_what_is_written_is_json_s_own_text(tmp_path, document):
    path = tmp_path / "new" / "x.json"
    write_coco(path, document)
    assert path.read_text(encoding="utf-8") == json.dumps(document, ensure_ascii=False) + "\n"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_the_old_file_stays_when_writing_fails(tmp_path):
    path = tmp_path / "x.json"
    write_coco(path, DOCUMENT)
    with pytest.raises(ValueError):
        write_coco(path, {"images": [{"width": float("nan")}]})
    assert read_coco(path) == DOCUMENT


def test_what_is_no_coco_file_is_named(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*x\.json"):
        read_coco(path)
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "holds a JSON list"),
        ('{"images": [], "annotations": {}}', "has a list 'annotations'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"x.json.*{message}"):
            read_coco(path)
