"""Whether predictors find the neurons that are active: the truth, computed beside the prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from powerinfer_kernels import Matrix
from powerinfer_tools.engine.buffers import Floats


@dataclass(frozen=True)
class GateAndUp:
    """All gate and up rows of the neurons that a predictor scores. Without a gate projection, ``gate`` holds
    the up rows and ``up`` is None. ``bias`` (neurons) is added to the products of ``gate``."""

    gate: Matrix
    up: Matrix | None
    bias: Floats | None = None


@dataclass
class RecallCheck:
    """Counts, for one layer and over tokens, the active neurons, the active neurons that were predicted
    (``found``), all predicted neurons (``named``) and all neurons.

    After the operations before ``after`` have run, ``scores`` and ``hidden`` (tokens, neurons) hold the
    predictor's scores and act(gate)·up. A neuron is predicted if its score is above ``threshold`` (neurons,),
    and active if it contributes anything. The result of the layer does not depend on this.
    """

    after: int
    scores: Floats
    threshold: Floats
    hidden: Floats
    hits: int = 0
    active: int = 0
    named: int = 0
    neurons: int = 0

    def count(self, tokens: int) -> None:
        """Count the first ``tokens`` rows. A score that is NaN counts as above its threshold, as it does in
        the kernels."""
        active = self.hidden[:tokens] != 0
        missed = self.scores[:tokens] <= self.threshold
        self.active += int(np.count_nonzero(active))
        self.hits += int(np.count_nonzero(active & ~missed))
        self.named += missed.size - int(np.count_nonzero(missed))
        self.neurons += missed.size


class Counted(Protocol):
    """Counts over tokens."""

    @property
    def active(self) -> int:
        """Neurons that contribute anything."""

    @property
    def hits(self) -> int:
        """Active neurons that were predicted."""

    @property
    def named(self) -> int:
        """Neurons that were predicted."""

    @property
    def neurons(self) -> int:
        """All neurons."""


@dataclass(frozen=True)
class HotFound:
    """The hot device's counts for one layer."""

    active: int
    hits: int
    named: int
    neurons: int


def recall_of(checks: Sequence[Counted]) -> float | None:
    """Share of the active neurons that were predicted; None where nothing was checked or active."""
    active = sum(check.active for check in checks)
    return sum(check.hits for check in checks) / active if active else None
