"""The activation curve: which share of the neurons makes which share of the activity.

Neurons are sorted by how often they were active, busiest first. The curve at x is the share of all
activations made by the first share x of the neurons. A straight line would mean that all neurons are alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_formats.profile import Profile

Doubles = npt.NDArray[np.float64]
#: Where curves are sampled for output: every percent of the neurons.
SHARES = tuple(percent / 100 for percent in range(101))


@dataclass(frozen=True, eq=False)
class Curve:
    """One curve; ``cumulative`` float64 [neurons + 1] rises from 0 to 1 (or stays 0: nothing was active)."""

    name: str
    cumulative: Doubles

    @classmethod
    def of(cls, name: str, counts: npt.NDArray[np.uint64] | npt.NDArray[np.uint32]) -> "Curve":
        """The curve of neurons that were active ``counts`` times."""
        descending = np.sort(counts)[::-1].astype(np.float64)
        total = max(float(descending.sum()), 1.0)
        return cls(name, np.concatenate(([0.0], np.cumsum(descending) / total)))

    def activity(self, share: float) -> float:
        """The share of the activity made by ``share`` of the neurons, by linear interpolation."""
        return float(
            np.interp(share * (len(self.cumulative) - 1), np.arange(len(self.cumulative)), self.cumulative)
        )

    def neurons_for(self, activity: float) -> float:
        """The smallest share of the neurons that makes at least ``activity`` of the activity."""
        # Rounding may leave the last sum a few units in the last place below 1.
        reached = np.flatnonzero(self.cumulative >= activity - 1e-12)
        return float(reached[0] / (len(self.cumulative) - 1)) if len(reached) else 1.0

    def points(self, shares: Sequence[float] = SHARES) -> list[float]:
        """The curve at ``shares`` of the neurons."""
        return [self.activity(share) for share in shares]


@dataclass(frozen=True, eq=False)
class Inside:
    """The neurons inside the experts of ``layer``: ``mean`` share of an expert's neurons that is active for a
    token that takes it, ``shares`` [experts] of each, and the ``curve`` of all its experts' neurons."""

    layer: int
    mean: float
    shares: Doubles
    curve: Curve

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "layer": self.layer,
            "active": self.mean,
            "least": float(self.shares.min()),
            "most": float(self.shares.max()),
            "neurons_for_80_percent": self.curve.neurons_for(0.8),
        }


@dataclass(frozen=True)
class Curves:
    """The curves of a profile: of all neurons together, and of each layer's; ``inside`` experts, of the
    layers whose experts' neurons were counted."""

    model: Curve
    layers: tuple[Curve, ...]
    inside: tuple[Inside, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: shares of neurons, and the curves' values at these."""
        values = {
            "neurons": list(SHARES),
            "model": self.model.points(),
            "layers": [layer.points() for layer in self.layers],
        }
        if self.inside:
            values["inside_experts"] = [layer.curve.points() for layer in self.inside]
        return values


def activation_curves(profile: Profile) -> Curves:
    """The curves of ``profile``."""
    counts = [profile.counts(layer) for layer in range(profile.layers)]
    layers = tuple(Curve.of(f"layer {index}", layer) for index, layer in enumerate(counts))
    inside = (inside_experts(profile, index) for index in range(profile.layers))
    return Curves(Curve.of("model", np.concatenate(counts)), layers, tuple(one for one in inside if one))


def inside_experts(profile: Profile, layer: int) -> Inside | None:
    """What the neurons inside the experts of ``layer`` did; None where that was not counted."""
    sums, shares = profile.sums[layer].inside, profile.expert_density(layer)
    mean = profile.density_inside(layer)
    if sums is None or shares is None or mean is None:
        return None
    return Inside(layer, mean, shares, Curve.of(f"inside layer {layer}", sums.active.ravel()))


def summarize_profile(profile: Profile) -> dict[str, Any]:
    """A profile in a few figures, as plain JSON values."""
    curves = activation_curves(profile)
    densities = [profile.density(layer) for layer in range(profile.layers)]
    neurons = [profile.neurons(layer) for layer in range(profile.layers)]
    summary = {
        "model": profile.model_name,
        "fingerprint": profile.fingerprint,
        "architecture": profile.architecture,
        "activation": profile.activation,
        "exact_zeros": profile.exact_zeros,
        "tokens": profile.tokens,
        "window": profile.window,
        "target_density": profile.target_density,
        "density": float(np.average(densities, weights=neurons)),
        "neurons_for_80_percent": curves.model.neurons_for(0.8),
        "corpus": [dict(vars(entry)) for entry in profile.corpus],
        "layers": [
            {
                "index": index,
                "neurons": neurons[index],
                "density": densities[index],
                "threshold": float(profile.thresholds[index]),
                "neurons_for_80_percent": curves.layers[index].neurons_for(0.8),
            }
            for index in range(profile.layers)
        ],
    }
    if curves.inside:
        summary["active_in_experts"] = _mean_inside(profile)
        summary["inside_experts"] = [layer.as_dict() for layer in curves.inside]
    return summary


def _mean_inside(profile: Profile) -> float:
    """The share of the neurons of the experts that tokens took that was active, of all layers."""
    sums = [layer.inside for layer in profile.sums if layer.inside is not None]
    every = sum(int(one.tokens.sum(dtype=np.uint64)) * int(one.active.shape[1]) for one in sums)
    return sum(int(one.active.sum(dtype=np.uint64)) for one in sums) / max(every, 1)
