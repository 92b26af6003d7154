"""Every sampler against a plain, readable version of itself, and the edges."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerinfer_tools.errors import SamplingError
from powerinfer_tools.generate.sampler_names import chain_of_letters, sampler_chain
from powerinfer_tools.generate.sampling import (
    Sampler,
    SamplingOptions,
    above_share_of_best,
    highest,
    nucleus,
    penalise,
    softmax,
    typical,
)

Logits = npt.NDArray[np.float32]
NO_FILTER = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
deterministic = settings(derandomize=True, deadline=None, max_examples=200)
# Few distinct values, so that equal logits are common.
some_logits = st.lists(st.integers(-8, 8).map(lambda i: i / 2), min_size=1, max_size=300)


def logits_of(values: list[float]) -> Logits:
    return np.array(values, np.float32)


def random_logits(size: int, seed: int = 0) -> Logits:
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


def plain_probabilities(scores: list[float]) -> list[float]:
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


@deterministic
@given(values=some_logits, count=st.integers(0, 320))
def test_highest(values: list[float], count: int) -> None:
    plain = sorted(range(len(values)), key=lambda i: (-values[i], i))[: count or None]
    assert highest(logits_of(values), count).tolist() == plain


@pytest.mark.parametrize("size", [1, 39, 40, 41, 639, 640, 1279, 1280, 1281, 49_152, 151_936])
def test_highest_of_large_vocabularies(size: int) -> None:
    for logits in (random_logits(size), np.round(random_logits(size))):  # the second with many equal values
        plain = np.lexsort((np.arange(size), -logits))[:40]
        assert highest(logits, 40).tolist() == plain.tolist()


def test_highest_leaves_out_what_is_ruled_out() -> None:
    assert highest(logits_of([-math.inf, 2, -math.inf, 3]), 3).tolist() == [3, 1]


@deterministic
@given(values=some_logits)
def test_softmax(values: list[float]) -> None:
    got = softmax(np.array(values))
    # n terms summed, each exponential right to 2 ulp: relative error (n + 4) eps
    allowed = (len(values) + 4) * np.finfo(np.float64).eps
    np.testing.assert_allclose(got, plain_probabilities(values), rtol=allowed)


@deterministic
@given(values=some_logits, share=st.floats(0, 1))
def test_nucleus(values: list[float], share: float) -> None:
    scores = sorted(values, reverse=True)
    kept, total = 0, 0.0
    for p in softmax(np.array(scores)) if share < 1 else ():
        kept, total = kept + 1, total + float(p)
        if total >= share:
            break
    assert nucleus(np.array(scores), share).tolist() == list(range(kept if share < 1 else len(scores)))


@deterministic
@given(values=some_logits, share=st.floats(0, 1))
def test_min_p(values: list[float], share: float) -> None:
    scores = sorted(values, reverse=True)
    limit = scores[0] + math.log(share) if share > 0 else -math.inf
    plain = [i for i, score in enumerate(scores) if score >= limit]
    assert above_share_of_best(np.array(scores), share).tolist() == plain


def test_typical_prefers_tokens_of_average_surprise() -> None:
    probabilities = [0.5, 0.2, 0.15, 0.1, 0.05]
    entropy = -sum(p * math.log(p) for p in probabilities)
    distance = [abs(-math.log(p) - entropy) for p in probabilities]
    assert sorted(range(5), key=distance.__getitem__) == [1, 2, 0, 3, 4]
    scores = np.log(probabilities)
    assert typical(scores, 0.1).tolist() == [1]
    assert typical(scores, 0.3).tolist() == [1, 2]
    assert typical(scores, 0.5).tolist() == [0, 1, 2]
    assert typical(scores, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_typical_with_a_certain_token() -> None:
    assert typical(np.array([0.0, -2000.0]), 0.5).tolist() == [0]


@deterministic
@given(
    values=some_logits,
    recent=st.lists(st.integers(0, 299), max_size=30),
    repeat=st.floats(0.5, 2),
    frequency=st.floats(-1, 1),
    presence=st.floats(-1, 1),
)
def test_penalties(
    values: list[float], recent: list[int], repeat: float, frequency: float, presence: float
) -> None:
    recent = [token % len(values) for token in recent]
    options = SamplingOptions(repeat_penalty=repeat, frequency_penalty=frequency, presence_penalty=presence)
    plain = list(values)
    for token, times in Counter(recent).items():
        plain[token] = plain[token] / repeat if plain[token] > 0 else plain[token] * repeat
        plain[token] -= times * frequency + presence
    got = logits_of(values)
    if recent:
        penalise(got, recent, options)
    # Three float32 roundings of values up to |v|·2, times and the sum of both
    bound = float(8 * np.finfo(np.float32).eps * (16 + 30 + 1))
    np.testing.assert_allclose(got, plain, rtol=0, atol=bound)


def test_penalties_look_back_a_limited_way() -> None:
    logits = logits_of([1.0, 0.9, 0.0])
    near = Sampler(SamplingOptions(temperature=0, repeat_penalty=2, repeat_last_n=2))
    near.accept([0, 2, 2])
    assert near.sample(logits) == 0
    far = Sampler(SamplingOptions(temperature=0, repeat_penalty=2, repeat_last_n=-1))
    far.accept([0, 2, 2])
    assert far.sample(logits) == 1
    off = Sampler(SamplingOptions(temperature=0, repeat_penalty=2, repeat_last_n=0))
    off.accept([0])
    assert off.sample(logits) == 0


def test_greedy_takes_the_lowest_id_among_equals_and_no_random_number() -> None:
    sampler = Sampler(SamplingOptions(temperature=0, seed=3))
    state = sampler._random.bit_generator.state
    assert sampler.sample(logits_of([1, 5, 5, 2])) == 1
    assert sampler._random.bit_generator.state == state


def test_the_order_is_llama_cpps() -> None:
    """Top-k first, then top-p over what is left, then min-p, and temperature only for the draw."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)
    # Of the best two, the first has 0.4/0.7 = 0.57 and so alone reaches 0.5; of all four it would have 0.4.
    options = SamplingOptions(top_k=2, top_p=0.5, min_p=0, temperature=100, seed=1)
    assert {Sampler(options).sample(logits)} == {0}
    # A high temperature makes all nearly equal, but min-p judges before it: 0.2 < 0.6 · 0.4.
    sampler = Sampler(SamplingOptions(top_k=0, top_p=1, min_p=0.6, temperature=100, seed=1))
    assert {sampler.sample(logits) for _ in range(100)} == {0, 1}


