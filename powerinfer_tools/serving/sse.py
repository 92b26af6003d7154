"""Server-sent events: the form of a streamed answer."""

import json
from typing import Any

#: After this many silent seconds, a comment keeps proxies and clients from giving up.
PING_SECONDS = 10.0
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def data(value: Any) -> bytes:
    """One event without a name."""
    return b"data: " + encode(value) + b"\n\n"


def named(event: str, value: Any) -> bytes:
    """One event with a name."""
    return b"event: " + event.encode() + b"\n" + data(value)


class Chunks:
    """Events that differ only in their choices: the fields ``around`` these are encoded only once."""

    def __init__(self, around: dict[str, Any]) -> None:
        self._start = b"data: " + encode(around)[:-1] + b',"choices":'

    def data(
        self, choices: list[dict[str, Any]], more: dict[str, Any] | None = None, *, slowly: bool = False
    ) -> bytes:
        """One event, with ``more`` fields beside the choices; ``slowly`` as :func:`encode_slowly`."""
        end = b"," + encode(more)[1:] if more else b"}"
        return self._start + (encode_slowly if slowly else encode)(choices) + end + b"\n\n"


def encode(value: Any) -> bytes:
    """Compact JSON in one line, also for clients to which U+0085, U+2028 and U+2029 end a line. NaN and
    infinity are never written."""
    return _as_line(_ENCODER.encode(value))


def encode_slowly(value: Any) -> bytes:
    """The same bytes as :func:`encode`, made in small steps so that other threads run between them: the
    encoder in C blocks these until it has finished."""
    return _as_line("".join(_ENCODER.iterencode(value)))


def _as_line(text: str) -> bytes:
    if not text.isascii():
        text = text.translate(_LINE_ENDS)
    return text.encode("utf-8", "replace")
