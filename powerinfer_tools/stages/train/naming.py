"""From what a predictor says of neurons to which of them it names: thresholds, and how good they are."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from powerinfer_formats.predictors import LayerPredictor, LowRank, Quality, SignBits
from powerinfer_tools.model.predictor_scores import scores

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
#: Bisection steps for a level: beyond single precision of any sensible range.
_STEPS = 40


@dataclass(frozen=True)
class Fit:
    """A predictor before its thresholds.

    A neuron's score times its ``scale`` is its gate, ``mean`` and an error of some ``deviation`` added, so it
    is named where the probability of a positive gate, Φ((scale · score − mean) / deviation), is above a level
    common to the layer: the rule that finds most active neurons for a number of named ones. ``in_gates``
    tells that deviations are in units of the gate, which those of tuned predictors are not.
    """

    made: LowRank | SignBits
    scale: Floats
    mean: Floats
    deviation: Floats
    in_gates: bool = True

    def normal(self, inputs: Floats) -> Floats:
        """(scale · score − mean) / deviation of every neuron, (t, neurons)."""
        return (self.scale * scores(self.made, inputs) - self.mean) / self.deviation

    def threshold(self, level: float) -> Floats:
        """Thresholds (neurons) for a level of :meth:`normal`."""
        return np.asarray((self.mean + self.deviation * level) / self.scale, np.float32)

    def at(self, level: float) -> LowRank | SignBits:
        """The predictor."""
        return replace(self.made, threshold=self.threshold(level))


def fit(made: LowRank | SignBits, learn: Floats, true: Floats) -> Fit:
    """``made`` with its errors about the gates ``true`` (t, neurons) of inputs ``learn`` (t, width)."""
    said = scores(made, learn)
    centred = said - said.mean(axis=0)
    squares = np.maximum((centred * centred).mean(axis=0), np.float32(1e-20))
    # Never zero or negative, so that a threshold on the score exists.
    scale = np.maximum((centred * true).mean(axis=0) / squares, np.float32(1e-6))
    errors = scale * said - true
    return Fit(made, scale, errors.mean(axis=0), errors.std(axis=0) + np.float32(1e-12))


def level_for(normal: Floats, active: Bools, recall: float) -> float:
    """The highest level at which ``normal`` (t, neurons) finds the share ``recall`` of the ``active``."""
    low, high = float(normal.min()) - 1.0, float(normal.max()) + 1.0
    needed = recall * max(1, int(active.sum()))
    of_active = np.sort(normal[active])
    for _ in range(_STEPS):
        middle = (low + high) / 2
        hits = len(of_active) - np.searchsorted(of_active, middle, side="right")
        low, high = (middle, high) if hits >= needed else (low, middle)
    return low


def named(made: LayerPredictor, inputs: Floats, active: Bools) -> Bools:
    """The neurons that ``made`` names for ``inputs`` (t, width): without a predictor, those ``active``."""
    if made is None:
        return active
    return scores(made, inputs) > made.threshold


def judge(made: LayerPredictor, inputs: Floats, active: Bools) -> Quality:
    """How good ``made`` is on ``inputs`` (t, width) with the neurons ``active`` (t, neurons)."""
    return quality(named(made, inputs, active), active)


def quality(predicted: Bools, active: Bools) -> Quality:
    """What naming ``predicted`` means where ``active`` is the truth, both (t, neurons)."""
    both, count, true = int((predicted & active).sum()), int(predicted.sum()), int(active.sum())
    return Quality(
        density=true / active.size,
        predicted_density=count / active.size,
        recall=both / true if true else 1.0,
        precision=both / count if count else 1.0,
    )
