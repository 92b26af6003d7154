"""The training-free predictor of one layer: its gate, cut to the rank that matters for the inputs seen."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_formats.predictors import LowRank
from powerinfer_kernels import RowType, dequantize, quantize

Floats = npt.NDArray[np.float32]
#: Added to the covariance, as a share of its mean variance: inputs that were never seen are not impossible.
_RIDGE = 1e-3


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


def cut(factors: Factors, rank: int, row_type: RowType) -> LowRank:
    """The approximation of ``rank``, rounded to ``row_type``, with thresholds of zero."""
    return LowRank(
        as_stored(factors.inward[:rank], row_type),
        as_stored(factors.outward[:, :rank], row_type),
        np.zeros(len(factors.outward), np.float32),
    )
