"""The remains of a lost device. This module imports nothing.

After the loss the driver refuses every call, also calls from destructors (graphs, events, memory), and an
exception in a destructor aborts the process. So the owners of such objects are kept until the process ends,
and a process that lost a device ends without destructors.
"""

#: Objects that must not be destroyed.
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
