"""The two formats of split files: Unbiased Teacher's positions, and lists of image ids.

Unbiased Teacher's `COCO_supervision.txt` is one JSON object, percent -> seed -> positions in the
list of the dataset's images, sorted by id, without those that have no annotations but crowds.

Ours names the images, and what it was made for:

    {"dataset": "asnd_train", "unit": "image_id", "total": 3199, "sha256": "...",
     "labeled": {"5.0": {"1": [3, 17, ...]}}}

`sha256` is that of the sorted list of all image ids as compact JSON.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ImageId = int | str
_KEY = "DATASETS.SPLIT.FILE"
_UNIT = "image_id"


def hash_ids(ids: Iterable[ImageId]) -> str:
    """SHA-256 (hexadecimal) of the sorted ids as compact JSON."""
    return hashlib.sha256(json.dumps(sorted(ids), separators=(",", ":")).encode()).hexdigest()


def split_document(
    dataset: str,
    ids: Sequence[ImageId],
    labeled: Mapping[float, Mapping[int, Sequence[ImageId]]],
) -> dict[str, Any]:
    """Our format, ready for JSON.

    Args:
        dataset: its name, for the reader.
        ids: all its images.
        labeled: percent -> seed -> the images that keep their labels.
    """
    return {
        "dataset": dataset,
        "unit": _UNIT,
        "total": len(ids),
        "sha256": hash_ids(ids),
        "labeled": {
            str(float(percent)): {str(seed): sorted(kept) for seed, kept in by_seed.items()}
            for percent, by_seed in labeled.items()
        },
    }


def read_labeled(
    path: str, ids: Sequence[ImageId], percent: float, seed: int, count: int
) -> tuple[ImageId, ...]:
    """The ids that keep their labels, sorted, from a file of either format.

    Args:
        path: the file.
        ids: the images of the training set, sorted; positions are in this list.
        percent, seed: which list of the file.
        count: how many images `percent` is.

    Raises:
        ValueError: not such a file, no such list in it, or made for other images.
    """
    try:
        with open(path, encoding="utf-8") as f:
            data = json.load(f)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{_KEY}: {path} is not JSON: {error}") from error
    if isinstance(data, dict) and "unit" in data:
        _check_document(path, data, ids)
        labeled = _find_list(path, data["labeled"], percent, seed)
        unknown = set(labeled).difference(ids)
        if unknown:
            raise ValueError(f"{_KEY}: {path} lists images that it does not count: {unknown}")
    else:
        positions = _find_list(path, data, percent, seed)
        _check_positions(path, positions, len(ids), percent, count)
        labeled = [ids[position] for position in positions]
    if len(set(labeled)) < len(labeled):
        raise ValueError(f"{_KEY}: {path} lists an image twice at {percent} %, seed {seed}")
    return tuple(sorted(labeled))


def _find_list(path: str, table: Any, percent: float, seed: int) -> list:
    """table[percent][seed], where "10", "10.0" and "1e1" are one percentage."""
    try:
        by_percent = {float(key): value for key, value in table.items()}
        available = {key: sorted(map(int, value)) for key, value in by_percent.items()}
        found = by_percent.get(float(percent), {}).get(str(seed))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_KEY}: {path} must be a JSON object, percent -> seed -> list: the published "
            "COCO_supervision.txt or a file of tools/split_coco.py"
        ) from error
    if found is None:
        raise ValueError(
            f"{_KEY}: {path} has no list for DATASETS.SPLIT.PERCENT {percent} and SEED {seed}; "
            f"it has {{percent: seeds}} {available}"
        )
    if not isinstance(found, list) or not found:
        raise ValueError(f"{_KEY}: {path}: the entry at {percent} %, seed {seed} is no list")
    return found


def _check_document(path: str, data: dict[str, Any], ids: Sequence[ImageId]) -> None:
    missing = {"dataset", "total", "sha256", "labeled"}.difference(data)
    if missing or data["unit"] != _UNIT:
        raise ValueError(
            f"{_KEY}: {path} must have unit '{_UNIT}' and dataset, total, sha256 and labeled; "
            f"unit is {data['unit']!r}, missing are {sorted(missing)}"
        )
    if (data["total"], data["sha256"]) != (len(ids), hash_ids(ids)):
        raise ValueError(
            f"{_KEY}: {path} was made for other images: '{data['dataset']}' with {data['total']} "
            f"images, while DATASETS.TRAIN has {len(ids)} or other ids. "
            "Images without annotations count with DATALOADER.FILTER_EMPTY_ANNOTATIONS False only. "
            "Make a file for this dataset with tools/split_coco.py"
        )


def _check_positions(path: str, positions: list, total: int, percent: float, count: int) -> None:
    if not all(type(p) is int and p >= 0 for p in positions):
        raise ValueError(f"{_KEY}: {path} must list positions (whole numbers from 0)")
    if len(positions) != count or max(positions) >= total:
        raise ValueError(
            f"{_KEY}: {path} was made for another dataset: {percent} % of the {total} images of "
            f"DATASETS.TRAIN are {count}, the list has {len(positions)}, the largest position is "
            f"{max(positions)}. It counts images sorted by id without empty ones (COCO train2017: "
            "117266; keep DATALOADER.FILTER_EMPTY_ANNOTATIONS True). "
            "Make a file for this dataset with tools/split_coco.py"
        )
