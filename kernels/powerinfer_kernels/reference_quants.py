"""Quantised rows in readable numpy: the meaning of their bytes, and the arithmetic of the kernels bit by bit.

A block of 32 columns holds unsigned codes c. The value of a weight is

    Q8_0         d · c                      c int8, d f16
    Q4_0, Q5_0   d · (c − 8), d · (c − 16)  d f16
    Q4_1, Q5_1   d · c + m                  d, m f16
    Q4_K, Q5_K   (d · a) · c − dmin · b     d, dmin f16 of 8 blocks; a, b 6-bit integers of the block
    Q6_K         (d · a) · (c − 32)         d f16 of 8 blocks; a int8 of 16 columns

(GGUF's block formats, as ggml's reference dequantisation reads them.) `Blocks` holds the integers after the
offset. The densely packed types are taken apart in `reference_packed`.

Products with activations that are quantised to x = dx · q per block go block after block through one float32
accumulator per row:

    acc = fma(scale · dx, Σ c·q, acc);   with a minimum, then   acc = fma(minimum, dx · Σ q, acc)

where scale = d (Q4_K, Q5_K and types with scales of 32 columns: d · a), minimum = m or −(dmin · b). Where
halves of 16 columns have scales of their own, the sum is a₀ Σ c·q + a₁ Σ c·q over the two halves of the
block, an exact integer (NVFP4, whose a are no integers: fma(a₁, Σ c·q, a₀ Σ c·q) in float32, the inner
product exact), and where they have minima, minimum = −dmin and b₀ Σ q + b₁ Σ q stands for Σ q. F32, F16 and
BF16 rows take float32 activations: four accumulators by column mod 4, result (a₀ + a₁) + (a₂ + a₃).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .reference_packed import PACKED
from .row_types import RowType, block_shape

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

CHUNK = 512
_OFFSET = {RowType.Q4_0: 8, RowType.Q5_0: 16, RowType.Q6_K: 32}


@dataclass(frozen=True)
class Blocks:
    """Rows taken apart; B blocks of 32 columns each."""

    codes: I64  # [rows, B, 2, 16], offset subtracted
    scale: F32  # [rows, B]
    minimum: F32 | None  # [rows, B]
    sub: I64 | F32 | None = None  # [rows, B, 2], the scales of the halves (float32 only for NVFP4)
    sub_minimum: I64 | None = None  # [rows, B, 2], factors of `minimum`


def _f16(data: U8, at: int) -> F32:
    """The f16 at byte `at` of every stored block, widened."""
    return np.ascontiguousarray(data[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(data: U8) -> I64:
    """[..., n] bytes to [..., 2, n]: low nibbles, then high nibbles."""
    return np.stack([data & 15, data >> 4], axis=-2).astype(np.int64)


def _bits(data: U8, width: int) -> I64:
    """[..., n] bytes to [..., 8 / width, n]: fields of `width` bits from the lowest up."""
    return np.stack([data >> s & ((1 << width) - 1) for s in range(0, 8, width)], axis=-2).astype(np.int64)


def _six_bit_scales(packed: U8) -> tuple[I64, I64]:
    """(scales, minima) [..., 8] of the 12 bytes of Q4_K and Q5_K: the first four whole in 6 bits, of the last
    four the low nibbles in bytes 8..11 and the upper two bits above the first four's."""
    first, second, third = (packed[..., i : i + 4].astype(np.int64) for i in (0, 4, 8))
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return scales, minima


def _codes(data: U8, row_type: RowType) -> I64:
    """[rows, stored blocks, columns of a block]: the codes in column order, offset not subtracted."""
    shape = data.shape[:2]
    if row_type == RowType.Q8_0:
        return np.ascontiguousarray(data[..., 2:]).view(np.int8).astype(np.int64)
    if row_type in (RowType.Q4_0, RowType.Q4_1):
        return _nibbles(data[..., -16:]).reshape(*shape, 32)
    if row_type in (RowType.Q5_0, RowType.Q5_1):
        high = np.unpackbits(np.ascontiguousarray(data[..., -20:-16]), axis=-1, bitorder="little")
        return _nibbles(data[..., -16:]).reshape(*shape, 32) | high.astype(np.int64) << 4
    if row_type == RowType.Q6_K:
        low = _nibbles(data[..., :128].reshape(*shape, 2, 64)).reshape(*shape, 256)
        return low | _bits(data[..., 128:192].reshape(*shape, 2, 32), 2).reshape(*shape, 256) << 4
    low = _nibbles(data[..., -128:].reshape(*shape, 4, 32)).reshape(*shape, 256)
    if row_type == RowType.Q5_K:
        low = low | _bits(data[..., 16:48], 1).reshape(*shape, 256) << 4
    return low


