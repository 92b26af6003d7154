"""Each operation of a program against the float64 reference, on every instruction set, with the same bits
on all."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from powerinfer_kernels import (
    ACTIVATION_KINDS,
    CLAMPED_KINDS,
    Activations,
    Bundle,
    KernelError,
    KVCache,
    Matrix,
    Pool,
    ProgramBuilder,
    RowType,
    State,
    aligned,
    available_isas,
    dequantize,
    reference,
)
from random_rows import random_rows

EPS = float(np.finfo(np.float32).eps)
TOKENS = 5
Write = Callable[[ProgramBuilder], None]


def filled(values: np.ndarray) -> np.ndarray:
    """An aligned float32 copy."""
    out = aligned(values.shape, np.float32)
    out[:] = values
    return out


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return filled(rng.standard_normal(shape).astype(np.float32))


def on_every_isa(
    write: Write, out: np.ndarray, start: np.ndarray | None = None, tokens: int = TOKENS
) -> np.ndarray:
    """`out` after the program, which must have the same bits for every instruction set and thread count.

    The last row is not part of the run and must stay as it is.
    """
    builder = ProgramBuilder(len(out))
    write(builder)
    program, results = builder.build(), []
    for isa in available_isas():
        for threads in (1, 2, 3):
            out[:] = 7.0 if start is None else start
            with Pool(threads, isa) as pool:
                program.run(pool, 0, builder.mark(), tokens, 0)
            results.append(out.copy())
    for result in results[1:]:
        np.testing.assert_array_equal(result.view(np.uint32), results[0].view(np.uint32))
    last = 7.0 if start is None else start[-1]
    np.testing.assert_array_equal(results[0][tokens:], np.broadcast_to(last, results[0][tokens:].shape))
    return results[0][:tokens].astype(np.float64)


@pytest.mark.parametrize(("width", "groups"), [(1, 1), (17, 1), (64, 4), (129, 3), (576, 9)])
def test_rms_norm(width: int, groups: int) -> None:
    """The sum of n squares is off by n·eps at most, halved by the root; one rounding each for the root, the
    quotient and the product."""
    rng = np.random.default_rng(width)
    x, weight = normal(rng, TOKENS + 1, width), normal(rng, width // groups)
    out = aligned(x.shape, np.float32)
    got = on_every_isa(lambda b: b.rms_norm(x, weight, out, 1e-5, groups), out)
    want = reference.rms_norm(x[:TOKENS].astype(np.float64), weight.astype(np.float64), 1e-5, groups)
    assert (np.abs(got - want) <= (width / groups / 2 + 4) * EPS * np.abs(want)).all()
    in_place = x.copy()
    again = on_every_isa(lambda b: b.rms_norm(out, weight, out, 1e-5, groups), out, start=in_place)
    np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("width", [2, 17, 576])
def test_layer_norm(width: int) -> None:
    """As for rms_norm, with the mean's error of n·eps·max|x| in the centred value."""
    rng = np.random.default_rng(width)
    x, weight, bias = normal(rng, TOKENS + 1, width), normal(rng, width), normal(rng, width)
    out = aligned(x.shape, np.float32)
    got = on_every_isa(lambda b: b.layer_norm(x, weight, bias, out, 1e-5), out)
    wide = x[:TOKENS].astype(np.float64)
    want = reference.layer_norm(wide, weight.astype(np.float64), bias.astype(np.float64), 1e-5)
    size = np.abs(wide).max() / wide.std(axis=1, keepdims=True) * np.abs(weight) + np.abs(bias)
    assert (np.abs(got - want) <= (width + 8) * EPS * size).all()


