"""il_net.check: what it says and returns in broken and in working environments."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from il_net import check

ROOT = Path(__file__).resolve().parents[2]

BLOCK_AND_RUN = """
import runpy, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
{code}
"""
RUN_MODULE = "runpy.run_module('il_net.check', run_name='__main__')"


def run(code: str, *blocked: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """Run code in a process in which the modules ``blocked`` are not installed."""
    folders = [str(folder) for folder in (path, ROOT) if folder is not None]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-c", BLOCK_AND_RUN.format(blocked=blocked, code=code)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def assert_detectron2_advice(text: str) -> None:
    assert "python tools/install_detectron2.py" in text
    assert "pip install --no-build-isolation 'git+https://github.com/facebookresearch/" in text


# --- the command line ---


def test_working_environment_exits_0_with_the_versions() -> None:
    done = run(RUN_MODULE)
    assert done.returncode == 0, done.stdout + done.stderr
    for package in ("torch", "torchvision", "fvcore", "pycocotools", "opencv-python-headless"):
        (line,) = [x for x in done.stdout.splitlines() if x.split()[0:1] == [package]]
        # opencv's module leaves the last number of the package's version out.
        first_numbers = importlib.metadata.version(package).split("+")[0].split(".")[:3]
        assert ".".join(first_numbers) in line
    assert "Training can run." in done.stdout
    assert "PROBLEM" not in done.stdout


def test_missing_detectron2_exits_1_with_both_ways_to_install_it() -> None:
    done = run(RUN_MODULE, "detectron2")
    assert done.returncode == 1
    assert "PROBLEM: detectron2" in done.stdout
    assert_detectron2_advice(done.stdout)
    assert "Training cannot run" in done.stdout
    assert "Traceback" not in done.stderr


def test_missing_torch_exits_1_and_only_torch_is_blamed_for_torchvision() -> None:
    done = run(RUN_MODULE, "torch")
    assert done.returncode == 1
    assert "PROBLEM: torch: " in done.stdout
    assert "pip install torch torchvision" in done.stdout
    assert "PROBLEM: torchvision" not in done.stdout
    assert "Traceback" not in done.stderr


def test_torchvision_built_for_another_torch_is_explained(tmp_path: Path) -> None:
    # What the CPU build of torch and the ordinary torchvision do together.
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    done = run(RUN_MODULE, path=tmp_path)
    assert done.returncode == 1
    assert "PROBLEM: torchvision: RuntimeError: operator torchvision::nms" in done.stdout
    assert "pip install torch torchvision" in done.stdout


def test_missing_optional_package_is_no_problem() -> None:
    done = run(RUN_MODULE, "timm")
    assert done.returncode == 0, done.stdout
    assert "not installed (optional)" in done.stdout


# --- at the start of a tool ---


@pytest.mark.parametrize("blocked", ["torch", "detectron2"])
def test_require_detectron2_ends_with_advice_not_with_a_traceback(blocked: str) -> None:
    done = run("import il_net.check; il_net.check.require_detectron2()", blocked)
    assert done.returncode == 1
    assert_detectron2_advice(done.stderr)
    assert "Traceback" not in done.stderr


def test_require_detectron2_is_silent_where_it_works() -> None:
    assert check.require_detectron2() is None
    assert check.advice_if_broken() is None


def test_import_needs_no_package_beyond_the_standard_library() -> None:
    code = (
        "import il_net.check\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'detectron2', 'fvcore', 'cv2', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = run(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# --- the single checks, with made-up modules ---


def pretend(
    monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType | SimpleNamespace | Exception]
) -> None:
    """Let the imports of check.py give these modules or errors, and nothing else."""

    def fake_import(name: str) -> tuple[object, Exception | None]:
        found = modules.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
        return (None, found) if isinstance(found, Exception) else (found, None)

    monkeypatch.setattr(check, "_try_import", fake_import)


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (AttributeError("module 'PIL.Image' has no attribute 'LINEAR'"), "Pillow"),
        (AttributeError("module 'numpy' has no attribute 'bool'"), "numpy"),
        (
            ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources"),
            "setuptools",
        ),
    ],
)
def test_outdated_detectron2_names_the_package_that_moved_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception, package: str
) -> None:
    installed = SimpleNamespace(__name__="detectron2", __version__="0.6")
    pretend(monkeypatch, {"detectron2": installed, "detectron2.engine": error})
    finding = check.check_detectron2()
    assert finding.fatal and str(error) in finding.problem
    assert f"older than the installed {package}" in finding.advice
    assert "python tools/install_detectron2.py --force" in finding.advice


def test_dependency_of_detectron2_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ModuleNotFoundError("No module named 'yaml'", name="yaml")
    pretend(monkeypatch, {"detectron2": error})
    finding = check.check_detectron2()
    assert finding.fatal and "pip install PyYAML" in finding.advice


def fake_torch(version: str, error: Exception | None = None) -> SimpleNamespace:
    def zeros(count: int) -> SimpleNamespace:
        def numpy() -> None:
            if error is not None:
                raise error

        return SimpleNamespace(numpy=numpy)

    cuda = SimpleNamespace(is_available=lambda: False)
    versions = SimpleNamespace(cuda="13.0")
    return SimpleNamespace(
        __name__="torch", __version__=version, zeros=zeros, cuda=cuda, version=versions
    )


@pytest.mark.parametrize(
    ("version", "fine"),
    [("2.3.1", False), ("1.13.1+cu117", False), ("2.4.0", True), ("2.11.0+cu130", True)],
)
def test_oldest_torch(monkeypatch: pytest.MonkeyPatch, version: str, fine: bool) -> None:
    pretend(monkeypatch, {"torch": fake_torch(version)})
    assert (check.check_torch().problem == "") == fine


def test_numpy_that_torch_cannot_use_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = fake_torch("2.4.0", RuntimeError("Numpy is not available"))
    pretend(monkeypatch, {"torch": torch})
    finding = check.check_torch()
    assert finding.fatal and "Numpy is not available" in finding.problem
    assert "pip install 'numpy<2'" in finding.advice


@pytest.mark.parametrize(
    ("torch", "torchvision", "fine"),
    [
        # Pairs of the releases' own tables.
        ("2.4.0", "0.19.0", True),
        ("2.6.0", "0.21.0", True),
        ("2.11.0+cu130", "0.26.0+cu130", True),
        ("2.11.0", "0.25.0", False),
    ],
)
def test_torch_and_torchvision_of_one_release(
    monkeypatch: pytest.MonkeyPatch, torch: str, torchvision: str, fine: bool
) -> None:
    vision = SimpleNamespace(__name__="torchvision", __version__=torchvision)
    pretend(monkeypatch, {"torch": fake_torch(torch), "torchvision": vision})
    finding = check.check_torchvision()
    assert (finding.problem == "") == fine
    if not fine:
        assert "0.26" in finding.problem and not finding.fatal


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("/x/detectron2/_C.cpython-311-x86_64-linux-gnu.so", "yes"),
        ("/x/detectron2/_C.py", "no (not needed here)"),
    ],
)
def test_compiled_ops_are_told_from_the_stub(
    monkeypatch: pytest.MonkeyPatch, file: str, value: str
) -> None:
    monkeypatch.setattr("importlib.machinery.EXTENSION_SUFFIXES", [".so"])
    package = SimpleNamespace(__name__="detectron2", __version__="0.6")
    pretend(monkeypatch, {"detectron2": package, "detectron2._C": SimpleNamespace(__file__=file)})
    assert check.check_compiled_ops() == check.Finding("compiled ops", value)


def test_gpu_driver_without_a_device_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"torch": fake_torch("2.11.0")})
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    finding = check.check_cuda()
    assert finding.problem and not finding.fatal
    assert "13.0" in finding.value
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert check.check_cuda().problem == ""


def test_main_is_1_only_for_fatal_problems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    warning = check.Finding("a", "1", "odd", "do this", fatal=False)
    monkeypatch.setattr(check, "inspect_environment", lambda: [warning])
    assert check.main() == 0
    assert "warning: a: odd\n  do this" in capsys.readouterr().out
    fatal = check.Finding("b", "2", "broken", "first\n  then")
    monkeypatch.setattr(check, "inspect_environment", lambda: [warning, fatal])
    assert check.main() == 1
    assert "PROBLEM: b: broken\n  first\n    then" in capsys.readouterr().out
