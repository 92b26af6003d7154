"""The engine's forward pass against ``transformers`` and the float64 reference, per family and row type."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from powerinfer_kernels import available_isas
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.memory import require_memory
from powerinfer_tools.errors import ContextFull, ModelError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from tiny_models import FAMILY_CASES, TYPE_CASES, TinyModel, make_tiny_model

TOKENS = 40
#: Unit roundoff of half precision, which keys and values are cached in.
HALF = 2.0**-11


@pytest.fixture(params=sorted(FAMILY_CASES), scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """One float32 model of each family and variant."""
    return make_tiny_model(tmp_path_factory.mktemp("family"), FAMILY_CASES[request.param])


@pytest.fixture(params=sorted(TYPE_CASES), scope="module")
def typed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """One model of each row type, and of the mixtures of real files."""
    return make_tiny_model(tmp_path_factory.mktemp("typed"), TYPE_CASES[request.param])


def engine_logits(path: Path, tokens: list[int], **options: object) -> np.ndarray:
    """Logits of every position, (tokens, vocabulary)."""
    engine = Engine(load_model(path), **({"threads": 1} | options))  # type: ignore[arg-type]
    try:
        return np.concatenate([rows.copy() for rows in engine.score(tokens)])
    finally:
        engine.close()


def test_agrees_with_transformers(family: TinyModel) -> None:
    """Only the cache rounds to half precision: keys and values of each layer by one unit roundoff."""
    tokens = family.tokens(TOKENS)
    expected = family.logits(tokens)
    bound = 2 * family.spec.layers * HALF * np.abs(expected).max()
    assert np.abs(engine_logits(family.path, tokens) - expected).max() <= bound


def test_reference_agrees_with_transformers(family: TinyModel) -> None:
    """Float64 against float32: a few hundred roundings of the largest logit."""
    tokens = family.tokens(TOKENS)
    expected = family.logits(tokens)
    bound = 100 * np.finfo(np.float32).eps * np.abs(expected).max()
    assert np.abs(forward(load_model(family.path), tokens) - expected).max() <= bound


def test_agrees_with_reference_over_the_same_cache(family: TinyModel) -> None:
    """With the cache rounded alike, what is left is float32 rounding, which now and then tips a cached value
    over to its neighbour: far less than one roundoff of all of them."""
    tokens = family.tokens(TOKENS)
    expected = forward(load_model(family.path), tokens, half_cache=True)
    got = engine_logits(family.path, tokens)
    assert np.abs(got - expected).max() <= HALF * np.abs(expected).max()
    assert np.sqrt(np.mean((got - expected) ** 2)) <= HALF / 4 * np.abs(expected).max()


def test_row_types_agree_with_reference(typed: TinyModel) -> None:
    """Activations are rounded to 8 bits: an error of max|x| / 127 / √12 a value, 0.5 % of a normal block's
    deviation, in each of seven products a layer and the head; independent errors add in squares."""
    tokens = typed.tokens(TOKENS)
    expected = forward(load_model(typed.path), tokens)
    got = engine_logits(typed.path, tokens)
    products = 7 * typed.spec.layers + 1
    relative = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert relative <= 2 * 0.005 * np.sqrt(products)
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.8


def test_bits_do_not_depend_on_threads_batches_or_isa(typed: TinyModel) -> None:
    tokens = typed.tokens(TOKENS)
    expected = engine_logits(typed.path, tokens)
    for options in ({"threads": 2}, {"threads": 3, "batch": 7}, {"batch": 1}):
        assert np.array_equal(engine_logits(typed.path, tokens, **options), expected)
    for isa in available_isas():
        assert np.array_equal(engine_logits(typed.path, tokens, isa=isa), expected)


def test_prompt_and_decode_continue_each_other(typed: TinyModel) -> None:
    tokens = typed.tokens(TOKENS)
    expected = engine_logits(typed.path, tokens)
    engine = Engine(load_model(typed.path), threads=1, batch=16)
    assert np.array_equal(engine.prefill(tokens[:20]), expected[19])
    for position in range(20, TOKENS):
        assert np.array_equal(engine.decode(tokens[position]), expected[position])
    engine.rewind(10)
    assert np.array_equal(engine.prefill(tokens[10:30]), expected[29])
    engine.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A small llama."""
    return make_tiny_model(tmp_path_factory.mktemp("plain"), FAMILY_CASES["llama"])


def test_full_context_is_refused_and_changes_nothing(plain: TinyModel) -> None:
    tokens = plain.tokens(9)
    engine = Engine(load_model(plain.path), threads=1, context=8)
    engine.prefill(tokens[:8])
    with pytest.raises(ContextFull, match="the context holds 8"):
        engine.decode(tokens[8])
    assert engine.position == 8
    engine.rewind(7)
    engine.decode(tokens[7])
    engine.close()


def test_a_q8_0_cache_needs_whole_blocks_and_takes_half(plain: TinyModel, tmp_path: Path) -> None:
    """Heads of 32 values run and stay near the f16 cache's logits; others are refused."""
    spec = dataclasses.replace(plain.spec, head_dim=32)
    path = make_tiny_model(tmp_path, spec).path
    tokens = list(range(1, 21))
    reports, logits = [], []
    for kv_type in ("f16", "q8_0"):
        engine = Engine(load_model(path), threads=1, kv_type=kv_type)
        logits.append(engine.prefill(tokens).copy())
        reports.append(engine.report())
        engine.close()
    assert [report.kv_type for report in reports] == ["f16", "q8_0"]
    assert reports[1].memory.kv_cache == reports[0].memory.kv_cache * 17 // 32
    assert reports[1].load_seconds > 0
    difference = np.abs(logits[0] - logits[1]).max()
    assert 0 < difference < 0.05 * np.abs(logits[0]).max()
    if plain.spec.head_dim % 32:
        with pytest.raises(ModelError, match="multiple of 32 values"):
            Engine(load_model(plain.path), threads=1, kv_type="q8_0")


def test_token_outside_the_vocabulary(plain: TinyModel) -> None:
    engine = Engine(load_model(plain.path), threads=1)
    for token in (-1, engine.vocabulary, 1 << 40):
        with pytest.raises(ModelError, match="vocabulary"):
            engine.decode(token)
    assert engine.position == 0
    engine.close()


def test_context_beyond_the_model(plain: TinyModel) -> None:
    with pytest.raises(ModelError, match="trained for"):
        Engine(load_model(plain.path), context=plain.spec.context + 1)


def test_report_counts_what_was_done(plain: TinyModel) -> None:
    engine = Engine(load_model(plain.path), threads=1)
    engine.prefill(plain.tokens(5))
    engine.decode(1)
    engine.decode(2)
    report = engine.report()
    assert (report.prompt_tokens, report.decode_tokens, report.density) == (5, 2, 1.0)
    weights = sum(
        info.nbytes for info in load_model(plain.path).source.tensors.values() if len(info.shape) == 2
    )
    # The tied embedding is the head; rows are padded to whole tiles, and keys and values come on top.
    assert weights <= report.bytes_per_token <= weights * 1.2
    assert set(report.timings) == {"embedding", "attention", "ffn", "head"}
    engine.close()


def test_too_little_memory_is_told_with_the_numbers(plain: TinyModel) -> None:
    model = load_model(plain.path)
    require_memory(model, 64, "f16", 0)
    require_memory(model, 64, "f16", 1 << 40)
    with pytest.raises(ModelError, match=r"MiB of weights .* for a context of 64 .* 1 MiB of memory"):
        require_memory(model, 64, "f16", 1 << 20)
