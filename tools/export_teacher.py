#!/usr/bin/env python
"""Turn a semi-supervised run's teacher into a plain Detectron2 detector.

python tools/export_teacher.py --checkpoint output/run/model_final.pth [--model teacher|student] \\
    --output teacher.pth

Writes beside each other
teacher.pth          Detectron2's format, for MODEL.WEIGHTS here and in any Detectron2 project
teacher.safetensors  the same tensors in a file that cannot run code
teacher.yaml         the detector's configuration, for tools/predict.py, with MODEL.WEIGHTS and the
                     class names; made from the config.yaml beside the checkpoint, if there is one
The IoU branch's tensors stay in both files; a plain detector has no such branch, ignores them and
does not filter by it. To predict with the filter, use the run's own config.yaml and checkpoint.
"""

import argparse
from pathlib import Path

import torch
from detectron2.config import CfgNode
from safetensors.torch import save
from torch import Tensor

from il_net.config import load_config
from il_net.errors import plain_errors
from il_net.safe_load import add_trust_option, load_pth
from sbr_cnn import add_sbr_cnn_config

MODELS = ("teacher", "student")


def read_detector(checkpoint: Path, model: str) -> dict[str, Tensor]:
    """The tensors of one of the two detectors in a run's checkpoint, by the detector's own names.

    Args:
        checkpoint: a file that training wrote.
        model: "teacher" or "student".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such checkpoint, or its teacher is none yet.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"--checkpoint: there is no file {checkpoint}")
    try:
        content = load_pth(str(checkpoint))
    except ValueError as error:
        raise ValueError(f"--checkpoint: {error}") from error
    state = content.get("model", {}) if isinstance(content, dict) else {}
    prefix = f"{model}."
    # Clones: two names of one tensor would not go into a safetensors file.
    detector = {
        name.removeprefix(prefix): tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    if not detector:
        raise ValueError(
            f"--checkpoint: {checkpoint} holds no {model}; it has to be of a run with "
            "MODEL.META_ARCHITECTURE TeacherStudentRCNN"
        )
    if model == "teacher" and not state["burned_in"]:
        raise ValueError(
            f"--checkpoint: {checkpoint} was written before the end of SEMISUP.BURN_IN_ITERS, its "
            "teacher has learned nothing yet: export --model student"
        )
    return detector


def plain_config(config_file: Path, weights: Path) -> CfgNode:
    """The configuration of the detector inside a semi-supervised run's.

    Args:
        config_file: the run's config.yaml.
        weights: the exported file.
    """
    cfg = load_config(str(config_file), [], add_sbr_cnn_config)
    cfg.MODEL.META_ARCHITECTURE = cfg.SEMISUP.DETECTOR
    cfg.MODEL.ROI_IOU_HEAD.ENABLED = False
    cfg.MODEL.WEIGHTS = str(weights)
    cfg.MODEL.DEVICE = "cuda"  # where there is one, whatever the run had
    # Not the run's own, nor run/teacher in it: what is there would be replaced.
    cfg.OUTPUT_DIR = str(weights.with_name(f"{weights.stem}_output"))
    return cfg


def export(checkpoint: Path, model: str, output: Path) -> list[Path]:
    """Write one of the two detectors in a run's checkpoint; see the head of this file.

    Args:
        checkpoint: a file that training wrote.
        model: "teacher" or "student".
        output: the .pth file to write.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: nothing to export in it, or an ``output`` that cannot be.
    """
    if output.suffix != ".pth":
        raise ValueError(f"--output is the name of a .pth file, got {output}")
    written = [output, output.with_suffix(".safetensors")]
    config = checkpoint.with_name("config.yaml")
    if config.is_file():
        written.append(output.with_suffix(".yaml"))
    for path in written:
        if path.resolve() in (checkpoint.resolve(), config.resolve()):
            raise ValueError(f"--output {output} would replace the run's {path}: name another")
    detector = read_detector(checkpoint, model)
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": detector}, output)
    # Not save_file, which lets nobody else read the file.
    written[1].write_bytes(save(detector, metadata={"format": "pt"}))
    if config.is_file():
        written[2].write_text(plain_config(config, output).dump())
    return written


def main() -> None:
    """Export what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE")
    parser.add_argument("--model", choices=MODELS, default="teacher", help="which (teacher)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.pth")
    add_trust_option(parser)
    args = parser.parse_args()
    with plain_errors():
        written = export(args.checkpoint, args.model, args.output)
    print("\n".join(f"wrote {path}" for path in written))
    if len(written) < 3:
        print(f"no configuration: there is no config.yaml beside {args.checkpoint}")


if __name__ == "__main__":
    main()
