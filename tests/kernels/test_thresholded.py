"""Neurons selected by the size of a factor: float64 reference, the bits of dense, rows that are not read."""

import numpy as np
import numpy.typing as npt
import pytest

from powerinfer_kernels import (
    Activations,
    Bundle,
    KernelError,
    Matrix,
    Pool,
    ProgramBuilder,
    RowType,
    aligned,
    available_isas,
    reference,
    reference_quants,
)
from random_rows import U8, random_rows

F32 = npt.NDArray[np.float32]
UNIT = 2.0**-24  # largest relative error of one rounding to float32
NEURONS, MOST = 90, 5
KINDS = ("silu", "gelu_tanh", "gelu_erf", "relu", "relu2")
TYPES = (RowType.F32, RowType.BF16, RowType.Q4_0, RowType.Q8_0, RowType.Q5_K)


class Case:
    """One FFN and its input; neurons 0 … 9 have a tiny known factor for every token."""

    def __init__(self, factor: str, row_type: RowType, seed: int = 3, neurons: int = NEURONS) -> None:
        self.neurons = neurons
        rng = np.random.default_rng(seed)
        self.factor, self.row_type = factor, row_type
        self.columns = 83 if row_type.is_float else 256
        self.rest = "up" if factor == "gate" else "gate"
        self.rows = {kind: random_rows(rng, row_type, neurons, self.columns) for kind in (self.rest, "down")}
        self.x = filled(rng, MOST, self.columns)
        self.known = filled(rng, MOST, neurons)
        self.known[:, :10] *= 1e-3
        self.threshold = np.abs(rng.standard_normal(neurons)).astype(np.float32)
        self.threshold[:10] = 1.0

    def poisoned(self) -> dict[str, U8]:
        """The rows, those of the first ten neurons all ones: NaN in float rows and in every scale."""
        rows = {kind: data.copy() for kind, data in self.rows.items()}
        for data in rows.values():
            data.reshape(self.neurons, -1)[:10] = 0xFF
        return rows

    def selected(self, tokens: int) -> npt.NDArray[np.bool_]:
        return np.abs(self.known[:tokens]) > self.threshold


def filled(rng: np.random.Generator, *shape: int) -> F32:
    array = aligned(shape, np.float32)
    array[:] = rng.standard_normal(shape)
    return array


def run(case: Case, kind: str, isa: str, threads: int, tokens: int) -> tuple[F32, int, int]:
    """Output [tokens, columns] over poisoned rows, neurons computed and looked at."""
    out, h = aligned(case.x.shape, np.float32), aligned(case.known.shape, np.float32)
    acts = None if case.row_type.is_float else Activations(MOST, case.columns)
    builder = ProgramBuilder(MOST)
    if acts is not None:
        builder.quantize(case.x, acts)
    with Pool(threads, isa) as pool:
        rows = {name: (data, case.row_type) for name, data in case.poisoned().items()}
        bundle = Bundle.pack(pool, case.neurons, case.columns, **rows)
        builder.thresholded_ffn(case.known, case.factor, case.threshold, case.x, acts, bundle, out, h, kind)
        program = builder.build()
        program.run(pool, 0, builder.mark(), tokens, 0)
    return np.array(out[:tokens]), program.active_neurons(), program.total_neurons()


def dense(case: Case, kind: str, tokens: int) -> F32:
    """The same by operations over all neurons, with small factors set to zero in between."""
    out, other, h = (
        aligned(shape, np.float32) for shape in (case.x.shape, case.known.shape, case.known.shape)
    )
    acts = None if case.row_type.is_float else Activations(MOST, case.columns)
    builder = ProgramBuilder(MOST)
    if acts is not None:
        builder.quantize(case.x, acts)
    with Pool(1) as pool:
        matrix = Matrix.pack(pool, case.rows[case.rest], case.row_type, case.neurons, case.columns)
        down = Bundle.pack(pool, case.neurons, case.columns, down=(case.rows["down"], case.row_type))
        builder.matmul(matrix, case.x, acts, other)
        if case.factor == "up":
            builder.activate(other, case.known, h, kind)
        products = builder.mark()
        builder.keep_large(case.known, case.threshold, h)
        builder.sum_rows(h, down, out)
        program = builder.build()
        program.run(pool, 0, products, tokens, 0)
        if case.factor == "gate":  # `known` is act(gate) already: no operation multiplies by it
            h[:tokens] = case.known[:tokens] * other[:tokens]
        program.run(pool, products, builder.mark(), tokens, 0)
    return np.array(out[:tokens])


