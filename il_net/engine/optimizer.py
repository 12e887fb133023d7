"""The optimizer that ``SOLVER`` asks for."""

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

OPTIMIZERS = ("SGD", "AdamW")
# Detectron2's, and the norm of all gradients together (thesis section 2.1: at most 35).
CLIP_TYPES = ("value", "norm", "full_model")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """As Detectron2's; also AdamW, and clipping of all gradients together.

    Raises:
        ValueError: ``SOLVER.OPTIMIZER`` or ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` is not known.
    """
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    for key, value, known in (
        ("SOLVER.OPTIMIZER", solver.OPTIMIZER, OPTIMIZERS),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip.CLIP_TYPE, CLIP_TYPES),
    ):
        if value not in known:
            raise ValueError(f"{key} is one of {list(known)}, got {value!r}")
    parameters = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    options = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.OPTIMIZER == "SGD":
        options |= {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    optimizer_class = getattr(torch.optim, solver.OPTIMIZER)
    if clip.CLIP_TYPE != "full_model":
        optimizer_class = maybe_add_gradient_clipping(cfg, optimizer_class)
    optimizer = optimizer_class(parameters, **options)
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        _clip_all(optimizer, clip)
    return optimizer


def _clip_all(optimizer: torch.optim.Optimizer, clip: CfgNode) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def before_step(*_: object) -> None:
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

    # Inside the optimizer's step, as Detectron2 clips: fp16's loss scale is undone by then.
    optimizer.register_step_pre_hook(before_step)
