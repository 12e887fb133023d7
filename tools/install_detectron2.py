#!/usr/bin/env python3
"""Install Detectron2 0.6 as pure Python, from the package index, for current Python and torch.

Detectron2 has not been released since 2021 and is not on the package index under its own name.
Upstream's source install needs a compiler, minutes of build time and a matching CUDA toolkit. This
script needs none of them: it takes the 0.6 source distribution that a third party uploaded as
``pb1-detectron2``, checks it against a fixed sha256, applies the edits of the table ``EDITS``
(each with its reason), builds a wheel without the C++ sources and installs it as ``detectron2``.

What is missing without the compiled operators: Detectron2's own deformable convolution on a GPU,
rotated boxes, and its C++ version of the COCO evaluation. This project uses none of them.

Where ``import detectron2`` already works, nothing is changed. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

REQUIREMENT = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
# pip 26.3 and newer refuse to download it, because one of its extras names a git URL.
REFUSING_PIP = (26, 3)
OLDER_PIP = "pip==26.2"
OLDER_PIP_SHA256 = "931c303696af6fa3417112103b1cad26890e5a07eccb5b99783700e33f2b8aad"
UPSTREAM = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)


class InstallError(Exception):
    """Something the user must know about; its text is printed without a traceback."""


@dataclass(frozen=True)
class Edit:
    """One compatibility edit of the source tree.

    Attributes:
        files: glob, relative to the root of the source tree.
        old: regular expression (multi-line mode) to look for.
        new: replacement, as in :func:`re.sub`.
        count: number of replacements over all matching files; any other number is an error.
        why: what goes wrong without the edit.
    """

    files: str
    old: str
    new: str
    count: int
    why: str


# fmt: off
EDITS: tuple[Edit, ...] = (
    # Removed from the libraries since 2021.
    Edit("detectron2/**/*.py", r"\bnp\.(int|float|bool|str)\b", r"\1", 19,
         "numpy 1.24 removed these aliases of Python's own types"),
    Edit("detectron2/data/transforms/transform.py", r"Image\.LINEAR\b", "Image.BILINEAR", 1,
         "Pillow 10 removed the old name of the same constant"),
    Edit("detectron2/model_zoo/model_zoo.py",
         r"^import pkg_resources$", "from importlib import resources", 1,
         "setuptools 82 removed pkg_resources, and earlier versions warn about it"),
    Edit("detectron2/model_zoo/model_zoo.py",
         r'pkg_resources\.resource_filename\(\s+"detectron2\.model_zoo", '
         r"(os\.path\.join\(.*\))\s+\)",
         r'str(resources.files("detectron2.model_zoo") / \1)', 1,
         "the use that belongs to the import above"),
    Edit("detectron2/export/__init__.py", r"^from \.api import \*$",
         "try:\n    from .api import *\nexcept ImportError:  # needs caffe2\n    pass", 1,
         "torch dropped caffe2; the rest of export, and utils.analysis, work without it"),
    # Still there, but a warning in every run.
    Edit("detectron2/modeling/anchor_generator.py",
         r"torch\.meshgrid\(shifts_y, shifts_x\)",
         'torch.meshgrid(shifts_y, shifts_x, indexing="ij")', 1,
         "torch warns that the default will change"),
    Edit("detectron2/utils/comm.py",
         r"storage = torch\.ByteStorage\.from_buffer\(buffer\)\n"
         r"    tensor = torch\.ByteTensor\(storage\)",
         "tensor = torch.frombuffer(bytearray(buffer), dtype=torch.uint8)", 1,
         "torch warns that typed storages will be removed"),
    Edit("detectron2/engine/train_loop.py", r"from torch\.cuda\.amp import GradScaler\n",
         "from torch.amp import GradScaler\n", 1,
         "torch 2.4 moved it to torch.amp and warns about the old place"),
    Edit("detectron2/engine/train_loop.py",
         r"^ +from torch\.cuda\.amp import autocast\n((?:.*\n)+?)( +with )autocast\(\):",
         r'\1\2torch.autocast("cuda"):', 1,
         "the same, for autocast"),
    # Working without the compiled operators.
    Edit("detectron2/evaluation/coco_evaluation.py",
         r"^(from detectron2\.evaluation\.fast_eval_api import COCOeval_opt)$",
         "try:\n    from detectron2._C import COCOevalEvaluateImages  # noqa: F401\n"
         r"    \1" "\nexcept ImportError:\n    COCOeval_opt = COCOeval", 1,
         "COCOEvaluator takes the C++ evaluation by default; pycocotools gives the same numbers"),
    Edit("detectron2/utils/collect_env.py", r"^( +)(import detectron2\._C as _C)$",
         r"\1\2\n\n\1_C.get_compiler_version  # raises ImportError in the stub", 1,
         "every training run prints this report, which must not fail on the stub _C.py"),
    # The build: no extension, no caffe2.
    Edit("setup.py", r"^import torch\nfrom torch.*\n\ntorch_ver = .*\nassert torch_ver .*\n", "", 1,
         "torch is needed only to compile the extension"),
    Edit("setup.py", r"^    ext_modules=get_extensions\(\),\n    cmdclass=.*\n", "", 1,
         "without an extension the wheel is pure Python and is tagged py3-none-any"),
    Edit("setup.py", r"get_model_zoo_configs\(\)\}",
         '["configs/**/*.yaml", "configs/**/*.py"]}', 1,
         "this archive holds the model zoo's configs inside the package, where the original does "
         "not look: the wheel would lack them"),
    Edit("setup.py", r'name="pb1-detectron2"', 'name="detectron2"', 1,
         "the package's own name, so that pip replaces it when upstream's build is installed"),
    Edit("setup.py", r'^ +"(?:future|pydot|black==21\.4b2)",.*\n', "", 3,
         "for caffe2 and for pretty-printed configs only; the black pin contradicts current "
         "packages, so `pip check` would always complain"),
    Edit("setup.py", r'"iopath>=0\.1\.7,<0\.1\.10"', '"iopath>=0.1.7,<0.1.11"', 1,
         "iopath 0.1.10 is what current environments have, and works"),
)
# fmt: on

STUB_C = '''"""Stands for Detectron2's compiled operators, which this build does not have."""


