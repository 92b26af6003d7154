"""Safetensors files with one JSON document in their metadata: a small writer, and checked reading.

Written by ourselves because it has to be a stream (a profile can be larger than memory allows twice), atomic,
and the same bytes for the same content; read through the ``safetensors`` package, which judges the header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats.atomic import require_space, write_atomic
from powerinfer_formats.errors import (
    BadSafetensors,
    CannotRead,
    MissingTensor,
    NotARegularFile,
    UnexpectedTensor,
    WrongShape,
    WrongType,
)

DOCUMENT_KEY = "powerinfer"
_DTYPES: Mapping[str, str] = {
    "U64": "<u8",
    "F64": "<f8",
    "U32": "<u4",
    "F32": "<f4",
    "I8": "<i1",
    "U8": "|u1",
}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}


def safetensors_parts(document: str, tensors: Mapping[str, NDArray[Any]]) -> list[bytes | memoryview]:
    """The bytes of a file with ``tensors`` (C-contiguous, of the types in this module) and ``document``, in
    parts.

    Tensors of 8-byte values come first, so that every tensor is aligned to its values; else the given
    order is kept.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {DOCUMENT_KEY: document}}
    position = 0
    for name, array in ordered:
        end = position + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    data = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for _, array in ordered if array.size]
    return [len(text).to_bytes(8, "little"), text, *data]


def write_safetensors(
    path: str | os.PathLike[str], document: str, tensors: Mapping[str, NDArray[Any]]
) -> None:
    """Write :func:`safetensors_parts` to ``path``, atomically."""
    parts = safetensors_parts(document, tensors)
    require_space(path, sum(len(part) for part in parts))
    with write_atomic(path) as stream:
        for part in parts:
            stream.write(part)


class SafetensorsReader:
    """An open file; ``take`` hands out a tensor of exactly the expected type and shape."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self._handle = handle
        self._untaken = set(handle.keys())

    def document(self) -> str:
        """The JSON text in the metadata; raises ``BadSafetensors`` where there is none."""
        metadata = self._handle.metadata() or {}
        if set(metadata) != {DOCUMENT_KEY}:
            raise BadSafetensors(
                self.path, f"is not a file of powerinfer: no {DOCUMENT_KEY!r} in its metadata"
            )
        text: str = metadata[DOCUMENT_KEY]
        return text

    def take(self, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A read-only array; raises ``MissingTensor``, ``WrongType`` or ``WrongShape``."""
        if name not in self._untaken:
            raise MissingTensor(self.path, f"has no tensor {name!r}, which is needed here")
        described = self._handle.get_slice(name)
        if described.get_dtype() != dtype:
            raise WrongType(
                self.path, f"tensor {name!r} is of type {described.get_dtype()}, expected {dtype}"
            )
        stored_shape = tuple(described.get_shape())
        if stored_shape != shape:
            raise WrongShape(self.path, f"tensor {name!r} has the shape {stored_shape}, expected {shape}")
        self._untaken.discard(name)
        array: NDArray[Any] = self._handle.get_tensor(name)
        array.flags.writeable = False
        return array

    def finish(self) -> None:
        """Raise ``UnexpectedTensor`` if the file has tensors that nobody took."""
        if self._untaken:
            raise UnexpectedTensor(self.path, f"has a tensor {min(self._untaken)!r}, which is not expected")


@contextmanager
def open_safetensors(
    path: str | os.PathLike[str], content: str | os.PathLike[str] | None = None
) -> Iterator[SafetensorsReader]:
    """Open and judge ``path``, or ``content``, what was unpacked from it (errors then name ``path``).

    Raises ``CannotRead``, ``NotARegularFile`` or ``BadSafetensors``.
    """
    from safetensors import SafetensorError, safe_open

    where = Path(path)
    if where.exists() and not where.is_file():
        raise NotARegularFile(where, "is not a regular file")
    try:
        handle = safe_open(where if content is None else content, framework="numpy")
    except OSError as error:
        raise CannotRead(where, f"cannot be opened: {error.strerror or error}") from None
    except SafetensorError as error:
        raise BadSafetensors(where, f"is not a valid safetensors file: {error}") from None
    with handle:
        yield SafetensorsReader(where, handle)
