"""Weights packed for products with every row, and conversions between row types and float32."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from . import _kernels
from ._kernels import KernelError
from .checks import Bytes, Floats, as_bytes, check_array, check_positive
from .pool import Pool, choose_isa
from .row_types import RowType, as_row_type, computable, packed_row_bytes, row_bytes


@dataclass(frozen=True)
class Plain:
    """Plain rows [rows, columns] in a buffer of exactly rows × row_bytes bytes."""

    source: Any
    row_type: int
    rows: int
    columns: int

    def requantize(
        self, begin: int, end: int, to: int, out: Bytes, *, by_columns: bool = False
    ) -> tuple[float, float]:
        """Converts rows [begin, end) to type `to`, as `dequantize` followed by `quantize`. The result goes to
        `out`, uint8 [end - begin, row bytes of type `to`], which may have gaps between its rows.
        ``by_columns``: columns, whole blocks of their type, become rows. Returns Σ of the squared changes of
        values, and Σ of the squared values. Other threads are not blocked. Raises KernelError for wrong sizes
        and types."""
        data = _rows_of(self.source, self.row_type, self.rows, self.columns)
        shape = (self.rows, self.columns)
        return _kernels.requantize(
            choose_isa(), data, self.row_type, *shape, by_columns, begin, end, as_row_type(to), out
        )

    def first_not_finite(self) -> int | None:
        """The first row with a NaN or an infinity, judged by the scales of its blocks if they are sufficient.
        Raises KernelError for wrong sizes or an unknown type."""
        data = _rows_of(self.source, self.row_type, self.rows, self.columns)
        row = _kernels.first_not_finite(choose_isa(), data, self.row_type, self.rows, self.columns)
        return None if row < 0 else row


def _rows_of(source: Any, row_type: int, rows: int, columns: int) -> Bytes:
    """`source` as bytes of exactly `rows` rows, or KernelError."""
    check_positive(rows=rows, columns=columns)
    data = as_bytes("source", source)
    needed = rows * row_bytes(row_type, columns)
    name = computable(row_type).name
    if data.nbytes != needed:
        raise KernelError(
            f"{rows} {name} rows of {columns} values are {needed} bytes, the source has {data.nbytes}"
        )
    return data


class Layout(IntEnum):
    """The layout of weights in memory: interleaved tiles of 16 rows, or a layout that allows single rows, or
    single columns, to be left out."""

    TILES = 0
    PICKED_ROWS = 1
    PICKED_COLUMNS = 2

    def possible(self, row_type: int, rows: int) -> bool:
        """Whether `rows` rows of this type can have this layout. Columns can be picked if the type's blocks
        have a half-precision scale and codes that are numbers, and `rows` is a multiple of 32."""
        return self != Layout.PICKED_COLUMNS or (row_type in _PICKED_COLUMNS and rows % 32 == 0)


_PICKED_COLUMNS = (
    RowType.Q8_0,
    RowType.Q4_0,
    RowType.Q4_1,
    RowType.Q5_0,
    RowType.Q5_1,
    RowType.Q4_K,
    RowType.Q5_K,
    RowType.Q6_K,
)


class Matrix:
    """Weights [rows, columns] laid out for the kernels, in memory of their own on huge pages.

    Made by `Matrix.pack`; the source is not needed afterwards.
    """

    def __init__(
        self,
        handle: _kernels.Matrix,
        row_type: RowType,
        rows: int,
        columns: int,
        layout: Layout = Layout.TILES,
        scale: float = 1.0,
    ) -> None:
        self.handle = handle
        self.row_type = row_type
        self.rows = rows
        self.columns = columns
        self.layout = layout
        #: Factor of products, before a bias is added: a separate operation after each product.
        self.scale = scale

    @classmethod
    def pack(
        cls,
        pool: Pool,
        source: Any,
        row_type: int,
        rows: int,
        columns: int,
        layout: Layout = Layout.TILES,
        scale: float = 1.0,
    ) -> "Matrix":
        """Packs plain rows (any buffer of exactly rows × row_bytes bytes) with the threads of `pool`. The
        size of tiles is `packed_row_bytes` of rows rounded up to 16; of other layouts it is a little more.
        `scale` is the factor of products in programs. Raises KernelError for wrong sizes, an unknown type,
        or a type that is not `possible` in `layout`."""
        data = _rows_of(source, row_type, rows, columns)
        handle = _kernels.Matrix(pool.handle, data, row_type, rows, columns, layout)
        return cls(handle, as_row_type(row_type), rows, columns, layout, scale)

    @classmethod
    def absent(cls, pool: Pool, row_type: int, rows: int, columns: int, scale: float = 1.0) -> "Matrix":
        """A matrix without memory of its own. It uses the memory of a unit (`Units`) while that unit is in
        memory. Raises KernelError as :meth:`pack` does."""
        check_positive(rows=rows, columns=columns)
        row_bytes(row_type, columns)
        supported = computable(row_type)
        handle = _kernels.Matrix(pool.handle, None, supported, rows, columns)
        return cls(handle, supported, rows, columns, scale=scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights: what one product reads."""
        return self.handle.nbytes


