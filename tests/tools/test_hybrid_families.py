"""Families with recurrent layers, latent attention and routers of their own: the C engine against the float64
reference, with the same bits for any batch and any number of threads, and what other stages say to them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_logits import near
from hybrid_families import FAMILIES, ROUTED_QWEN3, VOCABULARY, write_random_family
from powerinfer_formats.errors import FormatError
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward

TOKENS = [3, 41, 7, 7, 12, 0, 49, 25, 30, 2, 18, 5, 44, 9, 33, 21, 6, 1, 28]


def logits(path: Path, threads: int, batch: int, first: int) -> np.ndarray:
    """The first tokens as a prompt, the others one by one."""
    engine = Engine(load_model(path), threads=threads, batch=batch, context=len(TOKENS))
    try:
        rows = [row.copy() for part in engine.score(TOKENS[:first]) for row in part] if first else []
        return np.stack([*rows, *(engine.decode(token).copy() for token in TOKENS[first:])])
    finally:
        engine.close()


@pytest.mark.parametrize("case", sorted(FAMILIES))
def test_engine_agrees_with_the_reference(case: str, tmp_path: Path) -> None:
    """Keys and values are kept in half precision, which the reference does, too; what is left is float32,
    which tips a cached value over to its neighbour now and then."""
    path = write_random_family(tmp_path / "model.gguf", FAMILIES[case])
    want = forward(load_model(path), TOKENS, half_cache=True)
    assert want.shape == (len(TOKENS), VOCABULARY)
    got = logits(path, 1, 8, 11)
    near(got, want)
    assert np.abs(want[1:] - want[:-1]).max() > 0.1 * want.std()
    for threads, batch, first in ((3, 16, 16), (2, 5, 7), (1, 4, 0)):
        again = logits(path, threads, batch, first)
        np.testing.assert_array_equal(again.view(np.uint32), got.view(np.uint32))


def test_routers_of_families_that_have_none_are_refused(tmp_path: Path) -> None:
    path = write_random_family(tmp_path / "model.gguf", ROUTED_QWEN3)
    with pytest.raises(ModelError, match="mixtures of experts of the architecture qwen3 are not supported"):
        load_model(path)


def test_experts_are_nothing_where_all_layers_are_dense(tmp_path: Path) -> None:
    """What the file says about experts is about layers that it has not; a router makes it matter."""
    dots = FAMILIES["dots1"]
    shallow = replace(dots, layers=dots.layers[:1])
    model = load_model(write_random_family(tmp_path / "model.gguf", shallow))
    assert model.hyper.routing is None
    near(logits(model.path, 1, 8, 11), forward(model, TOKENS, half_cache=True))
    router = {name: shape for name, shape in dots.layers[1].items() if name == "ffn_gate_inp.weight"}
    with_router = replace(dots, layers=(dots.layers[0] | router,))
    with pytest.raises(FormatError, match="ffn_gate_exps"):
        load_model(write_random_family(tmp_path / "other.gguf", with_router))


def test_attention_with_an_indexer_ends_where_it_would_choose(tmp_path: Path) -> None:
    """Up to there, it reads everything."""
    path = write_random_family(tmp_path / "model.gguf", FAMILIES["deepseek32"])
    Engine(load_model(path), context=40).close()
    with pytest.raises(ModelError, match="context 41 is not from 1 to 40, where its attention reads every"):
        Engine(load_model(path), context=41)


@pytest.mark.parametrize("case", ["lfm2", "mamba2", "qwen35"])
def test_a_recurrent_model_remembers_what_a_window_would_forget(case: str, tmp_path: Path) -> None:
    """The first token changes the last logits."""
    path = write_random_family(tmp_path / "model.gguf", FAMILIES[case])
    model = load_model(path)
    other = forward(model, [TOKENS[0] + 1, *TOKENS[1:]])
    assert np.abs(other[-1] - forward(model, TOKENS)[-1]).max() > 0


def test_sessions_of_recurrent_models_go_back_to_the_start_alone(tmp_path: Path) -> None:
    """What they held before is forgotten then, and a fork goes on with the same bits."""
    path = write_random_family(tmp_path / "model.gguf", FAMILIES["falcon-h1"])
    engine = Engine(load_model(path), threads=2, context=len(TOKENS))
    try:
        first = engine.prefill(TOKENS[:6]).copy()
        assert engine.rewind(6) == 6
        fork = engine.session.fork()
        assert fork.copy_prefix(engine.session, 4) == 0
        assert fork.copy_prefix(engine.session, 6) == 6
        np.testing.assert_array_equal(fork.decode(9).copy(), engine.decode(9))
        assert engine.rewind(3) == 0
        np.testing.assert_array_equal(engine.prefill(TOKENS[:6]), first)
        fork.close()
    finally:
        engine.close()


@pytest.mark.parametrize("case", ["falcon-h1", "rwkv7"])
def test_sessions_of_recurrent_models_go_back_to_the_end_of_a_prompt(case: str, tmp_path: Path) -> None:
    """With the same bits as if nothing had come after it, also in a session that is a copy."""
    path = write_random_family(tmp_path / "model.gguf", FAMILIES[case])
    engine = Engine(load_model(path), threads=2, context=len(TOKENS), batch=4)
    try:
        engine.prefill(TOKENS[:6])
        after = [engine.decode(token).copy() for token in TOKENS[6:9]]
        fork = engine.session.fork()
        assert fork.copy_prefix(engine.session, 8) == 6
        np.testing.assert_array_equal(fork.decode(TOKENS[6]), after[0])
        assert fork.rewind(6) == 6
        fork.close()
        assert engine.rewind(8) == 6
        for token, expected in zip(TOKENS[6:9], after, strict=True):
            np.testing.assert_array_equal(engine.decode(token), expected)
        assert engine.rewind(5) == 0
        assert engine.rewind(0) == 0
        np.testing.assert_array_equal(engine.prefill(TOKENS[:7]), after[0])
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("mamba2", "recurrent layers"),
        ("deepseek2", "latent attention"),
        ("gpt-oss", "attention sinks"),
        ("dots1", "this kind of router"),
        ("openelm", "attention heads that differ between layers"),
        ("deci", "layers without attention"),
        ("mimo2", "attention sinks"),
        ("llama4", "queries that grow with their position"),
    ],
)
def test_stages_say_what_they_do_not_do(case: str, what: str, tmp_path: Path) -> None:
    path = write_random_family(tmp_path / "model.gguf", FAMILIES[case])
    model = load_model(path)
    for require in (model.require_plain, model.require_one_ffn):
        with pytest.raises(ModelError, match=f"train does not take models with {what}; run, eval and bench"):
            require(ModelError, "train")
