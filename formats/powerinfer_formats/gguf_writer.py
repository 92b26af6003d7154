"""Writes a GGUF file tensor after tensor, in pieces of any size or row by row, and its header last.

Peak memory is the header plus one piece, whatever the model's size. Output is checked by the same rules as
input, so a file written here always opens in ``gguf_reader``.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats import gguf_layout as layout
from powerinfer_formats.atomic import require_space, write_atomic
from powerinfer_formats.gguf_encode import Writable, encode_entry, encode_string
from powerinfer_formats.gguf_layout import ValueType, aligned
from powerinfer_formats.gguf_scan import TensorInfo, check_tensor_name, tensor_bytes
from powerinfer_formats.model_source import ModelSource


class GGUFWriter:
    """A context manager; the file appears under its name when the block ends without an exception.

    Order of use: ``add``/``copy_metadata`` and ``declare`` in any order, then ``write`` every declared
    tensor completely, in the order of declaration; or ``write_rows``, whose tensors may take turns. A call
    out of order raises ``WriteOrder``. ``replace`` may be called until the last data is written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        alignment: int = layout.DEFAULT_ALIGNMENT,
        magic: bytes = layout.MAGIC,
    ) -> None:
        self.path = Path(path)
        self.magic = magic
        if not layout.MIN_ALIGNMENT <= alignment <= layout.MAX_ALIGNMENT or alignment & (alignment - 1):
            raise errors.BadAlignment(self.path, f"alignment {alignment} is not a power of two within limits")
        self.alignment = alignment
        self._entries: dict[str, bytes] = {}
        self._tensors: dict[str, TensorInfo] = {}  # offsets relative to the data section
        self._data_bytes = 0
        self._missing: dict[str, int] | None = None  # bytes still due, by tensor; None: no data yet
        self._lock = threading.Lock()  # of _missing, where threads write rows
        self._start = 0  # of the data section in the file
        self._at = 0  # where the stream is
        self._target: AbstractContextManager[BinaryIO] = write_atomic(self.path)
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._stream = self._target.__enter__()
        if self.alignment != layout.DEFAULT_ALIGNMENT:
            self.add(layout.ALIGNMENT_KEY, self.alignment, ValueType.UINT32)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._complete()
        except BaseException as failure:
            self._target.__exit__(type(failure), failure, failure.__traceback__)
            raise
        finally:
            self._stream = None
        self._target.__exit__(kind, error, trace)

    # --- header --------------------------------------------------------------------------------------

    def add(self, key: str, value: Writable, value_type: ValueType | None = None) -> None:
        """Add one metadata entry; ``value_type`` (of the elements, for a sequence) is needed for numbers."""
        self._add_raw(key, encode_entry(key, value, value_type, str(self.path)))

    def replace(self, key: str, value: Writable, value_type: ValueType | None = None) -> None:
        """Give the entry ``key`` another value of the same size, until the block ends."""
        self._open_stream()
        data = encode_entry(key, value, value_type, str(self.path))
        if len(data) != len(self._entries.get(key, b"")):
            raise errors.WriteOrder(self.path, f"metadata key {key!r} has no value of that size to replace")
        self._entries[key] = data

    def copy_metadata(self, source: ModelSource, *, without: Collection[str] = ()) -> None:
        """Pass on every entry of ``source`` byte for byte, except keys in ``without`` and the alignment."""
        for entry, data in source.metadata_bytes():
            if entry.key != layout.ALIGNMENT_KEY and entry.key not in without:
                self._add_raw(entry.key, data)

    def declare(self, name: str, row_type: int, shape: tuple[int, ...]) -> TensorInfo:
        """Announce a tensor; ``shape`` in numpy's order. Returns its place (offset within the data)."""
        self._expect_header_open()
        file = str(self.path)
        check_tensor_name(name, file)
        encode_string(name, layout.MAX_NAME_BYTES, errors.TensorNameTooLong, f"tensor name {name!r}", file)
        if not 1 <= len(shape) <= layout.MAX_DIMENSIONS:
            raise errors.BadDimensionCount(
                file, f"tensor {name!r} has {len(shape)} dimensions, expected 1 to 4"
            )
        if name in self._tensors:
            raise errors.DuplicateTensor(file, f"tensor {name!r} is declared twice")
        if len(self._tensors) >= layout.MAX_TENSORS:
            raise errors.TooManyTensors(file, f"at most {layout.MAX_TENSORS} tensors can be written")
        info = TensorInfo(
            name, int(row_type), tuple(shape), self._data_bytes, tensor_bytes(name, row_type, shape, file)
        )
        self._tensors[name] = info
        self._data_bytes = aligned(info.offset + info.nbytes, self.alignment)
        return info

    # --- data ----------------------------------------------------------------------------------------

    def write(self, name: str, piece: bytes | bytearray | memoryview | NDArray[Any]) -> None:
        """Append ``piece`` to tensor ``name``, the next one that is incomplete.

        An array of any type gives its bytes in C order; it is not converted.
        """
        missing = self._begin_data()
        due = next(iter(missing), None)
        if due != name:
            expected = "nothing more" if due is None else f"tensor {due!r}"
            raise errors.WriteOrder(self.path, f"data for tensor {name!r} where {expected} is due")
        data = _bytes_of(piece)
        info, left = self._tensors[name], missing[name]
        self._take(name, data.nbytes)
        stream, place = self._open_stream(), self._start + info.offset + info.nbytes - left
        if self._at != place:
            stream.seek(place)
        stream.write(data)
        padding = 0 if data.nbytes < left else aligned(info.nbytes, self.alignment) - info.nbytes
        stream.write(bytes(padding))
        self._at = place + data.nbytes + padding

    def write_rows(self, name: str, places: NDArray[np.integer[Any]], rows: NDArray[np.uint8]) -> None:
        """Write ``rows`` [n, bytes of a row] as rows ``places`` [n] of the matrix ``name``. Every row is
        written once, in any order, and by any number of threads at a time."""
        self._begin_data()
        info = self._tensors.get(name)
        count, row_bytes = info.shape[0] if info else 0, info.nbytes // info.shape[0] if info else 0
        if not info or rows.shape != (len(places), row_bytes) or not _within(places, count):
            raise errors.WriteOrder(
                self.path, f"rows {rows.shape} for tensor {name!r}, which has {count} of {row_bytes} bytes"
            )
        data, start = _bytes_of(rows), self._start + info.offset
        self._take(name, data.nbytes)
        descriptor, at = self._open_stream().fileno(), places.tolist()
        ends = [*(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(at)]
        first = 0
        for end in ends:  # of rows that follow each other in the file, too
            _write_all(descriptor, data[first * row_bytes : end * row_bytes], start + at[first] * row_bytes)
            first = end

    # --- inner ---------------------------------------------------------------------------------------

    def _add_raw(self, key: str, data: bytes) -> None:
        self._expect_header_open()
        if key in self._entries:
            raise errors.DuplicateKey(self.path, f"metadata key {key!r} is added twice")
        if len(self._entries) >= layout.MAX_ENTRIES:
            raise errors.TooManyEntries(self.path, f"at most {layout.MAX_ENTRIES} entries can be written")
        self._entries[key] = data

    def _expect_header_open(self) -> None:
        self._open_stream()
        if self._missing is not None:
            raise errors.WriteOrder(self.path, "data is written; nothing can be added to the header any more")

    def _open_stream(self) -> BinaryIO:
        if self._stream is None:
            raise errors.WriteOrder(self.path, "the writer is used outside of its with block")
        return self._stream

    def _begin_data(self) -> dict[str, int]:
        """What is missing of each incomplete tensor; from the first call on, the header's size is fixed."""
        if self._missing is None:
            self._open_stream()
            self._start = aligned(sum(map(len, self._header())), self.alignment)
            require_space(self.path, self._start + self._data_bytes)
            self._missing = {name: info.nbytes for name, info in self._tensors.items() if info.nbytes}
        return self._missing

    def _take(self, name: str, nbytes: int) -> None:
        """Count ``nbytes`` as written to tensor ``name``."""
        missing = self._begin_data()
        with self._lock:
            left = missing.get(name, 0)
            if nbytes > left:
                raise errors.WriteOrder(
                    self.path, f"tensor {name!r}: {nbytes} bytes handed over, {left} are still due"
                )
            missing[name] = left - nbytes
            if left == nbytes:
                del missing[name]

    def _header(self) -> list[bytes]:
        return [
            self.magic,
            struct.pack("<IQQ", layout.WRITTEN_VERSION, len(self._tensors), len(self._entries)),
            *self._entries.values(),
            *(_directory_row(info) for info in self._tensors.values()),
        ]

    def _complete(self) -> None:
        missing, stream = self._begin_data(), self._open_stream()
        if missing:
            name, nbytes = next(iter(missing.items()))
            raise errors.WriteOrder(
                self.path,
                f"{len(missing)} tensors are incomplete, first {name!r}: {nbytes} bytes were never written",
            )
        stream.truncate(self._start + self._data_bytes)  # padding behind rows
        stream.seek(0)
        stream.write(b"".join(self._header()))


def _bytes_of(piece: bytes | bytearray | memoryview | NDArray[Any]) -> memoryview:
    if isinstance(piece, np.ndarray):
        return memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return memoryview(piece).cast("B")


def _within(places: NDArray[np.integer[Any]], count: int) -> bool:
    return len(places) > 0 and int(places.min()) >= 0 and int(places.max()) < count


def _write_all(descriptor: int, data: memoryview, place: int) -> None:
    while data.nbytes:
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


def _directory_row(info: TensorInfo) -> bytes:
    name = info.name.encode("utf-8")
    return b"".join(
        (
            struct.pack("<Q", len(name)),
            name,
            struct.pack("<I", len(info.shape)),
            # The file lists the fastest-varying dimension first.
            struct.pack(f"<{len(info.shape)}Q", *reversed(info.shape)),
            struct.pack("<IQ", info.row_type, info.offset),
        )
    )
