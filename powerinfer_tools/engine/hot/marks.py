"""Marks in a CUDA stream: once a mark has been reached, all work queued before it is done.

Each piece of work has its ticket. If times are requested, an event with a time is recorded before its first
step and after each step. Otherwise only work that somebody waits for has an event, and one wait is enough for
all work that was queued before it.
"""

import time
from typing import Any

import torch

from powerinfer_tools.engine.hot import Span
from powerinfer_tools.engine.hot.faults import DeviceLost, first_line

#: Seconds after which times are counted from a later event: CUDA says them in single precision.
_REBASE_SECONDS = 1.0


def event(*, timed: bool) -> Any:
    """A new event."""
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


class Marks:
    """Marks without times."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._free = stream, list[Any]()
        self._queued = self._reached = 0

    def after(self, *, awaited: bool) -> "Passed":
        """The ticket of the work that was queued last; with an event of its own if somebody waits for it."""
        self._queued += 1
        return Passed(self, self._queued, self._recorded() if awaited else None)

    def reach(self, place: int, mark: Any | None) -> None:
        """Wait for the work that was the ``place``-th, if nothing later was waited for; without a ``mark`` of
        its own, for all that is queued. Raises DeviceLost."""
        try:
            if place > self._reached:
                if mark is None:
                    place, mark = self._queued, self._recorded()
                mark.synchronize()
                self._reached = place
        except RuntimeError as error:
            raise DeviceLost(first_line(error)) from None
        if mark is not None:
            self._free.append(mark)

    def _recorded(self) -> Any:
        mark = self._free.pop() if self._free else event(timed=False)
        mark.record(self._stream)
        return mark


class Passed:
    """The ticket of work whose times nobody asked for."""

    def __init__(self, marks: Marks, place: int, mark: Any | None) -> None:
        self._marks, self._place, self.mark = marks, place, mark

    def wait(self) -> list[Span]:
        """See :class:`powerinfer_tools.engine.hot.devices.Ticket`."""
        mark, self.mark = self.mark, None
        self._marks.reach(self._place, mark)
        return []


class Clock:
    """Events with times, and when they were on the host's clock."""

    def __init__(self, stream: Any) -> None:
        self._free, self._base = list[Any](), event(timed=True)
        self._base.record(stream)
        self._base.synchronize()
        self._zero = time.perf_counter()
        self._held = 0

    def events(self, count: int) -> list[Any]:
        """Events that nobody else holds, to be recorded in order and given to :meth:`times`."""
        while len(self._free) < count:
            self._free.append(event(timed=True))
        self._held += count
        return [self._free.pop() for _ in range(count)]

    def times(self, events: list[Any]) -> list[float]:
        """Wait for ``events``; when each was. They can be recorded again. Raises DeviceLost."""
        try:
            events[-1].synchronize()
            first = self._zero + float(self._base.elapsed_time(events[0])) / 1e3
            times = [first, *(first + float(events[0].elapsed_time(event)) / 1e3 for event in events[1:])]
        except RuntimeError as error:
            raise DeviceLost(first_line(error)) from None
        self._held -= len(events)
        self._free += events
        if not self._held and times[-1] - self._zero > _REBASE_SECONDS:
            # All that will be asked for is later than this event.
            self._free.append(self._base)
            self._base, self._zero = self._free.pop(-2), times[-1]
        return times


class Timed:
    """The ticket of work with times: an event before the first step and after each."""

    def __init__(self, names: list[str], events: list[Any], clock: Clock) -> None:
        self._names, self._events, self._clock = names, events, clock

    @property
    def mark(self) -> Any:
        """The last of its events."""
        return self._events[-1]

    def wait(self) -> list[Span]:
        """See :class:`powerinfer_tools.engine.hot.devices.Ticket`."""
        times = self._clock.times(self._events)
        return [Span(name, times[i], times[i + 1]) for i, name in enumerate(self._names)]
