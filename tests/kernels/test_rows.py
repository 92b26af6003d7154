"""Plain rows: sums of rows chunk by chunk, and products with the active rows alone."""

import numpy as np
import numpy.typing as npt
import pytest

from powerinfer_kernels import (
    Activations,
    Bundle,
    Matrix,
    Pool,
    ProgramBuilder,
    RowType,
    aligned,
    available_isas,
    block_shape,
    packed_row_bytes,
)
from powerinfer_kernels import reference_quants as reference
from random_rows import U8, random_rows

F32 = npt.NDArray[np.float32]
UNIT = 2.0**-24  # largest relative error of one rounding to float32


def columns_of(row_type: RowType) -> int:
    """Three blocks of 32, two of 64, one of 256, or a number that is no multiple of 16."""
    return 83 if row_type.is_float else -(-96 // block_shape(row_type)[0]) * block_shape(row_type)[0]


def accumulate(isa: str, data: U8, row_type: RowType, h: F32, columns: int, threads: int = 1) -> F32:
    """Σ h_i · row i: float32 [columns]."""
    source, out = aligned((1, len(h)), np.float32), aligned((1, columns), np.float32)
    source[0] = h
    builder = ProgramBuilder(1)
    with Pool(threads, isa) as pool:
        bundle = Bundle.pack(pool, len(h), columns, down=(data, row_type))
        builder.sum_rows(source, bundle, out)
        builder.build().run(pool, 0, 1, 1, 0)
    return np.array(out[0])


def sparse_ffn(
    isa: str,
    gate: F32,
    x: F32,
    rows: dict[str, U8],
    row_type: RowType,
    threads: int,
    scores: F32 | None = None,
) -> F32:
    """One token through a ReLU block, gate-first or with `scores` to select by: float32 [columns]."""
    neurons, columns = len(gate), len(x)
    arrays = [aligned((1, width), np.float32) for width in (neurons, columns, neurons, columns, neurons)]
    select, source, h, out, scratch = arrays
    select[0], source[0] = gate if scores is None else scores, x
    activations = None if row_type.is_float else Activations(1, columns)
    builder = ProgramBuilder(1)
    if activations is not None:
        builder.quantize(source, activations)
    with Pool(threads, isa) as pool:
        bundle = Bundle.pack(pool, neurons, columns, **{k: (v, row_type) for k, v in rows.items()})
        threshold = None if scores is None else np.full(neurons, 0.25, np.float32)
        builder.sparse_ffn(
            select,
            source,
            activations,
            bundle,
            out,
            h,
            "relu",
            threshold=threshold,
            gate=None if scores is None else scratch,
        )
        builder.build().run(pool, 0, builder.mark(), 1, 0)
    return np.array(out[0])


def products(rows: U8, row_type: RowType, x: F32) -> F32:
    """row · x of every row, with the bits of the kernels."""
    if row_type.is_float:
        return reference.float_products(rows, row_type, x[None])[0]
    return reference.products(rows, row_type, *reference.quantize_activations(x[None]))[0]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [1, 15, 511, 512, 513, 1300])
def test_sums_have_the_bits_of_the_emulation(isa: str, row_type: RowType, rows: int) -> None:
    rng = np.random.default_rng(rows)
    columns = columns_of(row_type)
    data = random_rows(rng, row_type, rows, columns)
    h = rng.standard_normal(rows).astype(np.float32)
    h[rng.random(rows) < 0.4] = 0
    want = reference.accumulated(data, row_type, h)
    for threads in (1, 2):
        np.testing.assert_array_equal(accumulate(isa, data, row_type, h, columns, threads), want)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
