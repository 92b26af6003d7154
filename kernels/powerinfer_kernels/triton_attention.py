"""Attention of single tokens over a KV cache, in Triton; how far the cache reaches is read on the device.

The grid is that of the whole context, so that a CUDA graph holds for every position: programs of positions
that are not there yet end at once, and nothing beyond the token's own position is read. Positions come in
splits of a fixed length, whose sums :func:`combine_kernel` adds: results depend on the position alone.

Parameters carry no annotations but constexpr, since Triton reads them; shapes stand in the docstrings.
"""

import triton
import triton.language as tl

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


@triton.jit(do_not_specialize=["context", "splits", "scale", "softcap"])
def attend_kernel(query, keys, key_scales, values, value_scales, position, partial, context, splits, scale,
                  softcap, GROUP: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr,
                  CAPPED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """partial [heads, splits, DIM + 2]: of each split of SPLIT positions that ``query`` [heads, DIM] sees,
    the sum of values with weights exp(score − largest), then the sum of weights and the largest score. Splits
    that it does not see are not written. Grid (heads, splits).

    ``keys``, ``values`` [heads / GROUP, context, DIM] are float16, or int8 with float16 scales
    [heads / GROUP, context, DIM / 32]; ``position`` int64 [1]; WIDE is DIM rounded up to a power of two.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    begin, end = bounds(position, WINDOW)
    first, last = tl.maximum(begin, split * SPLIT), tl.minimum(end, (split + 1) * SPLIT)
    if first < last:
        column = tl.arange(0, WIDE)
        q = tl.load(query + head * DIM + column, mask=column < DIM, other=0.0)
        largest, total = float("-inf"), 0.0
        sums = tl.zeros((WIDE,), tl.float32)
        for block in range(first, last, BLOCK):
            at = block + tl.arange(0, BLOCK)
            live = at < last
            k = load_vectors(keys, key_scales, head // GROUP, at, live, context, DIM, WIDE)
            score = tl.sum(k * q[None, :], axis=1) * scale
            if CAPPED:
                score = softcap * tanh(tl.div_rn(score, softcap))
            score = tl.where(live, score, float("-inf"))
            now = tl.maximum(largest, tl.max(score, axis=0))
            weight, kept = tl.exp(score - now), tl.exp(largest - now)
            v = load_vectors(values, value_scales, head // GROUP, at, live, context, DIM, WIDE)
            sums = sums * kept + tl.sum(weight[:, None] * v, axis=0)
            total = total * kept + tl.sum(weight, axis=0)
            largest = now
        out = partial + (head * splits + split).to(tl.int64) * (DIM + 2)
        tl.store(out + column, sums, mask=column < DIM)
        tl.store(out + DIM, total)
        tl.store(out + DIM + 1, largest)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(partial, position, out, splits, DIM: tl.constexpr, WIDE: tl.constexpr,
                   WINDOW: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """out [heads, DIM] = the weighted mean of what :func:`attend_kernel` left in ``partial``; SPLITS is
    ``splits`` rounded up to a power of two. Grid (heads)."""
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
