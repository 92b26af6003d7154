"""What is left of a device that was lost. This module imports nothing.

The driver refuses every call after it, also those of destructors (graphs, events, memory), and an exception
in a destructor aborts the process. So what holds such objects is kept until the process ends, and a process
that lost a device ends without destructors.
"""

#: What must not be destroyed.
_kept: list[object] = []
_lost = False


def keep(held: object) -> None:
    """Never destroy ``held``, and remember that a device was lost."""
    global _lost
    _lost = True
    _kept.append(held)


def was_lost() -> bool:
    """Whether this process lost a device."""
    return _lost
