"""One file of the hub, fetched into the cache's ``blobs``. An interrupted transfer is resumed, and the file's
hash is checked before the file gets its name.

The ``huggingface_hub`` package fetches files, too, but starts over after an interruption and does not compare
hashes. Only its function for the transfer itself (retries, redirects, ranges) is used.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from powerinfer_tools.errors import HubError
from powerinfer_tools.progress import Progress

_MEGABYTE = 1_000_000
_CHUNK = 1 << 22
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class Blob:
    """A file's bytes. ``digest`` is the blob's name: SHA-256 in 64 hex digits, or git's SHA-1 in 40."""

    name: str
    url: str
    size: int
    digest: str


def fetch(blob: Blob, folder: Path, headers: dict[str, Any], progress: Progress) -> int:
    """Fetch the file to ``folder``/``digest``; returns how many bytes were fetched.

    Raises HubError; errors of the transfer are the hub package's.
    """
    place = folder / blob.digest
    if place.exists():
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{blob.digest}.incomplete")
    with _locked(partial, blob) as stream:
        if place.exists():  # another process was faster
            return 0
        had = min(os.fstat(stream.fileno()).st_size, blob.size)
        _require_space(folder, blob.size - had, blob)
        _transfer(blob, stream, had, headers, progress)
        _verify(blob, stream, partial)
        os.fsync(stream.fileno())
        partial.rename(place)
    return blob.size - had


@contextmanager
def _locked(partial: Path, blob: Blob) -> Iterator[BinaryIO]:
    """The partial file, open for this process alone."""
    with partial.open("a+b") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(f"{blob.name} is being fetched by another process at this moment") from None
        with partial.open("r+b") as stream:
            yield stream


def _require_space(folder: Path, nbytes: int, blob: Blob) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise HubError(
            f"{blob.name} needs {_size(nbytes)} more in {folder}, where {_size(free)} are free; make room "
            "(powerinfer rm), or set HF_HOME to a folder on another disk"
        )


def _transfer(blob: Blob, stream: BinaryIO, had: int, headers: dict[str, Any], progress: Progress) -> None:
    from huggingface_hub.file_download import http_get

    stream.truncate(had)
    stream.seek(had)
    progress.start(f"fetching {blob.name}", -(-blob.size // _MEGABYTE), "MB")
    try:
        counted = _Counted(stream, had, progress)
        http_get(
            blob.url,
            counted,  # type: ignore[arg-type]  # it has the methods that are needed of a file
            resume_size=had,
            headers=dict(headers),
            expected_size=blob.size,
        )
    except OSError as error:
        if error.errno in _FULL:
            raise HubError(
                f"the disk is full: {blob.name}, {_size(stream.tell())} of {_size(blob.size)}"
            ) from None
        raise
    except KeyboardInterrupt:
        progress.note(
            f"{_size(stream.tell())} of {_size(blob.size)} are kept; the same command continues from there"
        )
        raise
    finally:
        progress.finish()


class _Counted:
    """A file that reports its progress, in megabytes."""

    def __init__(self, stream: BinaryIO, had: int, progress: Progress) -> None:
        self._stream, self._progress, self._told = stream, progress, 0
        self._tell(had)

    def write(self, data: bytes) -> int:
        written = self._stream.write(data)
        self._tell(self._stream.tell())
        return written

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, place: int) -> int:
        return self._stream.seek(place)

    def truncate(self) -> int:
        return self._stream.truncate()

    def _tell(self, done: int) -> None:
        megabytes = done // _MEGABYTE
        self._progress.advance(megabytes - self._told)
        self._told = megabytes


def _verify(blob: Blob, stream: BinaryIO, partial: Path) -> None:
    """Raise HubError, and remove the file, unless its bytes have the digest."""
    stream.flush()
    stream.seek(0)
    if len(blob.digest) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % blob.size, usedforsecurity=False)
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest() != blob.digest:
        partial.unlink(missing_ok=True)
        raise HubError(
            f"{blob.name} was damaged during the download: its hash is {digest.hexdigest()[:16]}…, the hub "
            f"says {blob.digest[:16]}…; the download was removed; try again"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
