"""One run of ``gpu.py``: its rows, what went wrong or could not be measured, and how work is timed."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from powerinfer_tools.engine.hot.devices import Device
from powerinfer_tools.engine.hot.faults import first_line

Work = Callable[[], object]
#: Passes that compile, load and warm up.
WARM = 2


@dataclass(frozen=True)
class Row:
    """One line of the table: what, its speed in ``unit``, its share of the limit (the speed of a read of the
    device's memory, or what memory allows a whole engine), its multiple of the CPU alone (engines), and the
    largest error over its bound (at most 1 is right)."""

    name: str
    speed: float
    unit: str
    of_limit: float | None = None
    of_cpu: float | None = None
    error: float | None = None


class Run:
    """``kind``: what the device is called. ``wrong``: checks that failed, a line each; ``missing``: what was
    not measured, or not as asked."""

    def __init__(self, device: Device, kind: str, limit: float) -> None:
        self.device, self.kind = device, kind
        self.rows, self.wrong, self.missing = list[Row](), list[str](), list[str]()
        self._deadline = time.perf_counter() + limit

    @property
    def where(self) -> torch.device:
        """Where the device's tensors are."""
        return self.device.torch_device

    @property
    def seconds_left(self) -> float:
        """Until the limit."""
        return self._deadline - time.perf_counter()

    def attempt(self, what: str, seconds: float, work: Work) -> bool:
        """Do ``work``, which takes about ``seconds``, if there is time for it. Whatever it runs into is one
        line, and the run goes on."""
        if self.seconds_left < seconds:
            self.missing.append(f"{what}: the time was up")
            return False
        print(f"{what} …", file=sys.stderr, flush=True)
        try:
            work()
        except Exception as error:  # noqa: BLE001 - compilers and drivers fail in ways of their own
            self.wrong.append(f"{what}: {type(error).__name__}: {first_line(error)}")
            return False
        return True

    def add(self, row: Row) -> None:
        """A row; an error beyond its bound is wrong, and so is one that is no number."""
        self.rows.append(row)
        if row.error is not None and not row.error <= 1:
            self.wrong.append(f"{row.name}: {row.error:.3g} times the error that rounding explains")

    def settled(self) -> None:
        """Wait for what was made outside of the device's queue."""
        if self.where.type == "cuda":
            torch.cuda.synchronize(self.where)

    def timed(self, work: Work, repetitions: int = 9, times: int = 1) -> float:
        """Median seconds that the device itself takes for ``work``, which must only queue, replayed from a
        recording as the engine does; ``times`` in a row are timed as one."""
        self.settled()

        def step() -> None:
            for _ in range(times):
                work()

        steps = self.device.recorded((("work", step),))
        self.device.timed = True
        spans = [self.device.submit(steps).wait()[0] for _ in range(WARM + repetitions)]
        return median(max(span.end - span.start, 1e-9) for span in spans[WARM:]) / times

    def waited(self, work: Work, repetitions: int = 50) -> float:
        """Median seconds of the host from queueing ``work`` to having waited for it."""
        self.settled()
        steps = self.device.recorded((("work", lambda: (work(), None)[1]),))
        self.device.timed = False
        times = []
        for _ in range(WARM + repetitions):
            started = time.perf_counter()
            self.device.submit(steps).wait()
            times.append(time.perf_counter() - started)
        return median(times[WARM:])
