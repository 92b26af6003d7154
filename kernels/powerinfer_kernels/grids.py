"""The grids of the IQ types: points of 8 or 4 values each, taken from the gguf package's reference."""

import numpy as np
import numpy.typing as npt

from ._kernels import KernelError
from .row_types import RowType


def grid(row_type: RowType) -> npt.NDArray[np.int64]:
    """[points, values of a point]: the values without their signs (IQ1: -1, 0, 1). Raises KernelError where
    the gguf package is not installed."""
    numbers, values = _numbers(row_type)
    return values[numbers]


def grid_numbers(row_type: RowType) -> bytes:
    """uint8 [points, values of a point]: the index of each value among the type's magnitudes in ascending
    order. Raises KernelError where the gguf package is not installed."""
    return _numbers(row_type)[0].astype(np.uint8).tobytes()


def _numbers(row_type: RowType) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Numbers of values, and the values."""
    try:
        from gguf import quants
    except ImportError:
        raise KernelError(
            f"rows of {row_type.name} need the grids of the gguf package: pip install gguf"
        ) from None
    reference = getattr(quants, row_type.name)
    reference.init_grid()
    values = np.array(reference.grid_map, np.int64)
    points = reference.grid.reshape(reference.grid_shape).astype(np.int64)
    return np.searchsorted(values, points), values
