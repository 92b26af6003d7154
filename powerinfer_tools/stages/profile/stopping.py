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
#: What the halves may differ by in what they cover.
TOLERANCE = 0.03
#: Tokens of the first half that is looked at.
LEAST = 2048

Counts = npt.NDArray[np.float64]


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
        now = [self._state(layer).astype(np.uint64) for layer in self._counters]
        if self._first is not None:
            pairs = zip(self._first, now, strict=True)
            halves = [(self._active(first), self._active(both - first)) for first, both in pairs]
            self.difference = difference(halves)
        self._first, self._at = now, tokens
        return self.difference is not None and self.difference <= TOLERANCE

    @staticmethod
    def _state(layer: LayerCounters) -> npt.NDArray[np.uint32] | npt.NDArray[np.uint64]:
        return layer.counts if layer.histogram is None else layer.histogram

    def _active(self, state: npt.NDArray[np.uint64]) -> Counts:
        if state.ndim == 1:
            return state.astype(np.float64)
        histogram = state.astype(np.uint32)
        return active_counts(histogram, threshold_bin(histogram, self._density)).astype(np.float64)


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
