"""A file mapped for reading. The size is checked when it is opened: one that another program shortens later,
while it is mapped, is beyond what a reader can guard against."""

from __future__ import annotations

import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path

from powerinfer_formats.errors import CannotRead, NotARegularFile, TruncatedFile


def map_file(path: Path, kind: str) -> mmap.mmap:
    """Map ``path``, which must be a regular, non-empty file; ``kind`` ("a GGUF file") is for the errors.

    Raises ``CannotRead``, ``NotARegularFile`` or ``TruncatedFile``.
    """
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
        return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CannotRead(path, f"cannot be mapped: {error.strerror}") from None
    finally:
        os.close(descriptor)


def unmap(mapping: mmap.mmap) -> None:
    """Close ``mapping``; while views of it are in use, it stays until the last of them goes."""
    with suppress(BufferError):
        mapping.close()
