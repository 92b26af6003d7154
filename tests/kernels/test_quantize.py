"""Conversions between row types and float32, and the rounding of activations."""

import gguf
import numpy as np
import pytest
from gguf import quants

from powerinfer_kernels import (
    Activations,
    KernelError,
    Pool,
    ProgramBuilder,
    RowType,
    aligned,
    available_isas,
    dequantize,
    quantize,
    row_bytes,
)
from powerinfer_kernels import reference_quants as reference
from random_rows import QUANTISED, extreme_rows, random_rows

WRITTEN = (RowType.F16, RowType.BF16, RowType.Q8_0, RowType.Q4_0)


def package_dequantize(data: np.ndarray, row_type: RowType) -> np.ndarray:  # type: ignore[type-arg]
    """What the gguf package makes of the rows. It warns where random bytes are infinite scales."""
    with np.errstate(all="ignore"):
        return np.asarray(quants.dequantize(data, gguf.GGMLQuantizationType(row_type)), np.float32)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
def test_dequantised_bits_equal_the_gguf_package(
    isa: str, row_type: RowType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POWERINFER_ISA", isa)
    data = random_rows(np.random.default_rng(1), row_type, 20, 512)
    got = dequantize(data, row_type, 20, 512)
    np.testing.assert_array_equal(got, package_dequantize(data, row_type))
    np.testing.assert_array_equal(reference.dequantize(data, row_type), got)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row_type", QUANTISED, ids=lambda t: t.name)
def test_any_bytes_dequantise_as_in_the_gguf_package(
    isa: str, row_type: RowType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random scales too: subnormal, huge, infinite and NaN ones."""
    monkeypatch.setenv("POWERINFER_ISA", isa)
    rng = np.random.default_rng(2)
    data = rng.integers(0, 256, (50, row_bytes(row_type, 256)), dtype=np.uint8)
    data = np.concatenate([data, extreme_rows(row_type, 256)])
    np.testing.assert_array_equal(dequantize(data, row_type, 56, 256), package_dequantize(data, row_type))


@pytest.mark.parametrize("row_type", WRITTEN, ids=lambda t: t.name)
def test_quantised_bytes_equal_the_gguf_package(row_type: RowType) -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((60, 320)) * 10.0 ** rng.uniform(-6, 3, (60, 1))
    values[3] = 0
    values[4] = 0.5
    values[5, ::2] = -values[5, 1::2]  # two values share the largest magnitude: the first one decides
    values[6] = np.arange(320) - 160  # ties of the rounding
    x = values.astype(np.float32)
    want = quants.quantize(x, gguf.GGMLQuantizationType(row_type)).view(np.uint8)
    np.testing.assert_array_equal(quantize(x, row_type), want)


def test_half_types_round_every_boundary_like_the_reference() -> None:
    """All f16 values, their neighbours in float32 and the halfway points between them; infinities and
    overflow."""
    halves = np.arange(0x10000, dtype=np.uint32).astype(np.uint16).view(np.float16)
    finite = np.sort(halves[np.isfinite(halves)].astype(np.float32))
    middle = (finite[1:] + finite[:-1]) / 2
    x = np.concatenate(
        [finite, middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    )
    x = np.concatenate([x, np.array([65519.996, 65520, 1e38, -1e38, np.inf, -np.inf, 1e-45], np.float32)])[
        None
    ]
    with np.errstate(over="ignore"):
        want = x.astype(np.float16).view(np.uint8)
    np.testing.assert_array_equal(quantize(np.ascontiguousarray(x), RowType.F16), want)
    package = quants.quantize(x, gguf.GGMLQuantizationType.BF16).view(np.uint8)
    np.testing.assert_array_equal(quantize(np.ascontiguousarray(x), RowType.BF16), package)


@pytest.mark.parametrize("row_type", [RowType.Q8_0, RowType.Q4_0], ids=lambda t: t.name)
def test_what_is_read_back_is_near(row_type: RowType) -> None:
    """Half a step of the code, the rounding of the scale to f16 at every code, and the code that Q4_0 lacks
    above."""
    x = np.random.default_rng(4).standard_normal((10, 64)).astype(np.float32)
    back = dequantize(quantize(x, row_type), row_type, 10, 64)
    largest = np.abs(x).reshape(10, 2, 32).max(axis=-1).repeat(32, axis=1)
    step = largest / (127 if row_type == RowType.Q8_0 else 8)
    allowed = step * (0.5 if row_type == RowType.Q8_0 else 1.0) + largest * 2.0**-11 + largest * 2.0**-20
    assert (np.abs(back - x) <= allowed).all()


@pytest.mark.parametrize("row_type", [RowType.Q4_1, RowType.Q6_K], ids=lambda t: t.name)
def test_types_that_are_only_read_are_refused(row_type: RowType) -> None:
    with pytest.raises(KernelError):
        quantize(np.zeros((1, 256), np.float32), row_type)


@pytest.mark.parametrize("isa", available_isas())
def test_activations_equal_the_reference(isa: str) -> None:
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((40, 96)) * 10.0 ** rng.uniform(-44, 37, (40, 1))).astype(np.float32)
    x[0] = 0
    x[1, 5], x[2, 40], x[3, 95] = np.nan, np.inf, -np.inf
    x[4] = 63.5 + np.arange(96) % 64  # largest is 126.5: ties of the rounding
    x[5] = np.tile([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5], 12)
    src = aligned(x.shape, np.float32)
    src[:] = x
    activations, builder = Activations(40, 96), ProgramBuilder(40)
    builder.quantize(src, activations)
    with Pool(1, isa) as pool:
        builder.build().run(pool, 0, 1, 40, 0)
    q, d, s = reference.quantize_activations(x)
    np.testing.assert_array_equal(activations.q, q)
    np.testing.assert_array_equal(activations.d, d)
    np.testing.assert_array_equal(activations.s, s)
    assert np.isnan(activations.d[[1, 2, 3], [0, 1, 2]]).all()


def test_emulated_fma_rounds_once() -> None:
    """Against exact rational arithmetic, with cancellation and values far apart."""
    from fractions import Fraction

    rng = np.random.default_rng(6)
    a, b = (rng.standard_normal(3000).astype(np.float32) for _ in range(2))
    c = (-(a * b) * (1 + rng.integers(-3, 4, 3000) * 2.0 ** -rng.integers(10, 40, 3000))).astype(np.float32)
    c[::3] *= np.float32(2.0**-30)
    got = reference.fma(a, b, c)
    for i in range(len(a)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        error = abs(Fraction(float(got[i])) - exact)
        for neighbour in (
            np.nextafter(got[i], np.float32(np.inf)),
            np.nextafter(got[i], np.float32(-np.inf)),
        ):
            assert error <= abs(Fraction(float(neighbour)) - exact)