def test_draws_follow_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(probabilities).astype(np.float32)
    sampler = Sampler(SamplingOptions(temperature=1, seed=7, **NO_FILTER))  # type: ignore[arg-type]
    draws = 20_000
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=4)
    # Five standard deviations of a binomial count; the seed is fixed, so this cannot flicker.
    assert (
        np.abs(counts - draws * probabilities) < 5 * np.sqrt(draws * probabilities * (1 - probabilities))
    ).all()


def test_temperature_sharpens_and_flattens() -> None:
    logits = logits_of([2, 1, 0])
    for temperature in (0.5, 2.0):
        sampler = Sampler(SamplingOptions(temperature=temperature, seed=5, **NO_FILTER))  # type: ignore[arg-type]
        expected = plain_probabilities([value / temperature for value in (2, 1, 0)])[0]
        share = sum(sampler.sample(logits) == 0 for _ in range(5000)) / 5000
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 5000)


def test_a_seed_reproduces_and_is_told() -> None:
    logits = [random_logits(500, seed) for seed in range(30)]
    first = Sampler(SamplingOptions(temperature=1.5))
    choices = [first.sample(step) for step in logits]
    again = Sampler(SamplingOptions(temperature=1.5, seed=first.seed))
    assert [again.sample(step) for step in logits] == choices
    other = Sampler(SamplingOptions(temperature=1.5, seed=first.seed + 1))
    assert [other.sample(step) for step in logits] != choices


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(1000)
    logits.flags.writeable = False
    sampler = Sampler(SamplingOptions(repeat_penalty=1.3, seed=1), banned=(3, 5))
    sampler.accept(range(100))
    sampler.sample(logits)


def test_banned_tokens_are_never_chosen() -> None:
    logits = logits_of([9, 8, 1])
    assert Sampler(SamplingOptions(temperature=0), banned=[0, 1]).sample(logits) == 2
    sampler = Sampler(SamplingOptions(seed=1), banned=[0, 1])
    assert {sampler.sample(logits) for _ in range(20)} == {2}


