"""The thread pool, and the choice of instruction set."""

import os
from types import TracebackType

from . import _kernels
from ._kernels import KernelError
from .topology import physical_cores

ISA_VARIABLE = "POWERINFER_ISA"


def available_isas() -> tuple[str, ...]:
    """Instruction sets that were compiled and that this CPU and operating system support, best first."""
    return _kernels.available_isas()


def choose_isa(isa: str | None = None) -> str:
    """`isa`, else the environment variable POWERINFER_ISA, else the best available instruction set. Raises
    KernelError, with the available names, when the requested instruction set is not available."""
    available = available_isas()
    name = isa if isa is not None else os.environ.get(ISA_VARIABLE) or available[0]
    if name not in available:
        source = "" if isa is not None else f" (from {ISA_VARIABLE})"
        names = ", ".join(available)
        raise KernelError(f"instruction set {name!r}{source} is not available here; available: {names}")
    return name


class Pool:
    """Threads that execute programs, and the instruction set that they use.

    `threads` counts the calling thread and defaults to the physical cores. Threads start with the first run
    and sleep between runs. One run at a time: other callers wait. After a fork the child's pool starts
    threads of its own. Raises KernelError for an impossible number of threads or an instruction set that is
    not available.
    """

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        self.isa = choose_isa(isa)
        self.threads = physical_cores() if threads is None else threads
        self.handle = _kernels.Pool(self.threads, self.isa)

    def close(self) -> None:
        """Ends the threads; later runs raise KernelError. Raises KernelError while a run is in progress."""
        self.handle.close()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_bandwidth(
    pool: Pool, nbytes: int = 256 << 20, seconds: float = 0.2, huge_pages: bool = True
) -> float:
    """Bytes per second at which the pool's threads read `nbytes` of memory together: the best pass within
    `seconds`. The memory is on huge pages, like weights, or on normal pages. Choose `nbytes` well above the
    last-level cache. Raises KernelError for sizes that are not positive."""
    if nbytes <= 0 or not seconds >= 0:
        raise KernelError(f"read_bandwidth needs a positive size and time, got {nbytes} bytes, {seconds} s")
    return _kernels.read_bandwidth(pool.handle, nbytes, seconds, huge_pages)
