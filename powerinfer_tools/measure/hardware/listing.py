"""A hardware profile for people: each figure with how far its passes lay apart."""

from powerinfer_formats.block_types import TensorType
from powerinfer_formats.hardware import DiskInfo, FFNCurve, HardwareProfile, KernelRate, Spread
from powerinfer_kernels import packed_row_bytes

Lines = list[tuple[str, str]]
_Spreads = dict[str, Spread]


def measured_lines(profile: HardwareProfile) -> Lines:
    """All figures, (name, value)."""
    spreads = {spread.figure: spread for spread in profile.spread}
    cpu = profile.cpu
    lines = [
        ("read bandwidth", _rate(cpu.bandwidth_bytes_per_s, spreads.get("cpu.bandwidth_bytes_per_s"))),
    ]
    points = zip(cpu.sparse_densities, cpu.sparse_bandwidth_bytes_per_s, strict=True)
    for index, (density, rate) in enumerate(points):
        sure = spreads.get(f"cpu.sparse_bandwidth_bytes_per_s[{index}]")
        lines.append((f"rows, density {density:g}", _rate(rate, sure)))
    for index, curve in enumerate(profile.ffn):
        lines += _curve_lines(curve, f"ffn[{index}]", spreads)
    lines += _gpu_lines(profile, spreads)
    for index, kernel in enumerate(profile.kernel):
        lines.append(_kernel_line(kernel, f"kernel[{index}]", spreads))
    lines += _disk_lines(profile.disk)
    if spreads:
        lines.append(("in brackets", "lowest … median … highest of the passes"))
    return lines


def _curve_lines(curve: FFNCurve, path: str, spreads: _Spreads) -> Lines:
    """Dense speed, and the speed of the sparse modes as a multiple of it."""
    dense = _rate(curve.dense_bytes_per_s, spreads.get(f"{path}.dense_bytes_per_s"))
    lines = [(f"FFN {curve.width}x{curve.neurons}", f"{'/'.join(curve.types)}: dense {dense}")]
    if curve.columns_bytes_per_s:
        columns = _rate(curve.columns_bytes_per_s, spreads.get(f"{path}.columns_bytes_per_s"))
        lines.append(("  as a source has it", f"dense {columns}"))
    always, *others = (packed_row_bytes(TensorType[name], curve.width) for name in curve.types)
    skippable = sum(others)
    points = zip(curve.densities, curve.gate_first_bytes_per_s, curve.predicted_bytes_per_s, strict=True)
    for index, (density, first, predicted) in enumerate(points):
        # Seconds a neuron: its bytes, and its share of what an FFN costs besides.
        besides = curve.overhead_seconds / curve.neurons
        whole = (always + skippable) / curve.dense_bytes_per_s + besides
        by_gate = (always + skippable * density) / first + besides
        by_predictor = (always + skippable) * density / predicted + besides
        parts = [
            f"{mode} {whole / seconds:.2f} x, {_rate(rate, spreads.get(f'{path}.{field}[{index}]'))}"
            for mode, seconds, rate, field in (
                ("gate-first", by_gate, first, "gate_first_bytes_per_s"),
                ("predicted", by_predictor, predicted, "predicted_bytes_per_s"),
            )
        ]
        lines.append((f"  density {density:g}", "; ".join(parts)))
    return lines


def _disk_lines(disk: DiskInfo | None) -> Lines:
    if disk is None:
        return []
    past = "" if disk.direct else ", through the page cache: this file system has no direct reads"
    lines = [("disk", f"{disk.folder}: streams {disk.stream_bytes_per_s / 1e9:.2f} GB/s{past}")]
    points = zip(disk.read_bytes, disk.single_reads_per_s, disk.deep_reads_per_s, strict=True)
    for size, single, deep in points:
        rates = ", ".join(
            f"{rate:,.0f}/s with {count} in flight ({rate * size / 1e9:.2f} GB/s)"
            for count, rate in ((1, single), (16, deep))
        )
        lines.append((f"  reads of {size >> 10} KiB", rates))
    return lines


def _gpu_lines(profile: HardwareProfile, spreads: _Spreads) -> Lines:
    gpu, link = profile.gpu, profile.link
    if gpu is None or link is None:
        return []
    return [
        ("GPU bandwidth", _rate(gpu.bandwidth_bytes_per_s, spreads.get("gpu.bandwidth_bytes_per_s"))),
        ("GPU launch", _time(gpu.launch_seconds, spreads.get("gpu.launch_seconds"))),
        ("GPU wait", _time(gpu.sync_seconds, spreads.get("gpu.sync_seconds"))),
        ("link", _rate(link.bandwidth_bytes_per_s, spreads.get("link.bandwidth_bytes_per_s"))),
        ("link latency", _time(link.latency_seconds, spreads.get("link.latency_seconds"))),
    ]


def _kernel_line(kernel: KernelRate, path: str, spreads: _Spreads) -> tuple[str, str]:
    lines = [
        f"{name} {_rate(rate, spreads.get(f'{path}.{name}_bytes_per_s'))}"
        for name, rate in (("products", kernel.products_bytes_per_s), ("sums", kernel.sums_bytes_per_s))
    ]
    return f"GPU {kernel.row_type} rows", "; ".join(lines) + ("" if kernel.fused else "; plain torch")


def _rate(rate: float, spread: Spread | None) -> str:
    return f"{rate / 1e9:.1f} GB/s{_range(spread, 1e9, '.1f')}"


def _time(seconds: float, spread: Spread | None) -> str:
    return f"{1e6 * seconds:.1f} µs{_range(spread, 1e-6, '.1f')}"


def _range(spread: Spread | None, unit: float, form: str) -> str:
    """Lowest, median and highest of the passes."""
    if spread is None:
        return ""
    low, middle, high = (format(value / unit, form) for value in (spread.low, spread.median, spread.high))
    return f" ({low} … {middle} … {high})"
