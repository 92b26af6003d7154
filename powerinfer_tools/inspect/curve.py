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
    def of(cls, name: str, counts: npt.NDArray[np.uint64]) -> "Curve":
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


@dataclass(frozen=True)
class Curves:
    """The curves of a profile: of all neurons together, and of each layer's."""

    model: Curve
    layers: tuple[Curve, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: shares of neurons, and the curves' values at these."""
        return {
            "neurons": list(SHARES),
            "model": self.model.points(),
            "layers": [layer.points() for layer in self.layers],
        }


def activation_curves(profile: Profile) -> Curves:
    """The curves of ``profile``."""
    counts = [profile.counts(layer) for layer in range(profile.layers)]
    layers = tuple(Curve.of(f"layer {index}", layer) for index, layer in enumerate(counts))
    return Curves(Curve.of("model", np.concatenate(counts)), layers)


def summarize_profile(profile: Profile) -> dict[str, Any]:
    """A profile in a few figures, as plain JSON values."""
    curves = activation_curves(profile)
    densities = [profile.density(layer) for layer in range(profile.layers)]
    neurons = [profile.neurons(layer) for layer in range(profile.layers)]
    return {
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
