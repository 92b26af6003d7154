"""Programs that speak to the server, as people use them: LangChain, litellm, llm, lm-eval, llama-benchy; and
schemathesis, which asks all that the OpenAPI document allows.

They live in an environment of their own (`make clients`), which POWERINFER_CLIENTS names: what they bring in
is large, and not what powerinfer is tested with. Without it these tests are skipped, and say so. The openai
package is tested beside them, always.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from powerinfer_tools.engine import Engine
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.text import Tokenizer
from served_models import Served
from task_files import write_tasks
from tiny_models import TinyModel, TinySpec, make_tiny_model

CLIENTS = os.environ.get("POWERINFER_CLIENTS")
pytestmark = pytest.mark.skipif(
    CLIENTS is None, reason="POWERINFER_CLIENTS names no environment with requirements/clients.txt"
)
#: Everything is on this machine.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), TinySpec(context=1024))


@pytest.fixture(scope="module")
def server(tiny: TinyModel) -> Iterator[Served]:
    with Served(tiny.path) as served:
        yield served.ready()


def run(home: Path, *command: str, **environment: str) -> str:
    """What a program of that environment prints."""
    assert CLIENTS is not None
    program, *arguments = command
    ended = subprocess.run(
        [str(Path(CLIENTS).absolute() / "bin" / program), *arguments],
        env={"HOME": str(home), "PATH": os.environ["PATH"]} | OFFLINE | environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=home,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


LANGCHAIN = """
import pydantic, sys
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

def model(**more):
    return ChatOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", model="tiny", temperature=0, **more)

whole = model(max_tokens=6).invoke("was there a boat?")
assert whole.usage_metadata["output_tokens"] == 6, whole
chunks = list(model(max_tokens=6, stream_usage=True).stream("was there a boat?"))
assert "".join(chunk.content for chunk in chunks) == whole.content
assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 6
both = model(max_tokens=6).batch(["was there a boat?", "the road"])
assert both[0].content == whole.content

@tool
def weather(high: bool) -> str:
    "The weather."
    return "sunny"

bound = model().bind_tools([weather], tool_choice="weather")
(call,) = bound.invoke("Oslo?").tool_calls
assert call["name"] == "weather" and isinstance(call["args"]["high"], bool)
(call,) = sum(bound.stream("Oslo?"), start=next(bound.stream("Oslo?"))).tool_calls[:1]
assert call["name"] == "weather"

class Boats(pydantic.BaseModel):
    seen: bool

for method in ("json_schema", "function_calling"):
    assert isinstance(model().with_structured_output(Boats, method=method).invoke("boats?"), Boats)
text = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", model="tiny", temperature=0, max_tokens=4)
assert text.invoke("the road") == "".join(text.stream("the road"))
"""

LITELLM = """
import asyncio, sys
import litellm

asked = dict(model="openai/tiny", api_base=sys.argv[1] + "/v1", api_key="none", temperature=0, max_tokens=6,
             messages=[{"role": "user", "content": "was there a boat?"}])
whole = litellm.completion(**asked)
assert whole.usage.completion_tokens == 6
text = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True))
assert text == whole.choices[0].message.content
again = asyncio.run(litellm.acompletion(**asked))
assert again.choices[0].message.content == text
anthropic = litellm.completion(**asked | {"model": "anthropic/tiny", "api_base": sys.argv[1]})
assert anthropic.choices[0].message.content == text
old = litellm.text_completion(model="text-completion-openai/tiny", api_base=sys.argv[1] + "/v1",
                              api_key="none", prompt="the road", max_tokens=4)
