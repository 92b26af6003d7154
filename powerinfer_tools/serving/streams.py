"""Events of several answers as one stream."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from powerinfer_tools.serving.jobs import Ended, Event, Failed
from powerinfer_tools.serving.tickets import Ticket


async def merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Event]]:
    """(number of the answer, event) as events come, until all answers have ended. Leaving early cancels all.

    Raises the error that made one of them fail.
    """
    left = set(range(len(tickets)))
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    for index, ticket in enumerate(tickets):
        ticket.forward(queue, index)
    try:
        while left:
            index, event = await queue.get()
            if isinstance(event, Failed):
                raise event.error
            yield index, event
            if isinstance(event, Ended):
                left.discard(index)
    finally:
        for ticket in tickets:
            ticket.cancel()
