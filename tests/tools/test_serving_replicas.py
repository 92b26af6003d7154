"""Replicas behind one address: which conversation a request belongs to, the web application asked directly,
and Ray Serve with two replicas of which one is killed.

Ray is optional; without it the last of these are skipped, and say so.
"""

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from powerinfer_tools.serving.app import create_app
from powerinfer_tools.serving.replicas.calls import Call, Start, answered
from powerinfer_tools.serving.replicas.conversations import conversation_key
from served_models import Served
from tiny_models import TinySpec, make_tiny_model

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "was there a boat?"}
MORE = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "where?"}]


def key(body: Any, **headers: str) -> str:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return conversation_key({name.replace("_", "-"): value for name, value in headers.items()}, data)


def test_turns_of_a_conversation_have_one_key() -> None:
    first = key({"messages": [SYSTEM, USER]})
    assert first
    assert key({"messages": [SYSTEM, USER, *MORE], "max_tokens": 5}) == first
    assert key({"messages": [USER]}) != first
    assert key({"messages": [USER], "system": "be brief"}) != key({"messages": [USER]})
    assert key({"input": [USER], "instructions": "x"}) == key({"input": [USER, *MORE], "instructions": "x"})
    assert key({"prompt": "a" * 2000}) == key({"prompt": "a" * 2000 + " and on"}) != key({"prompt": "b"})
    assert key({"prompt": [1, 2, 3]}) != key({"prompt": [3, 2, 1]})
    assert key({"messages": [USER]}, x_session_id="s") == key(b"", x_session_id="s")


@pytest.mark.parametrize("body", [b"", b"[", b"[" * 100_000, b"7", b"{}", b'{"messages": 7}', b"\xff"])
def test_what_is_no_conversation_has_none(body: bytes) -> None:
    assert key(body) == ""


def post(path: str, body: Any) -> Call:
    return Call("POST", path, b"", (), ("127.0.0.1", 1), json.dumps(body).encode())


def test_the_application_is_asked_without_a_socket(tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path, TinySpec(context=1024))
    with Served(tiny.path) as served:
        served.ready()
        app, asked = create_app(served.service), {"prompt": "the road", "max_tokens": 4, "temperature": 0}

        async def whole() -> list[Start | bytes]:
            return [piece async for piece in answered(app, post("/v1/completions", asked))]

        start, *body = asyncio.run(whole())
        assert isinstance(start, Start)
        assert start.status == 200
        text = json.loads(b"".join(piece for piece in body if isinstance(piece, bytes)))["choices"][0]["text"]
        assert text == served.complete(**asked)["choices"][0]["text"]

        async def left() -> None:
            long = asked | {"max_tokens": 900, "ignore_eos": True, "stream": True}
            pieces = answered(app, post("/v1/completions", long))
            await anext(pieces)
            await anext(pieces)
            await pieces.aclose()

        asyncio.run(left())
        batcher = served.service.batcher
        assert batcher is not None
        while batcher.processing:
            time.sleep(0.005)
        assert batcher.figures.interrupted == 1


def test_what_ray_is_told(tmp_path: Path) -> None:
    """Replicas by load, and deploy/ray.yaml, in Ray's own judgement."""
    pytest.importorskip("ray", reason="replicas need Ray (pip install '.[ray]')")
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from powerinfer.serving.ray import AppOptions, app

    assert app(AppOptions(model=tmp_path / "x.gguf", replicas=2, max_replicas=5))
    text = (Path(__file__).resolve().parents[2] / "deploy/ray.yaml").read_text(encoding="utf-8")
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == "powerinfer.serving.ray:app"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replicas on a local Ray."""
    ray = pytest.importorskip("ray", reason="replicas need Ray (pip install '.[ray]')")
    from ray import serve

    from powerinfer.serving.ray import AppOptions, app

    tiny = make_tiny_model(tmp_path_factory.mktemp("tiny"), TinySpec(context=2048))
    for kind in ("REPLICA", "HANDLE"):  # how often load is told; every ten seconds else
        os.environ[f"RAY_SERVE_{kind}_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "0.5"
    for check in ("READY", "HEALTH"):  # on a busy machine Ray would end its proxy before it has begun
        os.environ[f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S"] = "120"
    for limit in ("", "MAX_"):  # a replica that does not say its load in time is passed over: 0.1 s else
        os.environ[f"RAY_SERVE_{limit}QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "30"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 18999})
        serve.run(app(AppOptions(model=tiny.path, replicas=2, alias="tiny", parallel=4)))
        scaled = AppOptions(
            model=tiny.path, replicas=1, max_replicas=2, parallel=2, upscale_seconds=1, downscale_seconds=2
        )
        serve.run(app(scaled), name="scaled", route_prefix="/scaled")
        yield "http://127.0.0.1:18999"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas(name: str = "default") -> list[int]:
    """Processes of replicas of the model."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [
        int(line.split()[0]) for line in listed.splitlines() if f"ray::ServeReplica:{name}:replicas" in line
    ]


