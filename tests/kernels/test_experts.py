"""Routers and experts against the float64 reference, with the same bits on every instruction set, for every
thread count and in every company."""

import math
from typing import Any

import numpy as np
import pytest

from powerinfer_kernels import (
    Activations,
    Choice,
    ExpertBuffers,
    ExpertWeights,
    KernelError,
    Layout,
    Matrix,
    Pool,
    ProgramBuilder,
    RowType,
    aligned,
    available_isas,
    dequantize,
)
from powerinfer_kernels.reference_experts import experts, head_matmul, route
from random_rows import random_rows
from test_operations import EPS, filled, normal

TOKENS = 7


def chosen_by(scores: np.ndarray, experts: int, used: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel's router chooses, which must be the same for any number of threads."""
    results = []
    for threads in (1, 3):
        choice = Choice.new(len(scores), experts, used)
        builder = ProgramBuilder(len(scores))
        builder.route(scores, choice, **options)
        with Pool(threads) as pool:
            builder.build().run(pool, 0, 1, len(scores), 0)
        results.append((choice.chosen.copy(), choice.weights.copy()))
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)
    return results[0]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    ("count", "used", "groups", "groups_used"),
    [(1, 1, 1, 1), (9, 4, 1, 1), (60, 8, 1, 1), (24, 5, 4, 2), (6, 3, 3, 2)],
)
def test_route(
    kind: str, biased: bool, normalized: bool, count: int, used: int, groups: int, groups_used: int
) -> None:
    """Both count in double; the weight is rounded once, to float32."""
    rng = np.random.default_rng(count)
    scores, bias = normal(rng, 40, count) * np.float32(3), normal(rng, count)
    options: dict[str, Any] = {"kind": kind, "groups": groups, "groups_used": groups_used}
    options |= {"normalized": normalized, "scale": 2.5}
    chosen, weights = chosen_by(filled(scores), count, used, bias=bias if biased else None, **options)
    wide = bias.astype(np.float64) if biased else None
    want, exact = route(scores.astype(np.float64), used, bias=wide, **options)
    np.testing.assert_array_equal(chosen, want)
    assert (np.abs(weights - exact) <= 0.51 * EPS * exact).all()


def test_route_takes_the_lower_expert_of_equals_and_shows_what_is_not_a_number() -> None:
    rows = [[1, 3, 3, 3, 2], [0, 0, 0, 0, 0], [1, np.nan, 2, 5, np.nan], [0, np.inf, 1, 2, 3]]
    scores = filled(np.array(rows))
    chosen, weights = chosen_by(scores, 5, 2, normalized=True)
    np.testing.assert_array_equal(chosen, [[1, 2], [0, 1], [2, 3], [1, 4]])
    np.testing.assert_array_equal(weights[:2], 0.5)
    assert np.isnan(weights[2:]).all()
    chosen, weights = chosen_by(scores, 5, 2, kind="sigmoid", bias=filled(np.zeros(5)))
    np.testing.assert_array_equal(chosen, [[1, 2], [0, 1], [2, 3], [1, 4]])
    assert np.isnan(weights[2]).all()
    assert np.isfinite(weights[3]).all()


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("experts", "used"), [(1, 1), (5, 2), (128, 8)])
def test_route_is_softmax_and_the_largest(experts: int, used: int, *, normalized: bool) -> None:
    """As torch has it."""
    torch = pytest.importorskip("torch", reason="torch is what this compares with")
    scores = normal(np.random.default_rng(experts), 50, experts) * np.float32(4)
    chosen, weights = chosen_by(filled(scores), experts, used, normalized=normalized)
    best = torch.topk(torch.softmax(torch.from_numpy(scores.astype(np.float64)), 1), used, dim=1)
    values = best.values / best.values.sum(1, keepdim=True) if normalized else best.values
    order = np.argsort(best.indices.numpy(), axis=1)
    np.testing.assert_array_equal(chosen, np.take_along_axis(best.indices.numpy(), order, 1))
    want = np.take_along_axis(values.numpy(), order, 1)
    np.testing.assert_allclose(weights, want, rtol=0.6 * EPS)


def test_weights_of_a_softmax_have_the_exactly_rounded_sum() -> None:
    """As math.fsum, which scores of many sizes tell from a sum in order."""
    rng = np.random.default_rng(0)
    scores = filled(rng.standard_normal((50, 300)) * 12)
    chosen, weights = chosen_by(scores, 300, 300)
    for row, taken, got in zip(scores.tolist(), chosen, weights, strict=True):
        powers = [math.exp(score - max(row)) for score in row]
        np.testing.assert_array_equal(taken, range(300))
        np.testing.assert_array_equal(got, np.array([p / math.fsum(powers) for p in powers], np.float32))


