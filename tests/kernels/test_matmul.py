"""Products with packed matrices: every row type, instruction set, size and number of tokens."""

import numpy as np
import numpy.typing as npt
import pytest

from powerinfer_kernels import (
    Activations,
    Matrix,
    Pool,
    ProgramBuilder,
    RowType,
    aligned,
    available_isas,
    block_shape,
)
from powerinfer_kernels import reference_quants as reference
from random_rows import FLOATS, QUANTISED, U8, extreme_rows, random_rows

F32 = npt.NDArray[np.float32]
UNIT = 2.0**-24  # largest relative error of one rounding to float32


def multiply(
    isa: str,
    data: U8,
    row_type: RowType,
    x: F32,
    threads: int = 1,
    bias: F32 | None = None,
    out: F32 | None = None,
) -> F32:
    """out (+)= data · x + bias through a program: float32 [T, rows]. Adds where `out` is given."""
    tokens, columns = x.shape
    builder = ProgramBuilder(tokens)
    src, result = aligned(x.shape, np.float32), aligned((tokens, len(data)), np.float32)
    src[:] = x
    if out is not None:
        result[:] = out
    activations = None
    if not row_type.is_float:
        activations = Activations(tokens, columns)
        builder.quantize(src, activations)
    with Pool(threads, isa) as pool:
        matrix = Matrix.pack(pool, data, row_type, len(data), columns)
        builder.matmul(matrix, src, activations, result, bias=bias, accumulate=out is not None)
        program = builder.build()
        program.run(pool, 0, builder.mark(), tokens, 0)
    return np.array(result)


def expected_bits(data: U8, row_type: RowType, x: F32) -> F32:
    if row_type.is_float:
        return reference.float_products(data, row_type, x)
    return reference.products(data, row_type, *reference.quantize_activations(x))


def columns_of(row_type: RowType, size: int) -> int:
    """`size` stored blocks; for float types a number that is not a multiple of 4."""
    if row_type.is_float:
        return 37 * size + 2
    return size * block_shape(row_type)[0]


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("rows", "size", "tokens"), [(1, 1, 1), (15, 3, 2), (16, 2, 3), (17, 9, 5), (33, 3, 17)]
)
def test_bits_equal_the_emulation(isa: str, row_type: RowType, rows: int, size: int, tokens: int) -> None:
    rng = np.random.default_rng(rows)
    columns = columns_of(row_type, size)
    data = random_rows(rng, row_type, rows, columns)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    np.testing.assert_array_equal(multiply(isa, data, row_type, x), expected_bits(data, row_type, x))


@pytest.mark.parametrize("row_type", QUANTISED, ids=lambda t: t.name)
def test_error_against_float64_is_within_the_bound(isa: str, row_type: RowType) -> None:
    """Against the exact product of the decoded weights with the quantised activations. Per block at most two
    roundings into the accumulator and three on the way to a term (NVFP4, whose halves are added first, has no
    product that is rounded): (2·blocks + 3) · 2^-24 · Σ |terms|."""
    rng = np.random.default_rng(3)
    columns = columns_of(row_type, 9)
    data = random_rows(rng, row_type, 17, columns)
    x = rng.standard_normal((3, columns)).astype(np.float32)
    q, d, _ = reference.quantize_activations(x)
    exact = (q.reshape(3, -1, 32) * d.astype(np.float64)[..., None]).reshape(3, columns)
    blocks = reference.decode(data, row_type)
    scale = blocks.scale.astype(np.float64)[:, :, None, None] * (
        1 if blocks.sub is None else blocks.sub[..., None]
    )
    parts = [(scale * blocks.codes).reshape(17, columns)]
    if blocks.minimum is not None:
        minimum = np.repeat(blocks.minimum.astype(np.float64), 32, axis=1)
        of_half = (
            1 if blocks.sub_minimum is None else np.repeat(blocks.sub_minimum.reshape(17, -1), 16, axis=1)
        )
        parts.append(minimum * of_half)
    want = sum(exact @ part.T for part in parts)
    magnitude = sum(np.abs(exact) @ np.abs(part).T for part in parts)
    bound = (2 * columns / 32 + 3) * UNIT * magnitude
    assert (np.abs(multiply(isa, data, row_type, x) - want) <= bound).all()


