"""A file carries its final name only when it is complete and on disk.

The bytes go to a temporary sibling, ``.NAME.partial``, which is synced and renamed at the end. Its name is
fixed so that a killed process leaves at most one of them behind and the next run overwrites it; a lock on
it keeps two processes from writing the same file at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from powerinfer_formats.errors import BeingWritten, CannotWrite, NotARegularFile

# The operating system's errors for a file that cannot be filled; other errors are not about our file.
_WRITE_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})


def partial_path(path: str | os.PathLike[str]) -> Path:
    """The temporary sibling under which ``path`` is written."""
    final = Path(path)
    return final.with_name(f".{final.name}.partial")


@contextmanager
def write_atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes ``path`` when the block ends without an exception.

    On any exception (``KeyboardInterrupt`` included) the temporary file is removed, and an earlier file at
    ``path`` is untouched. Raises ``NotARegularFile`` if ``path`` is a directory or device, ``BeingWritten``
    if another process holds it, ``CannotWrite`` if the system refuses.
    """
    final = Path(path)
    if final.exists() and not final.is_file():
        raise NotARegularFile(final, "cannot be written: it is a directory or a device, not a file")
    partial = partial_path(final)
    stream = _open_locked(partial, final)
    try:
        yield stream
        _finish(stream, partial, final)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _WRITE_FAULTS:
            reason = f"cannot be written: {error.strerror}; nothing was left behind"
            raise CannotWrite(final, reason) from error
        raise
    finally:
        _close_quietly(stream)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Raise now the errors that :func:`write_atomic` would raise after the work; an existing file stays."""
    with suppress(_Unwritten), write_atomic(path):
        raise _Unwritten


class _Unwritten(Exception):
    """Ends a block of :func:`write_atomic` without the file."""


def require_space(path: str | os.PathLike[str], nbytes: int) -> None:
    """Raise ``CannotWrite`` now, rather than hours later, if ``nbytes`` do not fit on the file's disk."""
    final = Path(path)
    disk = os.statvfs(final.parent)
    free = disk.f_bavail * disk.f_frsize
    if nbytes > free:
        raise CannotWrite(
            final,
            f"cannot be written: it needs {nbytes:,} bytes and the disk has {free:,} left; free some space",
        )


def _open_locked(partial: Path, final: Path) -> BinaryIO:
    while True:
        try:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise CannotWrite(final, f"cannot be written: {error.strerror} ({partial.name})") from error
        stream = os.fdopen(descriptor, "w+b", buffering=1 << 20)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            reason = f"is being written by another process ({partial.name} is locked)"
            raise BeingWritten(final, reason) from None
        except OSError:
            pass  # a file system without locks: the rename at the end is still atomic
        # Between opening and locking, another writer may have renamed this very file into place.
        if _is_still(partial, descriptor):
            os.ftruncate(descriptor, 0)
            return stream
        stream.close()


def _is_still(partial: Path, descriptor: int) -> bool:
    try:
        named = partial.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))


def _finish(stream: BinaryIO, partial: Path, final: Path) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    try:
        partial.replace(final)
    except OSError as error:
        raise CannotWrite(final, f"cannot be put in place: {error.strerror}") from error
    _sync_directory(final.parent)


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable; a file system that cannot sync a directory has nothing to sync."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _close_quietly(stream: BinaryIO) -> None:
    """Close without a second error: after a full disk, closing tries to flush what never fitted."""
    with suppress(OSError):
        stream.close()
