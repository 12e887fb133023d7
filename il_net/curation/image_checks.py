"""Image files themselves: whether they can be read, their real size, EXIF rotation, and a hash.

Read with Pillow, as Detectron2 does, which turns pictures upright by their EXIF entry. Sizes are
(width, height) in pixels.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ..data.coco_checks import same_file
from ..data.image_size import ORIENTATION, SWAPS_SIDES, stored_size
from ..data.report import Findings, Severity
from .near_duplicates import SIDE, perceptual_hash

_TURNS = range(2, 9)  # 1 is upright; some cameras write 0


@dataclass(frozen=True)
class Picture:
    """What an image file is.

    Attributes:
        stored: size before EXIF rotation; None if the file can't be read.
        orientation: of EXIF; 2 to 8 turn or mirror it, 5 to 8 swap the sides.
        hash: (143,) bool, see `near_duplicates`; None if the pixels were not read.
        fault: why the file can't be read.
        is_broken: whether that is because of what it holds: no image, or one that is cut off.
            Else it may be read another day, as after a lack of permission.
    """

    stored: tuple[int, int] | None
    orientation: int = 1
    hash: np.ndarray | None = None
    fault: str = ""
    is_broken: bool = False

    @property
    def size(self) -> tuple[int, int] | None:
        """The size that a model will see, after EXIF rotation."""
        if self.stored is None or self.orientation not in SWAPS_SIDES:
            return self.stored
        return self.stored[::-1]


Pictures = Mapping[str, Picture]


def probe_picture(path: str, pixels: bool) -> Picture:
    """Read the header of an image file, and its pixels if asked to; errors become `fault`."""
    try:
        with Image.open(path) as image:
            stored, orientation = stored_size(image), image.getexif().get(ORIENTATION, 1)
            if not pixels:
                return Picture(stored, orientation)
            # libjpeg shrinks large pictures while it decodes, and still reads them to the end.
            image.draft("L", (4 * SIDE, 4 * SIDE))
            gray = ImageOps.exif_transpose(image).convert("L")
            return Picture(stored, orientation, perceptual_hash(np.asarray(gray)))
    except Image.UnidentifiedImageError:
        return Picture(None, fault="not an image", is_broken=True)
    except Exception as error:  # decoders of broken files raise whatever they stumble on
        # The system's own errors have a number, Pillow's have none.
        from_pillow = isinstance(error, OSError) and error.errno is None
        cut_off = from_pillow and "truncated" in str(error).lower()
        fault = str(error) or type(error).__name__
        return Picture(None, fault=fault, is_broken=cut_off)


def probe_pictures(image_root: str, file_names: Sequence[str], pixels: bool) -> dict[str, Picture]:
    """`probe_picture` for files of a folder, by `coco_checks.same_file` of their names."""
    names = list(dict.fromkeys(map(same_file, file_names)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = [os.path.join(image_root, name) for name in names]
        return dict(zip(names, pool.map(lambda p: probe_picture(p, pixels), paths), strict=True))


def picture_of(image: dict, pictures: Pictures) -> Picture | None:
    """The file of an image record, if it is there and can be read."""
    picture = pictures.get(same_file(image["file_name"]))
    return picture if picture and picture.size else None


def recorded_before_rotation(image: dict, picture: Picture) -> bool:
    """Whether the record has the size that the file has without its EXIF rotation."""
    recorded = (image["width"], image["height"])
    return recorded == picture.stored != picture.size


def check_readable(pictures: Pictures, findings: Findings) -> None:
    """That every file could be read, and which ones EXIF turns."""
    findings.add(
        "images that can't be read",
        [f"{name}: {picture.fault}" for name, picture in pictures.items() if picture.fault],
    )
    findings.add(
        "images that EXIF turns or mirrors",
        [name for name, picture in pictures.items() if picture.orientation in _TURNS],
        severity=Severity.NOTE,
        consequence="Detectron2 does that on reading; labels must fit the turned image",
    )


def check_sizes(images: Sequence[dict], pictures: Pictures, findings: Findings) -> None:
    """That the records hold the sizes of the files, after EXIF rotation."""
    before, other = [], []
    for image in images:
        picture = picture_of(image, pictures)
        recorded = (image["width"], image["height"])
        if picture is None or recorded == picture.size:
            continue
        width, height = picture.size
        text = f"{image['file_name']}: {recorded[0]} x {recorded[1]}, file {width} x {height}"
        (before if recorded_before_rotation(image, picture) else other).append(text)
    findings.add(
        "images recorded with their size before EXIF rotation",
        before,
        consequence="Detectron2 turns them and stops; their labels may be those of either",
    )
    findings.add("images of another size than recorded", other, consequence="Detectron2 stops")
