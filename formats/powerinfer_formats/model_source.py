"""The interface by which stages read a model: metadata by key and tensors by name, both in GGUF's terms.

A GGUF file is a model source; other containers present themselves as one, so that no stage asks where a model
came from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import EllipsisType, MappingProxyType, TracebackType
from typing import Any, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats.block_types import type_name
from powerinfer_formats.errors import (
    InvalidUTF8,
    MissingKey,
    MissingTensor,
    WrongKeyType,
    WrongShape,
    WrongType,
)
from powerinfer_formats.gguf_scan import Entry, TensorInfo, Value
from powerinfer_formats.mapped_file import MappedFile
from powerinfer_formats.string_array import LossyText, StringArray

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


class ModelSource(ABC):
    """A validated, opened model.

    ``metadata`` maps keys to ``int``, ``float``, ``bool``, ``str``, read-only numpy arrays or
    ``StringArray``; ``tensors`` maps names to ``TensorInfo`` in file order.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.entries: Mapping[str, Entry] = MappingProxyType(dict(entries))
        self.metadata: Mapping[str, Value] = MappingProxyType(
            {key: entry.value for key, entry in entries.items()}
        )
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        #: Names of the tensors that were requested with a required shape.
        self.expected: set[str] = set()
        #: Messages for the user about how the file is read.
        self.notices: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; they are unmapped once no view handed out by ``tensor`` is in use."""

    @abstractmethod
    def require_unchanged(self) -> None:
        """Raises ``FileChanged`` if a file has changed since it was opened: results computed from its weights
        may then mix two models."""

    @property
    @abstractmethod
    def container(self) -> str:
        """The container of the model, in words for users."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size of everything that holds weights, in bytes."""

    @property
    @abstractmethod
    def mappings(self) -> tuple[MappedFile, ...]:
        """The files that hold weights."""

    def place_of(self, data: NDArray[np.uint8]) -> tuple[int, int] | None:
        """Which of ``mappings`` the bytes of a view are in, and from which byte on; None for an array that
        is not a part of one as it is."""
        for index, mapping in enumerate(self.mappings):
            offset = mapping.offset_of(data)
            if offset is not None:
                return index, offset
        return None

    @abstractmethod
    def metadata_bytes(self) -> Iterator[tuple[Entry, bytes]]:
        """Every entry with its exact bytes in a GGUF file, for a writer that passes them on unchanged."""

    @abstractmethod
    def identity(self) -> Iterator[bytes | memoryview]:
        """All bytes that define the model, except for the weights: a fingerprint begins with these."""

    @abstractmethod
    def _bytes_of(self, info: TensorInfo) -> NDArray[np.uint8]:
        """The bytes of a tensor of this model: uint8 [nbytes], read-only."""

    def _pieces_of(self, info: TensorInfo) -> tuple[NDArray[np.uint8], ...]:
        """The same, in the pieces in which it is stored."""
        return (self._bytes_of(info),)

    def _title(self, info: TensorInfo) -> str:
        """How errors name a tensor."""
        return repr(info.name)

    @overload
    def get(self, key: str, type_: type[T]) -> T: ...
    @overload
    def get(self, key: str, type_: type[T], default: D) -> T | D: ...
    def get(self, key: str, type_: type[Any], default: Any = ...) -> Any:
        """The value of ``key``, which must be of ``type_``: int, float, bool, str, np.ndarray, StringArray.

        ``list`` asks for an array of any kind as a plain Python list. Integers are not truth values and
        not floats. Raises ``WrongKeyType``; ``InvalidUTF8`` for strings that are not, unless the key is below
        ``general.``, which is for people; without a ``default``, ``MissingKey``.
        """
        entry = self.entries.get(key)
        if entry is None:
            if isinstance(default, EllipsisType):
                raise MissingKey(self.path, f"has no metadata {key!r}, which is needed here")
            return default
        value = entry.value
        lossy = isinstance(value, LossyText) or (isinstance(value, StringArray) and value.lossy)
        if lossy and not key.startswith("general."):
            raise InvalidUTF8(self.path, f"metadata {key!r} is not UTF-8, and is needed here")
        if type_ is list and isinstance(value, StringArray | np.ndarray):
            return value.tolist() if isinstance(value, np.ndarray) else list(value)
        if not isinstance(value, type_) or (isinstance(value, bool) and type_ is not bool):
            raise WrongKeyType(
                self.path, f"metadata {key!r} is of type {_describe(entry)}, expected {_expected_name(type_)}"
            )
        return value

    def tensor(
        self, name: str, *, shape: tuple[int, ...] | None = None, types: Collection[int] | None = None
    ) -> NDArray[np.uint8]:
        """The raw bytes of a tensor: uint8 [nbytes], read-only, a view of the mapped file where it can be.

        Raises ``MissingTensor``; ``WrongShape`` where ``shape`` is given and differs; ``WrongType`` where
        the tensor's type is not among ``types``.
        """
        return self._bytes_of(self._checked(name, shape, types))

    def pieces(
        self, name: str, *, shape: tuple[int, ...] | None = None, types: Collection[int] | None = None
    ) -> tuple[NDArray[np.uint8], ...]:
        """The same as one array or several, in order: a stack of matrices may be stored matrix by matrix, and
        is not joined for this."""
        return self._pieces_of(self._checked(name, shape, types))

    def _checked(self, name: str, shape: tuple[int, ...] | None, types: Collection[int] | None) -> TensorInfo:
        info = self.info(name)
        if shape is not None:
            self.expected.add(name)
        if shape is not None and info.shape != tuple(shape):
            stored, expected = _shape(info.shape), _shape(tuple(shape))
            raise WrongShape(
                self.path, f"tensor {self._title(info)} has the shape {stored}, expected {expected}"
            )
        if types is not None and info.row_type not in types:
            allowed = ", ".join(type_name(kind) for kind in sorted(types))
            raise WrongType(
                self.path,
                f"tensor {self._title(info)} is of type {info.type_name}, "
                f"which cannot be used here (can: {allowed})",
            )
        return info

    def info(self, name: str) -> TensorInfo:
        """The directory's row of a tensor; raises ``MissingTensor``."""
        info = self.tensors.get(name)
        if info is None:
            raise MissingTensor(self.path, f"has no tensor {name!r}, which is needed here")
        return info


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(str(dimension) for dimension in shape)


def _describe(entry: Entry) -> str:
    return f"array of {entry.element_type.name}" if entry.element_type is not None else entry.value_type.name


def _expected_name(type_: type[Any]) -> str:
    return _EXPECTED_NAMES.get(type_, type_.__name__)
