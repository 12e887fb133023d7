"""Choosing images, or groups of them, in a repeatable order and with every class in proportion.

For the splits of thesis sections 2.4 to 2.6; the thesis itself drew without stratification.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from math import floor

from .split_file import ImageId


def order_by_hash(ids: Iterable[ImageId], salt: str) -> list[ImageId]:
    """The ids in an order that depends on `salt` and on each id alone."""
    return sorted(ids, key=lambda i: hashlib.sha256(f"{salt}/{i}".encode()).digest())


def floor_share(share: float, total: int, *, whole: int = 1) -> int:
    """floor(share / whole * total) of the decimal number as written: 0.29 of 100 is 29.

    In binary, 0.29 * 100 is 28.999... A percentage has a `whole` of 100.
    """
    return floor(Fraction(str(share)) * total / whole)


class PossibleSums:
    """Which sums the sizes from each position of a list on can make.

    Where there are ones enough, that is every sum up to the total; only the other positions keep a
    bit for each sum.

    Args:
        sizes: whole numbers above 0.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._totals = [0] * (len(sizes) + 1)
        self._bits: dict[int, int] = {}
        for start in range(len(sizes) - 1, -1, -1):
            size, rest = sizes[start], self._totals[start + 1]
            self._totals[start] = rest + size
            if start + 1 in self._bits or size > rest + 1:
                bits = self._bits.get(start + 1, (1 << rest + 1) - 1)
                bits |= bits << size
                if bits.bit_count() <= rest + size:
                    self._bits[start] = bits

    def can_make(self, start: int, total: int) -> bool:
        """Whether some of the sizes from `start` on make `total`."""
        if not 0 <= total <= self._totals[start]:
            return False
        return start not in self._bits or bool(self._bits[start] >> total & 1)

    def nearest(self, total: int) -> int:
        """The sum of some sizes, but neither of none nor of all, nearest to `total`.

        The lower one of two that are equally near. There must be two sizes.
        """
        inside = range(1, self._totals[0])
        nearby = (total + sign * d for d in range(self._totals[0]) for sign in (-1, 1))
        return next(s for s in nearby if s in inside and self.can_make(0, s))


def stratify(
    order: Sequence[ImageId],
    count: int,
    classes: Mapping[ImageId, Collection[int]],
    sizes: Mapping[ImageId, int] | None = None,
) -> list[ImageId]:
    """`count` ids with every class in proportion to the images that show it.

    Iterative stratification (Sechidis et al. 2011) into two parts of fixed sizes: the rarest class
    that is left hands out its images in turn, each to the part that lacks more of the class. Every
    class gets an image, as long as there are places.

    With `sizes` an id stands for a group of images, and it is the objects of each class that come
    out in proportion: the rarest class hands out its groups, each to the part in which it brings
    all classes and the number of images nearer to their shares. As a rule a class is off by less
    than the objects of it in two groups. The sizes are the first rule: a group goes elsewhere
    where `count` could not be met any more.

    Args:
        order: all ids; the earlier is asked first.
        count: images, a sum that the sizes can make.
        classes: the classes in each image; none is fine. With `sizes`, a Counter of objects.
        sizes: images in each group; every id is one image by default.
    """
    total = sum(sizes.values()) if sizes else len(order)
    amounts = {image_id: Counter(classes[image_id]) for image_id in order}
    totals = add_up(amounts.values())
    share = count / max(1, total)
    wanted = {name: max(1.0, share * amount) for name, amount in totals.items()}
    spare = {name: totals[name] - wanted[name] for name in totals}
    queue = _rarest_first(order, amounts, totals)
    sums = PossibleSums([sizes[image_id] if sizes else 1 for image_id, _ in queue])
    places, others = count, total - count
    taken = set()
    for rest, (image_id, rarest) in enumerate(queue, start=1):
        size, own = (sizes[image_id] if sizes else 1), amounts[image_id]
        if rarest is None:
            lacks = True
        elif sizes:
            terms = [(n, wanted[c], spare[c], totals[c]) for c, n in sorted(own.items())]
            lacks = _improvement([*terms, (size, places, others, total)], share) > 0
        else:
            lacks = (wanted[rarest] - spare[rarest], places - others) > (0, 0)
        possible = sums.can_make(rest, places - size)
        if possible and (lacks or not sums.can_make(rest, places)):
            taken.add(image_id)
            places, part = places - size, wanted
        else:
            others, part = others - size, spare
        for name, amount in own.items():
            part[name] -= amount
    chosen = [image_id for image_id in order if image_id in taken]
    # Those without any class last; the order stays otherwise.
    return sorted(chosen, key=lambda image_id: not amounts[image_id])


def _improvement(terms: Iterable[tuple[int, float, float, int]], share: float) -> float:
    """By how much less the parts miss their shares if a group goes to the first, not the second.

    Args:
        terms: for every class the group's objects, those that the first and the second part still
            want, and those of all groups; in a fixed order, as the last bit of a sum may decide.
        share: of the first part.

    Returns:
        the difference of two sums of squared errors, each error as a share of all objects.
    """
    improvement = 0.0
    for amount, wanted, spare, total in terms:
        missing = wanted - share * (wanted + spare)
        in_second, in_first = missing + share * amount, missing - (1 - share) * amount
        # in_second**2 - in_first**2, without a power, whose last bit depends on the machine.
        improvement += amount * (in_second + in_first) / (total * total)
    return improvement


def _rarest_first(
    order: Sequence[ImageId], amounts: Mapping[ImageId, Counter], totals: Counter
) -> list[tuple[ImageId, int | None]]:
    """Every id with the class that hands it out: the rarest one at its turn, None for the last."""
    members = defaultdict(list)
    for image_id in order:
        for name in amounts[image_id]:
            members[name].append(image_id)
    left = dict(totals)
    queue: dict[ImageId, int | None] = {}
    while left:
        rarest = min(left, key=lambda name: (left[name], name))
        for image_id in members[rarest]:
            if image_id not in queue:
                queue[image_id] = rarest
                for name, amount in amounts[image_id].items():
                    if name in left:
                        left[name] -= amount
        del left[rarest]
    return [*queue.items(), *((image_id, None) for image_id in order if image_id not in queue)]


def add_up(counters: Iterable[Counter]) -> Counter:
    """The sum of counters, zeros included."""
    total: Counter = Counter()
    for counter in counters:
        total.update(counter)
    return total
