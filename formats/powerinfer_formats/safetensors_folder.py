"""The weights of a Hugging Face directory: one safetensors file, or shards that an index names.

Only files directly in the directory are opened, by plain names; whether such a name is a link (as in that
hub's cache) is the owner's business. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats.gguf_layout import has_control_characters
from powerinfer_formats.mapped_file import MappedFile, map_file, unmap
from powerinfer_formats.records import parse_json, read_text
from powerinfer_formats.safetensors_header import StoredTensor, scan_safetensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARDS = 4096
_KIND = "a safetensors file"


class SafetensorsFolder:
    """Validated, mapped weights; use ``SafetensorsFolder.open``. ``tensors`` maps names to their places."""

    def __init__(self, path: Path, shards: Mapping[str, _Shard], tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.tensors = MappingProxyType(dict(tensors))
        self._shards = dict(shards)
        self._shard_of = {name: shard for shard in shards.values() for name in shard.tensors}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Map and validate the weights in ``path``; raises ``FormatError``, one subclass per fault."""
        folder = Path(path)
        weight_map = _weight_map(folder)
        shards: dict[str, _Shard] = {}
        try:
            for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]:
                shards[file] = _Shard(folder / file)
            tensors = _join(folder, shards, weight_map)
        except BaseException:
            for shard in shards.values():
                shard.close()
            raise
        return cls(folder, shards, tensors)

    def close(self) -> None:
        """Let go of the files; each is unmapped once no view of it is in use."""
        for shard in self._shards.values():
            shard.close()

    def require_unchanged(self) -> None:
        """Raises ``FileChanged`` where a file is no longer what it was when it was opened."""
        for shard in self._shards.values():
            shard.require_unchanged()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the weight files."""
        return tuple(self._shards)

    @property
    def nbytes(self) -> int:
        """Size of all weight files together."""
        return sum(shard.nbytes for shard in self._shards.values())

    @property
    def mappings(self) -> tuple[MappedFile, ...]:
        """The weight files."""
        return tuple(shard.mapping for shard in self._shards.values())

    def headers(self) -> Iterator[memoryview]:
        """The header of each file, its length field included."""
        for shard in self._shards.values():
            yield shard.view(0, shard.data_start).data

    def file_of(self, name: str) -> str:
        """The file that holds tensor ``name``."""
        return self._shard_of[name].path.name

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, a read-only view of the mapped file: uint8 [nbytes]."""
        place = self.tensors[name]
        return self._shard_of[name].view(place.offset, place.nbytes)


class _Shard:
    """One mapped file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mapping: MappedFile = map_file(path, _KIND)
        try:
            with memoryview(self.mapping) as buffer:
                self.tensors, self.data_start = scan_safetensors(buffer, str(path))
        except BaseException:
            unmap(self.mapping)
            raise
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(self.mapping, np.uint8)
        self.nbytes = len(self.mapping)

    def view(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        if self._bytes is None:
            raise ValueError(f"{self.path} has been closed")
        return self._bytes[start : start + nbytes]

    def require_unchanged(self) -> None:
        self.mapping.require_unchanged()

    def close(self) -> None:
        self._bytes = None
        unmap(self.mapping)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor → file by the index; None where one file holds all. Raises ``FormatError``."""
    if (folder / SINGLE_FILE).exists():
        return None
    index = folder / INDEX_FILE
    if not index.exists():
        raise errors.MissingFile(folder, _no_weights(folder))
    document = parse_json(read_text(index), index)
    weight_map = document.get("weight_map") if type(document) is dict else None
    if type(weight_map) is not dict or not weight_map:
        raise errors.BadDocument(index, "has no 'weight_map' of tensor names and files")
    for name, file in weight_map.items():
        _check_file_name(index, name, file)
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise errors.BadDocument(index, f"names more than {MAX_SHARDS} files")
    return weight_map


def _no_weights(folder: Path) -> str:
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
    if pickled:
        return (
            "holds its weights as pickled files only, which may run any code when they are read and are not "
            f"opened here; save them as {SINGLE_FILE} (save_pretrained of the transformers package does)"
        )
    return f"is a directory without {SINGLE_FILE} or {INDEX_FILE}: it holds no model that can be read here"


def _check_file_name(index: Path, name: str, file: Any) -> None:
    plain = (
        type(file) is str
        and len(file) <= 255
        and file.endswith(".safetensors")
        and not file.startswith(".")
        and not any(separator in file for separator in "/\\")
        and not has_control_characters(file)
    )
    if not plain:
        raise errors.BadValue(
            index,
            f"places tensor {name[:100]!r} in {str(file)[:100]!r}, "
            "which is not the plain name of a safetensors file",
        )


def _join(
    folder: Path, shards: Mapping[str, _Shard], weight_map: Mapping[str, str] | None
) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file, shard in shards.items():
        for name, tensor in shard.tensors.items():
            if name in tensors:
                raise errors.DuplicateTensor(shard.path, f"tensor {name!r} is in another file, too")
            if weight_map is not None and weight_map.get(name) != file:
                raise errors.UnexpectedTensor(
                    shard.path, f"has a tensor {name!r} that the index does not place there"
                )
            tensors[name] = tensor
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            raise errors.MissingTensor(folder / file, f"has no tensor {name!r}, which the index places there")
    return tensors
