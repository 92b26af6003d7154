"""A folder for temporary files: removed at the end, or by the next process if this one is killed.

It is in the system's folder for temporary files, under a name that says to whom it belongs. It is locked
while it is in use: a folder of that name without a lock no longer belongs to anybody.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Yield an empty folder ``powerinfer-NAME-…``; those of the same name that killed processes have left are
    removed first."""
    prefix = f"powerinfer-{name}-"
    _remove_left(prefix)
    folder, lock = _made(prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _made(prefix: str) -> tuple[Path, int]:
    """A new folder, and the descriptor that locks it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        lock = _locked(folder)
        if lock is not None:
            return folder, lock
        # Another process has taken it for one that was left, before it was locked.


def _remove_left(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the lock of a folder of our own; None where that cannot be had."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        opened = os.fstat(descriptor)
        mine = opened.st_uid == os.geteuid() and _take(descriptor)
        if mine and os.path.samestat(folder.stat(follow_symlinks=False), opened):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
