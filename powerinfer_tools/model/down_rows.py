"""The down projection with a row for each neuron, in the row type of a split file.

Transposing breaks the blocks of quantised rows apart, so they are quantised again: a strip of neurons at a
time, which stays in caches, on a thread per core.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import RowType, block_shape, dequantize, physical_cores, quantize, row_bytes
from powerinfer_tools.model.ffn_matrices import DenseFFN

Bytes = npt.NDArray[np.uint8]
#: Values of a strip: 1 MiB of float32, and as much again transposed.
_STRIP_VALUES = 1 << 18
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def on_threads(work: Callable[[_Task], _Result], tasks: Iterable[_Task]) -> Iterator[_Result]:
    """``work`` of every task in order, on a thread per core; for work that leaves Python's lock alone."""
    with ThreadPoolExecutor(physical_cores()) as threads:
        yield from threads.map(work, tasks)


def down_rows(ffn: DenseFFN, row_type: RowType) -> tuple[Bytes, float]:
    """uint8 (neurons, row bytes) of ``row_type``, neurons in the source's order, and what rounding them
    costs: ‖D′ − D‖ / ‖D‖ (Frobenius) of the down projection D and these rows D′."""
    down = ffn.down
    source = down.data.reshape(down.rows, -1)
    neurons, width = (down.rows, down.columns) if ffn.transposed else (down.columns, down.rows)
    rows: Bytes = np.empty((neurons, row_bytes(row_type, width)), np.uint8)
    values, nbytes = block_shape(down.row_type)
    block = 1 if ffn.transposed else values
    step = max(1, _STRIP_VALUES // (width * block)) * block

    def strip(first: int) -> tuple[float, float]:
        end = min(first + step, neurons)
        if ffn.transposed:
            made = dequantize(source[first:end].reshape(-1), down.row_type, end - first, width)
        else:
            piece = np.ascontiguousarray(source[:, first // values * nbytes : end // values * nbytes])
            part = dequantize(piece.reshape(-1), down.row_type, width, end - first)
            made = np.ascontiguousarray(part.T)
        rows[first:end] = quantize(made, row_type)
        back = dequantize(rows[first:end].reshape(-1), row_type, end - first, width)
        back -= made
        return _squares(back), _squares(made)

    sums = list(on_threads(strip, range(0, neurons, step)))
    lost, norm = (math.fsum(column) for column in zip(*sums, strict=True))
    return rows, math.sqrt(lost / norm) if norm else 0.0


def _squares(values: npt.NDArray[np.float32]) -> float:
    """Σ values² in double precision."""
    wide = values.reshape(-1).astype(np.float64)
    return float(wide @ wide)
