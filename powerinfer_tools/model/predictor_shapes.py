"""Predictors as the planner sees them: bytes, and how many neurons they name."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_formats.block_types import TensorType, row_bytes
from powerinfer_tools.model.matrices import FLOAT_TYPES, TILE_ROWS, round_up

Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
_F32 = 4
_BLOCK = 32
#: Halvings of the search for the factor of :func:`predicted_frequencies`.
_BISECTIONS = 60


@dataclass(frozen=True)
class PredictorShape:
    """The predictor of one layer. Bytes: ``shared_bytes`` that all neurons share, ``neuron_bytes`` of each
    neuron, ``token_bytes`` of scratch for each token of a batch. ``overshoot``: predicted share of neurons
    over the active share."""

    shared_bytes: int
    neuron_bytes: int
    token_bytes: int
    overshoot: float

    def nbytes(self, neurons: Integers) -> Integers:
        """Bytes of the predictor of so many ``neurons``; none for no neurons."""
        return np.where(neurons > 0, self.shared_bytes + self.neuron_bytes * neurons, 0)


def low_rank(rank: int, row_type: TensorType, width: int, overshoot: float) -> PredictorShape:
    """(rank, width) and (neurons, rank) matrices of ``row_type``, and a threshold for each neuron; as scratch
    the input's short form, and its quantised copy where the rows are quantised. The inward matrix is packed
    as tiles; the padding of the outward one, up to 15 rows, is not counted."""
    quantised = 0 if row_type in FLOAT_TYPES else rank + 2 * _F32 * (rank // _BLOCK)
    return PredictorShape(
        shared_bytes=round_up(rank, TILE_ROWS) * row_bytes(row_type, width),
        neuron_bytes=row_bytes(row_type, rank) + _F32,
        token_bytes=_F32 * rank + quantised,
        overshoot=overshoot,
    )


Predictors = tuple[PredictorShape | None, ...]


def predicted_frequencies(frequencies: Vector, overshoot: float) -> Vector:
    """How often each neuron is named by a predictor that names ``overshoot`` times as many as are active.

    min(1, c·f), with c such that the mean is ``overshoot`` times that of ``frequencies`` [neurons] (or 1):
    what is active often is named always, the surplus falls on all others in proportion.
    """
    target = min(1.0, overshoot * float(frequencies.mean()))
    if not frequencies.any():
        return frequencies
    low, high = 0.0, 1.0 / float(frequencies[frequencies > 0].min())
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if float(np.minimum(1.0, middle * frequencies).mean()) < target:
            low = middle
        else:
            high = middle
    return np.minimum(1.0, high * frequencies)
