"""Opens a GGUF file, judges all of it, and hands out tensors by expected type and shape.

The weights stay on disk, mapped read-only; metadata is copied out. After ``open`` nothing about the file
needs to be checked again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import gguf_layout as layout
from powerinfer_formats.errors import TruncatedFile
from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_scan import Entry, Header, TensorInfo, Value, scan_header, scan_readable
from powerinfer_formats.mapped_file import MappedFile, map_file, unmap
from powerinfer_formats.model_source import ModelSource
from powerinfer_formats.string_array import StringArray

__all__ = ["GGUFFile", "StringArray", "TensorInfo", "Value", "ValueType"]


def read_readable(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Value], dict[str, TensorInfo]]:
    """Metadata and tensors of a GGUF file that cannot be opened, as far as its header can be read.

    Raises ``CannotRead`` and the like where it cannot be read at all.
    """
    mapping = map_file(Path(path), "a GGUF file")
    try:
        with memoryview(mapping) as buffer:
            entries, tensors = scan_readable(buffer, str(path))
    finally:
        unmap(mapping)
    return {key: entry.value for key, entry in entries.items()}, tensors


class GGUFFile(ModelSource):
    """A validated, mapped GGUF file; use ``GGUFFile.open``."""

    def __init__(self, path: Path, header: Header, mapping: MappedFile) -> None:
        super().__init__(path, header.entries, header.tensors)
        self.notices = header.notices
        self.magic = header.magic
        self.version = header.version
        self.alignment = header.alignment
        self.directory_bytes = header.directory_end
        self._mapping = mapping
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(mapping, np.uint8)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, magics: Collection[bytes] = (layout.MAGIC,)) -> Self:
        """Map and validate ``path``; raises ``FormatError``, one subclass per fault.

        ``magics``: first bytes that are accepted, see :mod:`powerinfer_formats.gguf_layout`.
        """
        where = Path(path)
        mapping = map_file(where, "a GGUF file")
        try:
            with memoryview(mapping) as buffer:
                header = scan_header(buffer, str(where), magics)
        except BaseException:
            unmap(mapping)
            raise
        return cls(where, header, mapping)

    def close(self) -> None:
        """Let go of the mapping; it is unmapped once no view handed out by ``tensor`` is in use."""
        self._bytes = None
        unmap(self._mapping)

    def require_unchanged(self) -> None:
        """Raises ``FileChanged`` where the file is no longer what it was when it was opened."""
        self._mapping.require_unchanged()

    @property
    def container(self) -> str:
        """The format and its version."""
        return f"GGUF version {self.version}"

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self._view())

    @property
    def mappings(self) -> tuple[MappedFile, ...]:
        """The file."""
        return (self._mapping,)

    def raw(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        """A read-only view of ``nbytes`` of the file from byte ``start``."""
        view = self._view()
        if not 0 <= start <= start + nbytes <= len(view):
            raise TruncatedFile(self.path, f"bytes {start} to {start + nbytes} asked for, it has {len(view)}")
        return view[start : start + nbytes]

    def metadata_bytes(self) -> Iterator[tuple[Entry, bytes]]:
        """Every entry with its exact bytes in the file, for a writer that passes them on unchanged."""
        for entry in self.entries.values():
            yield entry, self.raw(entry.start, entry.end - entry.start).tobytes()

    def identity(self) -> Iterator[bytes | memoryview]:
        """Header and directory."""
        yield self.raw(0, self.directory_bytes).data

    def _bytes_of(self, info: TensorInfo) -> NDArray[np.uint8]:
        return self.raw(info.offset, info.nbytes)

    def _view(self) -> NDArray[np.uint8]:
        if self._bytes is None:
            raise ValueError(f"{self.path} has been closed")
        return self._bytes
