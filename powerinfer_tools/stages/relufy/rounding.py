"""Changes of matrices as small integers: how a delta gets small."""

import numpy as np
import numpy.typing as npt

from powerinfer_formats.delta import MAX_EXPONENT, Change, Scaled

Floats = npt.NDArray[np.float32]
#: Error of a whole change, as a share of what it does: the errors of all layers add up.
NOISE = 0.006
#: Steps in the root mean square of a component of a low-rank change: about 5 bits of a value after packing.
FACTOR_STEPS = 8.0
_LARGEST = 127


def round_matrix(change: Floats, input_rms: Floats, noise: float = NOISE) -> Change:
    """``change`` (rows, columns) in steps that are coarser for columns whose inputs (root mean square
    ``input_rms``) are smaller, so that each column errs alike.

    Taken one by one, column *j* with step s_j errs by rms_j²·s_j²/12 in the mean square of every output;
    the sum of all is ``noise`` of the median over rows of Σ_j rms_j²·change_ij².
    """
    done = float(np.median((change.astype(np.float64) ** 2 * input_rms.astype(np.float64) ** 2).sum(axis=1)))
    each = np.sqrt(12 * noise * done / change.shape[1])
    return Change(scaled(change, each / np.maximum(input_rms, 1e-6 * input_rms.max() + 1e-30)))


def round_factors(outward: Floats, inward: Floats) -> Change:
    """outward · inward, (rows, rank) and (rank, columns), each component in steps of its own."""
    return Change(scaled(outward, _component_steps(outward)), scaled(inward.T, _component_steps(inward.T)))


def _component_steps(factor: Floats) -> npt.NDArray[np.float64]:
    """Steps of the columns of ``factor``; those of weak ones stay within 2^-10 of the strongest's, so that
    the exponents of a product are as near together as a delta needs them."""
    rms = np.sqrt(np.mean(np.square(factor, dtype=np.float64), axis=0))
    steps: npt.NDArray[np.float64] = np.maximum(rms, rms.max() / 1024) / FACTOR_STEPS
    return steps


def scaled(values: npt.NDArray[np.floating], steps: npt.NDArray[np.float64]) -> Scaled:
    """``values`` in about these steps, one for each column; larger ones where eight bits would not reach."""
    reach = np.abs(values).max(axis=0) / _LARGEST
    exponents = np.maximum(np.round(np.log2(np.maximum(steps, 2.0**-MAX_EXPONENT))), _ceil_log2(reach))
    exponents = np.clip(exponents, -MAX_EXPONENT, MAX_EXPONENT)
    codes = np.rint(np.ldexp(values.astype(np.float64), -exponents.astype(np.int32)))
    return Scaled(np.clip(codes, -_LARGEST, _LARGEST).astype(np.int8), exponents.astype(np.int8))


def _ceil_log2(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.ceil(np.log2(np.maximum(values, 2.0**-MAX_EXPONENT)))