class Bundle:
    """The rows of neurons, neuron by neuron: gate, up and down rows of one neuron lie together, in memory of
    their own on huge pages. For work on single neurons.

    Made by `Bundle.pack`; the sources are not needed afterwards. `types` are the row types of (gate, up,
    down), None for a kind that the bundle does not have.
    """

    def __init__(
        self,
        handle: _kernels.Bundle,
        types: tuple[RowType | None, RowType | None, RowType | None],
        rows: int,
        columns: int,
        unread: int = 0,
        *,
        is_absent: bool = False,
    ) -> None:
        #: Whether the rows are on disk, and are read into memory when they are needed (`Records`).
        self.is_absent = is_absent
        self.handle = handle
        self.types = types
        self.rows = rows
        self.columns = columns
        self._unread = unread

    @classmethod
    def pack(
        cls,
        pool: Pool,
        rows: int,
        columns: int,
        *,
        gate: tuple[Any, int] | None = None,
        up: tuple[Any, int] | None = None,
        down: tuple[Any, int] | None = None,
    ) -> "Bundle":
        """Packs plain rows (buffer, row type), each of exactly rows × row_bytes bytes, with the threads of
        `pool`. The size is about `packed_row_bytes` of the rows, every record rounded up to 64 bytes. Raises
        KernelError for wrong sizes, an unknown type, or no rows at all."""
        parts = (gate, up, down)
        if not any(parts):
            raise KernelError("a bundle of no rows at all")
        sources = tuple(part and _rows_of(part[0], part[1], rows, columns) for part in parts)
        types = tuple(part and as_row_type(part[1]) for part in parts)
        numbers = tuple(0 if kind is None else int(kind) for kind in types)
        handle = _kernels.Bundle(pool.handle, sources, numbers, rows, columns)  # type: ignore[arg-type]
        return cls(handle, types, rows, columns)  # type: ignore[arg-type]

    @classmethod
    def absent(
        cls, pool: Pool, rows: int, columns: int, types: tuple[int | None, int | None, int | None]
    ) -> "Bundle":
        """A bundle of rows of these types (gate, up, down; None: no such rows) that `Records` read from disk.
        All rows have addresses, but none has memory yet. Raises KernelError as `pack` does."""
        kinds = tuple(None if kind is None else as_row_type(kind) for kind in types)
        numbers = tuple(0 if kind is None else int(kind) for kind in kinds)
        there = tuple(None if kind is None else True for kind in kinds)
        handle = _kernels.Bundle(pool.handle, there, numbers, rows, columns, True)  # type: ignore[arg-type]
        return cls(handle, kinds, rows, columns, is_absent=True)  # type: ignore[arg-type]

    def only(self, *, gate: bool = False, up: bool = False, down: bool = False) -> "Bundle":
        """The same records, for operations that read only the given kinds of rows. Raises KernelError for
        kinds that the records do not have."""
        parts = (gate, up, down)
        if any(want and kind is None for want, kind in zip(parts, self.types, strict=True)):
            raise KernelError("the bundle has no such rows")
        left = [kind for want, kind in zip(parts, self.types, strict=True) if not want and kind is not None]
        unread = self._unread + self.rows * sum(packed_row_bytes(kind, self.columns) for kind in left)
        types = tuple(kind if want else None for want, kind in zip(parts, self.types, strict=True))
        options = {"is_absent": self.is_absent}
        return Bundle(self.handle, types, self.rows, self.columns, unread, **options)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all records, without the rows that :meth:`only` leaves out."""
        return self.handle.nbytes - self._unread

    @property
    def gate_nbytes(self) -> int:
        """Bytes of all gate rows."""
        return 0 if self.types[0] is None else self.handle.gate_nbytes

    @property
    def record_bytes(self) -> int:
        """Bytes of one neuron."""
        return self.handle.nbytes // self.rows


def dequantize(source: Any, row_type: int, rows: int, columns: int) -> Floats:
    """float32 [rows, columns] of plain rows. Raises KernelError for wrong sizes or an unknown type."""
    data = _rows_of(source, row_type, rows, columns)
    out: Floats = np.empty((rows, columns), np.float32)
    _kernels.dequantize(choose_isa(), data, out, row_type, rows, columns)
    return out


def repack(source: Any, row_type: int, rows: int, columns: int) -> Bytes:
    """uint8 [rows, packed_row_bytes] of plain rows: a copy, for most types. Types that are packed for size
    are returned in the form that kernels compute with: 4-bit codes with one scale for 16 or 32 columns
    (transcode.h). Raises KernelError for wrong sizes or an unknown type."""
    data = _rows_of(source, row_type, rows, columns)
    out: Bytes = np.empty((rows, packed_row_bytes(row_type, columns)), np.uint8)
    _kernels.repack(data, out, row_type)
    return out


def quantize(values: Any, row_type: int) -> Bytes:
    """uint8 [rows, row_bytes] of float32 [rows, columns], rounded as the format's reference does. Types
    WRITTEN_TYPES; KernelError for others, and for columns that are not whole blocks."""
    rows, columns = values.shape if isinstance(values, np.ndarray) and values.ndim == 2 else (0, 0)
    check_array("values", values, np.float32, (rows, columns))
    check_positive(rows=rows, columns=columns)
    out: Bytes = np.empty((rows, row_bytes(row_type, columns)), np.uint8)
    _kernels.quantize(values, out, row_type, rows, columns)
    return out
