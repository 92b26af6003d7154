"""The conversation of a request, so that all its turns reach the same replica and find their cache there."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

#: The header by which a client names the session itself.
SESSION_HEADER = "x-session-id"
#: How much of the start of a text without turns makes its key.
_START = 1024


def conversation_key(headers: Mapping[str, str], body: bytes) -> str:
    """A key that all turns of a conversation share. It is the session that the client names, else a hash: of
    the messages up to the first one of the user or, for a text, of its start. "" if the body is neither."""
    if headers.get(SESSION_HEADER):
        return f"session {headers[SESSION_HEADER]}"
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(request, dict):
        return ""
    start = _start(request)
    return "" if start is None else hashlib.sha256(json.dumps(start).encode()).hexdigest()


def _start(request: dict[str, Any]) -> Any:
    for name in ("messages", "input", "prompt"):
        turns = request.get(name)
        if isinstance(turns, str):
            return turns[:_START]
        if isinstance(turns, list) and turns:
            return [request.get("system"), request.get("instructions"), _opening(turns)]
    return None


def _opening(turns: list[Any]) -> list[Any]:
    """The messages before the first answer; for token ids, the first ids."""
    for index, turn in enumerate(turns[:_START]):
        if isinstance(turn, dict) and turn.get("role") == "user":
            return turns[: index + 1]
    return turns[:_START]
