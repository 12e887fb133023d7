"""Runs command lines in forked processes that share one import of torch and Detectron2.

Importing them takes longer than most of the tests do. Each request is a process of its own all the
same: its own arguments, working folder, output and exit code, and a fresh state of all packages.

Reads requests from stdin, one JSON object a line: ``argv`` (script first), ``cwd``, ``env`` and
``output`` (file for stdout and stderr); answers each with the exit code on a line of stdout.
"""

import importlib
import json
import os
import runpy
import sys

WARM = (
    "cv2",
    "detectron2.engine",
    "detectron2.evaluation",
    "detectron2.utils.visualizer",
    "il_net",
    "pycocotools.cocoeval",
    "timm",
    "torch.utils.tensorboard",
    "tqdm",
)


def serve() -> dict | None:
    """Fork for every request. Returns the request in the child, None in the server at the end."""
    for name in WARM:
        importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if __name__ == "__main__":
    request = serve()
    if request is not None:
        target = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(target, stream)
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.argv = request["argv"]
        # An error or SystemExit ends the process as it would end the script itself.
        runpy.run_path(sys.argv[0], run_name="__main__")
