"""Ctrl-C between two steps of long work, never in the middle of one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Signals that arrived while they were held back."""

    def __init__(self) -> None:
        self.pending = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if one is pending; call this when the work is in a consistent state."""
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt


@contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """Hold back the first SIGINT until :meth:`Interrupts.check`; a second one interrupts at once.

    Outside the main thread signals do not arrive, and nothing is changed.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    previous = signal.getsignal(signal.SIGINT)

    def hold(number: int, frame: FrameType | None) -> None:
        if interrupts.pending:
            raise KeyboardInterrupt
        interrupts.pending = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)


def guard_mapped_files(code: int) -> None:
    """From now on, reading a mapped file that another program has shortened ends the process, with exit code
    ``code`` and a line that names the file. A file being written at that time stays incomplete and never gets
    its final name."""
    from powerinfer_kernels import guard_mapped_files as guard

    guard(code)