def __getattr__(name):
    if name.startswith("__"):  # asked by import machinery, inspect and copy; they expect this
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise ImportError(
        f"detectron2._C.{name} is not available: this Detectron2 was installed without its "
        "compiled operators (deformable convolution, rotated boxes, fast COCO evaluation). "
        "To get them, install upstream's source: UPSTREAM"
    )
'''.replace("UPSTREAM", UPSTREAM)

NEW_FILES: dict[str, str] = {"detectron2/_C.py": STUB_C}
"""Files that are added; several modules import ``_C`` unconditionally but use it rarely."""


def verify_sha256(file: Path, expected: str = SHA256) -> None:
    """Raise InstallError unless ``file`` has the sha256 digest ``expected``."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise InstallError(
            f"{file.name} is not the file this project was tested with: sha256 is\n"
            f"  {found}, expected\n  {expected}.\nNothing was unpacked or installed."
        )


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack a .tar.gz and return its single top folder.

    Raises InstallError for links, devices and names that would land outside ``folder``.
    """
    root = folder.resolve()
    tops: set[str] = set()
    with tarfile.open(sdist, "r:gz") as archive:
        for member in archive:
            target = (root / member.name).resolve()
            if not (member.isfile() or member.isdir()) or root not in target.parents:
                raise InstallError(f"{sdist.name}: refused to unpack the entry {member.name!r}")
            tops.add(target.relative_to(root).parts[0])
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            assert source is not None  # it is a regular file
            target.write_bytes(source.read())
    if len(tops) != 1:
        raise InstallError(f"{sdist.name}: expected one top folder, found {sorted(tops)}")
    return root / tops.pop()


def apply_edits(
    tree: Path, edits: tuple[Edit, ...] = EDITS, new_files: dict[str, str] | None = None
) -> int:
    """Apply ``edits`` to the files under ``tree``, add ``new_files``; return the replacements made.

    Nothing is written unless every edit applies as often as its table row says; otherwise
    InstallError names the row, the files it matched and both counts.
    """
    texts: dict[Path, str] = {}
    total = 0
    for edit in edits:
        files = [path for path in sorted(tree.glob(edit.files)) if path.is_file()]
        found = 0
        for path in files:
            text = texts.get(path)
            if text is None:
                text = path.read_text(encoding="utf-8")
            text, n = re.subn(edit.old, edit.new, text, flags=re.MULTILINE)
            if n:
                texts[path] = text
            found += n
        if found != edit.count:
            raise InstallError(
                f"a compatibility edit no longer applies: {edit.files} ({len(files)} files)\n"
                f"  looked for {edit.old!r}\n"
                f"  expected {edit.count} places, found {found}\n"
                f"  reason of the edit: {edit.why}\n"
                "Correct the row in EDITS of tools/install_detectron2.py. Nothing was installed."
            )
        total += found
    for name, content in (new_files or {}).items():
        if (tree / name).exists():
            raise InstallError(f"{name} already exists in the source tree and would be overwritten")
        texts[tree / name] = content
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return total


def run_pip(*arguments: str, doing: str, pip_folder: Path | None = None) -> None:
    """Run pip in this interpreter; InstallError with the end of its output if it fails.

    Args:
        arguments: pip's command line.
        doing: what to say failed.
        pip_folder: where another pip is, to run in place of the installed one.
    """
    environment = dict(os.environ)
    if pip_folder is not None:
        environment["PYTHONPATH"] = str(pip_folder)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if done.returncode:
        tail = "\n  ".join(done.stdout.strip().splitlines()[-15:])
        raise InstallError(f"{doing} failed (exit code {done.returncode}); pip said:\n  {tail}")


def download(folder: Path) -> Path:
    """Fetch the source distribution through pip, hence with the user's own pip settings."""
    pip_folder = None
    version = tuple(int(n) for n in re.findall(r"\d+", importlib.metadata.version("pip"))[:2])
    if version >= REFUSING_PIP:
        pip_folder = folder / "pip"
        older = folder / "pip.txt"
        older.write_text(f"{OLDER_PIP} --hash=sha256:{OLDER_PIP_SHA256}\n", encoding="utf-8")
        options = ("--no-deps", "--require-hashes", "--target", str(pip_folder))
        run_pip("install", *options, "-r", str(older), doing=f"fetching {OLDER_PIP}")
    # With the hash in the requirement pip refuses another file before it runs its setup.py.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ("--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--require-hashes")
    arguments = ("download", *options, "-r", str(requirement), "-d", str(folder))
    doing = f"fetching {REQUIREMENT} from the package index"
    run_pip(*arguments, doing=doing, pip_folder=pip_folder)
    files = sorted(folder.glob("*.tar.gz"))
    if len(files) != 1:
        raise InstallError(f"expected one .tar.gz from the index, got {[f.name for f in files]}")
    return files[0]


def build_wheel(tree: Path, folder: Path) -> Path:
    """Build the edited tree; InstallError unless the result is one pure-Python wheel."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir")
    run_pip("wheel", *options, "-w", str(folder), str(tree), doing="building the wheel")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1 or not wheels[0].name.endswith("-py3-none-any.whl"):
        raise InstallError(f"expected one py3-none-any wheel, got {[w.name for w in wheels]}")
    return wheels[0]


def import_error(module: str) -> str | None:
    """Import ``module`` in a fresh process: None if it works, else the last line of the error."""
    code = f"import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or ["no message"])[-1]


def install(sdist: Path | None, force: bool) -> str:
    """Do what the command line asks; return the closing message."""
    present = importlib.util.find_spec("detectron2") is not None
    problem = import_error("detectron2") if present else None
    if present and problem is None and not force:
        return "detectron2 can already be imported: kept as it is."
    if problem is not None and not force:
        raise InstallError(
            f"detectron2 is installed but cannot be imported: {problem}\n"
            "Mend that, or run this again with --force to replace it."
        )
    if sdist is not None and not sdist.is_file():
        raise InstallError(f"--sdist: there is no file {sdist}")
    for module in ("torch", "torchvision", "setuptools", "pip"):
        error = import_error(module)
        if error is not None:
            raise InstallError(f"{module} must be installed first; importing it says: {error}")
    with tempfile.TemporaryDirectory(prefix="detectron2-") as name:
        folder = Path(name)
        source = sdist or download(folder)
        verify_sha256(source)
        tree = unpack(source, folder / "source")
        edits = apply_edits(tree, EDITS, NEW_FILES)
        wheel = build_wheel(tree, folder / "wheel")
        options = ("--no-deps", "--no-index", "--force-reinstall")
        run_pip("install", *options, str(wheel), doing="installing the wheel")
    problem = import_error("detectron2")
    if problem is not None:
        raise InstallError(f"installed, but importing detectron2 says: {problem}")
    return f"detectron2 0.6 installed without compiled operators ({edits} compatibility edits)."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sdist", type=Path, help="use this .tar.gz instead of the package index")
    parser.add_argument("--force", action="store_true", help="replace an installed detectron2")
    args = parser.parse_args(arguments)
    try:
        print(install(args.sdist, args.force))
    except InstallError as error:
        message = f"{error}\nUpstream's own way, with a compiler and torch present:\n  {UPSTREAM}"
        print(f"install_detectron2: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
