"""Say which versions are installed, what is wrong with them and how to mend it.

``python -m il_net.check`` prints the list and exits with 0 if training can run, else with 1.
:func:`require_detectron2` gives the same advice instead of a traceback at the start of
``train_net.py``. Nothing but the standard library is imported before a function is called, so that
the module works where torch or Detectron2 is missing.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 4)

UPSTREAM_INSTALL = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)
TORCH_ADVICE = (
    "Install both in one command, from one index, so that they fit each other:\n"
    "  pip install torch torchvision"
)
DETECTRON2_ADVICE = (
    "Either, in this project's folder, release 0.6 as pure Python (under a minute):\n"
    "  python tools/install_detectron2.py\n"
    "or upstream's source (needs torch, a C++ compiler and some minutes):\n"
    f"  {UPSTREAM_INSTALL}"
)
OUTDATED_ADVICE = (
    "This detectron2 is older than the installed {package}. Replace it, in this project's folder, "
    "by release 0.6 edited for current packages:\n"
    "  python tools/install_detectron2.py --force\n"
    "or by upstream's source:\n"
    f"  {UPSTREAM_INSTALL}"
)
# What the failing import of an outdated Detectron2 says, and the package that has moved on.
OUTDATED_SIGNS = {
    "module 'numpy' has no attribute": "numpy",
    "module 'PIL.Image' has no attribute": "Pillow",
    "No module named 'pkg_resources'": "setuptools",
}
# Modules whose package on the index has another name.
DISTRIBUTIONS = {"cv2": "opencv-python-headless", "PIL": "Pillow", "yaml": "PyYAML"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: the package or property.
        value: its version or state, as shown.
        problem: what is wrong; empty if nothing is.
        advice: how to mend it, commands on lines of their own.
        fatal: whether training cannot run with this problem.
    """

    name: str
    value: str
    problem: str = ""
    advice: str = ""
    fatal: bool = True


def _try_import(name: str) -> tuple[ModuleType | None, Exception | None]:
    """Import a module; return it, or the error."""
    try:
        return importlib.import_module(name), None
    except Exception as error:  # a broken binary package raises RuntimeError, OSError and others
        return None, error


def _one_line(error: Exception | None) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _version(module: ModuleType) -> str:
    """Return a module's version; some keep it only in the package's metadata."""
    version = getattr(module, "__version__", None)
    if version is None:
        try:
            version = importlib.metadata.version(
                DISTRIBUTIONS.get(module.__name__, module.__name__)
            )
        except importlib.metadata.PackageNotFoundError:
            return "version unknown"
    return str(version)


def _numbers(version: str) -> tuple[int, ...]:
    """Turn "2.11.0+cu130" into (2, 11, 0); stop at the first part that is not a number."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def check_python() -> Finding:
    """Check this interpreter's version."""
    value = ".".join(str(number) for number in sys.version_info[:3])
    if sys.version_info >= MIN_PYTHON:
        return Finding("Python", value)
    wanted = ".".join(str(number) for number in MIN_PYTHON)
    return Finding("Python", value, f"older than {wanted}", f"Use Python {wanted} or newer.")


def check_torch() -> Finding:
    """Check that torch imports, is new enough and can exchange arrays with numpy."""
    torch, error = _try_import("torch")
    if torch is None:
        return Finding("torch", "missing", _one_line(error), TORCH_ADVICE)
    value = _version(torch)
    if _numbers(value) < MIN_TORCH:
        wanted = ".".join(str(number) for number in MIN_TORCH)
        return Finding("torch", value, f"older than {wanted}", TORCH_ADVICE)
    try:
        torch.zeros(1).numpy()
    except RuntimeError as failure:  # "Numpy is not available": built against another numpy
        advice = (
            "This torch was built for another major version of numpy, or numpy is missing:\n"
            "  pip install --upgrade torch torchvision numpy\n"
            "or keep torch and run\n  pip install 'numpy<2'"
        )
        return Finding("torch", value, _one_line(failure), advice)
    return Finding("torch", value)


def check_torchvision() -> Finding:
    """Check that torchvision imports beside this torch, and belongs to the same release."""
    torch, _ = _try_import("torch")
    if torch is None:
        return Finding("torchvision", "not checked, needs torch")
    torchvision, error = _try_import("torchvision")
    if torchvision is None:
        return Finding("torchvision", "does not import", _one_line(error), TORCH_ADVICE)
    value, torch_version = _version(torchvision), _version(torch)
    major, minor, *_ = (*_numbers(torch_version), 0, 0)
    # torch 2.x and torchvision 0.(x + 15) are released together, since 2.0 and 0.15.
    if major == 2 and _numbers(value)[:2] != (0, minor + 15):
        problem = f"torch {torch_version} belongs with torchvision 0.{minor + 15}"
        return Finding("torchvision", value, problem, TORCH_ADVICE, fatal=False)
    return Finding("torchvision", value)


