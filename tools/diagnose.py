#!/usr/bin/env python
"""Show where a detector's difficulties lie: pictures and numbers of a trained model.

python tools/diagnose.py --config-file output/run/config.yaml --output diagnosis \
    MODEL.WEIGHTS output/run/model_final.pth
python tools/diagnose.py --run output/run --output diagnosis        (only what the run has logged)

--config-file  of a finished run; the data are those of the first name in DATASETS.TEST
--output       the folder of the pictures and of diagnosis.json
--images       at most so many for anchors and proposals (default 200)
--loops        numbers of loops at test to evaluate, as 1,3,5 (looped heads; default: 1 to one
               more than trained)
--run          a run's folder: quality of its pseudo labels, IoU of its proposals in training

Pictures: anchors.png, proposals.png, loops.png, sizes.png, counts.png; of a run's logs
pseudo_labels.png and training_proposals.png. inference/ has the detections.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger
from torch import nn

from il_net.checkpoint import Checkpointer
from il_net.config import load_config
from il_net.data.datasets import register_datasets
from il_net.data.validate import validate_datasets
from il_net.errors import plain_errors
from il_net.evaluation import diagnosis, diagnosis_figures
from il_net.safe_load import add_trust_option
from sbr_cnn import add_sbr_cnn_config

TASKS = ("bbox", "segm")
SIZES = {"APs": "small (below 32 x 32)", "APm": "medium", "APl": "large (96 x 96 or more)"}


def load_model(config_file: str, opts: list[str], output: Path) -> tuple[CfgNode, nn.Module]:
    """The configuration and its trained model in evaluation mode; of two models the teacher."""
    cfg = load_config(config_file, opts, add_sbr_cnn_config)
    cfg.OUTPUT_DIR = str(output)
    register_datasets(cfg)
    validate_datasets(cfg)
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: name a dataset with labels")
    model = build_model(cfg)
    Checkpointer(model).load_complete(cfg.MODEL.WEIGHTS)
    if hasattr(model, "burned_in"):
        model = model.teacher if model.burned_in else model.student
    if not all(getattr(model, part, None) for part in ("proposal_generator", "roi_heads")):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} has no RPN or no RoI heads; "
            "only detectors with both are examined"
        )
    return cfg, model.eval()


def loop_numbers(text: str, model: nn.Module) -> list[int]:
    """Of --loops, or where it is empty 1 to one more than trained; none without loops."""
    if not hasattr(model.roi_heads, "schedule"):
        if text:
            raise ValueError(f"--loops {text}: MODEL.ROI_HEADS.NAME is not LoopROIHeads")
        return []
    if not text:
        return list(range(1, len(model.roi_heads.schedule.order) + 2))
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"--loops are numbers from 1 on with commas between, got {text!r}")
    return sorted({int(word) for word in words})


def examine_boxes(cfg: CfgNode, model: nn.Module, output: Path, images: int) -> dict:
    """Draw how anchors and proposals overlap the objects; returns the numbers."""
    name = cfg.DATASETS.TEST[0]
    anchors = diagnosis.unmatched_by_anchors(model, diagnosis.labelled_images(cfg, name, images))
    diagnosis_figures.anchor_figure(
        output / "anchors.png", anchors["without_anchor"], anchors["objects"]
    )
    loops = diagnosis.loop_histograms(model, diagnosis.labelled_images(cfg, name, images))
    diagnosis_figures.proposal_figure(output / "proposals.png", "at test", loops)
    return {"anchors": anchors, "loops": loops}


def examine_metrics(cfg: CfgNode, model: nn.Module, output: Path, loops: list[int]) -> dict:
    """Draw AP by loops at test, size and number of objects; returns the numbers."""
    found, name = {}, cfg.DATASETS.TEST[0]
    configured = len(model.roi_heads.schedule.test) if loops else 0
    # Before the evaluation as configured, whose detections are those that stay.
    others = [number for number in loops if number != configured]
    by_loops = diagnosis.ap_by_loops(cfg, model, name, others) if loops else {}
    groups = diagnosis.images_by_count(name)
    results, by_count = diagnosis.evaluate(cfg, model, name, groups)
    found["results"], found["by_count"] = results, by_count
    by_size = {
        title: {task: results[task][key] for task in TASKS if task in results}
        for key, title in SIZES.items()
    }
    title = f"AP on {name} by the size of the objects, in pixels of the image"
    diagnosis_figures.metric_figure(output / "sizes.png", title, "area", by_size)
    rows = {f"{group}\n(images: {len(ids)})": by_count[group] for group, ids in groups.items()}
    title = f"AP on {name} by the number of objects in the image"
    diagnosis_figures.metric_figure(output / "counts.png", title, "objects in an image", rows)
    if loops:
        by_loops[configured] = results
        found["by_loops"] = {n: {t: r["AP"] for t, r in by_loops[n].items()} for n in loops}
        trained = len(model.roi_heads.schedule.order)
        title = f"AP on {name} by the number of loops at test; trained with {trained}"
        rows = {str(n): row for n, row in found["by_loops"].items()}
        diagnosis_figures.metric_figure(output / "loops.png", title, "loops at test", rows)
    return found


def examine(args: argparse.Namespace) -> dict:
    """Draw everything about a model; returns the numbers."""
    cfg, model = load_model(args.config_file, args.opts, args.output)
    loops, name = loop_numbers(args.loops, model), cfg.DATASETS.TEST[0]
    if not diagnosis.images_by_count(name):
        raise ValueError(f"DATASETS.TEST: {name} has no objects to compare with")
    marks = (mark for image in DatasetCatalog.get(name) for mark in image.get("annotations", ()))
    if cfg.MODEL.MASK_ON and not all(mark.get("segmentation") for mark in marks):
        raise ValueError(
            f"DATASETS.TEST: {name} has objects without a mask; to compare boxes only, set "
            "MODEL.MASK_ON False"
        )
    found = {"dataset": name, **examine_boxes(cfg, model, args.output, args.images)}
    return found | examine_metrics(cfg, model, args.output, loops)


def read_run(run: Path, output: Path) -> dict:
    """Draw what a run has logged; returns the numbers."""
    found = {}
    quality = read_lines(run / "pseudo_quality.json", "pseudo", "truth")
    statistics = read_lines(run / "roi_statistics.json", "loops")
    if not quality and not statistics:
        raise FileNotFoundError(
            f"--run {run} has no lines in pseudo_quality.json (SEMISUP.PSEUDO.COMPARE_WITH_TRUTH "
            "True) nor in roi_statistics.json (MODEL.ROI_STATISTICS_PERIOD above 0)"
        )
    if quality:
        found["pseudo_labels"] = quality
        diagnosis_figures.pseudo_figure(output / "pseudo_labels.png", quality)
    if statistics:
        # The last quarter of the run: what the trained model makes of the proposals.
        last = statistics[-1]["iteration"]
        late = [line["loops"] for line in statistics if line["iteration"] > 0.75 * last]
        loops = [
            np.sum([line[number]["iou_histogram"] for line in late], axis=0).tolist()
            for number in sorted(late[-1], key=int)
        ]
        found["training_proposals"] = loops
        diagnosis_figures.proposal_figure(output / "training_proposals.png", "in training", loops)
    return found


def read_lines(path: Path, *needed: str) -> list[dict]:
    """The JSON objects of a file with one a line; none where there is no file."""
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"--run: {path} is not one JSON value a line: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not {"iteration", *needed} <= line.keys():
            raise ValueError(
                f"--run: {path}: line {number} lacks 'iteration' or '{needed[0]}'; it is not what "
                "a run writes"
            )
    return lines


def summary(found: dict) -> list[str]:
    """The main numbers, a line each."""
    lines = []
    for number, counts in enumerate(found.get("loops", ()), start=1):
        high = sum(counts[14:]) / max(sum(counts), 1)  # bins of 0.05: from 0.7 on
        lines.append(f"loop {number}: {sum(counts)} boxes, {high:.1%} with an IoU of 0.7 or more")
    for number, row in found.get("by_loops", {}).items():
        aps = ", ".join(f"{task} AP {value:.1f}" for task, value in row.items())
        lines.append(f"{number} loops at test: {aps}")
    return lines


def without_nan(value: object) -> object:
    """The same with None for what JSON lacks: NaN and infinity."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Read the command line, examine, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--images", type=int, default=200, metavar="N")
    parser.add_argument("--loops", default="", metavar="N,N")
    parser.add_argument("--run", type=Path, metavar="DIR")
    add_trust_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    for name in ("il_net", "detectron2"):
        setup_logger(name=name)
    found = {}
    with plain_errors():
        if not args.config_file and not args.run:
            raise ValueError("name a --config-file, a --run, or both")
        if not args.config_file and (args.opts or args.loops):
            raise ValueError("--loops and KEY VALUE pairs go with a --config-file")
        if args.images < 1:
            raise ValueError(f"--images is 1 or more, got {args.images}")
        if args.run:
            found |= read_run(args.run, args.output)
        if args.config_file:
            found |= examine(args)
    path = args.output / "diagnosis.json"
    text = json.dumps(without_nan(found), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    print("\n".join([*summary(found), str(path)]))


if __name__ == "__main__":
    main()
