"""How a command line shows a user's mistake."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a user's mistake into its message and exit code 1, without a traceback.

    Put it around reading configuration and data, not around training, where the same exceptions
    would be our own faults.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
