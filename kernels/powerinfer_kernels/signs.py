"""The signs of weights, one bit each; the magnitudes are not stored."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ._kernels import KernelError
from .buffers import aligned
from .checks import Bytes, as_bytes, check_positive

_TILE, _BLOCK = 16, 32
#: `PI_SIGN_HEADER` and `PI_SIGN_PLANES` of kernels.h.
_HEADER, _PLANES = 16, 4


def sign_code_words(columns: int) -> int:
    """32-bit words of the code of one input."""
    return _HEADER + (_PLANES + 1) * -(-columns // _BLOCK)


def pack_signs(values: npt.NDArray[np.float32]) -> Bytes:
    """uint8 [rows, ceil(columns / 8)] of float32 [rows, columns]: bit j % 8 of byte j // 8 is 1 where value j
    is negative."""
    return np.packbits(values < 0, axis=1, bitorder="little")


class Signs:
    """Signs of weights [rows, columns] as words of 32 columns, 16 rows beside each other.

    `source`: any buffer of exactly rows × ceil(columns / 8) bytes, in the form of `pack_signs`. Raises
    KernelError for another size. The source is not needed afterwards.
    """

    def __init__(self, source: Any, rows: int, columns: int) -> None:
        check_positive(rows=rows, columns=columns)
        data, row = as_bytes("source", source), -(-columns // 8)
        if data.nbytes != rows * row:
            raise KernelError(
                f"signs of {rows} rows of {columns} weights are {rows * row} bytes, the source has "
                f"{data.nbytes}"
            )
        self.rows, self.columns = rows, columns
        tiles, blocks = -(-rows // _TILE), -(-columns // _BLOCK)
        padded = np.zeros((tiles * _TILE, blocks * 4), np.uint8)
        padded[:rows, :row] = data.reshape(rows, row)
        words = padded.view("<u4").reshape(tiles, _TILE, blocks)
        self.words: npt.NDArray[np.uint32] = aligned((tiles, blocks, _TILE), np.uint32)
        self.words[:] = words.transpose(0, 2, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed signs, all of which one product reads."""
        return self.words.nbytes
