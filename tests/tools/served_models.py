"""A real server on a tiny model, in a thread of the test, on a port of its own."""

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2 as httpx

from powerinfer_tools.engine import Engine
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.serving.fair_queue import QueueLimits
from powerinfer_tools.serving.opening import ServeOptions, open_service
from powerinfer_tools.serving.server import Address, Serving
from powerinfer_tools.serving.service import Service, Settings


class Served:
    """The server, as a context manager; ``log`` has its entries."""

    def __init__(
        self,
        path: Path,
        settings: Settings | None = None,
        *,
        parallel: int = 4,
        limits: QueueLimits | None = None,
        before_load: Callable[[], None] = lambda: None,
        cache_dir: Path | None = None,
        tls: tuple[Path, Path] | None = None,
        **engine: Any,
    ) -> None:
        self.log: list[dict[str, Any]] = []
        self.service = Service(settings or Settings(), self.log.append)
        self._path, self._engine = path, {"threads": 1} | engine
        self._options = ServeOptions("tiny", parallel, limits=limits or QueueLimits(), cache_dir=cache_dir)
        self.said: list[str] = []
        self._before_load = before_load
        certificate, key = tls or (None, None)
        self._address = Address(port=0, certificate=certificate, key=key, drain_seconds=5)
        self._serving = Serving(self.service, self._address, self._load)
        self._thread = threading.Thread(target=self._serving.run, daemon=True)
        self.http = httpx.Client(timeout=60, verify=ssl.create_default_context(cafile=certificate))

    def _load(self) -> Callable[[], None]:
        self._before_load()
        engine = Engine(load_model(self._path), **self._engine)
        return open_service(self.service, engine, self._options, self.said.append)

    def __enter__(self) -> Self:
        self._thread.start()
        while (port := self._serving.port) is None:
            time.sleep(0.005)
        self.url = self._address.url(port)
        return self

    def ready(self) -> Self:
        """Wait until the model is loaded."""
        while self.service.batcher is None:
            assert self._thread.is_alive(), self._serving.failure
            time.sleep(0.005)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self._serving.stop()
        self._thread.join()

    def post(self, path: str, **body: Any) -> Any:
        """The JSON that answers, of whichever status."""
        return self.http.post(f"{self.url}{path}", json=body).json()

    def complete(self, prompt: Any, **body: Any) -> Any:
        """An answer of /v1/completions."""
        response = self.http.post(f"{self.url}/v1/completions", json={"prompt": prompt} | body)
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, text: str, **body: Any) -> Any:
        """An answer of /v1/chat/completions."""
        messages = [{"role": "user", "content": text}]
        response = self.http.post(f"{self.url}/v1/chat/completions", json={"messages": messages} | body)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream, without the last, which must be [DONE]."""
        events = list(self.events(path, **body))
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def events(self, path: str, **body: Any) -> Iterator[str]:
        """The data of the events of a stream."""
        with self.http.stream("POST", f"{self.url}{path}", json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line and not line.startswith(":"):
                    name, _, data = line.partition(": ")
                    assert name in ("data", "event"), line
                    if name == "data":
                        yield data
