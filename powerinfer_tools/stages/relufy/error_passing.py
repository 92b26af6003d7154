"""Rounding to rows of 4 and 5 bits that knows its inputs: what a column is rounded by is passed on to the
columns after it, as far as their inputs can make up for it (GPTQ, arXiv 2210.17323).

Outputs are sums over columns, so what counts is not how far each weight is from its value, but how far
outputs are. A delta holds how much of an error goes where (:class:`~powerinfer_formats.delta.Passing`), as
small integers; everything here is elementwise IEEE arithmetic in double precision or a sum of products that
is exact in any order, so that the same rows come out on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from powerinfer_formats.delta import MAX_EXPONENT, Passing
from powerinfer_kernels import RowType, quantize, row_bytes
from powerinfer_tools.stages.relufy.rounding import Floats, scaled

Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
BLOCK = 32
#: Added to the diagonal of the second moments, as a share of its mean: columns that hardly vary would
#: otherwise be given everybody's errors.
DAMPING = 0.03
#: Steps in the root mean square of a column of the passing: some 4 bits of a value after packing.
_STEPS = 2.0
#: Ranges that a block's scale is tried for, as a share of the range of its values: without the outermost
#: values the others are finer.
_SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76)
#: Errors are passed on as multiples of the largest value's power of two times this.
_ERROR_STEP = 2.0**-20


@dataclass(frozen=True)
class _Grid:
    """Values of a block: minimum + scale · (0 … ``levels``), with a minimum of the block's own, or, without
    ``has_minimum``, of −scale · ``offset``."""

    levels: int
    has_minimum: bool
    offset: int = 0


_GRIDS = {
    RowType.Q4_0: _Grid(15, has_minimum=False, offset=8),
    RowType.Q4_1: _Grid(15, has_minimum=True),
    RowType.Q5_0: _Grid(31, has_minimum=False, offset=16),
    RowType.Q5_1: _Grid(31, has_minimum=True),
}
PASSING_TYPES = tuple(_GRIDS)


def passing_of(second_moments: Doubles) -> Passing:
    """How errors are passed on where inputs have these second moments, (columns, columns).

    With UᵀU the inverse of the damped moments, U upper triangular, an error of one in column *i* is made up
    for best by −U_ij/U_ii in every column *j* after it.
    """
    sizes = np.diag(second_moments)
    damped = second_moments + np.eye(len(sizes)) * (DAMPING * sizes.mean() + 1e-30)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    shares = np.triu(upper / np.diag(upper)[:, None], 1)
    counts = np.maximum(np.arange(len(sizes)), 1)
    steps = np.sqrt((shares**2).sum(axis=0) / counts) / _STEPS
    exponents = np.round(np.log2(np.maximum(sizes, 2.0**-MAX_EXPONENT)))
    return Passing(scaled(shares, steps), np.clip(exponents, -MAX_EXPONENT, MAX_EXPONENT).astype(np.int8))


def round_rows(values: Floats, row_type: RowType, passing: Passing | None) -> Bytes:
    """uint8 (rows, row_bytes) of ``values`` (rows, columns): the nearest, or, with ``passing``, which one of
    PASSING_TYPES needs, those that leave outputs nearest."""
    if passing is None:
        return quantize(np.ascontiguousarray(values, np.float32), row_type)
    grid = _GRIDS[row_type]
    columns = np.ascontiguousarray(values.T, np.float64)
    codes = np.empty(columns.shape, np.uint8)
    scales, minima = (np.empty((len(columns) // BLOCK, columns.shape[1]), np.float16) for _ in range(2))
    largest = float(np.abs(values).max())
    step = _ERROR_STEP * 2.0 ** np.ceil(np.log2(largest)) if largest else 1.0
    shares = passing.shares.codes.astype(np.float64)
    units = np.ldexp(1.0, passing.shares.exponents.astype(np.int32))
    for number, first in enumerate(range(0, len(columns), BLOCK)):
        end = first + BLOCK
        weights = np.ldexp(1.0, passing.sizes[first:end].astype(np.int32))
        scale, minimum = _best_scale(columns[first:end], weights, grid)
        scales[number], minima[number] = scale, minimum
        errors = np.empty((BLOCK, columns.shape[1]))
        for column in range(first, end):
            code = _codes(columns[column], scale, minimum, grid)
            codes[column] = code
            error = np.rint((columns[column] - (minimum + scale * code)) / step) * step
            errors[column - first] = error
            within = shares[column, column + 1 : end] * units[column + 1 : end]
            columns[column + 1 : end] -= within[:, None] * error
        # Integers times powers of two, of 20, 7 and 5 bits: exact in whatever order they are summed.
        columns[end:] -= (shares[first:end, end:].T @ errors) * units[end:, None]
    return _packed(codes, scales, minima, row_type)


def _codes(values: Doubles, scale: Doubles, minimum: Doubles, grid: _Grid) -> Doubles:
    return np.clip(np.rint((values - minimum) / scale), 0, grid.levels)


def _best_scale(values: Doubles, weights: Doubles, grid: _Grid) -> tuple[Doubles, Doubles]:
    """Scale and minimum (rows), both float16 values, of a block ``values`` (columns, rows): of several
    ranges, each mended by least squares, the one of the least error by ``weights`` (columns)."""
    low, high = values.min(axis=0), values.max(axis=0)
    best: tuple[Doubles, Doubles] | None = None
    least = np.full(values.shape[1], np.inf)
    for shrink in _SHRINK:
        scale, minimum = _start(low, high, shrink, grid)
        codes = _codes(values, scale, minimum, grid)
        scale, minimum = _least_squares(values, codes, weights, (scale, minimum), grid)
        codes = _codes(values, scale, minimum, grid)
        error = _total(weights[:, None] * np.square(values - (minimum + scale * codes)))
        better = error < least
        least = np.where(better, error, least)
        best = (
            (scale, minimum)
            if best is None
            else (
                np.where(better, scale, best[0]),
                np.where(better, minimum, best[1]),
            )
        )
    assert best is not None
    return best


def _start(low: Doubles, high: Doubles, shrink: float, grid: _Grid) -> tuple[Doubles, Doubles]:
    if grid.has_minimum:
        cut = (high - low) * ((1 - shrink) / 2)
        return _halves((high - low) * shrink / grid.levels, low + cut, grid)
    widest = np.where(high > -low, high, low)
    return _halves(-widest * shrink / grid.offset, low, grid)


def _halves(scale: Doubles, minimum: Doubles, grid: _Grid) -> tuple[Doubles, Doubles]:
    """As the file holds them; a scale is never zero."""
    scale = np.clip(scale, -65504, 65504).astype(np.float16).astype(np.float64)
    scale = np.where(scale == 0, 2.0**-24, scale)
    if not grid.has_minimum:
        return scale, -scale * grid.offset
    return scale, np.clip(minimum, -65504, 65504).astype(np.float16).astype(np.float64)


def _least_squares(
    values: Doubles, codes: Doubles, weights: Doubles, start: tuple[Doubles, Doubles], grid: _Grid
) -> tuple[Doubles, Doubles]:
    """Scale and minimum that fit ``codes`` to ``values`` best; ``start`` where they say nothing."""
    by_weight = weights[:, None] * codes
    if not grid.has_minimum:
        shifted = codes - grid.offset
        squares = _total(weights[:, None] * np.square(shifted))
        fitted = _total(weights[:, None] * shifted * values) / np.maximum(squares, 1e-300)
        return _halves(np.where(squares > 0, fitted, start[0]), start[1], grid)
    weight, first, second = float(_total(weights)), _total(by_weight), _total(by_weight * codes)
    value, product = _total(weights[:, None] * values), _total(by_weight * values)
    determinant = weight * second - first * first
    usable = determinant > 1e-12 * weight * second
    safe = np.where(usable, determinant, 1.0)
    scale = np.where(usable, (weight * product - first * value) / safe, start[0])
    minimum = np.where(usable, (second * value - first * product) / safe, start[1])
    return _halves(scale, minimum, grid)


def _total(rows: Sequence[Doubles] | Doubles) -> Doubles:
    """The sum over the first axis, one after the other."""
    return reduce(np.add, rows)


def _packed(
    codes: Bytes, scales: npt.NDArray[np.float16], minima: npt.NDArray[np.float16], row_type: RowType
) -> Bytes:
    """The rows of the file from ``codes`` (columns, rows) and what its blocks have (blocks, rows)."""
    grid = _GRIDS[row_type]
    blocks = np.ascontiguousarray(codes.T).reshape(codes.shape[1], -1, BLOCK)
    parts: list[Bytes] = [np.ascontiguousarray(scales.T)[:, :, None].view(np.uint8)]
    if grid.has_minimum:
        parts.append(np.ascontiguousarray(minima.T)[:, :, None].view(np.uint8))
    if grid.levels > 15:
        parts.append(np.packbits(blocks >> 4, axis=-1, bitorder="little"))
    low, high = blocks[:, :, : BLOCK // 2], blocks[:, :, BLOCK // 2 :]
    parts.append(((low & 15) | (high & 15) << 4).astype(np.uint8))
    rows = np.concatenate(parts, axis=-1).reshape(codes.shape[1], -1)
    assert rows.shape[1] == row_bytes(row_type, codes.shape[0])
    return rows
