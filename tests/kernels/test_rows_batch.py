"""Sums of rows for many tokens have the bits of one token at a time, and read no row whose coefficient is
zero."""

import numpy as np
import pytest

from powerinfer_kernels import Bundle, Pool, ProgramBuilder, RowType, aligned, available_isas, block_shape
from random_rows import random_rows

ROWS = 1100  # two whole chunks and a piece


def sums(
    data: np.ndarray, row_type: RowType, h: np.ndarray, columns: int, isa: str, at_once: int, threads: int = 1
) -> np.ndarray:
    """Σ h_i row_i for all tokens of h, `at_once` in one run."""
    tokens = len(h)
    source, out = aligned((at_once, ROWS), np.float32), aligned((at_once, columns), np.float32)
    builder = ProgramBuilder(at_once)
    results = []
    with Pool(threads, isa) as pool:
        builder.sum_rows(source, Bundle.pack(pool, ROWS, columns, down=(data, row_type)), out)
        program = builder.build()
        for first in range(0, tokens, at_once):
            count = min(at_once, tokens - first)
            source[:count] = h[first : first + count]
            program.run(pool, 0, 1, count, 0)
            results.append(out[:count].copy())
    return np.concatenate(results)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
def test_many_tokens_have_the_bits_of_one(isa: str, row_type: RowType) -> None:
    """Tokens 5, 9 and 70 have zeros, 71 nothing else in a whole chunk; 77 and 131 are odd."""
    rng = np.random.default_rng(int(row_type))
    columns = 2 * max(48, block_shape(row_type)[0])
    data = random_rows(rng, row_type, ROWS, columns)
    h = rng.standard_normal((131, ROWS)).astype(np.float32)
    h[5, 100] = h[9, 0] = 0.0
    h[70, ::2] = 0.0
    h[71, :512] = 0.0
    expected = sums(data, row_type, h, columns, isa, at_once=1)
    for at_once, threads in ((2, 1), (7, 1), (77, 2), (131, 3)):
        got = sums(data, row_type, h, columns, isa, at_once, threads)
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("columns", [1, 15, 40])
def test_columns_that_are_no_whole_blocks(columns: int) -> None:
    rng = np.random.default_rng(1)
    data = random_rows(rng, RowType.F32, ROWS, columns)
    h = rng.standard_normal((20, ROWS)).astype(np.float32)
    isa = available_isas()[0]
    expected = sums(data, RowType.F32, h, columns, isa, at_once=1)
    np.testing.assert_array_equal(sums(data, RowType.F32, h, columns, isa, at_once=20), expected)


@pytest.mark.parametrize("isa", available_isas())
def test_rows_of_zero_coefficients_are_not_read(isa: str) -> None:
    """Row 3 is NaN; only tokens that use it show that."""
    rng = np.random.default_rng(2)
    data = random_rows(rng, RowType.F32, ROWS, 64).copy()
    data.view(np.float32).reshape(ROWS, 64)[3] = np.nan
    h = rng.standard_normal((10, ROWS)).astype(np.float32)
    h[:9, 3] = 0.0
    got = sums(data, RowType.F32, h, 64, isa, at_once=10)
    assert np.isfinite(got[:9]).all()
    assert np.isnan(got[9]).all()