def _detectron2_problem(value: str, error: Exception | None) -> Finding:
    """Explain why Detectron2 does not import."""
    message = _one_line(error)
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return Finding("detectron2", "not checked, needs torch", message, DETECTRON2_ADVICE)
    for sign, package in OUTDATED_SIGNS.items():
        if sign in message:
            advice = OUTDATED_ADVICE.format(package=package)
            return Finding("detectron2", value, message, advice)
    missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    if missing and missing.split(".")[0] != "detectron2":
        package = DISTRIBUTIONS.get(missing, missing)
        advice = f"Detectron2 needs a package that is missing:\n  pip install {package}"
        return Finding("detectron2", value, message, advice)
    return Finding("detectron2", value, message, DETECTRON2_ADVICE)


def check_detectron2() -> Finding:
    """Check that Detectron2 and its engine import."""
    detectron2, error = _try_import("detectron2")
    if detectron2 is None:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "detectron2"
        return _detectron2_problem("missing" if missing else "does not import", error)
    value = _version(detectron2)
    # The package alone imports little; the engine pulls in what breaks with newer libraries.
    engine, error = _try_import("detectron2.engine")
    if engine is None:
        return _detectron2_problem(value, error)
    return Finding("detectron2", value)


def check_compiled_ops() -> Finding:
    """Tell whether Detectron2 has its compiled operators; training here works without them."""
    name = "compiled ops"
    if _try_import("detectron2")[0] is None:
        return Finding(name, "not checked, needs detectron2")
    extension, error = _try_import("detectron2._C")
    if extension is not None:
        # The pure-Python build has a stub of the same name, which is a .py file.
        suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
        if str(getattr(extension, "__file__", "")).endswith(suffixes):
            return Finding(name, "yes")
    elif not isinstance(error, ModuleNotFoundError):
        problem = f"detectron2._C was built for another torch: {_one_line(error)}"
        return Finding(name, "do not load", problem, DETECTRON2_ADVICE)
    return Finding(name, "no (not needed here)")


def check_cuda() -> Finding:
    """Tell which GPUs torch sees."""
    torch, _ = _try_import("torch")
    if torch is None:
        return Finding("CUDA", "not checked, needs torch")
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        devices = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        return Finding("CUDA", f"{count} x {devices}" if count == 1 else f"{count}: {devices}")
    value = f"no device, runs use the CPU ({built or 'torch is built without CUDA'})"
    if shutil.which("nvidia-smi") is None:
        return Finding("CUDA", value)
    advice = (
        "Compare the CUDA version that `nvidia-smi` shows with the one torch is built for; "
        "install a newer driver or a torch for an older CUDA."
    )
    problem = "nvidia-smi is installed, but torch sees no GPU"
    return Finding("CUDA", value, problem, advice, fatal=False)


def check_package(module: str, advice: str = "", *, needed: bool = True) -> Finding:
    """Check that a module imports.

    Args:
        module: its import name.
        advice: what to do otherwise; default is to install it with pip.
        needed: False for a package that only some configurations use; absence is no problem then.
    """
    name = DISTRIBUTIONS.get(module, module)
    found, error = _try_import(module)
    if found is not None:
        return Finding(name, _version(found))
    absent = isinstance(error, ModuleNotFoundError) and error.name == module
    if absent and not needed:
        return Finding(name, "not installed (optional)")
    value = "missing" if absent else "does not import"
    return Finding(name, value, _one_line(error), advice or f"  pip install {name}", fatal=needed)


def inspect_environment() -> list[Finding]:
    """Return the whole report, in the order in which problems should be mended."""
    return [
        check_python(),
        check_package("numpy"),
        check_torch(),
        check_torchvision(),
        check_cuda(),
        check_package("PIL"),
        check_package("fvcore"),
        check_package("pycocotools"),
        check_package("cv2"),
        check_detectron2(),
        check_compiled_ops(),
        check_package("timm", needed=False),
    ]


def format_problems(findings: Iterable[Finding]) -> str:
    """Return the problems among ``findings`` with their advice; empty if there are none."""
    parts = []
    for finding in findings:
        if finding.problem:
            kind = "PROBLEM" if finding.fatal else "warning"
            advice = finding.advice.replace("\n", "\n  ")
            parts.append(f"{kind}: {finding.name}: {finding.problem}\n  {advice}")
    return "\n".join(parts)


def advice_if_broken() -> str | None:
    """Return what is wrong with torch, torchvision or Detectron2, or None if all of them import."""
    findings = [check_torch(), check_torchvision(), check_detectron2()]
    fatal = [finding for finding in findings if finding.problem and finding.fatal]
    return format_problems(fatal) if fatal else None


def require_detectron2() -> None:
    """Leave the program with advice, not a traceback, if Detectron2 cannot be imported.

    Raises:
        SystemExit: with the advice as its text, hence exit code 1.
    """
    advice = advice_if_broken()
    if advice is not None:
        raise SystemExit(f"{advice}\n`python -m il_net.check` shows the whole environment.")


def main() -> int:
    """Print the report; return 0 if training can run, else 1."""
    findings = inspect_environment()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:<{width}}  {finding.value}")
    problems = format_problems(findings)
    if problems:
        print(f"\n{problems}")
    broken = any(finding.problem and finding.fatal for finding in findings)
    print("\nTraining cannot run until this is mended." if broken else "\nTraining can run.")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
