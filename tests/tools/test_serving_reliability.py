"""What goes wrong on a network, and what people try: clear errors, nothing leaked, the service goes on."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from powerinfer_tools.errors import AddressError
from powerinfer_tools.serving.server import Address, Serving
from powerinfer_tools.serving.service import Settings
from powerinfer_tools.text.chat import ChatTemplate
from powerinfer_tools.text.template_worker import WORKER
from served_models import Served
from tiny_models import TinySpec, make_tiny_model

STREAM = {"prompt": "the road", "max_tokens": 200, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tiny = make_tiny_model(tmp_path_factory.mktemp("tiny"), TinySpec(context=1024))
    with Served(tiny.path, Settings(body_seconds=1.0)) as served:
        yield served.ready()


@pytest.fixture(autouse=True)
def goes_on(server: Served) -> Iterator[None]:
    """After each test, all places are free and a question is answered."""
    yield
    batcher = server.service.batcher
    assert batcher is not None
    deadline = time.monotonic() + 20
    while batcher.processing or batcher.waiting:
        assert time.monotonic() < deadline, "a place is not free"
        time.sleep(0.005)
    assert server.complete("still there?", max_tokens=1)["usage"]["completion_tokens"] <= 1


def connect(server: Served, data: bytes = b"") -> socket.socket:
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    connection = socket.create_connection((parts.hostname, parts.port or 0), timeout=20)
    connection.sendall(data)
    return connection


def request_bytes(body: Any, announced: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(data) if announced is None else announced
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    return head.encode() + data


def status_of(connection: socket.socket) -> int:
    return int(connection.recv(4096).split()[1])


def test_a_body_of_100_megabytes(server: Served) -> None:
    """It is refused by its announced length, before it is sent."""
    with connect(server, request_bytes(b"", announced=100 << 20)) as connection:
        assert status_of(connection) == 413


def test_a_body_that_never_comes(server: Served) -> None:
    with connect(server, request_bytes(b'{"prompt"', announced=100)) as connection:
        assert status_of(connection) == 408


def test_a_reader_that_does_not_read(server: Served) -> None:
    """It holds its connection, and no place."""
    with connect(server, request_bytes(STREAM)):
        batcher = server.service.batcher
        assert batcher is not None
        before = batcher.figures.requests
        while batcher.figures.requests == before:
            time.sleep(0.005)
        assert server.complete("others", max_tokens=2)


def test_clients_that_leave_in_the_middle(server: Served) -> None:
    for whole in (False, True):
        for _ in range(8):
            connection = connect(server, request_bytes(STREAM | {"stream": not whole}))
            if not whole:
                connection.recv(1)
            connection.close()


def test_half_a_request_and_silence(server: Served) -> None:
    connections = [connect(server, b"POST /v1/comple") for _ in range(20)]
    assert server.complete("others", max_tokens=2)
    for connection in connections:
        connection.close()


def test_a_thousand_connections(server: Served) -> None:
    connections = [connect(server) for _ in range(1000)]
    try:
        assert server.complete("one more", max_tokens=2)
        ask = request_bytes({"prompt": "x", "max_tokens": 1})
        for connection in connections[::100]:
            connection.sendall(ask)
        assert [status_of(connection) for connection in connections[::100]] == [200] * 10
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"\0" * 4096, b"A" * 100_000])
def test_what_is_no_http(server: Served, data: bytes) -> None:
    with connect(server, data) as connection:
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass


DEEP: dict[str, Any] = {"type": "string"}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP, "b": DEEP}}
BOMBS: list[Any] = [
    {"$ref": "#"},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
    {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
    {"enum": [f"value {number}" for number in range(3000)]},
    {"type": "string", "pattern": "("},
    {"type": "nothing"},
]


@pytest.mark.parametrize("schema", BOMBS)
def test_schemas_that_are_bombs(server: Served, schema: Any) -> None:
    """Each is compiled or refused in bounded time, and others are served meanwhile."""
    done = threading.Event()

    def others() -> None:
        while not done.is_set():
            assert server.http.get(f"{server.url}/health", timeout=5).status_code == 200

    beside = threading.Thread(target=others)
    beside.start()
    try:
        body = {"prompt": "x", "json_schema": schema, "max_tokens": 4}
        response = server.http.post(f"{server.url}/v1/completions", json=body)
        assert response.status_code in (200, 400), response.text
    finally:
        done.set()
        beside.join()


def test_the_worker_that_renders_templates_is_killed(server: Served) -> None:
    server.chat("before", max_tokens=1)
    for _ in range(3):
        assert WORKER.pid is not None
        os.kill(WORKER.pid, signal.SIGKILL)
        assert server.chat("after", max_tokens=1)["usage"]["prompt_tokens"] > 5


def test_the_worker_that_renders_templates_cannot_start(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is at fault, not the request."""
    WORKER.close()
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    response = server.http.post(
        f"{server.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}
    )
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert response.json()["error"]["message"] == "the server could not render the chat template"
    assert "/nonexistent" not in response.text
    monkeypatch.undo()
    assert server.chat("after", max_tokens=1)


