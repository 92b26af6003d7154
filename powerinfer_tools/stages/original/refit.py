"""Our predictors in the form of the original PowerInfer.

Ours: o·A·x > τ, with x = (h − c)/s ∘ w + b the normalised residual stream h (s its root mean square or
standard deviation, c its mean for layer norms and 0 otherwise). Times s, that is o·Ã·h − τ̃·s > 0, with
Ã = A·diag(w)·(centring) and τ̃ = τ − o·A·b: linear in h but for s. The form wanted is o'·relu(A'·h) ≥ 0.

- z = relu(z) − relu(−z), so linear maps need two hidden units for each row of Ã, and are exact.
- s is a function of degree 1, as is relu(u·h); and the residual streams of transformers have a few channels
  that dominate their size, so u is fitted to make u·h ≈ s: by ridge regression of 1 on the directions
  (x − b)/w of a trace. One more hidden unit holds it, with the weights −τ̃.

How good the result is on records that u was not fitted to is measured, and reported.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_formats.predictors import LowRank, Quality
from powerinfer_tools.model.tensors import Norm
from powerinfer_tools.stages.train.naming import quality

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
#: Added to the second moments, as a share of their mean.
_RIDGE = 1e-3
#: Hidden units come in whole blocks, so that any row type can hold them.
BLOCK = 32


@dataclass(frozen=True)
class OriginalPredictor:
    """``inward`` (rank, width) and ``outward`` (neurons, rank): active where outward·relu(inward·h) ≥ 0."""

    inward: Floats
    outward: Floats


def units(rank: int) -> int:
    """Hidden units for a predictor of ``rank``."""
    return -(-(2 * rank + 1) // BLOCK) * BLOCK


def directions(norm: Norm, inputs: Floats) -> Doubles:
    """(h − c)/s from normalised inputs (t, width); 0 in channels that the norm removes."""
    values = inputs.astype(np.float64) - (0.0 if norm.bias is None else norm.bias)
    weight = norm.weight.astype(np.float64)
    return np.divide(values, weight, out=np.zeros_like(values), where=weight != 0)


def refit(layer: LowRank, norm: Norm, inputs: Floats) -> OriginalPredictor:
    """``layer`` in the other form; ``inputs`` (t, width) are normalised FFN inputs of a trace."""
    linear = _centred(norm, layer.inward.astype(np.float64) * norm.weight)
    bound = layer.threshold.astype(np.float64)
    if norm.bias is not None:
        bound = bound - layer.outward.astype(np.float64) @ (layer.inward.astype(np.float64) @ norm.bias)
    rank = len(linear)
    inward = np.zeros((units(rank), linear.shape[1]))
    outward = np.zeros((len(layer.outward), len(inward)))
    inward[:rank], inward[rank : 2 * rank] = linear, -linear
    outward[:, :rank], outward[:, rank : 2 * rank] = layer.outward, -layer.outward
    inward[2 * rank] = _centred(norm, size_of(directions(norm, inputs)))
    outward[:, 2 * rank] = -bound
    return OriginalPredictor(inward.astype(np.float32), outward.astype(np.float32))


def size_of(values: Doubles) -> Doubles:
    """u (width) with u·d ≈ 1 for directions d, ``values`` (t, width), which have a root mean square of 1."""
    moments = values.T @ values / len(values)
    moments[np.diag_indices_from(moments)] += _RIDGE * np.trace(moments) / len(moments)
    solved: Doubles = np.linalg.solve(moments, values.mean(axis=0))
    return solved


def _centred(norm: Norm, rows: Doubles) -> Doubles:
    """rows · (h − c) as rows · h."""
    return rows - rows.mean(axis=-1, keepdims=True) if norm.kind == "layer" else rows


def judge(made: OriginalPredictor, norm: Norm, inputs: Floats, active: Bools) -> Quality:
    """How good ``made`` is on ``inputs`` (t, width) with the neurons ``active`` (t, neurons).

    Directions stand for residual streams: their size cannot change the sign of the score.
    """
    hidden = np.maximum(directions(norm, inputs).astype(np.float32) @ made.inward.T, 0.0)
    predicted = hidden @ made.outward.T >= 0
    return quality(predicted, active)
