"""Activation frequencies of the neurons of a layer, sorted descending: measured by a profile, or modelled
from published figures.

The model is a power law that cannot exceed 1: the neuron at rank share x in (0, 1) is active for f(x) =
min(1, c·x^-b) of the tokens; b and c are such that the mean is the published density and that the busiest
``hot_share`` of the neurons make ``hot_activations`` of the activations (PowerInfer, arXiv 2312.12456,
section 2, finds a power law).
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.shapes import PublishedSparsity

Vector = npt.NDArray[np.float64]
#: Points the curve is fitted on; it is evaluated at the layer's own neuron count.
_POINTS = 4096
_BISECTIONS = 60


def published_frequencies(neurons: int, sparsity: PublishedSparsity) -> Vector:
    """Frequencies [neurons], descending, that follow ``sparsity``.

    Raises PlanError when no such curve exists (the hot share alone cannot hold that many activations).
    """
    exponent, factor = _fit(sparsity)
    ranks = (np.arange(neurons) + 0.5) / neurons
    return np.minimum(1.0, factor * ranks**-exponent)


def _fit(sparsity: PublishedSparsity) -> tuple[float, float]:
    """(b, c) of the curve."""
    density, share, part = sparsity.density, sparsity.hot_share, sparsity.hot_activations
    if not (0 < density <= 1 and 0 < share < part < 1):
        raise PlanError(
            f"sparsity figures are out of range: density {density}, {part} of the activations from "
            f"{share} of the neurons"
        )
    if density * part >= share:
        raise PlanError(
            f"sparsity figures contradict each other: {share} of the neurons cannot make {part} of "
            f"the activations at density {density}"
        )
    ranks = (np.arange(_POINTS) + 0.5) / _POINTS
    hot = ranks < share

    def hot_part(exponent: float) -> float:
        curve = _curve(ranks, exponent, density)
        return float(curve[hot].sum() / curve.sum())

    exponent = _bisect(hot_part, part, 0.0, 16.0)
    return exponent, _factor(ranks, exponent, density)


def _curve(ranks: Vector, exponent: float, density: float) -> Vector:
    return np.minimum(1.0, _factor(ranks, exponent, density) * ranks**-exponent)


def _factor(ranks: Vector, exponent: float, density: float) -> float:
    """c such that the mean of the curve is ``density``."""
    powers = ranks**-exponent
    return _bisect(lambda factor: float(np.minimum(1.0, factor * powers).mean()), density, 0.0, 1.0)


def _bisect(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where the increasing ``function`` reaches ``target`` between ``low`` and ``high``."""
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if function(middle) < target:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
