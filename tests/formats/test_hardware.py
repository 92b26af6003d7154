from dataclasses import replace
from pathlib import Path

import pytest

from powerinfer_formats import errors
from powerinfer_formats.hardware import (
    CpuInfo,
    FFNCurve,
    GpuInfo,
    HardwareProfile,
    KernelRate,
    LinkInfo,
    MachineInfo,
    Spread,
)

TEXT = """\
format = "powerinfer-hardware"
version = 2

[machine]
name = "workstation"
source = "measured"
date = "2026-11-23"

[cpu]
name = "a CPU"
cores = 8
isa = "avx2"
bandwidth_bytes_per_s = 50000000000.0
ram_bytes = 68719476736
sparse_densities = [0.1, 0.5, 1.0]
sparse_bandwidth_bytes_per_s = [20000000000.0, 40000000000.0, 50000000000.0]

[gpu]
name = "a GPU"
vram_bytes = 25769803776
bandwidth_bytes_per_s = 1008000000000.0
launch_seconds = 4e-06
sync_seconds = 1.5e-05

[link]
bandwidth_bytes_per_s = 25000000000.0
latency_seconds = 1e-05

[[ffn]]
width = 4096
neurons = 14336
gate_type = "Q4_0"
up_type = "Q4_0"
down_type = "Q8_0"
dense_bytes_per_s = 30000000000.0
densities = [0.25, 1.0]
gate_first_bytes_per_s = [22000000000.0, 28000000000.0]
predicted_bytes_per_s = [21000000000.0, 27000000000.0]
overhead_seconds = 5e-06
columns_bytes_per_s = 29000000000.0

[[kernel]]
row_type = "Q4_K"
fused = true
products_bytes_per_s = 700000000000.0
sums_bytes_per_s = 600000000000.0

[[spread]]
figure = "ffn[0].dense_bytes_per_s"
low = 25000000000.0
median = 30000000000.0
high = 31000000000.0
passes = 7
"""

PROFILE = HardwareProfile(
    machine=MachineInfo("workstation", "measured", "2026-11-23"),
    cpu=CpuInfo("a CPU", 8, "avx2", 50e9, 64 << 30, (0.1, 0.5, 1.0), (20e9, 40e9, 50e9)),
    gpu=GpuInfo("a GPU", 24 << 30, 1008e9, 4e-6, 15e-6),
    link=LinkInfo(25e9, 1e-5),
    ffn=(
        FFNCurve(
            4096, 14336, "Q4_0", "Q4_0", "Q8_0", 30e9, (0.25, 1.0), (22e9, 28e9), (21e9, 27e9), 5e-6, 29e9
        ),
    ),
    kernel=(KernelRate("Q4_K", True, 7e11, 6e11),),
    spread=(Spread("ffn[0].dense_bytes_per_s", 25e9, 30e9, 31e9, 7),),
)


def test_the_file_is_the_one_spelled_out(tmp_path: Path) -> None:
    path = tmp_path / "h.toml"
    PROFILE.save(path)
    assert path.read_text() == TEXT
    assert HardwareProfile.load(path) == PROFILE


def test_a_machine_without_a_gpu(tmp_path: Path) -> None:
    alone = replace(PROFILE, gpu=None, link=None)
    alone.save(tmp_path / "h.toml")
    assert HardwareProfile.load(tmp_path / "h.toml") == alone
    assert "[gpu]" not in (tmp_path / "h.toml").read_text()


def test_a_file_of_version_1_is_read_and_written_anew_as_2() -> None:
    read = HardwareProfile.parse(TEXT.replace("version = 2", "version = 1"), "h.toml")
    assert read == PROFILE
    assert read.to_toml() == TEXT


def test_an_ffn_without_gate_rows() -> None:
    read = HardwareProfile.parse(TEXT.replace('gate_type = "Q4_0"', 'gate_type = "none"'), "h.toml")
    assert read.ffn[0].types == ("Q4_0", "Q8_0")
    assert PROFILE.ffn[0].types == ("Q4_0", "Q4_0", "Q8_0")


