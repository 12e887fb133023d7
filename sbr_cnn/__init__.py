"""What to train: RoI extractors, looped heads and backbones for Detectron2.

Importing the package registers its backbones and heads.
"""

from . import backbones, fcc, grid, loop_heads, mask_heads, standard_heads  # noqa: F401
from .config import add_sbr_cnn_config

__all__ = ["add_sbr_cnn_config"]