@pytest.mark.parametrize("first", [3.0, math.nan, math.inf])
def test_greedy_with_banned_tokens_is_what_ruling_them_out_gives(first: float) -> None:
    """The highest as it comes, the next one where that is banned; a banned NaN counts for nothing."""
    sampler = Sampler(SamplingOptions(temperature=0), banned=(1, 4))
    assert sampler.sample(logits_of([0, first, 2, 2, 2.5])) == 2
    assert sampler.sample(logits_of([5, 1, 5, 2, 2.5])) == 0
    with pytest.raises(SamplingError, match="all 5 tokens are ruled out"):
        sampler.sample(logits_of([-math.inf, 1, -math.inf, -math.inf, 2]))
    with pytest.raises(SamplingError, match="1 of 5 are NaN, first that of token 3"):
        sampler.sample(logits_of([0, first, 2, math.nan, 2.5]))


@pytest.mark.parametrize("options", [SamplingOptions(seed=1), SamplingOptions(seed=1, **NO_FILTER)])  # type: ignore[arg-type]
def test_all_ruled_out_but_one(options: SamplingOptions) -> None:
    logits = np.full(5000, -np.inf, np.float32)
    logits[4321] = -3
    sampler = Sampler(options)
    assert {sampler.sample(logits) for _ in range(50)} == {4321}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "1 of 100 are NaN, first that of token 42"),
        (np.inf, r"1 of 100 are \+inf, first that of token 42"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_broken_logits_are_named(value: float, message: str, temperature: float) -> None:
    logits = random_logits(100)
    logits[42] = value
    with pytest.raises(SamplingError, match=message):
        Sampler(SamplingOptions(temperature=temperature)).sample(logits)


def test_everything_ruled_out() -> None:
    with pytest.raises(SamplingError, match="all 4 tokens are ruled out"):
        Sampler(SamplingOptions()).sample(np.full(4, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", 2.5),
        ("top_k", True),
        ("typical_p", 1.1),
        ("top_p", -0.1),
        ("min_p", 2),
        ("repeat_penalty", 0),
        ("repeat_last_n", -2),
        ("frequency_penalty", math.nan),
        ("presence_penalty", 1e9),
        ("seed", -2),
        ("seed", 2**64),
    ],
)
def test_options_out_of_range_are_named(option: str, value: object) -> None:
    with pytest.raises(SamplingError, match=f"^{option} is "):
        SamplingOptions(**{option: value})  # type: ignore[arg-type]


def test_defaults_are_llama_cpps() -> None:
    options = SamplingOptions()
    assert (options.top_k, options.typical_p, options.top_p, options.min_p) == (40, 1.0, 0.95, 0.05)
    assert (options.temperature, options.repeat_penalty, options.repeat_last_n) == (0.8, 1.0, 64)
    assert not options.penalises


def test_values_below_zero_mean_what_they_mean_to_llama_cpp() -> None:
    """A temperature of 0 or less is greedy, top-k of 0 or less is off, and -1 asks for a fresh seed."""
    logits = np.array([0.0, 3.0, 2.9, -1.0], np.float32)
    assert Sampler(SamplingOptions(temperature=-1.0, seed=1)).sample(logits) == 1
    off, zero = (Sampler(SamplingOptions(top_k=k, temperature=9.0, seed=5)) for k in (-1, 0))
    assert [off.sample(logits) for _ in range(40)] == [zero.sample(logits) for _ in range(40)]
    assert Sampler(SamplingOptions(seed=-1)).seed != Sampler(SamplingOptions(seed=-1)).seed


def test_tiny_temperatures_are_greedy() -> None:
    logits = np.array([0.0, 3.0, 2.9999, -1.0], np.float32)
    for temperature in (5e-324, 1e-300, 1e-30):
        sampler = Sampler(SamplingOptions(temperature=temperature, min_p=0.0, top_p=1.0, seed=1))
        assert {sampler.sample(logits) for _ in range(20)} == {1}


def llama_cpp_cases() -> list[dict[str, Any]]:
    """In llama.cpp's own order, then in others."""
    folder, cases = Path(__file__).resolve().parents[1] / "data" / "sampling", list[dict[str, Any]]()
    for name in ("llama_cpp.json", "llama_cpp_orders.json"):
        cases += json.loads((folder / name).read_text(encoding="utf-8"))
    return cases


@pytest.mark.parametrize("number", range(len(llama_cpp_cases())))
def test_what_llama_cpp_leaves(number: int) -> None:
    """Which tokens are left, and how probable they are: figures of llama.cpp's own chain with logit biases,
    made by scripts/llama_cpp_sampling.py. It rounds logits of up to 130 to float32, and divides them by a
    temperature of 0.1 at the least: 2 · 130 · 2⁻²⁴ / 0.1; twice where temperature comes twice."""
    case = llama_cpp_cases()[number]
    left, logits, recent = case.pop("left"), logits_of(case.pop("logits")), case.pop("recent")
    case["logit_bias"] = tuple((token, float(bias)) for token, bias in case["logit_bias"])
    if "samplers" in case:
        case["samplers"] = chain_of_letters(case["samplers"])
    sampler = Sampler(SamplingOptions(seed=1, **case))
    sampler.accept(recent)
    ids, p = sampler.probabilities(logits)
    expected = {token: share for token, share in left if share > 1e-30}
    ours = {int(token): float(share) for token, share in zip(ids, p, strict=True) if share > 1e-30}
    assert ours == pytest.approx(expected, rel=2 * 130 * 2**-24 / 0.1)
    assert sampler.sample(logits) in expected


def test_samplers_have_llama_cpps_names() -> None:
    assert sampler_chain(["Top-K", " nucleus", "topp", "typ", "typ-p", "temp", "dry", "XTC"]) == (
        "top_k", "top_p", "top_p", "typ_p", "typ_p", "temperature",
    )  # fmt: skip
    six = ("top_k", "typ_p", "top_p", "min_p", "temperature", "penalties")
    assert chain_of_letters("dskypmxte") == six
    for names in (["top_q"], ["infill"], [""]):
        with pytest.raises(SamplingError, match="samplers names"):
            SamplingOptions(samplers=tuple(names))
    with pytest.raises(SamplingError, match="letter 'i'"):
        chain_of_letters("ki")


def test_what_is_not_named_is_not_applied() -> None:
    """Without a temperature nothing is greedy; without any sampler, tokens are drawn as the model has it."""
    logits = np.log(np.array([0.5, 0.3, 0.2])).astype(np.float32)
    options = SamplingOptions(temperature=0, top_k=1, min_p=1.0, seed=2, samplers=())
    sampler = Sampler(options)
    sampler.accept([0, 0])
    assert sampler.probabilities(logits)[1] == pytest.approx([0.5, 0.3, 0.2])
    assert {sampler.sample(logits) for _ in range(50)} == {0, 1, 2}
    assert Sampler(replace(options, samplers=("temperature",))).sample(logits) == 0


def test_penalties_after_the_temperature_see_what_it_made() -> None:
    """(2 - 1) / 4 is less than 1.2 / 4, and 2 / 4 - 1 is so all the more."""
    logits = logits_of([2.0, 1.2])
    shares = []
    for samplers in (("penalties", "temperature"), ("temperature", "penalties")):
        sampler = Sampler(SamplingOptions(temperature=4.0, presence_penalty=1.0, samplers=samplers))
        sampler.accept([0])
        ids, p = sampler.probabilities(logits)
        assert ids.tolist() == [1, 0]
        shares.append(p[0])
    expected = [1 / (1 + math.exp(-0.2 / 4)), 1 / (1 + math.exp(0.5 - 1 - 0.3))]
    assert shares == pytest.approx(expected, rel=1e-6)


def test_a_bias_comes_before_penalties_and_decides() -> None:
    logits = logits_of([1.0, 2.0, 3.0])
    assert Sampler(SamplingOptions(temperature=0, logit_bias=((0, 2.5),))).sample(logits) == 0
    assert Sampler(SamplingOptions(temperature=0, logit_bias=((2, -math.inf),))).sample(logits) == 1
    both = Sampler(SamplingOptions(temperature=0, repeat_penalty=2.0, logit_bias=((1, 3.0),)))
    both.accept([1])
    assert both.sample(logits) == 2  # (2 + 3) / 2 is below 3
    with pytest.raises(SamplingError, match="names token 3, the model has 3"):
        Sampler(SamplingOptions(temperature=0, logit_bias=((3, 1.0),))).sample(logits)
    for token, bias in ((-1, 1.0), (1, math.nan), (1, math.inf)):
        with pytest.raises(SamplingError, match="logit_bias of token"):
            SamplingOptions(logit_bias=((token, bias),))
