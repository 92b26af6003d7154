"""A streamed answer as a response that ends with its client."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from powerinfer_tools.serving import sse
from powerinfer_tools.serving.answers import timings, usage
from powerinfer_tools.serving.http import fault_of
from powerinfer_tools.serving.jobs import Ended
from powerinfer_tools.serving.tickets import Ticket

#: How long the status of the response waits for the first token, so that a failure can still set it.
FIRST_SECONDS = 5.0
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def stream_response(
    request: Request,
    chunks: AsyncGenerator[bytes, None],
    tickets: Sequence[Ticket],
    at_end: Callable[[], None],
    *,
    done: bool = True,
) -> Response:
    """``chunks`` with pings. With ``done`` the stream ends with [DONE], also after a failure.

    Requests are cancelled when the client leaves or the stream ends early.
    """
    first = asyncio.ensure_future(anext(chunks))
    gone = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait((first, gone), timeout=FIRST_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not first.done():
            raise ClientDisconnect
        if first.done():
            first.result()  # raises the error with which the request failed
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        first.cancel()
        raise
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
    return EventStream(_guarded(first, chunks, tickets, at_end, done=done))


class EventStream(Response):
    """Sends events as they come: events that come together in one piece, and a comment if none has come for
    long. Sending is one task and pinging another, so that pings do not slow down a token."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers=_HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self._last = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or as much as possible until the client leaves."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        tasks = [asyncio.ensure_future(work) for work in (self._send(send), _left(receive), self._ping(send))]
        sending = tasks[0]
        try:
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientDisconnect
            sending.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        ready, arrived = list[bytes](), asyncio.Event()
        collecting = asyncio.ensure_future(self._collect(ready, arrived))
        collecting.add_done_callback(lambda _: arrived.set())
        try:
            while ready or not collecting.done():
                await arrived.wait()
                arrived.clear()
                if ready:
                    piece = b"".join(ready)
                    ready.clear()
                    self._last = now()
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            collecting.result()
        finally:
            collecting.cancel()
            await asyncio.gather(collecting, return_exceptions=True)

    async def _collect(self, ready: list[bytes], arrived: asyncio.Event) -> None:
        async for event in self._events:
            ready.append(event)
            arrived.set()

    async def _ping(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        self._last = now()
        while True:
            await asyncio.sleep(max(0.01, self._last + sse.PING_SECONDS - now()))
            if now() - self._last >= sse.PING_SECONDS:
                self._last = now()
                await send({"type": "http.response.body", "body": sse.PING, "more_body": True})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _guarded(
    first: "asyncio.Future[bytes]",
    chunks: AsyncGenerator[bytes, None],
    tickets: Sequence[Ticket],
    at_end: Callable[[], None],
    *,
    done: bool,
) -> AsyncGenerator[bytes, None]:
    try:
        with contextlib.suppress(StopAsyncIteration):
            yield await first
            async for chunk in chunks:
                yield chunk
        at_end()
    except Exception as error:  # noqa: BLE001  the status is sent: what went wrong can only be an event
        yield sse.data(fault_of(error).body())
        if done:
            yield sse.DONE
    finally:
        for ticket in tickets:
            ticket.cancel()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await chunks.aclose()


def note_end(request: Request, ended: Ended | None) -> None:
    """For the log entry of a request with one answer."""
    if ended is not None:
        note(request, {"usage": usage([ended]), "timings": timings(ended)})


def note(request: Request, figures: dict[str, Any]) -> None:
    """For the log entry of this request."""
    counts, speeds = figures.get("usage", {}), figures.get("timings", {})
    request.scope["notes"].update(
        prompt_tokens=counts.get("prompt_tokens", 0),
        cached_tokens=counts.get("prompt_tokens_details", {}).get("cached_tokens", 0),
        completion_tokens=counts.get("completion_tokens", 0),
        tokens_per_second=round(speeds.get("predicted_per_second", 0.0), 1),
    )
