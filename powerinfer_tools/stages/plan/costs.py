"""Time of one token on a machine, layer by layer, as the planner believes it.

    t_layer = t_attention + max(hot bytes / BW_gpu + launches, cold bytes / BW_cpu(ρ)) + synchronisations

Decoding one token reads every weight it uses once, so all parts are bytes over bandwidth (design, section 4).
``BW_cpu(ρ)`` is a curve over the density ρ of the rows read, because gathered rows cost more per byte than a
stream. A synchronisation carries one vector of the model's width to the other side, and one back.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from powerinfer_formats.hardware import FFNCurve
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.model.shapes import LayerShape, ModelShape
from powerinfer_tools.stages.plan.memory import Workload, attention_bytes, key_values

Vector = npt.NDArray[np.float64]
_F32 = 4
#: GPU kernels per hot FFN (gate and up; activation; down) and per attention block (norm, q/k/v, rope and
#: store, scores and sum, output); per predictor one a matrix.
FFN_LAUNCHES = 3
ATTENTION_LAUNCHES = 5
PREDICTOR_LAUNCHES = 2


@dataclass(frozen=True)
class Gpu:
    """An accelerator and the link to it. Bytes, bytes per second, seconds."""

    name: str
    vram_bytes: int
    bandwidth: float
    launch_seconds: float
    sync_seconds: float
    link_bandwidth: float
    link_latency: float


@dataclass(frozen=True)
class Disk:
    """The disk that holds the model: bytes per second of single reads at random places with many of them in
    flight, by their size in bytes, ascending."""

    rates: tuple[tuple[int, float], ...]

    def bandwidth(self, nbytes: int) -> float:
        """Bytes per second of reads of ``nbytes``; constant outside the sizes that were measured."""
        sizes, rates = zip(*self.rates, strict=True)
        return float(np.interp(nbytes, sizes, rates))


@dataclass(frozen=True)
class Machine:
    """A machine as the cost model sees it. ``bandwidth`` is for dense streams; ``curve`` holds (density,
    bandwidth) points, densities ascending, for gathered rows; ``ffn_curves`` are measured on FFNs of single
    shapes. ``gpu`` is None without an accelerator, ``disk`` where none was measured."""

    name: str
    ram_bytes: int
    bandwidth: float
    curve: tuple[tuple[float, float], ...]
    gpu: Gpu | None = None
    ffn_curves: tuple[FFNCurve, ...] = ()
    disk: Disk | None = None
    cores: int = 1
    _densities: Vector = field(init=False, repr=False, compare=False)
    _bandwidths: Vector = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _positive(f"{self.name}: ram_bytes", self.ram_bytes)
        _positive(f"{self.name}: CPU bandwidth", self.bandwidth)
        if not self.curve:
            raise HardwareError(f"{self.name}: the curve of CPU bandwidth over density has no points")
        for density, bandwidth in self.curve:
            _positive(f"{self.name}: bandwidth at density {density}", bandwidth)
            if not 0 < density <= 1:
                raise HardwareError(f"{self.name}: density {density} of the CPU curve is not in (0, 1]")
        densities = np.array([density for density, _ in self.curve])
        if np.any(np.diff(densities) <= 0):
            raise HardwareError(f"{self.name}: the densities of the CPU curve do not ascend")
        if self.gpu is not None:
            _check_gpu(self.gpu)
        object.__setattr__(self, "_densities", densities)
        object.__setattr__(self, "_bandwidths", np.array([bandwidth for _, bandwidth in self.curve]))

    def gathered_bandwidth(self, density: Vector) -> Vector:
        """Bytes per second when a share ``density`` of the rows is read; constant outside the curve's
        points."""
        return np.interp(density, self._densities, self._bandwidths)

    def ffn_curve(self, width: int, types: tuple[str, ...], neurons: int) -> FFNCurve | None:
        """The curve measured on rows of this width and these types, of the nearest number of neurons; None
        where there is none."""
        curves = [curve for curve in self.ffn_curves if curve.width == width and curve.types == types]
        return min(curves, key=lambda curve: abs(curve.neurons - neurons), default=None)


def _check_gpu(gpu: Gpu) -> None:
    _positive(f"{gpu.name}: vram_bytes", gpu.vram_bytes)
    _positive(f"{gpu.name}: bandwidth", gpu.bandwidth)
    _positive(f"{gpu.name}: link bandwidth", gpu.link_bandwidth)
    for name in ("launch_seconds", "sync_seconds", "link_latency"):
        value = getattr(gpu, name)
        if not (math.isfinite(value) and value >= 0):
            raise HardwareError(f"{gpu.name}: {name} is {value}; it must not be negative")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise HardwareError(f"{name} is {value}; it must be a positive number")


def sync_seconds(gpu: Gpu, width: int) -> float:
    """Seconds to hand one float32 vector of ``width`` over, get one back, and wait for it."""
    return gpu.sync_seconds + 2 * copy_seconds(gpu, width)


def copy_seconds(gpu: Gpu, width: int) -> float:
    """Seconds to hand one float32 vector of ``width`` over, one way."""
    return gpu.link_latency + _F32 * width / gpu.link_bandwidth


def kv_bytes_read(shape: ModelShape, layer: LayerShape, workload: Workload) -> int:
    """Bytes of keys and values that one token reads in ``layer``, at half of the context."""
    return key_values(shape, layer).bytes_read(max(1, workload.context // 2), workload.kv_type)


@dataclass(frozen=True)
class BlockSeconds:
    """Time of one block on either side; ``gpu`` is infinite without an accelerator."""

    cpu: float
    gpu: float


def attention_seconds(
    shape: ModelShape, layer: LayerShape, machine: Machine, workload: Workload
) -> BlockSeconds:
    """Time of the attention block of ``layer`` on both sides."""
    nbytes = attention_bytes(layer) + kv_bytes_read(shape, layer, workload)
    gpu = machine.gpu
    on_gpu = nbytes / gpu.bandwidth + ATTENTION_LAUNCHES * gpu.launch_seconds if gpu else math.inf
    return BlockSeconds(cpu=nbytes / machine.bandwidth, gpu=on_gpu)


def head_seconds(shape: ModelShape, machine: Machine) -> BlockSeconds:
    """Time of the output head on both sides."""
    nbytes = shape.head.packed_nbytes
    gpu = machine.gpu
    on_gpu = nbytes / gpu.bandwidth + 2 * gpu.launch_seconds if gpu else math.inf
    return BlockSeconds(cpu=nbytes / machine.bandwidth, gpu=on_gpu)


def dense_seconds(nbytes: Vector, machine: Machine, curve: FFNCurve | None = None) -> Vector:
    """Time of the CPU for ``nbytes`` of cold neurons, all of them computed; from the ``curve`` of their shape
    where there is one."""
    if curve is not None:
        return nbytes / curve.dense_bytes_per_s + curve.overhead_seconds * (nbytes > 0)
    return nbytes / machine.gathered_bandwidth(np.ones(1))


def columns_seconds(nbytes: float, machine: Machine, curve: FFNCurve | None = None) -> float:
    """Time of the CPU for a whole FFN of ``nbytes`` as its source has it; from the ``curve`` of its shape
    where that was measured."""
    if curve is None:
        return nbytes / float(machine.gathered_bandwidth(np.ones(1))[0])
    rate = curve.columns_bytes_per_s or curve.dense_bytes_per_s
    return nbytes / rate + curve.overhead_seconds


def gate_first_seconds(
    always: Vector, skippable: Vector, density: Vector, machine: Machine, curve: FFNCurve | None = None
) -> Vector:
    """Time of the CPU when ``always`` bytes stream and a share ``density`` of the ``skippable`` bytes is
    gathered; from the ``curve`` of their shape where there is one. Arrays are [levels]."""
    if curve is not None:
        rate = np.interp(density, curve.densities, curve.gate_first_bytes_per_s)
        return (always + skippable * density) / rate + curve.overhead_seconds * (always > 0)
    gathered = skippable * density / machine.gathered_bandwidth(density)
    return always / machine.gathered_bandwidth(np.ones(1)) + gathered


def predicted_seconds(
    nbytes: Vector, density: Vector, machine: Machine, curve: FFNCurve | None = None
) -> Vector:
    """Time of the CPU for a predicted FFN of which a share ``density`` of ``nbytes`` is gathered, the
    predictor's own time apart; from the ``curve`` of their shape where there is one. Arrays are [levels]."""
    if curve is not None:
        rate = np.interp(density, curve.densities, curve.predicted_bytes_per_s)
        return nbytes * density / rate + curve.overhead_seconds * (nbytes > 0)
    return nbytes * density / machine.gathered_bandwidth(density)


def dense_stream_seconds(nbytes: Vector, machine: Machine) -> Vector:
    """Time of the CPU to multiply with matrices of ``nbytes`` that are read in full."""
    return nbytes / machine.bandwidth
