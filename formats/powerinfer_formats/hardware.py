"""The hardware profile: the measured speeds and sizes of a machine, a small TOML file. Units are bytes,
seconds and bytes per second.

Measured by ``powerinfer doctor --measure`` or written by hand; ``SPEC.md`` has every field.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from powerinfer_formats.atomic import write_atomic
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.errors import BadDocument, BadField, UnsupportedVersion
from powerinfer_formats.records import RecordReader, read_text, to_plain

VERSION = 2
#: Versions that are read: a file of version 1 is a file of version 2 without the fields added later.
_READ = (1, VERSION)
#: In place of a gate type: an FFN of up and down rows.
NO_GATE = "none"
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True)
class MachineInfo:
    """``date`` is YYYY-MM-DD: when it was measured, or the preset written."""

    name: str
    source: Literal["measured", "preset"]
    date: str


@dataclass(frozen=True)
class CpuInfo:
    """The CPU and its memory.

    ``bandwidth_bytes_per_s`` is for streams. ``sparse_bandwidth_bytes_per_s[i]`` is what reaches the cores,
    counting the bytes of the rows that are read, when a share ``sparse_densities[i]`` of the rows is read
    at random; densities ascend within (0, 1].
    """

    name: str
    cores: int
    isa: str
    bandwidth_bytes_per_s: float
    ram_bytes: int
    sparse_densities: tuple[float, ...]
    sparse_bandwidth_bytes_per_s: tuple[float, ...]


@dataclass(frozen=True)
class GpuInfo:
    """The accelerator. ``launch_seconds`` is one kernel launch, ``sync_seconds`` waiting for the device."""

    name: str
    vram_bytes: int
    bandwidth_bytes_per_s: float
    launch_seconds: float
    sync_seconds: float


@dataclass(frozen=True)
class LinkInfo:
    """The way between CPU memory and the accelerator's."""

    bandwidth_bytes_per_s: float
    latency_seconds: float


@dataclass(frozen=True)
class FFNCurve:
    """What the CPU reaches on cold FFNs of one shape: bytes of weights touched per second.

    The types are names of row types as a split file stores them; ``gate_type`` is :data:`NO_GATE` where up
    rows are what the activation reads. ``dense_bytes_per_s`` is for all neurons;
    item i of the others for a share ``densities[i]`` of active neurons, drawn at random: gate-first touches
    all gate rows and up and down rows of the active neurons, predicted all three rows of those alone. Each
    FFN takes ``overhead_seconds`` besides. ``columns_bytes_per_s``: all neurons with the down projection as a
    source model has it, in the row type of up; 0 where that was not measured.
    """

    width: int
    neurons: int
    gate_type: str
    up_type: str
    down_type: str
    dense_bytes_per_s: float
    densities: tuple[float, ...]
    gate_first_bytes_per_s: tuple[float, ...]
    predicted_bytes_per_s: tuple[float, ...]
    overhead_seconds: float = 0.0
    columns_bytes_per_s: float = 0.0

    @property
    def types(self) -> tuple[str, ...]:
        """Row types of a neuron's rows: gate (if it has one), up, down."""
        return tuple(kind for kind in (self.gate_type, self.up_type, self.down_type) if kind != NO_GATE)


@dataclass(frozen=True)
class KernelRate:
    """What the accelerator reaches on hot rows of one type: bytes of rows per second, of the products of a
    matrix with the input, with the activation, and of the sum of down rows. ``fused``: by this project's
    Triton kernels, else by plain torch operations."""

    row_type: str
    fused: bool
    products_bytes_per_s: float
    sums_bytes_per_s: float


@dataclass(frozen=True)
class DiskInfo:
    """The disk that holds the files of ``folder``. ``direct``: what was measured went past the page cache.

    ``stream_bytes_per_s`` is for reads one after the other; item i of the others for single reads of
    ``read_bytes[i]`` (ascending) at random places, a second, with one and with sixteen of them in flight.
    """

    folder: str
    direct: bool
    stream_bytes_per_s: float
    read_bytes: tuple[int, ...]
    single_reads_per_s: tuple[float, ...]
    deep_reads_per_s: tuple[float, ...]


