"""Running the web application: sockets, signals, and the model that is loaded meanwhile."""

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from powerinfer_tools.errors import AddressError
from powerinfer_tools.serving.app import create_app
from powerinfer_tools.serving.service import Service

#: How many connections the kernel queues before they are accepted.
_BACKLOG = 2048
#: How long a Python thread may run while the batcher waits for its turn, and the other way round.
SWITCH_SECONDS = 0.0005


@dataclass(frozen=True)
class Address:
    """Where to listen; over TLS if both files are given. At the end, requests have ``drain_seconds`` left."""

    host: str = "127.0.0.1"
    port: int = 8080
    certificate: Path | None = None
    key: Path | None = None
    drain_seconds: float = 30.0

    def listen(self) -> socket.socket:
        """A socket at that address, before anything is loaded. Raises AddressError."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise AddressError(
                f"cannot listen on {self.host}, port {self.port}: {error.strerror}; choose another --host or "
                "--port"
            ) from None

    def url(self, port: int) -> str:
        """The address for people, with the port that was taken."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.certificate is None else 'https'}://{host}:{port}"


class _Server(uvicorn.Server):
    """SIGTERM and SIGINT end the server in order; a second signal ends it at once. The process then ends
    like any other."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[int], None]) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and report the address."""
        await super().startup(sockets)
        if self.started:
            self._listening(int(self.servers[0].sockets[0].getsockname()[1]))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take both signals while serving."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


class Serving:
    """A server. ``load`` makes ``service`` ready, in a thread, while /health reports that it is loading, and
    returns a function that ends the service. ``listening`` receives the port."""

    def __init__(
        self,
        service: Service,
        address: Address,
        load: Callable[[], Callable[[], None]],
        listening: Callable[[int], None] = lambda port: None,
    ) -> None:
        self._service, self._address, self._load = service, address, load
        self._close: Callable[[], None] | None = None
        self.failure: BaseException | None = None
        app = create_app(service)
        app.router.lifespan_context = self._lifespan
        self._server = _Server(
            uvicorn.Config(
                app,
                ssl_certfile=address.certificate,
                ssl_keyfile=address.key,
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=max(1, round(address.drain_seconds)),
            ),
            self._listens,
        )
        self._told = listening
        #: The port on which the server listens, once it does.
        self.port: int | None = None

    def _listens(self, port: int) -> None:
        self.port = port
        self._told(port)

    def run(self) -> None:
        """Serve until a signal comes. Raises AddressError, and the error that kept the model from loading."""
        before, listener = sys.getswitchinterval(), self._address.listen()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            self._server.run(sockets=[listener])
        finally:
            sys.setswitchinterval(before)
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """End the server in order, from another thread."""
        self._server.should_exit = True

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        loading = asyncio.ensure_future(asyncio.to_thread(self._open))
        try:
            yield
        finally:
            self._service.draining = True
            await loading
            if self._close is not None:
                await asyncio.to_thread(self._close)

    def _open(self) -> None:
        try:
            self._close = self._load()
        except BaseException as error:  # noqa: BLE001  passed to whoever started the server
            self.failure = error
            self._server.should_exit = True
