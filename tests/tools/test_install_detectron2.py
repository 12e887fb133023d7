"""tools/install_detectron2.py: what it refuses, what it edits, what it leaves alone."""

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from il_net import check

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "install_detectron2.py"


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


tool = load("install_detectron2_under_test", SCRIPT)


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every module seem importable, and fail the test if pip would run."""

    def refuse(*arguments: str, **_: object) -> None:
        pytest.fail(f"pip was called: {arguments}")

    monkeypatch.setattr(tool, "run_pip", refuse)
    monkeypatch.setattr(tool, "import_error", lambda module: None)


def run_script(fake_detectron2: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the script where ``import detectron2`` finds a package with the given source."""
    package = folder / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text(fake_detectron2)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


# --- what stops it ---


def test_wrong_hash_stops_before_anything_is_unpacked(
    tmp_path: Path, no_pip: None, capsys: pytest.CaptureFixture
) -> None:
    content = b"not the archive"
    sdist = tmp_path / "other.tar.gz"
    sdist.write_bytes(content)
    # Not a tar file at all: unpacking it first would raise another error than the hash's.
    assert tool.main(["--force", "--sdist", str(sdist)]) == 1
    message = capsys.readouterr().err
    assert "other.tar.gz" in message and "sha256" in message
    assert hashlib.sha256(content).hexdigest() in message
    assert tool.SHA256 in message
    assert "Traceback" not in message


def test_right_hash_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "a.tar.gz"
    file.write_bytes(b"abc")
    # FIPS 180-4's example for "abc".
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    tool.verify_sha256(file, abc)
    with pytest.raises(tool.InstallError):
        tool.verify_sha256(file, abc.replace("b", "c", 1))


def test_missing_sdist_is_named(no_pip: None, capsys: pytest.CaptureFixture) -> None:
    assert tool.main(["--force", "--sdist", "nowhere.tar.gz"]) == 1
    assert "no file nowhere.tar.gz" in capsys.readouterr().err


