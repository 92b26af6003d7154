"""A program under measurement in a process of its own, asked over a pipe with one JSON line per request."""

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class WorkerError(Exception):
    """A measured program could not start, or ended before it answered; the message holds its last words."""


class Worker:
    """Starts ``python script arguments`` and reads the line in which it tells about itself (``about``)."""

    def __init__(self, python: str, script: Path, arguments: list[str]) -> None:
        self._script = script
        self._process = subprocess.Popen(
            [python, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about: dict[str, Any] = self._read()

    @property
    def name(self) -> str:
        """What the program calls itself."""
        return str(self.about["name"])

    @staticmethod
    def succeeds(python: str, code: str) -> bool:
        """Whether ``python`` exists and runs ``code`` without an error."""
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, check=False)
        except OSError:
            return False
        return done.returncode == 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer. Raises WorkerError when the program has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> WorkerError:
        # Its own message went to standard error, which is ours.
        return WorkerError(f"{self._script.name} ended with exit code {self._process.wait()}")
