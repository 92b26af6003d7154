"""Memory that programs work on: aligned arrays, quantised activations, the key-value cache, rows in place."""

import contextlib
import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from ._kernels import KernelError
from .checks import Array, as_bytes, check_positive
from .row_types import RowType, computable, row_bytes

_LINE = 64
_HUGE_PAGE = 2 << 20
_READ_AHEAD = 32  # bytes that attention may read past the last value: PI_CACHE_READ_AHEAD of kernels.h
MAX_HEAD_DIM = 1024
#: The types of a KV cache.
KV_KINDS = ("f16", "q8_0")
MAX_ELEMENTS = 1 << 46  # keeps every product of sizes within 64 bits


def aligned(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """A zeroed, C-contiguous array that starts on a cache line; from 2 MiB on, on huge pages where the
    system has them. Raises KernelError for negative sizes, and if there is not enough memory."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    kind = np.dtype(dtype)
    if any(size < 0 for size in sizes) or math.prod(sizes) > MAX_ELEMENTS:
        raise KernelError(f"an array of shape {sizes} is impossible")
    nbytes = math.prod(sizes) * kind.itemsize
    alignment = _HUGE_PAGE if nbytes >= _HUGE_PAGE else _LINE
    try:
        space = (
            _huge_space(nbytes + alignment)
            if nbytes >= _HUGE_PAGE
            else np.zeros(nbytes + alignment, np.uint8)
        )
    except (OSError, MemoryError):
        raise KernelError(f"cannot get {nbytes} bytes of memory for an array of shape {sizes}") from None
    start = -space.ctypes.data % alignment
    return space[start : start + nbytes].view(kind).reshape(sizes)


def _huge_space(nbytes: int) -> npt.NDArray[np.uint8]:
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones do
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, dtype=np.uint8)


class Activations:
    """Activations in blocks of 32 with one scale each: the input of products with quantised weights.

    q int8 [max_tokens, columns], d float32 [max_tokens, columns / 32] (the scale), s float32 of the same
    shape (Σ q; d · s is the factor of a weight block's minimum). Raises KernelError unless columns is a
    multiple of 32.
    """

    def __init__(self, max_tokens: int, columns: int) -> None:
        check_positive(max_tokens=max_tokens, columns=columns)
        if columns % 32:
            raise KernelError(f"activations come in blocks of 32; {columns} columns are no multiple of it")
        self.max_tokens = max_tokens
        self.columns = columns
        self.q: npt.NDArray[np.int8] = aligned((max_tokens, columns), np.int8)
        self.d: npt.NDArray[np.float32] = aligned((max_tokens, columns // 32), np.float32)
        self.s: npt.NDArray[np.float32] = aligned((max_tokens, columns // 32), np.float32)


def check_cache(capacity: int, kv_heads: int, head_dim: int, value_dim: int) -> None:
    """Raise KernelError for sizes that no KV cache can have."""
    check_positive(capacity=capacity, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim)
    for dim in (head_dim, value_dim):
        if dim % 2 or dim > MAX_HEAD_DIM:
            raise KernelError(f"head_dim must be even and at most {MAX_HEAD_DIM}, got {dim}")


class KVCache:
    """Keys and values of one layer: as half-precision bits (uint16), or with kind "q8_0" as int8 codes with
    one half-precision scale for each 32 values of a head.

    keys [kv_heads, ceil(capacity / 16), head_dim, 16]: the last axis is the position within a tile of 16;
    values [kv_heads, capacity, value_dim], as wide as keys unless said otherwise; scales have a 32nd of those
    dimensions and are None for kind "f16". Memory is taken when positions are first written. Raises
    KernelError unless both dimensions are even (q8_0: multiples of 32) and at most 1024.
    """

    def __init__(
        self, capacity: int, kv_heads: int, head_dim: int, kind: str = "f16", value_dim: int | None = None
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        check_cache(capacity, kv_heads, head_dim, value_dim)
        if kind not in KV_KINDS:
            raise KernelError(f"a KV cache of type {kind!r} is not one of {', '.join(KV_KINDS)}")
        if kind == "q8_0" and (head_dim % 32 or value_dim % 32):
            odd = head_dim if head_dim % 32 else value_dim
            raise KernelError(
                f"a q8_0 KV cache needs heads of a multiple of 32 values, these have {odd}; take f16"
            )
        self.capacity = capacity
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.kind = kind
        tiles = -(-capacity // 16)
        element = np.int8 if kind == "q8_0" else np.uint16
        self.keys: npt.NDArray[np.int8 | np.uint16] = aligned((kv_heads, tiles, head_dim, 16), element)
        count = kv_heads * capacity * value_dim
        ahead = _READ_AHEAD // np.dtype(element).itemsize
        self._value_space: npt.NDArray[np.int8 | np.uint16] = aligned(count + ahead, element)
        self.values = self._value_space[:count].reshape(kv_heads, capacity, value_dim)
        self.key_scales: npt.NDArray[np.uint16] | None = None
        self.value_scales: npt.NDArray[np.uint16] | None = None
        if kind == "q8_0":
            self.key_scales = aligned((kv_heads, tiles, head_dim // 32, 16), np.uint16)
            self.value_scales = aligned((kv_heads, capacity, value_dim // 32), np.uint16)

    @property
    def arrays(self) -> tuple[Any, Any, Any, Any]:
        """Keys, values, and the scales of both (None for f16)."""
        return (self.keys, self.values, self.key_scales, self.value_scales)

    @property
    def buffers(self) -> tuple[Any, Any, Any, Any]:
        """`arrays` in the form for the C extension: values include the bytes that may be read past their
        end."""
        return (self.keys, self._value_space, self.key_scales, self.value_scales)

    def copy_positions(self, source: "KVCache", positions: int) -> None:
        """Copy the first `positions` of `source`, bit for bit. Raises KernelError if the two caches differ
        in type or shape, or one is shorter."""
        mine, other = (
            (self.kind, self.kv_heads, self.head_dim, self.value_dim),
            (source.kind, source.kv_heads, source.head_dim, source.value_dim),
        )
        if mine != other or not 0 <= positions <= min(self.capacity, source.capacity):
            raise KernelError(
                f"{positions} positions of a cache {other} of {source.capacity} do not go into one {mine} of "
                f"{self.capacity}"
            )
        tiles = -(-positions // 16)
        for to, of, count in zip(self.arrays, source.arrays, (tiles, positions) * 2, strict=True):
            if to is not None and of is not None:
                to[:, :count] = of[:, :count]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values when the cache is full."""
        return sum(array.nbytes for array in self.arrays if array is not None)


class RowMatrix:
    """Rows of weights used in place (in a mapped file, say), `stride` bytes apart: for work on single rows.

    Keeps a reference to `data` and copies nothing. Raises KernelError when the type is unknown, `columns`
    are not whole blocks, the stride is shorter than a row, or `data` is too short for all rows.
    """

    def __init__(self, data: Any, row_type: int, rows: int, columns: int, stride: int | None = None) -> None:
        check_positive(rows=rows, columns=columns)
        self.row_type = computable(row_type)
        self.rows = rows
        self.columns = columns
        width = row_bytes(row_type, columns)
        self.stride = width if stride is None else stride
        self.data = as_bytes("data", data)
        if self.stride < width:
            raise KernelError(f"a stride of {self.stride} bytes is shorter than a row of {width}")
        needed = (rows - 1) * self.stride + width
        if self.data.nbytes < needed:
            raise KernelError(f"{rows} rows need {needed} bytes, the buffer has {self.data.nbytes}")
        # Alignment that a row's numbers need: float32, else half precision; scales of MXFP4 are bytes.
        alignment = {RowType.F32: 4, RowType.MXFP4: 1}.get(self.row_type, 2)
        if self.data.ctypes.data % alignment or self.stride % alignment:
            raise KernelError(f"rows of {self.row_type.name} must start at multiples of {alignment} bytes")

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, including the gaps between them."""
        return self.rows * self.stride