def test_weights_of_a_shared_expert() -> None:
    scores, choice = normal(np.random.default_rng(1), 4, 3), Choice.new(4, 3, 1)
    shared, weight = filled(np.array([[0.0], [2.0], [-300.0], [300.0]])), aligned((4, 1), np.float32)
    builder = ProgramBuilder(4)
    builder.route(scores, choice, shared=(shared, weight))
    with Pool(1) as pool:
        builder.build().run(pool, 0, 1, 4, 0)
    want = 1 / (1 + np.exp(-np.clip(shared.astype(np.float64), -80, 80)))
    np.testing.assert_array_equal(weight, want.astype(np.float32))


class Mixture:
    """Five experts, of which tokens take two, and what they compute for `x` by hand and by the kernels."""

    def __init__(self, row_type: RowType, width: int, neurons: int, kind: str, **options: Any) -> None:
        rng = np.random.default_rng(width)
        self.row_type, self.kind = row_type, kind
        shapes = [(neurons, width), (neurons, width), (width, neurons)]
        self.data = [[random_rows(rng, row_type, *shape) for _ in range(5)] for shape in shapes]
        self.shapes, self.x = shapes, normal(rng, TOKENS, width)
        self.scores = normal(rng, TOKENS, 5)
        self.biases: tuple[np.ndarray | None, ...] = (None, None, None)
        if options.pop("biased", False):
            self.biases = tuple(normal(rng, 5, rows) for rows, _ in shapes)
        scaled = options.pop("scaled", False)
        self.scales = rng.uniform(0.5, 2.0, (3, 5)) if scaled else np.ones((3, 5))
        self.scales = self.scales.astype(np.float32).astype(np.float64)
        self.gated = options.pop("gated", True)
        self.elsewhere = options.pop("elsewhere", ())
        self.options = options

    def exact(self) -> np.ndarray:
        rows = [
            [
                scale * dequantize(m, self.row_type, *shape).astype(np.float64)
                for m, scale in zip(kind, scales, strict=True)
            ]
            for kind, shape, scales in zip(self.data, self.shapes, self.scales, strict=True)
        ]
        chosen, weights = route(self.scores.astype(np.float64), 2, normalized=True)
        for expert in self.elsewhere:
            weights = np.where(chosen == expert, 0.0, weights)
        biases = [None if b is None else b.astype(np.float64) for b in self.biases]
        if not self.gated:
            biases[1] = None
        up = rows[1] if self.gated else None
        x, options = self.x.astype(np.float64), self.options
        return experts(x, chosen, weights, rows[0], up, rows[2], self.kind, biases=tuple(biases), **options)

    def computed(self, threads: int, isa: str, runs: list[int], *, picked: bool = False) -> np.ndarray:
        """All tokens, `runs` at a time; ``picked``: without neurons whose gates are not above the cut. What
        was active of how many neurons is in ``read``."""
        layouts = [Layout.TILES] * 3
        if picked:
            layouts[1:] = Layout.PICKED_ROWS, Layout.PICKED_COLUMNS
        width, most = self.x.shape[1], max(runs)
        choice, out = Choice.new(most, 5, 2), aligned((most, width), np.float32)
        x, scores = aligned((most, width), np.float32), aligned((most, 5), np.float32)
        acts = None if width % 32 else Activations(most, width)
        buffers = ExpertBuffers.new(most * 2, width, self.shapes[0][0], gated=self.gated)
        results, first = [], 0
        with Pool(threads, isa) as pool:
            gate, up, down = (
                [
                    None
                    if e in self.elsewhere
                    else Matrix.pack(pool, m, self.row_type, *shape, layout, float(scales[e]))
                    for e, m in enumerate(kind)
                ]
                for kind, shape, layout, scales in zip(
                    self.data, self.shapes, layouts, self.scales, strict=True
                )
            )
            biases = (self.biases[0], self.biases[1] if self.gated else None, self.biases[2])
            weights = ExpertWeights(gate, up if self.gated else None, down, *biases)
            builder = ProgramBuilder(most)
            builder.route(scores, choice, normalized=True)
            if acts is not None:
                builder.quantize(x, acts)
            builder.experts(choice, x, acts, weights, buffers, out, self.kind, **self.options)
            program = builder.build()
            for count in runs:
                x[:count], scores[:count] = self.x[first : first + count], self.scores[first : first + count]
                program.run(pool, 0, builder.mark(), count, 0)
                results.append(out[:count].copy())
                first += count
            self.read = (
                program.active_neurons(),
                program.confirmed_neurons(),
                program.total_neurons(),
            )
        return np.concatenate(results)


