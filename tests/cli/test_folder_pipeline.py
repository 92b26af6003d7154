"""Every stage from a Hugging Face directory of a ReLU model, as from a GGUF file; outputs stand beside it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from powerinfer_cli.app import create_app
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from powerinfer_tools.text import Tokenizer
from tiny_folders import FOLDER_CASES, SAMPLE, FolderCase, TinyFolder, make_folder

APP = create_app()
RELU = FolderCase("Llama", "llama2", {"hidden_act": "relu", "intermediate_size": 160, "hidden_size": 64})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyFolder]:
    """A folder with the directory "tiny" and a text."""
    place = tmp_path_factory.mktemp("place")
    (place / "text.txt").write_text(SAMPLE * 30)
    return place, make_folder(place / "tiny", RELU)


def stage(place: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """Run a command in ``place`` and give its JSON value."""
    monkeypatch.chdir(place)
    ended = CliRunner().invoke(APP, [*words, "--json", "--threads", "1"])
    assert ended.exit_code == 0, ended.stderr
    return json.loads(ended.stdout)


def test_profile_train_plan_convert_run(
    place: tuple[Path, TinyFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, made = place
    profile = stage(
        where, monkeypatch, "profile", "-m", "tiny", "--corpus", "text.txt", "--ctx", "64", "--trace", "2048"
    )
    assert profile["path"] == "tiny.profile.safetensors"
    trained = stage(where, monkeypatch, "train", "-m", "tiny/", "--budget", "0.9", "--recall", "0.8")
    assert trained["path"] == "tiny.predictors.safetensors"
    stage(where, monkeypatch, "plan", "-m", "tiny", "--hardware", "pc-low", "--vram", "33MiB", "--ctx", "64")
    assert (where / "tiny.plan.json").is_file()
    report = stage(where, monkeypatch, "convert", "-m", "tiny")
    assert report["output"] == "tiny.powerinfer.gguf"
    assert report["mean_requantization_error"] == 0.0  # float rows stay what they are
    tokens = made.tokens(20)
    source, split = load_model(where / "tiny"), load_model(where / "tiny.powerinfer.gguf")
    assert source.fingerprint == split.fingerprint
    assert np.abs(forward(split, tokens) - forward(source, tokens)).max() < 1e-9
    words = ("run", "--raw", "-p", "The old road to", "-n", "9", "--temp", "0", "-c", "64", "-m")
    texts = [stage(where, monkeypatch, *words, name)["text"] for name in ("tiny", "tiny.powerinfer.gguf")]
    assert texts[0] == texts[1]
    prompt = made.tokenizer.encode("The old road to").ids
    decoder = Tokenizer.from_gguf(source.source).stream()
    assert decoder.push_all(made.greedy(prompt, 9)) + decoder.finish() == texts[0]


@pytest.mark.parametrize("name", ["mixtral-sharded", "qwen2moe-bf16"])
def test_a_mixture_of_experts_takes_the_same_way(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Profile, plan, convert, run; the split file has the source's bits, and text is that of transformers."""
    (tmp_path / "text.txt").write_text(SAMPLE * 10)
    made = make_folder(tmp_path / "tiny", FOLDER_CASES[name])

    def run(*words: str) -> Any:
        return stage(tmp_path, monkeypatch, *words)

    run("profile", "-m", "tiny", "--corpus", "text.txt", "--ctx", "64")
    budget = ("--hardware", "pc-low", "--vram", "33MiB", "--ctx", "64", "--objective", "frequency")
    plan = run("plan", "-m", "tiny", *budget)
    assert any(layer["hot_neurons"] for layer in plan["layers"])
    report = run("convert", "-m", "tiny")
    assert report["experts"]["count"] == plan["model"]["experts"]["count"]
    words = ("run", "--raw", "-p", "The old road to", "-n", "9", "--temp", "0", "-c", "64", "-m")
    source, split = (run(*words, name) for name in ("tiny", "tiny.powerinfer.gguf"))
    assert source["logits_hash"] == split["logits_hash"]
    assert run(*words, "tiny.powerinfer.gguf", "--device", "cpu")["text"] == source["text"]
    prompt, ids = made.tokenizer.encode("The old road to").ids, source["ids"]
    assert len(ids) == 9 or source["outcome"] == "end"  # by the end token, which transformers goes past
    assert made.greedy(prompt, len(ids)) == ids


def test_eval_bench_inspect(place: tuple[Path, TinyFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    where, made = place
    found = stage(
        where, monkeypatch, "eval", "-m", "tiny", "--text", "text.txt", "--ctx", "32", "--chunks", "2"
    )
    assert np.isfinite(found["perplexity"])
    stage(where, monkeypatch, "bench", "-m", "tiny", "-p", "8", "-n", "4", "-r", "1")
    described = stage(where, monkeypatch, "inspect", "tiny", "--tensors")
    assert (described["kind"], described["architecture"]) == ("model", "llama")
    assert "Hugging Face directory" in described["container"]
    assert described["metadata"]["powerinfer.activation"] == "relu"
    assert {"blk.2.ffn_down.weight"} <= {tensor["name"] for tensor in described["tensors"]}
    ids = stage(where, monkeypatch, "inspect", "tiny", "--tokenize", "two boats", "--bos")["ids"]
    assert ids == made.tokenizer.encode("two boats").ids


def test_quantize_makes_a_source_model(
    place: tuple[Path, TinyFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, made = place
    report = stage(where, monkeypatch, "quantize", "-m", "tiny", "--type", "Q8_0")
    assert report["output"] == "tiny.Q8_0.gguf"
    assert set(report["errors"]) >= {"ffn_gate", "ffn_up", "ffn_down", "attn_q", "token_embd", "output"}
    assert all(0 < error < 0.01 for error in report["errors"].values())
    tokens = made.tokens(12)
    expected = forward(load_model(where / "tiny"), tokens)
    got = forward(load_model(where / "tiny.Q8_0.gguf"), tokens)
    assert 0 < np.abs(got - expected).max() < 0.1 * np.abs(expected).max()


def test_a_directory_without_a_name_is_the_one_here(
    place: tuple[Path, TinyFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, _ = place
    stage(
        where / "tiny",
        monkeypatch,
        "profile",
        "-m",
        ".",
        "--corpus",
        "../text.txt",
        "--ctx",
        "64",
        "-o",
        "../x.st",
    )
    assert (where / "x.st").is_file()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "is a directory without config.json: it holds no model"),
        ({"config.json": "[]"}, "the document is not an object"),
        ({"config.json": "{"}, "is not valid JSON"),
        (
            {"config.json": '{"model_type": "rwkv"}'},
            "model type 'rwkv' is not supported (supported: afmoe, apertus, arcee, bamboo",
        ),
        (
            {"config.json": '{"model_type": "llama", "architectures": ["MyForCausalLM"], "auto_map": {}}'},
            "architecture 'MyForCausalLM' is not supported",
        ),
    ],
)
def test_a_directory_that_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    for name, text in files.items():
        (tmp_path / "m" / name).write_text(text)
    ended = CliRunner().invoke(APP, ["run", "-m", "m", "-p", "x"])
    assert ended.exit_code == 1
    assert said in ended.stderr.replace("\n", " ")
    assert "Traceback" not in ended.stderr
