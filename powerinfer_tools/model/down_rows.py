"""The down projection with a row for each neuron, in the row type of a split file.

Transposing breaks the blocks of quantised rows apart, so they are quantised again: a strip of neurons at a
time, on a thread per core.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Plain, RowType, block_shape, physical_cores, row_bytes
from powerinfer_tools.model.ffn_matrices import DenseFFN

Bytes = npt.NDArray[np.uint8]
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def on_threads(work: Callable[[_Task], _Result], tasks: Iterable[_Task]) -> Iterator[_Result]:
    """``work`` of every task in order, on a thread per core; for work that releases Python's lock."""
    with ThreadPoolExecutor(physical_cores()) as threads:
        yield from threads.map(work, tasks)


@dataclass(frozen=True)
class DownRows:
    """The rows of ``ffn`` as ``row_type``, neurons in the source's order; if the source has rows of this
    type, their bits are kept."""

    ffn: DenseFFN
    row_type: RowType

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return self.ffn.down.rows if self.ffn.transposed else self.ffn.down.columns

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        down = self.ffn.down
        return row_bytes(self.row_type, down.columns if self.ffn.transposed else down.rows)

    def strips(self, most: int) -> list[tuple[int, int]]:
        """All neurons in [first, end) of about ``most``, which :meth:`write` takes."""
        block = 1 if self.ffn.transposed else block_shape(self.ffn.down.row_type)[0]
        step = max(1, most // block) * block
        return [(first, min(first + step, self.neurons)) for first in range(0, self.neurons, step)]

    def write(self, first: int, end: int, out: Bytes) -> tuple[float, float]:
        """Write neurons [first, end) to ``out`` [end - first, bytes of a row], which may have gaps between
        its rows. Returns Σ of the squared rounding errors, and Σ of the squared values of the down
        projection."""
        if self.ffn.transposed and self.ffn.down.row_type == self.row_type:
            out[:] = self._plain.source.reshape(self.neurons, -1)[first:end]
            return 0.0, 0.0
        return self._plain.requantize(first, end, self.row_type, out, by_columns=not self.ffn.transposed)

    @cached_property
    def _plain(self) -> Plain:
        down = self.ffn.down
        return Plain(np.ascontiguousarray(down.data), down.row_type, down.rows, down.columns)


def relative_error(sums: Iterable[tuple[float, float]]) -> float:
    """‖D′ − D‖ / ‖D‖ (Frobenius) of the down projection D and rows D′, from the results of
    :meth:`DownRows.write` for all strips."""
    lost, norm = (math.fsum(column) for column in zip(*sums, strict=True))
    return math.sqrt(lost / norm) if norm else 0.0
