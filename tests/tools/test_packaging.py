"""setup.py, the wheel it makes, and the lock files."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from il_net import __version__, check

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("il_net", "sbr_cnn")


def read_lock(name: str) -> list[tuple[Requirement, list[str]]]:
    """Return every pinned requirement of a lock file with its hashes."""
    text = (ROOT / "requirements" / name).read_text()
    lines = [x for x in text.replace("\\\n", " ").splitlines() if x and x.lstrip()[0] != "#"]
    parts = [line.split("--hash=") for line in lines]
    return [(Requirement(part[0].strip()), [x.strip() for x in part[1:]]) for part in parts]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the project's wheel from a copy, so that nothing is left in the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in (*PACKAGES, "tests", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    # Made importable, as packages that a careless find_packages() would pick up.
    for name in ("tests", "tools"):
        (source / name / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--no-cache-dir", "-w", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def requirements(wheel: Path) -> list[Requirement]:
    """Return what the wheel requires, extras included."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [x for x in archive.namelist() if x.endswith(".dist-info/METADATA")]
        metadata = message_from_string(archive.read(name).decode())
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


# --- setup.py ---


def test_setup_imports_only_setuptools_and_the_standard_library() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert "setuptools" in imported
    assert imported - {"setuptools"} <= sys.stdlib_module_names


# --- the wheel ---


def test_wheel_holds_every_module_of_both_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert found == wanted


def test_wheel_is_pure_python_and_carries_the_licence(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("LICENSE") for name in archive.namelist())


def test_wheel_has_the_version_of_the_package(wheel: Path) -> None:
    assert wheel.name.split("-")[1] == __version__


def test_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    code = "import il_net, il_net.check; print(il_net.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(wheel))


def test_oldest_torch_is_that_of_the_check(requirements: list[Requirement]) -> None:
    (torch,) = [x for x in requirements if x.name == "torch"]
    assert str(torch.specifier) == ">=" + ".".join(str(number) for number in check.MIN_TORCH)


def test_detectron2_is_not_a_requirement(requirements: list[Requirement]) -> None:
    assert requirements
    assert not [x for x in requirements if "detectron2" in x.name or x.url]


# --- the lock files ---


def test_every_requirement_is_locked_within_its_range(requirements: list[Requirement]) -> None:
    locked: dict[str, list[str]] = {}
    for requirement, hashes in read_lock("lock.txt"):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and hashes
        locked.setdefault(canonicalize_name(requirement.name), []).append(specifier.version)
    for requirement in requirements:
        versions = locked.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement.name} is in setup.py, but not in requirements/lock.txt"
        for version in versions:
            assert requirement.specifier.contains(Version(version)), f"{requirement} != {version}"


@pytest.mark.parametrize("name", ["build.txt", "lock.txt"])
def test_every_locked_package_has_sha256_hashes(name: str) -> None:
    entries = read_lock(name)
    assert len(entries) >= 4
    for requirement, hashes in entries:
        assert hashes, f"{requirement} has no hash in requirements/{name}"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes)


@pytest.mark.parametrize("name", ["build.in", "build.txt", "requirements.in", "lock.txt"])
def test_requirements_name_no_server(name: str) -> None:
    """Where packages come from is the user's own setting."""
    text = (ROOT / "requirements" / name).read_text()
    assert "://" not in text and "--index" not in text and "--extra-index" not in text


def test_both_stages_pin_the_same_versions() -> None:
    build = {x.name: str(x.specifier) for x, _ in read_lock("build.txt")}
    lock = {x.name: str(x.specifier) for x, _ in read_lock("lock.txt")}
    shared = set(build) & set(lock)
    assert {"setuptools", "wheel"} <= shared
    assert {name: build[name] for name in shared} == {name: lock[name] for name in shared}


def test_every_wish_is_locked() -> None:
    """A line added to a .in file without `make lock` must not go unnoticed."""
    for stage, lock in (("build.in", "build.txt"), ("requirements.in", "lock.txt")):
        locked = {canonicalize_name(x.name): x.specifier for x, _ in read_lock(lock)}
        for line in (ROOT / "requirements" / stage).read_text().splitlines():
            text = line.split("#")[0].strip()
            if not text or text.startswith("-"):
                continue
            wish = Requirement(text)
            (pin,) = locked[canonicalize_name(wish.name)]
            assert wish.specifier.contains(Version(pin.version)), f"{wish}: locked {pin}"