def decode(data: U8, row_type: int) -> Blocks:
    """Takes quantised rows, uint8 [rows, row bytes], apart."""
    kind = RowType(row_type)
    rows = len(data)
    stored = data.reshape(rows, -1, block_shape(kind)[1])
    if kind in PACKED:
        return _packed(stored, kind)
    codes = _codes(stored, kind).reshape(rows, -1, 2, 16) - _OFFSET.get(kind, 0)
    minimum: F32 | None = None
    sub: I64 | None = None
    if kind in (RowType.Q4_K, RowType.Q5_K):
        a, b = _six_bit_scales(stored[..., 4:16])
        scale = (_f16(stored, 0)[..., None] * a.astype(np.float32)).reshape(rows, -1)
        minimum = -(_f16(stored, 2)[..., None] * b.astype(np.float32)).reshape(rows, -1)
    elif kind == RowType.Q6_K:
        scale = np.repeat(_f16(stored, 208), 8, axis=1)
        sub = stored[..., 192:208].view(np.int8).astype(np.int64).reshape(rows, -1, 2)
    else:
        scale = _f16(stored, 0)
        if kind in (RowType.Q4_1, RowType.Q5_1):
            minimum = _f16(stored, 2)
    return Blocks(codes, scale, minimum, sub)


def _packed(stored: U8, row_type: RowType) -> Blocks:
    rows = len(stored)
    packed = PACKED[row_type](stored)
    blocks = block_shape(row_type)[0] // 32
    sub, scale = packed.sub, packed.scale
    if sub is not None and sub.shape[-1] == blocks:
        scale, sub = scale * sub.astype(np.float32), None

    def by_block(values: F32) -> F32:
        return np.broadcast_to(values, (*stored.shape[:2], blocks)).reshape(rows, -1)

    return Blocks(
        packed.codes.reshape(rows, -1, 2, 16),
        by_block(scale),
        None if packed.minimum is None else by_block(packed.minimum),
        None if sub is None else sub.reshape(rows, -1, 2),
        None if packed.sub_minimum is None else packed.sub_minimum.reshape(rows, -1, 2),
    )


def dequantize(data: U8, row_type: int) -> F32:
    """float32 [rows, columns] of rows uint8 [rows, row bytes], rounded as the format's reference does it."""
    kind = RowType(row_type)
    if kind.is_float:
        return _float_values(data, kind)
    blocks = decode(data, kind)
    scale = blocks.scale[..., None]
    if blocks.sub is not None:
        scale = scale * blocks.sub.astype(np.float32)
    values = scale[..., None] * blocks.codes.astype(np.float32)
    if blocks.minimum is not None:
        values = values + _minima(blocks)[..., None]
    return np.asarray(values.reshape(len(data), -1), np.float32)


def _minima(blocks: Blocks) -> F32:
    """[rows, B, 1], or [rows, B, 2] where halves have their own."""
    assert blocks.minimum is not None
    minimum = blocks.minimum[..., None]
    return minimum if blocks.sub_minimum is None else minimum * blocks.sub_minimum.astype(np.float32)


def _float_values(data: U8, row_type: RowType) -> F32:
    if row_type == RowType.F32:
        return data.view(np.float32)
    if row_type == RowType.F16:
        return data.view(np.float16).astype(np.float32)
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def quantize_activations(x: F32) -> tuple[npt.NDArray[np.int8], F32, F32]:
    """(q [T, columns], d [T, B], s [T, B]) of x [T, columns]: d = max|x| / 127, q = x · (1 / d) rounded
    half to even, s = Σ q; then d is rounded to eleven significant bits, half to even. A block with a NaN or
    an infinity has d = NaN and q = 0; one whose d would be subnormal is 0."""
    blocks = x.reshape(len(x), -1, 32)
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(blocks).all(axis=-1))
    largest = np.abs(np.where(finite[..., None], blocks, np.float32(0))).max(axis=-1)
    d = np.asarray(largest / np.float32(127), np.float32)
    used = finite & (d >= np.float32(2.0**-126))
    inverse = (used.astype(np.float32) / np.where(used, d, np.float32(1))).astype(np.float32)
    q = np.rint(np.where(used[..., None], blocks, np.float32(0)) * inverse[..., None]).astype(np.int8)
    bits = d.view(np.uint32)
    d = ((bits + np.uint32(0xFFF) + (bits >> 13 & 1)) & np.uint32(0xFFFFE000)).view(np.float32)
    d = np.where(used, d, np.where(finite, np.float32(0), np.float32(np.nan))).astype(np.float32)
    return q.reshape(x.shape), d, q.sum(axis=-1, dtype=np.int64).astype(np.float32)


def fma(a: F32 | np.float32, b: F32, c: F32) -> F32:
    """a · b + c in float32, rounded once. The product is exact in float64; the sum is rounded there to odd,
    so that rounding it again to float32 is right (Boldo and Melquiond, "Emulation of FMA and correctly
    rounded sums: proved algorithms using rounding to odd")."""
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c, np.float64)
    total = np.atleast_1d(product + addend)
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(np.int64)
    inexact = (error != 0) & (bits & 1 == 0) & np.isfinite(total) & np.isfinite(error)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return (bits + np.where(inexact, step, 0)).view(np.float64).astype(np.float32)


