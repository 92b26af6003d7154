"""What this machine is: processor, memory, accelerator. Looks, measures nothing.

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
#: cgroup v2, then v1: the memory limit of this process's group as containers show it.
_LIMIT_FILES = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")


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
    """Memory that this process may use: the machine's, or its container's limit. 0 where the system won't
    say."""
    total = _meminfo(root, "MemTotal")
    limits = [int(text) for name in _LIMIT_FILES if (text := _text(root / name).strip()).isdigit()]
    return min([value for value in (total, *limits) if value > 0], default=0)


def available_ram_bytes(root: Path = Path("/")) -> int:
    """Memory that can be had without swapping, in the machine as a whole. 0 where the system won't say."""
    return _meminfo(root, "MemAvailable")


def chosen_isa() -> str:
    """The instruction set that the kernels will use."""
    available = available_isas()
    wanted = os.environ.get(ISA_VARIABLE) or available[0]
    return wanted if wanted in available else f"{wanted} (not available)"


def cores() -> int:
    """Physical cores that this process may use."""
    return physical_cores()


def nvidia_driver(root: Path = Path("/")) -> str | None:
    """Version of the NVIDIA driver that is loaded."""
    match = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)\s", _text(root / _DRIVER_FILE))
    return match.group(1) if match else None


def torch_version() -> str | None:
    """Version of torch where it is installed; does not import it."""
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


def _meminfo(root: Path, key: str) -> int:
    match = re.search(rf"^{key}:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
