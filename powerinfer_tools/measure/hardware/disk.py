"""The disk that holds a model: streams, and single reads at random places, past the page cache."""

import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from powerinfer_formats.hardware import DiskInfo
from powerinfer_formats.mapped_file import map_file, unmap
from powerinfer_tools.errors import HardwareError

#: Sizes of single reads: a page, rows of a neuron, and what the engine reads experts in.
SIZES = (4 << 10, 8 << 10, 64 << 10, 256 << 10, 1 << 20)
DEEP = 16
_STREAMS, _STREAM_BYTES = 4, 4 << 20
#: A smaller file would be read from the disk's own cache.
_LEAST_BYTES = 256 << 20


def measure_disk(path: Path, seconds: float = 4.0, *, least_bytes: int = _LEAST_BYTES) -> DiskInfo:
    """Read from the file ``path`` for about ``seconds``, and write nothing.

    Raises HardwareError for a file smaller than ``least_bytes``, or where a read fails; FormatError for one
    that cannot be opened.
    """
    mapping = map_file(path, "a model")
    try:
        size = len(mapping)
        if size < least_bytes:
            raise HardwareError(
                f"{path}: {size >> 20} MiB are too little to measure a disk with; name a model of "
                f"{least_bytes >> 20} MiB or more with -m"
            )
        descriptor, direct = mapping.open_for_reading()
    finally:
        unmap(mapping)
    try:
        reader = _Reader(path, descriptor, size, direct=direct)
        share = seconds / (2 * len(SIZES) + 1)
        stream = reader.rate(_STREAM_BYTES, _STREAMS, share, stream=True) * _STREAM_BYTES
        single = tuple(reader.rate(bytes_, 1, share) for bytes_ in SIZES)
        deep = tuple(reader.rate(bytes_, DEEP, share) for bytes_ in SIZES)
    finally:
        os.close(descriptor)
    return DiskInfo(str(path.resolve().parent), direct, stream, SIZES, single, deep)


class _Reader:
    """Reads of one file by several threads."""

    def __init__(self, path: Path, descriptor: int, size: int, *, direct: bool) -> None:
        self._path, self._descriptor, self._size, self._direct = path, descriptor, size, direct

    def rate(self, nbytes: int, threads: int, seconds: float, *, stream: bool = False) -> float:
        """Reads a second: one after the other, each thread in a part of its own, or at random places."""
        done, faults = [0] * threads, list[OSError]()
        places = self._size // nbytes
        deadline = time.perf_counter() + seconds

        def work(number: int) -> None:
            chosen = np.random.default_rng(number)  # the same places each time
            first, count = places * number // threads, max(1, places // threads)
            buffer = mmap.mmap(-1, nbytes)
            try:
                while not faults and time.perf_counter() < deadline:
                    place = first + done[number] % count if stream else int(chosen.integers(places))
                    self._read(buffer, place * nbytes)
                    done[number] += 1
            except OSError as error:
                faults.append(error)

        started = time.perf_counter()
        _together(work, threads)
        if faults:
            raise HardwareError(f"{self._path}: cannot be read: {faults[0].strerror}")
        return sum(done) / (time.perf_counter() - started)

    def _read(self, buffer: mmap.mmap, offset: int) -> None:
        os.preadv(self._descriptor, [buffer], offset)
        if not self._direct:
            os.posix_fadvise(self._descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)


def _together(work: Callable[[int], None], threads: int) -> None:
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
