"""From a hardware profile to the machine of the cost model."""

from powerinfer_formats.hardware import HardwareProfile
from powerinfer_tools.stages.plan.costs import Disk, Gpu, Machine

#: Presets hold published peak bandwidths. Programs that stream reach 80 to 90 % of them, on desktop DDR4 and
#: DDR5 (STREAM) as on GDDR6; measured profiles hold what was reached and count in full.
REACHABLE_SHARE = 0.85


def machine_of(profile: HardwareProfile) -> Machine:
    """The machine that ``profile`` describes. Raises HardwareError for numbers that make none."""
    share = REACHABLE_SHARE if profile.machine.source == "preset" else 1.0
    cpu = profile.cpu
    points = zip(cpu.sparse_densities, cpu.sparse_bandwidth_bytes_per_s, strict=True)
    return Machine(
        name=profile.machine.name,
        ram_bytes=cpu.ram_bytes,
        bandwidth=share * cpu.bandwidth_bytes_per_s,
        curve=tuple((density, share * bandwidth) for density, bandwidth in points),
        gpu=_gpu(profile, share),
        ffn_curves=profile.ffn,
        disk=_disk(profile),
        cores=cpu.cores,
    )


def _disk(profile: HardwareProfile) -> Disk | None:
    disk = profile.disk
    if disk is None:
        return None
    reads = zip(disk.read_bytes, disk.deep_reads_per_s, strict=True)
    return Disk(tuple((nbytes, nbytes * rate) for nbytes, rate in reads))


def _gpu(profile: HardwareProfile, share: float) -> Gpu | None:
    gpu, link = profile.gpu, profile.link
    if gpu is None or link is None:
        return None
    return Gpu(
        name=gpu.name,
        vram_bytes=gpu.vram_bytes,
        bandwidth=share * gpu.bandwidth_bytes_per_s,
        launch_seconds=gpu.launch_seconds,
        sync_seconds=gpu.sync_seconds,
        link_bandwidth=share * link.bandwidth_bytes_per_s,
        link_latency=link.latency_seconds,
    )
