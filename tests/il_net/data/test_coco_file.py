"""Reading and writing COCO files."""

import gc
import json

import pytest

from il_net.data.coco_file import (
    parsed_once,
    paused_gc,
    read_coco,
    read_coco_json,
    read_json,
    take_coco_json,
    write_coco,
)

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
    for record, message in (({"width": float("nan")}, "Out of range"), ("\ud83d", "surrogates")):
        with pytest.raises(ValueError, match=rf"'images\[1\]' can't be written: .*{message}"):
            write_coco(path, {"images": [{}, record]})
        assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(ValueError, match="'info' can't be written"):
        write_coco(path, {"info": {"year": float("inf")}})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # cannot be replaced
        write_coco(tmp_path / "folder", DOCUMENT)
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", "folder"}
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


@pytest.mark.parametrize("read", [read_json, read_coco_json, read_coco])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"images": ' + b"9" * 5000 + b"}", "is not JSON: .*digits"),
        (b"\xff\xfe{}", "is not JSON: .*utf-8"),
        (rb'{"images": ["\ud83d"]}', "is not JSON: .*utf-8.*surrogates"),
        (rb'{"images": ["\uDE00\uD83D"]}', "is not JSON: .*utf-8.*surrogates"),
        (b"\xef\xbb\xbf{}", "is not JSON: it begins with a byte order mark; save it"),
    ],
    ids=["lists", "objects", "digits", "encoding", "half a character", "two halves", "mark"],
)
def test_odd_json_is_named(tmp_path, read, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json.* {message}"):
        read(path)


def test_a_character_of_two_escapes_is_whole(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(r'["\ud83d\ude00", "\\ud83d"]')
    assert read_json(path) == ["\N{GRINNING FACE}", r"\ud83d"]


def test_a_byte_order_mark_where_it_may_be(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa4"}')
    assert read_json(path, mark_allowed=True) == {"a": "ä"}


def test_a_file_is_parsed_once_until_it_is_taken_or_changes(tmp_path):
    path, other = tmp_path / "x.json", tmp_path / "y.json"
    write_coco(path, DOCUMENT)
    write_coco(other, {})
    assert read_coco_json(path) is not read_coco_json(path)
    with parsed_once():
        first = read_coco_json(path)
        assert read_coco_json(str(path)) is first
        assert read_coco_json(other) == {}
        assert take_coco_json(path) is first
        second = read_coco_json(path)
        assert second == first
        assert second is not first
        write_coco(path, {"images": []})
        assert read_coco_json(path) == {"images": []}
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"there is no file .*x\.json"):
            read_coco_json(path)
        path.write_text("[]")
        for _ in range(2):  # what is no COCO file is none when it is read again
            with pytest.raises(ValueError, match="holds a JSON list"):
                read_coco_json(path)
        kept = read_coco_json(other)
    assert read_coco_json(other) is not kept  # nothing is held any longer


def test_gc_goes_on_as_before():
    assert gc.isenabled()
    with pytest.raises(ValueError, match="out"), paused_gc():
        with paused_gc():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise ValueError("out")
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
