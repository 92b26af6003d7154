"""Thresholds on the factors of a source model's neurons, for the stage that chooses them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from powerinfer_tools.engine.buffers import Floats


@dataclass(frozen=True)
class FactorThresholds:
    """Of one layer, float32 (neurons,), read anew by every pass: a neuron contributes nothing where
    |act(gate)| is not above ``gate`` or |up| not above ``up``."""

    gate: Floats
    up: Floats

    def clear(self) -> None:
        """Leave nothing out."""
        self.gate[:] = self.up[:] = -1.0


def no_thresholds(layers: int, neurons: int) -> Sequence[FactorThresholds]:
    """Thresholds for every layer that leave nothing out."""
    made = [
        FactorThresholds(np.empty(neurons, np.float32), np.empty(neurons, np.float32)) for _ in range(layers)
    ]
    for thresholds in made:
        thresholds.clear()
    return made
