"""Every stage from a model in shards: whichever file is named, the answers are those of the whole file."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from powerinfer_cli.app import create_app
from shards import write_shards
from tiny_folders import SAMPLE, FolderCase, make_folder

RELU = FolderCase("Llama", "llama2", {"hidden_act": "relu", "intermediate_size": 160, "hidden_size": 64})
RUN = ("run", "--raw", "-p", "The old road to", "-n", "9", "--temp", "0", "-c", "64", "-m")
FIRST, SECOND, LAST = (f"tiny.Q8_0-{number:05}-of-00003.gguf" for number in (1, 2, 3))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a model, and its shards in ``shards``."""
    place = tmp_path_factory.mktemp("place")
    make_folder(place / "tiny", RELU)
    run(place, "quantize", "-m", str(place / "tiny"), "--type", "Q8_0")
    (place / "shards").mkdir()
    (place / "shards/text.txt").write_text(SAMPLE * 20)
    write_shards(place / "tiny.Q8_0.gguf", place / "shards", [0, 20, 10])
    return place / "shards"


def run(place: Path, *words: str) -> Any:
    """Run a command in ``place`` and give its JSON value."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)
        ended = CliRunner().invoke(create_app((words[0],)), [*words, "--json", "--threads", "1"])
    assert ended.exit_code == 0, ended.stderr
    return json.loads(ended.stdout)


def test_any_shard_runs_as_the_whole_file(place: Path) -> None:
    whole = run(place, *RUN, "../tiny.Q8_0.gguf")
    for name in (FIRST, SECOND, LAST):
        assert run(place, *RUN, name)["logits_hash"] == whole["logits_hash"]


def test_profile_train_plan_convert_run(place: Path) -> None:
    """Files of the stages have the name of the set, so any shard finds them."""
    profile = run(place, "profile", "-m", LAST, "--corpus", "text.txt", "--ctx", "64", "--trace", "2048")
    assert profile["path"] == "tiny.Q8_0.profile.safetensors"
    assert run(place, "train", "-m", FIRST, "--budget", "0.9", "--recall", "0.8")["path"] == (
        "tiny.Q8_0.predictors.safetensors"
    )
    plan = run(place, "plan", "-m", SECOND, "--hardware", "pc-low", "--vram", "33MiB", "--ctx", "64")
    assert plan["model"]["architecture"] == "llama"
    assert run(place, "convert", "-m", FIRST)["output"] == "tiny.Q8_0.powerinfer.gguf"
    described = run(place, "inspect", "tiny.Q8_0.powerinfer.gguf")
    assert not [key for key in described["metadata"] if key.startswith("split.")]
    assert run(place, *RUN, "tiny.Q8_0.powerinfer.gguf")["text"] == run(place, *RUN, SECOND)["text"]


def test_eval_bench_inspect(place: Path) -> None:
    texts = ("--text", "text.txt", "--ctx", "32", "--chunks", "2")
    found = [run(place, "eval", "-m", name, *texts) for name in (SECOND, "../tiny.Q8_0.gguf")]
    assert found[0]["perplexity"] == found[1]["perplexity"]
    run(place, "bench", "-m", SECOND, "-p", "8", "-n", "4", "-r", "1")
    assert run(place, "inspect", LAST)["container"] == "GGUF version 3, 3 shards"


def test_no_stage_writes_over_a_shard(place: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)
        ended = CliRunner().invoke(
            create_app(("quantize",)), ["quantize", "-m", FIRST, "--type", "Q4_0", "-o", SECOND]
        )
    assert ended.exit_code == 1
    assert f"{SECOND} is the model itself" in ended.stderr
