"""Server-sent events: the form of a streamed answer."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

#: After so many silent seconds a comment keeps proxies and clients from giving up.
PING_SECONDS = 10.0
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def data(value: Any) -> bytes:
    """One event without a name."""
    return b"data: " + encode(value) + b"\n\n"


def named(event: str, value: Any) -> bytes:
    """One event with a name."""
    return b"event: " + event.encode() + b"\n" + data(value)


def encode(value: Any) -> bytes:
    """Compact JSON; NaN and infinity are never written."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        "utf-8", "replace"
    )


async def with_pings(chunks: AsyncIterator[bytes], seconds: float = PING_SECONDS) -> AsyncIterator[bytes]:
    """``chunks``, with a comment wherever nothing comes for so long."""
    waiting: asyncio.Future[bytes] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(chunks))
            done, _ = await asyncio.wait((waiting,), timeout=seconds)
            if not done:
                yield PING
                continue
            try:
                chunk = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield chunk
    finally:
        if waiting is not None and not waiting.done():
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()
