"""The two machines of the PowerInfer paper (arXiv 2312.12456, section 8.1), from published figures.

Bandwidths are published peaks; the planner counts them at a stated share. What is not published is assumed
and says so here.
"""

from powerinfer_formats.hardware import CpuInfo, GpuInfo, HardwareProfile, LinkInfo, MachineInfo

_GIB = 1 << 30
_WRITTEN = "2026-11-22"

#: Bandwidth when only a share of the rows is read, relative to streaming: speed-ups over dense measured with
#: prefetched row bundles on Zen 4, times the density (38 × at 0.02, 8.7 × at 0.1, 3.0 × at 0.3,
#: 1.9 × at 0.5). Assumed for both CPUs.
SPARSE_SHARE: tuple[tuple[float, float], ...] = (
    (0.02, 0.76),
    (0.1, 0.87),
    (0.3, 0.9),
    (0.5, 0.95),
    (1.0, 1.0),
)

#: Assumed for both GPUs: CUDA's cost of one kernel launch and of waiting for a stream, and the latency of a
#: small copy over PCIe; each is of the order that CUDA micro-benchmarks commonly report.
_LAUNCH_SECONDS = 4e-6
_SYNC_SECONDS = 10e-6
_COPY_SECONDS = 2e-6


def _cpu(name: str, cores: int, ram_bytes: int, bandwidth: float) -> CpuInfo:
    return CpuInfo(
        name=name,
        cores=cores,
        isa="avx2",
        bandwidth_bytes_per_s=bandwidth,
        ram_bytes=ram_bytes,
        sparse_densities=tuple(density for density, _ in SPARSE_SHARE),
        sparse_bandwidth_bytes_per_s=tuple(share * bandwidth for _, share in SPARSE_SHARE),
    )


def _gpu(name: str, vram_bytes: int, bandwidth: float) -> GpuInfo:
    return GpuInfo(name, vram_bytes, bandwidth, _LAUNCH_SECONDS, _SYNC_SECONDS)


PC_HIGH = HardwareProfile(
    machine=MachineInfo("pc-high", "preset", _WRITTEN),
    # Paper: i9-13900K, 192 GB of host memory at 67.2 GB/s. Intel ARK: 8 performance and 16 efficient cores.
    cpu=_cpu("Intel Core i9-13900K", 24, 192 * _GIB, 67.2e9),
    # Paper: RTX 4090, 24 GB. NVIDIA's Ada architecture paper: 1,008 GB/s.
    gpu=_gpu("NVIDIA GeForce RTX 4090", 24 * _GIB, 1008e9),
    # Paper: PCIe 4.0; PCI-SIG: 16 GT/s × 16 lanes × 128/130 / 8 = 31.5 GB/s.
    link=LinkInfo(31.5e9, _COPY_SECONDS),
)
PC_LOW = HardwareProfile(
    machine=MachineInfo("pc-low", "preset", _WRITTEN),
    # Paper: i7-12700K, 64 GB of host memory at 38.4 GB/s. Intel ARK: 8 performance and 4 efficient cores.
    cpu=_cpu("Intel Core i7-12700K", 12, 64 * _GIB, 38.4e9),
    # Paper: RTX 2080 Ti, 11 GB. NVIDIA's Turing architecture paper: 616 GB/s.
    gpu=_gpu("NVIDIA GeForce RTX 2080 Ti", 11 * _GIB, 616e9),
    # Paper: PCIe 3.0; PCI-SIG: 8 GT/s × 16 lanes × 128/130 / 8 = 15.75 GB/s.
    link=LinkInfo(15.75e9, _COPY_SECONDS),
)
PRESETS: dict[str, HardwareProfile] = {profile.machine.name: profile for profile in (PC_HIGH, PC_LOW)}
