"""How rows lie in a GPU's memory: planar, so that neighbouring threads read neighbouring words.

A matrix of N rows is one array of bytes, exactly as many as in the file: first the codes of all rows, then
what else the type has, plane after plane. No bit is lost or added; only their order changes.

=========  ==========================================================================================
codes      words of 32 bits. Bits 4k … 4k+3 of word w (Q8_0: bits 8k … 8k+7) belong to column k·L + w of a
           chunk, so one word of a thread meets its neighbours' columns in every lane k. A chunk has L words:
           32, or the words of one block where the row is no multiple of 32 words. F16: the values in order.
high       Q6_K: 16 bits for each word of codes, bits 2k and 2k+1 the upper bits of lane k's code
sub        K-quants: the scales of sub-blocks as in the file (Q4_K 12 bytes a super-block, Q6_K 16)
scale      f16 for each block or super-block
minimum    Q4_1, Q4_K: f16 for each block or super-block
=========  ==========================================================================================

This module imports no Triton.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ._kernels import KernelError
from .row_types import RowType, block_shape, row_bytes

U8 = npt.NDArray[np.uint8]
#: Words in a chunk of a row whose length allows it.
CHUNK_WORDS = 32
#: Rows summed into one partial sum: fixed, so that sums do not depend on the GPU.
SPLIT_ROWS = 128
#: Row types that the Triton kernels read.
PLANAR_TYPES = (RowType.F16, RowType.Q8_0, RowType.Q4_0, RowType.Q4_1, RowType.Q4_K, RowType.Q6_K)
#: Codes in one 32-bit word.
LANES = {RowType.Q8_0: 4, RowType.Q4_0: 8, RowType.Q4_1: 8, RowType.Q4_K: 8, RowType.Q6_K: 8}


@dataclass(frozen=True)
class Planes:
    """Bytes of each plane for one row; 0 where the type has none."""

    codes: int
    high: int
    sub: int
    scale: int
    minimum: int


def planes(row_type: RowType, columns: int) -> Planes:
    """The planes of a row. Raises KernelError for a type without a planar form, or an impossible length."""
    if row_type not in PLANAR_TYPES:
        names = ", ".join(kind.name for kind in PLANAR_TYPES)
        raise KernelError(f"{RowType(row_type).name} rows have no planar form ({names} have one)")
    whole = row_bytes(row_type, columns)
    if row_type == RowType.F16:
        return Planes(whole, 0, 0, 0, 0)
    stored = columns // block_shape(row_type)[0]
    codes = 4 * (columns // LANES[row_type])
    high = 64 * stored if row_type == RowType.Q6_K else 0
    sub = {RowType.Q4_K: 12, RowType.Q6_K: 16}.get(row_type, 0) * stored
    minimum = 2 * stored if row_type in (RowType.Q4_1, RowType.Q4_K) else 0
    return Planes(codes, high, sub, 2 * stored, minimum)


def chunk_words(row_type: RowType, columns: int) -> int:
    """L, the words in a chunk: :data:`CHUNK_WORDS`, or those of one block of 32 columns."""
    words = columns // LANES[row_type]
    return CHUNK_WORDS if words % CHUNK_WORDS == 0 else 32 // LANES[row_type]


def to_planar(rows: U8, row_type: RowType, columns: int) -> U8:
    """The planar bytes [N · row bytes] of ``rows`` as they lie in a file, uint8 [N, row bytes]."""
    sizes = planes(row_type, columns)
    if rows.shape[1:] != (row_bytes(row_type, columns),):
        raise KernelError(f"rows of shape {rows.shape} are not {columns} columns of {row_type.name}")
    if row_type == RowType.F16:
        return np.ascontiguousarray(rows).reshape(-1)
    stored = rows.reshape(len(rows), -1, block_shape(row_type)[1])
    codes = _codes(stored, row_type).reshape(len(rows), columns)
    parts: list[npt.NDArray[Any]] = [_words(codes, row_type, columns)]
    if sizes.high:
        parts.append(_high_fields(codes))
    for first, last in _FIELDS[row_type]:
        parts.append(stored[..., first:last])
    out = np.concatenate([np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in parts])
    assert out.size == rows.size
    return out


#: Where a stored block has what follows its codes: (sub), scale, (minimum), as byte ranges.
_FIELDS: dict[RowType, tuple[tuple[int, int], ...]] = {
    RowType.Q8_0: ((0, 2),),
    RowType.Q4_0: ((0, 2),),
    RowType.Q4_1: ((0, 2), (2, 4)),
    RowType.Q4_K: ((4, 16), (0, 2), (2, 4)),
    RowType.Q6_K: ((192, 208), (208, 210)),
}


def _nibbles(packed: U8) -> U8:
    """[…, n] bytes to […, 2n]: low nibbles, then high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q6_k_codes(stored: U8) -> U8:
    shape = stored.shape[:2]
    low = _nibbles(stored[..., :128].reshape(*shape, 2, 64)).reshape(*shape, 256)
    high = stored[..., 128:192].reshape(*shape, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return np.asarray(low | high.reshape(*shape, 256) << 4, np.uint8)


#: Codes in column order, as unsigned bytes, of stored blocks [N, blocks, bytes].
_CODES: dict[RowType, Callable[[U8], U8]] = {
    RowType.Q8_0: lambda stored: stored[..., 2:],
    RowType.Q4_0: lambda stored: _nibbles(stored[..., 2:]),
    RowType.Q4_1: lambda stored: _nibbles(stored[..., 4:]),
    RowType.Q4_K: lambda stored: _nibbles(stored[..., 16:].reshape(*stored.shape[:2], 4, 32)),
    RowType.Q6_K: _q6_k_codes,
}


def _codes(stored: U8, row_type: RowType) -> U8:
    return _CODES[row_type](stored)


def _words(codes: U8, row_type: RowType, columns: int) -> npt.NDArray[np.uint32]:
    """Words [N, columns / lanes] of codes [N, columns]: the lowest bits of each code, lane by lane."""
    lanes, length = LANES[row_type], chunk_words(row_type, columns)
    bits = 32 // lanes
    fields = codes.reshape(len(codes), -1, lanes, length).astype(np.uint32) & ((1 << bits) - 1)
    shifts = bits * np.arange(lanes, dtype=np.uint32)[:, None]
    return np.asarray(np.bitwise_or.reduce(fields << shifts, axis=2).reshape(len(codes), -1), np.uint32)


def _high_fields(codes: U8) -> npt.NDArray[np.uint16]:
    """Bits 4 and 5 of six-bit codes [N, columns], two bits for each lane of a word: [N, columns / 8]."""
    fields = (codes.reshape(len(codes), -1, 8, CHUNK_WORDS) >> 4).astype(np.uint16)
    shifts = 2 * np.arange(8, dtype=np.uint16)[:, None]
    return np.asarray(np.bitwise_or.reduce(fields << shifts, axis=2).reshape(len(codes), -1), np.uint16)
