"""Metadata as a GGUF file would hold it, for models that come from somewhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator

from powerinfer_formats.gguf_encode import Writable, encode_entry
from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_scan import Entry, scan_entry


class Metadata:
    """Entries in the order they are added. Each is encoded and read back: invalid values are refused."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = os.fspath(file)
        self.entries: dict[str, Entry] = {}
        self._data: dict[str, bytes] = {}

    def add(self, key: str, value: Writable, value_type: ValueType | None = None) -> None:
        """Add or replace one entry, as ``GGUFWriter.add`` takes it. Raises ``FormatError``."""
        data = encode_entry(key, value, value_type, self.file)
        self.entries[key] = scan_entry(data, self.file)
        self._data[key] = data

    def encoded(self) -> Iterator[tuple[Entry, bytes]]:
        """Every entry with its bytes."""
        for key, entry in self.entries.items():
            yield entry, self._data[key]
