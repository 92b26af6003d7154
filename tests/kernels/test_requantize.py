"""Rows of one type into rows of another, as they are and transposed; and which rows are finite."""

from typing import Any

import numpy as np
import pytest

from powerinfer_kernels import (
    WRITTEN_TYPES,
    KernelError,
    Plain,
    RowType,
    available_isas,
    block_shape,
    dequantize,
    quantize,
    row_bytes,
)
from random_rows import QUANTISED, random_rows

#: Of a value that was rounded, its square, and sums of 64 such in single precision.
_EPSILON = 70 * float(np.finfo(np.float32).eps)
SENTINEL = 0xA5


def made_of(values: np.ndarray[Any, Any], to: RowType) -> tuple[np.ndarray[Any, Any], float, float]:
    """Rows of type ``to``, and Σ of squares of what that changes, and of the values, in float64."""
    values = np.ascontiguousarray(values)
    rows = quantize(values, to)
    error = dequantize(rows, to, *values.shape).astype(np.float64) - values
    return rows, float((error**2).sum()), float((values.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("to", WRITTEN_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
def test_rows_and_columns_become_what_quantize_makes_of_them(
    isa: str, row_type: RowType, to: RowType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 96 rows (float types also of 70) of 768 columns; the rest of `out` stays as it was."""
    monkeypatch.setenv("POWERINFER_ISA", isa)
    rng, columns = np.random.default_rng(5), 768
    block = block_shape(row_type)[0]
    for rows in (96, 70) if to.is_float else (96,):
        data = random_rows(rng, row_type, rows, columns)
        values = dequantize(data, row_type, rows, columns)
        for by_columns, begin, end in ((False, 3, 41), (True, block, 3 * block), (True, 0, columns)):
            part = values.T[begin:end] if by_columns else values[begin:end]
            want, lost, norm = made_of(part, to)
            room = np.full((end - begin, want.shape[1] + 8), SENTINEL, np.uint8)
            plain = Plain(data, row_type, rows, columns)
            got = plain.requantize(begin, end, to, room[:, 4:-4], by_columns=by_columns)
            np.testing.assert_array_equal(room[:, 4:-4], want)
            assert (room[:, :4] == SENTINEL).all()
            assert (room[:, -4:] == SENTINEL).all()
            assert got[0] == pytest.approx(lost, rel=_EPSILON, abs=0)
            assert got[1] == pytest.approx(norm, rel=_EPSILON, abs=0)


@pytest.mark.parametrize(
    ("changed", "shape"),
    [
        ({"begin": -1}, (5, 34)),
        ({"end": 3}, (0, 34)),
        ({"end": 9}, (6, 34)),
        ({"begin": 1, "end": 32, "by_columns": True}, (31, 34)),
        ({}, (5, 33)),
        ({}, (4, 34)),
        ({"to": RowType.Q6_K}, (5, 34)),
    ],
)
def test_wrong_parts_are_refused(changed: dict[str, Any], shape: tuple[int, int]) -> None:
    plain = Plain(np.zeros((8, row_bytes(RowType.Q8_0, 32)), np.uint8), RowType.Q8_0, 8, 32)
    arguments: dict[str, Any] = {"begin": 3, "end": 8, "to": RowType.Q8_0, **changed}
    with pytest.raises(KernelError):
        plain.requantize(out=np.zeros(shape, np.uint8), **arguments)


def test_rows_that_overlap_or_cannot_be_written_are_refused() -> None:
    plain, nbytes = Plain(np.zeros((8, 34), np.uint8), RowType.Q8_0, 8, 32), 34
    rows = np.zeros((8, nbytes), np.uint8)
    overlapping = np.lib.stride_tricks.as_strided(rows, (8, nbytes), (nbytes - 1, 1))
    for out in (overlapping, rows[::-1], rows.astype(np.uint16)):
        with pytest.raises(KernelError):
            plain.requantize(0, 8, RowType.Q8_0, out)  # type: ignore[arg-type]
    rows.flags.writeable = False
    with pytest.raises((KernelError, ValueError, BufferError)):
        plain.requantize(0, 8, RowType.Q8_0, rows)
    with pytest.raises(KernelError):
        Plain(np.zeros(7, np.uint8), RowType.Q8_0, 8, 32).requantize(0, 8, RowType.Q8_0, np.zeros((8, 34)))  # type: ignore[arg-type]


@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
def test_the_first_row_that_is_not_finite(row_type: RowType) -> None:
    """As float32 of any bytes says, row by row."""
    rng = np.random.default_rng(6)
    good = random_rows(rng, row_type, 9, 512)
    assert Plain(good, row_type, 9, 512).first_not_finite() is None
    if row_type in QUANTISED:
        wild = rng.integers(0, 256, (400, row_bytes(row_type, 512)), dtype=np.uint8)
    else:
        wild = random_rows(rng, row_type, 400, 512)
        exponent = np.array([np.nan, np.inf, -np.inf], np.float32).view(np.uint8).reshape(3, 4)
        if row_type == RowType.F16:
            exponent = np.array([np.nan, np.inf, -np.inf], np.float16).view(np.uint8).reshape(3, 2)
        nbytes = row_bytes(row_type, 512) // 512
        for row, kind in ((7, 0), (20, 1), (300, 2)):
            wild[row, 511 * nbytes : 512 * nbytes] = exponent[kind, -nbytes:]
    finite = np.isfinite(dequantize(wild, row_type, 400, 512)).all(axis=1)
    for row in range(400):
        assert (Plain(wild[row], row_type, 1, 512).first_not_finite() is None) == finite[row]
    bad = np.flatnonzero(~finite)
    expected = int(bad[0]) if len(bad) else None
    assert Plain(wild, row_type, 400, 512).first_not_finite() == expected
