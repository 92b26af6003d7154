"""The machine's processor, memory and accelerator, as the system reports them; nothing is measured.

torch is imported only by :func:`cuda_device`, when the caller asks for it.
"""

import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from powerinfer_kernels import available_isas, physical_cores

ISA_VARIABLE = "POWERINFER_ISA"
_DRIVER_FILE = "proc/driver/nvidia/version"
_CGROUPS = "sys/fs/cgroup"


@dataclass(frozen=True)
class CudaDevice:
    """The first CUDA device as torch sees it; bytes."""

    name: str
    capability: str
    total_bytes: int
    free_bytes: int


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name, as the system gives it."""
    for key in ("model name", "Hardware", "Model"):
        match = re.search(rf"^{key}\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine() or "unknown"


def ram_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may use: the machine's, or the least limit of its cgroups. 0 if the system
    does not tell."""
    total = _meminfo(root, "MemTotal")
    limits = [limit for limit, _ in _memory_limits(root)]
    return min([value for value in (total, *limits) if value > 0], default=0)


def available_ram_bytes(root: Path = Path("/")) -> int:
    """Memory available without swapping: in the machine as a whole, and within each cgroup of this process. 0
    if the system does not tell; at least 1 if it does."""
    available = _meminfo(root, "MemAvailable")
    remaining = [max(1, limit - used) for limit, used in _memory_limits(root)]
    return min([value for value in (available, *remaining) if value > 0], default=0)


def resident_bytes(root: Path = Path("/")) -> int:
    """Memory that this process takes now, including the pages of its mapped files; 0 if the system does not
    tell."""
    match = re.search(r"^VmRSS:\s*(\d+) kB", _text(root / "proc/self/status"), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def chosen_isa() -> str:
    """The instruction set that the kernels will use."""
    available = available_isas()
    isa = os.environ.get(ISA_VARIABLE) or available[0]
    return isa if isa in available else f"{isa} (not available)"


def cores() -> int:
    """Physical cores that this process may use."""
    return physical_cores()


def nvidia_driver(root: Path = Path("/")) -> str | None:
    """Version of the NVIDIA driver that is loaded."""
    match = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)\s", _text(root / _DRIVER_FILE))
    return match.group(1) if match else None


def torch_version() -> str | None:
    """Version of torch if it is installed; does not import it."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def cuda_device() -> CudaDevice | str:
    """The first CUDA device, or why there is none. Imports torch."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported ({error})"
    try:
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} finds no usable CUDA device"
        free, total = torch.cuda.mem_get_info(0)
        major, minor = torch.cuda.get_device_capability(0)
        return CudaDevice(torch.cuda.get_device_name(0), f"{major}.{minor}", int(total), int(free))
    except RuntimeError as error:
        return f"the CUDA device cannot be used ({str(error).splitlines()[0]})"


def _memory_limits(root: Path) -> list[tuple[int, int]]:
    """Limit and use, in bytes, of each cgroup on the way from this process's own to the root, version 1 or 2.
    Pages of files do not count as used: the system drops them when memory is short."""
    limits = []
    for folder in _memory_groups(root):
        for limit_name, used_name, files in (
            ("memory.max", "memory.current", ("inactive_file", "active_file")),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
        ):
            text, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
            if text.isdigit():
                stat = dict(re.findall(r"^(\w+) (\d+)$", _text(folder / "memory.stat"), re.MULTILINE))
                dropped = sum(int(stat.get(name, 0)) for name in files)
                limits.append((int(text), max(0, (int(used) if used.isdigit() else 0) - dropped)))
    return limits


def _memory_groups(root: Path) -> list[Path]:
    """Folders of the cgroups that limit this process's memory; a container sees its own as the top one."""
    top = root / _CGROUPS
    folders = [top, top / "memory"]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part]
        base = top / "memory" if controllers else top
        if ".." not in parts:
            folders += [base.joinpath(*parts[: end + 1]) for end in range(len(parts))]
    return list(dict.fromkeys(folders))


def _meminfo(root: Path, key: str) -> int:
    match = re.search(rf"^{key}:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
