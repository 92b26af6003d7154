"""Plain rows: sums of rows chunk by chunk, and products with the active rows alone."""

import numpy as np
import numpy.typing as npt
import pytest

from powerinfer_kernels import (
    Activations,
    Matrix,
    Pool,
    ProgramBuilder,
    RowMatrix,
    RowType,
    aligned,
    available_isas,
    block_shape,
)
from powerinfer_kernels import reference_quants as reference
from random_rows import U8, random_rows

F32 = npt.NDArray[np.float32]
UNIT = 2.0**-24  # largest relative error of one rounding to float32


def columns_of(row_type: RowType) -> int:
    """Three blocks of 32, one super-block, or a number that is no multiple of 16."""
    return 83 if row_type.is_float else max(96, block_shape(row_type)[0])


def accumulate(isa: str, data: U8, row_type: RowType, h: F32, columns: int, threads: int = 1) -> F32:
    """Σ h_i · row i: float32 [columns]."""
    source, out = aligned((1, len(h)), np.float32), aligned((1, columns), np.float32)
    source[0] = h
    builder = ProgramBuilder(1)
    builder.accumulate_rows(source, RowMatrix(data, row_type, len(h), columns), out)
    with Pool(threads, isa) as pool:
        builder.build().run(pool, 0, 1, 1, 0)
    return np.array(out[0])


def gate_first(isa: str, gate: F32, x: F32, up: U8, down: U8, row_type: RowType, threads: int) -> F32:
    """One token through a gate-first ReLU block: float32 [columns]."""
    neurons, columns = len(gate), len(x)
    arrays = [aligned((1, width), np.float32) for width in (neurons, columns, neurons, columns)]
    gates, source, h, out = arrays
    gates[0], source[0] = gate, x
    activations = None if row_type.is_float else Activations(1, columns)
    builder = ProgramBuilder(1)
    if activations is not None:
        builder.quantize(source, activations)
    sides = [RowMatrix(data, row_type, neurons, columns) for data in (up, down)]
    builder.gate_first(gates, source, activations, sides[0], sides[1], out, h, "relu")
    with Pool(threads, isa) as pool:
        builder.build().run(pool, 0, builder.mark(), 1, 0)
    return np.array(out[0])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [1, 15, 64, 65, 150])
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
    """Against float64 sums of the decoded rows. A term is rounded at most four times on its way (scale,
    product with h, fma, minimum), once per later term of its chunk (two with a minimum), once per chunk:
    (4 + 2·64 + chunks) · 2^-24 · Σ |h|·(|scale · code| + |minimum|)."""
    rng = np.random.default_rng(9)
    rows, columns = 150, columns_of(row_type)
    data = random_rows(rng, row_type, rows, columns)
    h = rng.standard_normal(rows).astype(np.float32)
    parts = [reference.dequantize(data, row_type).astype(np.float64)]
    if not row_type.is_float:
        blocks = reference.decode(data, row_type)
        scale = blocks.scale.astype(np.float64)[:, :, None, None]
        if blocks.sub is not None:
            scale = scale * blocks.sub[..., None]
        parts = [(scale * blocks.codes).reshape(rows, columns)]
        if blocks.minimum is not None:
            parts.append(np.repeat(blocks.minimum.astype(np.float64), 32, axis=1))
    want = sum(h @ part for part in parts)
    bound = (4 + 2 * 64 + 3) * UNIT * sum(np.abs(h) @ np.abs(part) for part in parts)
    assert (np.abs(accumulate(isa, data, row_type, h, columns) - want) <= bound).all()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
@pytest.mark.parametrize("active", [0, 1, 15, 16, 17, 60])
def test_only_active_rows_are_read(isa: str, row_type: RowType, active: int) -> None:
    """Inactive rows are NaN everywhere; the rest has the bits of the emulation of up and of the sum."""
    rng = np.random.default_rng(active)
    neurons, columns = 150, columns_of(row_type)
    up, down = (random_rows(rng, row_type, neurons, columns) for _ in range(2))
    x = rng.standard_normal(columns).astype(np.float32)
    gate = -np.abs(rng.standard_normal(neurons)).astype(np.float32)
    chosen = np.sort(rng.permutation(neurons)[:active])
    gate[chosen] *= -1
    if row_type.is_float:
        product = reference.float_products(up, row_type, x[None])[0]
    else:
        product = reference.products(up, row_type, *reference.quantize_activations(x[None]))[0]
    h = np.maximum(gate, np.float32(0)) * product
    want = reference.accumulated(down, row_type, h)
    for data in (up, down):
        poisoned = np.setdiff1d(np.arange(neurons), chosen)
        data[poisoned] = 0xFF  # NaN as a float of any type, and as any block's scale
    for threads in (1, 2):
        got = gate_first(isa, gate, x, up, down, row_type, threads)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_packing_adds_at_most_three_per_cent_to_whole_tiles(row_type: RowType, rows: int) -> None:
    columns = 512
    data = random_rows(np.random.default_rng(1), row_type, rows, columns)
    with Pool(1) as pool:
        matrix = Matrix.pack(pool, data, row_type, rows, columns)
    padded = -(-rows // 16) * 16 * data.shape[1]
    assert padded <= matrix.nbytes <= 1.03 * padded
