"""What thresholds of one layer would leave out, from a sample of its neurons' factors.

A neuron contributes act(gate)·up. One factor is computed for all neurons, weighted by the root mean square of
the other (from the profile) it says how much the neuron is likely to contribute, and neurons below are left
out: |factor| ≤ θ / rms(other). Which factor is the better to know differs from layer to layer, and within a
layer by how many neurons are left out: the gate tells the largest contributions apart, up the smallest ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_formats.thresholds import Factor

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
#: Shares of the neurons that are computed: the steps of the search.
DENSITIES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
_SMALLEST = 1e-20


@dataclass(frozen=True)
class Sample:
    """Factors of some tokens, act(gate) and up, float32 (tokens, neurons), and what weights each:
    ``other_rms[factor]`` (neurons,) the root mean square of the factor that is not known."""

    gate: Floats
    up: Floats
    other_rms: dict[str, Doubles]

    def known(self, factor: Factor) -> Floats:
        """The factor that is compared."""
        return self.gate if factor == "gate" else self.up


@dataclass(frozen=True)
class Candidate:
    """One layer: for each of :data:`DENSITIES` the ``factors`` entry that is compared, the share of
    Σ (act(gate)·up)² that is left out (``lost``), and the threshold ``theta`` of the weighted factor."""

    factors: tuple[Factor, ...]
    lost: tuple[float, ...]
    theta: tuple[float, ...]

    def thresholds(self, step: int, sample: Sample) -> Floats:
        """float32 (neurons,) of density ``step``; below zero, so that nothing is left out, for the first."""
        weights = np.maximum(sample.other_rms[self.factors[step]], _SMALLEST)
        if step == 0:
            return np.full(len(weights), -1.0, np.float32)
        limit = float(np.finfo(np.float32).max)
        return np.minimum(self.theta[step] / weights, limit).astype(np.float32)


def candidate(factor: Factor, sample: Sample) -> Candidate:
    """What each density leaves out of ``sample`` if ``factor`` is compared."""
    score = np.abs(sample.known(factor)) * sample.other_rms[factor]
    energy = np.square(sample.gate.astype(np.float64) * sample.up)
    order = np.argsort(score, axis=None)
    ranked = score.reshape(-1)[order]
    below = np.concatenate([[0.0], np.cumsum(energy.reshape(-1)[order])])
    counts = [round((1 - density) * len(order)) for density in DENSITIES]
    total = max(float(below[-1]), _SMALLEST)
    return Candidate(
        factors=(factor,) * len(DENSITIES),
        lost=tuple(float(below[count]) / total for count in counts),
        theta=tuple(float(ranked[count - 1]) if count else 0.0 for count in counts),
    )


def best_candidate(sample: Sample) -> Candidate:
    """At each density, the factor that leaves out less of what neurons contribute."""
    gate, up = candidate("gate", sample), candidate("up", sample)
    better = [gate if a <= b else up for a, b in zip(gate.lost, up.lost, strict=True)]
    return Candidate(
        factors=tuple(one.factors[step] for step, one in enumerate(better)),
        lost=tuple(one.lost[step] for step, one in enumerate(better)),
        theta=tuple(one.theta[step] for step, one in enumerate(better)),
    )


def greedy_path(lost: Sequence[Sequence[float]], prices: Sequence[float]) -> list[tuple[int, int]]:
    """All steps (layer, density step) in the order in which they are worth taking.

    ``lost[layer][step]`` is what a layer loses at a step and ``prices[layer]`` what a unit of it costs in
    divergence. A layer's next step is the one with the least cost per neuron saved, however far, so that a
    cheap step behind a dear one is found; ties go to the earlier layer.
    """
    place = [0] * len(lost)
    path: list[tuple[int, int]] = []
    last = len(DENSITIES) - 1
    while any(step < last for step in place):
        offers = []
        for layer, step in enumerate(place):
            for further in range(step + 1, last + 1):
                saved = DENSITIES[step] - DENSITIES[further]
                cost = prices[layer] * max(0.0, lost[layer][further] - lost[layer][step])
                offers.append((cost / saved, layer, further))
        _, layer, step = min(offers)
        place[layer] = step
        path.append((layer, step))
    return path
