"""The demo model against what llama.cpp computed from the same file (``tests/data/golden``)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.engine import Engine
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.quality.perplexity import Perplexity, perplexity, windows
from powerinfer_tools.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
#: Two programs that round differently may choose differently where their two best logits are this close.
TIE = 0.1


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """What llama.cpp answered."""
    values: dict[str, Any] = json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))
    return values


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    """The demo model, dense, on the best kernels of this machine."""
    made = Engine(load_model(smollm2), context=512)
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer(engine: Engine) -> Tokenizer:
    """The demo model's tokeniser."""
    return Tokenizer.from_gguf(engine.model.source)


@pytest.fixture(scope="module")
def measured(engine: Engine, tokenizer: Tokenizer, golden: dict[str, Any]) -> Perplexity:
    """Perplexity of the whole golden text by the golden method."""
    text = (GOLDEN / golden["perplexity"]["text"]).read_text(encoding="utf-8")
    tokens = tokenizer.encode(text)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    return perplexity(engine, windows(tokens, golden["perplexity"]["ctx"], None, bos))


def test_perplexity_is_that_of_llama_cpp(measured: Perplexity, golden: dict[str, Any]) -> None:
    expected = golden["perplexity"]
    assert measured.chunks == len(expected["running"])
    assert measured.perplexity == pytest.approx(expected["final"], rel=0.005)
    assert measured.standard_error == pytest.approx(expected["standard_error"], rel=0.01)


def test_perplexity_is_close_after_every_window(measured: Perplexity, golden: dict[str, Any]) -> None:
    """Fewer tokens average less out: builds of llama.cpp itself differ by 0.6 % amid this text."""
    np.testing.assert_allclose(measured.running, golden["perplexity"]["running"], rtol=0.01)


def test_greedy_text_is_that_of_llama_cpp(
    engine: Engine, tokenizer: Tokenizer, golden: dict[str, Any]
) -> None:
    count = golden["greedy"]["n"]
    agreed = []
    for prompt, expected in golden["greedy"]["cases"]:
        tokens, tied = _greedy(engine, tokenizer, prompt, count)
        text = tokenizer.stream().push_all(tokens)
        assert expected.startswith(text), f"{prompt!r}: {text!r} instead of {expected!r}"
        if not tied:
            assert text == expected
        agreed.append(len(tokens))
    # A first step that is tied everywhere would make all of the above empty.
    assert sum(agreed) >= count, agreed


def _greedy(engine: Engine, tokenizer: Tokenizer, prompt: str, count: int) -> tuple[list[int], bool]:
    """Up to ``count`` greedy tokens, and whether they end early because the best two were nearly tied.

    End-of-text tokens are never chosen.
    """
    engine.rewind(0)
    logits = engine.prefill(tokenizer.encode(prompt))
    tokens: list[int] = []
    while True:
        allowed = logits.copy()
        allowed[list(tokenizer.eos_ids)] = -np.inf
        second, best = np.argsort(allowed)[-2:]
        if allowed[best] - allowed[second] < TIE:
            return tokens, True
        tokens.append(int(best))
        if len(tokens) == count:
            return tokens, False
        logits = engine.decode(tokens[-1])
