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
def as_rounded(x):
    """Codes times scales of blocks x [N, 32]; scales are kept to 11 bits."""
    codes, scale = codes_of(x)
    bits = scale.to(tl.int32, bitcast=True)
    kept = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
    kept = tl.where(scale < LEAST_SCALE, 0.0, tl.where(scale == scale, kept, scale))
    return codes * kept


@triton.jit
def places(first, COUNT: tl.constexpr):
    """[COUNT / 32, 32]: ``first`` and what follows."""
    return first + tl.arange(0, COUNT // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def mean_of(x, WIDTH: tl.constexpr):
    """The sum of x [N, 32] over WIDTH, rounded once."""
    return tl.div_rn(tl.sum(tl.sum(x, axis=1), axis=0), WIDTH * 1.0)


@triton.jit(do_not_specialize=["eps"])
def norm_kernel(x, weight, bias, exact, rounded, eps, WIDTH: tl.constexpr, WIDE: tl.constexpr,
                LAYER: tl.constexpr):  # fmt: skip
    """exact [rows, WIDTH] = the norm of each row of x by root mean square, or with LAYER by mean and
    deviation, times ``weight`` (+ ``bias``, or None); the same rounded, or None. May be in place. WIDE is
    WIDTH rounded up to a power of two, at least 32. Grid (rows)."""
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
        tl.store(rounded + at, as_rounded(value), mask=mask)


@triton.jit(do_not_specialize=["count"])
def round_kernel(x, out, count, VALUES: tl.constexpr):
    """out [count] = x as the integer kernels take it, in blocks of 32. Grid (⌈count / VALUES⌉)."""
    at = places(tl.program_id(0) * VALUES, VALUES)
    tl.store(out + at, as_rounded(tl.load(x + at, mask=at < count, other=0.0)), mask=at < count)


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


@triton.jit(do_not_specialize=["context"])
def store_kernel(key, value, keys, key_scales, values, value_scales, position, context, DIM: tl.constexpr,
                 WIDE: tl.constexpr):  # fmt: skip
    """Keep ``key`` and ``value`` [heads, DIM] at ``position`` int64 [1] of caches [heads, context, DIM]:
    float16, or int8 with float16 scales [heads, context, DIM / 32]. Grid (heads, 2)."""
    if tl.program_id(1) == 0:
        keep(key, keys, key_scales, position, context, DIM, WIDE)
    else:
        keep(value, values, value_scales, position, context, DIM, WIDE)


@triton.jit
def keep(vector, data, scales, position, context, DIM: tl.constexpr, WIDE: tl.constexpr):
    """One head of one of both."""
    head, column = tl.program_id(0), places(0, WIDE)
    mask = column < DIM
    row = head.to(tl.int64) * context + tl.load(position)
    x = tl.load(vector + head * DIM + column, mask=mask, other=0.0)
    if scales is None:
        tl.store(data + row * DIM + column, x.to(tl.float16), mask=mask)
    else:
        codes, scale = codes_of(x)
        kept = scale.to(tl.float16)
        block = tl.arange(0, WIDE // BLOCK)[:, None]
        tl.store(data + row * DIM + column, tl.where(kept == 0.0, 0.0, codes).to(tl.int8), mask=mask)
        tl.store(scales + row * (DIM // BLOCK) + block, kept, mask=block < DIM // BLOCK)
