"""Matrices by their sizes alone: their bytes in a file, as rows, and as the tiles of the CPU kernels."""

from dataclasses import dataclass

from powerinfer_formats.block_types import TensorType, row_bytes
from powerinfer_kernels import packed_row_bytes

#: Rows of one interleaved tile of the CPU kernels; packed matrices are padded to it.
TILE_ROWS = 16
#: Row types without blocks.
FLOAT_TYPES = frozenset({TensorType.F32, TensorType.F16, TensorType.BF16})


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class MatrixShape:
    """A matrix of ``rows`` × ``columns`` stored as rows of ``row_type``."""

    row_type: TensorType
    rows: int
    columns: int

    @property
    def file_nbytes(self) -> int:
        """Size in the file, bytes."""
        return self.rows * row_bytes(self.row_type, self.columns)

    @property
    def nbytes(self) -> int:
        """Size of the rows in memory, bytes: more than in the file for types that are computed in another
        form."""
        return self.rows * packed_row_bytes(self.row_type, self.columns)

    @property
    def packed_nbytes(self) -> int:
        """Size as interleaved tiles in memory, bytes: rows are padded to whole tiles."""
        return round_up(self.rows, TILE_ROWS) * packed_row_bytes(self.row_type, self.columns)
