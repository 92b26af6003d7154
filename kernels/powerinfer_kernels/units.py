"""Weights that stay on disk, in units; use decides which units are in memory (units.h)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import _kernels
from ._kernels import KernelError
from .checks import check_positive
from .matrix import Matrix
from .row_types import row_bytes

_TILE = 16
_PAGE = 4096
#: Number of later groups of units that a program can request ahead of need.
UNITS_AHEAD = 2
#: Bytes of one read: enough for the full rate of a disk, few enough to share a unit among threads.
PIECE_BYTES = 256 << 10


class UnitsFile(NamedTuple):
    """An open file that units are read from; ``direct``: it was opened with O_DIRECT. Units close it."""

    descriptor: int
    direct: bool


class Part(NamedTuple):
    """One matrix of a unit, made by `Matrix.absent`: plain rows of `row_type` from byte `offset` of a file
    on."""

    matrix: Matrix
    row_type: int
    file: int
    offset: int


@dataclass(frozen=True)
class UnitCounters:
    """Counters so far. `taken`: units that were taken, added up over passes; `hits` of these were in memory,
    and `late` were still being read. `ahead` units were requested ahead of need, and `ahead_used` of these
    were then taken. `read_bytes` came from files, `hit_bytes` were in memory; `moved` units made room for
    others; programs waited for `wait_nanoseconds`."""

    taken: int
    hits: int
    late: int
    ahead: int
    ahead_used: int
    read_bytes: int
    hit_bytes: int
    moved: int
    wait_nanoseconds: int


@dataclass(frozen=True)
class UnitsFault:
    """Why units cannot be read: `reason`, for a read of `nbytes` from `offset` on in the file with index
    `file`."""

    reason: str
    file: int
    offset: int
    nbytes: int


_REASONS = {-1: "the file ends there", -2: "the file was changed since it was opened"}


def fault_of(fault: tuple[int, int, int, int] | None) -> UnitsFault | None:
    """`pi_unit_fault` in words."""
    if fault is None:
        return None
    error, *where = fault
    return UnitsFault(_REASONS.get(error) or os.strerror(error), *where)


class Units:
    """Units in the order in which they were added, numbered from 0. `open` gives them slots in memory, as
    many of each kind as requested; units of one kind have slots of one size."""

    def __init__(self) -> None:
        self.handle = _kernels.Units()
        self._units: list[tuple[int, tuple[Part, ...]]] = []
        self._sizes: list[int] = []

    @property
    def count(self) -> int:
        """Number of units that were added."""
        return len(self._units)

    def add(self, parts: Sequence[Part]) -> int:
        """Add a unit; returns its number. Raises KernelError for no parts."""
        if not parts:
            raise KernelError("a unit needs a matrix at least")
        size = _round(sum(_round(part.matrix.nbytes, 64) for part in parts), _PAGE)
        if size not in self._sizes:
            self._sizes.append(size)
        self._units.append((self._sizes.index(size), tuple(parts)))
        return len(self._units) - 1

    @property
    def kinds(self) -> tuple[tuple[int, int], ...]:
        """(units, bytes of a slot) of each kind."""
        kinds = [kind for kind, _ in self._units]
        return tuple((kinds.count(kind), size) for kind, size in enumerate(self._sizes))

    def kind_of(self, unit: int) -> int:
        """The kind of a unit."""
        return self._units[unit][0]

    @property
    def staging_bytes(self) -> int:
        """Memory of one reading thread."""
        parts = {(p.row_type, p.matrix.columns) for _, parts in self._units for p in parts}
        tiles = [_TILE * row_bytes(row_type, columns) for row_type, columns in parts]
        return max((_piece_tiles(tile) * tile for tile in tiles), default=0) + 2 * _PAGE

    def open(self, files: Sequence[UnitsFile], slots: Sequence[int], threads: int, half_life: float) -> None:
        """Allocate slots for `slots` units of each kind, to be read by `threads`. If a slot is needed, the
        unit of least use is dropped; a use counts half after `half_life` tokens. 0: the unit taken longest
        ago is dropped.

        Raises KernelError if the system does not have the memory, or a number is impossible; the files are
        then left open.
        """
        check_positive(threads=threads)
        if len(slots) != len(self._sizes) or not half_life >= 0:
            raise KernelError(f"{len(self._sizes)} kinds of slots and a half-life of 0 or more are needed")
        kinds = tuple(zip(slots, self._sizes, strict=True))
        units = tuple((kind, *_placed(parts)) for kind, parts in self._units)
        self.handle.open(
            tuple((file.descriptor, file.direct) for file in files), kinds, units, threads, half_life
        )

    def load(self, units: npt.NDArray[np.int32], *, fixed: bool = False) -> int:
        """Read units into free slots, in that order, as many as fit, and wait; returns how many are in
        memory. With `fixed`, they stay. Raises KernelError after a fault."""
        done = self.handle.load(np.ascontiguousarray(units, np.int32), fixed)
        if done < 0:
            raise KernelError("weights on disk could not be brought into memory")
        return done

    def set_use(self, use: npt.NDArray[np.float64]) -> None:
        """Set the use of each unit, in numbers of tokens, as if they had just taken it."""
        self.handle.set_use(np.ascontiguousarray(use, np.float64))

    def taken(self) -> npt.NDArray[np.int64]:
        """Tokens that took each unit so far."""
        return np.frombuffer(self.handle.taken(), np.int64)

    def counters(self) -> UnitCounters:
        """The counters so far."""
        return UnitCounters(*self.handle.counters())

    def fault(self) -> UnitsFault | None:
        """The first fault; nothing is read after a fault."""
        return fault_of(self.handle.fault())

    @property
    def nbytes(self) -> int:
        """Memory of the slots and the reading threads."""
        return self.handle.nbytes

    def close(self) -> None:
        """End the threads, close the files, release the memory. KernelError while a program runs."""
        self.handle.close()


def _placed(parts: Sequence[Part]) -> list[tuple[object, ...]]:
    at, placed = 0, list[tuple[object, ...]]()
    for matrix, row_type, file, offset in parts:
        tiles = _piece_tiles(_TILE * row_bytes(row_type, matrix.columns))
        placed.append((matrix.handle, int(row_type), file, offset, at, tiles))
        at += _round(matrix.nbytes, 64)
    return placed


def _piece_tiles(tile: int) -> int:
    return max(1, PIECE_BYTES // tile)


def _round(size: int, to: int) -> int:
    return -(-size // to) * to
