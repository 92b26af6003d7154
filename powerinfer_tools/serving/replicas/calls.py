"""One HTTP request as a message between processes, and a direct call of the web application with it."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope


@dataclass(frozen=True)
class Call:
    """A request whose body has arrived. Header names are in lower case."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes

    def scope(self) -> Scope:
        """The scope with which an ASGI application is called."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
        }


@dataclass(frozen=True)
class Start:
    """The beginning of an answer: status and headers."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]


async def answered(app: ASGIApp, call: Call) -> AsyncGenerator[Start | bytes, None]:
    """``Start``, then the body in pieces as they come. Closing the generator means that the client left."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    arrived = False

    async def receive() -> Message:
        nonlocal arrived
        if not arrived:
            arrived = True
            return {"type": "http.request", "body": call.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await app(call.scope(), receive, messages.put)
        finally:
            messages.put_nowait(None)

    task = asyncio.ensure_future(work())
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                yield Start(message["status"], tuple(message["headers"]))
            elif message.get("body"):
                yield message["body"]
        await task
    finally:
        gone.set()
        await asyncio.gather(task, return_exceptions=True)
