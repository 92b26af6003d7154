"""The training-free predictor of one layer: its gate, cut to the rank that matters for the inputs seen."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_formats.predictors import LowRank, Quality
from powerinfer_kernels import RowType, dequantize, quantize

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
#: Added to the covariance, as a share of its mean variance: inputs that were never seen are not impossible.
_RIDGE = 1e-3
#: Bisection steps for the threshold: beyond single precision of any sensible range.
_STEPS = 40


@dataclass(frozen=True)
class Factors:
    """inward (width, width) and outward (neurons, width), in order of weight: the first k rows and columns
    are the best approximation of rank k."""

    inward: Floats
    outward: Floats


def factorize(gate: Floats, inputs: Floats) -> Factors:
    """Factors of ``gate`` (neurons, width) that minimise E‖(gate − outward·inward)·x‖² over ``inputs``
    (t, width), for every rank at once.

    With E[x·xᵀ] = L·Lᵀ, that is the truncated singular value decomposition of gate·L (Eckart and Young,
    1936), here through the eigenvectors of (gate·L)ᵀ·(gate·L).
    """
    covariance = (inputs.T @ inputs).astype(np.float64) / len(inputs)
    covariance[np.diag_indices_from(covariance)] += _RIDGE * np.trace(covariance) / len(covariance)
    root = np.linalg.cholesky(covariance)
    weighted = gate.astype(np.float64) @ root
    _, vectors = np.linalg.eigh(weighted.T @ weighted)
    vectors = vectors[:, ::-1]
    inward = np.linalg.solve(root.T, vectors).T
    return Factors(inward.astype(np.float32), (weighted @ vectors).astype(np.float32))


def as_stored(rows: Floats, row_type: RowType) -> Floats:
    """``rows`` after the rounding of ``row_type``, which is how the engine will have them."""
    return dequantize(quantize(np.ascontiguousarray(rows), row_type).reshape(-1), row_type, *rows.shape)


def predictor(
    factors: Factors,
    rank: int,
    row_type: RowType,
    gate: Floats,
    learn: Floats,
    check: tuple[Floats, Bools],
    recall: float,
    bias: Floats | None = None,
) -> LowRank:
    """The predictor of ``rank``: errors of its scores are learnt on inputs ``learn``, and thresholds are set
    so that it finds the share ``recall`` of the active neurons in ``check`` (inputs, active).

    A neuron's score is its gate plus an error of some mean and deviation, so it is predicted where the
    probability of a positive gate, Φ((score − mean) / deviation), is above a bound common to the layer: the
    rule that finds most active neurons for a number of predicted ones. ``bias`` (neurons) is what the model
    adds to the gate; it becomes part of the mean.
    """
    inward = as_stored(factors.inward[:rank], row_type)
    outward = as_stored(factors.outward[:, :rank], row_type)
    gates = learn @ gate.T if bias is None else learn @ gate.T + bias
    errors = _scores(inward, outward, learn) - gates
    mean, deviation = errors.mean(axis=0), errors.std(axis=0) + 1e-12
    inputs, active = check
    normal = (_scores(inward, outward, inputs) - mean) / deviation
    low, high = float(normal.min()) - 1.0, float(normal.max()) + 1.0
    wanted = recall * max(1, int(active.sum()))
    scores_of_active = np.sort(normal[active])
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = len(scores_of_active) - np.searchsorted(scores_of_active, middle, side="right")
        low, high = (middle, high) if found >= wanted else (low, middle)
    return LowRank(inward, outward, (mean + deviation * low).astype(np.float32))


def judge(made: LowRank, inputs: Floats, active: Bools) -> Quality:
    """How good ``made`` is on ``inputs`` (t, width) with the neurons ``active`` (t, neurons)."""
    predicted = _scores(made.inward, made.outward, inputs) > made.threshold
    both, named, true = int((predicted & active).sum()), int(predicted.sum()), int(active.sum())
    return Quality(
        density=true / active.size,
        predicted_density=named / active.size,
        recall=both / true if true else 1.0,
        precision=both / named if named else 1.0,
    )


def _scores(inward: Floats, outward: Floats, inputs: Floats) -> Floats:
    return np.asarray(inputs @ inward.T @ outward.T, np.float32)
