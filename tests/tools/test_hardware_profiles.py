"""Presets, where profiles are kept, what is detected, and what is measured."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from powerinfer_formats.errors import BadField, FormatError
from powerinfer_formats.hardware import NO_GATE, DiskInfo, HardwareProfile
from powerinfer_kernels import Pool, RowType, available_isas
from powerinfer_tools import detect
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.measure import ffn_speedup as ffn_benchmarking
from powerinfer_tools.measure import random_ffns as ffn_layers
from powerinfer_tools.measure.hardware import (
    default_profile_path,
    describe_machine,
    disk,
    find_hardware,
    measure,
)
from powerinfer_tools.measure.hardware.diagnosis import ffn_shapes
from powerinfer_tools.measure.hardware.listing import measured_lines
from powerinfer_tools.measure.hardware.presets import PC_HIGH, PC_LOW, PRESETS
from powerinfer_tools.progress import Silent
from tiny_models import CASES, make_tiny_model

GIB = 1 << 30


@pytest.fixture(autouse=True)
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("POWERINFER_HARDWARE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_presets_are_the_papers_machines() -> None:
    assert set(PRESETS) == {"pc-high", "pc-low"}
    high, low = PC_HIGH, PC_LOW
    assert high.gpu is not None
    assert low.gpu is not None
    assert (high.cpu.ram_bytes, high.cpu.bandwidth_bytes_per_s) == (192 * GIB, 67.2e9)
    assert (low.cpu.ram_bytes, low.cpu.bandwidth_bytes_per_s) == (64 * GIB, 38.4e9)
    assert (high.gpu.vram_bytes, high.gpu.bandwidth_bytes_per_s) == (24 * GIB, 1008e9)
    assert (low.gpu.vram_bytes, low.gpu.bandwidth_bytes_per_s) == (11 * GIB, 616e9)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_valid_files(name: str, tmp_path: Path) -> None:
    PRESETS[name].save(tmp_path / "hardware.toml")
    assert HardwareProfile.load(tmp_path / "hardware.toml") == PRESETS[name]
    curve = PRESETS[name].cpu.sparse_bandwidth_bytes_per_s
    assert list(curve) == sorted(curve)
    assert curve[-1] == PRESETS[name].cpu.bandwidth_bytes_per_s


def test_default_location(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_profile_path() == tmp_path / "config" / "powerinfer" / "hardware.toml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_profile_path() == tmp_path / ".config" / "powerinfer" / "hardware.toml"
    monkeypatch.setenv("POWERINFER_HARDWARE", "/elsewhere.toml")
    assert default_profile_path() == Path("/elsewhere.toml")


def test_names_files_and_neither(tmp_path: Path) -> None:
    assert find_hardware("PC-High").profile is PC_HIGH
    file = tmp_path / "mine.toml"
    mine = replace(PC_LOW, machine=replace(PC_LOW.machine, name="mine"))
    mine.save(file)
    assert find_hardware(str(file)).profile == mine
    with pytest.raises(HardwareError, match="no preset of that name; presets: pc-high, pc-low"):
        find_hardware("pc-middle")
    file.write_text("nonsense")
    with pytest.raises(FormatError):
        find_hardware(str(file))


def test_without_a_name_the_stored_profile_else_this_machine_measured_quickly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = find_hardware(None)
    assert found.profile.machine.source == "measured"
    assert found.profile.cpu.bandwidth_bytes_per_s > 0
    assert found.profile.gpu is None
    assert "This machine was measured for a second" in found.note
    stored = default_profile_path()
    stored.parent.mkdir(parents=True)
    mine = replace(PC_HIGH, machine=replace(PC_HIGH.machine, name="mine"))
    mine.save(stored)
    assert find_hardware(None) == find_hardware(str(stored))
    assert find_hardware(None).note == ""
    monkeypatch.setenv("POWERINFER_HARDWARE", str(tmp_path / "missing.toml"))
    with pytest.raises(HardwareError, match="POWERINFER_HARDWARE"):
        find_hardware(None)


def test_vram_without_an_accelerator_is_refused() -> None:
    stored = default_profile_path()
    stored.parent.mkdir(parents=True)
    mine = replace(PC_HIGH, machine=replace(PC_HIGH.machine, name="mine"), gpu=None, link=None)
    mine.save(stored)
    assert find_hardware(None).profile.gpu is None
    for name in (None, str(stored)):
        with pytest.raises(HardwareError, match=r"mine has no accelerator .* --hardware"):
            find_hardware(name, wants_gpu=True)
    assert find_hardware("pc-low", wants_gpu=True).profile is PC_LOW


def system(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_ram_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    assert detect.ram_bytes(tmp_path) == 0
    root = system(tmp_path, proc__meminfo="MemTotal:       2000 kB\nMemAvailable:   1500 kB\n")
    assert detect.ram_bytes(root) == 2000 * 1024
    assert detect.available_ram_bytes(root) == 1500 * 1024
    limit = root / "sys/fs/cgroup/memory.max"
    limit.parent.mkdir(parents=True)
    limit.write_text("max\n")
    assert detect.ram_bytes(root) == 2000 * 1024
    limit.write_text("1048576\n")
    assert detect.ram_bytes(root) == 1048576
    (root / "sys/fs/cgroup/memory").mkdir()
    (root / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert detect.ram_bytes(root) == 1048576


def test_processor_and_driver_are_read_from_the_system(tmp_path: Path) -> None:
    root = system(
        tmp_path, proc__cpuinfo="processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nmodel name\t: Other\n"
    )
    assert detect.cpu_name(root) == "Some CPU @ 3 GHz"
    assert detect.nvidia_driver(root) is None
    version = root / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\nGCC version: 12\n"
    )
    assert detect.nvidia_driver(root) == "535.183.01"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n")
    assert detect.nvidia_driver(root) == "570.86.15"


def test_description_says_what_is_used() -> None:
    described = describe_machine(threads=2)
    facts = described.facts
    assert facts["isa"] in available_isas()
    assert facts["threads"] == 2
    assert facts["cores"] >= 1
    assert facts["ram_bytes"] > 0
    assert facts["hardware_profile"] is None
    assert described.profile is None
    text = dict(described.lines)
    assert facts["isa"] in text["instruction set"]


def test_an_instruction_set_that_is_not_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERINFER_ISA", "mmx")
    described = describe_machine()
    assert described.facts["isa"] == "mmx (not available)"
    assert any("POWERINFER_ISA" in warning for warning in described.warnings)


def test_describing_imports_no_torch_without_a_driver() -> None:
    if detect.nvidia_driver() is not None:
        pytest.skip("an NVIDIA driver is loaded here, so torch is asked for the device")
    code = (
        "import sys; from powerinfer_tools.measure.hardware import describe_machine; describe_machine();"
        "assert not {'torch', 'highspy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_a_quick_measurement_makes_a_valid_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_MOST_BYTES", 16 << 20)
    monkeypatch.setattr(measure, "_REPEATS", 2)
    monkeypatch.setattr(ffn_layers, "_DEFEAT_CACHES", 1 << 20)
    types = (RowType.Q4_0, RowType.Q5_0, RowType.Q8_0)
    shapes = [ffn_layers.FFNShape(64, 96, types), ffn_layers.FFNShape(64, 96, types[1:])]
    shapes.append(ffn_layers.FFNShape(256, 512, (*types[:2], RowType.Q6_K), expert=True))
    with Pool(1) as pool:
        measured = measure.measure(pool, 0.05, shapes=shapes)
        assert measured.profile.cpu.isa == pool.isa
    profile = measured.profile
    profile.save(tmp_path / "hardware.toml")
    assert HardwareProfile.load(tmp_path / "hardware.toml") == profile
    assert profile.machine.source == "measured"
    assert profile.gpu is None
    curve, ungated, expert = profile.ffn
    assert (expert.neurons, expert.down_type) == (512, "Q6_K")
    assert ungated.types == tuple(kind.name for kind in types[1:])
    assert ungated.gate_type == NO_GATE
    assert (curve.width, curve.neurons) == (64, 96)
    assert (curve.gate_type, curve.up_type, curve.down_type) == tuple(kind.name for kind in types)
    assert curve.densities == ffn_benchmarking.CURVE_DENSITIES
    points = range(len(measure.DENSITIES))
    figures = {"cpu.bandwidth_bytes_per_s", *(f"cpu.sparse_bandwidth_bytes_per_s[{i}]" for i in points)}
    for index in (0, 1, 2):
        figures |= {f"ffn[{index}].dense_bytes_per_s", f"ffn[{index}].overhead_seconds"}
        if index < 2:
            figures.add(f"ffn[{index}].columns_bytes_per_s")
        for mode in ("gate_first", "predicted"):
            figures |= {f"ffn[{index}].{mode}_bytes_per_s[{i}]" for i in points}
    spreads = {spread.figure: spread for spread in profile.spread}
    assert set(spreads) == figures
    for figure, spread in spreads.items():
        assert spread.passes >= 2
        value = figure_of(profile, figure)
        if figure.startswith("cpu"):
            assert value == spread.high
        elif not figure.endswith("overhead_seconds"):
            assert value == pytest.approx(spread.median, rel=1e-9)
    told = dict(measured_lines(profile))
    stream = spreads["cpu.bandwidth_bytes_per_s"]
    low, middle, high = (f"{value / 1e9:.1f}" for value in (stream.low, stream.median, stream.high))
    assert told["read bandwidth"] == f"{high} GB/s ({low} … {middle} … {high})"
    assert told["FFN 64x96"].startswith("Q5_0/Q8_0: dense ")


@pytest.mark.parametrize("case", ["mixtral-Q4_0", "llama-Q4_0"])
def test_experts_are_measured_in_the_form_that_they_are_computed_in(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As whole matrices; FFNs that are split by neurons, with a row of down for each."""
    monkeypatch.setattr(ffn_layers, "_DEFEAT_CACHES", 1 << 18)
    (shape,) = ffn_shapes([make_tiny_model(tmp_path, CASES[case]).path])
    assert shape.expert == (case == "mixtral-Q4_0")
    with Pool(1) as pool:
        bench = ffn_benchmarking.CurveBench(pool, shape)
        bench.sample()
    form = "dense" if shape.expert else "dense-rows"
    assert set(bench._layers._programs) == {form, *ffn_benchmarking.CURVE_MODES}
    assert set(bench._small._programs) == {form}
    assert bench.curve().dense_bytes_per_s == pytest.approx(
        bench._layers.touched(form, 1.0) / (bench._times[form, 1.0][0] - bench.curve().overhead_seconds),
        rel=1e-9,
    )