@pytest.mark.parametrize("style", ["norm", "neox"])
@pytest.mark.parametrize(("heads", "head_dim", "half"), [(1, 2, 1), (3, 48, 24), (9, 64, 32), (2, 20, 6)])
def test_rope(style: str, heads: int, head_dim: int, half: int) -> None:
    """Two products and a sum: three roundings of at most |a| + |b|. Values past the rotary part keep their
    bits."""
    rng = np.random.default_rng(heads)
    start = normal(rng, TOKENS + 1, heads * head_dim)
    angles = rng.uniform(0, 6, (TOKENS + 2, half))
    cos, sin = filled(np.cos(angles)), filled(np.sin(angles))
    x = aligned(start.shape, np.float32)
    got = on_every_isa(lambda b: b.rope(x, cos, sin, heads, head_dim, style), x, start=start)
    wide = start[:TOKENS].astype(np.float64)
    want = reference.rope(wide, cos.astype(np.float64), sin.astype(np.float64), heads, 0, style)
    assert np.abs(got - want).max() <= 3 * EPS * 2 * np.abs(wide).max()
    rest = np.s_[:, :, 2 * half :]
    shape = (TOKENS, heads, head_dim)
    np.testing.assert_array_equal(got.reshape(shape)[rest], wide.reshape(shape)[rest])


def test_rope_on_a_slice_of_each_head() -> None:
    """The last 6 of 10 values, as with multi-head latent attention; the others keep their bits."""
    rng = np.random.default_rng(11)
    start, angles = normal(rng, TOKENS + 1, 30), rng.uniform(0, 6, (TOKENS + 2, 3))
    cos, sin = filled(np.cos(angles)), filled(np.sin(angles))
    x = aligned(start.shape, np.float32)
    for style in ("norm", "neox"):
        got = on_every_isa(lambda b, s=style: b.rope(x, cos, sin, 3, 10, s, 4), x, start=start)
        wide = start[:TOKENS].astype(np.float64)
        want = reference.rope(wide, cos.astype(np.float64), sin.astype(np.float64), 3, 0, style, 4)
        assert np.abs(got - want).max() <= 3 * EPS * 2 * np.abs(wide).max()
        heads = got.reshape(TOKENS, 3, 10)
        np.testing.assert_array_equal(heads[..., :4], wide.reshape(TOKENS, 3, 10)[..., :4])
        assert (heads[1:, :, 4:] != wide.reshape(TOKENS, 3, 10)[1:, :, 4:]).any()


def cut_of(kind: str) -> float:
    """What clamped kinds cannot be without."""
    return 7.0 if kind in CLAMPED_KINDS else 0.0


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_activate(kind: str, gated: bool) -> None:
    """exp, tanh and the normal tail are within 8 ulp by their fits (vector_math.h), and a few roundings
    come on top. An error of the exponent is multiplied by its size: three roundings of 2z = 1.6 x + 0.0714
    x³ for gelu_tanh. Values below the normal range are off by some of its smallest steps, and 1 + tanh of
    the reference by float64's own roundoff. The width is no whole vector."""
    rng = np.random.default_rng(1)
    width = 1003
    gate = normal(rng, TOKENS + 1, width) * np.float32(10) ** rng.uniform(
        -8, 1.5, (TOKENS + 1, width)
    ).astype(np.float32)
    gate, up = filled(gate), normal(rng, TOKENS + 1, width)
    out = aligned(gate.shape, np.float32)
    got = on_every_isa(lambda b: b.activate(gate, up if gated else None, out, kind, cut_of(kind)), out)
    x, factor = (a[:TOKENS].astype(np.float64) for a in (gate, up))
    want = reference.activate(x, factor if gated else None, kind, cut_of(kind))
    exponent = 1.6 * np.abs(x) + 0.0714 * np.abs(x) ** 3 if kind == "gelu_tanh" else 0.0
    if kind in ("sigmoid", "swiglu_oai"):
        exponent = 1.8 * np.abs(x)
    bound = (16 + 3 * exponent) * EPS * np.abs(want) + 1e-37 + 1e-15 * np.abs(x * (factor if gated else 1.0))
    assert (np.abs(got - want) <= bound).all()


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_activate_at_the_limits(kind: str) -> None:
    gate = filled(np.tile(np.array([np.inf, -np.inf, np.nan, 0.0, 3e38, -3e38], np.float32), (2, 1)))
    out = aligned(gate.shape, np.float32)
    got = on_every_isa(lambda b: b.activate(gate, None, out, kind, cut_of(kind)), out, tokens=1)[0]
    assert np.isnan(got[2]) or kind in ("relu", "relu2", "drelu")
    assert got[1] == got[5] == 0
    if kind == "sigmoid":
        assert (got[0], got[3], got[4]) == (1, 0.5, 1)
    elif kind in CLAMPED_KINDS:
        top = 7 / (1 + np.exp(-7)) if kind == "swiglu_clamped" else 7
        assert got[0] == got[4] == pytest.approx(top, rel=1e-5)
        assert got[3] == 0
    else:
        assert got[0] == np.inf
        assert got[3] == (pytest.approx(np.log(2), rel=2 * EPS) if kind == "softplus" else 0)
        assert got[4] >= 2.9e38


