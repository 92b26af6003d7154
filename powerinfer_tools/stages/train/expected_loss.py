"""Naming neurons by what leaving them out is expected to cost, instead of by how surely they are active.

A neuron's gate, less its cut *c*, is taken to be normal about what the predictor says, as in
:class:`~powerinfer_tools.stages.train.naming.Fit`. Where *z* deviations *σ* above zero are predicted, the
mean square of gate·[gate > c] is c²·Φ + 2cσ·(zΦ + φ) + σ²·((z² + 1)·Φ + zφ), with Φ and φ of *z*. Times the
mean square of what one unit of the gate adds to the FFN's output, that is the loss that is expected of
leaving the neuron out; it grows with *z*, so a limit on it is a threshold on each neuron's score.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.stages.train.naming import Fit, Floats

#: Where thresholds are looked for: beyond, a neuron is named always or never.
_REACH = 12.0
#: Bisection steps: beyond single precision of the range.
_STEPS = 30


class ExpectedLoss:
    """``made`` with the mean square ``weight`` (neurons) of what a unit of each gate adds to the output, and
    the ``cut`` that gates must be above."""

    def __init__(self, made: Fit, weight: Floats, cut: float) -> None:
        self.made, self.cut = made, cut
        self.weight = weight.astype(np.float64)
        self.deviation = made.deviation.astype(np.float64)

    def of(self, normal: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The loss expected of leaving out neurons predicted at ``normal`` (t, neurons) deviations."""
        z: npt.NDArray[np.float64] = normal.astype(np.float64)
        above = _above(z)
        density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        first, second = z * above + density, (z * z + 1) * above + z * density
        squares = self.cut**2 * above + 2 * self.cut * self.deviation * first + self.deviation**2 * second
        return self.weight * np.maximum(squares, 0.0)

    def thresholds(self, limit: float) -> Floats:
        """Thresholds (neurons) on scores above which the expected loss is more than ``limit``."""
        low = np.full((1, len(self.weight)), -_REACH)
        high = -low
        for _ in range(_STEPS):
            middle = (low + high) / 2
            over = self.of(middle) > limit
            low, high = np.where(over, low, middle), np.where(over, middle, high)
        return self.made.threshold(high[0])


def _above(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Φ(z), within 8e-8 (Abramowitz and Stegun, 7.1.26)."""
    x = np.abs(z) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * x)
    steps = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
    series = sum(a * t ** (power + 1) for power, a in enumerate(steps))
    tail = series * np.exp(-x * x) / 2
    return np.where(z > 0, 1 - tail, tail)
