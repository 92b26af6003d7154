"""profile counts the neurons inside experts whose activation makes exact zeros: each as often as the float64
reference finds it active, among the tokens that took its expert."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_logits import HALF
from hybrid_families import FAMILIES, write_random_family
from hybrid_profiles import profile_of
from powerinfer_formats.profile import Profile
from powerinfer_tools.model import reference
from powerinfer_tools.model.architectures import ARCHITECTURES
from powerinfer_tools.model.hyperparameter_types import Routing
from powerinfer_tools.model.loading import Model, load_model
from powerinfer_tools.model.operations import Activation
from powerinfer_tools.model.tensors import Vector
from powerinfer_tools.progress import Silent
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from powerinfer_tools.stages.profile.learning import Learning
from powerinfer_tools.stages.profile.profiling import checkpoint_path
from powerinfer_tools.text import Tokenizer
from random_families import write_random
from tiny_models import CASES, make_tiny_model

RELU_MIXTRAL = replace(CASES["mixtral"], activation="relu", neurons=41)
TEXTS = {
    "a.txt": "the cat sat on the mat and the dog sat on the log. " * 12,
    "b.txt": "a quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. " * 7,
    "c.txt": "the dog sat on the box. " * 5,
}


class Recording(reference.NumpyOperations):
    """The reference, which also counts the active neurons of every chosen expert, layer by layer, and how
    many of its gates are so near zero that one roundoff of the half-precision cache may decide."""

    counted: list[tuple[np.ndarray, np.ndarray, np.ndarray]]

    def experts(
        self,
        scores: reference.Array,
        x: reference.Array,
        routing: Routing,
        expert: Callable[[int, reference.Array], reference.Array],
        choice_bias: Vector | None,
    ) -> reference.Array:
        tokens = np.zeros(routing.experts, np.int64)
        hidden: list[tuple[int, np.ndarray, np.ndarray]] = []

        def noted(index: int, row: reference.Array) -> reference.Array:
            tokens[index] += 1
            self.took = lambda *rows: hidden.append((index, *rows))
            return expert(index, row)

        out = super().experts(scores, x, routing, noted, choice_bias)
        self.took = lambda *rows: None
        active, undecided = np.zeros((2, routing.experts, hidden[0][1].size), np.int64)
        for index, values, gates in hidden:
            active[index] += values != 0
            undecided[index] += np.abs(gates) <= HALF * np.abs(gates).max()
        self.counted.append((tokens, active, undecided))
        return out

    def took(self, *rows: np.ndarray) -> None:
        """An expert's contributions and its gates; those of other FFNs are not counted."""

    def activate(self, gate: reference.Array, up: reference.Array | None, how: Activation) -> reference.Array:
        values = super().activate(gate, up, how)
        self.took(values[0], gate[0])
        return values


