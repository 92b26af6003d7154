"""Counters of the contributions of every FFN neuron, filled by the kernels while a model runs."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import HISTOGRAM_BINS

_BYTE = 255


@dataclass(frozen=True)
class LayerCounters:
    """Counters of one layer's neurons; the kernels add to them in place.

    ``counts`` uint64 [n]: tokens for which the contribution act(gate)·up was not exactly zero. ``histogram``
    uint32 [n, bins] of the contribution's size, or None. ``gate_squares`` and ``up_squares`` float64 [n]:
    sums of the squares of both factors.
    """

    counts: npt.NDArray[np.uint64]
    histogram: npt.NDArray[np.uint32] | None
    gate_squares: npt.NDArray[np.float64]
    up_squares: npt.NDArray[np.float64]


@dataclass(frozen=True)
class ExpertCounters(LayerCounters):
    """Counters of one layer's experts, and of the neurons inside them. ``seen`` uint64 [experts]: tokens that
    took the expert and whose neurons were counted; ``active`` uint32 [experts, n]: for how many of them the
    contribution act(gate)·up of a neuron was not exactly zero."""

    seen: npt.NDArray[np.uint64]
    active: npt.NDArray[np.uint32]


def expert_counters(experts: int, neurons: int) -> ExpertCounters:
    """Counters at zero for a layer of ``experts`` with ``neurons`` each."""
    return ExpertCounters(
        **vars(counters(experts, histogram=False)),
        seen=np.zeros(experts, np.uint64),
        active=np.zeros((experts, neurons), np.uint32),
    )


@dataclass(frozen=True)
class NeuronsInside:
    """Counts the neurons inside the experts of one layer.

    After the operations before ``after`` have run, ``chosen`` int32 [tokens, used] holds each token's
    experts, and ``hidden`` float32 [pairs, n] the contributions of their neurons: pairs of a token and an
    expert are sorted by expert. All experts must be computed here.
    """

    after: int
    chosen: npt.NDArray[np.int32]
    hidden: npt.NDArray[np.float32]
    into: ExpertCounters

    def count(self, tokens: int) -> None:
        """Count the pairs of the first ``tokens`` tokens."""
        pairs = np.bincount(self.chosen[:tokens].ravel(), minlength=len(self.into.seen))
        ends = np.cumsum(pairs)
        self.into.seen[:] += pairs.astype(np.uint64)
        for expert in np.flatnonzero(pairs).tolist():
            first, end = int(ends[expert] - pairs[expert]), int(ends[expert])
            for begin in range(first, end, _BYTE):
                active = self.hidden[begin : min(end, begin + _BYTE)] != 0
                # A sum of at most 255 ones fits a byte, which numpy adds many at a time.
                self.into.active[expert] += active.view(np.uint8).sum(axis=0, dtype=np.uint8)


def counters(neurons: int, *, histogram: bool) -> LayerCounters:
    """Counters at zero for a layer of ``neurons``."""
    return LayerCounters(
        counts=np.zeros(neurons, np.uint64),
        histogram=np.zeros((neurons, HISTOGRAM_BINS), np.uint32) if histogram else None,
        gate_squares=np.zeros(neurons, np.float64),
        up_squares=np.zeros(neurons, np.float64),
    )
