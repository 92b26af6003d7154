"""How rows lie in a GPU's memory: planar, so that neighbouring threads read neighbouring words.

A matrix of N rows is one array of bytes, exactly as many as in the form in which its type is computed
(``repack``): first the codes of all rows, then what else the type has, plane after plane. No bit is lost or
added; only their order changes. A block has 32 columns, a super-block 256.

=========  ==========================================================================================
codes      16 bytes a block: in the low nibble of byte i the lowest bits of column i, in the high nibble
           those of column 16 + i. Q8_0: 32 bytes, one for each column. F16, BF16: the values in order.
high       further bits of a code, one (Q5) or two (Q6_K): in byte j of the block's words, from the lowest
           bits up, those of columns j, 4 + j, 8 + j, …
sub        scales of sub-blocks as in the form: Q4_K and Q5_K 12 bytes a super-block, Q2_K, Q3_K and Q6_K 16,
           tables 8 or 16
scale      for each block or super-block: float16, float32 (Q2_K, Q3_K, tables), or one or two bytes (MXFP4,
           NVFP4)
minimum    Q4_1, Q5_1, Q4_K, Q5_K, Q2_K: for each block or super-block, as the scale
=========  ==========================================================================================

This module imports no Triton.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ._kernels import KernelError
from .row_types import RowType, packed_row_bytes

U8 = npt.NDArray[np.uint8]
#: Columns of a block.
BLOCK = 32
#: Rows summed into one partial sum: fixed, so that sums do not depend on the GPU.
SPLIT_ROWS = 128
#: Row types that the Triton kernels read.
PLANAR_TYPES = tuple(kind for kind in RowType if kind != RowType.F32)
#: Types that are computed in the form of another.
FORMS = {RowType.TQ1_0: RowType.Q4_0, RowType.TQ2_0: RowType.Q4_0, RowType.IQ2_S: RowType.IQ2_XS}


@dataclass(frozen=True)
class Planes:
    """Bytes of each plane for one row; 0 where the type has none."""

    codes: int
    high: int
    sub: int
    scale: int
    minimum: int


@dataclass(frozen=True)
class _Stored:
    """A block of a type's form: its columns and bytes, where ``sub``, ``scale`` and ``minimum`` are in it, as
    ranges of bytes, and its codes in column order, as unsigned bytes of [N, blocks, bytes]."""

    columns: int
    nbytes: int
    codes: Callable[[U8], U8]
    scale: tuple[int, int] = (0, 2)
    minimum: tuple[int, int] = (0, 0)
    sub: tuple[int, int] = (0, 0)
    high_bits: int = 0

    @property
    def fields(self) -> tuple[tuple[int, int], ...]:
        """In the order of planes."""
        return self.sub, self.scale, self.minimum


def form_of(row_type: RowType) -> RowType:
    """The type in whose form ``row_type`` is computed."""
    return FORMS.get(row_type, row_type)


def planes(row_type: RowType, columns: int) -> Planes:
    """The planes of a row. Raises KernelError for a type without a planar form, or an impossible length."""
    if row_type not in PLANAR_TYPES:
        names = ", ".join(kind.name for kind in PLANAR_TYPES)
        raise KernelError(f"{RowType(row_type).name} rows have no planar form ({names} have one)")
    whole = packed_row_bytes(row_type, columns)
    if row_type.is_float:
        return Planes(whole, 0, 0, 0, 0)
    stored = _STORED[form_of(row_type)]
    blocks = columns // stored.columns
    high = columns // 8 * stored.high_bits
    sub, scale, minimum = (blocks * (last - first) for first, last in stored.fields)
    return Planes(whole - high - sub - scale - minimum, high, sub, scale, minimum)


def to_planar(rows: U8, row_type: RowType, columns: int) -> U8:
    """The planar bytes [N · packed row bytes] of ``rows`` in the form in which they are computed, uint8
    [N, packed row bytes]."""
    sizes = planes(row_type, columns)
    if rows.shape[1:] != (packed_row_bytes(row_type, columns),):
        raise KernelError(f"rows of shape {rows.shape} are not {columns} columns of {row_type.name}")
    if row_type.is_float:
        return np.ascontiguousarray(rows).reshape(-1)
    stored = _STORED[form_of(row_type)]
    blocks = rows.reshape(len(rows), -1, stored.nbytes)
    codes = stored.codes(blocks).reshape(len(rows), -1, 2, BLOCK // 2)
    wide = sizes.codes == columns
    parts: list[npt.NDArray[Any]] = [codes if wide else (codes[..., 0, :] & 15) | codes[..., 1, :] << 4]
    if sizes.high:
        parts.append(_high_fields(np.asarray(codes >> 4, np.uint8), stored.high_bits))
    parts += [blocks[..., first:last] for first, last in stored.fields if last]
    out = np.concatenate([np.ascontiguousarray(part, np.uint8).reshape(-1) for part in parts])
    assert out.size == rows.size
    return out


def _high_fields(fields: U8, bits: int) -> U8:
    """Words [N, blocks, ``bits``, 4 bytes] of fields of so many bits of each column: [N, blocks, 2, 16]."""
    lanes = fields.reshape(*fields.shape[:2], bits, 8 // bits, 4)
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)[:, None]
    return np.asarray(np.bitwise_or.reduce(lanes << shifts, axis=3), np.uint8)


def _nibbles(packed: U8) -> U8:
    """[…, n] bytes to […, 2n]: low nibbles, then high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _nibbles_from(first: int, run: int = 16) -> Callable[[U8], U8]:
    """Codes that are nibbles from byte ``first`` on: of ``run`` bytes the low ones, then the high ones."""
    return lambda blocks: _nibbles(blocks[..., first:].reshape(*blocks.shape[:2], -1, run))