@pytest.mark.parametrize("row_type", FLOATS, ids=lambda t: t.name)
def test_error_of_float_rows_is_within_the_bound(isa: str, row_type: RowType) -> None:
    """Four sums of columns / 4 terms and two additions: (columns / 4 + 3) · 2^-24 · Σ |w|·|x|."""
    rng = np.random.default_rng(4)
    columns = 333
    data = random_rows(rng, row_type, 17, columns)
    x = rng.standard_normal((3, columns)).astype(np.float32)
    weights = reference.dequantize(data, row_type).astype(np.float64)
    bound = (columns / 4 + 3) * UNIT * (np.abs(x) @ np.abs(weights).T)
    assert (np.abs(multiply(isa, data, row_type, x) - x @ weights.T) <= bound).all()


@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
def test_a_token_alone_or_among_many_gives_the_same_bits(isa: str, row_type: RowType) -> None:
    rng = np.random.default_rng(5)
    columns = columns_of(row_type, 3)
    data = random_rows(rng, row_type, 50, columns)
    x = rng.standard_normal((70, columns)).astype(np.float32)
    together = multiply(isa, data, row_type, x, threads=2)
    for tokens in (1, 2, 3, 8):
        np.testing.assert_array_equal(multiply(isa, data, row_type, x[-tokens:]), together[-tokens:])


@pytest.mark.parametrize("row_type", QUANTISED, ids=lambda t: t.name)
def test_largest_codes_do_not_saturate(isa: str, row_type: RowType) -> None:
    """Every code at an end of its range against activations of ±127 in every combination of signs by
    column."""
    columns = columns_of(row_type, 2)
    data = extreme_rows(row_type, columns)
    signs = [np.ones(columns), -np.ones(columns), np.where(np.arange(columns) % 2, 1, -1)]
    signs += [np.where(np.arange(columns) // 2 % 2, 1, -1), np.where(np.arange(columns) // 16 % 2, 1, -1)]
    x = (127 * np.stack(signs)).astype(np.float32)
    want = expected_bits(data, row_type, x)
    assert np.isfinite(want).all()
    np.testing.assert_array_equal(multiply(isa, data, row_type, x), want)
    np.testing.assert_array_equal(multiply(isa, data, row_type, x[:1]), want[:1])


@pytest.mark.parametrize(
    "row_type", [RowType.Q8_0, RowType.Q4_1, RowType.Q6_K, RowType.F32], ids=lambda t: t.name
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_activation_shows_in_its_token_only(isa: str, row_type: RowType, bad: float) -> None:
    rng = np.random.default_rng(6)
    columns = columns_of(row_type, 3)
    data = random_rows(rng, row_type, 17, columns)
    x = rng.standard_normal((5, columns)).astype(np.float32)
    x[2, columns // 2] = bad
    got = multiply(isa, data, row_type, x)
    assert not np.isfinite(got[2]).any()
    np.testing.assert_array_equal(got[[0, 1, 3, 4]], expected_bits(data, row_type, x[[0, 1, 3, 4]]))


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1e-36, 1e30, 3e38])
def test_activations_of_any_magnitude(isa: str, magnitude: float) -> None:
    rng = np.random.default_rng(7)
    x = (rng.uniform(-1, 1, (2, 64)) * magnitude).astype(np.float32)
    data = random_rows(rng, RowType.Q4_1, 16, 64)
    np.testing.assert_array_equal(multiply(isa, data, RowType.Q4_1, x), expected_bits(data, RowType.Q4_1, x))


@pytest.mark.parametrize("row_type", [RowType.Q4_1, RowType.F16], ids=lambda t: t.name)
@pytest.mark.parametrize("tokens", [1, 6])
def test_bias_and_accumulation(isa: str, row_type: RowType, tokens: int) -> None:
    rng = np.random.default_rng(8)
    columns = columns_of(row_type, 2)
    data = random_rows(rng, row_type, 19, columns)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    bias, before = aligned((19,), np.float32), rng.standard_normal((tokens, 19)).astype(np.float32)
    bias[:] = rng.standard_normal(19)
    product = expected_bits(data, row_type, x)
    np.testing.assert_array_equal(multiply(isa, data, row_type, x, bias=bias), product + bias)
    np.testing.assert_array_equal(
        multiply(isa, data, row_type, x, bias=bias, out=before), before + (product + bias)
    )