def test_add() -> None:
    rng = np.random.default_rng(2)
    start, src = normal(rng, TOKENS + 1, 77), normal(rng, TOKENS + 1, 77)
    out = aligned(start.shape, np.float32)
    got = on_every_isa(lambda b: b.add(src, out), out, start=start)
    np.testing.assert_array_equal(got, (start + src)[:TOKENS])
    shared = filled(src[0])
    for tokens in (1, TOKENS):  # split by column, and by token
        some, begin = aligned((tokens + 1, 77), np.float32), start[: tokens + 1]
        got = on_every_isa(lambda b, some=some: b.add(shared, some), some, start=begin, tokens=tokens)
        np.testing.assert_array_equal(got, (begin + shared)[:tokens])


@pytest.mark.parametrize("row_type", list(RowType), ids=lambda t: t.name)
def test_embed(row_type: RowType) -> None:
    rng = np.random.default_rng(3)
    data = random_rows(rng, row_type, 9, 256)
    tokens = aligned((TOKENS + 1,), np.int32)
    tokens[:] = [8, 0, 3, 3, 7, 1]
    out = aligned((TOKENS + 1, 256), np.float32)
    got = on_every_isa(lambda b: b.embed(tokens, data, row_type, 9, 256, out, scale=1.5), out)
    np.testing.assert_array_equal(got, dequantize(data, row_type, 9, 256)[tokens[:TOKENS]] * np.float32(1.5))


@pytest.mark.parametrize("token", [-1, 9, 1 << 30])
def test_token_ids_are_checked_before_memory_is_read(token: int) -> None:
    tokens, out = aligned((2,), np.int32), aligned((2, 32), np.float32)
    tokens[1] = token
    builder = ProgramBuilder(2)
    builder.embed(tokens, np.zeros((9, 32), np.float32), RowType.F32, 9, 32, out)
    with Pool(1) as pool, pytest.raises(KernelError, match="outside the vocabulary of 9"):
        builder.build().run(pool, 0, 1, 2, 0)