@pytest.mark.parametrize(
    ("row_type", "width", "neurons", "kind", "options"),
    [
        (RowType.F32, 36, 50, "silu", {}),
        (RowType.Q8_0, 64, 96, "silu", {}),
        (RowType.Q4_0, 96, 64, "relu", {"elsewhere": (0, 3)}),
        (RowType.F16, 72, 36, "relu2", {"gated": False}),
        (RowType.Q4_1, 64, 160, "swiglu_oai", {"biased": True, "cut": 7.0}),
        (RowType.BF16, 34, 20, "silu", {"weigh_input": True}),
        (RowType.Q6_K, 256, 256, "gelu_tanh", {"weigh_input": True}),
        (RowType.Q8_0, 96, 160, "clamped_silu", {"cut": 9.0, "scaled": True, "elsewhere": (2,)}),
        (RowType.F32, 36, 50, "swiglu_clamped", {"cut": 0.5, "scaled": True, "biased": True}),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_experts(row_type: RowType, width: int, neurons: int, kind: str, options: dict[str, Any]) -> None:
    """Quantised inputs of both products have 8 bits: 0.5 % of a block's deviation each."""
    mixture = Mixture(row_type, width, neurons, kind, **options)
    want, base = mixture.exact(), mixture.computed(1, available_isas()[0], [TOKENS])
    bound = 1e-5 if row_type.is_float else 0.03
    if row_type.is_float and row_type != RowType.F32:
        bound = 1e-4
    assert np.sqrt(np.mean((base - want) ** 2)) <= bound * np.sqrt(np.mean(want**2))
    for isa in available_isas():
        for threads, runs in ((1, [1] * TOKENS), (2, [3, 4]), (3, [TOKENS]), (2, [1] * TOKENS)):
            got = mixture.computed(threads, isa, runs)
            np.testing.assert_array_equal(got.view(np.uint32), base.view(np.uint32))


PICKED = [row_type for row_type in RowType if Layout.PICKED_COLUMNS.possible(row_type, 32)]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize(
    ("row_type", "width", "neurons", "kind", "options"),
    [
        *((row_type, 256, 512, "relu", {}) for row_type in PICKED),
        (RowType.Q4_0, 96, 64, "drelu", {"elsewhere": (0, 3)}),
        (RowType.Q8_0, 160, 320, "relu2", {"gated": False}),
        (RowType.Q4_1, 352, 160, "fatrelu", {"biased": True, "cut": 0.7}),
        (RowType.Q5_1, 32, 32, "relu2", {"weigh_input": True}),
        (RowType.Q5_0, 544, 96, "relu", {"biased": True}),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_picked_neurons_have_the_bits_of_whole_experts(
    isa: str, row_type: RowType, width: int, neurons: int, kind: str, options: dict[str, Any]
) -> None:
    """About half of the gates are above zero. With 24 tokens an expert has more than 8 pairs."""
    mixture = Mixture(row_type, width, neurons, kind, **options)
    whole = mixture.computed(1, isa, [1] * TOKENS)
    for threads, runs in ((1, [1] * TOKENS), (3, [TOKENS]), (2, [3, 4])):
        got = mixture.computed(threads, isa, runs, picked=True)
        np.testing.assert_array_equal(got.view(np.uint32), whole.view(np.uint32))
        active, confirmed, total = mixture.read
        assert 0.1 * total < active == confirmed < 0.7 * total
        assert total <= 2 * TOKENS * neurons
    rng = np.random.default_rng(8)
    mixture.x, mixture.scores = normal(rng, 24, width), normal(rng, 24, 5)
    whole = mixture.computed(2, isa, [24])
    np.testing.assert_array_equal(mixture.computed(2, isa, [24], picked=True), whole)


def test_up_rows_of_neurons_that_are_zero_are_not_read() -> None:
    """Those of one expert, which are NaN."""
    mixture = Mixture(RowType.Q8_0, 64, 96, "relu")
    gates = [dequantize(m, RowType.Q8_0, 96, 64) for m in mixture.data[0]]
    mixture.x = mixture.x[:1]
    base = mixture.computed(1, available_isas()[0], [1], picked=True)
    for rows, gate in zip(mixture.data[1], gates, strict=True):
        idle = gate @ mixture.x[0] < -0.5  # by far, so that rounding does not matter
        assert idle.any()
        rows[idle, :2] = np.array([np.nan], np.float16).view(np.uint8)
    got = mixture.computed(2, available_isas()[0], [1], picked=True)
    np.testing.assert_array_equal(got, base)
    assert np.isfinite(got).all()


def test_neurons_that_cannot_be_picked() -> None:
    with pytest.raises(KernelError, match="silu can be left out"):
        Mixture(RowType.Q8_0, 64, 96, "silu").computed(1, available_isas()[0], [TOKENS], picked=True)
    with pytest.raises(KernelError, match="no layout 2"):
        Mixture(RowType.F16, 64, 96, "relu").computed(1, available_isas()[0], [TOKENS], picked=True)
    with Pool(1) as pool:
        for shape in ((72, 64), (64, 64)):
            data = random_rows(np.random.default_rng(0), RowType.Q4_0, *shape)
            if shape[0] % 32:
                with pytest.raises(KernelError, match="no layout 2"):
                    Matrix.pack(pool, data, RowType.Q4_0, *shape, Layout.PICKED_COLUMNS)
        picked = [Matrix.pack(pool, data, RowType.Q4_0, 64, 64, layout) for layout in Layout]
        for matrix in picked[1:]:
            builder, x = ProgramBuilder(1), aligned((1, 64), np.float32)
            builder.matmul(matrix, x, Activations(1, 64), aligned((1, 64), np.float32))
            with pytest.raises(KernelError, match="another layout"):
                builder.build()


def test_experts_add_to_what_is_there() -> None:
    mixture = Mixture(RowType.F32, 32, 32, "silu")
    base = mixture.computed(1, available_isas()[0], [TOKENS])
    start = normal(np.random.default_rng(3), TOKENS, 32)
    choice, out, x = Choice.new(TOKENS, 5, 2), filled(start), filled(mixture.x)
    with Pool(2) as pool:
        parts = [
            [Matrix.pack(pool, m, RowType.F32, *shape) for m in kind]
            for kind, shape in zip(mixture.data, mixture.shapes, strict=True)
        ]
        buffers = ExpertBuffers.new(TOKENS * 2, 32, 32, gated=True)
        builder = ProgramBuilder(TOKENS)
        builder.route(filled(mixture.scores), choice, normalized=True)
        builder.experts(choice, x, None, ExpertWeights(*parts), buffers, out, "silu", accumulate=True)
        builder.build().run(pool, 0, builder.mark(), TOKENS, 0)
    assert np.abs(out - start - base).max() <= 8 * EPS * (np.abs(base) + np.abs(start)).max()


def test_experts_are_counted() -> None:
    rng = np.random.default_rng(4)
    scores, choice = normal(rng, 6, 9), Choice.new(6, 9, 3)
    totals, counts, squares = np.zeros(2, np.int64), np.zeros(9, np.uint64), [np.zeros(9), np.zeros(9)]
    builder = ProgramBuilder(6)
    builder.route(scores, choice)
    builder.count_experts(choice, totals, counts, *squares)
    builder.count_experts(choice, totals)
    program = builder.build()
    with Pool(2) as pool:
        program.run(pool, 0, 3, 6, 0)
        want = np.bincount(choice.chosen.ravel(), minlength=9)
        power = np.bincount(choice.chosen.ravel(), choice.weights.astype(np.float64).ravel() ** 2, 9)
        taken = len(np.unique(choice.chosen))
        program.run(pool, 0, 3, 1, 0)
    assert totals.tolist() == [4, 2 * taken + 2 * 3]
    first = np.bincount(choice.chosen[0], minlength=9)
    np.testing.assert_array_equal(counts, want + first)
    np.testing.assert_array_equal(squares[1], want + first)
    power += np.bincount(choice.chosen[0], choice.weights[0].astype(np.float64) ** 2, 9)
    np.testing.assert_allclose(squares[0], power, rtol=1e-14)


@pytest.mark.parametrize(
    ("row_type", "heads", "rows", "columns"),
    [(RowType.F32, 3, 20, 18), (RowType.F16, 2, 16, 33), (RowType.Q8_0, 4, 72, 64), (RowType.Q4_0, 1, 8, 32)],
    ids=lambda v: getattr(v, "name", None),
)
def test_head_matmul(row_type: RowType, heads: int, rows: int, columns: int) -> None:
    """Heads that lie apart in input and output; what lies between them stays."""
    rng = np.random.default_rng(rows)
    data = [random_rows(rng, row_type, rows, columns) for _ in range(heads)]
    x, start = normal(rng, TOKENS, 5 + heads * (columns + 4)), normal(rng, TOKENS, 3 + heads * (rows + 2))
    steps = {"src_first": 5, "src_step": columns + 4, "out_first": 3, "out_step": rows + 2}
    outs = []
    for isa in available_isas():
        for threads, runs in ((1, [TOKENS]), (3, [1] * TOKENS), (2, [3, 4])):
            got, first = [], 0
            with Pool(threads, isa) as pool:
                matrices = [Matrix.pack(pool, m, row_type, rows, columns) for m in data]
                for count in runs:
                    some, result = filled(x[first : first + count]), filled(start[first : first + count])
                    builder = ProgramBuilder(count)
                    builder.head_matmul(matrices, some, result, **steps)
                    builder.build().run(pool, 0, 1, count, 0)
                    got.append(result)
                    first += count
            outs.append(np.concatenate(got))
    for out in outs[1:]:
        np.testing.assert_array_equal(out.view(np.uint32), outs[0].view(np.uint32))
    wide = np.concatenate([x[:, 5 + h * (columns + 4) :][:, :columns] for h in range(heads)], axis=1)
    exact = [dequantize(m, row_type, rows, columns).astype(np.float64) for m in data]
    want = head_matmul(wide.astype(np.float64), exact).reshape(TOKENS, heads, rows)
    parts = outs[0][:, 3:].reshape(TOKENS, heads, rows + 2)
    bound = 1e-5 if row_type.is_float else 0.02
    assert np.sqrt(np.mean((parts[..., :rows] - want) ** 2)) <= bound * np.sqrt(np.mean(want**2))
    np.testing.assert_array_equal(outs[0][:, :3], start[:, :3])
    np.testing.assert_array_equal(parts[..., rows:], start[:, 3:].reshape(parts.shape)[..., rows:])


def test_what_does_not_fit_is_refused() -> None:
    builder, scores = ProgramBuilder(2), aligned((2, 6), np.float32)
    with pytest.raises(KernelError, match="cannot choose 7 of 6 experts"):
        Choice.new(2, 6, 7)
    choice = Choice.new(2, 6, 4)
    with pytest.raises(KernelError, match="router 'relu'"):
        builder.route(scores, choice, kind="relu")
    with pytest.raises(KernelError, match="cannot take 1 of 4 groups of 6 experts"):
        builder.route(scores, choice, groups=4)
    with pytest.raises(KernelError, match="have fewer than 4 experts"):
        builder.route(scores, choice, groups=2, groups_used=1)
    buffers, x = ExpertBuffers.new(8, 32, 64, gated=True), aligned((2, 32), np.float32)
    with Pool(1) as pool:
        up, down = (
            Matrix.pack(pool, np.zeros(shape, np.float32), RowType.F32, *shape)
            for shape in ((64, 32), (32, 64))
        )
        quantised = Matrix.pack(pool, np.zeros(64 * 34, np.uint8), RowType.Q8_0, 64, 32)

    def write(gate: list[Any], ups: list[Any], downs: list[Any]) -> None:
        builder.experts(choice, x, None, ExpertWeights(gate, ups, downs), buffers, x.copy(), "silu")

    with pytest.raises(KernelError, match="gate must have a matrix of every expert"):
        write([up] * 5, [up] * 6, [down] * 6)
    with pytest.raises(KernelError, match="up must have a matrix of every expert that is here"):
        write([up] * 6, [up] * 5 + [None], [down] * 6)
    with pytest.raises(KernelError, match="gate matrices of experts must be of one size"):
        write([up] * 5 + [quantised], [up] * 6, [down] * 6)
    with pytest.raises(KernelError, match="must be 32 rows of 64 columns"):
        write([up] * 6, [up] * 6, [up] * 6)
    with pytest.raises(KernelError, match="activations must be activations for 2 rows of 32"):
        write([quantised] * 6, [quantised] * 6, [down] * 6)
    with pytest.raises(KernelError, match="needs a matrix for each head"):
        builder.head_matmul([], x, x)
    with pytest.raises(KernelError, match="do not fit 32"):
        builder.head_matmul([up] * 2, x, aligned((2, 128), np.float32))
