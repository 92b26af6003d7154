"""Drafts change no bit: text and logits are those without them, whatever is guessed and how much of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from every_run import RUNS, sparse, split
from hybrid_families import FAMILIES, write_random_family
from powerinfer_tools.engine import Engine, Weights
from powerinfer_tools.engine.draft_length import ALLOWED, MOST, DraftLength
from powerinfer_tools.engine.drafting import ModelDrafts, TextLookup
from powerinfer_tools.errors import ContextFull, ModelError
from powerinfer_tools.generate.sampling import Sampler, SamplingOptions
from powerinfer_tools.model.loading import load_model

CONTEXT, PROMPT, COUNT = 96, [5, 6, 7, 8, 9, 5, 6, 7], 60


class Told:
    """Guesses the true text, with some tokens wrong."""

    def __init__(self, text: Sequence[int], seed: int, vocabulary: int) -> None:
        self._text, self._rng, self._vocabulary = list(text), np.random.default_rng(seed), vocabulary
        self.closed = False

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        guessed = self._text[len(tokens) : len(tokens) + int(self._rng.integers(0, most + 1))]
        wrong = self._rng.random(len(guessed)) < 0.15
        return [(one + 1) % self._vocabulary if bad else one for one, bad in zip(guessed, wrong, strict=True)]

    def forget(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths by chance in place of the clock."""
    rng = np.random.default_rng(2)
    monkeypatch.setattr(DraftLength, "choose", lambda self, most: int(rng.integers(0, max(0, most) + 1)))


def generated(engine: Engine, options: SamplingOptions, count: int = COUNT) -> tuple[list[int], np.ndarray]:
    """``count`` tokens after the prompt, and the bits of all logits that they were chosen from."""
    engine.rewind(0)
    sampler, tokens = Sampler(options), list[int]()
    sampler.accept(PROMPT)
    logits, rows = engine.prefill(PROMPT), list[np.ndarray]()
    while len(tokens) < count:
        rows.append(logits.copy().view(np.uint32))
        tokens.append(sampler.sample(logits))
        sampler.accept(tokens[-1:])
        assert engine.position == len(PROMPT) + len(tokens) - 1
        if len(tokens) < count:
            logits = engine.decode(tokens[-1])
    return tokens, np.stack(rows)


GREEDY = SamplingOptions(temperature=0.0)
SAMPLED = SamplingOptions(temperature=0.9, repeat_penalty=1.1, seed=4)


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize("name", [name for name, (_, options, _) in RUNS.items() if "device" not in options])
def test_text_and_logits_are_those_without_drafts(name: str, tmp_path: Path) -> None:
    make, options, _ = RUNS[name]
    model = load_model(make(tmp_path))
    with Engine(model, threads=1, context=CONTEXT, **options) as engine:  # type: ignore[arg-type]
        plain = {sampling: generated(engine, sampling) for sampling in (GREEDY, SAMPLED)}
    for threads in (1, 2, 3):
        for sampling, (tokens, rows) in plain.items():
            for proposer in (TextLookup(), Told(PROMPT + tokens, threads, model.hyper.vocabulary)):
                with Engine(model, threads=threads, context=CONTEXT, **options) as engine:  # type: ignore[arg-type]
                    engine.draft_with(proposer)
                    got = generated(engine, sampling)
                    assert got[0] == tokens
                    np.testing.assert_array_equal(got[1], rows)
                    assert engine.drafter is not None
                    counters = engine.drafter.counters
                    assert counters.tokens == COUNT - 1 == engine.report().decode_tokens
                    if isinstance(proposer, Told):
                        assert 0 < counters.accepted < counters.drafted
                        assert counters.passes == counters.tokens - counters.accepted
    model.close()


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize("context", [CONTEXT, 30])
def test_a_model_that_drafts_for_itself_is_always_right(context: int, tmp_path: Path) -> None:
    """Where its context is full, it drafts nothing."""
    model = load_model(sparse(tmp_path))
    with Weights(model, threads=1, context=context, mode="predicted") as small:
        with Engine(model, threads=1, context=CONTEXT, mode="predicted") as engine:
            tokens, rows = generated(engine, GREEDY)
            engine.draft_with(ModelDrafts(small.session()))
            for _ in range(2):  # the second begins anew with what the session holds
                got = generated(engine, GREEDY)
                assert got[0] == tokens
                np.testing.assert_array_equal(got[1], rows)
            assert engine.drafter is not None
            counters = engine.drafter.counters
            assert counters.drafted > 10
            unused = MOST * 2 * 2  # of the last pass of each, and of what the end of the context cuts
            assert counters.accepted >= counters.drafted - unused
        assert small._sessions == []
    model.close()


@pytest.mark.usefixtures("any_length")
def test_the_context_is_filled_to_its_end(tmp_path: Path) -> None:
    model = load_model(sparse(tmp_path))
    with Engine(model, threads=1, context=30, mode="dense") as engine:
        tokens, _ = generated(engine, GREEDY, 23)
        engine.draft_with(Told([*PROMPT, *tokens, *tokens], 1, model.hyper.vocabulary))
        assert generated(engine, GREEDY, 23)[0] == tokens
        assert engine.position == 30
        with pytest.raises(ContextFull):
            engine.decode(1)
    model.close()


