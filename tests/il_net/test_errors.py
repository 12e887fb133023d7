"""What a user sees of a mistake, and places where no output can be written."""

from pathlib import Path

import pytest

from il_net.errors import check_output, plain_errors


@pytest.mark.parametrize(
    "error",
    [
        ValueError("what"),
        FileNotFoundError("what"),
        PermissionError(13, "what"),
        NotADirectoryError(20, "what"),
        ImportError("what"),
    ],
)
def test_mistakes_are_one_line(error):
    with pytest.raises(SystemExit, match="^error: .*what") as caught, plain_errors():
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyError("what"), RuntimeError("what"), AssertionError("what")])
def test_our_own_faults_keep_their_traceback(error):
    with pytest.raises(type(error)), plain_errors():
        raise error


def test_places_of_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("folder").mkdir()
    for path in ("new", "new/deep/x", "folder/x", "folder/../x"):
        check_output(Path(path), is_folder=True)
        check_output(Path(path), is_folder=False)
    check_output(Path("folder"), is_folder=True)
    check_output(Path("file"), is_folder=False)
    for path, is_folder, message in (
        ("file", True, "--out: file is a file; name a folder"),
        ("folder", False, "--out: folder is a folder; name a file"),
        (".", False, "--out: . is a folder; name a file"),
        ("file/x", True, "--out: file/x can't be written, because file is a file"),
        ("file/deep/x", False, "--out: file/deep/x can't be written, because file is a file"),
    ):
        with pytest.raises(ValueError) as error:
            check_output(Path(path), is_folder=is_folder, option="--out")
        assert str(error.value) == message
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}
