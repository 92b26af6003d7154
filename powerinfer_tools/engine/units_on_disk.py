"""Weights of a model that stay on disk: what experts and whole FFNs have in common (residency.py,
layers_on_disk.py)."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_formats.mapped_file import MappedFile
from powerinfer_kernels import Matrix, Part, Pool, Units, UnitsFile
from powerinfer_tools.engine.disk_report import DiskReport
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.tensors import Weight

#: Threads that read: enough to keep a disk's queue filled with reads of a quarter of a MiB.
READERS = 8


@dataclass(frozen=True)
class Budget:
    """What units may take: ``nbytes`` of memory for slots and readers, passes of up to ``batch`` tokens;
    ``use``: the share of tokens that took each expert (layers, experts), where that is known. With ``static``
    those used most stay, and only a small rest of the slots changes hands."""

    nbytes: int
    batch: int
    use: npt.NDArray[np.float64] | None = None
    static: bool = False


class UnitsOnDisk(ABC):
    """Units of ``model`` that are read from its files; :meth:`open` gives them memory. Raises ModelError
    where one is not in a file as it is computed with."""

    #: What a unit is, in the plural, for the user.
    what: str

    def __init__(self, model: Model, pool: Pool) -> None:
        self.model, self._pool = model, pool
        self.units = Units()
        #: What speed to expect, in words for the user, once it is open.
        self.expectation = ""
        self._files: list[UnitsFile] = []
        self._is_open = False
        self._add_units()
        try:
            for mapping in model.source.mappings:
                self._files.append(UnitsFile(*mapping.open_for_reading()))
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _add_units(self) -> None:
        """Say what the units are."""

    @abstractmethod
    def open(self, budget: Budget) -> None:
        """Make room, and read what is to be there from the beginning. Raises ModelError where the memory is
        not there, or too little, and where a file cannot be read."""

    def prepare(self, nbytes: int) -> None:  # noqa: B027
        """Before the program is written: there will be slots of ``nbytes``."""

    @abstractmethod
    def suffices(self, nbytes: int, tokens: int) -> bool:
        """Whether slots of ``nbytes`` do for passes of ``tokens``."""

    @abstractmethod
    def least_bytes(self, tokens: int) -> int:
        """What slots and readers take at least, for passes of ``tokens``."""

    @abstractmethod
    def notice(self, nbytes: int) -> str:
        """What is in memory with slots of ``nbytes``, in words for the user."""

    def too_little(self, budget: Budget) -> str:
        """Why the memory does not do."""
        least = self.least_bytes(budget.batch) >> 20
        return (
            f"{self.model.path}: {max(0, budget.nbytes) >> 20} MiB are left for {self.what} beside what "
            f"every token needs; reading them from disk takes {least + 1} MiB at least"
        )

    def _absent(self, weight: Weight | None) -> Part | None:
        if weight is None:
            return None
        place = self.model.source.place_of(weight.data)
        if place is None:
            raise ModelError(
                f"{self.model.path}: {weight.name} is not in the file as it is computed with, so it cannot "
                "be read from disk while the model runs; give the model more memory, or convert it to GGUF"
            )
        matrix = Matrix.absent(self._pool, weight.row_type, weight.rows, weight.columns)
        return Part(matrix, weight.row_type, *place)

    @property
    def nbytes(self) -> int:
        """Memory that slots and readers take."""
        return self.units.nbytes if self._is_open else 0

    @property
    def whole_bytes(self) -> int:
        """Memory that all units would take."""
        return sum(count * size for count, size in self.units.kinds)

    @property
    def readers_bytes(self) -> int:
        """Memory that the readers take."""
        return READERS * self.units.staging_bytes

    def slots(self, nbytes: int) -> tuple[int, ...]:
        """How many units of each kind ``nbytes`` of slots hold: the same share of every kind."""
        share = min(1.0, nbytes / self.whole_bytes)
        return tuple(int(count * share) for count, _ in self.units.kinds)

    def drop_pages(self) -> None:
        """Give back the pages of the file that were read through its mapping."""
        mappings: Sequence[MappedFile] = self.model.source.mappings
        for mapping, file in zip(mappings, self._files, strict=True):
            mapping.drop_pages(file.descriptor)

    def report(self) -> DiskReport:
        """What was read so far, and what was there."""
        c = self.units.counters()
        return DiskReport(
            what=self.what,
            taken=c.taken,
            hits=c.hits,
            late=c.late,
            ahead=c.ahead,
            ahead_used=c.ahead_used,
            read_bytes=c.read_bytes,
            memory_bytes=c.hit_bytes,
            moved=c.moved,
            wait_seconds=c.wait_nanoseconds / 1e9,
        )

    def problem(self) -> str | None:
        """Why units cannot be read, in words for the user; None while nothing failed."""
        fault = self.units.fault() if self._is_open else None
        if fault is None:
            return None
        path = self.model.source.mappings[fault.file].path
        return (
            f"{path}: {fault.nbytes} bytes at {fault.offset} could not be read while the model ran: "
            f"{fault.reason}"
        )

    def close(self) -> None:
        """End the readers, and give the memory back."""
        files, self._files = self._files, []
        if self._is_open:
            self._is_open = False
            self.units.close()
            return
        for descriptor, _ in files:
            os.close(descriptor)
