"""The examples of docs/serving.md run as they stand, and the OpenAPI document is what is there."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from served_models import Served
from tiny_models import TinySpec, make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(
    r"<!-- run -->\n```(sh|python)\n(.*?)```", (ROOT / "docs/serving.md").read_text(encoding="utf-8"), re.S
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tiny = make_tiny_model(tmp_path_factory.mktemp("tiny"), TinySpec(context=1024))
    with Served(tiny.path) as served:
        yield served.ready()


def test_there_are_examples() -> None:
    assert [kind for kind, _ in EXAMPLES] == ["sh", "python", "python"]


@pytest.mark.parametrize(("kind", "text"), EXAMPLES)
def test_examples(server: Served, kind: str, text: str) -> None:
    if kind == "sh":
        command = ["bash", "-euc", text]
    else:
        command = [sys.executable, "-c", f"SERVER = {server.url!r}\n{text}"]
    ended = subprocess.run(
        command,
        env={"SERVER": server.url, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()
    assert '"error"' not in ended.stdout


def test_the_openapi_document_names_the_endpoints(server: Served) -> None:
    document = server.http.get(f"{server.url}/openapi.json").json()
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    for path, methods in document["paths"].items():
        if "get" in methods:
            assert server.http.get(f"{server.url}{path}").status_code == 200
        else:
            assert server.http.post(f"{server.url}{path}", json={}).status_code == 400
        assert path in page or path in ("/machine", "/tokenizer_info")
    assert "ChatRequest" in document["components"]["schemas"]
