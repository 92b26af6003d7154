"""How a stage reports its progress without knowing the receiver (a terminal, a log, a test)."""

from typing import Protocol


class Progress(Protocol):
    """Receiver of the progress of one piece of long work at a time."""

    def start(self, description: str, total: int | None, unit: str) -> None:
        """Begin work of ``total`` units (None: unknown)."""

    def advance(self, n: int) -> None:
        """``n`` more units are done."""

    def note(self, text: str) -> None:
        """One line worth telling the user now (a skipped file, a choice that was made)."""

    def finish(self) -> None:
        """The work begun last has ended."""


class Silent:
    """Progress without a receiver."""

    def start(self, description: str, total: int | None, unit: str) -> None:
        """Ignore."""

    def advance(self, n: int) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""