def test_a_conversation_stays_with_its_replica(url: str) -> None:
    """The second turn finds the start of its prompt in the cache; others go elsewhere, too."""
    seen = set()
    for number in range(8):
        question = {"role": "user", "content": f"question {number}"}
        first_turn = {"messages": [question], "max_tokens": 2}
        first = httpx.post(f"{url}/v1/chat/completions", json=first_turn, timeout=120)
        assert first.status_code == 200, first.text
        messages = [question, first.json()["choices"][0]["message"], MORE[1]]
        second_turn = {"messages": messages, "max_tokens": 2}
        second = httpx.post(f"{url}/v1/chat/completions", json=second_turn, timeout=120)
        assert second.headers["x-replica"] == first.headers["x-replica"]
        assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        seen.add(first.headers["x-replica"])
    assert len(seen) == 2


def test_faults_and_streams_pass_through(url: str) -> None:
    large = httpx.post(f"{url}/v1/completions", content=b"x" * (5 << 20), timeout=120)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    fault = httpx.post(f"{url}/v1/completions", json={"prompt": 7}, timeout=120)
    assert (fault.status_code, fault.json()["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.get(f"{url}/health", timeout=120).json() == {"status": "ok"}
    with httpx.stream(
        "POST",
        f"{url}/v1/completions",
        json={"prompt": "x", "max_tokens": 3, "stream": True},
        timeout=120,
    ) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_a_replica_is_killed_under_load(url: str) -> None:
    """Whole answers are all given; a stream ends with an error at worst; then there are two again."""
    faults, answers, streams = list[str](), list[str](), list[str]()
    asked = {"max_tokens": 120, "ignore_eos": True, "temperature": 0}

    def whole(number: int) -> None:
        body = asked | {"prompt": f"question {number % 6}"}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        (answers if response.status_code == 200 else faults).append(response.text)

    def streamed(number: int) -> None:
        body = asked | {"prompt": f"stream {number}", "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
            streams.append([line for line in response.iter_lines() if line][-1])

    threads = [
        threading.Thread(target=work, args=(number,)) for number in range(12) for work in (whole, streamed)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    before = replicas()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert faults == []
    texts = {json.loads(answer)["choices"][0]["text"] for answer in answers}
    assert (len(answers), len(texts)) == (12, 6)
    assert streams == ["data: [DONE]"] * 12
    deadline = time.monotonic() + 240  # on a busy machine, too
    while len(replicas()) < 2:
        assert time.monotonic() < deadline, "the replica was not replaced"
        time.sleep(0.2)


def test_replicas_come_and_go_by_load(url: str) -> None:
    """One replica, two under the load of six clients, one again under that of one: no answer is lost, and all
    are the same."""
    asked = {"max_tokens": 150, "ignore_eos": True, "temperature": 0}
    faults, texts, given = list[str](), dict[int, set[str]](), set[str]()
    many, over = threading.Event(), threading.Event()

    def client(number: int) -> None:
        while not over.is_set() and (number == 0 or not many.is_set()):
            body = asked | {"prompt": f"question {number}"}
            response = httpx.post(f"{url}/scaled/v1/completions", json=body, timeout=120)
            if response.status_code != 200:
                faults.append(response.text)
                return
            texts.setdefault(number, set()).add(response.json()["choices"][0]["text"])
            given.add(response.headers["x-replica"])

    assert len(replicas("scaled")) == 1
    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(replicas("scaled")) == 2, "a second replica came")
        until(lambda: len(given) == 2, "it answered")
        many.set()
        until(lambda: len(replicas("scaled")) == 1, "it went")
    finally:
        many.set()
        over.set()
        for thread in threads:
            thread.join()
    assert faults == []
    assert [len(texts[number]) for number in range(6)] == [1] * 6


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, f"four minutes went by before {what}"
        time.sleep(0.2)
