"""Two sides that have to be at work at the same time: proved by a meeting, not by a clock."""

import threading


class Meeting:
    """Each of two sides calls it while it works, and goes on only when the other has come, too.

    Sides that work one after the other never meet: the first raises BrokenBarrierError after a long while.
    Until ``open`` is set, nobody waits.
    """

    def __init__(self) -> None:
        self.open = False
        self._barrier = threading.Barrier(2, timeout=60)
        self.count = 0

    def __call__(self) -> None:
        if self.open and self._barrier.wait() == 0:
            self.count += 1
