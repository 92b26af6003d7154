"""Which conversation a request belongs to, so that its turns find the same replica, and their cache."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

#: A client may say it itself.
SESSION_HEADER = "x-session-id"
#: Of a text without turns, so much of its start.
_START = 1024


def conversation_key(headers: Mapping[str, str], body: bytes) -> str:
    """A key that all turns of a conversation share: the session that the client names, else a hash of the
    messages up to the first one of the user; of a text, of its start. "" where the body is none of these."""
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
    """The messages before the first answer; of token ids, the first ones."""
    for index, turn in enumerate(turns[:_START]):
        if isinstance(turn, dict) and turn.get("role") == "user":
            return turns[: index + 1]
    return turns[:_START]
