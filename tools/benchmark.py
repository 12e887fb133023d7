#!/usr/bin/env python
"""Compare configurations: time of inference and of a training step, peak memory, parameters.

python tools/benchmark.py CONFIG [CONFIG ...] [--device cuda] [--dtype bf16] [--output bench.json]

CONFIG is a YAML file, with keys of its own behind colons if wanted: FILE[:KEY=VALUE]... For example
  configs/sbr_cnn/r3_cnn_r50_fpn_1x.yaml:MODEL.ROI_LOOP_HEAD.ORDER=aab
  configs/sbr_cnn/mask_rcnn_r50_fpn_1x.yaml:MODEL.ROI_HEADS.NAME=StandardROIHeads
of which the second has Detectron2's own RoI heads and RoIAlign. A detector of another library is a
CONFIG by its name: torchvision:maskrcnn_resnet50_fpn or torchvision:fasterrcnn_resnet50_fpn (their
RoIAlign takes two samples per bin and axis). Prints Markdown tables with ratios to the first
CONFIG; --output keeps every single time. Needs no data set and no weights. What makes it fair:

- All models see the same noise picture and get the same 1000 proposals at inference and 2000 in
  training: the RPN runs, then its proposals are replaced. A quarter of them overlaps one of 20
  generated objects at IoU 0.82 to 0.92, so that every loop or stage samples 512 RoIs, 128 of them
  positive; box deltas are zero, so that the boxes stay where they are.
- At inference the class logits are replaced too, after their layer has run: background 0, the
  others normal with mean -13.8 and standard deviation 4.2. With 80 classes some 400 class scores
  pass 0.05 and some 3700 pass 0.001 before NMS, and 100 detections remain. The threshold itself
  is the configuration's, and its NMS is part of the time.
- The boxes that each head really got and the detections are counted in the first run and printed;
  what is not as promised is in bold and in the JSON under "differs".
- The configurations are measured in turn (A B C A B C ...), inference before training. Ratios are
  of medians; in brackets are the lowest and highest of the rounds' own ratios.
- Inference is one picture with post-processing (masks pasted) and without reading files. A training
  step is forward, backward and SGD at learning rate 0; BatchNorm statistics are the picture's.
- Configurations of MODEL.META_ARCHITECTURE TeacherStudentRCNN have one mode, semisup: a training
  step after burn-in with --images labelled and as many unlabelled pictures, in each of which the
  teacher finds the 20 objects. One more table splits it into data (views of a generated JPEG file,
  made in this process, for which training has workers), the teacher's forward pass, the student's,
  backward, optimizer, EMA and reports (read in every step, by training in every 20th): medians,
  and their shares of the step. On CUDA the device is waited for between them.
- Memory on CUDA is the peak of allocated memory without the other models'. On the CPU --memory
  asks for it: the peak resident set of one process per configuration and mode, without what
  Python and the libraries take before the model is built.
"""

import argparse
import itertools
import json
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from detectron2.config import CfgNode

from il_net.benchmark.peers import PEERS, PeerSubject, is_peer, peer_config
from il_net.benchmark.semisup_timing import SemisupSubject, is_semisup
from il_net.benchmark.timing import Subject, in_turn, machine_facts, peak_resident_bytes, profile
from il_net.benchmark.timing_report import TITLES, compare, render
from il_net.benchmark.workload import MODES, SEMISUP, make_workload
from il_net.config import load_config
from il_net.engine.train_step import AMP_DTYPES
from il_net.errors import plain_errors
from sbr_cnn import add_sbr_cnn_config

