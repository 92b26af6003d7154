"""How many cores this process may use: affinity, hardware threads that share a core, and cgroup quotas."""

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")


def _core_of(cpu: int, cpus: Path) -> tuple[str, str]:
    """(package, core) of a CPU; a CPU without topology files counts as a core of its own."""
    topology = cpus / f"cpu{cpu}" / "topology"
    try:
        package = (topology / "physical_package_id").read_text().strip()
        return package, (topology / "core_id").read_text().strip()
    except OSError:
        return "cpu", str(cpu)


def _read_quota(folder: Path) -> float | None:
    """CPUs that a cgroup (version 2, else 1) grants, None where it sets no limit."""
    try:
        words = (folder / "cpu.max").read_text().split()
    except OSError:
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            words = [quota, (folder / "cpu.cfs_period_us").read_text().strip()]
        except OSError:
            return None
    try:
        limit = float(words[0]) / float(words[1])
    except (ValueError, IndexError, ZeroDivisionError):
        return None
    return limit if limit > 0 else None


def _cgroup_folders(cgroups: Path) -> list[Path]:
    """The process's cgroup folders and their parents, which may contain quotas."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    folders = {cgroups, cgroups / "cpu", cgroups / "cpu,cpuacct"}
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = cgroups / controllers if controllers else cgroups
        folder = base / path.lstrip("/")
        while folder != base and ".." not in folder.parts:
            folders.add(folder)
            folder = folder.parent
    return sorted(folders)


def physical_cores(cpus: Path = _CPUS, cgroups: Path = _CGROUPS) -> int:
    """Cores that this process may use, at least 1: distinct physical cores among the CPUs of its affinity
    mask, at most the CPU quota of its cgroups (rounded down). The default arguments are the folders in which
    Linux shows CPUs and cgroups; tests pass other folders."""
    cores = len({_core_of(cpu, cpus) for cpu in os.sched_getaffinity(0)})
    quotas = [quota for folder in _cgroup_folders(cgroups) if (quota := _read_quota(folder)) is not None]
    return max(1, min([cores, *(int(quota) for quota in quotas)]))
