"""The server as a Ray Serve application: replicas of the model, and a front that finds the right one.

All turns of a conversation go to the same replica, whose prefix cache holds the start of that conversation
(Ray's consistent hashing). If a replica dies before it has answered anything, its request goes to another
one; an answer under way ends with an error event. Ray starts replicas, watches their health, and scales them
by load.
"""

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from powerinfer_tools.serving import sse
from powerinfer_tools.serving.app import create_app
from powerinfer_tools.serving.fair_queue import QueueLimits
from powerinfer_tools.serving.faults import RequestFault, overloaded, unavailable
from powerinfer_tools.serving.http import fault_of, read_body, refusal
from powerinfer_tools.serving.opening import ServeOptions, open_service
from powerinfer_tools.serving.replicas.calls import Call, Start, answered
from powerinfer_tools.serving.replicas.conversations import conversation_key
from powerinfer_tools.serving.server import SWITCH_SECONDS
from powerinfer_tools.serving.service import MIB, Service, Settings

#: How many replicas a request is given to at most, one after another, and the pause between attempts.
_ATTEMPTS = 6
_PAUSE_SECONDS = 0.5
#: Least number of seconds over which load is averaged: Ray reports load every ten seconds.
_LEAST_LOOK_BACK = 12.0
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class AppOptions(BaseModel):
    """What `serve run … NAME=VALUE` takes. With ``max_replicas``, Ray adds and removes replicas so that each
    has ``parallel`` requests, once load has been higher or lower for ``upscale_seconds`` and
    ``downscale_seconds``; the others are those of `powerinfer serve`. ``gpus``: of each replica, for
    ``device`` cuda."""

    model: Path
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    upscale_seconds: float = Field(30.0, ge=0)
    downscale_seconds: float = Field(600.0, ge=0)
    threads: int = Field(1, ge=1)
    context: int | None = None
    parallel: int = Field(8, ge=1)
    queue: int = Field(256, ge=1)
    per_client: int = Field(64, ge=1)
    kv_memory: int | None = None
    kv_type: str = "f16"
    mode: str | None = None
    device: str = "none"
    vram: int | None = None
    gpus: float = Field(0, ge=0)
    alias: str | None = None
    api_key_file: Path | None = None
    body_bytes: int = Field(4 * MIB, ge=1)
    drain_seconds: float = Field(30.0, ge=0)

    def keys(self) -> frozenset[str]:
        """The keys in the file. Raises ValueError where it has none."""
        if self.api_key_file is None:
            return frozenset()
        keys = frozenset(self.api_key_file.read_text(encoding="utf-8").split())
        if not keys:
            raise ValueError(f"{self.api_key_file} has no key")
        return keys


class Replica:
    """One copy of the model, and all endpoints on it."""

    def __init__(self, options: AppOptions) -> None:
        from ray import serve

        from powerinfer_tools.engine import Engine
        from powerinfer_tools.model.loading import load_model

        sys.setswitchinterval(SWITCH_SECONDS)
        log = logging.getLogger("ray.serve")
        settings = Settings(options.keys(), body_bytes=options.body_bytes)
        self._service = Service(settings, lambda entry: log.info("%s", entry))
        engine = Engine(
            load_model(options.model),
            threads=options.threads,
            context=options.context,
            mode=options.mode,
            device=options.device,
            vram=options.vram,
            kv_type=options.kv_type,
        )
        limits = QueueLimits(options.queue, options.per_client)
        serving = ServeOptions(options.alias, options.parallel, options.kv_memory, limits)
        self._close: Callable[[], None] = open_service(self._service, engine, serving)
        self._app = create_app(self._service)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    async def answer(self, call: Call) -> AsyncGenerator[Start | bytes, None]:
        """``Start``, then the body in pieces."""
        pieces = answered(self._app, call)
        try:
            async for piece in pieces:
                if isinstance(piece, Start):
                    yield Start(piece.status, (*piece.headers, (b"x-replica", self._name)))
                else:
                    yield piece
        finally:
            await pieces.aclose()

    def check_health(self) -> None:
        """Called by Ray now and then: it replaces a replica whose check fails."""
        self._service.ready()

    def __del__(self) -> None:
        self._close()


class Front:
    """Accepts requests and passes each to the replica of its conversation."""

    def __init__(self, replicas: Any, options: AppOptions) -> None:
        self._replicas, self._limit = replicas, options.body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        try:
            return await self._answer(request)
        except RequestFault as fault:
            return refusal(fault)
        except Exception as error:  # noqa: BLE001  the boundary of a request: the client gets one clear answer
            logging.getLogger("ray.serve").error("%s %s: %r", request.method, request.url.path, error)
            return refusal(error)

    async def _answer(self, request: Request) -> Response:
        call = await self._call(request)
        handle = self._replicas.options(stream=True)
        if key := conversation_key(request.headers, call.body):
            handle = handle.options(session_id=key)
        pieces, start = await self._begun(handle, call)
        response = StreamingResponse(_rest(pieces, start), start.status)
        response.raw_headers = list(start.headers)
        return response

    async def _call(self, request: Request) -> Call:
        body = await read_body(request, self._limit, Settings.body_seconds)
        scope = request.scope
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        client = (request.client.host, request.client.port) if request.client else None
        headers = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
        return Call(scope["method"], path, scope["query_string"], headers, client, body)

    @staticmethod
    async def _begun(handle: Any, call: Call) -> tuple[Any, Start]:
        """An answer that has begun. A replica that dies before that is replaced by the next one."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError

        for _ in range(_ATTEMPTS):
            pieces = handle.answer.remote(call)
            try:
                return pieces, await anext(pieces)
            except RayActorError:
                await asyncio.sleep(_PAUSE_SECONDS)
            except BackPressureError:
                raise overloaded("all replicas have as many requests as fit", 5) from None
            except BaseException:
                pieces.cancel()
                raise
        raise unavailable("no replica could answer", 5)


async def _rest(pieces: Any, start: Start) -> AsyncGenerator[bytes, None]:
    """The body. If a replica dies in the middle of a stream, an event says so."""
    finished = False
    try:
        async for piece in pieces:
            yield piece
        finished = True
    except Exception as error:
        if not any(value.startswith(b"text/event-stream") for _, value in start.headers):
            raise
        yield sse.data(fault_of(error).body()) + sse.DONE
    finally:
        if not finished:
            pieces.cancel()


def application(options: AppOptions) -> Any:
    """The Ray Serve application."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    scaling: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=options.replicas,
                max_replicas=options.max_replicas,
                target_ongoing_requests=options.parallel,
                upscale_delay_s=options.upscale_seconds,
                downscale_delay_s=options.downscale_seconds,
                look_back_period_s=max(_LEAST_LOOK_BACK, options.upscale_seconds),
            )
        }
    replicas = serve.deployment(
        Replica,
        name="replicas",
        ray_actor_options={"num_cpus": options.threads, "num_gpus": options.gpus},
        max_ongoing_requests=options.parallel + options.queue,
        max_queued_requests=options.queue,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=options.drain_seconds,
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        **scaling,
    )
    front = serve.deployment(
        Front, name="front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=4096
    )
    return front.bind(replicas.bind(options), options)
