"""What ``powerinfer doctor`` says: this machine in facts, what would be used, and measurements when asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerinfer_formats.block_types import TensorType, row_bytes
from powerinfer_formats.hardware import FFNCurve, HardwareProfile
from powerinfer_kernels import Pool, available_isas
from powerinfer_tools import __version__
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.hardware import detect
from powerinfer_tools.hardware.store import default_profile_path
from powerinfer_tools.progress import Progress

if TYPE_CHECKING:
    from powerinfer_tools.ffn_benchmarking import FFNShape

_GIB = 1 << 30
#: A figure whose median stays further below its best pass than this was disturbed.
_NOISY = 0.25


@dataclass(frozen=True)
class Diagnosis:
    """``facts`` for programs and ``lines`` (name, value) for people say the same; ``profile`` when
    measured."""

    facts: dict[str, Any]
    lines: list[tuple[str, str]]
    warnings: list[str] = field(default_factory=list)
    profile: HardwareProfile | None = None


def diagnose(
    *,
    measure: bool = False,
    models: Sequence[Path] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Describe this machine; with ``measure``, measure it too, with curves for the FFNs of ``models`` (source
    files). Raises HardwareError, KernelError, and for models ModelError, FormatError, PlanError."""
    described = describe_machine(threads)
    if not measure:
        return described
    from powerinfer_tools.hardware.measure import COMMON_SHAPE
    from powerinfer_tools.hardware.measure import measure as run

    shapes = ffn_shapes(models) or [COMMON_SHAPE]
    with Pool(threads) as pool:
        measured = run(pool, shapes=shapes, cuda=described.facts["gpu"] is not None, progress=progress)
    cpu = measured.profile.cpu
    facts = described.facts | {"measured": measured.profile, "spread": measured.spreads}
    lines = [
        *described.lines,
        ("read bandwidth", _rate(cpu.bandwidth_bytes_per_s, measured.spreads["stream"])),
    ]
    for density, rate in zip(cpu.sparse_densities, cpu.sparse_bandwidth_bytes_per_s, strict=True):
        lines.append((f"rows, density {density:g}", _rate(rate, measured.spreads[f"density {density:g}"])))
    for curve in measured.profile.ffn:
        lines += _curve_lines(curve)
    lines += _gpu_lines(measured.profile)
    noisy = [name for name, spread in measured.spreads.items() if spread > _NOISY]
    warnings = list(described.warnings)
    if noisy:
        warnings.append(
            f"these figures vary by more than {100 * _NOISY:.0f} % between repeats ({', '.join(noisy)}); "
            "measure again on an idle machine"
        )
    return Diagnosis(facts, lines, warnings, measured.profile)


def ffn_shapes(models: Sequence[Path]) -> list["FFNShape"]:
    """The different FFNs of ``models``, in the row types that a split file would have."""
    from powerinfer_kernels import RowType
    from powerinfer_tools.ffn_benchmarking import FFNShape
    from powerinfer_tools.model import load_model
    from powerinfer_tools.planning.shapes import neuron_bytes, shape_of_model

    found: dict[FFNShape, None] = {}
    for path in models:
        model = load_model(path)
        try:
            layers = shape_of_model(model).layers
        finally:
            model.close()
        for layer in layers:
            if layer.gate is None:
                raise HardwareError(
                    f"{path}: curves are measured of gated FFNs alone, and this model's have no gate; leave "
                    "-m out, and the plan counts with the general curve"
                )
            gate, up, down = (RowType[name] for name in neuron_bytes(layer).types)
            found[FFNShape(layer.width, layer.neurons, (gate, up, down))] = None
    return list(found)


def _curve_lines(curve: FFNCurve) -> list[tuple[str, str]]:
    """Dense speed, and that of the sparse modes as a multiple of it."""
    types = "/".join((curve.gate_type, curve.up_type, curve.down_type))
    rows = f"FFN {curve.width}x{curve.neurons}"
    lines = [(rows, f"{types}: dense {curve.dense_bytes_per_s / 1e9:.1f} GB/s")]
    gate, up, down = (row_bytes(TensorType[name], curve.width) for name in types.split("/"))
    points = zip(curve.densities, curve.gate_first_bytes_per_s, curve.predicted_bytes_per_s, strict=True)
    for density, first, predicted in points:
        # Seconds a neuron: its bytes, and its share of what an FFN costs besides.
        besides = curve.overhead_seconds / curve.neurons
        whole = (gate + up + down) / curve.dense_bytes_per_s + besides
        by_gate = (gate + (up + down) * density) / first + besides
        by_predictor = (gate + up + down) * density / predicted + besides
        speeds = f"gate-first {whole / by_gate:.2f} x, predicted {whole / by_predictor:.2f} x"
        lines.append((f"  density {density:g}", speeds))
    return lines


