"""Everything wrong with data sets: each file or folder for itself, and one against the others.

Beside the checks that every run begins with (`validate`) the slow ones and the pedantic ones.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..data.coco_checks import check_repeats, same_file
from ..data.coco_file import read_coco_json
from ..data.report import Findings, Problem, Report, Severity
from ..data.validate import Records, check_records, make_report
from .image_checks import Picture, check_readable, check_sizes, probe_pictures
from .near_duplicates import NUM_BITS, find_twins
from .polygon_checks import check_outlines


@dataclass(frozen=True)
class Inspection:
    """What one file or folder holds and what is wrong with it.

    `data` is the COCO file as read, None for a folder and for what is no JSON; `pictures` are its
    image files by `coco_checks.same_file` of their names.
    """

    report: Report
    records: Records
    pictures: Mapping[str, Picture]
    data: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The file, or the folder."""
        return self.report.json_file or self.report.image_root


def inspect_coco(
    json_file: str,
    image_root: str,
    *,
    pixels: bool,
    pictures: Mapping[str, Picture] | None = None,
) -> Inspection:
    """Check a COCO file and its images; mistakes in the data never raise.

    Args:
        json_file, image_root: the file, and the folder of its images.
        pixels: whether images are decoded; else only their headers are read.
        pictures: of an earlier inspection of the same images, instead of reading them again.

    Raises:
        FileNotFoundError: `json_file` does not exist.
    """
    findings = Findings()
    try:
        data = read_coco_json(json_file)
    except ValueError as e:
        findings.state(str(e))
        report = make_report(json_file, image_root, None, findings)
        return Inspection(report, Records([], [], [], []), {})
    # Of a copy: unlabelled files are completed by the check.
    records = check_records(
        dict(data),
        json_file,
        image_root,
        findings,
        labeled=False,
        scored=bool(data.get("annotations")),
        masks=False,
    )
    if records is None:
        report = make_report(json_file, image_root, None, findings)
        return Inspection(report, Records([], [], [], []), {}, data)
    if pictures is None:
        pictures = probe_pictures(image_root, records.files, pixels)
    listed = set(map(same_file, records.files))
    pictures = {name: picture for name, picture in pictures.items() if name in listed}
    check_readable(pictures, findings)
    check_sizes(records.images, pictures, findings)
    _check_copies(pictures, findings)
    check_repeats(records.annotations, records.images, findings)
    check_outlines(records.annotations, records.images, findings)
    findings.add(
        "categories with id 0",
        [f"'{c['name']}'" for c in records.categories if c["id"] == 0],
        severity=Severity.NOTE,
        consequence="fine here; some tools take 0 for the background",
    )
    report = make_report(json_file, image_root, records, findings)
    return Inspection(report, records, pictures, data)


def inspect_folder(image_root: str, *, pixels: bool) -> Inspection:
    """Check the images of a folder and of the folders in it.

    Raises:
        ValueError: there is no image in it.
    """
    from ..data.sources import ImagesSource  # imports Detectron2, which COCO files can do without

    files = [record["image_id"] for record in ImagesSource(os.path.abspath(image_root)).load()]
    if not files:
        raise ValueError(f"there is no image in {image_root}")
    findings = Findings()
    pictures = probe_pictures(image_root, files, pixels)
    check_readable(pictures, findings)
    report = Report("", image_root, num_images=len(files), problems=tuple(findings.problems))
    return Inspection(report, Records([], [], [], files), pictures)


def compare(inspections: Sequence[Inspection]) -> tuple[Problem, ...]:
    """What is wrong between files and folders: categories, classes, images in several of them."""
    findings = Findings()
    _check_category_tables([i for i in inspections if i.records.categories], findings)
    _check_classes([i for i in inspections if i.records.annotations], findings)
    for a, b in combinations(inspections, 2):
        _check_leaks(a, b, findings)
    return tuple(findings.problems)