def _five_bits(first: int) -> Callable[[U8], U8]:
    """Nibbles after four bytes from ``first`` on, which have the fifth bits."""

    def codes(blocks: U8) -> U8:
        high = np.unpackbits(blocks[..., first : first + 4], axis=-1, bitorder="little")
        return np.asarray(_nibbles(blocks[..., first + 4 :]) | high << 4, np.uint8)

    return codes


def _q5_k(blocks: U8) -> U8:
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = blocks[..., None, 16:48] >> shifts & 1
    low = _nibbles_from(48, 32)(blocks).reshape(high.shape)
    return np.asarray(low | high << 4, np.uint8)


def _q6_k(blocks: U8) -> U8:
    shape = blocks.shape[:2]
    low = _nibbles(blocks[..., :128].reshape(*shape, 2, 64)).reshape(*shape, 256)
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return np.asarray(low | high.reshape(*shape, 256) << 4, np.uint8)


def _table(scales: int) -> _Stored:
    """256 columns under ``scales`` scales."""
    return _Stored(256, 132 + scales, _nibbles_from(4 + scales), (0, 4), sub=(4, 4 + scales))


_STORED: dict[RowType, _Stored] = {
    RowType.Q8_0: _Stored(32, 34, lambda blocks: blocks[..., 2:]),
    RowType.Q4_0: _Stored(32, 18, _nibbles_from(2)),
    RowType.Q4_1: _Stored(32, 20, _nibbles_from(4), minimum=(2, 4)),
    RowType.Q5_0: _Stored(32, 22, _five_bits(2), high_bits=1),
    RowType.Q5_1: _Stored(32, 24, _five_bits(4), minimum=(2, 4), high_bits=1),
    RowType.Q4_K: _Stored(256, 144, _nibbles_from(16, 32), minimum=(2, 4), sub=(4, 16)),
    RowType.Q5_K: _Stored(256, 176, _q5_k, minimum=(2, 4), sub=(4, 16), high_bits=1),
    RowType.Q6_K: _Stored(256, 210, _q6_k, (208, 210), sub=(192, 208), high_bits=2),
    RowType.Q2_K: _Stored(256, 152, _nibbles_from(24), (0, 4), (4, 8), (8, 24)),
    RowType.Q3_K: _table(16),
    RowType.IQ4_NL: _Stored(32, 18, _nibbles_from(2)),
    RowType.MXFP4: _Stored(32, 17, _nibbles_from(1), (0, 1)),
    RowType.NVFP4: _Stored(32, 18, _nibbles_from(2)),
    RowType.IQ4_XS: _table(8),
    RowType.IQ3_XXS: _table(8),
    RowType.IQ3_S: _table(8),
    RowType.IQ2_XXS: _table(8),
    RowType.IQ2_XS: _table(16),
    RowType.IQ1_S: _table(8),
    RowType.IQ1_M: _table(16),
}