def test_whole_numbers_are_numbers() -> None:
    text = TEXT.replace("bandwidth_bytes_per_s = 50000000000.0", "bandwidth_bytes_per_s = 50_000_000_000")
    assert HardwareProfile.parse(text, "h.toml") == PROFILE


@pytest.mark.parametrize("name", ['quote " and \\', "tab\tline\nreturn\r", "\x00\x1b\x7f", "é 🙂", ""])
def test_any_name_comes_back(tmp_path: Path, name: str) -> None:
    named = replace(PROFILE, machine=replace(PROFILE.machine, name=name))
    named.save(tmp_path / "h.toml")
    assert HardwareProfile.load(tmp_path / "h.toml").machine.name == name


@pytest.mark.parametrize("value", [0.1, 1e300, 5e-324, 123456789.123456789, 1 / 3])
def test_any_number_comes_back_to_the_bit(tmp_path: Path, value: float) -> None:
    changed = replace(PROFILE, cpu=replace(PROFILE.cpu, bandwidth_bytes_per_s=value))
    changed.save(tmp_path / "h.toml")
    assert HardwareProfile.load(tmp_path / "h.toml").cpu.bandwidth_bytes_per_s == value


FAULTS: list[tuple[str, str, type[errors.FormatError], str]] = [
    ('format = "powerinfer-hardware"\n', "", errors.BadDocument, "not a hardware profile"),
    ("version = 2", "version = 3", errors.UnsupportedVersion, "version 3, 1 and 2 are read; measure again"),
    ("version = 2", "version = true", errors.UnsupportedVersion, "version True"),
    ("version = 2", "version = ", errors.BadDocument, "not valid TOML"),
    ("version = 2", "version = 2\nversion = 2", errors.BadDocument, "not valid TOML"),
    ('name = "workstation"\n', "", errors.BadField, r"machine\.name is missing"),
    ('"measured"', '"guessed"', errors.BadField, r"machine\.source is 'guessed'"),
    ('"2026-11-23"', '"yesterday"', errors.BadField, r"machine\.date"),
    ('"2026-11-23"', "2026-11-23", errors.BadField, r"machine\.date"),
    ("cores = 8", "cores = 0", errors.BadField, r"cpu\.cores is 0"),
    ("cores = 8", "cores = 8.0", errors.BadField, r"cpu\.cores is 8\.0, expected a whole number"),
    ("cores = 8", "cores = true", errors.BadField, r"cpu\.cores is True"),
    ("cores = 8", "cores = 8\nsockets = 1", errors.BadField, r"cpu\.sockets is not a known field"),
    ("ram_bytes = 68719476736", "ram_bytes = -1", errors.BadField, r"cpu\.ram_bytes is -1"),
    ("bandwidth_bytes_per_s = 50000000000.0", "bandwidth_bytes_per_s = nan", errors.BadField, "finite"),
    ("bandwidth_bytes_per_s = 50000000000.0", "bandwidth_bytes_per_s = inf", errors.BadField, "finite"),
    ("bandwidth_bytes_per_s = 50000000000.0", 'bandwidth_bytes_per_s = "50"', errors.BadField, "a number"),
    ("[0.1, 0.5, 1.0]", "[]", errors.BadField, "sparse_densities has no points"),
    ("[0.1, 0.5, 1.0]", "[0.1, 1.0]", errors.BadField, "has 3 points for 2 densities"),
    ("[0.25, 1.0]", "[]", errors.BadField, r"ffn\[0\]\.densities has no points"),
    ("[0.25, 1.0]", "[1.0, 0.25]", errors.BadField, r"ffn\[0\]\.densities\[1\] is 0\.25"),
    ("[22000000000.0, ", "[", errors.BadField, r"gate_first_bytes_per_s has 1 points for 2"),
    ("[21000000000.0, ", "[0.0, ", errors.BadField, r"predicted_bytes_per_s\[0\] is 0\.0"),
    ('row_type = "Q4_K"', 'row_type = "Q4_X"', errors.BadField, r"kernel\[0\]\.row_type is 'Q4_X'"),
    ("fused = true", "fused = 1", errors.BadField, r"kernel\[0\]\.fused is 1, expected true or false"),
    ("sums_bytes_per_s = 6", "sums_bytes_per_s = -6", errors.BadField, r"kernel\[0\]\.sums_bytes_per_s"),
    ("low = 25", "low = 35", errors.BadField, r"spread\[0\] is not 0 <= low <= median <= high"),
    ("low = 25", "low = -25", errors.BadField, r"spread\[0\] is not 0 <= low"),
    ("passes = 7", "passes = 0", errors.BadField, r"spread\[0\]\.passes is 0"),
    ('up_type = "Q4_0"', 'up_type = "none"', errors.BadField, r"up_type is 'none', not a known"),
    ('up_type = "Q4_0"', 'up_type = "Q4_9"', errors.BadField, r"up_type is 'Q4_9', not a known"),
    ("neurons = 14336", "neurons = 0", errors.BadField, r"ffn\[0\]\.neurons is 0"),
    ("[0.1, 0.5, 1.0]", "[0.0, 0.5, 1.0]", errors.BadField, r"sparse_densities\[0\] is 0\.0"),
    ("[0.1, 0.5, 1.0]", "[0.1, 0.1, 1.0]", errors.BadField, r"sparse_densities\[1\] is 0\.1"),
    ("[0.1, 0.5, 1.0]", "[0.1, 0.5, 1.1]", errors.BadField, r"sparse_densities\[2\] is 1\.1"),
    ("[0.1, 0.5, 1.0]", "0.1", errors.BadField, "expected a list"),
    ("[20000000000.0,", "[0.0,", errors.BadField, r"sparse_bandwidth_bytes_per_s\[0\]"),
    ("vram_bytes = 25769803776", "vram_bytes = 0", errors.BadField, r"gpu\.vram_bytes"),
    ("launch_seconds = 4e-06", "launch_seconds = -4e-06", errors.BadField, r"gpu\.launch_seconds"),
    ("latency_seconds = 1e-05", "latency_seconds = -1", errors.BadField, r"link\.latency_seconds"),
    ("[link]", "[links]", errors.BadField, "links is not a known field"),
    (TEXT[TEXT.index("[link]") : TEXT.index("[[ffn]]")], "", errors.BadField, "go together"),
    (TEXT[TEXT.index("[gpu]") : TEXT.index("[link]")], "", errors.BadField, "go together"),
    (TEXT[TEXT.index("[cpu]") : TEXT.index("[gpu]")], "", errors.BadField, "cpu is missing"),
]


