#!/usr/bin/env python
"""Repeat a training step whose loss or gradient was not finite, and show where that begins.

python tools/replay_batch.py --config-file output/run/config.yaml \
    --step output/run/nonfinite/iter_0001234_rank0.pt [KEY VALUE ...]

--config-file  of the run; KEY VALUE pairs change it, for instance SOLVER.AMP.ENABLED False
--step         what the run has kept

Prints the step's images with their objects, every loss, the first module whose output is not
finite, and the parameters whose gradient is not. Exit code 1 if the numbers are finite this time.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.engine.nonfinite import set_rng_state, unpack_records
from il_net.engine.trainer import amp_dtype
from il_net.errors import plain_errors
from sbr_cnn import add_sbr_cnn_config


def read_step(path: Path) -> dict:
    """What ``NonFiniteGuard`` has kept: containers and tensors only."""
    if not path.is_file():
        raise FileNotFoundError(f"--step: there is no file {path}")
    try:
        step = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file raises
        raise ValueError(f"--step: {path} can't be read: {error}") from error
    if not isinstance(step, dict) or not {"batches", "model", "rng"} <= step.keys():
        raise ValueError(f"--step: {path} is no step that a run has kept (nonfinite/iter_*.pt)")
    return step


def describe(batch: dict[str, list[dict]]) -> list[str]:
    """A line for each image: file, size, objects."""
    lines = []
    for group, records in batch.items():
        for record in records:
            height, width = record["image"].shape[-2:]
            objects = record.get("instances")
            count = "no labels" if objects is None else f"{len(objects['boxes'])} objects"
            lines.append(
                f"{group or 'image'}: {record.get('file_name', '?')}, {width} x {height}, {count}"
            )
    return lines


def watch(model: nn.Module, found: list[str]) -> None:
    """Note every module whose output is not finite although its inputs are, in order."""

    def look(name: str, inputs: object, output: object) -> None:
        if not all_finite(output) and all_finite(inputs):
            found.append(name)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, inputs, out, name=name: look(name, inputs, out))


def all_finite(value: object) -> bool:
    """Whether all floating-point tensors in nested containers are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    return not isinstance(value, (list, tuple)) or all(map(all_finite, value))


def replay(cfg: CfgNode, step: dict) -> list[str]:
    """Run the step again; returns the lines of the report."""
    model = build_model(cfg)
    try:
        model.load_state_dict(step["model"])
    except RuntimeError as error:
        raise ValueError(f"--step does not fit the model of --config-file: {error}") from error
    model.train()
    modules: list[str] = []
    watch(model, modules)
    set_rng_state(step["rng"])
    lines = [f"iteration {step['iteration']}; not finite then: {', '.join(step['bad'])}"]
    device, dtype = next(model.parameters()).device.type, amp_dtype(cfg)
    bad = False
    for packed in step["batches"]:
        groups = {name: unpack_records(records) for name, records in packed.items()}
        batch = groups[""] if "" in groups else SimpleNamespace(**groups)
        lines += describe(packed)
        with EventStorage(), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            losses = model(batch)
        for name, loss in losses.items():
            lines.append(f"{name}: {loss.item():.6g}")
            bad |= not torch.isfinite(loss)
        sum(losses.values()).backward()
    if modules:
        lines.append(f"first module with a non-finite output: {modules[0]}")
    gradients = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    if gradients:
        more = f" and {len(gradients) - 5} more" if len(gradients) > 5 else ""
        lines.append(f"gradients that are not finite: {', '.join(gradients[:5])}{more}")
    if not (bad or modules or gradients):
        lines.append("all numbers are finite this time: another device or number format?")
    return lines


def main() -> int:
    """Replay what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--step", required=True, type=Path, metavar="FILE")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    with plain_errors():
        step = read_step(args.step)
        cfg = load_config(args.config_file, args.opts, add_sbr_cnn_config)
        if not cfg.DATASETS.CLASSES:
            register_datasets(cfg)
        lines = replay(cfg, step)
    print("\n".join(lines))
    return int(lines[-1].startswith("all numbers are finite"))


if __name__ == "__main__":
    sys.exit(main())
