"""A profile stops when more tokens would not change what is placed, and reads from all over the corpus."""

from pathlib import Path

import numpy as np
import pytest

from powerinfer_formats.profile import Profile
from powerinfer_tools.engine.observation import LayerCounters, counters
from powerinfer_tools.progress import Silent
from powerinfer_tools.stages.profile import ProfileOptions, run_profile, stopping
from powerinfer_tools.stages.profile.stopping import CorpusHalves, Stopping, difference
from powerinfer_tools.stages.profile.windows import Window, spread_out
from tiny_models import CASES, make_tiny_model

TEXT = "the cat sat on the mat and the dog sat on the log; a quick brown fox jumps over the lazy dog. " * 60


def test_halves_that_choose_alike_do_not_differ() -> None:
    counts = np.arange(10.0)
    assert difference([(counts, 3 * counts)]) == pytest.approx(0.0)


def test_a_difference_is_what_the_other_choice_does_not_cover() -> None:
    """Of 10 units 3 are chosen: each half has 6 on its own and 2 on one of the other's."""
    first, second = np.zeros(10), np.zeros(10)
    first[[0, 1, 2]], first[3] = 2, 1
    second[[3, 4, 5]], second[0] = 2, 1
    assert difference([(first, second)]) == pytest.approx(1 - 1 / 6)
    assert difference([(first, second), (first, first)]) == pytest.approx((1 - 1 / 6) / 2)


def test_layers_without_a_choice_do_not_count() -> None:
    assert difference([(np.ones(1), np.ones(1)), (np.zeros(10), np.zeros(10))]) == 0.0


@pytest.mark.parametrize("histogram", [False, True])
def test_it_looks_when_the_tokens_have_doubled(histogram: bool) -> None:
    """Counts that settle: the first doubling differs, the second does not."""
    layer: LayerCounters = counters(100, histogram=histogram)
    watch, rng = Stopping([layer], 0.2), np.random.default_rng(0)

    def count(tokens: int, noise: float) -> bool:
        active = np.sort(rng.integers(0, 2 if noise else 1, 100) * noise + np.linspace(0.5, 0.01, 100))
        times = (active[::-1] if not noise else rng.permutation(active)) * tokens
        if layer.histogram is None:
            layer.counts[:] += times.astype(np.uint64)
        else:
            layer.histogram[:, 80] += times.astype(np.uint32)
            layer.histogram[:, 5] += (tokens - times).astype(np.uint32)
        return watch.enough(count.total)  # type: ignore[attr-defined]

    count.total = stopping.LEAST - 1  # type: ignore[attr-defined]
    assert not count(stopping.LEAST - 1, 0.0)
    assert watch.difference is None
    for factor, noise in ((1, 0.0), (2, 5.0)):
        count.total = factor * stopping.LEAST  # type: ignore[attr-defined]
        assert not count(stopping.LEAST, noise)
    assert watch.difference is not None
    assert watch.difference > stopping.TOLERANCE
    count.total = 3 * stopping.LEAST  # type: ignore[attr-defined]
    before = watch.difference
    assert not count(stopping.LEAST, 0.0)
    assert watch.difference == before  # not doubled yet


@pytest.mark.parametrize("histogram", [False, True])
def test_halves_of_a_corpus_that_use_other_units_disagree(histogram: bool) -> None:
    """Windows of both halves come in turn; what each adds is told apart."""
    found = []
    for used_later in (0, 50):
        layer = counters(100, histogram=histogram)
        halves = CorpusHalves([layer], 0.3)
        for window in range(20):
            halves.begin(first=window % 2 == 0)
            first = 0 if window % 2 == 0 else used_later
            if layer.histogram is None:
                layer.counts[first : first + 30] += np.uint64(64)
            else:
                layer.histogram[:, 5] += np.uint32(64)
                layer.histogram[first : first + 30, 80] += np.uint32(64)
                layer.histogram[first : first + 30, 5] -= np.uint32(64)
            halves.end(64)
            if window < 10:
                assert halves.difference is None  # too few tokens of each half
        found.append(halves.difference)
    assert found == [pytest.approx(0.0), pytest.approx(1.0)]


def test_every_beginning_is_spread_over_the_corpus() -> None:
    windows = [Window(0, [index]) for index in range(100)]
    order = [window.tokens[0] for window in spread_out(windows)]
    assert sorted(order) == list(range(100))
    for count in (8, 16, 32, 50):
        gaps = np.diff([-1, *sorted(order[:count]), 100])
        assert gaps.max() <= 4 * 100 / count
    assert spread_out([]) == []


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_profile_stops_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that repeats itself is known soon; --tokens, and the parts of a corpus, are read as asked."""
    monkeypatch.setattr(stopping, "LEAST", 256)
    tiny, corpus = make_tiny_model(tmp_path, CASES["qwen3moe"]), tmp_path / "text.txt"
    corpus.write_text(TEXT)
    notes = Notes()
    options = ProfileOptions(tiny.path, (corpus,), tmp_path / "p.safetensors", window=32)
    profile = run_profile(options, notes)
    (said,) = (note for note in notes.notes if note.startswith("stopped after"))
    assert f"stopped after {profile.tokens:,} of " in said
    assert "the other half's choice covers" in said
    assert 512 <= profile.tokens < 4096
    shard = ProfileOptions(tiny.path, (corpus,), tmp_path / "s.safetensors", window=32, shard=(1, 1))
    whole = run_profile(shard, Silent())
    assert whole.tokens > profile.tokens
    asked = ProfileOptions(tiny.path, (corpus,), tmp_path / "t.safetensors", window=32, max_tokens=2000)
    notes = Notes()
    assert run_profile(asked, notes).tokens == 2000
    assert any("the first and the second half of the corpus disagree: of what one" in n for n in notes.notes)
    assert Profile.load(options.output).tokens == profile.tokens
