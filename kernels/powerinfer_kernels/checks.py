"""Checks of arrays before their addresses go to C: type, shape, layout, and permitted overlaps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ._kernels import KernelError

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def check_array(
    name: str, array: Any, dtype: npt.DTypeLike, shape: tuple[int, ...], written: bool = False
) -> None:
    """Raises KernelError unless `array` has exactly this type and shape, is C-contiguous and aligned, and is
    writable if it is `written`."""
    expected = np.dtype(dtype)
    if not isinstance(array, np.ndarray) or array.dtype != expected or array.shape != shape:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise KernelError(f"{name} must be a {expected} array of shape {shape}, got {got}")
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise KernelError(f"{name} must be C-contiguous and aligned")
    if written and not array.flags.writeable:
        raise KernelError(f"{name} is read-only, but the operation writes to it")


def check_apart(name: str, array: Array, others: Mapping[str, Array | None]) -> None:
    """Raises KernelError where the memory of `array`, which is written, overlaps one of `others`."""
    for other_name, other in others.items():
        if other is not None and np.may_share_memory(array, other):
            raise KernelError(f"{name} must not share memory with {other_name}")


def check_apart_or_same(name: str, array: Array, others: Mapping[str, Array | None]) -> None:
    """As check_apart, but `array` may be exactly one of `others`: the operation works in place."""
    apart = {
        other_name: other
        for other_name, other in others.items()
        if other is not None and (other.ctypes.data != array.ctypes.data or other.nbytes != array.nbytes)
    }
    check_apart(name, array, apart)


def as_bytes(name: str, source: Any) -> Bytes:
    """A flat uint8 view of any C-contiguous buffer (memoryview, mmap, bytes, array), without copying. Raises
    KernelError for any other object."""
    try:
        view = memoryview(source)
        return np.frombuffer(view.cast("B") if view.nbytes else b"", dtype=np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise KernelError(f"{name} must be a C-contiguous buffer of bytes: {error}") from None


def check_positive(**values: Any) -> None:
    """Raises KernelError naming the first value that is not a positive integer."""
    for name, value in values.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value <= 0:
            raise KernelError(f"{name} must be a positive integer, got {value!r}")
