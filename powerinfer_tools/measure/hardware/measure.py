"""Measure this machine with the engine's own kernels: streams, gathered rows, and a CUDA device where there
is one.

Takes a few seconds. Bandwidths of memory are the best of their repeats, since other programs can only slow a
pass down; other figures are medians. How far the repeats lay apart is in the profile, too.
"""

import datetime
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_formats.hardware import (
    CpuInfo,
    GpuInfo,
    HardwareProfile,
    KernelRate,
    LinkInfo,
    MachineInfo,
    Spread,
)
from powerinfer_kernels import (
    Activations,
    Bundle,
    Pool,
    Program,
    ProgramBuilder,
    RowType,
    aligned,
    quantize,
    read_bandwidth,
    row_bytes,
)
from powerinfer_tools import detect
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.measure.ffn_speedup import ffn_curve
from powerinfer_tools.measure.random_ffns import FFNShape
from powerinfer_tools.progress import Progress, Silent

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
#: Rows as in a common model of 7 billion weights; far more of them than a cache holds.
_WIDTH = 4096
_UP_TYPE, _DOWN_TYPE = RowType.Q4_0, RowType.Q8_0
_MOST_BYTES = 256 << 20
#: The FFN of mistral-7b as Q4_0, in the split file's row types: measured when no model is named.
COMMON_SHAPE = FFNShape(_WIDTH, 14336, (RowType.Q4_0, RowType.Q4_0, RowType.Q8_0))
_PATTERN_ROWS = 64
_REPEATS = 5
_SEED = 1


@dataclass(frozen=True)
class Measurement:
    """A hardware profile, and what could not be measured."""

    profile: HardwareProfile
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Accelerator:
    gpu: GpuInfo | None = None
    link: LinkInfo | None = None
    kernels: tuple[KernelRate, ...] = ()
    spreads: tuple[Spread, ...] = ()
    notices: tuple[str, ...] = ()


def measure(
    pool: Pool,
    seconds: float = 4.0,
    *,
    shapes: Sequence[FFNShape] = (COMMON_SHAPE,),
    cuda: bool = False,
    progress: Progress | None = None,
) -> Measurement:
    """Measure for about ``seconds`` on the threads of ``pool``, and as long again for each of ``shapes``, the
    FFNs to make curves of; with ``cuda``, the first CUDA device too.

    Raises HardwareError when the machine does not tell its memory or cannot spare enough to measure with, and
    when ``cuda`` is asked for without a usable device.
    """
    if not seconds > 0:
        raise HardwareError(f"measuring for {seconds} seconds measures nothing")
    progress = progress or Silent()
    progress.start("measuring", len(DENSITIES) + 1 + cuda + len(shapes), "figures")
    nbytes = _buffer_bytes()
    share = seconds / (2 * _REPEATS)
    streams = [read_bandwidth(pool, nbytes, share) for _ in range(_REPEATS)]
    stream = _spread("cpu.bandwidth_bytes_per_s", streams)
    progress.advance(1)
    gathered = gathered_curve(pool, nbytes, seconds / 2, progress)
    curves, spreads = [], [stream, *gathered]
    for index, shape in enumerate(shapes):
        curve, sure = ffn_curve(pool, shape, f"ffn[{index}]", seconds)
        curves.append(curve)
        spreads += sure
        progress.advance(1)
    accelerator = _measure_cuda(progress) if cuda else _Accelerator()
    progress.finish()
    profile = HardwareProfile(
        machine=MachineInfo(platform.node() or "this machine", "measured", datetime.date.today().isoformat()),
        cpu=CpuInfo(
            name=detect.cpu_name(),
            cores=pool.threads,
            isa=pool.isa,
            bandwidth_bytes_per_s=stream.high,
            ram_bytes=detect.ram_bytes(),
            sparse_densities=DENSITIES,
            sparse_bandwidth_bytes_per_s=tuple(rates.high for rates in gathered),
        ),
        gpu=accelerator.gpu,
        link=accelerator.link,
        ffn=tuple(curves),
        kernel=accelerator.kernels,
        spread=(*spreads, *accelerator.spreads),
    )
    return Measurement(profile, accelerator.notices)


