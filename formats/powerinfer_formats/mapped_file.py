"""A file mapped for reading. The size is checked when it is opened. One that another program shortens later
ends the process at the next read behind its end; what a program does about that it says in
``before_mapping``."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from powerinfer_formats.errors import CannotRead, FileChanged, NotARegularFile, TruncatedFile

#: Called before each file is mapped.
before_mapping: list[Callable[[], None]] = []


class MappedFile(mmap.mmap):
    """A mapped file that knows whether it was changed since."""

    path: Path
    stamp: tuple[int, int, int, int]

    def require_unchanged(self) -> None:
        """Raise ``FileChanged`` unless the file at ``path`` is as it was when it was mapped."""
        try:
            now = _stamp(Path(self.path).stat())
        except OSError:
            now = None
        # A file of another number took its place: what is mapped is still the old one, whole.
        if now is not None and now[:2] == self.stamp[:2] and now != self.stamp:
            raise FileChanged(self.path, "was changed while it was read; nothing was made of it")


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
        return mapping
    except OSError as error:
        raise CannotRead(path, f"cannot be mapped: {error.strerror}") from None
    finally:
        os.close(descriptor)


def unmap(mapping: mmap.mmap) -> None:
    """Close ``mapping``; while views of it are in use, it stays until the last of them goes."""
    with suppress(BufferError):
        mapping.close()
