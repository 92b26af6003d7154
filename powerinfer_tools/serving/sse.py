"""Server-sent events: the form of a streamed answer."""

import json
from typing import Any

#: After so many silent seconds a comment keeps proxies and clients from giving up.
PING_SECONDS = 10.0
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def data(value: Any) -> bytes:
    """One event without a name."""
    return b"data: " + encode(value) + b"\n\n"


def named(event: str, value: Any) -> bytes:
    """One event with a name."""
    return b"event: " + event.encode() + b"\n" + data(value)


def encode(value: Any) -> bytes:
    """Compact JSON; NaN and infinity are never written."""
    return _ENCODER.encode(value).encode("utf-8", "replace")