def attend(
    heads: int,
    kv_heads: int,
    dim: int,
    runs: list[int],
    isa: str,
    threads: int,
    kind: str = "f16",
    value_dim: int = 0,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Outputs of `sum(runs)` tokens processed run by run, and what went in. Slots not yet written hold
    NaN."""
    rng = np.random.default_rng(dim)
    total, longest = sum(runs), max(runs)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim))
    q, k, v = (rng.standard_normal((total, *shape)).astype(np.float32) for shape in shapes)
    cache = KVCache(total + 3, kv_heads, dim, kind, value_dim or dim)
    for array in cache.arrays:
        if array is not None and array.dtype == np.uint16:
            array[:] = 0x7E00
    ins = [aligned((longest, n * width), np.float32) for n, width in shapes]
    out = aligned((longest, heads * (value_dim or dim)), np.float32)
    builder = ProgramBuilder(longest)
    slot, state = builder.kv_slot(total + 40, kv_heads, dim, value_dim or dim), State([cache])
    builder.store_kv(ins[1], ins[2], slot)
    builder.attention(ins[0], slot, out, heads, 0.3, **options)
    program, position, outs = builder.build(), 0, []
    with Pool(threads, isa) as pool:
        for count in runs:
            for buffer, values in zip(ins, (q, k, v), strict=True):
                buffer[:count] = values[position : position + count].reshape(count, -1)
            program.run(pool, 0, 2, count, position, state)
            outs.append(out[:count].copy())
            position += count
    return np.concatenate(outs), q, k, v


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "options"),
    [
        (1, 1, 2, {}),
        (3, 1, 6, {"window": 5}),
        (9, 3, 64, {}),
        (4, 2, 80, {"softcap": 3.0}),
        (5, 5, 48, {"window": 17, "softcap": 2.0}),
        (2, 1, 512, {}),
    ],
)
def test_attention(heads: int, kv_heads: int, dim: int, options: dict[str, Any]) -> None:
    """35 positions cross two tiles of keys. Keys and values are rounded to half precision before, so what
    is left is float32: dim products a score, an exponential within a few ulp of a score's error, and a sum
    over positions."""
    base, q, k, v = attend(heads, kv_heads, dim, [35], available_isas()[0], 1, **options)
    half = [a.astype(np.float16).astype(np.float64) for a in (k, v)]
    want = reference.attention(q.astype(np.float64), *half, 0.3, 0, **options).reshape(35, -1)
    score_error = 0.3 * dim * EPS * np.abs(q).max() * np.abs(k).max() * np.sqrt(dim)
    assert np.abs(base - want).max() <= (2 * score_error + 60 * EPS) * np.abs(v).max()
    for isa in available_isas():
        for runs, threads in (([35], 2), ([1] * 35, 1), ([7, 16, 12], 3), ([34, 1], 2)):
            got, *_ = attend(heads, kv_heads, dim, runs, isa, threads, **options)
            np.testing.assert_array_equal(got.view(np.uint32), base.view(np.uint32))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "options"),
    [
        (1, 1, 32, {}),
        (9, 3, 64, {}),
        (4, 2, 96, {"window": 17, "softcap": 3.0}),
        (2, 1, 512, {}),
    ],
)
def test_attention_over_a_q8_0_cache(heads: int, kv_heads: int, dim: int, options: dict[str, Any]) -> None:
    """As for f16, beside the reference over what such a cache keeps. A code may differ by one from the
    reference's where x / d lies at a half: in keys that moves a score by d · |q|, in values a sum by d."""
    base, q, k, v = attend(heads, kv_heads, dim, [35], available_isas()[0], 1, "q8_0", **options)
    kept = [reference.quantized_cache(a.astype(np.float64)) for a in (k, v)]
    for original, stored in zip((k, v), kept, strict=True):
        step = np.abs(original).max() / 127
        assert np.abs(original - stored).max() <= 0.57 * step  # half a step, and 127 steps' change of d
    want = reference.attention(q.astype(np.float64), *kept, 0.3, 0, **options).reshape(35, -1)
    score_error = 0.3 * dim * EPS * np.abs(q).max() * np.abs(k).max() * np.sqrt(dim)
    assert np.abs(base - want).max() <= (2 * score_error + 60 * EPS) * np.abs(v).max()
    for isa in available_isas():
        for runs, threads in (([35], 2), ([1] * 35, 1), ([7, 16, 12], 3), ([34, 1], 2)):
            got, *_ = attend(heads, kv_heads, dim, runs, isa, threads, "q8_0", **options)
            np.testing.assert_array_equal(got.view(np.uint32), base.view(np.uint32))


def slopes_of(heads: int) -> np.ndarray:
    return filled(reference.alibi_slopes(heads, 8.0))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "options"),
    [
        (3, 1, 36, {"value_dim": 20}),
        (6, 2, 72, {"value_dim": 96, "window": 9}),
        (5, 1, 144, {"value_dim": 128, "kind": "f16"}),
        (3, 1, 96, {"value_dim": 64, "kind": "q8_0"}),
        (2, 1, 576, {"value_dim": 512}),
        (5, 5, 34, {"slopes": slopes_of(5)}),
        (12, 4, 80, {"slopes": slopes_of(12), "window": 11}),
        (4, 2, 64, {"sinks": filled(np.array([0.5, -3.0, 4.0, 90.0]))}),
        (2, 2, 48, {"sinks": filled(np.array([0.0, 1.0])), "window": 8, "softcap": 3.0}),
        (3, 1, 64, {"chunk": 7}),
        (2, 1, 36, {"chunk": 16, "window": 5, "kind": "f16"}),
    ],
)
def test_kinds_of_attention(heads: int, kv_heads: int, dim: int, options: dict[str, Any]) -> None:
    """Values of another width, sinks, ALiBi, chunks; bounds as for plain attention. What ALiBi takes from a
    score is exact but for two roundings of at most 35 slopes."""
    options = dict(options)
    kind, value_dim = options.pop("kind", "f16"), options.get("value_dim", 0)
    base, q, k, v = attend(heads, kv_heads, dim, [35], available_isas()[0], 1, kind, **options)
    keep = reference.quantized_cache if kind == "q8_0" else lambda a: a.astype(np.float16).astype(np.float64)
    kept = [keep(a.astype(np.float64)) for a in (k, v)]
    exact = {
        name: value.astype(np.float64) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
        if name != "value_dim"
    }
    want = reference.attention(q.astype(np.float64), *kept, 0.3, 0, **exact).reshape(35, -1)
    assert want.shape[1] == heads * (value_dim or dim)
    score_error = 0.3 * dim * EPS * np.abs(q).max() * np.abs(k).max() * np.sqrt(dim) + 70 * EPS
    assert np.abs(base - want).max() <= (2 * score_error + 60 * EPS) * np.abs(v).max()
    for isa in available_isas():
        for runs, threads in (([35], 2), ([1] * 35, 1), ([7, 16, 12], 3)):
            got, *_ = attend(heads, kv_heads, dim, runs, isa, threads, kind, **options)
            np.testing.assert_array_equal(got.view(np.uint32), base.view(np.uint32))


