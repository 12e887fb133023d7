"""Image files: unreadable ones, EXIF rotation, sizes; and pictures that look alike."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from il_net.curation.image_checks import check_readable, check_sizes, probe_picture, probe_pictures
from il_net.curation.near_duplicates import (
    MAX_DIFFERENT_BITS,
    NUM_BITS,
    find_twins,
    perceptual_hash,
)
from il_net.data.report import Findings

DATA = Path(__file__).parents[4] / "shared" / "data"


def picture(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Soft random blobs: another seed is another picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    """A file that asks to be turned."""
    exif = Image.Exif()
    exif[274] = orientation
    return encode(image, kind, exif=exif)


BROKEN = {
    "empty.jpg": b"",
    "text.jpg": b"this is no picture",
    "half.jpg": encode(picture(1))[:1000],
    "nearly.jpg": encode(picture(1))[:-2],
    "half.png": encode(picture(1), "PNG")[:1000],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    (tmp_path / "good.jpg").write_bytes(encode(picture(1)))
    pictures = probe_pictures(str(tmp_path), ["good.jpg", name], True)
    findings = Findings()
    check_readable(pictures, findings)
    assert [(p.kind, p.count, p.fatal) for p in findings.problems] == [
        ("images that can't be read", 1, True)
    ]
    assert findings.problems[0].offenders[0].startswith(f"{name}: ")
    assert pictures["good.jpg"].size == (160, 120)
    assert pictures[name].is_broken and not pictures["good.jpg"].is_broken


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        OSError(24, "Too many open files"),
        OSError(5, "truncated by a failing disk"),
        MemoryError(),
    ],
)
def test_what_cannot_be_opened_need_not_be_broken(tmp_path, monkeypatch, error):
    def refuse(path: str) -> None:
        raise error

    monkeypatch.setattr(Image, "open", refuse)
    found = probe_picture(str(tmp_path / "a.jpg"), True)
    assert found.fault and not found.is_broken and found.size is None


def test_headers_alone_do_not_show_what_is_cut_off(tmp_path):
    (tmp_path / "a.jpg").write_bytes(BROKEN["nearly.jpg"])
    header = probe_picture(str(tmp_path / "a.jpg"), False)
    assert (header.stored, header.hash, header.fault) == ((160, 120), None, "")


@pytest.mark.parametrize("kind", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_every_kind_of_pixel_is_read(tmp_path, kind):
    if kind == "I;16":
        image = Image.fromarray(np.arange(160 * 120, dtype=np.uint16).reshape(120, 160))
    else:
        image = picture(1).convert(kind)
    image.save(tmp_path / "a.tif")
    found = probe_picture(str(tmp_path / "a.tif"), True)
    assert found.fault == "" and found.hash is not None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_the_one_that_detectron2_reads(tmp_path, orientation, kind):
    pytest.importorskip("detectron2")
    from il_net.data.mapper import detection_utils, read_size

    path = tmp_path / "a"
    path.write_bytes(turned(picture(1), orientation, kind))
    height, width = detection_utils.read_image(str(path), "RGB").shape[:2]
    # EXIF 2.3, 4.6.4: from 5 on, rows of what is stored are columns.
    assert (width, height) == ((160, 120) if orientation < 5 else (120, 160))
    assert read_size(str(path)) == (width, height)
    for pixels in (False, True):
        found = probe_picture(str(path), pixels)
        assert (found.stored, found.orientation, found.size) == (
            (160, 120),
            orientation,
            (width, height),
        )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_turned_file_is_hashed_upright(tmp_path, kind):
    upright = hash_of(encode(picture(1), "PNG"), tmp_path)
    stored = picture(1).transpose(Image.Transpose.ROTATE_90)  # 6 turns it back
    assert (hash_of(turned(stored, 6, kind), tmp_path) != upright).sum() <= 8


def size_findings(tmp_path: Path, content: bytes, width: int, height: int) -> list[tuple]:
    (tmp_path / "a.jpg").write_bytes(content)
    images = [{"id": 1, "file_name": "./a.jpg", "width": width, "height": height}]
    findings = Findings()
    pictures = probe_pictures(str(tmp_path), ["./a.jpg"], False)
    check_readable(pictures, findings)
    check_sizes(images, pictures, findings)
    return [(p.kind, p.severity.name) for p in findings.problems]


def test_sizes_against_the_record(tmp_path):
    upright, sideways = encode(picture(1)), turned(picture(1), 6)
    note = ("images that EXIF turns or mirrors", "NOTE")
    assert size_findings(tmp_path, upright, 160, 120) == []
    assert size_findings(tmp_path, upright, 160, 121) == [
        ("images of another size than recorded", "ERROR")
    ]
    assert size_findings(tmp_path, sideways, 120, 160) == [note]
    assert size_findings(tmp_path, sideways, 160, 120) == [
        note, ("images recorded with their size before EXIF rotation", "ERROR"),
    ]  # fmt: skip
    assert size_findings(tmp_path, turned(picture(1), 3), 160, 120) == [note]
    assert size_findings(tmp_path, turned(picture(1), 0), 160, 120) == []  # as some cameras do


# ---- near-duplicates ----


def hash_of(content: bytes, tmp_path: Path) -> np.ndarray:
    (tmp_path / "x").write_bytes(content)
    return probe_picture(str(tmp_path / "x"), True).hash


@pytest.mark.parametrize("seed", range(8))
def test_copies_are_near_and_others_far(tmp_path, seed):
    original = picture(seed, 640, 480)
    copies = [
        encode(original, quality=30),
        encode(original.resize((213, 160)), quality=85),
        encode(original.resize((900, 675)), "PNG"),
        encode(original.convert("L"), quality=85),
        encode(original.point(lambda v: min(255, v + 8)), quality=85),
        turned(original.transpose(Image.Transpose.ROTATE_90), 6),
    ]
    mine = hash_of(encode(original, "PNG"), tmp_path)
    assert mine.shape == (NUM_BITS,)
    for copy in copies:
        assert (hash_of(copy, tmp_path) != mine).sum() <= 8
    for other in range(8):
        if other != seed:
            far = hash_of(encode(picture(other, 640, 480)), tmp_path)
            assert (far != mine).sum() > 2 * MAX_DIFFERENT_BITS


def test_plain_surfaces_have_no_hash():
    assert perceptual_hash(np.full((40, 60), 200, np.uint8)) is None


def test_twins_are_those_of_a_loop_over_all_pairs():
    """As many bits differ as were flipped; more rows than are compared at once."""
    rng = np.random.default_rng(3)
    others = rng.random((9000, NUM_BITS)) < 0.5
    hashes = rng.random((300, NUM_BITS)) < 0.5
    for row in range(20):
        hashes[row] = others[449 * row]
        hashes[row, rng.choice(NUM_BITS, row, replace=False)] ^= True
    others[8999] = others[449]  # the first of equal ones is named
    twins, bits = find_twins(hashes, others)
    for row in range(300):
        distances = (others != hashes[row]).sum(axis=1)
        if distances.min() <= MAX_DIFFERENT_BITS:
            assert (twins[row], bits[row]) == (distances.argmin(), distances.min())
        else:
            assert twins[row] == -1
    assert (twins >= 0).sum() == MAX_DIFFERENT_BITS + 1  # of 0, 1, ... flipped bits


def test_twins_among_themselves_are_those_of_a_loop_over_all_pairs(monkeypatch):
    """Each with those before it; in small blocks, so that pairs lie on both sides of them."""
    monkeypatch.setattr("il_net.curation.near_duplicates._BLOCK", (16, 24))
    rng = np.random.default_rng(4)
    hashes = rng.random((100, NUM_BITS)) < 0.5
    for row in range(1, 100, 3):
        hashes[row] = hashes[rng.integers(row)]
        hashes[row, rng.choice(NUM_BITS, row % 20, replace=False)] ^= True
    twins, bits = find_twins(hashes)
    for row in range(100):
        distances = [int((hashes[row] != other).sum()) for other in hashes[:row]]
        if distances and min(distances) <= MAX_DIFFERENT_BITS:
            nearest = distances.index(min(distances))
            assert (twins[row], bits[row]) == (nearest, distances[nearest])
        else:
            assert twins[row] == -1
    assert (twins >= 0).sum() > 10


def test_blood_cells_of_one_field_of_view_are_found():
    """The pair that the README names; the pixels say so too, unlike those of any other pair."""
    folder = DATA / "bccd" / "images"
    if not folder.is_dir():
        pytest.skip("needs the public data set bccd in ../shared/data beside the repository")
    names = [f"BloodImage_{number:05d}.jpg" for number in (38, 36, 39, 40, 42)]
    pictures = probe_pictures(str(folder), ["BloodImage_00037.jpg", *names], True)
    hashes = np.array([pictures[name].hash for name in names])
    twins, _ = find_twins(pictures["BloodImage_00037.jpg"].hash[None], hashes)
    assert twins.tolist() == [0]

    def pixels(name: str) -> np.ndarray:
        image = Image.open(folder / name).convert("L").resize((80, 60))
        return np.asarray(image, dtype=np.float64).ravel()

    likeness = [np.corrcoef(pixels("BloodImage_00037.jpg"), pixels(n))[0, 1] for n in names]
    assert likeness[0] > 0.9 > 0.5 > max(likeness[1:])
