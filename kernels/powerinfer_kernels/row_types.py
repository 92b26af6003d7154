"""Row types: how the weights of one row are stored, with the numbers and block sizes of the GGUF format."""

from enum import IntEnum

from ._kernels import KernelError, grid_bytes, set_grid
from ._kernels import packed_row_bytes as _packed_row_bytes
from ._kernels import row_bytes as _row_bytes


class RowType(IntEnum):
    """Storage of a row of weights; the value is the type's number in GGUF files."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40

    @property
    def is_float(self) -> bool:
        """Whether products with this type take float activations (else quantised ones)."""
        return self in (RowType.F32, RowType.F16, RowType.BF16)


#: What `quantize` writes.
WRITTEN_TYPES = (RowType.Q8_0, RowType.Q4_0, RowType.F16, RowType.BF16, RowType.F32)


def _block(row_type: RowType) -> tuple[int, int]:
    """(values, bytes) of one block, from the kernels' own table: the shortest row that there is."""
    values = next(count for count in (1, 32, 64, 256) if _row_bytes(row_type, count))
    return values, _row_bytes(row_type, values)


_BLOCKS = {row_type: _block(row_type) for row_type in RowType}


def as_row_type(row_type: int) -> RowType:
    """The RowType of a GGUF type number. Raises KernelError for a type that the kernels do not know."""
    try:
        return RowType(row_type)
    except ValueError:
        names = ", ".join(member.name for member in RowType)
        raise KernelError(f"row type {row_type!r} is not supported (supported: {names})") from None


def block_shape(row_type: int) -> tuple[int, int]:
    """(values, bytes) of one block of the type. Raises KernelError for an unknown type."""
    return _BLOCKS[as_row_type(row_type)]


def row_bytes(row_type: int, columns: int) -> int:
    """Bytes of a row of `columns` values. Raises KernelError for an unknown type, or where `columns` is not a
    positive multiple of the type's block."""
    kind = as_row_type(row_type)
    values, _ = _BLOCKS[kind]
    if columns <= 0 or columns % values:
        raise KernelError(f"{kind.name} rows hold a positive multiple of {values} values, got {columns}")
    return _row_bytes(kind, columns)


def packed_row_bytes(row_type: int, columns: int) -> int:
    """Bytes of such a row in memory, but for the padding and wider scales of tiles and bundles (3 % at most):
    those of the file, or more for types that are computed in another form (`repack`). Raises KernelError as
    `row_bytes` does."""
    row_bytes(row_type, columns)
    return _packed_row_bytes(row_type, columns)


def computable(row_type: int) -> RowType:
    """The RowType of a number, ready to be read: the grid of IQ types has been handed to the kernels. Raises
    KernelError as `as_row_type` does, and where the gguf package, which has the grids, is not installed."""
    kind = as_row_type(row_type)
    if grid_bytes(kind):
        from .grids import grid_numbers

        set_grid(kind, grid_numbers(kind))
    return kind
