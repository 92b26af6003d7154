"""The densely packed rows in readable numpy: the meaning of their bytes. Companion of reference_quants.

Blocks have 256 columns, unless another number is given; d is an f16 of the block, s an integer of 16 or 32
columns:

    Q2_K              d · s · c − dmin · m            c 0…3; s, m 4-bit numbers of 16 columns
    Q3_K              d · s · c                       c −4…3; s −32…31 of 16 columns
    IQ4_NL            d · v                           v one of 16 values; 32 columns
    IQ4_XS            d · s · v                       s −32…31 of 32 columns
    MXFP4             2^(e − 128) · v                 v twice an E2M1 number; e a byte; 32 columns
    NVFP4             f / 2 · v                       f an E4M3 number without sign of 16 columns; 64 columns
    IQ3_XXS           d / 4 · (2s + 1) · g            g of a grid of 4 values, with signs; s of 32 columns
    IQ3_S             d · (2s + 1) · g                the same
    IQ2_XXS, _XS, _S  d / 8 · (2s + 1) · g            grids of 8 values; s of 32 columns (XXS), of 16
    IQ1_S, IQ1_M      d / 8 · (2s + 1) · (8t ± 1)     grids of 8 ternary t; s, sign of 32 (S), of 16 and 8
    TQ1_0, TQ2_0      d · t                           t −1, 0, 1 (TQ2_0: and 2)

(GGUF's block formats, as ggml's reference dequantisation reads them.) Powers of two are part of the scale:
every value is scale · s · code in float32 without rounding, but for the minimum of Q2_K.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .grids import grid
from .row_types import RowType

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
_QUARTER, _EIGHTH = np.float32(0.25), np.float32(0.125)
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])


@dataclass(frozen=True)
class Packed:
    """Stored blocks [rows, blocks, …] taken apart; B 32-column blocks in each."""

    codes: I64  # [rows, blocks, columns]
    scale: F32  # [rows, blocks, 1]: of the block
    sub: I64 | F32 | None = None  # [rows, blocks, B or 2B]: multiplies it, by 32 or 16 columns
    minimum: F32 | None = None  # [rows, blocks, 1]
    sub_minimum: I64 | None = None  # [rows, blocks, 2B]


def _f16(data: U8, at: int) -> F32:
    return np.ascontiguousarray(data[..., at : at + 2]).view(np.float16).astype(np.float32)


def _u16(data: U8) -> I64:
    return np.ascontiguousarray(data).view(np.uint16).astype(np.int64)


def _u32(data: U8) -> I64:
    return np.ascontiguousarray(data).view(np.uint32).astype(np.int64)


def _flat(*parts: I64) -> I64:
    """The parts, [rows, blocks, n] each, one value of each after the other: [rows, blocks, n · parts]."""
    return np.stack(parts, axis=-1).reshape(*parts[0].shape[:2], -1)


def _fields(numbers: I64, width: int, count: int) -> I64:
    """[…, n] to […, n · count]: bit fields of every number, the lowest first."""
    return _flat(*(numbers >> (width * i) & ((1 << width) - 1) for i in range(count)))


def _planes(data: U8, width: int) -> I64:
    """Bytes [rows, blocks, n], n a multiple of 32, to fields of their bits: the lowest of 32 bytes, the next
    ones of these, and so on."""
    runs = data.astype(np.int64).reshape(*data.shape[:2], -1, 1, 32)
    shifts = np.arange(0, 8, width).reshape(-1, 1)
    return (runs >> shifts & ((1 << width) - 1)).reshape(*data.shape[:2], -1)


def _nibbles(data: U8, columns: int = 32) -> I64:
    """Low nibbles of `columns` / 2 bytes, then their high nibbles, and so on."""
    runs = data.astype(np.int64).reshape(*data.shape[:2], -1, 1, columns // 2)
    return np.concatenate([runs & 15, runs >> 4], axis=-2).reshape(*data.shape[:2], -1)


def _q2_k(data: U8) -> Packed:
    scales = data[..., :16].astype(np.int64)
    return Packed(_planes(data[..., 16:80], 2), _f16(data, 80), scales & 15, -_f16(data, 82), scales >> 4)


def _q3_k(data: U8) -> Packed:
    packed = data[..., 96:108].astype(np.int64)
    low = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    high = np.concatenate([packed[..., 8:] >> s & 3 for s in (0, 2, 4, 6)], axis=-1)
    codes = _planes(data[..., 32:96], 2) + 4 * _planes(data[..., :32], 1) - 4
    return Packed(codes, _f16(data, 108), (low | high << 4) - 32)


def _iq4_xs(data: U8) -> Packed:
    low = _fields(data[..., 4:8].astype(np.int64), 4, 2)
    high = _fields(_u16(data[..., 2:4]), 2, 8)
    return Packed(IQ4[_nibbles(data[..., 8:])], _f16(data, 0), (low | high << 4) - 32)


def _iq4_nl(data: U8) -> Packed:
    return Packed(IQ4[_nibbles(data[..., 2:])], _f16(data, 0))


def _mxfp4(data: U8) -> Packed:
    scale = np.ldexp(np.float32(1), data[..., :1].astype(np.int32) - 128)
    return Packed(E2M1[_nibbles(data[..., 1:])], scale.astype(np.float32))


def _nvfp4(data: U8) -> Packed:
    """A byte 0x7f, which is not a number in E4M3, counts as zero."""
    stored = data[..., :4].astype(np.int32)
    exponent, fraction = stored >> 3 & 15, stored & 7
    value = np.ldexp(np.where(exponent == 0, fraction, 8 + fraction), np.maximum(exponent, 1) - 11)
    sub = np.where(stored == 0x7F, 0, value).astype(np.float32)
    codes = E2M1[_nibbles(data[..., 4:], 16)]
    return Packed(codes, np.ones((*data.shape[:2], 1), np.float32), sub)


def _eight_signs(seven: I64) -> I64:
    """Seven stored signs; the eighth makes the number of minus signs even."""
    odd = _fields(seven, 1, 7).reshape(*seven.shape, 7).sum(axis=-1) & 1
    return np.asarray(seven | odd << 7, np.int64)


def _points(row_type: RowType, points: I64, signs: I64) -> I64:
    """Values of grid points [rows, blocks, n], minus where bits of `signs` [rows, blocks, 32] are set."""
    values = grid(row_type)[points].reshape(*points.shape[:2], -1)
    return np.asarray(np.where(_fields(signs, 1, 8) == 1, -values, values), np.int64)


def _iq2_xxs(data: U8) -> Packed:
    words = data[..., 2:].reshape(*data.shape[:2], 8, 8)
    points = words[..., :4].reshape(*data.shape[:2], 32).astype(np.int64)
    rest = _u32(words[..., 4:])[..., 0]
    codes = _points(RowType.IQ2_XXS, points, _eight_signs(_fields(rest, 7, 4)))
    return Packed(codes, _f16(data, 0) * _EIGHTH, 2 * (rest >> 28) + 1)


def _iq2_xs(data: U8) -> Packed:
    words = _u16(data[..., 2:66])
    codes = _points(RowType.IQ2_XS, words & 511, _eight_signs(words >> 9))
    return Packed(codes, _f16(data, 0) * _EIGHTH, 2 * _fields(data[..., 66:].astype(np.int64), 4, 2) + 1)


def _iq2_s(data: U8) -> Packed:
    wide = data.astype(np.int64)
    points = wide[..., 2:34] | _fields(wide[..., 66:74], 2, 4) << 8
    codes = _points(RowType.IQ2_S, points, wide[..., 34:66])
    return Packed(codes, _f16(data, 0) * _EIGHTH, 2 * _fields(wide[..., 74:], 4, 2) + 1)


def _iq3_xxs(data: U8) -> Packed:
    rest = _u32(data[..., 66:])
    codes = _points(RowType.IQ3_XXS, data[..., 2:66].astype(np.int64), _eight_signs(_fields(rest, 7, 4)))
    return Packed(codes, _f16(data, 0) * _QUARTER, 2 * (rest >> 28) + 1)


def _iq3_s(data: U8) -> Packed:
    wide = data.astype(np.int64)
    points = wide[..., 2:66] | _fields(wide[..., 66:74], 1, 8) << 8
    codes = _points(RowType.IQ3_S, points, wide[..., 74:106])
    return Packed(codes, _f16(data, 0), 2 * _fields(wide[..., 106:], 4, 2) + 1)


def _ternary(row_type: RowType, points: I64, minus: I64) -> I64:
    """8 · (point + delta) with a delta of ±1/8 of every point: [rows, blocks, 256]."""
    codes = 8 * grid(row_type)[points] + np.where(minus == 1, -1, 1)[..., None]
    return np.asarray(codes.reshape(*points.shape[:2], -1), np.int64)


def _iq1_s(data: U8) -> Packed:
    high = _u16(data[..., 34:])
    points = data[..., 2:34].astype(np.int64) | _fields(high, 3, 4) << 8
    codes = _ternary(RowType.IQ1_S, points, np.repeat(high >> 15, 4, axis=-1))
    return Packed(codes, _f16(data, 0) * _EIGHTH, 2 * (high >> 12 & 7) + 1)


def _iq1_m(data: U8) -> Packed:
    """The f16 lies in the upper nibbles of four words of scales."""
    high = _fields(data[..., 32:48].astype(np.int64), 4, 2)
    words = _u16(data[..., 48:])
    bits = sum(((words[..., k] >> 12) << (4 * k) for k in range(4)), np.zeros(data.shape[:2], np.int64))
    d = bits.astype(np.uint16).view(np.float16).astype(np.float32)[..., None]
    codes = _ternary(RowType.IQ1_M, data[..., :32].astype(np.int64) | (high & 7) << 8, high >> 3)
    return Packed(codes, d * _EIGHTH, 2 * _fields(words, 3, 4) + 1)


def _tq1_0(data: U8) -> Packed:
    """Five ternary digits in a byte, as a fraction of 256: digit n is ⌊3 · frac(3^n · byte / 256)⌋."""

    def digits(part: U8, count: int) -> I64:
        powers = 3 ** np.arange(count)[:, None]
        return (part.astype(np.int64)[..., None, :] * powers % 256 * 3 >> 8).reshape(*data.shape[:2], -1)

    parts = [digits(data[..., :32], 5), digits(data[..., 32:48], 5), digits(data[..., 48:52], 4)]
    return Packed(np.concatenate(parts, axis=-1) - 1, _f16(data, 52))


def _tq2_0(data: U8) -> Packed:
    return Packed(_planes(data[..., :64], 2) - 1, _f16(data, 64))


PACKED: dict[RowType, Callable[[U8], Packed]] = {
    RowType.Q2_K: _q2_k,
    RowType.Q3_K: _q3_k,
    RowType.IQ4_NL: _iq4_nl,
    RowType.IQ4_XS: _iq4_xs,
    RowType.MXFP4: _mxfp4,
    RowType.NVFP4: _nvfp4,
    RowType.IQ3_XXS: _iq3_xxs,
    RowType.IQ3_S: _iq3_s,
    RowType.IQ2_XXS: _iq2_xxs,
    RowType.IQ2_XS: _iq2_xs,
    RowType.IQ2_S: _iq2_s,
    RowType.IQ1_S: _iq1_s,
    RowType.IQ1_M: _iq1_m,
    RowType.TQ1_0: _tq1_0,
    RowType.TQ2_0: _tq2_0,
}
