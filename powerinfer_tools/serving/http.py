"""Reading requests and answering faults."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio.to_thread
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from powerinfer_tools.errors import PowerInferError, RendererFailed
from powerinfer_tools.serving.faults import RequestFault, internal, is_clients_fault
from powerinfer_tools.serving.service import Service
from powerinfer_tools.serving.sse import encode, encode_slowly

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")
#: Bodies longer than this are parsed by a thread, so that the event loop goes on meanwhile.
_LONG = 1 << 15
_OPEN = frozenset({"/", "/health", "/v1/health", "/favicon.ico"})
_STATIC = "/static/"


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(encode(value), status, headers, "application/json")


async def long_answer(make: Callable[[], Any]) -> Response:
    """A JSON response whose value takes a while to make and to encode: a thread does both, so that the event
    loop goes on."""

    def work() -> bytes:
        return encode_slowly(make())

    return Response(await anyio.to_thread.run_sync(work), media_type="application/json")


def fault_of(error: Exception) -> RequestFault:
    """The fault that clients get for ``error``."""
    if isinstance(error, RequestFault):
        return error
    if isinstance(error, RendererFailed):
        return internal("the server could not render the chat template")
    if isinstance(error, PowerInferError):
        return RequestFault(str(error))
    if isinstance(error, ValidationError):
        return RequestFault(_describe(error))
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return RequestFault(error.detail, status=error.status_code, code=code)
    return internal()


def refusal(error: Exception) -> Response:
    """The response to a fault."""
    fault = fault_of(error)
    allow = getattr(error, "headers", None) or {}
    return answer(fault.body(), fault.status, {**allow, **fault.headers})


async def read(request: Request, kind: type[Body], service: Service) -> Body:
    """The body as ``kind``. Raises RequestFault if it is too long, too slow, not JSON, or not a ``kind``."""
    data = await read_body(request, service.settings.body_bytes, service.settings.body_seconds)
    if len(data) > _LONG:
        return await anyio.to_thread.run_sync(_parse, data, kind)
    return _parse(data, kind)


def _parse(data: bytes, kind: type[Body]) -> Body:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise RequestFault(_describe(error)) from None


def _describe(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"])
    return f"{place}: {message}" if place else message


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The body. Raises RequestFault if it is longer than ``limit`` bytes or takes over ``seconds``."""
    too_large = RequestFault(f"the body is longer than {limit} bytes", status=413, code="body_too_large")
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and int(announced) > limit:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise too_large
    except TimeoutError:
        raise RequestFault(
            f"the body did not arrive within {seconds:g} s", status=408, code="body_too_slow"
        ) from None
    return bytes(data)


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of ``work``, which is cancelled when the client leaves. Raises ClientDisconnect then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for future in (task, gone):
            if not future.done():
                future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Gate:
    """Wraps all endpoints: keys, faults as JSON, and one log entry per request."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        scope["notes"] = {}

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._authorize(Request(scope))
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            status = 499
        except Exception as error:  # noqa: BLE001  the boundary of a request: the client gets one clear answer
            if not (is_clients_fault(error) or isinstance(error, HTTPException)):
                scope["notes"]["error"] = f"{type(error).__name__}: {error}"
            if status == 0:
                await refusal(error)(scope, receive, watched)
        self._log(scope, status, time.perf_counter() - started)

    def _authorize(self, request: Request) -> None:
        keys, path = self.service.settings.keys, request.url.path
        if not keys or path in _OPEN or path.startswith(_STATIC) or request.method == "OPTIONS":
            return
        offered = given_key(request)
        if not sum(hmac.compare_digest(offered.encode(), key.encode()) for key in keys):
            raise RequestFault(
                "a valid API key is needed: Authorization: Bearer KEY",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
            )

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        client = scope.get("client")
        self.service.log(
            {
                "client": client[0] if client else "",
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 4),
                **scope["notes"],
            }
        )


def given_key(request: Request) -> str:
    """The key in a request's headers, in OpenAI's or in Anthropic's form."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


def client_of(request: Request) -> str:
    """The client for whom the request queues: the key, else the address."""
    return given_key(request) or (request.client.host if request.client else "")


Endpoint = Callable[[Request], Awaitable[Response]]
