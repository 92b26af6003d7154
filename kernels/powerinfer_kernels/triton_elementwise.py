"""What stands between the matrices of a layer, for one token, in Triton: norms, rotary positions, and the
rounding of activations to what the integer kernels take (quantize.inc). Each is one launch. Divisions and
roots are rounded correctly: what a GPU takes for them by default is off by up to two units in the last place.

Parameters carry no annotations but constexpr, since Triton reads them; shapes stand in the docstrings.
"""

import triton
import triton.language as tl

#: Values that share a scale, and the largest code.
BLOCK = tl.constexpr(32)
LARGEST = tl.constexpr(127.0)
#: Below it, one over a scale could overflow: such a block is all zeros. 2^-126.
LEAST_SCALE = tl.constexpr(1.1754943508222875e-38)
#: Added and taken away again, it rounds to the nearest whole number, to even ones between two. 1.5 · 2^23.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def codes_of(x):
    """Codes [N, 32] of blocks x [N, 32], zeros where that is no number; and their scales max|x| / 127 [N, 1],
    NaN where x is not finite."""
    finite = tl.sum(x * 0.0, axis=1)[:, None]
    scale = tl.div_rn(tl.max(tl.abs(x), axis=1)[:, None], LARGEST)
    usable = (scale >= LEAST_SCALE) & (finite == 0.0)
    codes = (x * tl.div_rn(1.0, tl.where(usable, scale, 1.0)) + ROUNDER) - ROUNDER
    return tl.where(usable, codes, 0.0), tl.where(finite == 0.0, scale, float("nan"))


