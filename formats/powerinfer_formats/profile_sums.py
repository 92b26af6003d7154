"""The sums of a profile for the neurons of one layer, and how they stay exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SQUARE_GRID = 2.0**-16
SQUARE_LIMIT = 2.0**37  # below it, multiples of the grid are exact in float64


@dataclass(frozen=True, eq=False)
class ExpertSums:
    """What the neurons inside a layer's experts did.

    ``tokens`` uint64 [experts]: of the tokens that took an expert, those whose neurons were counted;
    ``active`` uint32 [experts, neurons]: for how many of them each neuron's contribution was not zero.
    """

    tokens: NDArray[np.uint64]
    active: NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class LayerSums:
    """Sums over tokens, arrays [neurons].

    ``counts`` uint64, for activations with exact zeros: tokens whose contribution was not zero.
    ``histogram`` uint32 [neurons, 128], for the others: contributions by bin (see ``histogram``). One of the
    two is None. ``gate_squares`` and ``up_squares`` float64: Σ act(gate·x)² and Σ (up·x)², multiples of
    2^-16. ``inside``: where the layer's units are experts whose neurons were counted, too.
    """

    counts: NDArray[np.uint64] | None
    histogram: NDArray[np.uint32] | None
    gate_squares: NDArray[np.float64]
    up_squares: NDArray[np.float64]
    inside: ExpertSums | None = None


def round_squares(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of squares over one window, rounded to the grid: float64 of the same shape.

    Float64 adds multiples of 2^-16 exactly up to 2^37. With each window rounded by itself, the sum of any
    windows is the same in every order and grouping: that is what lets shards merge into equal profiles.
    Sums that reach the limit (or are not numbers) are cut to the largest multiple below it.
    """
    largest = SQUARE_LIMIT - SQUARE_GRID
    finite = np.nan_to_num(sums, nan=largest, posinf=largest)
    return np.minimum(np.rint(finite / SQUARE_GRID) * SQUARE_GRID, largest)


def add_sums(parts: Sequence[LayerSums]) -> LayerSums:
    """The sums over all tokens of ``parts``, which have the same shapes; those that did not count inside
    experts add nothing there."""
    counts = [part.counts for part in parts if part.counts is not None]
    histograms = [part.histogram for part in parts if part.histogram is not None]
    inside = [part.inside for part in parts if part.inside is not None]
    return LayerSums(
        counts=sum(counts[1:], start=counts[0]) if counts else None,
        histogram=sum(histograms[1:], start=histograms[0]) if histograms else None,
        gate_squares=_add_squares([part.gate_squares for part in parts]),
        up_squares=_add_squares([part.up_squares for part in parts]),
        inside=_add_inside(inside) if inside else None,
    )


def _add_inside(parts: Sequence[ExpertSums]) -> ExpertSums:
    return ExpertSums(
        tokens=sum((part.tokens for part in parts[1:]), start=parts[0].tokens),
        active=sum((part.active for part in parts[1:]), start=parts[0].active),
    )


def _add_squares(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Saturating addition, which is associative, too, for values that are not negative."""
    total = parts[0]
    for part in parts[1:]:
        total = np.minimum(total + part, SQUARE_LIMIT - SQUARE_GRID)
    return total
