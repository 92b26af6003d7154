"""Rows of neurons that stay on disk; programs bring the neurons that they name into memory (records.h)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import _kernels
from ._kernels import KernelError
from .checks import check_positive
from .matrix import Bundle
from .pool import Pool
from .units import UnitCounters, UnitsFault, UnitsFile, fault_of

PAGE = 4096
_AT_ONCE = 256 << 10


class LayerOfRecords(NamedTuple):
    """The records of one layer, one after the other from byte `offset` of a file on, `nbytes` each. `bundle`
    was made by `Bundle.absent`. `rows` are the places of the gate, up and down rows in a record, None for a
    kind that it does not have. The first `fixed` records stay in memory as long as the records that a pass
    takes fit beside them."""

    bundle: Bundle
    file: int
    offset: int
    nbytes: int
    rows: tuple[int | None, int | None, int | None]
    fixed: int


@dataclass(frozen=True)
class RecordsOf:
    """One layer of records, for operations."""

    records: "Records"
    layer: int


class Records:
    """The rows of layers' neurons on disk; `open` gives them memory."""

    def __init__(self) -> None:
        self.handle = _kernels.Records()

    def open(
        self, files: Sequence[UnitsFile], layers: Sequence[LayerOfRecords], pages: int, reading_bytes: int
    ) -> None:
        """Allocate `pages` of 4,096 bytes for records, and `reading_bytes` for what is being read, at least
        `read_bytes` of any layer. Raises KernelError if the system does not have the memory, or a number is
        impossible; the files are then left open."""
        check_positive(reading_bytes=reading_bytes, pages=pages)
        self.handle.open(
            tuple((file.descriptor, file.direct) for file in files),
            tuple(_given(layer) for layer in layers),
            pages,
            reading_bytes,
        )

    def load(self, pool: Pool, layer: int, neurons: npt.NDArray[np.int32]) -> None:
        """Read the `neurons` (ascending) of `layer` that are not in memory yet; the threads of `pool` lay
        them out. Raises KernelError after a fault, and if they do not fit."""
        if not self.handle.load(pool.handle, layer, np.ascontiguousarray(neurons, np.int32)):
            raise KernelError("weights on disk could not be brought into memory")

    def reset(self) -> None:
        """Reset the counters."""
        self.handle.reset()

    def taken(self, layer: int) -> npt.NDArray[np.int64]:
        """Passes that took each neuron of `layer` so far."""
        return np.frombuffer(self.handle.taken(layer), np.int64)

    def counters(self) -> UnitCounters:
        """The counters so far; the units are neurons."""
        return UnitCounters(*self.handle.counters())

    def fault(self) -> UnitsFault | None:
        """The first fault; nothing is read after a fault."""
        return fault_of(self.handle.fault())

    @property
    def asynchronous(self) -> bool:
        """Whether the system reads while the program computes (Linux's asynchronous reads are there)."""
        return self.handle.asynchronous

    @property
    def nbytes(self) -> int:
        """Memory of the records and of what is being read."""
        return self.handle.nbytes

    def close(self) -> None:
        """Close the files, release the memory. KernelError while a program runs."""
        self.handle.close()


def read_bytes(record_bytes: int) -> int:
    """The most bytes of memory that one read of records of this size takes: neighbours come together."""
    return (max(1, _AT_ONCE // record_bytes) + 1) * record_bytes + 2 * PAGE


def _given(layer: LayerOfRecords) -> tuple[object, ...]:
    types = tuple(-1 if kind is None else int(kind) for kind in layer.bundle.types)
    if [kind < 0 for kind in types] != [row is None for row in layer.rows]:
        raise KernelError("records have other rows than their bundle")
    places = tuple(row or 0 for row in layer.rows)
    return (layer.bundle.handle, layer.file, layer.offset, layer.nbytes, places, types, layer.fixed)