assert old.usage.completion_tokens == 4
try:
    litellm.completion(**asked | {"messages": [{"role": "user", "content": "x " * 3000}]})
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("a prompt that does not fit was taken")
"""


@pytest.mark.parametrize("script", [LANGCHAIN, LITELLM], ids=["langchain", "litellm"])
def test_libraries(server: Served, tmp_path: Path, script: str) -> None:
    run(tmp_path, "python", "-c", script, server.url, LITELLM_LOCAL_MODEL_COST_MAP="True")


def test_llm(server: Served, tmp_path: Path) -> None:
    """simonw's command line, with models as its documentation says."""
    entry = {
        "model_id": "tiny",
        "model_name": "tiny",
        "api_base": f"{server.url}/v1",
        "supports_schema": True,
    }
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    expected = server.chat("was there a boat?", max_tokens=6, temperature=0)
    asked = ("llm", "-m", "tiny", "-o", "temperature", "0")
    for streaming in ((), ("--no-stream",)):
        printed = run(
            tmp_path, *asked, "-o", "max_tokens", "6", *streaming, "was there a boat?",
            LLM_USER_PATH=str(tmp_path),
        )  # fmt: skip
        assert printed.strip() == expected["choices"][0]["message"]["content"].strip()
    printed = run(tmp_path, *asked, "--schema", "seen bool", "boats?", LLM_USER_PATH=str(tmp_path))
    assert isinstance(json.loads(printed)["seen"], bool)


def test_lm_eval_gives_the_numbers_of_eval(server: Served, tiny: TinyModel, tmp_path: Path) -> None:
    """``local-completions`` over HTTP against ``eval --tasks``."""
    from powerinfer_tools.quality.harness import run_tasks

    tasks = write_tasks(tmp_path, 12)
    out = tmp_path / "out"
    arguments = f"base_url={server.url}/v1/completions,model=tiny,tokenizer_backend=remote,max_length=1024"
    run(
        tmp_path, "lm_eval", "run", "--model", "local-completions", "--model_args", arguments, "--tasks",
        ",".join(tasks), "--include_path", str(tmp_path), "--output_path", str(out), "--batch_size", "4",
    )  # fmt: skip
    (file,) = out.rglob("results_*.json")
    over_http = json.loads(file.read_text())["results"]
    model = load_model(tiny.path)
    engine = Engine(model, threads=1, context=1024)
    scores = run_tasks(engine, Tokenizer.from_gguf(model.source), tuple(tasks), tmp_path)
    engine.close()
    assert {(score.task, score.metric): score.value for score in scores} == {
        (task, metric.removesuffix(",none")): value
        for task, values in over_http.items()
        for metric, value in values.items()
        if metric.endswith(",none") and "stderr" not in metric
    }


def test_llama_benchy(server: Served, tmp_path: Path) -> None:
    """It measures speed by what streams say: tokens, usage, the first chunk."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers

    alphabet = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Words(models.BPE(alphabet, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.save(str(tmp_path / "tokenizer.json"))
    result = tmp_path / "result.json"
    run(
        tmp_path, "llama-benchy", "--base-url", f"{server.url}/v1", "--model", "tiny", "--tokenizer",
        str(tmp_path), "--book-url", f"{server.url}/openapi.json", "--pp", "64", "--tg", "256", "--runs", "2",
        "--concurrency", "1", "2", "--exact-tg", "--skip-coherence", "--enable-prefix-caching", "--depth",
        "32", "--exit-on-first-fail", "--save-result", str(result), "--format", "json",
    )  # fmt: skip
    measured: Any = json.loads(result.read_text())
    assert len(measured["benchmarks"]) >= 4
    assert all(row["tg_throughput"]["mean"] > 0 for row in measured["benchmarks"])


def test_the_openapi_document_by_schemathesis(server: Served, tmp_path: Path) -> None:
    """No request that the document allows, or forbids, ends in a fault of the server's own, nor in an answer
    of a kind that the document does not name."""
    run(
        tmp_path, "schemathesis", "run", f"{server.url}/openapi.json", "--url", server.url, "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--seed", "1",
        "--suppress-health-check", "all", "--request-timeout", "60",
    )  # fmt: skip