def figure_of(profile: HardwareProfile, path: str) -> float:
    """The figure at ``path``, such as ``ffn[0].dense_bytes_per_s``."""
    value: Any = profile
    for name, index in re.findall(r"(\w+)(?:\[(\d+)\])?", path):
        value = getattr(value, name)
        value = value[int(index)] if index else value
    return float(value)


def test_a_device_is_measured_by_the_one_code_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On torch's CPU device, whose times are its own; every figure has its spread."""
    from powerinfer_tools.engine.hot.devices import CpuDevice
    from powerinfer_tools.measure import accelerator as measuring

    monkeypatch.setattr(measuring, "_PASSES", 3)
    device = CpuDevice()
    try:
        sizes = measuring.Sizes(nbytes=1 << 18, width=256)
        found = measuring.measure_device(device, "torch's CPU", 1 << 30, fused=False, sizes=sizes)
        late = measuring.measure_device(
            device, "late", 1 << 30, fused=False, sizes=replace(sizes, seconds=0.0)
        )
    finally:
        device.close()
    assert [kernel.row_type for kernel in found.kernels] == [kind.name for kind in RowType]
    assert not any(kernel.fused for kernel in found.kernels)
    assert found.notices == ()
    profile = replace(PC_LOW, gpu=found.gpu, link=found.link, kernel=found.kernels, spread=found.spreads)
    profile.save(tmp_path / "hardware.toml")
    assert HardwareProfile.load(tmp_path / "hardware.toml") == profile
    for spread in found.spreads:
        assert spread.passes == 3
        assert figure_of(profile, spread.figure) == spread.median
    assert len(found.spreads) == 5 + 2 * len(found.kernels)
    told = dict(measured_lines(profile))
    assert told["GPU Q4_K rows"].endswith("; plain torch")
    assert "µs (" in told["GPU launch"]
    assert late.kernels == ()
    assert len(late.notices) == len(RowType)
    assert "the time was up" in late.notices[0]


