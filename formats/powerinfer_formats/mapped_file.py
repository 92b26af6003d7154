"""A file mapped for reading. The size is checked when it is opened. If another program shortens the file
later, the next read beyond its end ends the process; a program can prepare for that in ``before_mapping``."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from powerinfer_formats.errors import CannotRead, FileChanged, NotARegularFile, TruncatedFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Called before each file is mapped.
before_mapping: list[Callable[[], None]] = []


class MappedFile(mmap.mmap):
    """A mapped file that knows whether it has been changed since it was mapped."""

    path: Path
    stamp: tuple[int, int, int, int]
    address: int

    def offset_of(self, data: NDArray[np.uint8]) -> int | None:
        """Where in the file the bytes of a contiguous view are; None for an array that is no view of it."""
        start = int(data.__array_interface__["data"][0]) - self.address
        inside = 0 <= start <= start + data.nbytes <= len(self)
        return start if inside and data.flags.c_contiguous else None

    def open_for_reading(self) -> tuple[int, bool]:
        """A descriptor of the file as it was mapped, to be closed by the caller, and whether it reads past
        the page cache. Raises ``CannotRead``, and ``FileChanged`` where another file took its place."""
        flags, direct = os.O_RDONLY | os.O_CLOEXEC, getattr(os, "O_DIRECT", 0)
        try:
            try:
                descriptor = os.open(self.path, flags | direct)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                direct = 0  # a file system without direct reads
                descriptor = os.open(self.path, flags)
        except OSError as error:
            raise CannotRead(self.path, f"cannot be opened: {error.strerror}") from None
        if _stamp(os.fstat(descriptor)) != self.stamp:
            os.close(descriptor)
            raise FileChanged(self.path, "was changed or replaced since it was opened")
        return descriptor, bool(direct)

    def drop_pages(self, descriptor: int) -> None:
        """Give back the memory of pages that were read through the mapping; ``descriptor`` is one of
        :meth:`open_for_reading`. They are read again when they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def require_unchanged(self) -> None:
        """Raise ``FileChanged`` unless the file at ``path`` is as it was when it was mapped."""
        try:
            now = _stamp(Path(self.path).stat())
        except OSError:
            now = None
        # A file with another number took its place: the mapping still has the old file, complete.
        if now is not None and now[:2] == self.stamp[:2] and now != self.stamp:
            raise FileChanged(self.path, "was changed while it was read; no output was written")


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def map_file(path: Path, kind: str) -> MappedFile:
    """Map ``path``, which must be a regular, non-empty file; ``kind`` ("a GGUF file") is for the errors.

    Raises ``CannotRead``, ``NotARegularFile`` or ``TruncatedFile``.
    """
    for prepare in before_mapping:
        prepare()
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CannotRead(path, f"cannot be opened: {reason}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotARegularFile(path, f"is not a regular file; {kind} is needed here")
        if status.st_size == 0:
            raise TruncatedFile(path, "is empty")
        mapping = MappedFile(descriptor, status.st_size, access=mmap.ACCESS_READ)
        mapping.path, mapping.stamp = path, _stamp(status)
        mapping.address = _address(mapping)
        return mapping
    except OSError as error:
        raise CannotRead(path, f"cannot be mapped: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _address(mapping: mmap.mmap) -> int:
    """Where the first byte is in memory."""
    import numpy as np

    return int(np.frombuffer(mapping, np.uint8).__array_interface__["data"][0])


def unmap(mapping: mmap.mmap) -> None:
    """Close ``mapping``; while views of it are in use, it stays until the last of them goes."""
    with suppress(BufferError):
        mapping.close()
