"""eval --tasks: lm-eval's accuracies are those that our own scores give, without any network."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import EvaluationError
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.quality.perplexity import log_probabilities
from powerinfer_tools.text import Tokenizer
from task_files import BODIES, pairs, write_tasks
from tiny_models import FAMILY_CASES, make_tiny_model

# Asked for when these packages are imported, which is later than this.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

QUESTIONS = 12


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Tokenizer]]:
    folder = tmp_path_factory.mktemp("harness")
    model = load_model(make_tiny_model(folder, replace(FAMILY_CASES["llama"], context=128)).path)
    engine = Engine(model, threads=1, context=128)
    yield engine, Tokenizer.from_gguf(model.source)
    engine.close()
    model.close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def one_by_one(engine: Engine, ids: list[int]) -> np.ndarray:
    """ln p of every token after the first, from logits as decoding gives them."""
    engine.rewind(0)
    logits = [engine.prefill(ids[:1]).copy()] + [engine.decode(token).copy() for token in ids[1:-1]]
    rows = np.stack(logits).astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    logs: np.ndarray = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return logs[np.arange(len(ids) - 1), ids[1:]]


def own_score(engine: Engine, tokenizer: Tokenizer, context: str, continuation: str) -> float:
    whole, before = (tokenizer.encode(text, add_bos=False) for text in (context + continuation, context))
    assert whole[: len(before)] == before, "this test's words begin tokens of their own"
    return float(one_by_one(engine, whole)[len(before) - 1 :].sum())


@pytest.mark.usefixtures("no_network")
def test_accuracies_are_those_of_our_own_scores(opened: tuple[Engine, Tokenizer], tmp_path: Path) -> None:
    from powerinfer_tools.quality.harness import run_tasks

    engine, tokenizer = opened
    made = write_tasks(tmp_path, QUESTIONS)
    scores = run_tasks(engine, tokenizer, tuple(BODIES), tmp_path)
    found = {(score.task, score.metric): score for score in scores}
    assert set(found) == {(name, "acc") for name in BODIES} | {("piqa", "acc_norm")}
    for name, documents in made.items():
        right, right_by_length = [], []
        for document in documents:
            choices, answer = pairs(name, document)
            logs = [own_score(engine, tokenizer, *choice) for choice in choices]
            lengths = [len(continuation.strip()) for _, continuation in choices]
            right.append(int(np.argmax(logs)) == answer)
            right_by_length.append(int(np.argmax(np.divide(logs, lengths))) == answer)
        score = found[name, "acc"]
        assert score.value == pytest.approx(np.mean(right)), name
        assert score.standard_error == pytest.approx(np.std(right, ddof=1) / np.sqrt(QUESTIONS)), name
        assert score.samples == QUESTIONS
        if name == "piqa":
            assert found[name, "acc_norm"].value == pytest.approx(np.mean(right_by_length))


def requests(*arguments: tuple[Any, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=some) for some in arguments]


def test_log_likelihoods_agree_with_decoding(opened: tuple[Engine, Tokenizer]) -> None:
    from powerinfer_tools.quality.harness.adapter import PowerInferLM

    engine, tokenizer = opened
    adapter = PowerInferLM(engine, tokenizer)
    cases = [("the cat sat on", " the mat"), ("a dog ", "ran"), ("", "the river"), ("x" * 300, " boat")]
    for (context, continuation), (value, greedy) in zip(
        cases, adapter.loglikelihood(requests(*cases)), strict=True
    ):
        before = tokenizer.encode(context.rstrip(), add_bos=False)
        ids = tokenizer.encode(context + continuation, add_bos=False)
        if not before:
            ids = [int(tokenizer.tokens.bos_id or tokenizer.tokens.eos_id or 0), *ids]
        count = len(ids) - max(1, len(before))
        kept = ids[-(engine.context + 1) :]
        assert value == pytest.approx(one_by_one(engine, kept)[-count:].sum(), abs=1e-4)
        assert isinstance(greedy, bool)


def test_the_greedy_flag_is_that_of_greedy_decoding(opened: tuple[Engine, Tokenizer]) -> None:
    from powerinfer_tools.quality.harness.adapter import PowerInferLM

    engine, tokenizer = opened
    ids = tokenizer.encode("the cat sat on the", add_bos=False)
    engine.rewind(0)
    best = int(np.argmax(engine.prefill(ids)))
    adapter = PowerInferLM(engine, tokenizer)
    for token, expected in ((best, True), ((best + 1) % engine.vocabulary, False)):
        assert adapter._score([*ids, token], len(ids))[1] is expected


def test_rolling_windows_score_every_token_once(opened: tuple[Engine, Tokenizer]) -> None:
    from powerinfer_tools.quality.harness.adapter import PowerInferLM

    engine, tokenizer = opened
    adapter = PowerInferLM(engine, tokenizer)
    short = "the quick brown fox"
    ids = [*adapter._start(), *tokenizer.encode(short, add_bos=False)]
    assert adapter.loglikelihood_rolling(requests((short,)))[0] == pytest.approx(
        one_by_one(engine, ids).sum(), abs=1e-4
    )
    long = "the lazy dog ran over the log " * 40
    every = tokenizer.encode(long, add_bos=False)
    assert len(every) > 2 * engine.context
    total = adapter.loglikelihood_rolling(requests((long,)))[0]
    # Each token costs about what it does in a window of its own; none is scored twice or left out.
    mean = one_by_one(engine, [*adapter._start(), *every[: engine.context - 1]]).mean()
    assert total / len(every) == pytest.approx(mean, rel=0.2)


def test_generation_ends_at_a_stop_string(opened: tuple[Engine, Tokenizer]) -> None:
    from powerinfer_tools.quality.harness.adapter import PowerInferLM

    engine, tokenizer = opened
    adapter = PowerInferLM(engine, tokenizer)
    free, again = adapter.generate_until(requests(*[("the cat", {"max_gen_toks": 12, "until": []})] * 2))
    assert free == again
    assert free
    stop = free[len(free) // 2 :][:1]
    (cut,) = adapter.generate_until(requests(("the cat", {"max_gen_toks": 12, "until": [stop]})))
    assert cut == free[: free.index(stop)]


def test_log_probabilities_in_batches(opened: tuple[Engine, Tokenizer]) -> None:
    engine, _ = opened
    small = Engine(engine.model, threads=1, context=128, batch=7)
    ids = list(np.random.default_rng(3).integers(0, engine.vocabulary, 100).tolist())
    for first in (1, 6, 7, 8, 50, 99):
        logs, likeliest = log_probabilities(small, ids, first)
        assert len(logs) == len(likeliest) == len(ids) - first
        np.testing.assert_allclose(logs, one_by_one(engine, ids)[first - 1 :], atol=1e-4)
    small.close()


def test_refusals(opened: tuple[Engine, Tokenizer], tmp_path: Path) -> None:
    from powerinfer_tools.quality.harness import run_tasks
    from powerinfer_tools.quality.harness.adapter import PowerInferLM

    engine, tokenizer = opened
    with pytest.raises(EvaluationError, match="no such folder"):
        run_tasks(engine, tokenizer, ("piqa",), tmp_path / "nowhere")
    write_tasks(tmp_path, 1)
    with pytest.raises(EvaluationError, match=r"no task 'magic'.*copa"):
        run_tasks(engine, tokenizer, ("magic",), tmp_path)
    with pytest.raises(EvaluationError, match="does not fit"):
        PowerInferLM(engine, tokenizer).loglikelihood(requests(("a", " cat" * 500)))