def test_the_gathered_curve_counts_the_rows_that_are_read() -> None:
    with Pool(1) as pool:
        bench = measure._GateFirst(pool, 1 << 20)
        random = measure.np.random.default_rng(0)
        for density in (0.1, 0.5, 1.0):
            rate = bench.rate(pool, density, random)
            active = max(1, round(density * bench.neurons))
            assert bench.program.active_neurons() == active
            nanoseconds = int(bench.program.nanoseconds().sum())
            assert rate == active * bench.bundle.record_bytes / nanoseconds * 1e9
    assert bench.bundle.record_bytes == 4096 // 32 * (18 + 34)


def test_measuring_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(1) as pool:
        for seconds in (0.0, -1.0, float("nan")):
            with pytest.raises(HardwareError, match="measures nothing"):
                measure.measure(pool, seconds, shapes=())
        monkeypatch.setattr(detect, "available_ram_bytes", lambda: 1 << 20)
        with pytest.raises(HardwareError, match="too few to measure with"):
            measure.measure(pool, 0.1)
        monkeypatch.setattr(detect, "ram_bytes", lambda: 0)
        with pytest.raises(HardwareError, match="how much memory"):
            measure.measure(pool, 0.1)


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "cuda_device", lambda: "torch finds no usable CUDA device")
    with pytest.raises(HardwareError, match="cannot be measured: torch finds no usable"):
        measure._measure_cuda(Silent())


