"""The size of an image file before EXIF rotation, whatever the version of Pillow."""

from PIL import Image

ORIENTATION = 274  # EXIF's number for it
SWAPS_SIDES = (5, 6, 7, 8)
_TIFF_SIDES = (256, 257)


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image before EXIF rotation, from the file's header."""
    if image.format == "TIFF":  # newer Pillows have turned the size already
        width, height = (image.tag_v2[tag] for tag in _TIFF_SIDES)
        return width, height
    return image.size