def test_slopes_of_alibi() -> None:
    """The paper's for 8 heads; 12 heads take every second of 16 after the first 8."""
    np.testing.assert_allclose(reference.alibi_slopes(8, 8.0), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(reference.alibi_slopes(12, 8.0)[8:], 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5]))


@pytest.mark.parametrize("isa", available_isas())
def test_a_q8_0_cache_shows_what_is_not_finite_and_keeps_zeros(isa: str) -> None:
    cache = KVCache(16, 1, 96, "q8_0")
    k, v = np.zeros((1, 96), np.float32), np.zeros((1, 96), np.float32)
    k[0, 3], k[0, 40:] = np.nan, 1e-9
    v[0, 3], v[0, 40] = np.inf, 1.0
    builder = ProgramBuilder(1)
    builder.store_kv(filled(k), filled(v), builder.kv_slot(16, 1, 96))
    with Pool(1, isa) as pool:
        builder.build().run(pool, 0, 1, 1, 5, State([cache]))
    keys, values, key_scales, value_scales = cache.arrays
    np.testing.assert_array_equal(np.isnan(key_scales.view(np.float16)[0, 0, :, 5]), [True, False, False])
    np.testing.assert_array_equal(np.isnan(value_scales.view(np.float16)[0, 5]), [True, False, False])
    assert not keys[0, 0, :, 5].any()
    assert not key_scales[0, 0, 1:, 5].any()
    assert values[0, 5].nonzero()[0].tolist() == [40]


@pytest.mark.parametrize("kind", ["relu", "relu2", "drelu"])
@pytest.mark.parametrize(
    "row_type",
    [t for t in RowType if t not in (RowType.F16, RowType.BF16, RowType.Q5_0)],
    ids=lambda t: t.name,
)
def test_gate_first_has_the_bits_of_dense_and_skips(kind: str, row_type: RowType) -> None:
    """Neurons 0 … 9 are inactive for all tokens, and their up and down rows are poisoned for gate-first."""
    rng = np.random.default_rng(4)
    neurons, width = 90, 256
    rows = {name: random_rows(rng, row_type, neurons, width) for name in ("up", "down")}
    poisoned = {name: data.copy() for name, data in rows.items()}
    for data in poisoned.values():
        data.reshape(neurons, -1)[:10] = 0xFF  # NaN in float rows and in every half-precision scale
    gate, x = normal(rng, TOKENS + 1, neurons), normal(rng, TOKENS + 1, width)
    gate[:, :10] = -np.abs(gate[:, :10])
    acts, up, h = (
        Activations(TOKENS + 1, width),
        aligned(gate.shape, np.float32),
        aligned(gate.shape, np.float32),
    )
    dense, sparse = aligned(x.shape, np.float32), aligned(x.shape, np.float32)
    with Pool(1) as pool:
        matrix = Matrix.pack(pool, rows["up"], row_type, neurons, width)
        down = Bundle.pack(pool, neurons, width, down=(rows["down"], row_type))
        both = Bundle.pack(pool, neurons, width, **{k: (v, row_type) for k, v in poisoned.items()})

        def write_dense(b: ProgramBuilder) -> None:
            b.quantize(x, acts)
            b.matmul(matrix, x, acts, up)
            b.activate(gate, up, h, kind)
            b.sum_rows(h, down, dense)

        def write_sparse(b: ProgramBuilder) -> None:
            b.quantize(x, acts)
            b.sparse_ffn(gate, x, acts, both, sparse, h, kind)

        want = on_every_isa(write_dense, dense)
        np.testing.assert_array_equal(on_every_isa(write_sparse, sparse), want)
        builder = ProgramBuilder(TOKENS + 1)
        write_sparse(builder)
        program = builder.build()
        program.run(pool, 0, builder.mark(), TOKENS, 0)
        assert program.total_neurons() == TOKENS * neurons
        active = (gate[:TOKENS] > 0).sum()
        assert program.active_neurons() == active
        assert program.neurons().tolist() == [[0, 0, 0], [active, active, TOKENS * neurons]]
        program.reset_counters()
        assert program.total_neurons() == 0


