"""Blocks of caches in files: the prefix cache that outlives the server.

A block is the cached state of :data:`BLOCK` successive tokens at the start of a text. Its key is a hash of
the identity (everything the bits depend on), of the blocks before it and of its own tokens, so equal keys
mean equal bits. Before use, a file is checked: owner and kind, length, key, tokens, and a hash of all this.
"""

import hashlib
import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from powerinfer_formats.atomic import write_atomic
from powerinfer_tools.errors import PowerInferError

#: Tokens of a block: a multiple of 16, by which keys are laid out.
BLOCK = 256
_MAGIC = b"PIPREFIX"
_VERSION = 1
_HEAD = struct.Struct(
    "<8sII32sQ32s"
)  # magic, version, tokens, key, bytes of the block, hash of ids and block
_SUFFIX = ".prefix"


class PrefixStoreError(PowerInferError):
    """The folder cannot be used."""


def keys(identity: bytes, tokens: Sequence[int]) -> Iterator[bytes]:
    """The keys of the whole blocks of a text."""
    key = hashlib.sha256(identity).digest()
    for first in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hashlib.sha256(key + _ids(tokens[first : first + BLOCK])).digest()
        yield key


class PrefixStore:
    """The blocks in ``folder``, at most ``limit`` bytes: the least recently used ones are removed. Not
    thread-safe.

    Raises PrefixStoreError if the folder cannot be created, or if other users may write into it: its contents
    become part of answers.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._sizes: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._open()

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    def get(self, key: bytes, tokens: Sequence[int], nbytes: int) -> bytes | None:
        """The block of ``nbytes`` with ``key`` and ``tokens``. None if it is missing or its file is damaged;
        a damaged file is removed."""
        path = self._path(key)
        try:
            data = _read(path, _HEAD.size + 4 * BLOCK + nbytes)
        except OSError:
            data = None
        block = None if data is None else _judged(data, key, tokens, nbytes)
        if block is None:
            self._remove(key)
            return None
        self._sizes[key] = len(data or b"")
        self._sizes.move_to_end(key)
        with suppress(OSError):
            os.utime(path)
        return block

    def put(self, key: bytes, tokens: Sequence[int], block: bytes) -> None:
        """Keep a block. Raises FormatError and OSError where it cannot be written."""
        ids = _ids(tokens)
        size = _HEAD.size + len(ids) + len(block)
        if size > self.limit:
            return
        while self._sizes and self.nbytes + size > self.limit:
            self._remove(next(iter(self._sizes)))
        digest = _digest(ids, block)
        with write_atomic(self._path(key)) as file:
            file.write(_HEAD.pack(_MAGIC, _VERSION, len(tokens), key, len(block), digest))
            file.write(ids)
            file.write(block)
        self._sizes[key] = size

    def _open(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.stat()
        except OSError as error:
            raise PrefixStoreError(f"--cache-dir {self.folder}: {error.strerror}") from None
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PrefixStoreError(
                f"--cache-dir {self.folder}: others may write there, and what it holds becomes part of "
                "answers; take a folder of your own (chmod go-w)"
            )
        ages = []
        for path in self.folder.iterdir():
            if path.name.endswith(".partial"):
                path.unlink(missing_ok=True)
            elif path.suffix == _SUFFIX and len(path.stem) == 64 and not path.is_symlink():
                with suppress(OSError, ValueError):
                    entry = path.stat()
                    ages.append((entry.st_mtime_ns, bytes.fromhex(path.stem), entry.st_size))
        for _, key, size in sorted(ages):
            self._sizes[key] = size
        while self.nbytes > self.limit:
            self._remove(next(iter(self._sizes)))

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}{_SUFFIX}"

    def _remove(self, key: bytes) -> None:
        self._sizes.pop(key, None)
        with suppress(OSError):
            self._path(key).unlink()


def _ids(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, "<i4").tobytes()


def _digest(ids: bytes, block: bytes) -> bytes:
    digest = hashlib.sha256(ids)
    digest.update(block)
    return digest.digest()


def _read(path: Path, expected: int) -> bytes | None:
    """The file, if it is a regular file of our own with the expected length; nothing else is read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_size != expected:
            return None
        data = file.read(expected)
    return data if len(data) == expected else None


def _judged(data: bytes, key: bytes, tokens: Sequence[int], nbytes: int) -> bytes | None:
    """The block in ``data``, if every field has the value it must have."""
    *said, digest = _HEAD.unpack_from(data)
    ids = _ids(tokens)
    block = data[_HEAD.size + len(ids) :]
    if said != [_MAGIC, _VERSION, len(tokens), key, nbytes] or len(block) != nbytes:
        return None
    if data[_HEAD.size : _HEAD.size + len(ids)] != ids or _digest(ids, block) != digest:
        return None
    return block
