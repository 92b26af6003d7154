"""When a profile has seen enough: more tokens would no longer change what a plan places.

The tokens seen so far are cut into two halves, each from all over the corpus. Of every layer, the neurons (or
experts) that one half used most, :data:`SHARE` of them, are held against the other half: what share of its
activity do they cover, of what its own most used would cover? Half the difference to 1, or less, is what a
choice from all of these tokens loses, since it knows twice as much and is not judged by its own noise.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from powerinfer_formats.histogram import active_counts, threshold_bin
from powerinfer_tools.engine.observation import LayerCounters

#: The share of units that is chosen: about what an accelerator gets of a model that does not fit.
SHARE = 0.3
#: The largest difference in coverage between the halves.
TOLERANCE = 0.03
#: Tokens of the first half that is looked at.
LEAST = 2048
#: Tokens of each half of a corpus below which their difference says nothing.
LEAST_HALF = 512

Counts = npt.NDArray[np.float64]
States = npt.NDArray[np.uint64]


class Stopping:
    """Looks at the counters of all layers when the number of tokens has doubled."""

    def __init__(self, counters: Sequence[LayerCounters], density: float) -> None:
        self._counters, self._density = counters, density
        self._first: list[npt.NDArray[np.uint64]] | None = None
        self._at = 0
        #: How far the last two halves differ, 0 … 1; None before there were any.
        self.difference: float | None = None

    def enough(self, tokens: int) -> bool:
        """Whether the profile may stop after ``tokens`` tokens, which are counted."""
        if tokens < max(LEAST, 2 * self._at):
            return False
        now = [_state(layer).astype(np.uint64) for layer in self._counters]
        if self._first is not None:
            pairs = zip(self._first, now, strict=True)
            halves = [(self._active(first), self._active(both - first)) for first, both in pairs]
            self.difference = difference(halves)
        self._first, self._at = now, tokens
        return self.difference is not None and self.difference <= TOLERANCE

    def _active(self, state: States) -> Counts:
        return active_of(state, self._density)


class CorpusHalves:
    """Counts the windows of the first half of a corpus apart, to say how far its halves disagree: two texts
    of other kinds do more than two samples of one text, which :class:`Stopping` compares."""

    def __init__(self, counters: Sequence[LayerCounters], density: float) -> None:
        self._counters, self._density = counters, density
        self._first = [np.zeros_like(_state(layer), np.uint64) for layer in counters]
        self._before: list[States] | None = None
        self._tokens = [0, 0]

    def begin(self, *, first: bool) -> None:
        """A window of the first half comes, or of the second."""
        self._before = [_state(layer).astype(np.uint64) for layer in self._counters] if first else None

    def end(self, tokens: int) -> None:
        """It was counted, with so many tokens."""
        self._tokens[self._before is None] += tokens
        for first, layer, before in zip(self._first, self._counters, self._before or (), strict=False):
            first += _state(layer).astype(np.uint64) - before

    @property
    def difference(self) -> float | None:
        """How far the halves differ, as :func:`difference` says; None where one has too few tokens."""
        if min(self._tokens) < LEAST_HALF:
            return None
        pairs = [
            (first, _state(layer).astype(np.uint64) - first)
            for first, layer in zip(self._first, self._counters, strict=True)
        ]
        return difference(
            [(active_of(one, self._density), active_of(other, self._density)) for one, other in pairs]
        )


def _state(layer: LayerCounters) -> npt.NDArray[np.uint32] | States:
    return layer.counts if layer.histogram is None else layer.histogram


def active_of(state: States, density: float) -> Counts:
    """How often each unit was active, by counts or by a histogram of contributions."""
    if state.ndim == 1:
        return state.astype(np.float64)
    histogram = state.astype(np.uint32)
    return active_counts(histogram, threshold_bin(histogram, density)).astype(np.float64)


def difference(halves: Sequence[tuple[Counts, Counts]], share: float = SHARE) -> float:
    """1 − the mean share of a half's activity, over what its own choice covers, that the other half's choice
    covers; ``halves`` are the counts of each layer. Layers with nothing to choose count for nothing."""
    covered = [
        _covered(by, of, share)
        for first, second in halves
        for by, of in ((first, second), (second, first))
        if round(share * len(of)) and of.any()
    ]
    return 1.0 - float(np.mean(covered)) if covered else 0.0


def _covered(by: Counts, of: Counts, share: float) -> float:
    """What the most used of ``by`` cover of ``of``, over what the most used of ``of`` cover."""
    count = round(share * len(of))
    chosen = np.argsort(-by, kind="stable")[:count]
    return float(of[chosen].sum() / np.sort(of)[-count:].sum())