def describe_machine(threads: int | None = None) -> Diagnosis:
    """What this machine is. torch is imported only where an NVIDIA driver is loaded."""
    driver, torch = detect.nvidia_driver(), detect.torch_version()
    device = detect.cuda_device() if driver and torch else None
    gpu = device if isinstance(device, detect.CudaDevice) else None
    ram, free = detect.ram_bytes(), detect.available_ram_bytes()
    stored = default_profile_path()
    facts: dict[str, Any] = {
        "version": __version__,
        "cpu": detect.cpu_name(),
        "cores": detect.cores(),
        "threads": threads or detect.cores(),
        "isa": detect.chosen_isa(),
        "isas": list(available_isas()),
        "ram_bytes": ram,
        "available_ram_bytes": free,
        "driver": driver,
        "torch": torch,
        "highs": _version("highspy"),
        "gpu": gpu,
        "hardware_profile": str(stored) if stored.is_file() else None,
    }
    lines = [
        ("powerinfer", __version__),
        ("CPU", f"{facts['cpu']}, {facts['cores']} physical cores, {facts['threads']} threads used"),
        ("instruction set", f"{facts['isa']} (available: {', '.join(facts['isas'])})"),
        ("RAM", f"{ram / _GIB:.1f} GiB, {free / _GIB:.1f} GiB available"),
        ("GPU", _gpu_text(gpu, driver)),
        ("torch", torch or "not installed (needed for --device cpu and cuda)"),
        (
            "hardware profile",
            facts["hardware_profile"] or "none stored; powerinfer doctor --measure makes one",
        ),
        ("hot neurons", "on cuda" if gpu else "on the CPU through torch (--device cpu), if asked for"),
    ]
    return Diagnosis(facts, lines, _warnings(facts, driver, device))


def _warnings(facts: dict[str, Any], driver: str | None, device: detect.CudaDevice | str | None) -> list[str]:
    warnings = []
    if driver and isinstance(device, str):
        warnings.append(f"NVIDIA driver {driver} is loaded, but {device}; everything runs on the CPU")
    if driver and facts["torch"] is None:
        warnings.append(
            f"NVIDIA driver {driver} is loaded, but torch is not installed; everything runs on the CPU"
        )
    if facts["isa"].endswith("(not available)"):
        warnings.append(f"{detect.ISA_VARIABLE} asks for an instruction set that this CPU does not have")
    if not facts["ram_bytes"]:
        warnings.append("the system does not say how much memory there is")
    return warnings


def _gpu_text(gpu: detect.CudaDevice | None, driver: str | None) -> str:
    if gpu is None:
        return "none" if driver is None else f"not usable (driver {driver})"
    free, total = gpu.free_bytes / _GIB, gpu.total_bytes / _GIB
    room = f"{free:.1f} of {total:.1f} GiB free"
    return f"{gpu.name}, compute capability {gpu.capability}, {room}, driver {driver}"


def _gpu_lines(profile: HardwareProfile) -> list[tuple[str, str]]:
    if profile.gpu is None or profile.link is None:
        return []
    return [
        ("GPU bandwidth", f"{profile.gpu.bandwidth_bytes_per_s / 1e9:.1f} GB/s"),
        (
            "GPU launch, sync",
            f"{1e6 * profile.gpu.launch_seconds:.1f} µs, {1e6 * profile.gpu.sync_seconds:.1f} µs",
        ),
        (
            "link",
            f"{profile.link.bandwidth_bytes_per_s / 1e9:.1f} GB/s, "
            f"{1e6 * profile.link.latency_seconds:.1f} µs",
        ),
    ]


def _rate(rate: float, spread: float) -> str:
    return f"{rate / 1e9:.1f} GB/s, spread {100 * spread:.0f} %"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