def products(data: U8, row_type: int, q: npt.NDArray[np.int8], d: F32, s: F32) -> F32:
    """float32 [T, rows]: the bits that the kernels give for quantised rows and quantised activations."""
    blocks = decode(data, row_type)
    activations = q.reshape(len(q), -1, 2, 16).astype(np.int64)
    acc = np.zeros((len(q), len(data)), np.float32)
    for b in range(blocks.codes.shape[1]):
        halves = np.einsum("rhc,thc->trh", blocks.codes[:, b], activations[:, b])
        sub = None if blocks.sub is None else blocks.sub[:, b]
        scale = blocks.scale[:, b] * d[:, b, None]
        acc = fma(scale, _sum_of_halves(halves, sub), acc)
        if blocks.minimum is not None:
            times = s[:, b, None]
            if blocks.sub_minimum is not None:
                times = (activations[:, b].sum(axis=-1) @ blocks.sub_minimum[:, b].T).astype(np.float32)
            acc = fma(blocks.minimum[:, b], d[:, b, None] * times, acc)
    return acc


def _sum_of_halves(halves: I64, sub: I64 | F32 | None) -> F32:
    """float32 [T, rows] of the halves' sums [T, rows, 2] and their scales [rows, 2]."""
    if sub is None:
        return np.asarray(halves.sum(axis=-1), np.float32)
    if sub.dtype == np.float32:
        scale = np.asarray(sub, np.float32)
        first, second = np.moveaxis(halves.astype(np.float32), -1, 0)
        return fma(scale[:, 1], second, scale[:, 0] * first)
    return np.asarray((halves * sub).sum(axis=-1), np.float32)


def float_products(data: U8, row_type: int, x: F32) -> F32:
    """float32 [T, rows]: the bits that the kernels give for F32, F16 and BF16 rows."""
    weights = _float_values(data, RowType(row_type))
    acc = np.zeros((4, len(x), len(data)), np.float32)
    for c in range(x.shape[1]):
        acc[c % 4] = fma(weights[:, c], x[:, c, None], acc[c % 4])
    return np.asarray((acc[0] + acc[1]) + (acc[2] + acc[3]), np.float32)


def accumulated(data: U8, row_type: int, h: F32) -> F32:
    """float32 [columns]: Σ h_i · row i with the bits of the kernels, over rows with h ≠ 0, in chunks of 512
    consecutive rows.

    Float rows: p = fma(h, value, p) in order within a chunk, then y = y + p. Others: see `_add_chunk`.
    """
    kind = RowType(row_type)
    values = _float_values(data, kind) if kind.is_float else None
    blocks = None if kind.is_float else decode(data, kind)
    columns = values.shape[1] if values is not None else _columns(data, kind)
    y = np.zeros(columns, np.float32)
    for first in range(0, len(h), CHUNK):
        rows = first + np.flatnonzero(h[first : first + CHUNK])
        if values is not None and len(rows):
            p = np.zeros(columns, np.float32)
            for i in rows:
                p = fma(h[i], values[i], p)
            y = y + p
        elif blocks is not None and len(rows):
            y = _add_chunk(blocks, rows, h[rows], y)
    return y


def _columns(data: U8, row_type: RowType) -> int:
    values, stored = block_shape(row_type)
    return int(data.shape[1]) // stored * values


def _rounded(v: F32) -> tuple[I64, F32]:
    """16-bit q and the scale S of each column of v [rows, …]: S = max(|v|, 1e-30) / 32767 over rows, q =
    round(v · (32767 / max))."""
    largest = np.maximum(np.abs(v).max(axis=0), np.float32(1e-30))
    most = np.float32(32767)
    return np.rint(v * (most / largest)).astype(np.int64), largest / most


def _add_chunk(blocks: Blocks, rows: I64, h: F32, y: F32) -> F32:
    """y = fma(S, Σ q·code, y) with q, S of h · scale per block (Q6_K: per half); minima are rounded alike,
    and y = y + S Σ q."""
    scale = np.repeat(blocks.scale[rows][:, :, None], 2, axis=2)
    if blocks.sub is not None:
        scale = scale * blocks.sub[rows].astype(np.float32)
    q, step = _rounded(h[:, None, None] * scale)
    total = np.einsum("rbh,rbhc->bhc", q, blocks.codes[rows])
    out = fma(step[:, :, None], total.astype(np.float32), y.reshape(total.shape))
    if blocks.minimum is not None:
        q, step = _rounded(h[:, None, None] * _minima(blocks)[rows])
        out = out + (step * q.sum(axis=0).astype(np.float32))[..., None]
    return out.reshape(-1)