@dataclass(frozen=True)
class Spread:
    """The spread of a figure over the passes that measured it: the lowest, the median and the highest of
    ``passes``, in the figure's unit. ``figure`` is its path, such as ``ffn[0].gate_first_bytes_per_s[2]``."""

    figure: str
    low: float
    median: float
    high: float
    passes: int


@dataclass(frozen=True)
class HardwareProfile:
    """One machine. ``gpu`` and ``link`` are both there or both None; ``ffn`` holds a curve for each shape
    that was measured, ``kernel`` the accelerator's rates by row type, ``spread`` how sure figures are;
    ``disk`` is there where a model was named to measure it with."""

    machine: MachineInfo
    cpu: CpuInfo
    gpu: GpuInfo | None = None
    link: LinkInfo | None = None
    ffn: tuple[FFNCurve, ...] = ()
    kernel: tuple[KernelRate, ...] = ()
    spread: tuple[Spread, ...] = ()
    disk: DiskInfo | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check ``path``; raises ``FormatError`` naming the field."""
        return cls.parse(read_text(path), path)

    @classmethod
    def parse(cls, text: str, file: str | os.PathLike[str]) -> Self:
        """Check TOML ``text``; ``file`` is named in errors."""
        try:
            document: dict[str, Any] = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
            raise BadDocument(file, f"is not valid TOML: {error}") from None
        version = document.pop("version", None)
        if document.pop("format", None) != "powerinfer-hardware":
            raise BadDocument(file, 'is not a hardware profile: format = "powerinfer-hardware" is missing')
        if version not in _READ or type(version) is not int:
            versions = " and ".join(map(str, _READ))
            raise UnsupportedVersion(
                file,
                f"is a hardware profile of version {version!r}, {versions} are read; measure again with "
                "powerinfer doctor --measure",
            )
        profile = RecordReader(file).read(cls, document)
        _check(profile, file)
        return profile

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` atomically; raises ``BadField`` rather than write a file that ``load`` refuses."""
        text = self.to_toml()
        type(self).parse(text, Path(path))
        with write_atomic(path) as stream:
            stream.write(text.encode("utf-8"))

    def to_toml(self) -> str:
        """The file's text."""
        lines = ['format = "powerinfer-hardware"', f"version = {VERSION}"]
        for table, fields in to_plain(self).items():
            if isinstance(fields, dict):
                lines += _table(f"[{table}]", fields)
            for item in fields if isinstance(fields, list) else ():
                lines += _table(f"[[{table}]]", item)
        return "\n".join(lines) + "\n"


def _table(heading: str, fields: dict[str, Any]) -> list[str]:
    return ["", heading, *(f"{key} = {_toml(value)}" for key, value in fields.items())]


def _toml(value: Any) -> str:
    """One TOML value. Floats are written so that they read back to the same bits."""
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)


