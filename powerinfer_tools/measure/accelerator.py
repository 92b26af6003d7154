"""Measure a device of the hot side: its memory, the way to it, what queueing and waiting cost, and what its
kernels reach on rows of every type.

The work is queued as the engine queues it, on a CUDA device as on torch's CPU device: recorded once, and
replayed. Launched one by one from Python, kernels wait for Python. Every figure is the median of its passes;
a :class:`~powerinfer_formats.hardware.Spread` goes with each.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from powerinfer_formats.hardware import GpuInfo, KernelRate, LinkInfo, Spread
from powerinfer_kernels import RowType, block_shape, packed_row_bytes, repack
from powerinfer_kernels.triton_layout import PLANAR_TYPES, to_planar
from powerinfer_tools.engine.hot.devices import Device, Steps
from powerinfer_tools.engine.hot.hot_ffn import FileRows
from powerinfer_tools.measure.synthetic.random_blocks import random_rows
from powerinfer_tools.model.device_memory import CHUNK_ROWS

Work = Callable[[], object]
_SMALL = 16 << 10
_LAUNCHES = 200
_PASSES = 15
#: Passes that bring up clocks, memory and compiled kernels, and do not count.
_WARM = 2
#: Distinct rows of a matrix; more would only take longer to draw.
_PATTERN_ROWS = 61
_SEED = 1


@dataclass(frozen=True)
class Sizes:
    """How much is measured with: bytes that are read, copied, and of each matrix, more than any GPU's cache
    holds; columns of its rows; and the seconds after which no further row type is begun."""

    nbytes: int = 256 << 20
    width: int = 4096
    seconds: float = 45.0


@dataclass(frozen=True)
class DeviceFigures:
    """What was measured, and what could not be."""

    gpu: GpuInfo
    link: LinkInfo
    kernels: tuple[KernelRate, ...]
    spreads: tuple[Spread, ...]
    notices: tuple[str, ...]


def measure_device(
    device: Device, name: str, total_bytes: int, *, fused: bool, sizes: Sizes | None = None
) -> DeviceFigures:
    """Figures of ``device``, which has ``total_bytes`` of memory and is called ``name``; with the Triton
    kernels where ``fused`` and a row type has them. Raises OutOfDeviceMemory and DeviceLost."""
    bench = _Bench(device, sizes or Sizes())
    gpu, link = bench.memory_and_link(name, total_bytes)
    kernels, notices = list[KernelRate](), list[str]()
    for row_type in RowType:
        if bench.seconds_left <= 0:
            notices.append(f"kernels of {row_type.name} rows were not measured: the time was up")
            continue
        kernels.append(bench.kernel(row_type, len(kernels), fused=fused and row_type in PLANAR_TYPES))
    return DeviceFigures(gpu, link, tuple(kernels), tuple(bench.spreads), tuple(notices))


class _Bench:
    """One measurement."""

    def __init__(self, device: Device, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self.spreads: list[Spread] = []
        self._deadline = time.perf_counter() + sizes.seconds

    @property
    def seconds_left(self) -> float:
        """Until no further row type is begun."""
        return self._deadline - time.perf_counter()

    def memory_and_link(self, name: str, total_bytes: int) -> tuple[GpuInfo, LinkInfo]:
        """A read, copies, empty pieces of work, and small ones."""
        device, nbytes = self.device, self.sizes.nbytes
        memory = device.allocate(nbytes).zero_().view(torch.float32)
        host, small = device.staging(nbytes // 4), device.staging(_SMALL // 4)
        small_there, total = memory[: _SMALL // 4], torch.empty((), device=device.torch_device)

        def launches() -> None:
            for _ in range(_LAUNCHES):
                small_there.add_(1.0)

        def short_copy() -> None:
            small_there.copy_(small, non_blocking=True)

        # What decoding does to weights is read them.
        reads = self._device_seconds(lambda: torch.sum(memory, dim=0, out=total))
        bandwidth = self._figure("gpu.bandwidth_bytes_per_s", [nbytes / s for s in reads])
        waits = self._seconds(())
        sync = self._figure("gpu.sync_seconds", waits)
        queued = self._seconds(device.recorded((("launches", launches),)))
        launch = self._figure("gpu.launch_seconds", [max(0.0, s - sync) / _LAUNCHES for s in queued])
        moved = self._device_seconds(lambda: memory.copy_(host, non_blocking=True))
        link = self._figure("link.bandwidth_bytes_per_s", [nbytes / s for s in moved])
        short = self._seconds((("copy", short_copy),))
        latency = self._figure("link.latency_seconds", [max(0.0, s - sync - _SMALL / link) for s in short])
        return GpuInfo(name, total_bytes, bandwidth, launch, sync), LinkInfo(link, latency)

    def kernel(self, row_type: RowType, index: int, *, fused: bool) -> KernelRate:
        """Products and sums over one matrix of rows of this type."""
        width = self.sizes.width - self.sizes.width % block_shape(row_type)[0]
        neurons = max(
            CHUNK_ROWS, self.sizes.nbytes // packed_row_bytes(row_type, width) // CHUNK_ROWS * CHUNK_ROWS
        )
        pattern = random_rows(np.random.default_rng(_SEED), row_type.name, _PATTERN_ROWS, width)
        pattern = pattern.view(np.uint8).reshape(_PATTERN_ROWS, -1)
        raw = np.resize(pattern, (neurons, pattern.shape[1]))
        products, sums = (self._fused if fused else self._plain)(raw, row_type, width)
        path, nbytes = f"kernel[{index}]", neurons * packed_row_bytes(row_type, width)
        rates = [
            self._figure(f"{path}.{name}_bytes_per_s", [nbytes / s for s in self._device_seconds(work)])
            for name, work in (("products", products), ("sums", sums))
        ]
        return KernelRate(row_type.name, fused, rates[0], rates[1])

    def _fused(self, raw: np.ndarray, row_type: RowType, width: int) -> tuple[Work, Work]:
        """By Triton kernels. SiLU leaves no hidden value at zero, so that all down rows are read."""
        from powerinfer_kernels import triton_launch as launch

        where, neurons = self.device.torch_device, len(raw)
        data = torch.from_numpy(to_planar(repack(raw, row_type, neurons, width), row_type, width)).to(where)
        rows = launch.PlanarRows(data, row_type, neurons, width)
        x = self._input(width)
        if not row_type.is_float:
            values, x = x, torch.empty(1, launch.code_words(width), dtype=torch.int32, device=where)
            launch.round_values(values, None, x)
        hidden, out = torch.empty(1, neurons, device=where), torch.empty(1, width, device=where)
        partial = torch.empty(launch.splits(neurons) * width, device=where)
        return (
            lambda: launch.hidden(x, x, rows, None, ("silu", 0.0), hidden),
            lambda: launch.sum_rows(hidden, rows, partial, out),
        )

    def _plain(self, raw: np.ndarray, row_type: RowType, width: int) -> tuple[Work, Work]:
        """By torch operations, over rows unpacked chunk by chunk."""
        where = self.device.torch_device
        rows = FileRows(row_type, torch.from_numpy(repack(raw, row_type, len(raw), width)).to(where))
        x, space = self._input(width), torch.empty(CHUNK_ROWS, width, device=where)
        hidden, out = torch.ones(1, CHUNK_ROWS, device=where), torch.empty(1, width, device=where)
        chunks = range(0, len(raw), CHUNK_ROWS)

        def products() -> None:
            for first in chunks:
                torch.nn.functional.silu(x @ rows.chunk(first, first + CHUNK_ROWS, space).T)

        def sums() -> None:
            out.zero_()
            for first in chunks:
                out.addmm_(hidden, rows.chunk(first, first + CHUNK_ROWS, space))

        return products, sums

    def _input(self, width: int) -> torch.Tensor:
        values = np.random.default_rng(_SEED).standard_normal((1, width), dtype=np.float32)
        return torch.from_numpy(values).to(self.device.torch_device)

    def _seconds(self, steps: Steps) -> list[float]:
        """Seconds of the host from queueing ``steps`` to having waited for them."""
        self.device.timed, times = False, list[float]()
        for _ in range(_WARM + _PASSES):
            started = time.perf_counter()
            self.device.submit(steps).wait()
            times.append(time.perf_counter() - started)
        return times[_WARM:]

    def _device_seconds(self, work: Work) -> list[float]:
        """Seconds that the device itself was at ``work``."""

        def step() -> None:
            work()

        steps = self.device.recorded((("work", step),))
        self.device.timed = True
        spans = [self.device.submit(steps).wait()[0] for _ in range(_WARM + _PASSES)]
        return [max(span.end - span.start, 1e-9) for span in spans[_WARM:]]

    def _figure(self, figure: str, values: Sequence[float]) -> float:
        """The median of ``values``, whose spread is noted."""
        middle = float(median(values))
        self.spreads.append(Spread(figure, float(min(values)), middle, float(max(values)), len(values)))
        return middle
