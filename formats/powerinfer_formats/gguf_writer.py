"""Writes a GGUF file as a stream: header first, then tensor after tensor, in pieces of any size.

Peak memory is the header plus one piece, whatever the model's size. What is written is judged by the same
rules as what is read, so a file from here always opens in ``gguf_reader``.
"""

from __future__ import annotations

import os
import struct
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
    tensor completely, in the order of declaration. A call out of order raises ``WriteOrder``.
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
        self._pending: list[TensorInfo] | None = None  # None until the header is written
        self._written = 0
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
        if self._pending is None:
            self._write_header()
        stream, pending = self._open_stream(), self._pending
        if not pending or pending[0].name != name:
            expected = f"tensor {pending[0].name!r}" if pending else "nothing more"
            raise errors.WriteOrder(self.path, f"data for tensor {name!r} where {expected} is due")
        if isinstance(piece, np.ndarray):
            data = memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        else:
            data = memoryview(piece).cast("B")
        missing_bytes = pending[0].nbytes - self._written
        if data.nbytes > missing_bytes:
            raise errors.WriteOrder(
                self.path, f"tensor {name!r}: {data.nbytes} bytes handed over, {missing_bytes} are still due"
            )
        stream.write(data)
        self._written += data.nbytes
        if self._written == pending[0].nbytes:
            stream.write(bytes(aligned(self._written, self.alignment) - self._written))
            pending.pop(0)
            self._written = 0

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
        if self._pending is not None:
            raise errors.WriteOrder(self.path, "the header is written; nothing can be added to it any more")

    def _open_stream(self) -> BinaryIO:
        if self._stream is None:
            raise errors.WriteOrder(self.path, "the writer is used outside of its with block")
        return self._stream

    def _write_header(self) -> None:
        stream = self._open_stream()
        parts = [
            self.magic,
            struct.pack("<IQQ", layout.WRITTEN_VERSION, len(self._tensors), len(self._entries)),
            *self._entries.values(),
            *(_directory_row(info) for info in self._tensors.values()),
        ]
        length = sum(map(len, parts))
        start = aligned(length, self.alignment)
        require_space(self.path, start + self._data_bytes)
        for part in parts:
            stream.write(part)
        stream.write(bytes(start - length))
        self._pending = list(self._tensors.values())

    def _complete(self) -> None:
        if self._pending is None:
            self._write_header()
        if self._pending:
            missing = self._pending[0].nbytes - self._written
            raise errors.WriteOrder(
                self.path,
                f"{len(self._pending)} tensors are incomplete, "
                f"first {self._pending[0].name!r}: {missing} bytes were never written",
            )


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