OVERRIDE = re.compile(r":(?=[A-Z][A-Z0-9_.]*=)")
NUM_CLASSES = 80  # where a configuration leaves it to the data
SETTINGS = ("device", "dtype", "size", "images", "repeat", "warmup", "modes", "opts")


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, write the JSON."""
    args = parse_arguments(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("il_net").setLevel(logging.INFO)
    if args.threads:
        torch.set_num_threads(args.threads)
    with plain_errors():
        configs = [load(text, args.opts, args.device) for text in args.configs]
        args.modes = choose_modes(args.modes, dict(zip(args.configs, configs, strict=True)))
        alone = {}
        if args.memory and args.device == "cpu":
            # Before there are models: a process inherits the peak of the one that starts it.
            for text in dict.fromkeys(args.configs):
                alone[text] = {mode: measure_alone(text, mode, args) for mode in args.modes}
        before = peak_resident_bytes()
        subjects = build(args, configs)
    if args.profile:
        print_profiles(subjects, args.modes, args.warmup)
        return
    configs = compare(measure(subjects, args, alone))  # before the peak is read
    report = {
        "machine": machine_facts(args.device),
        "resident_bytes": {"before_models": before, "peak": peak_resident_bytes()},
        "settings": {k: getattr(args, k) for k in SETTINGS},
        "configs": configs,
    }
    print(render(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked as far as argparse can."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("configs", nargs="+", metavar="CONFIG", help="FILE[:KEY=VALUE]... or torchvision:NAME")
    add("--device", choices=("cpu", "cuda"), default=device, help="cuda where there is one")
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    add("--size", type=_size, default=(800, 1216), metavar="HxW", help="picture (800x1216)")
    add("--images", type=_positive, default=1, metavar="N", help="per training step (1)")
    add("--repeat", type=_positive, default=5, metavar="N", help="measured rounds (5)")
    add("--warmup", type=_positive, default=1, metavar="N", help="rounds before them (1)")
    add("--modes", type=_modes, metavar="M[,M]", help="inference,train (both), or semisup alone")
    add("--threads", type=_positive, metavar="N", help="of torch on the CPU")
    add("--memory", action="store_true", help="measure memory on the CPU too")
    add("--profile", action="store_true", help="print the slowest operators instead of times")
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help="for all; CONFIG's own win")
    add("--output", type=Path, metavar="JSON")
    args = parser.parse_args(argv)
    if len(args.opts) % 2:
        parser.error(f"argument --opts: needs KEY VALUE pairs, got {args.opts}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda was asked for, torch finds no CUDA device")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"argument --output: there is no folder {args.output.parent}")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"needs a whole number from 1 on, got {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match or min(map(int, match.groups())) < 32:
        raise argparse.ArgumentTypeError(
            f"needs HEIGHTxWIDTH in pixels, at least 32 each, as 800x1216, got {text!r}"
        )
    return int(match[1]), int(match[2])


def _modes(text: str) -> tuple[str, ...]:
    if text == SEMISUP:
        return (SEMISUP,)
    if not set(text.split(",")) <= set(MODES):
        raise argparse.ArgumentTypeError(
            f"needs some of {','.join(MODES)}, or {SEMISUP} alone, got {text!r}"
        )
    return tuple(mode for mode in MODES if mode in text.split(","))


def split_config(text: str) -> tuple[str, list[str]]:
    """``FILE:KEY=VALUE:...`` as the file and ``[KEY, VALUE, ...]``; a VALUE may hold colons."""
    file, *pairs = OVERRIDE.split(text)
    return file, [part for pair in pairs for part in pair.split("=", 1)]


def make_label(text: str) -> str:
    """The file's name without ending, and the last part of each key with its value."""
    file, opts = split_config(text)
    keys = (key.rsplit(".", 1)[-1] for key in opts[::2])
    return " ".join([Path(file).stem, *map("=".join, zip(keys, opts[1::2], strict=True))])


def load(text: str, opts: list[str], device: str) -> CfgNode:
    """The configuration of a CONFIG argument.

    Raises:
        FileNotFoundError, ValueError: naming the argument.
    """
    file, own = split_config(text)
    if file not in PEERS and not Path(file).is_file():
        raise FileNotFoundError(
            f"CONFIG {text}: there is no file {file}; write FILE or FILE:KEY=VALUE[:KEY=VALUE ...] "
            f"or one of {', '.join(PEERS)}"
        )
    with naming(text):
        if file in PEERS:
            cfg = peer_config(file, [*opts, *own])
        else:
            cfg = load_config(file, [*opts, *own], add_sbr_cnn_config)
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.DEVICE = device
    cfg.freeze()
    return cfg