@pytest.mark.parametrize(("old", "new", "error", "words"), FAULTS, ids=range(len(FAULTS)))
def test_each_fault_names_its_field(
    tmp_path: Path, old: str, new: str, error: type[errors.FormatError], words: str
) -> None:
    assert old in TEXT
    path = tmp_path / "h.toml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(errors.FormatError, match=words) as caught:
        HardwareProfile.load(path)
    assert type(caught.value) is error
    assert str(caught.value).startswith(str(path))


def test_a_profile_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    wrong = replace(PROFILE, cpu=replace(PROFILE.cpu, ram_bytes=0))
    with pytest.raises(errors.BadField, match="ram_bytes"):
        wrong.save(tmp_path / "h.toml")
    assert not list(tmp_path.iterdir())


def test_a_profile_cut_anywhere_is_refused() -> None:
    complete = HardwareProfile.parse(TEXT, "h.toml")
    for length in range(len(TEXT)):
        try:
            cut = HardwareProfile.parse(TEXT[:length], "h.toml")
        except errors.FormatError:
            continue
        # Cut behind the [cpu] table it is the profile of a machine without a GPU; behind [link], one without
        # curves, and so on; in the last number of a table, one with another number; all are whole files.
        later = {name: getattr(PROFILE, name) for name in ("link", "ffn", "kernel", "spread")}
        assert cut.gpu is None or replace(cut, **later) == complete