def test_error_of_sums_is_within_the_bound(isa: str, row_type: RowType) -> None:
    """Against float64 sums of the decoded rows.

    Float rows: an fma per term of a chunk and an addition per chunk, each 2^-24 of what it has added up at
    most. Others: a coefficient h·scale is rounded twice before (2^-24 each, the scale of K types once more)
    and then to a step S, by S / 2 and what the division and the product err; S is the largest |h·scale| of
    the chunk over 32767. With |code| ≤ 128 the sum of a chunk of n rows errs by at most
    n · 128 · S · (1/2 + 1/64); minima in the same way with code 1."""
    rng = np.random.default_rng(9)
    rows, columns = 240, columns_of(row_type)
    data = random_rows(rng, row_type, rows, columns)
    h = rng.standard_normal(rows).astype(np.float32)
    want = h.astype(np.float64) @ reference.dequantize(data, row_type).astype(np.float64)
    if row_type.is_float:
        values = np.abs(reference.dequantize(data, row_type).astype(np.float64))
        bound = (rows + 3) * UNIT * (np.abs(h) @ values)
    else:
        blocks = reference.decode(data, row_type)
        scale = np.abs(blocks.scale.astype(np.float64))
        codes = np.abs(blocks.codes).astype(np.float64)
        if blocks.sub is not None:
            scale = scale * np.abs(blocks.sub).max(axis=2)
        largest = (np.abs(h)[:, None] * scale).max(axis=0)
        step = np.repeat(largest / 32767, 32)
        exact = np.abs(h) @ (scale[:, :, None, None] * codes).reshape(rows, columns)
        bound = rows * 128 * step * (0.5 + 1 / 64) + 8 * UNIT * exact
        if blocks.minimum is not None:
            of_half = np.ones((rows, 1, 2)) if blocks.sub_minimum is None else blocks.sub_minimum
            minimum = (
                np.abs(h)[:, None, None] * np.abs(blocks.minimum.astype(np.float64))[..., None] * of_half
            )
            step = np.repeat(minimum.max(axis=0).ravel() / 32767, 16)
            bound += rows * step * (0.5 + 1 / 64) + 8 * UNIT * np.repeat(minimum.sum(axis=0).ravel(), 16)
    assert (np.abs(accumulate(isa, data, row_type, h, columns) - want) <= bound).all()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
@pytest.mark.parametrize("active", [0, 1, 15, 16, 17, 60])
def test_only_active_rows_are_read(isa: str, row_type: RowType, active: int) -> None:
    """Inactive rows are NaN everywhere; the rest has the bits of the emulation of up and of the sum. With
    scores, every third active neuron is not predicted, and two inactive ones are: of these, nothing but the
    gate row is read."""
    rng = np.random.default_rng(active)
    neurons, columns = 300, columns_of(row_type)
    rows = {kind: random_rows(rng, row_type, neurons, columns) for kind in ("gate", "up", "down")}
    x = rng.standard_normal(columns).astype(np.float32)
    gate = products(rows["gate"], row_type, x)
    chosen = np.sort(rng.permutation(np.flatnonzero(gate > 0))[:active])
    only = np.where(np.isin(np.arange(neurons), chosen), gate, -1).astype(np.float32)
    predicted = np.sort(np.concatenate([np.delete(chosen, np.s_[::3]), np.flatnonzero(gate <= 0)[[3, 40]]]))
    scores = np.where(np.isin(np.arange(neurons), predicted), 1.0, 0.25).astype(np.float32)
    up = products(rows["up"], row_type, x)
    want = reference.accumulated(rows["down"], row_type, np.maximum(only, np.float32(0)) * up)
    kept = np.where(scores > 0.25, np.maximum(gate, np.float32(0)), np.float32(0))
    want_predicted = reference.accumulated(rows["down"], row_type, kept * up)
    some = {kind: data.copy() for kind, data in rows.items()}
    for kind, data in rows.items():  # NaN as a float of any type, and as any block's scale
        data[np.setdiff1d(np.arange(neurons), chosen)] = 0xFF
        read = predicted if kind == "gate" else predicted[gate[predicted] > 0]
        some[kind][np.setdiff1d(np.arange(neurons), read)] = 0xFF
    listed = {kind: rows[kind] for kind in ("up", "down")}
    for threads in (1, 2):
        np.testing.assert_array_equal(sparse_ffn(isa, only, x, listed, row_type, threads), want)
        got = sparse_ffn(isa, gate, x, some, row_type, threads, scores)
        np.testing.assert_array_equal(got, want_predicted)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