def test_the_disk_is_measured_with_a_file_that_is_there(tmp_path: Path) -> None:
    """Nothing is written; a file that is too small for it is refused, and doctor says so."""
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(8 << 20))
    found = disk.measure_disk(path, 0.2, least_bytes=1 << 20)
    assert found.folder == str(tmp_path)
    assert found.read_bytes == disk.SIZES
    assert found.stream_bytes_per_s > 0
    assert min(*found.single_reads_per_s, *found.deep_reads_per_s) > 0
    assert [file.name for file in tmp_path.iterdir()] == ["model.bin"]
    profile = replace(PRESETS["pc-high"], disk=found)
    profile.save(tmp_path / "hardware.toml")
    assert HardwareProfile.load(tmp_path / "hardware.toml") == profile
    assert any(name == "disk" for name, _ in measured_lines(profile))
    with pytest.raises(HardwareError, match="8 MiB are too little to measure a disk with"):
        disk.measure_disk(path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"read_bytes": ()}, "disk.read_bytes"),
        ({"read_bytes": (8, 4)}, "disk.read_bytes"),
        ({"single_reads_per_s": (1.0,)}, "disk.single_reads_per_s"),
        ({"deep_reads_per_s": (1.0, 0.0)}, "disk.deep_reads_per_s"),
        ({"stream_bytes_per_s": 0.0}, "disk.stream_bytes_per_s"),
    ],
)
def test_figures_of_a_disk_that_cannot_be(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    figures = DiskInfo("/models", True, 1e9, (4096, 8192), (9e3, 8e3), (4e4, 3e4))
    profile = replace(PRESETS["pc-high"], disk=replace(figures, **change))
    with pytest.raises(BadField, match=field.replace(".", r"\.")):
        profile.save(tmp_path / "hardware.toml")
