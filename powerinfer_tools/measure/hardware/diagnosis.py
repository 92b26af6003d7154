"""What ``powerinfer doctor`` says: this machine in facts, what would be used, and measurements when asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerinfer_formats.errors import FormatError
from powerinfer_formats.hardware import HardwareProfile
from powerinfer_kernels import Pool, available_isas
from powerinfer_tools import __version__, detect
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.measure.hardware.listing import measured_lines
from powerinfer_tools.measure.hardware.store import default_profile_path
from powerinfer_tools.progress import Progress

if TYPE_CHECKING:
    from powerinfer_tools.measure.random_ffns import FFNShape

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
    from powerinfer_tools.measure.hardware.measure import COMMON_SHAPE
    from powerinfer_tools.measure.hardware.measure import measure as run

    shapes = ffn_shapes(models) or [COMMON_SHAPE]
    with Pool(threads) as pool:
        measured = run(pool, shapes=shapes, cuda=described.facts["gpu"] is not None, progress=progress)
    profile, more = _with_disk(measured.profile, models)
    facts = described.facts | {"measured": profile}
    lines = [*described.lines, *measured_lines(profile)]
    warnings = [*described.warnings, *measured.notices, *more]
    noisy = [
        spread.figure
        for spread in measured.profile.spread
        if spread.figure.partition("[")[0].endswith("_per_s") and spread.median < (1 - _NOISY) * spread.high
    ]
    if noisy:
        warnings.append(
            f"the median of these is more than {100 * _NOISY:.0f} % below their best pass "
            f"({', '.join(noisy)}); measure again on an idle machine"
        )
    return Diagnosis(facts, lines, warnings, profile)


def _with_disk(profile: HardwareProfile, models: Sequence[Path]) -> tuple[HardwareProfile, list[str]]:
    """The profile with the disk of the first of ``models`` that is a file large enough, and what is to be
    said."""
    from powerinfer_tools.measure.hardware.disk import measure_disk

    problems = []
    for path in models:
        try:
            return replace(profile, disk=measure_disk(path)), []
        except (HardwareError, FormatError) as error:
            problems.append(f"the disk was not measured: {error}")
    return profile, problems


def ffn_shapes(models: Sequence[Path]) -> list["FFNShape"]:
    """The different FFNs of ``models``, in the row types that a split file would have."""
    from powerinfer_kernels import RowType
    from powerinfer_tools.measure.random_ffns import FFNShape
    from powerinfer_tools.model.loading import load_model
    from powerinfer_tools.model.shapes import neuron_bytes, shape_of_model

    shapes: dict[FFNShape, None] = {}
    for path in models:
        model = load_model(path)
        try:
            layers = shape_of_model(model).layers
        finally:
            model.close()
        for layer in layers:
            if not layer.neurons:
                continue
            types = tuple(RowType[name] for name in neuron_bytes(layer).types)
            shapes[FFNShape(layer.width, layer.up.rows, types, layer.experts is not None)] = None  # or of one
    return list(shapes)


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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
