"""Finding pictures by the names that exports use, and never outside the image folder."""

import os
import unicodedata

import pytest

from il_net.curation.label_studio.images import ImageFolder

BY_PATH = "by their path"
BY_TAIL = "by the end of their path"
BY_NAME = "by name alone, in a subfolder"
WITHOUT_PREFIX = "without the prefix that Label Studio gives to uploads"
WITH_PREFIX = "with the prefix that Label Studio gives to uploads"


def make(tmp_path, *names: str) -> ImageFolder:
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    return ImageFolder(tmp_path / "photos")


@pytest.mark.parametrize(
    ("files", "reference", "found", "rule"),
    [
        ("a.jpg", "a.jpg", "a.jpg", BY_PATH),
        ("sub/a.jpg", "sub/a.jpg", "sub/a.jpg", BY_PATH),
        ("1a2b3c4d-a.jpg", "/data/upload/3/1a2b3c4d-a.jpg", "1a2b3c4d-a.jpg", BY_TAIL),
        ("a.jpg", "/data/upload/3/1a2b3c4d-a.jpg", "a.jpg", WITHOUT_PREFIX),
        ("a.jpg", "/data/upload/1a2b3c4d-a.jpg", "a.jpg", WITHOUT_PREFIX),
        ("1a2b3c4d-a.jpg", "a.jpg", "1a2b3c4d-a.jpg", WITH_PREFIX),
        ("deep/down/a.jpg", "/data/upload/1a2b3c4d-a.jpg", "deep/down/a.jpg", WITHOUT_PREFIX),
        ("deep/a.jpg", "a.jpg", "deep/a.jpg", BY_NAME),
        ("vine/a b.jpg", "/data/local-files/?d=set/vine/a%20b.jpg", "vine/a b.jpg", BY_TAIL),
        ("a+b.jpg", "/data/local-files/?d=a+b.jpg", "a+b.jpg", BY_PATH),
        ("a b.jpg", "/data/local-files/?d=a+b.jpg", "a b.jpg", BY_PATH),
        ("a b.jpg", "https://host.example/x/a%20b.jpg?sig=c.jpg", "a b.jpg", BY_TAIL),
        ("a.jpg", "s3://bucket/x/a.jpg", "a.jpg", BY_TAIL),
        ("a.jpg", "gs://bucket/a.jpg", "a.jpg", BY_PATH),
        ("a.jpg", "azure-blob://box/x/a.jpg", "a.jpg", BY_TAIL),
        ("a.jpg", "http://[broken/a.jpg", "a.jpg", BY_TAIL),
        ("100%25.jpg", "100%25.jpg", "100%25.jpg", BY_PATH),  # as written comes first
        ("what?.jpg", "what?.jpg", "what?.jpg", BY_PATH),
        ("a.jpg", "images\\1a2b3c4d-a.jpg", "a.jpg", WITHOUT_PREFIX),
        ("a.jpg", "C:\\photos\\a.jpg", "a.jpg", BY_TAIL),
        ("a.jpg", "../../label-studio/data/media/upload/2/a.jpg", "a.jpg", BY_TAIL),
        ("a.jpg", "images/%31a2b3c4d-a.jpg", "a.jpg", WITHOUT_PREFIX),
        ("1A2B3C4D-a.jpg", "1A2B3C4D-a.jpg", "1A2B3C4D-a.jpg", BY_PATH),
    ],
)
def test_forms_of_a_reference(tmp_path, files, reference, found, rule):
    assert make(tmp_path, files).find([reference]) == (found, rule)


def test_the_longest_end_of_the_path_decides(tmp_path):
    folder = make(tmp_path, "a.jpg", "x/a.jpg", "y/a.jpg")
    assert folder.find(["/mnt/set/y/a.jpg"]) == ("y/a.jpg", BY_TAIL)
    assert folder.find(["/mnt/set/z/a.jpg"]) == ("a.jpg", BY_TAIL)


def test_an_exact_name_comes_before_one_without_prefix(tmp_path):
    folder = make(tmp_path, "a.jpg", "1a2b3c4d-a.jpg")
    assert folder.find(["images/1a2b3c4d-a.jpg"]) == ("1a2b3c4d-a.jpg", BY_TAIL)
    assert folder.find(["images/ffffffff-a.jpg"]) == ("a.jpg", WITHOUT_PREFIX)


def test_a_second_reference_helps(tmp_path):
    folder = make(tmp_path, "1a2b3c4d-a.jpg")
    data_url = "data:image/jpeg;base64,AAAA"
    assert folder.find([data_url, "1a2b3c4d-a.jpg"]) == ("1a2b3c4d-a.jpg", BY_PATH)
    with pytest.raises(ValueError, match="is inside the export"):
        folder.find([data_url])


def test_what_can_be_several_files_is_none(tmp_path):
    folder = make(tmp_path, "x/a.jpg", "y/a.jpg", "1a2b3c4d-b.jpg", "5a6b7c8d-b.jpg")
    with pytest.raises(ValueError, match=r"can be any of x/a\.jpg, y/a\.jpg"):
        folder.find(["a.jpg"])
    with pytest.raises(ValueError, match="can be any of"):
        folder.find(["b.jpg"])


def test_letters_of_two_code_points(tmp_path):
    # macOS stores "ü" as "u" and a mark.
    stored = unicodedata.normalize("NFD", "Blüte.jpg")
    folder = make(tmp_path, stored)
    assert folder.find([unicodedata.normalize("NFC", "Blüte.jpg")]) == (stored, BY_PATH)


@pytest.mark.parametrize(
    "reference",
    [
        "secret.jpg",
        "../secret.jpg",
        "..\\secret.jpg",
        "%2e%2e/secret.jpg",
        "%2e%2e%2fsecret.jpg",
        "images/../../secret.jpg",
        "/data/local-files/?d=../secret.jpg",
        "/data/local-files/?d=%2e%2e%2fsecret.jpg",
        "file:///secret.jpg",
        "link.jpg",
        "linked/secret.jpg",
        "chain.jpg",
        "",
        "..",
        "/",
        "\0",
    ],
)
def test_nothing_outside_the_folder_is_found(tmp_path, reference):
    (tmp_path / "secret.jpg").touch()
    folder = make(tmp_path, "a.jpg")
    root = tmp_path / "photos"
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "chain.jpg").symlink_to("link.jpg")
    (root / "linked").symlink_to(tmp_path)
    folder = ImageFolder(root)
    for given in (reference, f"{tmp_path}/{reference}", f"{tmp_path}/photos/../{reference}"):
        if given.endswith("photos/../"):
            continue
        with pytest.raises(ValueError):
            folder.find([given])


def test_links_inside_the_folder_and_to_it_are_followed(tmp_path):
    make(tmp_path, "a.jpg")
    (tmp_path / "photos" / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "other").symlink_to("photos")
    assert ImageFolder(tmp_path / "other").find(["link.jpg"])[0] == "link.jpg"


def test_a_pipe_is_not_waited_for(tmp_path):
    make(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")
    with pytest.raises(ValueError, match="not a regular file"):
        ImageFolder(tmp_path / "photos").find(["pipe.jpg"])


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no image folder"):
        ImageFolder(tmp_path / "none")