def test_chunks_by_thread_have_the_bits_of_columns_by_thread(isa: str, row_type: RowType) -> None:
    """Eight chunks of neurons, the last one smaller and one of them idle. One and two threads take whole
    chunks, since none has more than a third of a thread's active neurons; three share columns."""
    rng = np.random.default_rng(8)
    neurons, columns = 4000, columns_of(row_type)
    rows = {kind: random_rows(rng, row_type, neurons, columns) for kind in ("gate", "up", "down")}
    x = rng.standard_normal(columns).astype(np.float32)
    gate = products(rows["gate"], row_type, x)
    of_chunks = [
        512 * c + np.flatnonzero(gate[512 * c : 512 * (c + 1)] > 0)[:128] for c in range(8) if c != 3
    ]
    chosen = np.concatenate(of_chunks)
    assert 6 * np.bincount(chosen // 512).max() <= len(chosen) < 9 * np.bincount(chosen // 512).max()
    only = np.where(np.isin(np.arange(neurons), chosen), gate, -1).astype(np.float32)
    h = np.maximum(only, np.float32(0)) * products(rows["up"], row_type, x)
    want = reference.accumulated(rows["down"], row_type, h)
    in_vain = np.flatnonzero(gate <= 0)[::40]
    scores = np.full(neurons, 0.25, np.float32)
    scores[chosen] = scores[in_vain] = 1.0
    for kind, data in rows.items():
        read = np.union1d(chosen, in_vain) if kind == "gate" else chosen
        data[np.setdiff1d(np.arange(neurons), read)] = 0xFF
    listed = {kind: rows[kind] for kind in ("up", "down")}
    for threads in (1, 2, 3):
        np.testing.assert_array_equal(sparse_ffn(isa, only, x, listed, row_type, threads), want)
        np.testing.assert_array_equal(sparse_ffn(isa, gate, x, rows, row_type, threads, scores), want)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 8, 9, 17, 65])
def test_odd_widths(isa: str, row_type: RowType, blocks: int) -> None:
    """Rows that end within a line, or a group of lines, have the bits of the emulation."""
    columns = blocks * max(32, block_shape(row_type)[0]) + (7 if row_type.is_float else 0)
    rng = np.random.default_rng(columns)
    rows = {kind: random_rows(rng, row_type, 21, columns) for kind in ("up", "down")}
    x, gate = rng.standard_normal(columns).astype(np.float32), rng.standard_normal(21).astype(np.float32)
    h = np.maximum(gate, np.float32(0)) * products(rows["up"], row_type, x)
    want = reference.accumulated(rows["down"], row_type, h)
    np.testing.assert_array_equal(sparse_ffn(isa, gate, x, rows, row_type, 3), want)


@pytest.mark.parametrize("isa", available_isas())
def test_infinite_coefficients_show(isa: str) -> None:
    data = random_rows(np.random.default_rng(1), RowType.Q4_0, 40, 64)
    h = np.ones(40, np.float32)
    for value in (np.nan, np.inf):
        h[17] = value
        assert not np.isfinite(accumulate(isa, data, RowType.Q4_0, h, 64)).any()


@pytest.mark.parametrize("isa", available_isas())
def test_vanishing_coefficients_add_nothing_wrong(isa: str) -> None:
    """Below the least scale that is divided by, a coefficient counts as nearly zero: never NaN."""
    data = random_rows(np.random.default_rng(1), RowType.Q5_1, 3, 64)
    h = np.array([1e-44, -1e-40, 1e-38], np.float32)
    assert (np.abs(accumulate(isa, data, RowType.Q5_1, h, 64)) <= 1e-30).all()


@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_packing_adds_at_most_three_per_cent_to_whole_tiles(row_type: RowType, rows: int) -> None:
    """Types that are computed in another form have at most 4.75 bits a weight."""
    columns = 512
    data = random_rows(np.random.default_rng(1), row_type, rows, columns)
    with Pool(1) as pool:
        matrix = Matrix.pack(pool, data, row_type, rows, columns)
    packed = packed_row_bytes(row_type, columns)
    padded = -(-rows // 16) * 16 * packed
    assert padded <= matrix.nbytes <= 1.03 * padded
    assert data.shape[1] == packed or data.shape[1] < packed <= columns * 4.75 / 8