def test_an_address_that_cannot_be_had_is_said_before_the_model_is_loaded(server: Served) -> None:
    taken = int(urlsplit(server.url).port or 0)
    for host, port, why in (("127.0.0.1", taken, "Address already in use"), ("1.2.3.4.5", 1, "not known")):
        loaded = list[bool]()
        serving = Serving(server.service, Address(host, port), lambda: loaded.append(True) or (lambda: None))  # noqa: B023
        with pytest.raises(AddressError, match=f"cannot listen on {host}, port {port}: .*{why}"):
            serving.run()
        assert not loaded


def test_a_template_that_loops(server: Served) -> None:
    """Its requests fail in time; what needs no template goes on, and so does the worker."""
    model = server.service.model
    assert model is not None
    endless = ChatTemplate(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", model.tokenizer
    )
    server.service.model = replace(model, template=endless)
    try:
        response = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}])
        assert "took longer than" in response["error"]["message"]
        assert server.complete("x", max_tokens=1)
    finally:
        server.service.model = model
    assert server.chat("after", max_tokens=1)


def test_deep_json(server: Served) -> None:
    deep = b'{"prompt": "x", "json_schema": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001
    response = server.http.post(f"{server.url}/v1/completions", content=deep)
    assert response.status_code == 400


def test_an_engine_that_fails_tells_those_in_the_pass(server: Served) -> None:
    batcher = server.service.batcher
    assert batcher is not None
    step = batcher._slots.step

    def fail(work: Any) -> Any:
        raise RuntimeError("made to fail")

    batcher._slots.step = fail  # type: ignore[method-assign]
    try:
        response = server.http.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 2})
    finally:
        batcher._slots.step = step  # type: ignore[method-assign]
    assert response.status_code == 500
    assert "made to fail" not in response.text
    assert "made to fail" in server.log[-1]["error"]


def test_a_pass_that_fails_leaves_the_others(server: Served) -> None:
    """A stream that has begun ends with an error event; the engine is used again at once."""
    batcher = server.service.batcher
    assert batcher is not None
    write, passes = batcher._slots.write, 0

    def fail_later(slots: Any, tokens: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 5:
            raise MemoryError("made to fail")
        return write(slots, tokens)

    batcher._slots.write = fail_later  # type: ignore[method-assign]
    try:
        events = list(server.events("/v1/completions", **STREAM))
    finally:
        batcher._slots.write = write  # type: ignore[method-assign]
    assert json.loads(events[-2])["error"] == {
        "message": "the server failed on this request",
        "type": "server_error",
        "code": "internal_error",
    }
    assert events[-1] == "[DONE]"
    assert batcher.alive


def test_a_sampler_that_fails_fails_one_request(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong after the pass, whatever it is, is that request's alone."""
    from powerinfer_tools.serving.sequence import Sequence

    choose = Sequence.choose

    def fail(self: Sequence, logits: Any) -> Any:
        if self.job.options.max_tokens == 77:
            raise RuntimeError("made to fail")
        return choose(self, logits)

    monkeypatch.setattr(Sequence, "choose", fail)
    response = server.http.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 77})
    assert response.status_code == 500
    assert "made to fail" in server.log[-1]["error"]
    assert server.complete("others", max_tokens=2)


def test_a_place_that_cannot_be_filled_fails_one_request(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = server.service.batcher
    assert batcher is not None
    take = batcher.places.take

    def fail_once(*arguments: Any, **more: Any) -> Any:
        monkeypatch.setattr(batcher.places, "take", take)
        raise MemoryError("made to fail")

    monkeypatch.setattr(batcher.places, "take", fail_once)
    response = server.http.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 2})
    assert response.status_code == 500
    assert server.complete("others", max_tokens=2)


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic a2V5"},
                                    {"Authorization": "Bearer"}, {"x-api-key": "k\u00e9y"}])  # fmt: skip
def test_wrong_keys(tmp_path: Path, header: dict[str, str]) -> None:
    tiny = make_tiny_model(tmp_path, TinySpec())
    with Served(tiny.path, Settings(keys=frozenset({"right"}))) as served:
        served.ready()
        encoded = {name: value.encode() for name, value in header.items()}
        for path in ("/v1/models", "/metrics", "/slots", "/nothing"):
            response = served.http.get(f"{served.url}{path}", headers=encoded)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        right = {"Authorization": "Bearer right"}
        assert served.http.get(f"{served.url}/v1/models", headers=right).status_code == 200


def test_tls(tmp_path: Path) -> None:
    """With a certificate and its key, HTTPS and nothing else is spoken."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    tiny = make_tiny_model(tmp_path, TinySpec())
    with Served(tiny.path, tls=(certificate, key)) as served:
        served.ready()
        assert served.url.startswith("https://")
        assert served.complete("x", max_tokens=2)["usage"]["completion_tokens"] <= 2
        assert list(served.events("/v1/completions", prompt="x", max_tokens=2))[-1] == "[DONE]"
        with connect(served, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as plain:
            assert b"200" not in plain.recv(4096)
