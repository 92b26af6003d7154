"""Pinned memory of the host as a tensor of the GPU: its kernels then read and write that memory themselves,
without a copy of their own in the queue."""

from typing import Any

import torch

_TYPES = {torch.float32: "<f4", torch.int64: "<i8", torch.int32: "<i4", torch.uint8: "|u1"}


class _Memory:
    """The interface that torch expects of an array in memory that the GPU can access; keeps ``host``
    alive."""

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(host.shape),
            "typestr": _TYPES[host.dtype],
            "data": (host.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def mapped(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``host``, contiguous and pinned, as a tensor of ``device``. Pinned memory has the same address on both
    sides. Raises RuntimeError, TypeError or ValueError where torch or the driver sees it otherwise."""
    assert host.is_contiguous()
    return torch.as_tensor(_Memory(host), device=device)


def through(source: torch.Tensor, target: torch.Tensor) -> None:
    """target = source, by a kernel: torch's own copy would be a graph node for memory of one side only, but
    one of the two tensors is in the host's memory. A product with 1 changes no bit."""
    torch.mul(source, 1, out=target)


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """target = source, without waiting; one of the two is in the host's memory."""
    target.copy_(source, non_blocking=True)
