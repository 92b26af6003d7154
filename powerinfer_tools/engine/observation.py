"""Counters of the contributions of every FFN neuron, filled by the kernels while a model runs."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import HISTOGRAM_BINS


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


def counters(neurons: int, *, histogram: bool) -> LayerCounters:
    """Counters at zero for a layer of ``neurons``."""
    return LayerCounters(
        counts=np.zeros(neurons, np.uint64),
        histogram=np.zeros((neurons, HISTOGRAM_BINS), np.uint32) if histogram else None,
        gate_squares=np.zeros(neurons, np.float64),
        up_squares=np.zeros(neurons, np.float64),
    )
