"""Row types: how the weights of one row are stored, with the numbers and block sizes of the GGUF format."""

from enum import IntEnum

from ._kernels import KernelError
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
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30

    @property
    def is_float(self) -> bool:
        """Whether products with this type take float activations (else quantised ones)."""
        return self in (RowType.F32, RowType.F16, RowType.BF16)


_BLOCKS: dict[RowType, tuple[int, int]] = {
    RowType.F32: (1, 4),
    RowType.F16: (1, 2),
    RowType.BF16: (1, 2),
    RowType.Q4_0: (32, 18),
    RowType.Q4_1: (32, 20),
    RowType.Q5_0: (32, 22),
    RowType.Q5_1: (32, 24),
    RowType.Q8_0: (32, 34),
    RowType.Q4_K: (256, 144),
    RowType.Q5_K: (256, 176),
    RowType.Q6_K: (256, 210),
}


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
    known = as_row_type(row_type)
    values, _ = _BLOCKS[known]
    if columns <= 0 or columns % values:
        raise KernelError(f"{known.name} rows hold a positive multiple of {values} values, got {columns}")
    return _row_bytes(known, columns)
