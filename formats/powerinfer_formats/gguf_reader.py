"""Opens a GGUF file, judges all of it, and hands out tensors by expected type and shape.

The weights stay on disk, mapped read-only; metadata is copied out. After ``open`` nothing about the file
needs to be checked again. The size is checked when the file is opened: one that another program shortens
later, while it is mapped, is beyond what a reader can guard against.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import EllipsisType, MappingProxyType, TracebackType
from typing import Any, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats.block_types import type_name
from powerinfer_formats.errors import (
    CannotRead,
    MissingKey,
    MissingTensor,
    NotARegularFile,
    TruncatedFile,
    WrongKeyType,
    WrongShape,
    WrongType,
)
from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_scan import Entry, Header, TensorInfo, Value, scan_header
from powerinfer_formats.string_array import StringArray

__all__ = ["GGUFFile", "StringArray", "TensorInfo", "Value", "ValueType"]

_EXPECTED_NAMES: Mapping[type[Any], str] = MappingProxyType(
    {
        int: "an integer",
        float: "a float",
        bool: "a truth value",
        str: "a string",
        np.ndarray: "an array of numbers",
        StringArray: "an array of strings",
        list: "an array",
    }
)

T = TypeVar("T")
D = TypeVar("D")


class GGUFFile:
    """A validated, mapped GGUF file; use ``GGUFFile.open``.

    ``metadata`` maps keys to ``int``, ``float``, ``bool``, ``str``, read-only numpy arrays or
    ``StringArray``; ``tensors`` maps names to ``TensorInfo`` in file order.
    """

    def __init__(self, path: Path, header: Header, mapping: mmap.mmap) -> None:
        self.path = path
        self.version = header.version
        self.alignment = header.alignment
        self.directory_bytes = header.directory_end
        self.entries: Mapping[str, Entry] = MappingProxyType(header.entries)
        self.metadata: Mapping[str, Value] = MappingProxyType(
            {key: entry.value for key, entry in header.entries.items()}
        )
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(header.tensors)
        self._mapping = mapping
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(mapping, np.uint8)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Map and validate ``path``; raises ``FormatError``, one subclass per fault."""
        where = Path(path)
        mapping = _map(where)
        try:
            with memoryview(mapping) as buffer:
                header = scan_header(buffer, str(where))
        except BaseException:
            _unmap(mapping)
            raise
        return cls(where, header, mapping)

    def close(self) -> None:
        """Let go of the mapping; it is unmapped once no view handed out by ``tensor`` is in use."""
        self._bytes = None
        _unmap(self._mapping)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self._view())

    # --- metadata ------------------------------------------------------------------------------------

    @overload
    def get(self, key: str, type_: type[T]) -> T: ...
    @overload
    def get(self, key: str, type_: type[T], default: D) -> T | D: ...
    def get(self, key: str, type_: type[Any], default: Any = ...) -> Any:
        """The value of ``key``, which must be of ``type_``: int, float, bool, str, np.ndarray, StringArray.

        ``list`` asks for an array of any kind as a plain Python list. Integers are not truth values and
        not floats. Raises ``WrongKeyType``; without a ``default``, ``MissingKey``.
        """
        entry = self.entries.get(key)
        if entry is None:
            if isinstance(default, EllipsisType):
                raise MissingKey(self.path, f"has no metadata {key!r}, which is needed here")
            return default
        value = entry.value
        if type_ is list and isinstance(value, StringArray | np.ndarray):
            return value.tolist() if isinstance(value, np.ndarray) else list(value)
        if not isinstance(value, type_) or (isinstance(value, bool) and type_ is not bool):
            raise WrongKeyType(
                self.path, f"metadata {key!r} is of type {_describe(entry)}, expected {_expected_name(type_)}"
            )
        return value

    # --- tensors -------------------------------------------------------------------------------------

    def tensor(
        self, name: str, *, shape: tuple[int, ...] | None = None, types: Collection[int] | None = None
    ) -> NDArray[np.uint8]:
        """The raw bytes of a tensor, a read-only view of the mapped file: uint8 [nbytes].

        Raises ``MissingTensor``; ``WrongShape`` where ``shape`` is given and differs; ``WrongType`` where
        the tensor's type is not among ``types``.
        """
        info = self.info(name)
        if shape is not None and info.shape != tuple(shape):
            found, expected = _shape(info.shape), _shape(tuple(shape))
            raise WrongShape(self.path, f"tensor {name!r} has the shape {found}, expected {expected}")
        if types is not None and info.row_type not in types:
            allowed = ", ".join(type_name(kind) for kind in sorted(types))
            raise WrongType(
                self.path,
                f"tensor {name!r} is of type {info.type_name}, which cannot be used here (can: {allowed})",
            )
        return self.raw(info.offset, info.nbytes)

    def info(self, name: str) -> TensorInfo:
        """The directory's row of a tensor; raises ``MissingTensor``."""
        info = self.tensors.get(name)
        if info is None:
            raise MissingTensor(self.path, f"has no tensor {name!r}, which is needed here")
        return info

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

    def _view(self) -> NDArray[np.uint8]:
        if self._bytes is None:
            raise ValueError(f"{self.path} has been closed")
        return self._bytes


def _map(path: Path) -> mmap.mmap:
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CannotRead(path, f"cannot be opened: {reason}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotARegularFile(path, "is not a regular file; a GGUF file is needed here")
        if status.st_size == 0:
            raise TruncatedFile(path, "is empty")
        return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CannotRead(path, f"cannot be mapped: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _unmap(mapping: mmap.mmap) -> None:
    with suppress(BufferError):  # views are still in use; the mapping goes with the last of them
        mapping.close()


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(str(dimension) for dimension in shape)


def _describe(entry: Entry) -> str:
    return f"array of {entry.element_type.name}" if entry.element_type is not None else entry.value_type.name


def _expected_name(type_: type[Any]) -> str:
    return _EXPECTED_NAMES.get(type_, type_.__name__)
