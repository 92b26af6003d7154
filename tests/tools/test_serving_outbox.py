"""Tokens that are handed over together: none is lost, late, or out of order."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from powerinfer_tools.serving import sse
from powerinfer_tools.serving.jobs import Event, Token
from powerinfer_tools.serving.outbox import HOLD_SECONDS, Outbox
from powerinfer_tools.serving.streaming import EventStream


@dataclass
class Reader:
    """Keeps what it is given, and in how many turns of the loop."""

    loop: asyncio.AbstractEventLoop
    tokens: list[int] = field(default_factory=list)

    def deliver(self, event: Event) -> None:
        assert isinstance(event, Token)
        self.tokens.append(event.token)


def test_tokens_wait_for_each_other_but_not_for_long() -> None:
    async def run() -> None:
        seconds = [0.0]
        outbox = Outbox(clock=lambda: seconds[0])
        reader = Reader(asyncio.get_running_loop())
        for token in range(6):
            seconds[0] += HOLD_SECONDS / 4
            outbox.add(reader, Token(token, "", None))
            if outbox.due:
                outbox.flush()
            await asyncio.sleep(0)
            assert len(reader.tokens) == (0 if token < 3 else 4)
        outbox.flush()
        await asyncio.sleep(0)
        assert reader.tokens == [0, 1, 2, 3, 4, 5]
        outbox.flush()
        await asyncio.sleep(0)
        assert len(reader.tokens) == 6

    asyncio.run(run())


def test_the_loop_of_one_client_that_is_closed_stops_no_other() -> None:
    async def run() -> None:
        outbox, reader = Outbox(), Reader(asyncio.get_running_loop())
        closed = asyncio.new_event_loop()
        closed.close()
        outbox.add(Reader(closed), Token(1, "", None))
        outbox.add(reader, Token(2, "", None))
        outbox.flush()
        await asyncio.sleep(0)
        assert reader.tokens == [2]

    asyncio.run(run())


def test_events_that_come_together_are_one_piece() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield b"a"
        yield b"b"
        await asyncio.sleep(0.01)
        yield b"c"

    async def run() -> list[bytes]:
        sent: list[bytes] = []

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            return {}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message.get("body", b"start"))

        await EventStream(events())({"type": "http"}, receive, send)  # type: ignore[arg-type]
        return sent

    assert asyncio.run(run()) == [b"start", b"ab", b"c", b""]


def test_an_event_is_one_line_whatever_its_text_holds() -> None:
    text = "é\x85\u2028\u2029\x0b\x1c\n日"
    for encode in (sse.encode, sse.encode_slowly):
        line = encode({"text": text}).decode()
        assert len(line.splitlines()) == 1
        assert json.loads(line) == {"text": text}
