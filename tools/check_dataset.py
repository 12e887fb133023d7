#!/usr/bin/env python
"""Find everything wrong with COCO files and folders of images, before a training does.

python tools/check_dataset.py --json train.json val.json --images FOLDER [--fix OUT]
python tools/check_dataset.py --images FOLDER

--json        COCO files, such as the two sides of a split
--images      their folder, or one for each file; further ones hold images without labels
--fix         a folder, into which mended copies of the files are written
--no-pixels   read only the headers of images: quick, but blind for truncated and similar ones

Says what is an error (stops a training, or spoils it), a warning or a note, how often it occurs,
and the first cases. --fix mends what leaves no doubt, says what it did, and then what is left in
the mended files; the originals, and the images, stay as they are.

Exit code 0: nothing but notes; 3: warnings; 4: errors; with --fix of the mended files. 1: a mistake
in the call, such as a missing file; 2: an unknown option.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from il_net.curation.inspection import Inspection, compare, inspect_coco, inspect_folder
from il_net.curation.mend import mend
from il_net.data.coco_file import write_coco
from il_net.data.report import Problem, Severity, describe
from il_net.errors import check_output, plain_errors

EXIT_CODES = {Severity.NOTE: 0, Severity.WARNING: 3, Severity.ERROR: 4}


def pair(json_files: Sequence[str], folders: Sequence[str]) -> list[tuple[str, str]]:
    """Json file, "" where there is none, and folder of each data set.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a file or folder is given twice, or too few folders.
    """
    for json_file in json_files:
        if not Path(json_file).is_file():
            raise FileNotFoundError(f"--json: there is no file {json_file}")
    for folder in folders:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--images: there is no folder {folder}")
    if len(set(json_files)) < len(json_files):
        raise ValueError(f"--json: a file is given twice: {' '.join(json_files)}")
    if len(folders) == 1 and json_files:
        folders = list(folders) * len(json_files)
    if len(folders) < len(json_files):
        raise ValueError(
            f"--images: give one folder for all {len(json_files)} files of --json, or one for "
            f"each; got {len(folders)}"
        )
    unlabeled = folders[len(json_files) :]
    if len(set(unlabeled)) < len(unlabeled):
        raise ValueError(f"--images: a folder is given twice: {' '.join(unlabeled)}")
    return list(zip([*json_files, *[""] * len(unlabeled)], folders, strict=True))


def find_targets(json_files: Sequence[str], folder: Path) -> dict[str, Path]:
    """Where the mended copy of each file goes.

    Raises:
        ValueError: there is no file to mend, two have one name, or one would be overwritten.
    """
    if not json_files:
        raise ValueError("--fix mends files: give them with --json")
    targets = {name: folder / Path(name).name for name in json_files}
    if len(set(targets.values())) < len(targets):
        raise ValueError(f"--fix: files of one name can't share a folder: {' '.join(json_files)}")
    originals = {Path(name).resolve() for name in json_files}
    for target in targets.values():
        if target.resolve() in originals:
            raise ValueError(f"--fix: {target} would replace an original: give another folder")
    return targets


def fix(inspection: Inspection, target: Path) -> Inspection:
    """Write a mended copy, tell what was done, and inspect the copy.

    Raises:
        ValueError: what is no COCO file at all.
    """
    if inspection.data is None:
        raise ValueError(f"--fix: {inspection.name} is not JSON")
    try:
        data, done = mend(inspection.data, inspection.pictures)
        write_coco(target, data)
    except ValueError as error:
        raise ValueError(f"--fix: {inspection.name}: {error}") from error
    print(f"\n{inspection.name} mended: {'' if done else 'nothing to do'}")
    for line in done:
        print(f"  {line}")
    root, pictures = inspection.report.image_root, inspection.pictures
    del inspection, data  # of a large file there is no room for two
    return inspect_coco(str(target), root, pixels=False, pictures=pictures)


def show(inspections: Sequence[Inspection]) -> list[Problem]:
    """Print the reports; returns all problems."""
    for inspection in inspections:
        print(inspection.report.summary())
    between = compare(inspections)
    if len(inspections) > 1 or between:
        print("Compared:")
        print("\n".join(describe(between)) or "  nothing found")
    problems = [p for i in inspections for p in i.report.problems] + list(between)
    counts = Counter(p.severity for p in problems)
    print(", ".join(f"{s.name.lower()}s: {counts[s]}" for s in sorted(Severity, reverse=True)))
    return problems


def main() -> int:
    """Inspect, mend if asked to; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--images", nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--fix", type=Path, metavar="OUT")
    parser.add_argument("--no-pixels", action="store_true")
    args = parser.parse_args()
    pixels = not args.no_pixels
    with plain_errors():
        targets = find_targets(args.json, args.fix) if args.fix else {}
        for target in targets.values():
            check_output(target, is_folder=False, option="--fix")
        inspections = [
            inspect_coco(json_file, folder, pixels=pixels)
            if json_file
            else inspect_folder(folder, pixels=pixels)
            for json_file, folder in pair(args.json, args.images)
        ]
        problems = show(inspections)
        if args.fix:
            for number, json_file in enumerate(args.json):
                inspections.insert(number, fix(inspections.pop(number), targets[json_file]))
            print("\nLeft for you:")
            problems = show(inspections)
    return EXIT_CODES[max((p.severity for p in problems), default=Severity.NOTE)]


if __name__ == "__main__":
    sys.exit(main())
