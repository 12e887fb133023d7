"""Files of one JSON object a line, to which a run adds as it goes on."""

import json
from pathlib import Path


def drop_later_lines(path: Path, iteration: int) -> None:
    """Remove the lines that a run resumed at ``iteration`` will write anew, and half a line.

    Args:
        path: the file; nothing happens where there is none.
        iteration: lines whose "iteration" is above go.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            done = json.loads(line)["iteration"]
        except (ValueError, KeyError, TypeError):  # cut off when the run was killed
            continue
        if done <= iteration:
            kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")
