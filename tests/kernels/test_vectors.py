"""Norms, products, functions of single values and copies of columns: against the float64 reference, with the
same bits on every instruction set and for every thread count."""

from typing import Any

import numpy as np
import pytest

from powerinfer_kernels import KernelError, Pool, ProgramBuilder, aligned, reference
from test_operations import EPS, TOKENS, filled, normal, on_every_isa


@pytest.mark.parametrize(("width", "groups"), [(2, 1), (51, 3), (144, 4)])
@pytest.mark.parametrize("own", [False, True])
def test_layer_norm_of_groups(width: int, groups: int, own: bool) -> None:
    """Heads of 17 and 36 values; weights that the groups share, or that each has for itself."""
    rng = np.random.default_rng(width)
    x = normal(rng, TOKENS + 1, width)
    weight, bias = (normal(rng, width if own else width // groups) for _ in range(2))
    out = aligned(x.shape, np.float32)
    wide = [a.astype(np.float64) for a in (x[:TOKENS], weight, bias)]
    for used in ((weight, bias), (weight, None), (None, None)):
        got = on_every_isa(lambda b, u=used: b.layer_norm(x, *u, out, 1e-5, groups), out)
        exact = [None if a is None else w for a, w in zip(used, wide[1:], strict=True)]
        want = reference.layer_norm(wide[0], *exact, 1e-5, groups)
        parts = wide[0].reshape(TOKENS, groups, -1)
        size = np.abs(parts).max() / parts.std(axis=2).min() * np.abs(weight).max() + np.abs(bias).max()
        assert np.abs(got - want).max() <= (width // groups + 8) * EPS * size


@pytest.mark.parametrize(("width", "groups"), [(36, 1), (51, 3), (160, 2)])
def test_rms_norm_with_weights_of_every_group(width: int, groups: int) -> None:
    rng = np.random.default_rng(width)
    x, weight = normal(rng, TOKENS + 1, width), normal(rng, width)
    out = aligned(x.shape, np.float32)
    got = on_every_isa(lambda b: b.rms_norm(x, weight, out, 1e-5, groups), out)
    want = reference.rms_norm(x[:TOKENS].astype(np.float64), weight.astype(np.float64), 1e-5, groups)
    assert (np.abs(got - want) <= (width / groups / 2 + 4) * EPS * np.abs(want)).all()


@pytest.mark.parametrize(("width", "groups"), [(1, 1), (72, 2), (111, 3)])
def test_l2_norm(width: int, groups: int) -> None:
    """As for rms_norm; in place."""
    rng = np.random.default_rng(width)
    start, x = normal(rng, TOKENS + 1, width), aligned((TOKENS + 1, width), np.float32)
    got = on_every_isa(lambda b: b.l2_norm(x, x, 1e-6, groups), x, start=start)
    want = reference.l2_norm(start[:TOKENS].astype(np.float64), 1e-6, groups)
    assert (np.abs(got - want) <= (width / groups / 2 + 4) * EPS * np.abs(want)).all()


@pytest.mark.parametrize("width", [33, 1000])
def test_keep_top_has_exact_zeros(width: int) -> None:
    """The cut is off by n·eps of the largest value at most; values nearer to it than that may fall on either
    side, where the reference has them nearly zero, too."""
    rng = np.random.default_rng(width)
    x, out = normal(rng, TOKENS + 1, width), aligned((TOKENS + 1, width), np.float32)
    got = on_every_isa(lambda b: b.keep_top(x, out, 1.64), out)
    want = reference.keep_top(x[:TOKENS].astype(np.float64), 1.64)
    bound = (width + 8) * EPS * np.abs(x).max()
    assert np.abs(got - want).max() <= bound
    assert (got == 0).mean() > 0.85
    assert ((got == 0) | (want > 0) | (got <= bound)).all()


@pytest.mark.parametrize(("count", "made", "width"), [(4, 4, 33), (1, 3, 70), (3, 1, 16)])
def test_combine(count: int, made: int, width: int) -> None:
    """Each sum has `count` products."""
    rng = np.random.default_rng(width)
    x, factors = normal(rng, TOKENS + 1, count * width), normal(rng, TOKENS + 1, made * count)
    out = aligned((TOKENS + 1, made * width), np.float32)
    got = on_every_isa(lambda b: b.combine(x, factors, out, width), out)
    wide, coefficients = (a[:TOKENS].astype(np.float64) for a in (x, factors))
    want = reference.combine(wide, coefficients, width)
    sizes = reference.combine(np.abs(wide), np.abs(coefficients), width)
    assert (np.abs(got - want) <= (count + 1) * EPS * sizes).all()
    builder = ProgramBuilder(TOKENS + 1)
    with pytest.raises(KernelError, match="coefficients"):
        builder.combine(x, normal(rng, TOKENS + 1, made * count + 1), out, width)


def test_multiply() -> None:
    """By another value, by a vector, and by one value for several columns, of each token or of all."""
    rng = np.random.default_rng(1)
    start = normal(rng, TOKENS + 1, 78)
    for repeat in (1, 6, 39, 78):
        src = normal(rng, TOKENS + 1, 78 // repeat)
        for tokens in (1, TOKENS):
            out, begin = aligned((tokens + 1, 78), np.float32), start[: tokens + 1]
            each, shared = filled(src[: tokens + 1]), filled(src[0])
            got = on_every_isa(lambda b, s=each, o=out, r=repeat: b.multiply(s, o, r), out, begin, tokens)
            np.testing.assert_array_equal(got, (begin * np.repeat(each, repeat, axis=1))[:tokens])
            got = on_every_isa(lambda b, s=shared, o=out, r=repeat: b.multiply(s, o, r), out, begin, tokens)
            np.testing.assert_array_equal(got, (begin * np.repeat(shared, repeat))[:tokens])


def test_add_scaled() -> None:
    rng = np.random.default_rng(2)
    start, src = normal(rng, TOKENS + 1, 77), normal(rng, TOKENS + 1, 77)
    out, factor = aligned(start.shape, np.float32), np.float32(0.22)
    got = on_every_isa(lambda b: b.add(src, out, float(factor)), out, start=start)
    np.testing.assert_array_equal(got, (start + factor * src)[:TOKENS])


def test_scale_and_clamp_are_exact() -> None:
    start = normal(np.random.default_rng(3), TOKENS + 1, 45)
    start[0, 0] = np.nan
    x = aligned(start.shape, np.float32)
    got = on_every_isa(lambda b: b.scale(x, 12.5), x, start=start)
    np.testing.assert_array_equal(got, (start * np.float32(12.5))[:TOKENS])
    got = on_every_isa(lambda b: b.clamp(x, -0.5, 1.0), x, start=start)
    np.testing.assert_array_equal(got, np.clip(start, -0.5, 1.0)[:TOKENS])


def test_softcap() -> None:
    """tanh is within 2 ulp of an argument that one division rounded; a product follows."""
    start = normal(np.random.default_rng(4), TOKENS + 1, 45) * np.float32(40)
    x = aligned(start.shape, np.float32)
    got = on_every_isa(lambda b: b.softcap(x, 30.0), x, start=start)
    want = reference.softcap(start[:TOKENS].astype(np.float64), 30.0)
    assert (np.abs(got - want) <= 6 * EPS * np.abs(want)).all()


def test_xielu() -> None:
    """e^x − 1 is within 8 ulp (two tanh, a difference, a quotient); taking x from it cancels, so the bound is
    one of the terms."""
    rng = np.random.default_rng(5)
    start = normal(rng, TOKENS + 1, 333) * np.float32(10) ** filled(rng.uniform(-6, 1.5, (TOKENS + 1, 333)))
    constants = (0.8, 0.9, 0.5, -1e-6)
    x = aligned(start.shape, np.float32)
    got = on_every_isa(lambda b: b.xielu(x, *constants), x, start=filled(start))
    wide = start[:TOKENS].astype(np.float64)
    want = reference.xielu(wide, *(float(np.float32(c)) for c in constants))
    terms = np.where(wide > 0, wide * wide, np.abs(np.expm1(np.minimum(wide, -1e-6))) + np.abs(wide))
    assert (np.abs(got - want) <= 16 * EPS * (terms + np.abs(wide))).all()


def test_scale_by_position() -> None:
    rng = np.random.default_rng(6)
    start, table = normal(rng, TOKENS + 1, 34), normal(rng, TOKENS + 3)
    x = aligned(start.shape, np.float32)
    got = on_every_isa(lambda b: b.scale_by_position(x, table), x, start=start)
    np.testing.assert_array_equal(got, (start * table[: TOKENS + 1, None])[:TOKENS])
    builder = ProgramBuilder(TOKENS + 1)
    builder.scale_by_position(x, table)
    program = builder.build()
    x[:2] = start[:2]
    with Pool(2) as pool:
        program.run(pool, 0, 1, 2, 6)
        np.testing.assert_array_equal(x[:2], start[:2] * table[6:8, None])
        with pytest.raises(KernelError, match="do not fit a context of 8"):
            program.run(pool, 0, 1, 3, 6)


def test_copy_of_columns() -> None:
    """A slice of each of three heads; and one slice for all of them."""
    rng = np.random.default_rng(7)
    src, out = normal(rng, TOKENS + 1, 3 * 20 + 1), aligned((TOKENS + 1, 2 + 3 * 9), np.float32)
    start = normal(rng, *out.shape)

    def each(b: ProgramBuilder) -> None:
        b.copy(src, out, 7, src_first=1 + 13, out_first=2, heads=3, src_step=20, out_step=9)

    want = start[:TOKENS].copy()
    for head in range(3):
        want[:, 2 + 9 * head : 9 + 9 * head] = src[:TOKENS, 14 + 20 * head : 21 + 20 * head]
    np.testing.assert_array_equal(on_every_isa(each, out, start=start), want)

    def same(b: ProgramBuilder) -> None:
        b.copy(src, out, 9, src_first=5, out_first=2, heads=3, out_step=9)

    want[:, 2:] = np.tile(src[:TOKENS, 5:14], 3)
    np.testing.assert_array_equal(on_every_isa(same, out, start=start), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 11}, "do not fit src's 10"),
        ({"count": 4, "src_first": 7}, "do not fit src's 10"),
        ({"count": 4, "out_first": -1}, "do not fit out's 12"),
        ({"count": 4, "heads": 3, "out_step": 5}, "do not fit out's 12"),
        ({"count": 4, "heads": 2, "out_step": 3}, "overlap"),
        ({"count": 0}, "count must be a positive integer"),
    ],
)
def test_copies_beyond_the_columns_are_refused(options: dict[str, Any], message: str) -> None:
    builder = ProgramBuilder(2)
    with pytest.raises(KernelError, match=message):
        builder.copy(aligned((2, 10), np.float32), aligned((2, 12), np.float32), **options)


def test_vectors_that_do_not_fit_are_refused() -> None:
    builder, x = ProgramBuilder(2), aligned((2, 12), np.float32)
    with pytest.raises(KernelError, match="out must be a float32 array of shape"):
        builder.multiply(aligned((2, 2), np.float32), x, 5)
    with pytest.raises(KernelError, match="must not share memory"):
        builder.multiply(x, x)
    with pytest.raises(KernelError, match="bias must be"):
        builder.layer_norm(x, aligned((12,), np.float32), aligned((6,), np.float32), x, 1e-5, 2)
    with pytest.raises(KernelError, match="soft cap must be positive"):
        builder.softcap(x, 0.0)
    with pytest.raises(KernelError, match="cannot clamp"):
        builder.clamp(x, 1.0, 0.0)
    with pytest.raises(KernelError, match="factor must be finite"):
        builder.add(aligned((2, 12), np.float32), x, float("nan"))
