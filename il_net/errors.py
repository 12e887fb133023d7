"""How a command line shows a user's mistake, and finds one in the place of its output."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a user's mistake into its message and exit code 1, without a traceback.

    Put it around reading configuration and data and around writing results, not around training,
    where the same exceptions would be our own faults. Files that are missing, may not be read or
    cannot be written (any `OSError`) are such mistakes.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


def check_output(path: Path, *, is_folder: bool, option: str = "--output") -> None:
    """Check that a file or folder can be written there, before the work that it is for.

    Args:
        path: of the output; folders that are not there yet will be made.
        is_folder: whether it is to be a folder.
        option: what names it on the command line.

    Raises:
        ValueError: it is a folder instead of a file or the other way round, or lies below a file.
    """
    if is_folder and path.is_file():
        raise ValueError(f"{option}: {path} is a file; name a folder")
    if not is_folder and path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; name a file")
    for parent in path.parents:
        if parent.is_file():
            raise ValueError(f"{option}: {path} can't be written, because {parent} is a file")
