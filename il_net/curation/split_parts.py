"""A COCO file cut into a train and a val part, by whole images or groups of them.

Thesis sections 2.5 and 2.6: LDD and ASND were split 80 / 20 with cocosplit, which has no seed and
knows no groups. Here groups are ranked by a hash of the seed and their smallest image id, so that
no process, library version or order of the file can change a split.
"""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

from ..data.split_file import ImageId
from ..data.stratify import PossibleSums, add_up, floor_share, order_by_hash, stratify

Groups = dict[ImageId, list[ImageId]]


def count_objects(annotations: Iterable[Mapping[str, Any]]) -> Counter:
    """How many objects of each category there are; a crowd is none."""
    return Counter(a["category_id"] for a in annotations if not a.get("iscrowd", 0))


def objects_by_image(data: Mapping[str, Any]) -> dict[ImageId, Counter]:
    """`count_objects` of every image of a COCO file, images without any included."""
    annotations: dict[ImageId, list] = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    return {image_id: count_objects(own) for image_id, own in annotations.items()}


def drop_empty_images(data: Mapping[str, Any]) -> dict[str, Any]:
    """A COCO file without the images that have no annotation at all."""
    annotated = {a["image_id"] for a in data["annotations"]}
    return {**data, "images": [i for i in data["images"] if i["id"] in annotated]}


def group_images(images: Sequence[dict], column: str = "", pattern: str = "") -> Groups:
    """The images that must stay together, by the smallest id of each group.

    An image file that is there under several ids, as Label Studio exports it for each of its
    annotations, is always in one group.

    Args:
        images: records of a COCO file.
        column: a key of the records; images with the same value stay together.
        pattern: or a regular expression that is searched for in `file_name`; what its first
            capture group finds (without one: the whole expression) names the group.

    Raises:
        ValueError: an image without a group, an image file in two, or not a regular expression.
    """
    key = _group_key(column, pattern)
    keys: dict[str, Hashable] = {}
    members = defaultdict(list)
    for image in images:
        file = posixpath.normpath(image["file_name"].replace("\\", "/"))
        own = key(image) if key else file
        if keys.setdefault(file, own) != own:
            raise ValueError(
                f"{_name(image)}: the file is there under several image ids, once in the group "
                f"{keys[file]!r} and once in {own!r}"
            )
        members[own].append(image["id"])
    return {min(ids): sorted(ids) for ids in members.values()}


def _group_key(column: str, pattern: str) -> Callable[[dict], Hashable] | None:
    if column:

        def by_column(image: dict) -> Hashable:
            value = image.get(column)
            if not isinstance(value, str | int) or value == "":
                raise ValueError(
                    f"--group-by {column}: must be text or a whole number in every image record, "
                    f"but is {value!r} in {_name(image)}"
                )
            return value

        return by_column
    if not pattern:
        return None
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--group-regex {pattern}: not a regular expression: {error}") from error

    def by_name(image: dict) -> Hashable:
        match = expression.search(image["file_name"])
        found = match and match[min(1, expression.groups)]
        if not found:
            raise ValueError(f"--group-regex {pattern}: finds nothing in {_name(image)}")
        return found

    return by_name


def _name(image: Mapping[str, Any]) -> str:
    return f"image {image['id']} ({image['file_name']})"


def count_train(fraction: float, total: int) -> int:
    """floor(fraction * total) of the decimal number as written: cocosplit's train size.

    Raises:
        ValueError: not above 0 and below 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--fraction must be above 0 and below 1, got {fraction}")
    return floor_share(fraction, total)


def draw_train(
    groups: Groups,
    fraction: float,
    seed: int,
    objects: Mapping[ImageId, Counter] | None = None,
) -> set[ImageId]:
    """The image ids of the train part; the others are the val part.

    As many as `count_train` says; if whole groups cannot make that, as near as they can, and
    neither part is empty.

    Args:
        groups: of `group_images`.
        fraction: of the images.
        seed: another one draws other images.
        objects: of `objects_by_image`, for a stratified draw: see `stratify`.

    Raises:
        ValueError: see `count_train`, or one part would be empty.
    """
    sizes = {first: len(ids) for first, ids in groups.items()}
    total = sum(sizes.values())
    count = count_train(fraction, total)
    if not count or len(groups) < 2:
        raise ValueError(
            f"--fraction {fraction}: of {total} images in {len(groups)} groups, {count} would be "
            "in train: each part needs an image or, with groups, a whole group"
        )
    count = PossibleSums(list(sizes.values())).nearest(count)
    own = objects or {}
    classes = {first: add_up(own.get(i, Counter()) for i in ids) for first, ids in groups.items()}
    chosen = stratify(order_by_hash(groups, str(seed)), count, classes, sizes)
    return {image_id for first in chosen for image_id in groups[first]}


def take_part(
    data: Mapping[str, Any], ids: Collection[ImageId], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """The images of a COCO file with these ids, their annotations and all categories.

    Records and their order are untouched; `origin` becomes `info.split`.
    """
    info = data.get("info")
    return {
        **data,
        "info": {**(info if isinstance(info, dict) else {}), "split": dict(origin)},
        "images": [i for i in data["images"] if i["id"] in ids],
        "annotations": [a for a in data["annotations"] if a["image_id"] in ids],
    }


def share_table(names: Mapping[int, str], parts: Mapping[str, Sequence[Counter]]) -> str:
    """Text: for every class its objects and images in each part, and the part's share of them.

    Args:
        names: of the classes, by category id.
        parts: for each part the objects in each of its images (see `count_objects`).
    """
    counts = {part: add_up(images) for part, images in parts.items()}
    shown = {part: add_up(Counter(set(own)) for own in images) for part, images in parts.items()}
    width = max(map(len, ("class", *names.values())))
    lines = ["class".ljust(width) + "".join(f"{p:>12}   share  images" for p in parts)]

    def add(name: str, objects: list[int], images: list[int]) -> None:
        pairs = zip(objects, images, strict=True)
        cells = [f"{o:>12}{_share(o, sum(objects))}{i:>8}" for o, i in pairs]
        lines.append(name.ljust(width) + "".join(cells))

    for category, name in sorted(names.items()):
        add(name, [counts[p][category] for p in parts], [shown[p][category] for p in parts])
    add("all", [c.total() for c in counts.values()], [len(own) for own in parts.values()])
    for part in parts:
        absent = [n for c, n in sorted(names.items()) if not counts[part][c]]
        if absent:
            lines.append(f"no object in {part}: {', '.join(absent)}")
    return "\n".join(lines)


def _share(part: int, total: int) -> str:
    return f"{100 * part / total:>6.1f} %" if total else "       -"