def _toml_string(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    shown = "".join(escapes.get(c, c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}") for c in text)
    return f'"{shown}"'


def _check(profile: HardwareProfile, file: str | os.PathLike[str]) -> None:
    checks, cpu, gpu, link = _Checks(file), profile.cpu, profile.gpu, profile.link
    dated = _DATE.fullmatch(profile.machine.date) is not None
    checks.require(dated, "machine.date", "is not of the form YYYY-MM-DD")
    checks.positive(cpu, "cpu", "cores", "bandwidth_bytes_per_s", "ram_bytes")
    checks.densities("cpu.sparse_densities", cpu.sparse_densities)
    checks.rates("cpu.sparse_bandwidth_bytes_per_s", cpu.sparse_bandwidth_bytes_per_s, cpu.sparse_densities)
    for index, curve in enumerate(profile.ffn):
        checks.curve(f"ffn[{index}]", curve)
    for index, rate in enumerate(profile.kernel):
        path = f"kernel[{index}]"
        checks.row_type(f"{path}.row_type", rate.row_type)
        checks.positive(rate, path, "products_bytes_per_s", "sums_bytes_per_s")
    for index, spread in enumerate(profile.spread):
        path = f"spread[{index}]"
        checks.positive(spread, path, "passes")
        ordered = 0 <= spread.low <= spread.median <= spread.high
        checks.require(ordered, path, "is not 0 <= low <= median <= high")
    if profile.disk is not None:
        checks.disk(profile.disk)
    checks.require((gpu is None) == (link is None), "gpu and link", "go together: one of them is missing")
    if gpu is not None and link is not None:
        checks.positive(gpu, "gpu", "vram_bytes", "bandwidth_bytes_per_s")
        checks.not_negative(gpu, "gpu", "launch_seconds", "sync_seconds")
        checks.positive(link, "link", "bandwidth_bytes_per_s")
        checks.not_negative(link, "link", "latency_seconds")


@dataclass(frozen=True)
class _Checks:
    """Rules for the tables of ``file``; each raises ``BadField``."""

    file: str | os.PathLike[str]

    def require(self, condition: bool, path: str, problem: str) -> None:
        if not condition:
            raise BadField(self.file, f"{path} {problem}")

    def positive(self, record: object, table: str, *names: str) -> None:
        for name in names:
            value = getattr(record, name)
            self.require(value > 0, f"{table}.{name}", f"is {value}, expected more than 0")

    def not_negative(self, record: object, table: str, *names: str) -> None:
        for name in names:
            value = getattr(record, name)
            self.require(value >= 0, f"{table}.{name}", f"is {value}, expected 0 or more")

    def row_type(self, path: str, kind: str, *others: str) -> None:
        valid = kind in TensorType.__members__ or kind in others
        self.require(valid, path, f"is {kind!r}, not a known row type")

    def curve(self, path: str, curve: FFNCurve) -> None:
        self.positive(curve, path, "width", "neurons", "dense_bytes_per_s")
        self.not_negative(curve, path, "overhead_seconds", "columns_bytes_per_s")
        self.row_type(f"{path}.gate_type", curve.gate_type, NO_GATE)
        self.row_type(f"{path}.up_type", curve.up_type)
        self.row_type(f"{path}.down_type", curve.down_type)
        self.densities(f"{path}.densities", curve.densities)
        for name in ("gate_first_bytes_per_s", "predicted_bytes_per_s"):
            self.rates(f"{path}.{name}", getattr(curve, name), curve.densities)

    def disk(self, disk: DiskInfo) -> None:
        self.positive(disk, "disk", "stream_bytes_per_s")
        sizes = disk.read_bytes
        ascending = all(below < above for below, above in zip((0, *sizes), sizes, strict=False))
        self.require(bool(sizes) and ascending, "disk.read_bytes", "is not a list of ascending sizes above 0")
        for name in ("single_reads_per_s", "deep_reads_per_s"):
            rates = getattr(disk, name)
            fits = len(rates) == len(sizes) and all(rate > 0 for rate in rates)
            self.require(fits, f"disk.{name}", f"is not a list of {len(sizes)} numbers above 0")

    def densities(self, path: str, densities: tuple[float, ...]) -> None:
        if not densities:
            raise BadField(self.file, f"{path} has no points, expected at least one")
        for index, density in enumerate(densities):
            previous = densities[index - 1] if index else 0.0
            if not previous < density <= 1:
                raise BadField(
                    self.file, f"{path}[{index}] is {density}, expected more than {previous}, up to 1"
                )

    def rates(self, path: str, rates: tuple[float, ...], densities: tuple[float, ...]) -> None:
        if len(rates) != len(densities):
            raise BadField(self.file, f"{path} has {len(rates)} points for {len(densities)} densities")
        for index, rate in enumerate(rates):
            if rate <= 0:
                raise BadField(self.file, f"{path}[{index}] is {rate}, expected more than 0")
