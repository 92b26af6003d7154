"""Triton kernels in Triton's interpreter, against float64; and compiled for real GPUs, against the record.

Sizes are odd and small, since the interpreter is slow (``conftest.py`` turns it on). Errors are bounded by
n·eps·Σ|x||w| for sums of n terms.
"""

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt
import pytest
import torch

from powerinfer_kernels import (
    KernelError,
    RowType,
    block_shape,
    dequantize,
    packed_row_bytes,
    reference,
    reference_quants,
    repack,
)
from powerinfer_kernels import triton_launch as launch
from powerinfer_kernels.reference import activate, attention, sum_rows
from powerinfer_kernels.row_types import computable
from powerinfer_kernels.triton_layout import PLANAR_TYPES, planes, to_planar
from powerinfer_tools.engine.hot.cache import HeldVectors
from powerinfer_tools.engine.hot.elementwise import rotate, round_activations
from random_rows import random_rows

F32 = npt.NDArray[np.float32]
EPS = float(np.finfo(np.float32).eps)
#: Columns of a tile that is not full, with an odd number of blocks where a type allows that.
SHAPES = [(kind, -(-96 // block_shape(kind)[0]) * block_shape(kind)[0]) for kind in PLANAR_TYPES]
#: One of each way to read rows, with more than one tile; scales lie in whole words there.
SOME = [
    (RowType.F16, 160), (RowType.Q8_0, 544), (RowType.Q4_1, 96), (RowType.Q4_K, 256), (RowType.Q6_K, 768),
    (RowType.NVFP4, 64),
]  # fmt: skip
FEW = [(RowType.F16, 160), (RowType.Q8_0, 96), (RowType.Q4_K, 256)]
ROWS = 11


def ids(shapes: list[tuple[RowType, int]]) -> list[str]:
    return [f"{kind.name}-{columns}" for kind, columns in shapes]


CUT = 0.01


class Rows:
    """Random rows: as float64 values, and planar for the kernels."""

    def __init__(self, row_type: RowType, columns: int, seed: int, rows: int = ROWS) -> None:
        computable(row_type)
        raw = random_rows(np.random.default_rng(seed), row_type, rows, columns)
        self.values = dequantize(raw, row_type, rows, columns)
        self.raw, self.exact = raw, self.values.astype(np.float64)
        self.planar = planar(raw, row_type, columns)

    def poisoned(self, unused: npt.NDArray[np.bool_]) -> launch.PlanarRows:
        """The same rows, those ``unused`` with every bit set: F16 values and all scales are NaN then."""
        raw = self.raw.copy()
        raw[unused] = 0xFF
        return planar(raw, self.planar.row_type, self.planar.columns)


def planar(raw: npt.NDArray[np.uint8], row_type: RowType, columns: int) -> launch.PlanarRows:
    packed = repack(raw, row_type, len(raw), columns)
    data = torch.from_numpy(to_planar(packed, row_type, columns))
    return launch.PlanarRows(data, row_type, len(raw), columns)


def inputs(columns: int, tokens: int = 1) -> F32:
    return np.random.default_rng(columns).standard_normal((tokens, columns), dtype=np.float32)


def bound(x: npt.NDArray[np.floating], w: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Largest error of x · wᵀ in float32: n terms, and three roundings of each term's weight and product."""
    n = w.shape[1] + 3
    return np.asarray(n * EPS * (np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T) + 1e-30)


@pytest.mark.parametrize(("row_type", "columns"), SHAPES + SOME[:2], ids=ids(SHAPES + SOME[:2]))
def test_planar_rows_keep_every_byte_and_unpack_to_the_same_bits(row_type: RowType, columns: int) -> None:
    rows = Rows(row_type, columns, seed=1)
    assert rows.planar.data.numel() == ROWS * packed_row_bytes(row_type, columns)
    assert sum(vars(planes(row_type, columns)).values()) == packed_row_bytes(row_type, columns)
    out = torch.full((5, columns), float("nan"))
    launch.unpack(rows.planar, 3, 5, out)
    assert np.array_equal(out.numpy().view(np.uint32), rows.values[3:8].view(np.uint32))
    expected = gguf.quants.dequantize(rows.raw, gguf.GGMLQuantizationType(int(row_type)))
    assert np.array_equal(out.numpy(), expected[3:8])


CODED = [(kind, columns) for kind, columns in SHAPES if not kind.is_float]


@pytest.mark.parametrize(("row_type", "columns"), CODED, ids=ids(CODED))
def test_products_of_codes_with_codes_are_those_of_the_c_kernels(row_type: RowType, columns: int) -> None:
    """Bit for bit where one block has activations; blocks are added in another order where all have."""
    rows, x = Rows(row_type, columns, seed=2), inputs(columns, tokens=2)
    x[0, :32], x[0, 64:] = 0, 0
    tensor = torch.from_numpy(x)
    codes = torch.full((2, launch.code_words(columns)), -1, dtype=torch.int32)
    for token in range(2):
        launch.round_values(tensor[token : token + 1], None, codes[token : token + 1])
    q, d, sums = reference_quants.quantize_activations(x)
    assert np.array_equal(codes[:, : columns // 4].contiguous().numpy().view(np.int8), q)
    assert np.array_equal(codes[:, columns // 4 :].contiguous().numpy().view(np.float32), d)
    out = torch.full((2, ROWS), float("nan"))
    launch.matvec(codes, rows.planar, out)
    expected = reference_quants.products(rows.raw, row_type, q, d, sums)
    assert np.array_equal(out.numpy()[0], expected[0])
    wide = (q.reshape(2, -1, 32) * d[..., None]).reshape(x.shape)
    assert (np.abs(out.numpy() - expected) <= bound(wide, rows.exact)).all()
    assert not np.array_equal(expected[0], expected[1])


@pytest.mark.parametrize(("row_type", "columns"), SOME, ids=ids(SOME))
def test_matrix_times_vectors(row_type: RowType, columns: int) -> None:
    rows, x = Rows(row_type, columns, seed=2), inputs(columns, tokens=2)
    bias = torch.arange(ROWS, dtype=torch.float32)
    out = torch.full((2, ROWS), float("nan"))
    launch.matvec(torch.from_numpy(x), rows.planar, out, bias)
    expected = x.astype(np.float64) @ rows.exact.T + bias.numpy()
    assert (np.abs(out.numpy() - expected) <= bound(x, rows.exact) + EPS * np.abs(expected)).all()


@pytest.mark.parametrize(("row_type", "columns"), SOME, ids=ids(SOME))
def test_sums_of_rows_leave_out_what_is_zero_and_repeat_their_bits(
    row_type: RowType, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SPLIT_ROWS", 8)  # two partial sums, the second one short
    rows, h = Rows(row_type, columns, seed=3), inputs(ROWS)
    unused = np.arange(ROWS) % 3 == 1
    h[:, unused] = 0
    down = rows.poisoned(unused)
    outs = []
    for _ in range(2):
        out = torch.full((1, columns), float("nan"))
        partial = torch.full((1, launch.splits(ROWS), columns), float("nan"))
        launch.sum_rows(torch.from_numpy(h), down, partial, out)
        outs.append(out.numpy())
    expected = sum_rows(h.astype(np.float64), rows.exact)
    assert (np.abs(outs[0] - expected) <= bound(h, rows.exact.T)).all()
    assert np.array_equal(outs[0].view(np.uint32), outs[1].view(np.uint32))


@pytest.mark.parametrize(("row_type", "columns"), FEW, ids=ids(FEW))
def test_up_rows_are_not_read_where_the_gate_is_not_positive(row_type: RowType, columns: int) -> None:
    gate, up, x = Rows(row_type, columns, seed=4), Rows(row_type, columns, seed=5), inputs(columns)
    first = x.astype(np.float64) @ gate.exact.T
    negative = first[0] < -bound(x, gate.exact)[0]
    assert 0 < negative.sum() < ROWS
    out = torch.full((1, ROWS), float("nan"))
    tensor = torch.from_numpy(x)
    launch.hidden(tensor, tensor, gate.planar, up.poisoned(negative), ("relu", 0.0), out)
    second = x.astype(np.float64) @ up.exact.T
    allowed = bound(x, gate.exact) * np.abs(second) + bound(x, up.exact) * np.abs(first)
    expected = activate(first, second, "relu")
    assert (np.abs(out.numpy() - expected) <= 1.01 * allowed + EPS * np.abs(expected)).all()
    assert (out.numpy()[0, negative] == 0).all()


@pytest.mark.parametrize("activation", ["relu", "relu2", "drelu", "fatrelu", "silu", "gelu_tanh", "gelu_erf"])
def test_activations_gated_and_not_with_a_mask_of_active_neurons(activation: str) -> None:
    """Slopes of all activations over |x| ≤ 4 are below 1.2, relu2's below 8 (2·4), so errors of the gate grow
    by no more; exp and erf of Triton's interpreter are numpy's, of float32: a few units in the last place."""
    columns, tokens = 64, 2
    gate, up, x = Rows(RowType.F16, columns, 6), Rows(RowType.Q8_0, columns, 7), inputs(columns, tokens) / 8
    active = np.random.default_rng(8).random((tokens, ROWS)) < 0.6
    everywhere = active.any(axis=0)
    assert not active.all()
    unused = ~everywhere
    unused[3], active[:, 3] = True, False
    first, second = (x.astype(np.float64) @ rows.exact.T for rows in (gate, up))
    slope = 8.0 if activation == "relu2" else 1.2
    assert np.abs(first).max() < 4
    bias = np.linspace(-0.5, 0.5, ROWS, dtype=np.float32)
    for gated in (True, False):
        pre = first if gated else first + bias
        out, tensor = torch.full((tokens, ROWS), float("nan")), torch.from_numpy(x)
        mask = torch.from_numpy(active.astype(np.uint8))
        second_rows = up.poisoned(unused) if gated else None
        launch.hidden(
            tensor, tensor, gate.poisoned(unused), second_rows, (activation, CUT), out,
            bias=None if gated else torch.from_numpy(bias), active=mask,
        )  # fmt: skip
        expected = np.where(active, activate(pre, second if gated else None, activation, CUT), 0.0)
        allowed = slope * bound(x, gate.exact) + 16 * EPS * (1 + np.abs(first))
        if gated:
            allowed = allowed * np.abs(second) + np.maximum(slope, np.abs(first)) * 4 * bound(x, up.exact)
        assert (np.abs(out.numpy() - expected) <= allowed + EPS * np.abs(expected)).all()
        assert (out.numpy()[~active] == 0).all()


def held(values: npt.NDArray[np.float64], first: int, context: int, kind: str) -> HeldVectors:
    """``values`` (kv_heads, positions, dim) in a cache that is NaN before ``first`` and after them."""
    heads, count, dim = values.shape
    if kind == "f16":
        data = torch.full((heads, context, dim), torch.nan, dtype=torch.float16)
        data[:, first:count] = torch.from_numpy(values.astype(np.float16))[:, first:]
        return HeldVectors(data, None)
    scales = torch.full((heads, context, dim // 32), torch.nan, dtype=torch.float16)
    codes = np.random.default_rng(count).integers(-127, 128, (heads, count, dim // 32, 32)).astype(np.int8)
    steps = (np.abs(values.reshape(codes.shape)).max(axis=-1) / 127).astype(np.float16)
    data = torch.full((heads, context, dim), 77, dtype=torch.int8)
    data[:, :count], scales[:, first:count] = (
        torch.from_numpy(codes.reshape(values.shape)),
        torch.from_numpy(steps)[:, first:],
    )
    return HeldVectors(data, scales)


def copy_of(cache: HeldVectors) -> HeldVectors:
    return HeldVectors(cache.data.clone(), None if cache.scales is None else cache.scales.clone())


def same_bits(a: HeldVectors, b: HeldVectors) -> bool:
    pairs = [(a.data, b.data), *([] if a.scales is None else [(a.scales, b.scales)])]
    return all(np.array_equal(x.numpy(), y.numpy(), equal_nan=True) for x, y in pairs)


@pytest.mark.parametrize(
    ("kind", "dim", "heads", "kv_heads", "style"),
    [("f16", 20, 6, 2, "norm"), ("f16", 48, 1, 1, "neox"), ("q8_0", 96, 5, 1, "")],
)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (11, 2.0)])
def test_attention_of_one_token_reads_what_it_sees_and_nothing_else(
    kind: str, dim: int, heads: int, kv_heads: int, style: str, window: int, softcap: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Splits of eight positions, read four at a time: the token stands first in one, within one, at its end,
    and where the window begins within one. What it does not see is NaN, and so is scratch. Its own key and
    value are rotated and kept to the bits of the plain form, and no other position is touched. A score is a
    sum of ``dim`` products; its error moves the weights."""
    monkeypatch.setattr(launch, "LEAST_SPLIT", 8)
    monkeypatch.setattr(launch, "KEYS_BLOCK", 4)
    context, half, rng = 41, dim // 2 - 3 * (style == "norm"), np.random.default_rng(dim + window)
    angles = np.outer(np.arange(context), 0.3 ** np.arange(half))
    cos, sin = (torch.from_numpy(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    turn = launch.Turn(cos, sin, style == "neox") if style else None
    for position in (0, 7, 8, 22):
        first = max(0, position + 1 - window) if window else 0
        caches = [held(x, first, context, kind) for x in rng.standard_normal((2, kv_heads, position, dim))]
        new = [torch.from_numpy(rng.standard_normal((1, kv_heads * dim), dtype=np.float32)) for _ in "kv"]
        query, at = rng.standard_normal((1, heads * dim), dtype=np.float32), torch.tensor([position])
        turned = [torch.from_numpy(query.copy()), new[0].clone()]
        for x, count in zip(turned, (heads, kv_heads), strict=True):
            if style:
                rotate(x, cos[position : position + 1], sin[position : position + 1], count, style)
        kept = [copy_of(cache) for cache in caches]
        for cache, x in zip(kept, (turned[1], new[1]), strict=True):
            cache.store(at, x)
        partial = torch.full((launch.partial_floats(heads, dim, context),), torch.nan)
        out, rounded = torch.full((2, 1, heads * dim), torch.nan)
        codes = torch.empty(1, launch.code_words(480), dtype=torch.int32) if dim == 96 else None
        launch.attend(
            torch.from_numpy(query), *new, *caches, at, partial, out, None if codes is None else rounded,
            codes, scale=0.2, window=window, softcap=softcap, turn=turn,
        )  # fmt: skip
        assert all(map(same_bits, caches, kept))
        k, v = (cache.between(0, position + 1).numpy().astype(np.float64) for cache in kept)
        wide = turned[0].numpy().reshape(1, heads, dim).astype(np.float64)
        expected = attention(wide, *(x.transpose(1, 0, 2) for x in (k, v)), 0.2, position, window, softcap)
        seen = slice(first, None)
        score = 0.2 * np.abs(query).max() * 1.5 * np.abs(k[:, seen]).max() * dim
        error = np.abs(out.numpy().reshape(expected.shape) - expected).max()
        assert error <= (position + 8 + 4 * dim * score) * EPS * np.abs(v[:, seen]).max()
        if codes is not None:
            forms = torch.empty_like(out), torch.empty_like(codes)
            launch.round_values(out, *forms)
            assert torch.equal(rounded, forms[0])
            assert torch.equal(codes, forms[1])


def test_a_long_context_is_split_into_few_parts() -> None:
    for context, split in ((1, 64), (4096, 64), (8192, 64), (8193, 128), (131072, 1024)):
        assert launch.split_positions(context) == split
        assert launch.partial_floats(3, 64, context) == 3 * -(-context // split) * 66
        assert -(-context // split) <= 128


def test_three_matrices_and_what_joins_are_the_same_products() -> None:
    """Bit for bit: queries, keys and values at once, of three row types; and a product, or a sum of rows,
    that is added to what is there."""
    columns, bias = 256, torch.arange(ROWS, dtype=torch.float32)
    kinds = (RowType.Q4_K, RowType.Q8_0, RowType.Q6_K)
    matrices = [Rows(kind, columns, seed=i, rows=ROWS - 2 * i).planar for i, kind in enumerate(kinds)]
    codes = torch.empty(1, launch.code_words(columns), dtype=torch.int32)
    launch.round_values(torch.from_numpy(inputs(columns)), None, codes)
    apart = [torch.full((1, matrix.rows), torch.nan) for matrix in matrices]
    for matrix, out, added in zip(matrices, apart, (bias, None, None), strict=True):
        launch.matvec(codes, matrix, out, added)
    for count in (2, 3):
        outs = [torch.full_like(out, torch.nan) for out in apart[:count]]
        launch.matvecs(codes, matrices[:count], outs, [bias, None, None][:count])
        assert all(torch.equal(a, b) for a, b in zip(outs, apart, strict=False))
    joined = torch.from_numpy(inputs(ROWS))
    before = joined.clone()
    launch.matvec(codes, matrices[0], joined, bias, 0.75)
    assert torch.equal(joined, before + 0.75 * apart[0])
    partial, sums, h = torch.empty(1, 1, columns), torch.empty(1, columns), torch.from_numpy(inputs(ROWS))
    launch.sum_rows(h, matrices[0], partial, sums)
    stream = torch.from_numpy(inputs(columns))
    before = stream.clone()
    more = torch.from_numpy(inputs(columns)[0] / 3)
    launch.sum_rows(h, matrices[0], partial, stream, more, 1.0)
    assert torch.equal(stream, before + (sums + more))


def test_values_are_rounded_to_the_bits_of_the_plain_form() -> None:
    """Which are those of the C kernels: ties, zeros, tiny scales, values that are not finite."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((40, 96)) * 10.0 ** rng.integers(-30, 30, (40, 1))
    x[0, :32] = np.arange(-16, 16) + 0.5
    x[1], x[2, 40:70], x[3, 5], x[4, 90] = 0, 1e-39, np.inf, np.nan
    values = torch.from_numpy(x.astype(np.float32))
    out, expected = torch.full((1, 40 * 96), torch.nan), torch.empty(40, 96)
    launch.round_values(values.view(1, -1), out)
    round_activations(values, expected)
    assert np.array_equal(out.view(40, 96).numpy(), expected.numpy(), equal_nan=True)


@pytest.mark.parametrize(("width", "groups"), [(96, 1), (60, 3), (20, 5), (256, 1)])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_and_what_is_rounded_of_them(kind: str, width: int, groups: int) -> None:
    """Sums of ``width`` squares, a root and four products; rounded are the values as they came out."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((1, groups * width), dtype=np.float32)
    weight, bias = rng.standard_normal((2, width), dtype=np.float32)
    with_bias = bias if kind == "layer" else None
    wide = x.reshape(groups, width).astype(np.float64)
    expected = reference.rms_norm(wide, weight, 1e-5)
    if with_bias is not None:
        expected = reference.layer_norm(wide, weight, bias, 1e-5)
    out, rounded = torch.from_numpy(x.copy()), torch.full(x.shape, torch.nan) if width % 32 == 0 else None
    parts = torch.from_numpy(weight), None if with_bias is None else torch.from_numpy(bias)
    launch.normalize(out, *parts, 1e-5, out, rounded, layer=kind == "layer")
    error = np.abs(out.numpy().reshape(expected.shape) - expected).max()
    assert error <= (width + 8) * EPS * np.abs(expected).max()
    if rounded is not None:
        again = torch.empty_like(rounded)
        round_activations(out, again)
        assert torch.equal(rounded, again)


def test_sums_of_both_sides_join_in_order() -> None:
    x, first, second, bias = torch.from_numpy(inputs(600, tokens=4))
    for others in ((second, bias), (second, None), (None, None)):
        total = first
        for other in others:
            total = total if other is None else total + other
        got = x.clone()
        launch.join(got, first, *others, 0.3)
        assert torch.equal(got, x + 0.3 * total)


@pytest.mark.parametrize("style", ["norm", "neox"])
def test_both_queries_and_keys_are_rotated(style: str) -> None:
    rng, dim, half = np.random.default_rng(4), 20, 7
    query, key = rng.standard_normal((1, 3 * dim)), rng.standard_normal((1, 2 * dim))
    angles = np.outer(np.arange(9), 0.3 ** np.arange(half))
    cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    turned = [torch.from_numpy(x.astype(np.float32)) for x in (query, key)]
    launch.rotate(
        *turned, torch.from_numpy(cos), torch.from_numpy(sin), torch.tensor([5]), dim, neox=style == "neox"
    )
    for got, x, heads in zip(turned, (query, key), (3, 2), strict=True):
        expected = reference.rope(x, cos, sin, heads, 5, style)
        assert np.abs(got.numpy() - expected).max() <= 4 * EPS * np.abs(x).max()
        beyond = got.numpy().reshape(heads, dim)[:, 2 * half :]
        assert np.array_equal(beyond, x.astype(np.float32).reshape(heads, dim)[:, 2 * half :])


@pytest.mark.parametrize(("kind", "dim"), [("f16", 20), ("q8_0", 96)])
def test_the_cache_keeps_what_the_plain_form_keeps(kind: str, dim: int) -> None:
    """And nothing of any other position is touched."""
    rng = np.random.default_rng(dim)
    key, value = (torch.from_numpy(rng.standard_normal((1, 2 * dim), dtype=np.float32)) for _ in range(2))
    if kind == "q8_0":
        value[0, :32], value[0, 40] = 1e-9, torch.inf

    def empty() -> HeldVectors:
        if kind == "f16":
            return HeldVectors(torch.full((2, 7, dim), 9, dtype=torch.float16), None)
        scales = torch.full((2, 7, dim // 32), 9, dtype=torch.float16)
        return HeldVectors(torch.full((2, 7, dim), 9, dtype=torch.int8), scales)

    got, expected = ([empty(), empty()] for _ in range(2))
    position = torch.tensor([3])
    launch.store(key, value, *got, position)
    for held, vectors in zip(expected, (key, value), strict=True):
        held.store(position, vectors)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.data, b.data)
        if a.scales is not None and b.scales is not None:
            assert np.array_equal(a.scales.numpy(), b.scales.numpy(), equal_nan=True)


@pytest.mark.parametrize(("row_type", "columns"), FEW, ids=ids(FEW))
def test_experts_that_are_taken_and_no_others_are_read(row_type: RowType, columns: int) -> None:
    """Of four experts two are taken; one place is none, and its factor is not used either."""
    places, factors = torch.tensor([3, -1, 0], dtype=torch.int32), torch.tensor([0.5, float("nan"), 0.25])
    gate, up = (Rows(row_type, columns, seed, rows=4 * ROWS) for seed in (4, 5))
    unused, x = np.repeat([False, True, True, False], ROWS), inputs(columns) / 8
    hidden, tensor = torch.full((3, ROWS), float("nan")), torch.from_numpy(x)
    arguments = (gate.poisoned(unused), up.poisoned(unused), places, ("silu", 0.0), hidden)
    launch.expert_hidden(tensor, tensor, *arguments)
    assert (hidden[1] == 0).all()
    for slot, place in ((0, 3), (2, 0)):
        g, u = (rows.exact[place * ROWS : (place + 1) * ROWS] for rows in (gate, up))
        first, second = x[0] @ g.T, x[0] @ u.T
        values = activate(first, second, "silu")
        slope = 1.2 * bound(x, g)[0] + 16 * EPS * (1 + np.abs(first))
        allowed = slope * np.abs(second) + (1.2 + np.abs(first)) * 4 * bound(x, u)[0] + EPS * np.abs(values)
        assert (np.abs(hidden[slot].numpy() - values) <= allowed).all()
    width, h = 5, inputs(columns, tokens=3)
    down, out = Rows(row_type, columns, seed=6, rows=4 * width), torch.ones(1, width)
    launch.expert_sums(
        torch.from_numpy(h), down.poisoned(np.repeat([False, True, True, False], width)), places, factors, out
    )
    expected, allowed = np.ones(width), np.full(width, EPS)
    for slot, place in ((0, 3), (2, 0)):
        rows, factor = down.exact[place * width : (place + 1) * width], float(factors[slot])
        product = h[slot] @ rows.T
        expected += factor * product
        allowed += factor * bound(h[slot][None], rows)[0]
        allowed += 2 * EPS * (np.abs(factor * product) + np.abs(expected))
    assert (np.abs(out.numpy()[0] - expected) <= allowed).all()


def test_types_without_a_planar_form_are_named() -> None:
    with pytest.raises(KernelError, match="F32 rows have no planar form"):
        planes(RowType.F32, 256)
    with pytest.raises(KernelError, match="are not 64 columns of Q8_0"):
        to_planar(np.zeros((2, 34), np.uint8), RowType.Q8_0, 64)