def _check_category_tables(inspections: Sequence[Inspection], findings: Findings) -> None:
    """That files give one id to one name, and know the same names."""
    conflicts, absent = [], []
    for field, other in (("name", "id"), ("id", "name")):
        tables = {i.name: {c[field]: c[other] for c in i.records.categories} for i in inspections}
        for key in sorted({key for table in tables.values() for key in table}):
            found = {name: table[key] for name, table in tables.items() if key in table}
            if len(set(found.values())) > 1:
                is_in = ", ".join(f"{value!r} in {name}" for name, value in found.items())
                conflicts.append(f"{field} {key!r} has {other} {is_in}")
            if field == "name":
                absent += [f"'{key}' is not in {name}" for name in tables if name not in found]
    findings.add(
        "categories that differ between the files",
        conflicts,
        consequence="models and results of one file do not fit the other",
    )
    findings.add("categories that some files lack", absent, severity=Severity.WARNING)


def _check_classes(inspections: Sequence[Inspection], findings: Findings) -> None:
    """That every class has objects in every file; crowds do not count."""
    counts: dict[str, Counter[str]] = {}
    names: dict[str, None] = {}
    for inspection in inspections:
        of_id = {c["id"]: c["name"] for c in inspection.records.categories}
        counts[inspection.name] = Counter(
            of_id.get(a["category_id"])
            for a in inspection.records.annotations
            if not a.get("iscrowd", 0)
        )
        names.update(dict.fromkeys(of_id.values()))
    unused = [name for name in names if not any(count[name] for count in counts.values())]
    findings.add("categories without objects", [f"'{n}'" for n in unused], severity=Severity.NOTE)
    findings.add(
        "classes that some files have no objects of",
        [
            f"'{name}' in {file}"
            for name in names
            for file, count in counts.items()
            if name not in unused and not count[name]
        ],
        severity=Severity.WARNING,
        consequence="it can't be learned there, or not scored",
    )


def _check_leaks(a: Inspection, b: Inspection, findings: Findings) -> None:
    """That no image of `b` is in `a`, as the same file or as one that looks like it."""

    def files(i: Inspection) -> dict[str, str]:
        root = os.path.realpath(i.report.image_root)
        return {name: os.path.join(root, name) for name in map(same_file, i.records.files)}

    files_a = set(files(a).values())
    shared = [name for name, path in files(b).items() if path in files_a]
    consequence = "an image on both sides of a split makes scores too good"
    if not (a.report.json_file and b.report.json_file):
        consequence = "of a train file: nothing new to learn; of a val file: scores get too good"
    findings.add(
        f"files of {b.name} that are in {a.name} too",
        shared,
        severity=Severity.WARNING,
        consequence=consequence,
    )
    known = _hashes(a.pictures)
    new = {name: bits for name, bits in _hashes(b.pictures).items() if name not in set(shared)}
    if not known or not new:
        return
    twins, bits = find_twins(np.array(list(new.values())), np.array(list(known.values())))
    names, known_names = list(new), list(known)
    findings.add_rows(
        f"images of {b.name} that look like one of {a.name}",
        np.flatnonzero(twins >= 0),
        lambda i: f"{names[i]} like {known_names[twins[i]]} ({bits[i]} of {NUM_BITS} bits differ)",
        severity=Severity.WARNING,
        consequence=consequence,
    )


def _check_copies(pictures: Mapping[str, Picture], findings: Findings) -> None:
    """That no two images of one file look alike."""
    hashes = _hashes(pictures)
    if not hashes:
        return
    twins, bits = find_twins(np.array(list(hashes.values())))
    names = list(hashes)
    findings.add_rows(
        "images that look like another one of the file",
        np.flatnonzero(twins >= 0),
        lambda i: f"{names[i]} like {names[twins[i]]} ({bits[i]} of {NUM_BITS} bits differ)",
        severity=Severity.NOTE,
        consequence="a split may part them, unless it keeps groups together",
    )


def _hashes(pictures: Mapping[str, Picture]) -> dict[str, np.ndarray]:
    return {name: p.hash for name, p in pictures.items() if p.hash is not None}