def choose_modes(asked: tuple[str, ...] | None, configs: dict[str, CfgNode]) -> tuple[str, ...]:
    """What to measure: the mode of semi-supervised configurations if there is one of them.

    Args:
        asked: with ``--modes``.
        configs: by CONFIG argument.

    Raises:
        ValueError: a CONFIG that has no such mode.
    """
    modes = asked or ((SEMISUP,) if any(map(is_semisup, configs.values())) else MODES)
    for text, cfg in configs.items():
        if is_semisup(cfg) and modes != (SEMISUP,):
            raise ValueError(
                f"CONFIG {text}: MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} is measured "
                f"in mode {SEMISUP} alone, got --modes {','.join(modes)}; leave --modes out"
            )
        if modes == (SEMISUP,) and not is_semisup(cfg):
            raise ValueError(
                f"CONFIG {text}: mode {SEMISUP} needs MODEL.META_ARCHITECTURE TeacherStudentRCNN, "
                f"got {cfg.MODEL.META_ARCHITECTURE}; compare it in a call of its own"
            )
    return modes


@contextmanager
def naming(text: str) -> Iterator[None]:
    """Say which CONFIG a mistake is in."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"CONFIG {text}: {error}") from error


def build(args: argparse.Namespace, configs: list[CfgNode]) -> list[Subject]:
    """The models of the CONFIG arguments, all with the same work."""
    workload = make_workload(args.size)
    amp_dtype = None if args.dtype == "fp32" else AMP_DTYPES[args.dtype]
    subjects = []
    for text, cfg in zip(args.configs, configs, strict=True):
        kind = PeerSubject if is_peer(cfg) else SemisupSubject if is_semisup(cfg) else Subject
        with naming(text):
            label = make_label(text)
            subjects.append(kind(label, cfg, workload, images=args.images, amp_dtype=amp_dtype))
    return subjects


def measure_alone(text: str, mode: str, args: argparse.Namespace) -> int:
    """Peak resident set, in bytes, of two runs of one CONFIG in a process, without its imports."""
    height, width = args.size
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run.json"
        options = {
            "--modes": mode,
            "--output": output,
            "--device": "cpu",
            "--dtype": args.dtype,
            "--size": f"{height}x{width}",
            "--images": args.images,
            "--repeat": 1,
            "--threads": torch.get_num_threads(),
        }
        command = [sys.executable, __file__, text, *itertools.chain(*options.items()), "--opts"]
        done = subprocess.run([*map(str, command), *args.opts], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise ValueError(f"--memory: the process for CONFIG {text} failed, see above")
        resident = json.loads(output.read_text())["resident_bytes"]
        return resident["peak"] - resident["before_models"]


def measure(
    subjects: list[Subject], args: argparse.Namespace, alone: dict[str, dict[str, int]]
) -> list[dict]:
    """Time all models in turn; the result is what ``compare`` takes.

    ``alone``: CONFIG to peak memory by mode, where it was measured in a process of its own.
    """
    results = [
        {"config": text, "label": subject.label, "parameters": subject.parameters}
        for text, subject in zip(args.configs, subjects, strict=True)
    ]
    for mode in args.modes:
        runs = [partial(subject.run, mode) for subject in subjects]
        all_times = in_turn(runs, warmup=args.warmup, repeat=args.repeat)
        for result, subject, times in zip(results, subjects, all_times, strict=True):
            result[mode] = {
                "times": times,
                "peak_bytes": alone.get(result["config"], subject.peak_bytes)[mode],
                "seen": subject.seen[mode],
                "differs": subject.differs(mode),
            }
            if mode == SEMISUP:
                result[mode]["phases"] = subject.phases[-args.repeat :]
    return results


def print_profiles(subjects: list[Subject], modes: tuple[str, ...], warmup: int) -> None:
    """The slowest operators of one run of each model and mode."""
    for subject in subjects:
        for mode in modes:
            for _ in range(warmup):
                subject.run(mode)
            print(f"\n{subject.label}, {TITLES[mode]}\n{profile(subject, mode)}")


if __name__ == "__main__":
    main()
