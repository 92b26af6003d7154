"""The faults of requests, as the error object that OpenAI's clients read."""

from typing import Any

from powerinfer_tools.errors import PowerInferError, RendererFailed

#: The longest message that is sent back: it may quote a client's own text.
_MESSAGE = 500


class RequestFault(PowerInferError):
    """A request that is answered by an HTTP error.

    ``kind`` is OpenAI's ``type`` and ``code`` a word for programs. After ``retry_after`` seconds another
    attempt makes sense.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str = "invalid_value",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message[:_MESSAGE])
        self.status, self.kind, self.code, self.retry_after = status, kind, code, retry_after

    def body(self) -> dict[str, Any]:
        """The fault as JSON."""
        return {"error": {"message": str(self), "type": self.kind, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers beside the body."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return headers if self.retry_after is None else headers | {"Retry-After": str(self.retry_after)}


def overloaded(message: str, retry_after: int) -> RequestFault:
    """The server's queue is full."""
    return RequestFault(message, status=503, kind="server_error", code="overloaded", retry_after=retry_after)


def too_many(message: str, retry_after: int) -> RequestFault:
    """This client has too many requests under way."""
    return RequestFault(
        message, status=429, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=retry_after
    )


def unavailable(message: str, retry_after: int = 1) -> RequestFault:
    """The server is starting or ending."""
    return RequestFault(
        message, status=503, kind="unavailable_error", code="unavailable", retry_after=retry_after
    )


def too_long(prompt: int, context: int) -> RequestFault:
    """The prompt, with room for one token, does not fit. Clients know this fault by llama.cpp's words."""
    return RequestFault(
        f"the prompt has {prompt} tokens, which exceeds the available context size of {context}: shorten it, "
        "or serve with a larger context (-c)",
        code="context_length_exceeded",
    )


def internal(message: str = "the server failed on this request") -> RequestFault:
    """A fault of the server itself; details are in its log."""
    return RequestFault(message, status=500, kind="server_error", code="internal_error")


def is_clients_fault(error: Exception) -> bool:
    """Whether the request is at fault rather than the server."""
    return isinstance(error, PowerInferError) and not isinstance(error, RendererFailed)
