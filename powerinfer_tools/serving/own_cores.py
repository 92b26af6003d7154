"""Engine threads that stay on cores of their own, where every core has one.

The event loop wakes on a core that an engine thread has. The kernel may then move that thread to another
one's core for some milliseconds, and all of them wait at the next barrier: with two threads on two cores, a
token took 4 % longer. Where cores are left, the loop has those, and the kernel is let alone.
"""

import contextlib
import os
from pathlib import Path

#: What the kernels call the threads of a pool.
_NAME = "pi-pool"


def spread(threads: int) -> bool:
    """Give each of ``threads`` engine threads one core: this one, which calls the engine, and those of its
    pool, which have run. Returns whether that was done: not where cores are left over, or too few, where the
    process has other pools, or where the system does not say.
    """
    if not hasattr(os, "sched_setaffinity"):
        return False
    own, *others = sorted(os.sched_getaffinity(0))
    pool = _pool_threads()
    if not others or len(others) != threads - 1 or len(pool) != len(others):
        return False
    for thread, core in zip((0, *pool), (own, *others), strict=True):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or must not be moved
            os.sched_setaffinity(thread, {core})
    return True


def _pool_threads() -> list[int]:
    """Threads of this process that belong to a pool."""
    result = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (task / "comm").read_text().strip() == _NAME:
                result.append(int(task.name))
    return sorted(result)