@pytest.mark.parametrize("row_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("factor", ["gate", "up"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5])
def test_bits_are_those_of_dense_with_zeros(factor: str, row_type: RowType, tokens: int) -> None:
    """For every instruction set and thread count, one token after the other or several at once; rows of
    neurons that are not selected are poisoned and do not show."""
    case = Case(factor, row_type)
    want = dense(case, "silu", tokens)
    assert np.isfinite(want).all()
    for isa in available_isas():
        for threads in (1, 2, 3):
            got, active, total = run(case, "silu", isa, threads, tokens)
            np.testing.assert_array_equal(got, want)
            assert active == case.selected(tokens).sum()
            assert total == tokens * NEURONS


@pytest.mark.parametrize("row_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("factor", ["gate", "up"])
def test_chunks_by_thread_have_the_bits_of_dense(factor: str, row_type: RowType) -> None:
    """So many neurons that one and two threads take chunks of them; three share columns."""
    case = Case(factor, row_type, neurons=4000)
    want = dense(case, "silu", 1)
    selected = np.flatnonzero(case.selected(1)[0])
    assert 6 * np.bincount(selected // 512).max() <= len(selected) < 9 * np.bincount(selected // 512).max()
    for isa in available_isas():
        for threads in (1, 2, 3):
            got, active, total = run(case, "silu", isa, threads, 1)
            np.testing.assert_array_equal(got, want)
            assert (active, total) == (len(selected), 4000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", ["gate", "up"])
def test_error_is_within_the_bound(factor: str, kind: str) -> None:
    """Against float64. A product of n columns errs by at most n · 2^-24 · |x|·|w|; an activation has a slope
    of less than 2.2 (relu2: 2 |gate|) and adds less than 2^-20 of its value; the sum over neurons errs by a
    further (neurons + 3) · 2^-24 of what it adds up."""
    case = Case(factor, RowType.F32, seed=8)
    case.x *= np.float32(0.1)
    rest, down = (
        reference_quants.dequantize(case.rows[name], RowType.F32).astype(np.float64)
        for name in (case.rest, "down")
    )
    x, known = case.x.astype(np.float64), case.known.astype(np.float64)
    want = reference.thresholded_ffn(known, factor, case.threshold.astype(np.float64), x, rest, down, kind)
    error = (case.columns + 1) * UNIT * (np.abs(x) @ np.abs(rest).T)
    other = x @ rest.T
    if factor == "up":
        slope = 2 * np.abs(other).max() if kind == "relu2" else 2.2
        error = slope * error + 2.0**-20 * np.abs(reference.act(other, kind))
        hidden = np.abs(reference.act(other, kind) * known)
    else:
        hidden = np.abs(other * known)
    bound = (np.abs(known) * error) @ np.abs(down) + (NEURONS + 3) * UNIT * (hidden @ np.abs(down))
    for isa in available_isas():
        got, _, _ = run(case, kind, isa, 2, MOST)
        assert (np.abs(got - want) <= bound).all()


@pytest.mark.parametrize("width", [1, 15, 16, 83])
def test_keep_large(width: int) -> None:
    """Sizes at the threshold are left out, NaN is kept so that it shows, and |−0| is no more than zero."""
    rng = np.random.default_rng(width)
    value, out = filled(rng, 3, width), filled(rng, 3, width)
    threshold = np.abs(rng.standard_normal(width)).astype(np.float32)
    value[0, 0], value[1, 0], value[2, 0] = threshold[0], np.nan, -2 * threshold[0]
    before = out.copy()
    want = np.where(np.abs(value) <= threshold, 0, before)
    assert (want[0, 0], want[1, 0], want[2, 0]) == (0, before[1, 0], before[2, 0])
    builder = ProgramBuilder(3)
    builder.keep_large(value, threshold, out)
    program = builder.build()
    for isa in available_isas():
        for threads in (1, 2):
            out[:] = before
            with Pool(threads, isa) as pool:
                program.run(pool, 0, 1, 3, 0)
            np.testing.assert_array_equal(out, want)


def test_refusals() -> None:
    case = Case("gate", RowType.F32)
    out, h = aligned(case.x.shape, np.float32), aligned(case.known.shape, np.float32)
    builder = ProgramBuilder(MOST)
    with Pool(1) as pool:
        rows = {name: (data, case.row_type) for name, data in case.rows.items()}
        bundle = Bundle.pack(pool, NEURONS, case.columns, **rows)

    def append(**changes: object) -> None:
        arguments: dict[str, object] = {
            "known": case.known, "factor": "gate", "threshold": case.threshold, "src": case.x,
            "activations": None, "bundle": bundle, "out": out, "h": h, "kind": "silu",
        }  # fmt: skip
        builder.thresholded_ffn(**(arguments | changes))  # type: ignore[arg-type]

    append()
    for changes, message in (
        ({"factor": "down"}, "'down' is not one of the factors"),
        ({"factor": "up"}, "has no gate rows"),
        ({"kind": "drelu"}, "select by up"),
        ({"threshold": case.threshold[1:]}, "threshold must be"),
        ({"h": case.known}, "must not share memory"),
    ):
        with pytest.raises(KernelError, match=message):
            append(**changes)
    with pytest.raises(KernelError, match="threshold must be"):
        builder.keep_large(case.known, case.threshold[1:], h)