def test_edit_that_no_longer_applies_names_file_edit_and_counts(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = old\n")
    (tmp_path / "b.py").write_text("y = other\n")
    edits = (
        tool.Edit("b.py", "other", "changed", 1, "comes first and applies"),
        tool.Edit("a.py", r"\bold\b", "new", 2, "the library dropped old"),
    )
    with pytest.raises(tool.InstallError) as raised:
        tool.apply_edits(tmp_path, edits)
    message = str(raised.value)
    assert "a.py" in message and r"\\bold\\b" in message
    assert "expected 2 places, found 1" in message
    assert "the library dropped old" in message
    # All or nothing: the edit that did apply was not written either.
    assert (tmp_path / "a.py").read_text() == "x = old\n"
    assert (tmp_path / "b.py").read_text() == "y = other\n"


def test_edit_that_applies_too_often_stops(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("old\nold\n")
    edits = (tool.Edit("a.py", "old", "new", 1, "the library dropped old"),)
    with pytest.raises(tool.InstallError, match="expected 1 places, found 2"):
        tool.apply_edits(tmp_path, edits)


def test_edit_of_a_missing_file_stops(tmp_path: Path) -> None:
    edits = (tool.Edit("gone.py", "x", "y", 1, "needed"),)
    with pytest.raises(tool.InstallError, match=r"gone\.py \(0 files\)"):
        tool.apply_edits(tmp_path, edits)


def test_new_file_does_not_replace_an_existing_one(tmp_path: Path) -> None:
    (tmp_path / "_C.py").write_text("theirs")
    with pytest.raises(tool.InstallError, match=r"_C\.py already exists"):
        tool.apply_edits(tmp_path, (), {"_C.py": "ours"})
    assert (tmp_path / "_C.py").read_text() == "theirs"


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_unpack_refuses_entries_that_leave_the_folder(tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    entry = tarfile.TarInfo(
        {"parent": "top/../../outside", "absolute": str(outside)}.get(kind, "l")
    )
    content = b"x"
    if kind == "link":
        entry.type, entry.linkname = tarfile.SYMTYPE, str(outside)
    else:
        entry.size = len(content)
    archive = tmp_path / "evil.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(tool.InstallError, match="refused to unpack"):
        tool.unpack(archive, tmp_path / "target")
    assert not outside.exists()


def test_unpack_returns_the_top_folder(tmp_path: Path) -> None:
    archive = tmp_path / "good.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in (("top/a.txt", b"1"), ("top/sub/b.txt", b"22")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    top = tool.unpack(archive, tmp_path / "target")
    assert top == (tmp_path / "target" / "top").resolve()
    assert (top / "a.txt").read_bytes() == b"1"
    assert (top / "sub" / "b.txt").read_bytes() == b"22"


def test_pip_failure_shows_what_pip_said() -> None:
    with pytest.raises(tool.InstallError, match="testing failed") as raised:
        tool.run_pip("no-such-command", doing="testing")
    assert "no-such-command" in str(raised.value).split("pip said:")[1]


# --- what it leaves alone ---


def test_importable_detectron2_is_kept(tmp_path: Path) -> None:
    done = run_script("value = 1", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "kept" in done.stdout
    assert done.stderr == ""


def test_broken_detectron2_is_reported_not_replaced(tmp_path: Path) -> None:
    done = run_script("raise AttributeError('no LINEAR any more')", tmp_path)
    assert done.returncode == 1
    assert "no LINEAR any more" in done.stderr and "--force" in done.stderr
    assert "Traceback" not in done.stderr


# --- the table ---

# One extract of the 0.6 release per row of EDITS, with the text it must become.
BEFORE_AFTER = {
    "detectron2/structures/masks.py": (
        "a = np.bool\nb = np.int\nc = np.float\nd = np.str\n"
        + 15 * "m.astype(np.bool)\n"
        + "e = (np.int64, np.bool_, np.float32, np.string_, mynp.into)\n",
        "a = bool\nb = int\nc = float\nd = str\n"
        + 15 * "m.astype(bool)\n"
        + "e = (np.int64, np.bool_, np.float32, np.string_, mynp.into)\n",
    ),
    "detectron2/data/transforms/transform.py": (
        "def __init__(self, src_rect, output_size, interp=Image.LINEAR, fill=0):\n",
        "def __init__(self, src_rect, output_size, interp=Image.BILINEAR, fill=0):\n",
    ),
    "detectron2/model_zoo/model_zoo.py": (
        "import os\nimport pkg_resources\n\n"
        "    cfg_file = pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )\n",
        "import os\nfrom importlib import resources\n\n"
        "    cfg_file = str(resources.files("
        '"detectron2.model_zoo") / os.path.join("configs", config_path))\n',
    ),
    "detectron2/export/__init__.py": (
        "from .api import *\nfrom .flatten import TracingAdapter\n",
        "try:\n    from .api import *\nexcept ImportError:  # needs caffe2\n    pass\n"
        "from .flatten import TracingAdapter\n",
    ),
    "detectron2/modeling/anchor_generator.py": (
        "    shift_y, shift_x = torch.meshgrid(shifts_y, shifts_x)\n",
        '    shift_y, shift_x = torch.meshgrid(shifts_y, shifts_x, indexing="ij")\n',
    ),
    "detectron2/utils/comm.py": (
        "    storage = torch.ByteStorage.from_buffer(buffer)\n"
        "    tensor = torch.ByteTensor(storage).to(device=device)\n",
        "    tensor = torch.frombuffer(bytearray(buffer), dtype=torch.uint8).to(device=device)\n",
    ),
    "detectron2/engine/train_loop.py": (
        "            from torch.cuda.amp import GradScaler\n\n"
        "            grad_scaler = GradScaler()\n"
        "        from torch.cuda.amp import autocast\n\n"
        "        start = time.perf_counter()\n\n"
        "        with autocast():\n"
        "            loss_dict = self.model(data)\n",
        "            from torch.amp import GradScaler\n\n"
        "            grad_scaler = GradScaler()\n\n"
        "        start = time.perf_counter()\n\n"
        '        with torch.autocast("cuda"):\n'
        "            loss_dict = self.model(data)\n",
    ),
    "detectron2/evaluation/coco_evaluation.py": (
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "from detectron2.structures import Boxes\n",
        "try:\n"
        "    from detectron2._C import COCOevalEvaluateImages  # noqa: F401\n"
        "    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n"
        "    COCOeval_opt = COCOeval\n"
        "from detectron2.structures import Boxes\n",
    ),
    "detectron2/utils/collect_env.py": (
        "    try:\n        import detectron2._C as _C\n    except ImportError as e:\n",
        "    try:\n        import detectron2._C as _C\n\n"
        "        _C.get_compiler_version  # raises ImportError in the stub\n"
        "    except ImportError as e:\n",
    ),
    "setup.py": (
        "from typing import List\n"
        "import torch\n"
        "from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension\n\n"
        'torch_ver = [int(x) for x in torch.__version__.split(".")[:2]]\n'
        'assert torch_ver >= [1, 8], "Requires PyTorch >= 1.8"\n\n'
        "setup(\n"
        '    name="pb1-detectron2",\n'
        '    package_data={"detectron2.model_zoo": get_model_zoo_configs()},\n'
        "    install_requires=[\n"
        '        "iopath>=0.1.7,<0.1.10",\n'
        '        "future",  # used by caffe2\n'
        '        "pydot",  # used to save caffe2 SVGs\n'
        '        "omegaconf>=2.1",\n'
        '        "black==21.4b2",\n'
        "    ],\n"
        "    ext_modules=get_extensions(),\n"
        '    cmdclass={"build_ext": torch.utils.cpp_extension.BuildExtension},\n'
        ")\n",
        "from typing import List\n\n"
        "setup(\n"
        '    name="detectron2",\n'
        '    package_data={"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]},\n'
        "    install_requires=[\n"
        '        "iopath>=0.1.7,<0.1.11",\n'
        '        "omegaconf>=2.1",\n'
        "    ],\n"
        ")\n",
    ),
}


def test_every_edit_turns_the_release_into_what_is_wanted(tmp_path: Path) -> None:
    for name, (before, _) in BEFORE_AFTER.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(before)
    replacements = tool.apply_edits(tmp_path, tool.EDITS, tool.NEW_FILES)
    assert {name: (tmp_path / name).read_text() for name in BEFORE_AFTER} == {
        name: after for name, (_, after) in BEFORE_AFTER.items()
    }
    # 19 aliases of numpy, 3 dropped requirements, and once each of the other 15 rows.
    assert replacements == 19 + 3 + 15


def test_edited_release_that_changed_again_is_refused(tmp_path: Path) -> None:
    """Applying the table to an already edited tree must fail, not do half of it."""
    for name, (_, after) in BEFORE_AFTER.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(after)
    with pytest.raises(tool.InstallError, match="no longer applies"):
        tool.apply_edits(tmp_path, tool.EDITS, tool.NEW_FILES)


def test_every_edit_has_a_reason() -> None:
    assert all(len(edit.why) > 20 and edit.count > 0 for edit in tool.EDITS)


# --- the stub of the compiled operators ---


def test_stub_raises_import_error_with_advice(tmp_path: Path) -> None:
    (tmp_path / "detectron2").mkdir()
    assert tool.apply_edits(tmp_path, (), tool.NEW_FILES) == 0
    stub = load("detectron2_C_under_test", tmp_path / "detectron2" / "_C.py")
    with pytest.raises(ImportError, match=r"_C\.nms_rotated is not available") as raised:
        _ = stub.nms_rotated
    assert tool.UPSTREAM in str(raised.value)
    with pytest.raises(ImportError, match="deform_conv_forward"):
        exec("from detectron2_C_under_test import deform_conv_forward")
    # Python itself asks modules for such names and expects AttributeError.
    assert not hasattr(stub, "__path__")


def test_advice_is_the_same_as_that_of_the_check() -> None:
    assert tool.UPSTREAM == check.UPSTREAM_INSTALL
