"""Attention of single tokens over a KV cache, in Triton; how far the cache reaches is read on the device.

The grid is that of the whole context, so that a CUDA graph holds for every position: programs of positions
that are not there yet end at once, and nothing beyond the token's own position is read. Positions come in
splits of a fixed length, whose sums :func:`combine_kernel` adds: results depend on the position alone.

Parameters carry no annotations but constexpr, since Triton reads them; shapes stand in the docstrings.
"""

import triton
import triton.language as tl

from .triton_elementwise import keep, places, store_rounded, turned
from .triton_ffn import tanh

#: Values of a head that share a scale in a cache of bytes.
SCALED = tl.constexpr(32)


@triton.jit
def bounds(position, WINDOW: tl.constexpr):
    """The first position that the token at ``position`` sees, and the end of all that it sees."""
    at = tl.load(position).to(tl.int32)
    first = at * 0
    if WINDOW > 0:
        first = tl.maximum(at + 1 - WINDOW, 0)
    return first, at + 1


@triton.jit
def load_vectors(data, scales, head, at, live, context, DIM: tl.constexpr, WIDE: tl.constexpr):
    """float32 [BLOCK, WIDE]: the vectors of ``head`` at positions ``at`` [BLOCK]; 0 where not ``live``."""
    column = tl.arange(0, WIDE)[None, :]
    row = (head.to(tl.int64) * context + at)[:, None]
    mask = live[:, None] & (column < DIM)
    out = tl.load(data + row * DIM + column, mask=mask, other=0.0).to(tl.float32)
    if scales is not None:
        scale = tl.load(scales + row * (DIM // SCALED) + column // SCALED, mask=mask, other=0.0)
        out *= scale.to(tl.float32)
    return out


@triton.jit
def capped(score, softcap, CAPPED: tl.constexpr):
    """Scores within ± ``softcap``, where they are CAPPED."""
    if CAPPED:
        score = softcap * tanh(tl.div_rn(score, softcap))
    return score


@triton.jit(do_not_specialize=["context", "splits", "scale", "softcap"])
def attend_kernel(query, key, value, cos, sin, keys, key_scales, values, value_scales, position, partial,
                  context, splits, scale, softcap, GROUP: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
                  HALF: tl.constexpr, NEOX: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
                  SPLIT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """partial [heads, splits, DIM + 2]: of each split of SPLIT positions that ``query`` [heads, DIM] sees,
    the sum of values with weights exp(score − largest), then the sum of weights and the largest score. Splits
    that it does not see are not written. Grid (heads, splits).

    ``keys``, ``values`` [heads / GROUP, context, DIM] are float16, or int8 with float16 scales
    [heads / GROUP, context, DIM / 32]; those of ``position`` int64 [1] are ``key`` and ``value``
    [heads / GROUP, DIM], and are kept there by one of the heads that share them: all of these take them from
    where they are now, and none reads what another writes. Queries and keys are rotated first where HALF > 0,
    see :func:`turned`. WIDE is DIM rounded up to a power of two, at least 32.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    begin, end = bounds(position, WINDOW)
    first, last = tl.maximum(begin, split * SPLIT), tl.minimum(end - 1, (split + 1) * SPLIT)
    newest = split == (end - 1) // SPLIT
    if (first < last) | newest:
        column, shared = tl.arange(0, WIDE), head // GROUP
        q = turned(query + head * DIM, position, cos, sin, split >= 0, DIM, WIDE, HALF, NEOX)
        largest, total = float("-inf"), 0.0
        sums = tl.zeros((WIDE,), tl.float32)
        for block in range(first, last, BLOCK):
            at = block + tl.arange(0, BLOCK)
            live = at < last
            k = load_vectors(keys, key_scales, shared, at, live, context, DIM, WIDE)
            score = capped(tl.sum(k * q[None, :], axis=1) * scale, softcap, CAPPED)
            score = tl.where(live, score, float("-inf"))
            now = tl.maximum(largest, tl.max(score, axis=0))
            weight, kept = tl.exp(score - now), tl.exp(largest - now)
            v = load_vectors(values, value_scales, shared, at, live, context, DIM, WIDE)
            sums = sums * kept + tl.sum(weight[:, None] * v, axis=0)
            total = total * kept + tl.sum(weight, axis=0)
            largest = now
        row, mine = shared.to(tl.int64) * context + end - 1, newest & (head % GROUP == 0)
        k = turned(key + shared * DIM, position, cos, sin, newest, DIM, WIDE, HALF, NEOX)
        v = turned(value + shared * DIM, position, None, None, newest, DIM, WIDE, 0, NEOX)
        k = keep(k, keys, key_scales, row, mine, DIM, WIDE)
        v = keep(v, values, value_scales, row, mine, DIM, WIDE)
        score = capped(tl.sum(k * q, axis=0) * scale, softcap, CAPPED)
        score = tl.where(newest, score, float("-inf"))
        now = tl.maximum(largest, score)
        weight, kept = tl.exp(score - now), tl.exp(largest - now)
        sums, total, largest = sums * kept + weight * v, total * kept + weight, now
        out = partial + (head * splits + split).to(tl.int64) * (DIM + 2)
        tl.store(out + column, sums, mask=column < DIM)
        tl.store(out + DIM, total)
        tl.store(out + DIM + 1, largest)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(partial, position, out, rounded, codes, splits, DIM: tl.constexpr, WIDE: tl.constexpr,
                   WINDOW: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """out [heads, DIM] = the weighted mean of what :func:`attend_kernel` left in ``partial``; where heads are
    whole blocks of 32 also as :func:`store_rounded` does it. SPLITS is ``splits`` rounded up to a power of
    two. Grid (heads)."""
    head = tl.program_id(0)
    begin, end = bounds(position, WINDOW)
    split, column = tl.arange(0, SPLITS), tl.arange(0, WIDE)
    live = (split < splits) & (split * SPLIT < end) & ((split + 1) * SPLIT > begin)
    base = partial + ((head * splits).to(tl.int64) + split) * (DIM + 2)
    largest = tl.load(base + DIM + 1, mask=live, other=float("-inf"))
    weight = tl.exp(largest - tl.max(largest, axis=0))
    total = tl.sum(weight * tl.load(base + DIM, mask=live, other=0.0), axis=0)
    mask = live[:, None] & (column < DIM)[None, :]
    sums = tl.load(base[:, None] + column[None, :], mask=mask, other=0.0)
    mean = tl.div_rn(tl.sum(weight[:, None] * sums, axis=0), total)
    tl.store(out + head * DIM + column, mean, mask=column < DIM)
    if rounded is not None or codes is not None:
        place, blocks = places(0, WIDE), tl.reshape(mean, (WIDE // SCALED, SCALED))
        store_rounded(blocks, head * DIM + place, place < DIM, tl.num_programs(0) * DIM, rounded, codes)
