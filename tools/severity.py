#!/usr/bin/env python
"""Measure how much of a leaf its diseases cover, in each picture, and how far that is from truth.

python tools/severity.py --predictions detections.json --output severity.csv \\
    --group leaf=miner,rust [--group grape=rot] [--json truth.json] [--min-score S]

--predictions   coco_instances_results.json of an evaluation, or detections.json of predict.py,
                with masks
--json          truth, a COCO file with masks; without it, detections.json is measured alone
--group         a class and those that it contains; may be repeated

Severity is the area of a content's masks inside the container's masks, divided by the area of the
container's masks; objects of one class that overlap count once. The CSV file has a line for each
picture and content. Where no container is found there is no severity: the cell is empty, and the
picture is counted below the table.

The table has the means over the pictures with a container. With truth: "error" is the absolute
difference from it, in percent of the container; "affected" counts the pictures whose truth shows
the content, "error of affected" is the mean error over these, which healthy pictures do not dilute.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from il_net.errors import check_output, plain_errors
from il_net.evaluation.predictions import read_predictions, read_truth
from il_net.evaluation.severity import (
    ClassSummary,
    Group,
    measure,
    summarize,
    write_severities,
)


def parse_groups(texts: Sequence[str]) -> list[Group]:
    """The groups of the command line."""
    groups = []
    for text in texts:
        container, _, contents = text.partition("=")
        names = tuple(name.strip() for name in contents.split(","))
        if not container.strip() or not all(names):
            raise ValueError(f"--group is container=content,content,..., got '{text}'")
        groups.append(Group(container.strip(), names))
    return groups


def show(summaries: Sequence[ClassSummary], with_truth: bool) -> str:
    """The table for the terminal, shares in percent, and what was left out of its means."""
    headers = ["container", "content", "images", "predicted %"]
    rows = [[s.container, s.content, s.images, percent(s.predicted)] for s in summaries]
    if with_truth:
        headers += ["truth %", "error", "affected", "error of affected"]
        for row, s in zip(rows, summaries, strict=True):
            row += [percent(s.truth), percent(s.error), s.affected, percent(s.affected_error)]
    lines = [tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)]
    for container, s in {s.container: s for s in summaries}.items():
        if with_truth and s.missed:
            lines.append(f"images left out because their {container} was not found: {s.missed}")
        if s.made_up:
            lines.append(f"images left out because the truth has no {container}: {s.made_up}")
        if s.without:
            lines.append(f"images without {container}: {s.without}")
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """A share for the table; "-" where there is none."""
    return "-" if share is None else f"{share * 100:.2f}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predictions", required=True, metavar="FILE")
    parser.add_argument("--json", metavar="FILE", help="truth, a COCO file")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    parser.add_argument("--group", action="append", required=True, metavar="CLASS=CLASS,...")
    parser.add_argument("--min-score", type=float, default=0.5, help="of a detection (0.5)")
    args = parser.parse_args()
    setup_logger(name="il_net")
    with plain_errors():
        check_output(args.output, is_folder=False)
        groups = parse_groups(args.group)
        truth = read_truth(args.json, masks=True) if args.json else None
        found = read_predictions(args.predictions, truth, masks=True)
        rows = measure(groups, truth, found, min_score=args.min_score)
        write_severities(args.output, rows)
    print(show(summarize(rows, with_truth=truth is not None), truth is not None))
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
