"""Mixtures of experts: routing, what is read, what is counted, and which stages say that they cannot yet.

That logits agree with ``transformers`` and the float64 reference, and do not depend on threads, batches and
instruction sets, is tested with the other families.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.profile import ROUTING, Profile
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.observation import LayerCounters, counters
from powerinfer_tools.errors import (
    ModelError,
    ProfileError,
    TrainError,
)
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from powerinfer_tools.stages.relufy import RelufyOptions, run_relufy
from powerinfer_tools.stages.train import TrainOptions, run_train
from tiny_models import CASES, TinyModel, make_tiny_model

TEXT = "the cat sat on the mat and the dog sat on the log; a quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module", params=["mixtral-Q4_0", "qwen2moe", "qwen3moe"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("routed"), CASES[request.param])


def decoded(path: Path, tokens: list[int], seen: list[LayerCounters] | None = None) -> np.ndarray:
    engine = Engine(load_model(path), threads=1, observed=seen)
    try:
        return np.stack([engine.prefill(tokens[:1]).copy(), *(engine.decode(t).copy() for t in tokens[1:])])
    finally:
        engine.close()


def test_experts_that_no_token_takes_are_not_read(tiny: TinyModel, tmp_path: Path) -> None:
    """Their weights may be anything, even NaN; counters say which they are."""
    model = load_model(tiny.path)
    routing = model.hyper.routing
    assert routing is not None
    seen = [counters(routing.experts, histogram=False) for _ in range(model.hyper.layers)]
    tokens = tiny.tokens(2)
    expected = decoded(tiny.path, tokens, seen)
    data, gguf, idle = np.frombuffer(tiny.path.read_bytes(), np.uint8).copy(), GGUFFile.open(tiny.path), 0
    for layer, counted in enumerate(seen):
        assert counted.counts.sum() == routing.used * len(tokens)
        for expert in np.flatnonzero(counted.counts == 0):
            for kind in ("gate", "up", "down"):
                info = gguf.info(f"blk.{layer}.ffn_{kind}_exps.weight")
                size = info.nbytes // routing.experts
                data[info.offset + expert * size : info.offset + (expert + 1) * size] = 0xFF
            idle += 1
    assert idle > model.hyper.layers // 2
    poisoned = tmp_path / "poisoned.gguf"
    poisoned.write_bytes(data.tobytes())
    assert np.array_equal(decoded(poisoned, tokens), expected)
    with pytest.raises(ModelError, match="results are not finite: its weights are damaged"):
        decoded(poisoned, tiny.tokens(30))


def test_bytes_of_a_token_are_those_of_the_experts_taken(tiny: TinyModel) -> None:
    engine = Engine(load_model(tiny.path), threads=1)
    engine.prefill([1])
    engine.decode(2)
    report, gguf = engine.report(), GGUFFile.open(tiny.path)
    engine.close()
    routing = load_model(tiny.path).hyper.routing
    assert routing is not None
    padded = -(-tiny.spec.neurons // 16) * 16 / tiny.spec.neurons  # rows of gate and up fill whole tiles
    experts = sum(
        info.nbytes * (1 if "down" in name else padded)
        for name, info in gguf.tensors.items()
        if "_exps." in name
    )
    used = report.memory.weights - experts * (1 - routing.used / routing.experts)
    # Beside the weights: a row of the embedding and the cache of two positions.
    assert used < report.bytes_per_token < used + 4096


def test_the_profile_counts_what_the_router_chose(tiny: TinyModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    output = tmp_path / "tiny.profile.safetensors"
    made = run_profile(ProfileOptions(tiny.path, (text,), output, window=64, threads=1))
    profile = Profile.load(output)
    routing = load_model(tiny.path).hyper.routing
    assert routing is not None
    assert (profile.activation, profile.exact_zeros) == (ROUTING, True)
    for layer in range(tiny.spec.layers):
        counts, squares = profile.counts(layer), profile.sums[layer].gate_squares
        assert len(counts) == routing.experts
        assert counts.sum() == routing.used * made.tokens
        assert counts.max() > counts.min()
        assert (squares <= counts + 1e-9).all()
        assert (squares[counts > 0] > 0).all()
        if routing.normalized:  # weights of two or three that sum to one
            assert squares.sum() >= made.tokens / routing.used - 1
        assert profile.density(layer) == pytest.approx(routing.used / routing.experts)


def test_stages_that_cannot_say_so(tiny: TinyModel, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with pytest.raises(TrainError, match="train does not take mixtures"):
        run_train(TrainOptions(tiny.path, other, other))
    with pytest.raises(ModelError, match="relufy does not take mixtures"):
        run_relufy(RelufyOptions(tiny.path, (tmp_path,), other))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with pytest.raises(ProfileError, match="profile --trace does not take mixtures"):
        run_profile(ProfileOptions(tiny.path, (text,), other, trace=10, trace_output=tmp_path / "t.zst"))
    for mode in ("gate-first", "predicted", "thresholded"):
        with pytest.raises(ModelError, match="experts run in mode dense alone"):
            Engine(load_model(tiny.path), mode=mode)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts_used": 9}, "expert_used_count is 9"),
        ({"experts_used": 0}, "expert_used_count is 0"),
    ],
)
def test_metadata_that_makes_no_model(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    spec = replace(CASES["qwen3moe"], **changes)  # type: ignore[arg-type]
    path = make_tiny_model(tmp_path, CASES["qwen3moe"]).path
    old = b"qwen3moe.expert_used_count\x04\x00\x00\x00\x03"
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, old[:-1] + bytes([spec.experts_used])))
    with pytest.raises(ModelError, match=words):
        load_model(path)
