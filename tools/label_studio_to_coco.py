#!/usr/bin/env python
"""Make a clean COCO file from what Label Studio exports, and tell what was mended or dropped.

python tools/label_studio_to_coco.py --input export.json --images FOLDER --output clean.json
python tools/label_studio_to_coco.py --input result.json --images FOLDER --output clean.json \\
    --categories table.json --ignore-labels "other" --strict

Reads Label Studio's JSON (the best choice: it has everything), JSON_MIN and COCO exports, and finds
out which one it is. Pictures are looked for in FOLDER and its subfolders, nowhere else.

--strict         mend and drop nothing: say what is wrong, write nothing, exit code 1
--categories     class ids: a JSON of {"name": id}, or a COCO file; every label must be in it
--first-id       number the classes alphabetically from here (JSON: from 1; COCO: as they are)
--annotations    of several for one picture: the ground truth, else the latest (best), or all
--several-labels of a region with several: use the first, or make an object of each
--ignore-labels  leave out regions with these labels
--label-from     use only the labels of these controls (the "name" in the labelling setup)
--image-key      the field of a task that names the picture (default: image)
"""

import argparse
from collections import Counter
from pathlib import Path

from il_net.curation.label_studio.convert import Conversion, convert, read_table
from il_net.curation.label_studio.records import Choices
from il_net.data.coco_file import write_coco
from il_net.data.report import Severity
from il_net.errors import check_output, plain_errors


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, metavar="FILE")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--strict", action="store_true")
    numbering = parser.add_mutually_exclusive_group()
    numbering.add_argument("--categories", type=Path, metavar="FILE")
    numbering.add_argument("--first-id", type=int, metavar="N")
    parser.add_argument("--annotations", choices=("best", "all"), default="best")
    parser.add_argument("--several-labels", choices=("first", "each"), default="first")
    parser.add_argument("--ignore-labels", nargs="+", default=[], metavar="LABEL")
    parser.add_argument("--label-from", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--image-key", default="", metavar="NAME")
    return parser.parse_args()


def describe(conversion: Conversion) -> str:
    """What is in the file, class by class."""
    coco = conversion.coco
    counts = Counter(annotation["category_id"] for annotation in coco["annotations"])
    lines = [
        f"{conversion.kind} export: {len(coco['images'])} pictures, "
        f"{len(coco['annotations'])} annotations, {len(coco['categories'])} classes"
    ]
    lines += [f"  {c['id']:4d} {c['name']!r}: {counts[c['id']]}" for c in coco["categories"]]
    return "\n".join(lines)


def main() -> None:
    """Convert, report and write."""
    args = parse_arguments()
    with plain_errors():
        check_output(args.output, is_folder=False)
        if args.output.resolve() == args.input.resolve():
            raise ValueError(f"--output: {args.output} is the export itself; name another file")
        choices = Choices(
            annotations=args.annotations,
            several_labels=args.several_labels,
            label_from=tuple(args.label_from),
            ignore_labels=tuple(args.ignore_labels),
            image_key=args.image_key,
            table=read_table(args.categories) if args.categories else None,
            first_id=args.first_id,
        )
        conversion = convert(args.input, args.images, choices)
        severity = Severity.ERROR if args.strict else Severity.WARNING
        problems = conversion.account.problems(severity)
        for problem in problems:
            print(problem)
        for kind, count in conversion.account.notes.items():
            print(f"note: {count} {kind}")
        if args.strict and problems:
            raise ValueError(f"--strict: {len(problems)} kinds of problem, nothing was written")
        write_coco(args.output, conversion.coco)
    print(describe(conversion))
    print(args.output)


if __name__ == "__main__":
    main()
