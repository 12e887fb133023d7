"""Finding the pictures that an export of Label Studio names, in one folder and never outside it."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import unquote, unquote_plus, urlsplit

# Label Studio puts 8 hexadecimal digits before the name of every uploaded file.
_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")
_RULES = (
    "by their path",
    "by the end of their path",
    "by name alone, in a subfolder",
    "without the prefix that Label Studio gives to uploads",
    "with the prefix that Label Studio gives to uploads",
)


class ImageFolder:
    """The files of a folder and its subfolders, to be found by what an export calls them.

    Only what listing the folder shows can be found, so no path in an export leads outside; nor does
    a link whose target is outside. Names are compared in Unicode's composed form, because macOS
    and zip files use the other one.

    Args:
        root: the folder.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.fspath(root)
        if not os.path.isdir(self.root):
            raise FileNotFoundError(f"there is no image folder {self.root}")
        self._by_path: dict[str, list[str]] = {}
        self._by_name: dict[str, list[str]] = {}
        self._by_bare_name: dict[str, list[str]] = {}
        for path in self._walk():
            key = unicodedata.normalize("NFC", path)
            name = key.rpartition("/")[2]
            self._by_path.setdefault(key, []).append(path)
            self._by_name.setdefault(name, []).append(path)
            if _UPLOAD_PREFIX.match(name):
                self._by_bare_name.setdefault(_UPLOAD_PREFIX.sub("", name), []).append(path)

    def find(self, references: Sequence[str]) -> tuple[str, str]:
        """The file that the first fitting rule finds for any of the references.

        Returns:
            path below the folder with "/", and how it was found.

        Raises:
            ValueError: it is not there, not certain, or not inside the folder; says which.
        """
        paths = [path for reference in references for path in _possible_paths(reference)]
        if not paths:
            raise ValueError("is inside the export, not a file")
        for rule, look_up in zip(_RULES, self._look_ups(), strict=True):
            for path in paths:
                found = look_up(path)
                if len(found) > 1:
                    raise ValueError(f"can be any of {', '.join(sorted(found)[:3])}")
                if found:
                    self._check_inside(found[0])
                    return found[0], rule
        raise ValueError("is not in the image folder")

    def path(self, file_name: str) -> str:
        """Where a found file is."""
        return os.path.join(self.root, *file_name.split("/"))

    def _look_ups(self) -> tuple[Callable[[str], list[str]], ...]:
        def by_tail(path: str) -> list[str]:
            parts = path.split("/")
            tails = ("/".join(parts[i:]) for i in range(1, len(parts)))
            return next((self._by_path[t] for t in tails if t in self._by_path), [])

        def by_name(path: str) -> list[str]:
            return self._by_name.get(_name(path), [])

        def without_prefix(path: str) -> list[str]:
            bare = _UPLOAD_PREFIX.sub("", _name(path))
            return [] if bare == _name(path) else self._by_name.get(bare, [])

        def with_prefix(path: str) -> list[str]:
            return self._by_bare_name.get(_name(path), [])

        return (
            lambda path: self._by_path.get(path, []),
            by_tail,
            by_name,
            without_prefix,
            with_prefix,
        )

    def _check_inside(self, file_name: str) -> None:
        path = self.path(file_name)
        root = os.path.realpath(self.root)
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            raise ValueError("is a link that leads out of the image folder")
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("is not a regular file")

    def _walk(self) -> Iterator[str]:
        for folder, subfolders, files in os.walk(self.root):
            subfolders.sort()
            relative = os.path.relpath(folder, self.root).replace(os.sep, "/")
            for name in sorted(files):
                yield name if relative == "." else f"{relative}/{name}"


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _possible_paths(reference: str) -> Iterator[str]:
    """What a reference may mean as a path: as written, and with URL escapes undone.

    `/data/local-files/?d=` holds the path in its query; of other URLs the query is no name.
    """
    if reference.startswith("data:"):
        return
    reference = reference.replace("\\", "/")
    if "local-files/?d=" in reference:
        path = reference.partition("?d=")[2]
        forms = [unquote(path), unquote_plus(path)]
    elif "://" in reference:
        try:
            path = urlsplit(reference).path
        except ValueError:  # what looks like an IPv6 address and is none
            path = reference.partition("://")[2]
        forms = [unquote(path), path]
    else:
        forms = [reference, unquote(reference)]
    for form in dict.fromkeys(forms):
        parts = unicodedata.normalize("NFC", form).split("/")
        path = "/".join(part for part in parts if part not in ("", "."))
        if path:
            yield path