@pytest.mark.parametrize("kind", ["relu", "relu2"])
@pytest.mark.parametrize(
    "row_type", [RowType.F32, RowType.F16, RowType.Q8_0, RowType.Q4_1, RowType.Q6_K], ids=lambda t: t.name
)
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_an_ffn_of_two_matrices(kind: str, row_type: RowType, tokens: int) -> None:
    """With biases: gate-first and predicted have the bits of dense and agree with the reference; what is not
    selected is poisoned. Neurons 0 … 9 are inactive for all tokens, 80 … 89 are not predicted."""
    rng = np.random.default_rng(6)
    neurons, width = 90, 256
    first, second = (random_rows(rng, row_type, neurons, width) for _ in range(2))
    x, bias = normal(rng, TOKENS + 1, width), normal(rng, neurons)
    bias[:10], bias[80:] = -1e9, -1e9
    scores = np.ones((TOKENS + 1, neurons), np.float32)
    scores[:, 80:] = -1.0
    poisoned = [data.copy() for data in (first, second)]
    poisoned[0].reshape(neurons, -1)[80:] = 0xFF
    poisoned[1].reshape(neurons, -1)[:10] = 0xFF
    poisoned[1].reshape(neurons, -1)[80:] = 0xFF
    acts = Activations(TOKENS + 1, width)
    gate, h = aligned((TOKENS + 1, neurons), np.float32), aligned((TOKENS + 1, neurons), np.float32)
    out = aligned(x.shape, np.float32)
    with Pool(1) as pool:
        matrix = Matrix.pack(pool, first, row_type, neurons, width)
        down = Bundle.pack(pool, neurons, width, down=(second, row_type))
        active_down = Bundle.pack(pool, neurons, width, down=(poisoned[1], row_type))
        both = Bundle.pack(pool, neurons, width, gate=(poisoned[0], row_type), down=(poisoned[1], row_type))

    def dense(b: ProgramBuilder) -> None:
        b.quantize(x, acts)
        b.matmul(matrix, x, acts, gate, bias=bias)
        b.activate(gate, None, h, kind)
        b.sum_rows(h, down, out)

    def gate_first(b: ProgramBuilder) -> None:
        b.quantize(x, acts)
        b.matmul(matrix, x, acts, gate, bias=bias)
        b.sparse_ffn(gate, x, acts, active_down, out, h, kind)

    def predicted(b: ProgramBuilder) -> None:
        b.quantize(x, acts)
        b.sparse_ffn(filled(scores), x, acts, both, out, h, kind, gate=gate, bias=bias)

    want = on_every_isa(dense, out, tokens=tokens)
    rows = [dequantize(data, row_type, neurons, width).astype(np.float64) for data in (first, second)]
    exact = x[:tokens].astype(np.float64) @ rows[0].T + bias
    expected = reference.sparse_ffn(exact, x, None, rows[1], kind)
    # Activations of quantised rows have 8 bits: 0.5 % of a block's deviation each, squared for relu2.
    bound = 1e-4 if row_type.is_float else 0.02
    assert np.sqrt(np.mean((want - expected) ** 2)) <= bound * np.sqrt(np.mean(expected**2))
    np.testing.assert_array_equal(on_every_isa(gate_first, out, tokens=tokens), want)
    if tokens == 1:  # from four tokens on all rows are read
        np.testing.assert_array_equal(on_every_isa(predicted, out, tokens=tokens), want)


