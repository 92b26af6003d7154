"""pull, list, rm and -hf, with a small hub on the loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from powerinfer_cli.app import create_app
from processes import Command
from shards import write_shards
from small_hub import SmallHub
from tiny_folders import FolderCase, make_folder

SMALL = FolderCase("Llama", "llama2", {"intermediate_size": 96, "hidden_size": 64})
RUN = ("run", "--raw", "-p", "The old road to", "-n", "5", "--temp", "0", "-c", "64")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """A repository with a directory, and one with a GGUF file, whole and in shards."""
    place = tmp_path_factory.mktemp("made")
    folder = make_folder(place / "tiny", SMALL).path
    ended = CliRunner().invoke(create_app(("quantize",)), ["quantize", "-m", str(folder), "--type", "Q8_0"])
    assert ended.exit_code == 0, ended.stderr
    whole = place / "tiny.Q8_0.gguf"
    gguf = {"m-Q4_0.gguf": whole.read_bytes()}
    for path in write_shards(whole, place, [20, 10]):
        gguf[path.name] = path.read_bytes()
    return {"o/tiny": {path.name: path.read_bytes() for path in folder.iterdir()}, "o/tiny-GGUF": gguf}


@pytest.fixture
def hub(files: dict[str, dict[str, bytes]]) -> Iterator[SmallHub]:
    with SmallHub(files).serving() as hub:
        yield hub


@pytest.fixture
def call(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command here and gives its JSON value, or its last line where it fails."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def run(*words: str) -> Any:
        ended = CliRunner().invoke(create_app((words[0],)), [*words, "--json"])
        return json.loads(ended.stdout) if ended.exit_code == 0 else ended.stderr.rstrip().split("\n")[-1]

    return run


def test_run_fetches_a_model_once(call: Any, hub: SmallHub) -> None:
    first = call(*RUN, "-hf", "o/tiny-GGUF")
    asked = len(hub.requests)
    assert asked
    assert call(*RUN, "-hf", "o/tiny-GGUF:Q4_0")["logits_hash"] == first["logits_hash"]
    assert len(hub.requests) == asked  # what is in the cache needs no network
    assert call(*RUN, "-hf", "o/tiny-GGUF:Q8_0")["logits_hash"] == first["logits_hash"]  # in shards
    assert call("advise", "-hf", "o/tiny-GGUF:Q8_0")["family"] == "llama"
    assert call(*RUN, "-hf", "o/tiny")["text"]


def test_pull_list_rm(call: Any, hub: SmallHub) -> None:
    assert call("list") == {"models": [], "incomplete_bytes": 0}
    pulled = call("pull", "o/tiny-GGUF:q8_0")
    assert pulled["files"] == [f"tiny.Q8_0-{number:05}-of-00002.gguf" for number in (1, 2)]
    assert Path(pulled["path"]).name == pulled["files"][0]
    call("pull", "o/tiny")
    listed = call("list")["models"]
    assert [model["reference"] for model in listed] == ["o/tiny-GGUF:Q8_0", "o/tiny:safetensors"]
    assert call("rm", "o/tiny-GGUF") == {"freed_bytes": pulled["nbytes"]}
    assert "there are: safetensors" in call("rm", "o/tiny:Q4_0")
    assert len(call("list")["models"]) == 1


def test_errors_are_one_line(call: Any, hub: SmallHub) -> None:
    assert call("pull", "o/tiny-GGUF:Q3_K_M").endswith("o/tiny-GGUF has no Q3_K_M; there are: Q4_0, Q8_0")
    assert "does not name a model of the hub" in call("pull", "tiny")
    assert "is not in the cache; powerinfer list" in call("rm", "o/tiny")
    hub.failing = 503
    assert "status 503" in call(*RUN, "-hf", "o/tiny")


def test_a_file_and_a_model_of_the_hub_are_two_models(call: Any) -> None:
    words = ("quantize", "-m", "x.gguf", "-hf", "o/tiny")
    ended = CliRunner().invoke(create_app(("quantize",)), list(words))
    assert ended.exit_code == 2
    assert "choose one of -m and -hf" in ended.stderr


def test_the_hubs_own_variables_count(
    powerinfer: Command, hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own: HF_ENDPOINT, HF_HOME, and HF_HUB_OFFLINE with what is in the cache."""
    here = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.endpoint, "NO_PROXY": "127.0.0.1"}
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # other tests set it
    refused = powerinfer("pull", "o/tiny-GGUF:Q4_0", HF_HUB_OFFLINE="1", **here)
    assert (refused.code, len(hub.requests)) == (1, 0)
    assert "HF_HUB_OFFLINE forbids the network" in refused.last_line
    pulled = powerinfer("pull", "o/tiny-GGUF:Q4_0", **here)
    assert pulled.code == 0, pulled.err
    assert Path(pulled.out.strip()).is_relative_to(tmp_path / "hub/models--o--tiny-GGUF")
    offline = powerinfer(*RUN, "-hf", "o/tiny-GGUF", HF_HUB_OFFLINE="1", **here)
    assert offline.code == 0, offline.err
