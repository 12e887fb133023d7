"""What the values in the records of a COCO file may be.

JSON knows NaN, infinities and numbers of any length, so these are told apart from usable ones.
"""

from typing import Any

# Of a coordinate or side: beyond any picture. What is drawn costs memory by its length.
LARGEST_PX = 1e6
NUMBERS = frozenset((int, float))


def is_id(value: Any) -> bool:
    """Whether it can be the id of an image or an annotation."""
    return type(value) in (int, str)


def is_side(value: Any) -> bool:
    """Whether it can be the width or height of an image; 640.0 is one, 640.5 is none."""
    return type(value) in NUMBERS and 0 < value <= LARGEST_PX and value == int(value)


def is_area(value: Any) -> bool:
    """Whether it can be a stored area: a finite number, negative ones included."""
    return type(value) in NUMBERS and abs(value) <= LARGEST_PX**2


def is_box(box: Any) -> bool:
    """Whether it is a list of four finite numbers within reason; NaN is no such number."""
    return isinstance(box, list) and len(box) == 4 and _are_pixels(box)


def is_polygon(polygon: Any) -> bool:
    """Whether it is a list of finite numbers within reason, however many."""
    return isinstance(polygon, list) and _are_pixels(polygon)


def _are_pixels(values: list[Any]) -> bool:
    # Compared as Python's numbers: an int of 400 digits is no float.
    if not NUMBERS.issuperset(map(type, values)):
        return False
    return all(-LARGEST_PX <= value <= LARGEST_PX for value in values)


def has_file_name(image: Any) -> bool:
    """Whether it is an image record that names a file, whatever else is wrong with it."""
    return isinstance(image, dict) and isinstance(image.get("file_name"), str)