def test_predicted_rows_of_many_tokens_have_the_bits_of_dense() -> None:
    """Where all rows are read, those that no predictor names count for nothing, biased or not."""
    rng = np.random.default_rng(7)
    neurons, width = 50, 96
    first, second = (random_rows(rng, RowType.Q4_0, neurons, width) for _ in range(2))
    x, bias, scores = normal(rng, TOKENS, width), normal(rng, neurons), normal(rng, TOKENS, neurons)
    acts, out = Activations(TOKENS, width), aligned(x.shape, np.float32)
    gate, h = aligned(scores.shape, np.float32), aligned(scores.shape, np.float32)
    with Pool(1) as pool:
        matrix = Matrix.pack(pool, first, RowType.Q4_0, neurons, width)
        down = Bundle.pack(pool, neurons, width, down=(second, RowType.Q4_0))
        both = Bundle.pack(pool, neurons, width, gate=(first, RowType.Q4_0), down=(second, RowType.Q4_0))
        builder = ProgramBuilder(TOKENS)
        builder.quantize(x, acts)
        builder.matmul(matrix, x, acts, gate, bias=bias)
        builder.activate(gate, None, h, "relu")
        builder.build().run(pool, 0, 3, TOKENS, 0)
        named, active = scores > 0, gate > 0
        h[~named] = 0
        builder = ProgramBuilder(TOKENS)
        builder.sum_rows(h, down, out)
        builder.build().run(pool, 0, 1, TOKENS, 0)
        want = out.copy()
        builder = ProgramBuilder(TOKENS)
        builder.quantize(x, acts)
        builder.sparse_ffn(scores, x, acts, both, out, h, "relu", gate=gate, bias=bias)
        program = builder.build()
        program.run(pool, 0, 2, TOKENS, 0)
        np.testing.assert_array_equal(out, want)
        counts = (program.active_neurons(), program.confirmed_neurons(), program.total_neurons())
        assert counts == (named.sum(), (named & active).sum(), named.size)
        program.reset_counters()
        program.run(pool, 0, 2, 1, 0)
        counts = (program.active_neurons(), program.confirmed_neurons(), program.total_neurons())
        assert counts == (named[0].sum(), (named & active)[0].sum(), named[0].size)


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_gates_up_to_the_cut_of_fatrelu_count_for_nothing(tokens: int) -> None:
    """In every operation; 0.25 is exact in float32, and gates that equal it are inactive."""
    rng = np.random.default_rng(9)
    neurons, width, cut = 90, 96, 0.25
    up_rows, down_rows = (random_rows(rng, RowType.Q8_0, neurons, width) for _ in range(2))
    gate, x = normal(rng, tokens + 1, neurons), normal(rng, tokens + 1, width)
    gate[:, :10], gate[:, 10:20] = cut, 0.1
    acts, up = Activations(tokens + 1, width), aligned(gate.shape, np.float32)
    h, out = aligned(gate.shape, np.float32), aligned(x.shape, np.float32)
    for rows in (up_rows, down_rows):
        rows.reshape(neurons, -1)[:20] = 0xFF if tokens == 1 else 0
    counts, squares = np.zeros(neurons, np.uint64), [np.zeros(neurons), np.zeros(neurons)]
    with Pool(1) as pool:
        matrix = Matrix.pack(pool, up_rows, RowType.Q8_0, neurons, width)
        both = Bundle.pack(pool, neurons, width, up=(up_rows, RowType.Q8_0), down=(down_rows, RowType.Q8_0))

    def dense(b: ProgramBuilder) -> None:
        b.quantize(x, acts)
        b.matmul(matrix, x, acts, up)
        b.observe(gate, up, "fatrelu", counts, None, *squares, cut=cut)
        b.activate(gate, up, h, "fatrelu", cut)
        b.sum_rows(h, both, out)

    def sparse(b: ProgramBuilder) -> None:
        b.quantize(x, acts)
        least = np.full(neurons, cut, np.float32)
        b.sparse_ffn(gate, x, acts, both, out, h, "fatrelu", threshold=least, cut=cut)

    got = on_every_isa(sparse, out, tokens=tokens)
    assert np.isfinite(got).all()
    if tokens == 1:  # a NaN of up spoils dense: 0 · NaN
        up_rows.reshape(neurons, -1)[:20] = 0
        with Pool(1) as pool:
            matrix = Matrix.pack(pool, up_rows, RowType.Q8_0, neurons, width)
    np.testing.assert_array_equal(got, on_every_isa(dense, out, tokens=tokens))
    active = gate[:tokens].astype(np.float64) > cut
    assert not active[:, :20].any()
    runs = 3 * len(available_isas())
    np.testing.assert_array_equal(counts > 0, active.any(axis=0))
    kept = np.where(active, gate[:tokens].astype(np.float64), 0)
    np.testing.assert_allclose(squares[0], runs * (kept**2).sum(axis=0), rtol=1e-14)
    wide = x[:tokens].astype(np.float64)
    rows = [dequantize(r, RowType.Q8_0, neurons, width).astype(np.float64) for r in (up_rows, down_rows)]
    rows[1][:20] = 0
    want = reference.sparse_ffn(gate[:tokens].astype(np.float64), wide, *rows, "fatrelu", cut)
    assert np.sqrt(np.mean((got - want) ** 2)) <= 0.02 * np.sqrt(np.mean(want**2))


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_observe_without_up(kind: str) -> None:
    """As with an up that counts as one."""
    rng = np.random.default_rng(8)
    one = 0.0 if kind == "swiglu_oai" else 1.0
    gate, ones = normal(rng, TOKENS, 131), np.full((TOKENS, 131), one, np.float32)
    seen = []
    for up in (None, filled(ones)):
        counted = (np.zeros(131, np.uint64), np.zeros((131, 128), np.uint32), np.zeros(131), np.zeros(131))
        builder = ProgramBuilder(TOKENS)
        builder.observe(gate, up, kind, *counted, cut=cut_of(kind))
        with Pool(2) as pool:
            builder.build().run(pool, 0, 1, TOKENS, 0)
        seen.append(counted)
    for without, with_ones in zip(*seen, strict=True):
        np.testing.assert_array_equal(without, with_ones)
    assert seen[0][0].any()


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_observe(kind: str) -> None:
    """Counts, bins and squares follow from the activations that the same kernels give."""
    rng = np.random.default_rng(5)
    width = 130
    gate = filled(rng.standard_normal((TOKENS, width)) * 10.0 ** rng.uniform(-6, 3, (TOKENS, width)))
    up = normal(rng, TOKENS, width)
    act, product = aligned(gate.shape, np.float32), aligned(gate.shape, np.float32)
    counts, histogram = np.zeros(width, np.uint64), np.zeros((width, 128), np.uint32)
    squares = [np.zeros(width), np.zeros(width)]
    builder = ProgramBuilder(TOKENS)
    cut = cut_of(kind)
    builder.activate(gate, None, act, kind, cut)
    builder.activate(gate, up, product, kind, cut)
    builder.observe(gate, up, kind, counts, histogram, *squares, cut=cut)
    program = builder.build()
    runs = 0
    for isa in available_isas():
        for threads in (1, 2, 3):
            with Pool(threads, isa) as pool:
                program.run(pool, 0, 3, TOKENS, 0)
            runs += 1
    bins = np.clip((np.abs(product).view(np.uint32) >> 21).astype(np.int64) - ((127 - 16) << 2), 0, 127)
    expected = np.zeros((width, 128), np.uint32)
    for row in bins:
        expected[np.arange(width), row] += 1
    np.testing.assert_array_equal(histogram, runs * expected)
    np.testing.assert_array_equal(counts, runs * (product != 0).sum(axis=0))
    factor = np.maximum(up, 0) if kind == "drelu" else up
    if kind in CLAMPED_KINDS:
        factor = np.clip(up, -7, 7) + np.float32(kind == "swiglu_oai")
    for got, values in zip(squares, (act, factor), strict=True):
        np.testing.assert_allclose(got, runs * (values.astype(np.float64) ** 2).sum(axis=0), rtol=1e-14)
