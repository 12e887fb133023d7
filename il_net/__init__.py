"""How to train: data, teacher-student training, engine and evaluation on Detectron2."""

__version__ = "0.1.0"
