"""Weights of a model that stay on disk, and are partly in memory: the common interface of experts, whole FFNs
and single neurons (residency.py, layers_on_disk.py, neurons_on_disk.py)."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_formats.mapped_file import MappedFile
from powerinfer_kernels import Pool, Records, Units, UnitsFile
from powerinfer_tools.engine.disk_report import DiskReport
from powerinfer_tools.model.loading import Model


@dataclass(frozen=True)
class Budget:
    """The memory that weights on disk may take: ``nbytes`` for the weights in memory and for readers, with
    passes of up to ``batch`` tokens. ``use``: the share of tokens that took each expert, or neuron (of each
    layer), if known. With ``static`` the most used units stay, and only a small rest changes hands."""

    nbytes: int
    batch: int
    use: Sequence[npt.NDArray[np.float64]] | None = None
    static: bool = False


class WeightsOnDisk(ABC):
    """Weights of ``model`` that are read from its files; :meth:`open` gives them memory. Raises ModelError if
    a weight is not stored in a file in the form that is computed with."""

    #: The name of the units, in the plural, for the user.
    what: str

    def __init__(self, model: Model, pool: Pool) -> None:
        self.model, self._pool = model, pool
        #: The speed to expect, in words for the user, once the weights are open.
        self.expectation = ""
        self._files: list[UnitsFile] = []
        self._is_open = False
        self._store = self._lay_out()
        try:
            for mapping in model.source.mappings:
                self._files.append(UnitsFile(*mapping.open_for_reading()))
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _lay_out(self) -> Units | Records:
        """Describe the units or records on disk."""

    @abstractmethod
    def open(self, budget: Budget) -> None:
        """Allocate memory, and read the weights that are needed from the beginning. Raises ModelError if the
        memory is not available or too small, or a file cannot be read."""

    def prepare(self, nbytes: int) -> None:  # noqa: B027
        """Prepare for ``nbytes`` of memory for the weights, before the program is written."""

    @abstractmethod
    def suffices(self, nbytes: int, tokens: int) -> bool:
        """Whether ``nbytes`` suffice for passes of ``tokens``."""

    @abstractmethod
    def least_bytes(self, tokens: int) -> int:
        """The least memory, in bytes, readers included, for passes of ``tokens``."""

    @abstractmethod
    def notice(self, nbytes: int) -> str:
        """The units in memory with ``nbytes``, in words for the user."""

    @property
    @abstractmethod
    def whole_bytes(self) -> int:
        """Memory that all the weights would take."""

    @property
    @abstractmethod
    def readers_bytes(self) -> int:
        """Memory that the readers take."""

    def too_little(self, budget: Budget) -> str:
        """Why the memory does not suffice."""
        least = self.least_bytes(budget.batch) >> 20
        return (
            f"{self.model.path}: {max(0, budget.nbytes) >> 20} MiB are left for {self.what} beside what "
            f"every token needs; reading them from disk takes {least + 1} MiB at least"
        )

    @property
    def nbytes(self) -> int:
        """Memory that is taken."""
        return self._store.nbytes if self._is_open else 0

    def drop_pages(self) -> None:
        """Give back the pages of the file that were read through its mapping."""
        mappings: Sequence[MappedFile] = self.model.source.mappings
        for mapping, file in zip(mappings, self._files, strict=True):
            mapping.drop_pages(file.descriptor)

    def report(self) -> DiskReport:
        """The counters of reads so far, and of weights that were already in memory."""
        c = self._store.counters()
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
        """Why something cannot be read, in words for the user; None while nothing failed."""
        fault = self._store.fault() if self._is_open else None
        if fault is None:
            return None
        path = self.model.source.mappings[fault.file].path
        return (
            f"{path}: {fault.nbytes} bytes at {fault.offset} could not be read while the model ran: "
            f"{fault.reason}"
        )

    def close(self) -> None:
        """Stop the readers, and release the memory."""
        files, self._files = self._files, []
        if self._is_open:
            self._is_open = False
            self._store.close()
            return
        for descriptor, _ in files:
            os.close(descriptor)