@triton.jit
def store_rounded(x, at, mask, columns, rounded, codes):
    """Blocks x [N, 32], of a row of ``columns`` values those at ``at``, as the integer kernels take them: as
    ``rounded`` float32 [columns], codes times scales, which are kept to 11 bits; and as ``codes`` int32
    [columns / 4 + columns / 32], bytes of codes, then float32 scales. Either may be None."""
    values, scale = codes_of(x)
    bits = scale.to(tl.int32, bitcast=True)
    kept = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
    kept = tl.where(scale < LEAST_SCALE, 0.0, tl.where(scale == scale, kept, scale))
    if rounded is not None:
        tl.store(rounded + at, values * kept, mask=mask)
    if codes is not None:
        tl.store(codes.to(tl.pointer_type(tl.int8), bitcast=True) + at, values.to(tl.int8), mask=mask)
        scales = (codes + columns // 4).to(tl.pointer_type(tl.float32), bitcast=True)
        kept = tl.broadcast_to(kept, x.shape)
        tl.store(scales + at // BLOCK, kept, mask=mask & (at % BLOCK == 0))


@triton.jit
def places(first, COUNT: tl.constexpr):
    """[COUNT / 32, 32]: ``first`` and what follows."""
    return first + tl.arange(0, COUNT // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def mean_of(x, WIDTH: tl.constexpr):
    """The sum of x [N, 32] over WIDTH, rounded once."""
    return tl.div_rn(tl.sum(tl.sum(x, axis=1), axis=0), WIDTH * 1.0)


@triton.jit(do_not_specialize=["eps"])
def norm_kernel(x, weight, bias, exact, rounded, codes, eps, WIDTH: tl.constexpr, WIDE: tl.constexpr,
                LAYER: tl.constexpr):  # fmt: skip
    """exact [rows, WIDTH] = the norm of each row of x by root mean square, or with LAYER by mean and
    deviation, times ``weight`` (+ ``bias``, or None); also as :func:`store_rounded` does it, ``codes`` of
    one row only. May be in place. WIDE is WIDTH rounded up to a power of two, at least 32. Grid (rows)."""
    column = places(0, WIDE)
    mask, at = column < WIDTH, tl.program_id(0) * WIDTH + column
    value = tl.load(x + at, mask=mask, other=0.0)
    if LAYER:
        value = tl.where(mask, value - mean_of(value, WIDTH), 0.0)
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean_of(value * value, WIDTH) + eps))
    value = value * factor * tl.load(weight + column, mask=mask, other=0.0)
    if bias is not None:
        value += tl.load(bias + column, mask=mask, other=0.0)
    tl.store(exact + at, value, mask=mask)
    if rounded is not None:
        rounded += tl.program_id(0) * WIDTH
    if rounded is not None or codes is not None:
        store_rounded(value, column, mask, WIDTH, rounded, codes)


@triton.jit(do_not_specialize=["count"])
def round_kernel(x, rounded, codes, count, VALUES: tl.constexpr):
    """x [count] as :func:`store_rounded` does it. Grid (⌈count / VALUES⌉)."""
    at = places(tl.program_id(0) * VALUES, VALUES)
    mask = at < count
    store_rounded(tl.load(x + at, mask=mask, other=0.0), at, mask, count, rounded, codes)


@triton.jit(do_not_specialize=["factor", "count"])
def join_kernel(x, first, second, bias, factor, count, VALUES: tl.constexpr):
    """x [count] += factor · (first + second + bias), added in this order; the last two may be None. Grid
    (⌈count / VALUES⌉)."""
    at = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    mask = at < count
    total = tl.load(first + at, mask=mask, other=0.0)
    if second is not None:
        total += tl.load(second + at, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + at, mask=mask, other=0.0)
    tl.store(x + at, tl.load(x + at, mask=mask, other=0.0) + factor * total, mask=mask)


@triton.jit
def rotate_kernel(query, key, cos, sin, position, HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
                  WIDE: tl.constexpr, NEOX: tl.constexpr):  # fmt: skip
    """Rotate the pairs of each head of ``query`` [HEADS, DIM] and ``key`` [heads, DIM] by their angles, in
    place: of ``cos`` and ``sin`` [context, HALF] the row ``position`` int64 [1]. With NEOX (i, i + HALF) are
    pairs, else (2i, 2i + 1). Grid (heads of both)."""
    head, pair = tl.program_id(0), tl.arange(0, WIDE)
    mask, row = pair < HALF, tl.load(position) * HALF
    c = tl.load(cos + row + pair, mask=mask, other=0.0)
    s = tl.load(sin + row + pair, mask=mask, other=0.0)
    if head < HEADS:
        turn(query + head * DIM, pair, c, s, mask, HALF, NEOX)
    else:
        turn(key + (head - HEADS) * DIM, pair, c, s, mask, HALF, NEOX)


@triton.jit
def turn(base, pair, c, s, mask, HALF: tl.constexpr, NEOX: tl.constexpr):
    """One head."""
    if NEOX:
        first, second = base + pair, base + HALF + pair
    else:
        first, second = base + 2 * pair, base + 2 * pair + 1
    a, b = tl.load(first, mask=mask, other=0.0), tl.load(second, mask=mask, other=0.0)
    tl.store(first, a * c - b * s, mask=mask)
    tl.store(second, a * s + b * c, mask=mask)


@triton.jit
def turned(vector, position, cos, sin, there, DIM: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr,
           NEOX: tl.constexpr):  # fmt: skip
    """float32 [WIDE]: a head of DIM values, as :func:`rotate_kernel` rotates it where HALF > 0; 0 beyond it,
    and all where not ``there`` (a condition)."""
    column = tl.arange(0, WIDE)
    x = tl.load(vector + column, mask=column < tl.where(there, DIM, 0), other=0.0)
    if HALF > 0:
        if NEOX:
            pair, first = column % HALF, column < HALF
            partner = tl.where(first, column + HALF, column - HALF)
        else:
            pair, first = column // 2, column % 2 == 0
            partner = tl.where(first, column + 1, column - 1)
        mask, row = column < tl.where(there, 2 * HALF, 0), tl.load(position) * HALF
        y = tl.load(vector + partner, mask=mask, other=0.0)
        c = tl.load(cos + row + pair, mask=mask, other=1.0)
        s = tl.load(sin + row + pair, mask=mask, other=0.0)
        x = tl.where(mask, tl.where(first, x * c - y * s, y * s + x * c), x)
    return x


@triton.jit
def keep(x, data, scales, row, there, DIM: tl.constexpr, WIDE: tl.constexpr):
    """Keep the head x [WIDE] as the vector ``row`` of a cache, where ``there``; float32 [WIDE] of what the
    cache has of it then."""
    column = tl.arange(0, WIDE)
    at, mask = data + row * DIM + column, column < tl.where(there, DIM, 0)
    if scales is None:
        half = x.to(tl.float16)
        tl.store(at, half, mask=mask)
        out = half.to(tl.float32)
    else:
        codes, scale = codes_of(tl.reshape(x, (WIDE // BLOCK, BLOCK)))
        kept = scale.to(tl.float16)
        codes = tl.where(kept == 0.0, 0.0, codes)
        tl.store(at, tl.reshape(codes, (WIDE,)).to(tl.int8), mask=mask)
        block = tl.arange(0, WIDE // BLOCK)[:, None]
        tl.store(scales + row * (DIM // BLOCK) + block, kept, mask=block < tl.where(there, DIM // BLOCK, 0))
        out = tl.reshape(codes * kept.to(tl.float32), (WIDE,))
    return out


@triton.jit(do_not_specialize=["context"])
def store_kernel(key, value, keys, key_scales, values, value_scales, position, context, DIM: tl.constexpr,
                 WIDE: tl.constexpr):  # fmt: skip
    """Keep ``key`` and ``value`` [heads, DIM] at ``position`` int64 [1] of caches [heads, context, DIM]:
    float16, or int8 with float16 scales [heads, context, DIM / 32]. Grid (heads, 2)."""
    head = tl.program_id(0)
    row, there = head.to(tl.int64) * context + tl.load(position), head >= 0
    if tl.program_id(1) == 0:
        x = turned(key + head * DIM, position, None, None, there, DIM, WIDE, 0, False)
        keep(x, keys, key_scales, row, there, DIM, WIDE)
    else:
        x = turned(value + head * DIM, position, None, None, there, DIM, WIDE, 0, False)
        keep(x, values, value_scales, row, there, DIM, WIDE)
