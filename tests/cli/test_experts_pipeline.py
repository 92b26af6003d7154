"""Every stage that takes a mixture of experts, by its command; and what the others say."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from powerinfer_cli.app import create_app
from powerinfer_tools.engine import from_disk
from powerinfer_tools.measure.synthetic.shapes import SHAPES, Shape
from tiny_models import CASES, make_tiny_model

APP = create_app()
TEXT = "the cat sat on the mat and the dog sat on the log; a quick brown fox jumps over the lazy dog. " * 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.gguf, which has experts and a shared one, and a text."""
    place = tmp_path_factory.mktemp("experts")
    make_tiny_model(place, CASES["qwen2moe"])
    (place / "text.txt").write_text(TEXT)
    return place


def ended(*words: str) -> Any:
    return CliRunner().invoke(APP, list(words))


def stage(*words: str) -> Any:
    """A command's JSON value."""
    done = ended(*words, "--json", "--threads", "1")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_profile_plan_convert_inspect_run_eval_bench(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    model, split = "tiny.gguf", "tiny.powerinfer.gguf"
    stage("profile", "-m", model, "--corpus", "text.txt", "--ctx", "64")
    budget = ("--hardware", "pc-low", "--vram", "458KiB", "--ctx", "64", "--objective", "frequency")
    plan = stage("plan", "-m", model, *budget)
    assert plan["version"] == 2
    hot = [layer["hot_neurons"] // plan["group"] for layer in plan["layers"]]
    assert 0 < sum(hot) < 18
    shown = ended("plan", "-m", model, *budget).stdout
    assert "3 layers of 6 experts of 36 neurons, 3 for a token and a shared one of 52, silu" in shown
    assert "% of what the routers choose" in shown
    report = stage("convert", "-m", model)
    assert report["experts"]["hot"] == hot
    assert f"hot experts         {sum(hot)} of 18" in ended("convert", "-m", model).stdout
    facts = stage("inspect", split)
    assert [layer["hot_experts"] for layer in facts["layers"]] == hot
    words = ("run", "--raw", "-p", "the cat", "-n", "6", "--temp", "0", "-c", "64", "-m")
    runs = [
        stage(*words, model),
        stage(*words, split),
        stage(*words, split, "--device", "cpu", "--trace", "t.json"),
    ]
    assert runs[0]["logits_hash"] == runs[1]["logits_hash"]
    assert runs[0]["text"] == runs[2]["text"]
    assert runs[2]["memory"]["vram"] > 0
    assert (runs[0]["density"], runs[0]["experts"]) == (0.5, {"used": 3, "count": 6})
    assert "3 of 6 experts a token, density 0.500" in ended(*words, split, "-v").stderr
    names = {row["name"] for row in json.loads((place / "t.json").read_text())["traceEvents"]}
    assert {"router", "launch", "experts", "wait", "hot"} <= names
    judged = stage(
        "eval", "-m", split, "--text", "text.txt", "--ctx", "32", "--chunks", "1", "--against", model,
        "--device", "cpu",
    )  # fmt: skip
    assert 0 <= judged["divergence"]["mean_kl"] < 1e-6
    assert stage("bench", "-m", split, "-p", "4", "-n", "2", "-r", "1", "--device", "cpu")


def test_bench_of_a_made_up_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Shape("qwen3moe", 2, 64, 4, 2, 16, 32, 300, 1e4, experts=16, used=4)
    monkeypatch.setitem(SHAPES, "small", small)
    words = ("bench", "--shape", "small", "--cache-dir", str(tmp_path), "-p", "6", "-n", "2", "-r", "1")
    for more, layers in (((), 2), (("--layers", "1", "--type", "f16"), 1)):
        rows = stage(*words, *more)
        assert [row["test"] for row in rows] == ["pp6", "tg2"]
        for row in rows:
            assert (row["mode"], row["density"], row["synthetic"]) == ("dense", 0.25, True)
            assert f"{layers}layers" in row["model"] or layers == 2
    assert len(list((tmp_path / "synthetic").iterdir())) == 2
    for more in (("--density", "0.1"), ("--density", "0.1", "--mode", "predicted")):
        done = ended(*words, *more)
        assert done.exit_code == 1
        assert "small has experts whose activation makes no zeros" in " ".join(done.stderr.split())


def test_zeros_inside_experts_are_counted_and_shown(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_tiny_model(tmp_path, replace(CASES["mixtral"], activation="relu"))
    words = ("profile", "-m", "tiny.gguf", "--corpus", str(place / "text.txt"), "--tokens", "300")
    shown = ended(*words, "--threads", "1").stdout
    active = re.search(r"inside an expert that a token takes, ([0-9.]+)% of the neurons are active", shown)
    assert active is not None
    facts = stage(*words)
    assert round(100 * facts["active_in_experts"], 1) == float(active[1])
    assert [layer["layer"] for layer in facts["inside_experts"]] == [0, 1, 2]
    told = ended("inspect", "tiny.profile.safetensors", "--chart", "curve.png").stdout
    assert "Neurons inside experts" in told
    assert f"{facts['inside_experts'][1]['active']:.1%}" in told
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert "Neurons inside experts" not in ended("inspect", str(place / "tiny.profile.safetensors")).stdout


def test_bench_of_experts_that_leave_neurons_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Shape("qwen3moe", 2, 64, 4, 2, 16, 64, 300, 1e4, experts=16, used=4, activation="relu")
    monkeypatch.setitem(SHAPES, "small", small)
    words = ("bench", "--shape", "small", "--cache-dir", str(tmp_path), "-p", "6", "-n", "8", "-r", "1")
    for mode, least, most in (("dense", 0.25, 0.25), ("gate-first", 0.05, 0.15)):
        for row in stage(*words, "--density", "0.4", "--mode", mode):
            assert row["mode"] == mode
            assert least <= row["density"] <= most


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("train", "-m", "tiny.gguf"),
            "train does not take mixtures of experts, of which a token computes 3 of 6 without it; profile,",
        ),
        (
            ("threshold", "-m", "tiny.gguf", "--text", "text.txt", "--max-ppl-increase", "1%"),
            "threshold does not take mixtures of",
        ),
        (("relufy", "-m", "tiny.gguf", "--corpus", "text.txt"), "relufy does not take mixtures of experts"),
        (
            ("convert", "-m", "tiny.gguf", "--format", "powerinfer", "--all-active"),
            "convert --format powerinfer does not take mixtures of experts",
        ),
        (("run", "-m", "tiny.gguf", "-p", "x", "--device", "cpu"), "is not a split file, so no part of it"),
        (
            ("run", "-m", "tiny.powerinfer.gguf", "-p", "x", "--mode", "gate-first"),
            "experts run in mode",
        ),
        (("convert", "-m", "tiny.gguf", "--quant", "Q8_0"), "experts are placed as wholes and keep"),
        (("convert", "-m", "tiny.powerinfer.gguf", "-o", "o.gguf"), "is a split file already"),
        (
            ("quantize", "-m", "tiny.powerinfer.gguf", "--type", "Q8_0"),
            "is a split file; quantize starts from",
        ),
        (("plan", "-m", "tiny.powerinfer.gguf"), "this is a split file; make the plan from the source"),
    ],
)
def test_what_is_not_there_is_said_by_name(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(place)
    for kind in ("profile.safetensors", "plan.json", "trace.zst"):
        named = place / f"tiny.powerinfer.{kind}"
        if not named.exists() and (place / f"tiny.{kind}").exists():
            named.write_bytes((place / f"tiny.{kind}").read_bytes())
    done = ended(*words)
    assert done.exit_code == 1
    assert says in " ".join(done.stderr.split())


def test_bench_and_run_say_what_came_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture whose routers have topics, in less memory than it takes: the text does not change."""
    small = Shape("qwen3moe", 3, 256, 4, 2, 64, 384, 512, 1e4, experts=32, used=2)
    monkeypatch.setitem(SHAPES, "small", small)
    kept = tmp_path / "small.gguf"
    words = (
        "bench",
        "--shape",
        "small",
        "--locality",
        "8",
        "--keep",
        str(kept),
        "-p",
        "8",
        "-n",
        "8",
        "-r",
        "1",
    )
    done = ended(*words)
    assert done.exit_code == 0, done.stderr
    assert "from disk" not in done.stderr
    run = (
        "run",
        "-m",
        str(kept),
        "--raw",
        "-p",
        "a text",
        "-n",
        "6",
        "-c",
        "64",
        "--temp",
        "0",
        "--ignore-eos",
    )
    whole = ended(*run)
    monkeypatch.setattr(from_disk, "resident_bytes", lambda: 0)
    size = kept.stat().st_size
    ram = str((24 << 20) + size - (1 << 20))
    done = ended("bench", "-m", str(kept), "-p", "8", "-n", "8", "-r", "1", "--ram", ram)
    assert done.exit_code == 0, done.stderr
    told = " ".join(done.stderr.split())
    assert "of 96 experts" in told
    assert "a token takes" in told
    assert "in memory when taken" in told
    learnt = tmp_path / "learnt.safetensors"
    part = ended(*run, "--ram", ram, "--learn", str(learnt))
    assert (part.exit_code, part.stdout) == (0, whole.stdout), part.stderr
    assert learnt.exists()
    static = ended(*run, "--ram", ram, "--placement", "static")
    assert static.exit_code == 1
    assert "experts are to be placed by a profile, and there is none beside it" in " ".join(
        static.stderr.split()
    )
