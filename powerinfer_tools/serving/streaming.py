"""A streamed answer as a response that ends with its client."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse

from powerinfer_tools.serving import sse
from powerinfer_tools.serving.answers import timings, usage
from powerinfer_tools.serving.batcher import Ticket
from powerinfer_tools.serving.http import fault_of
from powerinfer_tools.serving.jobs import Ended

#: For so long the status of the response waits for the first token, so that a failure can still be one.
FIRST_SECONDS = 5.0


async def stream_response(
    request: Request,
    chunks: AsyncIterator[bytes],
    tickets: Sequence[Ticket],
    at_end: Callable[[], None],
    *,
    done: bool = True,
) -> StreamingResponse:
    """``chunks`` with pings; ``done``: after a failure, too, the stream ends with [DONE].

    Requests are cancelled when the client leaves or the stream ends early.
    """
    first = asyncio.ensure_future(anext(chunks))
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((first, gone), timeout=FIRST_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not first.done():
            raise ClientDisconnect
        if first.done():
            first.result()  # raises what the request failed with
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        first.cancel()
        raise
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
    body = _guarded(_from(first, chunks), tickets, at_end, done=done)
    return StreamingResponse(body, headers=_HEADERS, media_type="text/event-stream")


_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _from(first: "asyncio.Future[bytes]", chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        yield await first
    except StopAsyncIteration:
        return
    async for chunk in chunks:
        yield chunk


async def _guarded(
    chunks: AsyncIterator[bytes], tickets: Sequence[Ticket], at_end: Callable[[], None], *, done: bool
) -> AsyncIterator[bytes]:
    try:
        async for chunk in sse.with_pings(chunks):
            yield chunk
        at_end()
    except Exception as error:  # noqa: BLE001  the status is sent: what went wrong can only be an event
        yield sse.data(fault_of(error).body())
        if done:
            yield sse.DONE
    finally:
        for ticket in tickets:
            ticket.cancel()


def note_end(request: Request, ended: Ended | None) -> None:
    """For the log entry of a request with one answer."""
    if ended is not None:
        note(request, {"usage": usage([ended]), "timings": timings(ended)})


def note(request: Request, figures: dict[str, Any]) -> None:
    """For the log entry of this request."""
    usage, timings = figures.get("usage", {}), figures.get("timings", {})
    request.scope["notes"].update(
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=usage.get("prompt_tokens_details", {}).get("cached_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
        tokens_per_second=round(timings.get("predicted_per_second", 0.0), 1),
    )
