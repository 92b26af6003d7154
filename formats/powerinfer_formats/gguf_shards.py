"""A GGUF model in shards, ``NAME-00001-of-0000N.gguf``: one source, whichever of its files is named.

The convention is that of llama.cpp's ``gguf-split`` and of the ``gguf`` package: every file says which one it
is (``split.no``, from 0), how many there are (``split.count``) and how many tensors all of them have
(``split.tensors.count``); the first file has the metadata of the model.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import gguf_layout as layout
from powerinfer_formats.errors import BadShard, DuplicateTensor, MissingShard
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_scan import Entry, TensorInfo
from powerinfer_formats.mapped_file import MappedFile
from powerinfer_formats.model_source import ModelSource
from powerinfer_formats.shard_names import MAX_SHARDS, shard_files

KEY_NUMBER, KEY_COUNT, KEY_TENSORS = "split.no", "split.count", "split.tensors.count"
SHARD_KEYS = (KEY_NUMBER, KEY_COUNT, KEY_TENSORS)
_SHOWN_NAMES = 4


def open_gguf(path: str | os.PathLike[str], *, magics: Collection[bytes] = (layout.MAGIC,)) -> ModelSource:
    """The model of the GGUF file at ``path``; for one shard, the model of the whole set.

    Raises ``FormatError``: as ``GGUFFile.open`` does, and ``MissingShard`` or ``BadShard`` about a set.
    """
    file = GGUFFile.open(path, magics=magics)
    if not any(key in file.entries for key in SHARD_KEYS):
        return file
    return ShardedGGUF.around(file)


class ShardedGGUF(ModelSource):
    """The validated, mapped files of a set; use :func:`open_gguf`. ``path`` is the path of the first file."""

    def __init__(self, files: tuple[GGUFFile, ...]) -> None:
        tensors = {name: info for file in files for name, info in file.tensors.items()}
        super().__init__(files[0].path, _entries(files), tensors)
        self.files = files
        self.notices = tuple(f"{file.path.name}: {said}" for file in files for said in file.notices)
        self._file_of = {name: file for file in files for name in file.tensors}

    @classmethod
    def around(cls, file: GGUFFile) -> Self:
        """Map and validate the set that ``file`` belongs to, which closes with it. Raises ``FormatError``."""
        files = [file]
        try:
            count, number = _integer(file, KEY_COUNT, 1), _integer(file, KEY_NUMBER, 0)
            paths = _paths(file.path, number, count)
            files[:0] = [GGUFFile.open(path) for path in paths[:number]]
            files += [GGUFFile.open(path) for path in paths[number + 1 :]]
            _check(files)
            return cls(tuple(files))
        except BaseException:
            for opened in files:
                opened.close()
            raise

    def close(self) -> None:
        """Let go of the files; each is unmapped once no view of it is in use."""
        for file in self.files:
            file.close()

    def require_unchanged(self) -> None:
        """Raises ``FileChanged`` where a file is no longer what it was when it was opened."""
        for file in self.files:
            file.require_unchanged()

    @property
    def container(self) -> str:
        """The format, its version, and the number of files."""
        return f"{self.files[0].container}, {len(self.files)} shards"

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        return sum(file.nbytes for file in self.files)

    @property
    def mappings(self) -> tuple[MappedFile, ...]:
        """The files of the set."""
        return tuple(mapping for file in self.files for mapping in file.mappings)

    def metadata_bytes(self) -> Iterator[tuple[Entry, bytes]]:
        """Every entry of the model, without those about shards, with its exact bytes."""
        for entry, data in self.files[0].metadata_bytes():
            if entry.key in self.entries:
                yield entry, data

    def identity(self) -> Iterator[bytes | memoryview]:
        """Header and directory of each file, in order."""
        for file in self.files:
            yield from file.identity()

    def _bytes_of(self, info: TensorInfo) -> NDArray[np.uint8]:
        return self._file_of[info.name].raw(info.offset, info.nbytes)

    def _title(self, info: TensorInfo) -> str:
        return f"{info.name!r} in {self._file_of[info.name].path.name}"


def _entries(files: tuple[GGUFFile, ...]) -> dict[str, Entry]:
    """The model's metadata: the first file's, without what is about shards."""
    return {key: entry for key, entry in files[0].entries.items() if key not in SHARD_KEYS}


def _integer(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.get(key, int) if default is None else file.get(key, int, default)
    if value < 0:
        raise BadShard(file.path, f"says that {key} is {value}")
    return value


def _paths(path: Path, number: int, count: int) -> list[Path]:
    """The files of the set, in order. Raises ``BadShard`` or ``MissingShard``."""
    if count <= 1:
        if number:
            raise BadShard(path, f"says that it is shard {number + 1} of {count}")
        return [path]
    if count > MAX_SHARDS:
        raise BadShard(path, f"says that it is one of {count} shards, at most {MAX_SHARDS} are read")
    paths = shard_files(path, count)
    if number >= len(paths) or paths[number] != path:
        raise BadShard(
            path,
            f"says that it is shard {number + 1} of {count}, so its name has to end in "
            f"-{number + 1:05}-of-{count:05}.gguf: shards are found by their names",
        )
    missing = [file.name for file in paths if not file.exists()]
    if missing:
        more = f" and {len(missing) - _SHOWN_NAMES} more" if len(missing) > _SHOWN_NAMES else ""
        raise MissingShard(
            path,
            f"is shard {number + 1} of {count} of a model; beside it, "
            f"{', '.join(missing[:_SHOWN_NAMES])}{more} {'is' if len(missing) == 1 else 'are'} missing",
        )
    return paths


def _check(files: list[GGUFFile]) -> None:
    """Raise ``BadShard`` or ``DuplicateTensor`` unless the files are one set."""
    first = files[0]
    total = _integer(first, KEY_TENSORS, len(first.tensors) if len(files) == 1 else None)
    places: dict[str, GGUFFile] = {}
    for number, file in enumerate(files):
        _check_keys(file, {KEY_NUMBER: number, KEY_COUNT: len(files), KEY_TENSORS: total})
        _check_metadata(first, file)
        for name in file.tensors:
            if name in places:
                raise DuplicateTensor(
                    file.path, f"tensor {name!r} is in another shard, too ({places[name].path.name})"
                )
            places[name] = file
    if len(places) != total:
        raise BadShard(
            first.path,
            f"says that the model has {total} tensors, its {len(files)} shards have {len(places)}: they are "
            "of different models, or cut differently",
        )


def _check_keys(file: GGUFFile, expected: dict[str, int]) -> None:
    """Every file of a set has all three keys; in a whole file, such as a merged one, the count is 0 or 1."""
    whole = expected[KEY_COUNT] == 1
    for key, expected_value in expected.items():
        value = _integer(file, key, expected_value if whole else None)
        if value != expected_value and not (whole and key == KEY_COUNT):
            raise BadShard(file.path, f"says that {key} is {value}, the other shards say {expected_value}")


def _check_metadata(first: GGUFFile, file: GGUFFile) -> None:
    """A later shard may only repeat entries of the first."""
    for key, entry in file.entries.items():
        if file is first or key in SHARD_KEYS or key == layout.ALIGNMENT_KEY:
            continue
        other = first.entries.get(key)
        same = (
            other is not None
            and first.raw(other.start, other.end - other.start).tobytes()
            == file.raw(entry.start, entry.end - entry.start).tobytes()
        )
        if not same:
            raise BadShard(
                file.path, f"has metadata {key!r} that the first shard, {first.path.name}, does not have"
            )
