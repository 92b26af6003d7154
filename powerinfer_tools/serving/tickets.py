"""A request under way, as seen by the code that submitted it."""

import asyncio
from collections.abc import Callable

from powerinfer_tools.serving.jobs import Event
from powerinfer_tools.serving.places import Place
from powerinfer_tools.serving.sequence import Sequence


class Ticket:
    """A request under way. Its events go to the queue that :meth:`forward` names, or wait for it."""

    def __init__(self, sequence: Sequence, after: "Ticket | None", drop: "Callable[[Ticket], None]") -> None:
        self.sequence = sequence
        self.after = after
        self.place: Place | None = None
        self.cancelled = False
        self.finished = False
        #: Its place is being filled from the disk.
        self.loading = False
        self.loop = asyncio.get_running_loop()
        self._drop = drop
        self._early: list[Event] = []
        self._deliver: Callable[[Event], None] = self._early.append

    @property
    def client(self) -> str:
        """The client whose turn it takes."""
        return self.sequence.job.client

    @property
    def ready(self) -> bool:
        """Whether the prompt that it shares with an earlier request has been processed."""
        return self.after is None or self.after.finished or not self.after.sequence.in_prompt

    def forward(self, queue: asyncio.Queue[tuple[int, Event]], index: int) -> None:
        """Put all events into ``queue``, as (index, event)."""
        for event in self._early:
            queue.put_nowait((index, event))
        self._deliver = lambda event: queue.put_nowait((index, event))

    def deliver(self, event: Event) -> None:
        """Called in the event loop that reads this ticket."""
        self._deliver(event)

    def cancel(self) -> None:
        """Drop the rest of the request. Its place is free before the next token is computed."""
        if not self.finished and not self.cancelled:
            self._drop(self)
