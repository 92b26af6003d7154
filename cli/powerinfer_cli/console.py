"""What a person and a program see: results on standard output, everything else on standard error."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from powerinfer_tools.progress import Progress


def printable(text: str) -> str:
    """``text`` on one line without control characters: names inside a file may hold escape sequences."""
    return "".join(character if character.isprintable() else " " for character in text).strip()


_CONTROLS = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
}


def shown(text: str) -> str:
    """Generated ``text`` as it may go to standard output: a terminal gets pictures of control characters,
    which could set its title, clear it or worse; a file or a pipe gets them as they are."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


def say(text: str) -> None:
    """One line for the person at the terminal, on standard error."""
    print(printable(text), file=sys.stderr, flush=True)  # noqa: T201  # this module is the one that prints


def plain(value: Any) -> Any:
    """``value`` in JSON's types: dataclasses become objects, paths strings, numbers of numpy Python's.

    A number that JSON cannot say (NaN, infinity) becomes null.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"no JSON form for {type(value).__name__}")


def emit(text: str) -> None:
    """A line of a command's result, on standard output."""
    print(text, flush=True)  # noqa: T201  # this module is the one that prints


def emit_json(value: Any) -> None:
    """The command's whole result as one JSON value on standard output."""
    emit(json.dumps(plain(value), ensure_ascii=False, allow_nan=False))


def result_console() -> "Console":
    """Rich console on standard output, for tables; plain text where that is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 100
    return Console(highlight=False, width=width)


def progress() -> "Progress":
    """The listener that suits standard error: a live bar on a terminal, plain lines elsewhere."""
    return TerminalProgress() if sys.stderr.isatty() else LineProgress()


class LineProgress:
    """Progress as lines in a log: when work begins, at most every ten seconds, and when it ends."""

    interval_seconds = 10.0

    def __init__(self) -> None:
        self._description, self._unit = "", ""
        self._total: int | None = None
        self._done = 0
        self._started = self._reported = 0.0

    def start(self, description: str, total: int | None, unit: str) -> None:
        """Say what begins."""
        self._description, self._total, self._unit, self._done = description, total, unit, 0
        self._started = self._reported = time.monotonic()

    def advance(self, n: int) -> None:
        """Count, and say how far it is when the last line is old enough."""
        self._done += n
        if time.monotonic() - self._reported >= self.interval_seconds:
            self._report()

    def note(self, text: str) -> None:
        """Say it."""
        say(text)

    def finish(self) -> None:
        """Say what was done and how fast."""
        self._report()

    def _report(self) -> None:
        now = time.monotonic()
        self._reported = now
        rate = self._done / max(now - self._started, 1e-9)
        of = f" of {self._total:,}" if self._total is not None and self._total != self._done else ""
        say(f"{self._description}: {self._done:,}{of} {self._unit}, {rate:,.0f} {self._unit}/s")


class TerminalProgress:
    """Progress as one live bar with units per second and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None
        self._started = 0.0
        self._done = 0

    def start(self, description: str, total: int | None, unit: str) -> None:
        """Show a bar for the new work."""
        self._started, self._done = time.monotonic(), 0
        self._bar.start()
        self._task = self._bar.add_task(description, total=total, unit=unit, rate="")

    def advance(self, n: int) -> None:
        """Move the bar."""
        if self._task is None:
            return
        self._done += n
        rate = self._done / max(time.monotonic() - self._started, 1e-9)
        self._bar.update(self._task, advance=n, rate=f"{rate:,.0f}/s")

    def note(self, text: str) -> None:
        """Print it above the bar."""
        self._bar.console.print(printable(text), markup=False, highlight=False)

    def finish(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        self._bar.stop()
