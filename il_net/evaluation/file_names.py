"""Find the same pictures in two lists of file names that start at different folders."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

_NUM_NAMED = 3


def match_names(found: Sequence[str], truth: Sequence[str], source: str) -> dict[int, int]:
    """Position in the truth -> position in ``found``, where one name is the other's tail.

    So ``a.jpg`` and ``images/a.jpg`` are the same picture, ``x/a.jpg`` and ``y/a.jpg`` are not. A
    name that is equal goes before others.

    Args:
        found, truth: file names with ``/`` or ``\\``.
        source: where ``found`` comes from, for messages.

    Raises:
        ValueError: a name fits several, several fit one, or none fits at all.
    """
    by_base = defaultdict(list)
    for position, name in enumerate(truth):
        by_base[_parts(name)[-1:]].append((position, _parts(name)))
    matches: dict[int, int] = {}
    for index, name in enumerate(found):
        parts = _parts(name)
        near = [(p, other) for p, other in by_base.get(parts[-1:], ()) if _same_tail(parts, other)]
        near = [pair for pair in near if pair[1] == parts] or near
        taken = [found[matches[p]] for p, _ in near if p in matches]
        if len(near) > 1 or taken:
            others = [truth[p] for p, _ in near]
            also = f" and {taken} is taken for it" if taken else ""
            raise ValueError(
                f"{source}: {name} can't be told from others; in the truth: "
                f"{others[:_NUM_NAMED]}{also}. Write the file names alike in both files"
            )
        for position, _ in near:
            matches[position] = index
    if not matches:
        raise ValueError(
            f"{source}: no image is in the truth; its names are like {list(found[:_NUM_NAMED])}, "
            f"those of the truth like {list(truth[:_NUM_NAMED])}"
        )
    return matches


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name.replace("\\", "/")).parts


def _same_tail(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    length = min(len(a), len(b))
    return a[-length:] == b[-length:]
