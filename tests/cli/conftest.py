"""The command as a user has it: a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON value."""
        return json.loads(self.out)

    @property
    def last_line(self) -> str:
        """The last line on standard error."""
        return self.err.rstrip().split("\n")[-1]


Command = Callable[..., Ended]


def run_command(
    *arguments: str | Path, stdin: str | bytes = b"", cwd: Path | None = None, **variables: str
) -> Ended:
    """Run ``powerinfer`` with ``arguments``. Whatever happens, it must not show a traceback."""
    environment = {key: value for key, value in os.environ.items() if key != "POWERINFER_MODEL"} | variables
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "powerinfer_cli", *map(str, arguments)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        cwd=cwd,
        env=environment,
        timeout=300,
        check=False,
    )
    error = ended.stderr.decode()
    assert "Traceback" not in error, error
    return Ended(ended.returncode, ended.stdout.decode(), error)


@pytest.fixture(scope="session")
def powerinfer() -> Command:
    """Runs the command line in a process."""
    return run_command