def gathered_curve(
    pool: Pool, nbytes: int, seconds: float, progress: Progress, densities: Sequence[float] = DENSITIES
) -> list[Spread]:
    """Bytes per second of the gate-first kernel, counting the up and down rows of active neurons, for each
    share of active neurons. Which neurons are active is drawn anew for every pass."""
    bench = _GateFirst(pool, nbytes)
    random = np.random.default_rng(_SEED)
    figures = []
    for index, density in enumerate(densities):
        bench.rate(pool, density, random)  # the first pass brings pages and threads in
        deadline = time.perf_counter() + seconds / len(densities)
        rates: list[float] = []
        while len(rates) < _REPEATS or (time.perf_counter() < deadline and len(rates) < 10 * _REPEATS):
            rates.append(bench.rate(pool, density, random))
        figures.append(_spread(f"cpu.sparse_bandwidth_bytes_per_s[{index}]", rates))
        progress.advance(1)
    return figures


class _GateFirst:
    """The sparse half of one gate-first FFN over ``nbytes`` of up and down rows."""

    def __init__(self, pool: Pool, nbytes: int) -> None:
        neuron_bytes = row_bytes(_UP_TYPE, _WIDTH) + row_bytes(_DOWN_TYPE, _WIDTH)
        self.neurons = max(_PATTERN_ROWS, nbytes // neuron_bytes // _PATTERN_ROWS * _PATTERN_ROWS)
        self.gate = aligned((1, self.neurons), np.float32)
        self.bundle = Bundle.pack(
            pool,
            self.neurons,
            _WIDTH,
            up=(self._rows(_UP_TYPE), _UP_TYPE),
            down=(self._rows(_DOWN_TYPE), _DOWN_TYPE),
        )
        self.program = self._program()

    def rate(self, pool: Pool, density: float, random: np.random.Generator) -> float:
        """Bytes per second of one pass with ``density`` of the neurons active."""
        active = max(1, round(density * self.neurons))
        self.gate[:] = -1.0
        self.gate[0, random.choice(self.neurons, active, replace=False)] = 1.0
        self.program.reset_counters()
        self.program.run(pool, 0, self.program.operations, 1, 0)
        nanoseconds = int(self.program.nanoseconds().sum())
        return active * self.bundle.record_bytes / max(nanoseconds, 1) * 1e9

    def _program(self) -> Program:
        random = np.random.default_rng(_SEED)
        source = aligned((1, _WIDTH), np.float32)
        source[:] = random.standard_normal((1, _WIDTH), dtype=np.float32)
        acts = Activations(1, _WIDTH)
        quantiser = ProgramBuilder(1)
        quantiser.quantize(source, acts)
        with Pool(1) as alone:
            quantiser.build().run(alone, 0, 1, 1, 0)
        out, scratch = aligned((1, _WIDTH), np.float32), aligned((1, self.neurons), np.float32)
        builder = ProgramBuilder(1)
        builder.sparse_ffn(self.gate, source, acts, self.bundle, out, scratch, "relu")
        return builder.build()

    def _rows(self, row_type: RowType) -> npt.NDArray[np.uint8]:
        """Random rows: a small pattern again and again, which no cache can tell from as many different
        ones."""
        values = np.random.default_rng(_SEED).standard_normal((_PATTERN_ROWS, _WIDTH), dtype=np.float32)
        rows = quantize(values, row_type)
        return np.resize(rows, (self.neurons, rows.shape[1]))


def _buffer_bytes() -> int:
    """As much memory as is needed to defeat the caches, and no more than an eighth of what is free."""
    total, available = detect.ram_bytes(), detect.available_ram_bytes()
    if not total:
        raise HardwareError("the system does not say how much memory there is (/proc/meminfo)")
    spare = min(total, available or total) // 8
    if spare < 64 << 20:
        raise HardwareError(f"{spare} bytes of memory to spare are too few to measure with; free some first")
    return min(_MOST_BYTES, spare)


def _spread(figure: str, values: Sequence[float]) -> Spread:
    return Spread(figure, float(min(values)), float(np.median(values)), float(max(values)), len(values))


def _measure_cuda(progress: Progress) -> _Accelerator:
    gpu = detect.cuda_device()
    if isinstance(gpu, str):
        raise HardwareError(f"the GPU cannot be measured: {gpu}")
    from powerinfer_tools.engine.hot.devices import CudaDevice
    from powerinfer_tools.engine.hot.fusing import fusing_problem
    from powerinfer_tools.measure.accelerator import Sizes, measure_device

    problem = fusing_problem()
    device = CudaDevice()
    try:
        sizes = Sizes(nbytes=min(Sizes().nbytes, gpu.free_bytes // 8))
        figures = measure_device(device, gpu.name, gpu.total_bytes, fused=problem is None, sizes=sizes)
    finally:
        device.close()
    progress.advance(1)
    plain = () if problem is None else (f"fused kernels were not measured, plain ones were: {problem}",)
    return _Accelerator(
        figures.gpu, figures.link, figures.kernels, figures.spreads, (*plain, *figures.notices)
    )