def test_a_text_that_was_rewound_goes_on_as_it_would(tmp_path: Path) -> None:
    model = load_model(sparse(tmp_path))
    with Engine(model, threads=1, context=CONTEXT, mode="dense") as engine:
        engine.prefill([*PROMPT, 4, 4, 3])
        expected = engine.decode(9).copy()
        engine.draft_with(TextLookup())
        generated(engine, GREEDY)
        engine.rewind(len(PROMPT))
        engine.prefill([4, 4, 3])
        np.testing.assert_array_equal(engine.decode(9), expected)
        assert engine.position == len(PROMPT) + 4
    model.close()


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize("family", ["mamba", "qwen3next"])
def test_recurrent_layers_go_back_to_where_guesses_were_wrong(family: str, tmp_path: Path) -> None:
    """Also where attention stands between them."""
    model = load_model(write_random_family(tmp_path / "recurrent.gguf", FAMILIES[family]))
    with Engine(model, threads=1, context=CONTEXT) as engine:
        plain = {sampling: generated(engine, sampling) for sampling in (GREEDY, SAMPLED)}
    for sampling, (tokens, rows) in plain.items():
        told = Told(PROMPT + tokens, 3, model.hyper.vocabulary)
        with Engine(model, threads=2, context=CONTEXT) as engine:
            engine.draft_with(told)
            got = generated(engine, sampling)
            assert got[0] == tokens
            np.testing.assert_array_equal(got[1], rows)
            assert engine.drafter is not None
            counters = engine.drafter.counters
            assert counters.tokens == COUNT - 1 == engine.report().decode_tokens
            assert 0 < counters.accepted < counters.drafted
            assert engine.rewind(len(PROMPT)) == len(PROMPT)  # guesses do not take the prompt's place
    model.close()


def test_a_hot_device_takes_no_drafts(tmp_path: Path) -> None:
    """Its sums may depend on the size of a batch; what was to propose is closed."""
    model, proposer = load_model(split()(tmp_path)), Told([], 1, 9)
    with Engine(model, threads=1, device="cpu") as engine:
        with pytest.raises(ModelError, match="cpu device may depend on how many"):
            engine.draft_with(proposer)
        assert proposer.closed
        assert engine.drafter is None
    model.close()


def test_lookup_finds_the_longest_end_and_repeats_itself() -> None:
    lookup = TextLookup()
    assert lookup.propose([1, 2, 3], 4) == []
    text = [1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3]
    assert lookup.propose(text, 3) == [9, 7, 2]  # after 1 2 3, not after the later 2 3
    lookup.forget()
    assert lookup.propose([5, 6, 5, 6], 5) == [5, 6, 5, 6, 5]
    lookup.forget()
    assert lookup.propose([1, 2], 3) == []
    assert lookup.propose([], 3) == []


def simulated(
    length: DraftLength, right: float, slope: float, tokens: int, seed: int = 0
) -> tuple[float, int]:
    """Time for ``tokens`` tokens of which each guess is ``right`` with that probability, in single tokens,
    and the tokens that were drafted; a pass costs 1 + slope for each guess."""
    rng, done, spent, drafted = np.random.default_rng(seed), 0, 0.0, 0
    while done < tokens:
        count = length.choose(MOST)
        good = 0
        while good < count and rng.random() < right:
            good += 1
        seconds = 1 + slope * count
        length.passed(count, good, seconds, 0.0)
        done, spent, drafted = done + good + 1, spent + seconds, drafted + count
    return spent, drafted


@pytest.mark.parametrize("slope", [0.05, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("right", [0.0, 0.1, 0.3])
def test_wrong_guesses_cost_no_more_than_allowed(right: float, slope: float) -> None:
    """Beyond the allowance, by one pass at most: never slower than 0.97 of plain decode."""
    spent, _ = simulated(DraftLength(), right, slope, 2000)
    assert spent <= 2000 * (1 + ALLOWED) + 2 * (1 + MOST * slope)
    assert spent <= 2000 / 0.97


def unsteady(right: float, slope: float, tokens: int, seed: int) -> float:
    """Time for ``tokens`` tokens over that of single ones, on a machine whose speed changes by half and whose
    passes take a fifth more or less, one in thirty three times as long."""
    rng, length = np.random.default_rng(seed), DraftLength()
    done, spent, plain, clock = 0, 0.0, 0.0, 1.0
    while done < tokens:
        if rng.random() < 0.01:
            clock = rng.choice([1.0, 1.5])
        count, good = length.choose(MOST), 0
        while good < count and rng.random() < right:
            good += 1
        noise = np.exp(rng.normal(scale=0.15)) * (3.0 if rng.random() < 1 / 30 else 1.0)
        length.passed(count, good, clock * (1 + slope * count) * noise, 0.0)
        spent += clock * (1 + slope * count)
        plain += clock * (good + 1)
        done += good + 1
    return spent / plain


@pytest.mark.parametrize("slope", [0.1, 0.25, 1.0])
@pytest.mark.parametrize("right", [0.0, 0.1, 0.2])
def test_wrong_guesses_cost_little_on_an_unsteady_machine(right: float, slope: float) -> None:
    """Noise and a changing clock make no guesses look right that are wrong."""
    assert np.mean([unsteady(right, slope, 3000, seed) for seed in range(4)]) <= 1 / 0.98


@pytest.mark.parametrize(("right", "slope", "wanted"), [(0.95, 0.1, 3.0), (0.8, 0.2, 1.6), (0.99, 0.05, 4.5)])
def test_right_guesses_pay(right: float, slope: float, wanted: float) -> None:
    spent, drafted = simulated(DraftLength(), right, slope, 2000)
    assert 2000 / spent >= wanted
    assert drafted


def test_what_has_paid_is_given_up_when_it_no_longer_does() -> None:
    length = DraftLength()
    simulated(length, 0.95, 0.1, 1000)
    spent, _ = simulated(length, 0.0, 0.1, 1000)
    assert spent <= 1000 / 0.96