def expected(
    model: Model, windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> list[list[np.ndarray]]:
    """By expert layer: tokens of each expert, how often each of its neurons was active, and how often that
    was a matter of rounding."""
    sums: list[list[np.ndarray]] = []
    for tokens in windows:
        Recording.counted = []
        with monkeypatch.context() as patched:
            patched.setattr(reference, "NumpyOperations", Recording)
            reference.forward(model, tokens, half_cache=True)
        sums = sums or [[np.zeros_like(part) for part in layer] for layer in Recording.counted]
        for total, layer in zip(sums, Recording.counted, strict=True):
            for part, more in zip(total, layer, strict=True):
                part += more
    return sums


def check(profile: Profile, model: Model, sums: list[list[np.ndarray]], *, exact: bool = True) -> None:
    """``exact`` but for gates that are a matter of rounding."""
    layers = [index for index, facts in enumerate(model.hyper.facts) if facts.ffn == "experts"]
    assert len(layers) == len(sums) > 0
    for index in range(profile.layers):
        inside = profile.sums[index].inside
        if index not in layers:
            assert inside is None
            assert profile.expert_neurons(index) == 0
            continue
        tokens, active, undecided = sums[layers.index(index)]
        assert inside is not None
        np.testing.assert_array_equal(inside.tokens, tokens)
        np.testing.assert_array_equal(profile.counts(index), tokens)
        if exact:
            np.testing.assert_array_equal(inside.active, active)
        assert (np.abs(inside.active.astype(np.int64) - active) <= undecided).all()
        assert (undecided == 0).mean() > 0.5
        assert profile.expert_neurons(index) == model.hyper.neurons
        share = inside.active.sum(dtype=np.int64) / (tokens.sum() * model.hyper.neurons)
        assert profile.density_inside(index) == pytest.approx(share, rel=1e-12)
        assert 0.1 < active.sum() / (tokens.sum() * model.hyper.neurons) < 0.9


def smallthinker(path: Path) -> Path:
    return write_random(path, ARCHITECTURES["smallthinker"], layers=4)


def nemotron(path: Path) -> Path:
    return write_random_family(path, FAMILIES["nemotron_h_moe"])


@pytest.mark.parametrize("write", [smallthinker, nemotron])
def test_every_neuron_is_counted_as_the_reference_finds_it(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_profiles import TOKENS

    model = load_model(write(tmp_path / "model.gguf"))
    tokens = [token % model.hyper.vocabulary for token in TOKENS]
    monkeypatch.setattr("hybrid_profiles.TOKENS", tokens)
    profile = profile_of(model)
    check(profile, model, expected(model, [tokens], monkeypatch))
    profile.save(tmp_path / "profile.safetensors")
    check(Profile.load(tmp_path / "profile.safetensors"), model, expected(model, [tokens], monkeypatch))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("inside"), RELU_MIXTRAL).path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


def options(model: Path, corpus: Path, output: Path, **changes: object) -> ProfileOptions:
    return replace(ProfileOptions(model, (corpus,), output, window=33, threads=1), **changes)  # type: ignore[arg-type]


def test_a_corpus_is_counted_in_windows_of_an_odd_size(
    mixtral: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = run_profile(options(mixtral, corpus, tmp_path / "out.profile.safetensors", threads=2))
    model, windows = load_model(mixtral), list[list[int]]()
    tokenizer = Tokenizer.from_gguf(model.source)
    prefix = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    step = 33 - len(prefix)
    for text in TEXTS.values():
        ids = tokenizer.encode(text, add_bos=False)
        windows += [prefix + ids[first : first + step] for first in range(0, len(ids), step)]
    assert sum(map(len, windows)) == profile.tokens
    check(profile, model, expected(model, windows, monkeypatch), exact=False)
    order = profile.order_inside(0)
    inside = profile.sums[0].inside
    assert order is not None
    assert inside is not None
    for expert in range(5):
        assert sorted(order[expert].tolist()) == list(range(41))
        assert (np.diff(inside.active[expert][order[expert]].astype(np.int64)) <= 0).all()


def test_more_pairs_of_an_expert_than_a_byte_counts(mixtral: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the " * 700)
    made = run_profile(ProfileOptions(mixtral, (text,), tmp_path / "p.safetensors", window=256, threads=1))
    inside = made.sums[0].inside
    assert inside is not None
    assert made.counts(0).max() > 300
    assert inside.active.max() > 255
    assert (inside.active <= inside.tokens[:, None]).all()


def test_shards_are_bit_identical_to_one_run(mixtral: Path, corpus: Path, tmp_path: Path) -> None:
    run_profile(options(mixtral, corpus, tmp_path / "whole.safetensors", max_tokens=1 << 20))
    parts = [
        run_profile(options(mixtral, corpus, tmp_path / f"{number}.safetensors", shard=(number, 3)))
        for number in (2, 3, 1)
    ]
    Profile.merge([Profile.merge(parts[:2]), parts[2]]).save(tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_interrupted_work_goes_on(mixtral: Path, corpus: Path, tmp_path: Path) -> None:
    asked = options(mixtral, corpus, tmp_path / "out.profile.safetensors")
    run_profile(replace(asked, output=tmp_path / "expected.profile.safetensors"))

    class InterruptSoon(Silent):
        def __init__(self) -> None:
            self.calls = 0

        def advance(self, n: int) -> None:
            self.calls += 1
            if self.calls == 4:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_profile(asked, InterruptSoon())
    assert checkpoint_path(asked.output).exists()
    run_profile(asked)
    assert asked.output.read_bytes() == (tmp_path / "expected.profile.safetensors").read_bytes()


def test_use_adds_choices_of_experts_alone(mixtral: Path, corpus: Path, tmp_path: Path) -> None:
    """What is learnt from use has no neurons; the profile keeps its own, and their tokens."""
    path = tmp_path / "out.profile.safetensors"
    before = run_profile(options(mixtral, corpus, path))
    model = load_model(mixtral)
    learning = Learning(model, path)
    from powerinfer_tools.engine import Engine

    with Engine(model, threads=1, context=64, observed=learning.observed) as engine:
        engine.absorb([1, 2, 3, 4, 5])
    after = learning.save(5)
    assert after is not None
    assert Profile.load(path).tokens == before.tokens + 5
    for index, sums in enumerate(Profile.load(path).sums):
        old = before.sums[index].inside
        assert sums.inside is not None
        assert old is not None
        np.testing.assert_array_equal(sums.inside.active, old.active)
        np.testing.assert_array_equal(sums.inside.tokens, before.counts(index))
        assert int(Profile.load(path).counts(index).sum()) == int(sums.inside.tokens.sum()) + 2 * 5


def test_smooth_experts_are_counted_whole(tmp_path: Path, corpus: Path) -> None:
    path = make_tiny_model(tmp_path, CASES["mixtral"]).path
    profile = run_profile(options(path, corpus, tmp_path / "out.profile.safetensors"))
    assert all(layer.inside is None for layer in profile.sums)
    assert profile.density_inside(0) is None
    assert profile.expert_density(0) is None
    assert b"expert_neurons" not in (tmp_path / "out.profile.safetensors").read_bytes()
