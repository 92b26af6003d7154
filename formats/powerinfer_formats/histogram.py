"""Histograms of contributions |act(gate·x)·(up·x)|: the bins, and the threshold that they give.

Four bins per octave from 2^-16 to 2^16, read off the bits of a float32: its exponent and the two highest bits
of its fraction. So a kernel bins with one shift, and every edge is a float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 128
_SHIFT = 21  # 23 bits of fraction, two of which count
_FIRST = (127 - 16) << 2  # the shifted bits of 2^-16


def contribution_bins(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Bin of each |value|: clamp((bits >> 21) − ((127 − 16) << 2), 0, 127); the shape is kept.

    Zero and all below 2^-16 are in bin 0; from 1.75 · 2^15 on, with infinity and NaN, in bin 127.
    """
    bits = np.abs(np.asarray(values, np.float32)).view(np.uint32) >> _SHIFT
    return np.clip(bits.astype(np.int32) - _FIRST, 0, BINS - 1).astype(np.uint8)


def lower_edge(index: int) -> float:
    """The smallest contribution in a bin: (1 + (index mod 4)/4) · 2^(index div 4 − 16); 0 for bin 0."""
    if not 0 <= index < BINS:
        raise ValueError(f"bin {index} of {BINS}")
    return 0.0 if index == 0 else (1 + index % 4 / 4) * 2.0 ** (index // 4 - 16)


def threshold_bin(histogram: NDArray[np.uint32], target_density: float) -> int:
    """The bin from which a contribution counts as active, for one layer: histogram [neurons, 128].

    Of the 128 lower edges the one whose share of contributions at or above it is nearest to
    ``target_density``; of two equally near, the higher.
    """
    per_bin = histogram.sum(axis=0, dtype=np.uint64)
    at_or_above = np.cumsum(per_bin[::-1])[::-1]
    distance = np.abs(at_or_above.astype(np.float64) - target_density * float(at_or_above[0]))
    return BINS - 1 - int(np.argmin(distance[::-1]))


def active_counts(histogram: NDArray[np.uint32], first_bin: int) -> NDArray[np.uint64]:
    """Contributions of each neuron in ``first_bin`` or above: uint64 [neurons]."""
    counts: NDArray[Any] = histogram[:, first_bin:].sum(axis=1, dtype=np.uint64)
    return counts
