"""Faults of a device of the hot side. This module imports no torch."""

from powerinfer_tools.errors import HardwareError


class OutOfDeviceMemory(HardwareError):
    """The device has no room for an allocation."""


class DeviceLost(HardwareError):
    """The device stopped working."""


class KernelRefused(HardwareError):
    """A fused kernel could not be compiled, loaded or launched: the plain-torch form has to be used."""


class MemoryEnded(DeviceLost):
    """The device ran out of memory in the middle of a run; the data in its memory is intact."""


def first_line(error: BaseException) -> str:
    """The first line of a message, which is where torch says what happened."""
    return (str(error).splitlines() or [type(error).__name__])[0]
