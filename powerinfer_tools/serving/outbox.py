"""Events on their way from the batcher's thread to the loops that send them."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

from powerinfer_tools.serving.jobs import Event

#: The longest time that a token waits for others to be sent with it. Waking a loop takes about as much time
#: for one token as for several, since the engine evicts the loop from the CPU caches. Nobody reads faster.
HOLD_SECONDS = 1 / 25


class Recipient(Protocol):
    """A receiver of events, in an event loop."""

    loop: asyncio.AbstractEventLoop

    def deliver(self, event: Event) -> None:
        """Called in that event loop."""


class Outbox:
    """Keeps events in order and hands them over together, on request or when they are due. Used by one
    thread. ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._handed_over = clock()
        self._events: dict[asyncio.AbstractEventLoop, list[tuple[Recipient, Event]]] = defaultdict(list)

    def add(self, recipient: Recipient, event: Event) -> None:
        """Hand over ``event`` later."""
        self._events[recipient.loop].append((recipient, event))

    @property
    def due(self) -> bool:
        """Whether tokens have waited for long enough."""
        return self._clock() - self._handed_over >= HOLD_SECONDS

    def flush(self) -> None:
        """Hand over everything."""
        self._handed_over = self._clock()
        events, self._events = self._events, defaultdict(list)
        for loop, batch in events.items():
            _post(loop, batch)


def _post(loop: asyncio.AbstractEventLoop, batch: list[tuple[Recipient, Event]]) -> None:
    def distribute() -> None:
        for recipient, event in batch:
            recipient.deliver(event)

    if not loop.is_closed():
        loop.call_soon_threadsafe(distribute)
