"""The command as a user has it: a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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


def environment(**variables: str) -> dict[str, str]:
    """The environment of a command: ours without what the user has set, and the same packages."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("POWERINFER_")}
    packages = os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path)
    return kept | {"PYTHONPATH": packages, "XDG_CONFIG_HOME": os.devnull} | variables


def command_line(*arguments: str | Path) -> list[str]:
    """The words that start ``powerinfer`` with these arguments."""
    return [sys.executable, "-P", "-m", "powerinfer_cli", *map(str, arguments)]


def run_command(
    *arguments: str | Path, stdin: str | bytes = b"", cwd: Path | None = None, **variables: str
) -> Ended:
    """Run ``powerinfer`` with ``arguments``. Whatever happens, it must not show a traceback."""
    ended = subprocess.run(
        command_line(*arguments),
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        cwd=cwd,
        env=environment(**variables),
        timeout=300,
        check=False,
    )
    error = ended.stderr.decode()
    assert "Traceback" not in error, error
    return Ended(ended.returncode, ended.stdout.decode(), error)


def modules_loaded_by(*arguments: str | Path) -> set[str]:
    """Names of the modules that the command imports."""
    probe = (
        "import sys; from powerinfer_cli.app import main\n"
        "try: main()\nfinally: print('\\nmodules', *sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", probe, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    return set(ended.stderr.rpartition("\nmodules ")[2].split())
