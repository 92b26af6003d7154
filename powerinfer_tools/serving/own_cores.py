"""Engine threads that stay on cores of their own, where every core has one.

The event loop wakes on a core that an engine thread is using. The kernel may then move that thread to the
core of another engine thread for some milliseconds, and all of them wait at the next barrier: with two
threads on two cores, a token took 4 % longer. If there are spare cores, the loop runs on these, and the
kernel is left alone.
"""

import contextlib
import os
from pathlib import Path

#: The name that the kernels give to the threads of a pool.
_NAME = "pi-pool"


def spread(threads: int) -> bool:
    """Give each of ``threads`` engine threads one core: the calling thread, which calls the engine, and the
    threads of its pool, which must have run before. Returns whether that was done. It is not done if there
    are more cores than threads or fewer, if the process has other pools, or if the system does not tell.
    """
    if not hasattr(os, "sched_setaffinity"):
        return False
    own, *others = sorted(os.sched_getaffinity(0))
    pool = _pool_threads()
    if not others or len(others) != threads - 1 or len(pool) != len(others):
        return False
    for thread, core in zip((0, *pool), (own, *others), strict=True):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile, or must not be moved
            os.sched_setaffinity(thread, {core})
    return True


def _pool_threads() -> list[int]:
    """Threads of this process that belong to a pool."""
    result = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            if (task / "comm").read_text().strip() == _NAME:
                result.append(int(task.name))
    return sorted(result)
