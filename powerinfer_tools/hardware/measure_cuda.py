"""Measure a CUDA device with torch: memory bandwidth, launch and synchronisation cost, and the link to it."""

import time
from collections.abc import Callable

from powerinfer_formats.hardware import GpuInfo, LinkInfo
from powerinfer_tools.hardware.detect import CudaDevice

_BIG = 256 << 20
_SMALL = 16 << 10
_LAUNCHES = 200
_REPEATS = 20


def measure_cuda(device: CudaDevice) -> tuple[GpuInfo, LinkInfo]:
    """Figures of the first CUDA device; needs torch with a usable device and 768 MiB of free VRAM at most."""
    import torch

    nbytes = min(_BIG, device.free_bytes // 4)
    source = torch.ones(nbytes // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    small = torch.empty(_SMALL, dtype=torch.uint8, pin_memory=True)
    small_there = torch.empty(_SMALL, dtype=torch.uint8, device="cuda")

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    def link() -> None:
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    def short_link() -> None:
        small_there.copy_(small, non_blocking=True)
        torch.cuda.synchronize()

    def launches() -> None:
        for _ in range(_LAUNCHES):
            small_there.add_(1)
        torch.cuda.synchronize()

    # A device-to-device copy reads and writes every byte.
    bandwidth = 2 * nbytes / _median(copy)
    launch = _median(launches) / _LAUNCHES
    sync = _median(torch.cuda.synchronize)
    link_bandwidth = nbytes / _median(link)
    latency = max(0.0, _median(short_link) - sync - _SMALL / link_bandwidth)
    gpu = GpuInfo(device.name, device.total_bytes, bandwidth, launch, sync)
    return gpu, LinkInfo(link_bandwidth, latency)


def _median(work: Callable[[], object]) -> float:
    """Median wall time of ``work``, which must wait for what it starts; the first run does not count."""
    work()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
