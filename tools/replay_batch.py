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
from il_net.engine.nonfinite import answer_with_nan, set_rng_state, unpack_batch
from il_net.engine.train_step import amp_dtype
from il_net.errors import plain_errors
from sbr_cnn import add_sbr_cnn_config

KEYS = {"iteration", "bad", "batches", "rng", "model"}


def read_step(path: Path) -> dict:
    """What ``NonFiniteGuard`` has kept: containers and tensors only."""
    if not path.is_file():
        raise FileNotFoundError(f"--step: there is no file {path}")
    try:
        step = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file raises; torch's advice is a risk
        raise ValueError(
            f"--step: {path} can't be read ({type(error).__name__}): it is damaged, or no step "
            "that a run has kept (nonfinite/iter_*.pt)"
        ) from error
    if not isinstance(step, dict) or not step.keys() >= KEYS:
        raise ValueError(f"--step: {path} is no step that a run has kept (nonfinite/iter_*.pt)")
    return step


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give the model the step's weights, all of them."""
    shapes = [{name: tuple(x.shape) for name, x in s.items()} for s in (model.state_dict(), state)]
    wrong = [n for n in sorted({*shapes[0], *shapes[1]}) if shapes[0].get(n) != shapes[1].get(n)]
    if wrong:
        raise ValueError(
            f"--step does not fit the model of --config-file: {len(wrong)} tensors are not the "
            f"same, first {wrong[0]}, {shapes[1].get(wrong[0], 'missing')} in the step and "
            f"{shapes[0].get(wrong[0], 'missing')} in the model"
        )
    model.load_state_dict(state)


def describe(packed: dict[str, list[dict]], groups: dict[str, list[dict]]) -> list[str]:
    """A line for each image: file, size, objects."""
    lines = []
    for group, records in groups.items():
        for record, raw in zip(records, packed[group], strict=True):
            height, width = record["image"].shape[-2:]
            objects = record.get("instances")
            count = "no labels" if objects is None else f"{len(objects)} objects"
            bad = "" if all_finite(raw) else ", not finite itself"
            name = record.get("file_name", "?")
            lines.append(f"{group or 'image'}: {name}, {width} x {height}, {count}{bad}")
    return lines


def watch(model: nn.Module, found: list[str]) -> None:
    """Note every module whose output is not finite although its inputs are, in order."""

    def look(name: str, inputs: tuple, output: object) -> None:
        if not all_finite(output) and all_finite(inputs):
            found.append(name or "the model itself, outside of its modules")

    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, args, kwargs, out, name=name: look(name, (args, kwargs), out),
            with_kwargs=True,
        )


def all_finite(value: object) -> bool:
    """Whether all floating-point tensors in nested containers are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    return not isinstance(value, (list, tuple)) or all(map(all_finite, value))


def replay(cfg: CfgNode, step: dict) -> tuple[list[str], bool]:
    """Run the step again; returns the lines of the report, and whether it was not finite again."""
    dtype = amp_dtype(cfg)
    model = build_model(cfg)
    load_weights(model, step["model"])
    model.train()
    answer_with_nan(model)
    modules: list[str] = []
    watch(model, modules)
    device = next(model.parameters()).device.type
    lines = [f"iteration {step['iteration']}; not finite then: {', '.join(step['bad'])}"]
    bad = False
    for packed, rng in zip(step["batches"], step["rng"], strict=True):
        groups = unpack_batch(packed)
        lines += describe(packed, groups)
        batch = groups[""] if "" in groups else SimpleNamespace(**groups)
        set_rng_state(rng)
        with (
            EventStorage(step["iteration"]),
            torch.autocast(device, dtype=dtype, enabled=dtype is not None),
        ):
            losses = model(batch)
        for name, loss in losses.items():
            lines.append(f"{name}: {loss.item():.6g}")
            bad |= not all_finite(loss)
        sum(losses.values()).backward()
    if modules:
        lines.append(f"first module with a non-finite output: {modules[0]}")
    gradients = [name for name, p in model.named_parameters() if not all_finite(p.grad)]
    if gradients:
        more = f" and {len(gradients) - 5} more" if len(gradients) > 5 else ""
        lines.append(f"gradients that are not finite: {', '.join(gradients[:5])}{more}")
    again = bool(bad or modules or gradients)
    if not again:
        lines.append("all numbers are finite this time: another device or number format?")
    return lines, again


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
        lines, again = replay(cfg, step)
    print("\n".join(lines))
    return 0 if again else 1


if __name__ == "__main__":
    sys.exit(main())
