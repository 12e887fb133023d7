"""Running the repository's command lines, each in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """What a finished command line left: its exit code, and stdout and stderr together."""

    code: int
    output: str

    @property
    def last_line(self) -> str:
        """The last line that is not empty."""
        return self.output.strip().splitlines()[-1]


@dataclass(frozen=True)
class Runner:
    """Runs commands in one folder with one environment.

    Attributes:
        folder: the working folder.
        datasets: Detectron2's dataset root.
        scratch: folder for captured output.
    """

    folder: Path
    datasets: Path
    scratch: Path

    def environment(self, **changes: str) -> dict[str, str]:
        """One thread a process: the tests share the machine with others."""
        ours = {
            "DETECTRON2_DATASETS": str(self.datasets),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPO),
        }
        return {**os.environ, **ours, **changes}

    def alone(self, *command: object, **env: str) -> Result:
        """Any command, started afresh: where the start is what is tested."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=self.folder,
            env=self.environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        return Result(done.returncode, done.stdout)


class ForkRunner(Runner):
    """Also runs scripts of the repository in forks of one process that has imported the rest.

    Importing torch and Detectron2 takes longer than most of the tests do; see ``fork_server.py``.
    """

    def __enter__(self) -> "ForkRunner":
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            env=self.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        object.__setattr__(self, "_server", server)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)

    def __call__(self, script: str, *arguments: object, **env: str) -> Result:
        """``run("train_net.py", "--resume", ...)``."""
        output = self.scratch / "output.txt"
        request = {
            "argv": [str(REPO / script), *map(str, arguments)],
            "cwd": str(self.folder),
            "env": env,
            "output": str(output),
        }
        self._server.stdin.write(f"{json.dumps(request)}\n")
        self._server.stdin.flush()
        code = self._server.stdout.readline()
        if not code:
            raise RuntimeError("the fork server has ended")
        return Result(int(code), output.read_text())
