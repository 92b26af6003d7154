"""A delta turns a model's FFNs into other ones: small integers that are added to its weights.

All values are integers times powers of two, so that sums of products are exact in double precision, in
whatever order they are added: the same delta makes the same model, bit for bit, on every machine.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, Literal, Self

import numpy as np
import zstandard
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats.atomic import write_atomic
from powerinfer_formats.block_types import RelufiedType, WrittenType
from powerinfer_formats.frames import FrameReader, require_one_frame, require_ratio
from powerinfer_formats.records import RecordReader, dump_json, parse_json
from powerinfer_formats.safetensors_file import SafetensorsReader, open_safetensors, safetensors_parts

FORMAT, VERSION = "powerinfer-delta", 3
KINDS = ("gate", "up", "down")
#: Unpacked: a change of every FFN weight of a model of some 4 billion, a byte each.
MAX_BYTES = 1 << 32
MAX_HEADER_BYTES = 16 << 20
#: |exponent| of a column, and the spread of a low-rank product's exponents: 14 bits of a product, at most
#: 2^12 terms, and this spread stay within the 53 bits of a double.
MAX_EXPONENT, MAX_SPREAD, MAX_RANK = 63, 27, 1 << 12
#: Types of gate and up whose rounding passes errors on, so that the delta says how.
PASSED_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
#: Scales of neurons lie between this and one over it.
MIN_SCALE = 2.0**-20
_MAGIC = b"\x28\xb5\x2f\xfd"
#: Codes have no repetitions to look for: higher levels take minutes and save nothing.
_LEVEL = 3
Codes = NDArray[np.int8]


@dataclass(frozen=True)
class DeltaQuality:
    """Perplexity of source and result on a text that neither training nor choice has seen; ``density`` is the
    share of neurons that are active in the result."""

    text: str
    tokens: int
    dense_perplexity: float
    perplexity: float
    density: float


@dataclass(frozen=True)
class DeltaHeader:
    """The model to which the delta belongs, and the model that it makes.

    ``cut``: with fatrelu, a gate must be above this value. With ``rank`` 0, gate and up change by whole
    matrices. ``row_type`` is the type of gate and up, ``down_type`` the type of down.
    """

    fingerprint: str
    model_name: str
    activation: Literal["relu", "drelu", "fatrelu"]
    cut: float
    row_type: RelufiedType
    down_type: WrittenType
    layers: int
    width: int
    neurons: int
    rank: int
    result_sha256: str
    learned_tokens: int
    texts: tuple[str, ...]
    quality: tuple[DeltaQuality, ...]
    tool_version: str


@dataclass(frozen=True, eq=False)
class Scaled:
    """A matrix (rows, columns) of ``codes`` · 2^``exponents``, an exponent for every column."""

    codes: Codes
    exponents: Codes

    def values(self) -> NDArray[np.float64]:
        """The matrix, exact."""
        return np.ldexp(self.codes.astype(np.float64), self.exponents.astype(np.int32))


@dataclass(frozen=True, eq=False)
class Change:
    """The change added to a matrix: ``outward`` (rows, columns), or outward · inwardᵀ with ``inward``
    (columns, rank)."""

    outward: Scaled
    inward: Scaled | None = None

    def values(self) -> NDArray[np.float64]:
        """The change (rows, columns), exact."""
        outward = self.outward.values()
        return outward if self.inward is None else outward @ self.inward.values().T


@dataclass(frozen=True, eq=False)
class Passing:
    """How rounding gate and up of a layer knows what they read: ``shares`` (width, width), zero up to the
    diagonal, is what columns *j* after column *i* get of its error, negative; the inputs of a column have
    about the mean square 2^``sizes`` (width)."""

    shares: Scaled
    sizes: Codes


@dataclass(frozen=True, eq=False)
class Delta:
    """``changes`` holds, for every layer, the change of each of ``KINDS``.

    ``scales`` exists only with fatrelu. It holds a factor for each neuron of every layer (neurons, float32).
    Before the change, the neuron's row of gate is multiplied by this factor, and its row of up is divided by
    it. So one ``cut`` acts as a separate threshold for each neuron.
    ``passings`` exists only with a row type of ``PASSED_TYPES``, one for every layer.
    """

    header: DeltaHeader
    changes: tuple[Mapping[str, Change], ...] = field(repr=False)
    scales: tuple[NDArray[np.float32], ...] = field(default=(), repr=False)
    passings: tuple[Passing, ...] = field(default=(), repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check ``path``; raises ``FormatError``."""
        where = Path(path)
        with tempfile.TemporaryFile() as content:  # without a name: nothing of it outlives the process
            _unpack(where, content)
            content.flush()
            with open_safetensors(where, f"/proc/self/fd/{content.fileno()}") as reader:
                header = _read_header(reader, where)
                changes = tuple(
                    {kind: _take_change(reader, header, layer, kind) for kind in KINDS}
                    for layer in range(header.layers)
                )
                scales = tuple(_take_scales(reader, header, layer) for layer in _scaled_layers(header))
                passings = tuple(_take_passing(reader, header, layer) for layer in _passing_layers(header))
                reader.finish()
        return cls(header, changes, scales, passings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` atomically."""
        tensors: dict[str, NDArray[np.int8] | NDArray[np.float32]] = {
            _name(layer, "neuron", "scale"): scales for layer, scales in enumerate(self.scales)
        }
        for layer, kinds in enumerate(self.changes):
            for kind, change in kinds.items():
                for part, scaled in (("outward", change.outward), ("inward", change.inward)):
                    if scaled is not None:
                        tensors[_name(layer, kind, part)] = np.ascontiguousarray(scaled.codes)
                        tensors[_name(layer, kind, part + "_exponent")] = scaled.exponents
        for layer, passing in enumerate(self.passings):
            tensors[_name(layer, "input", "passing")] = np.ascontiguousarray(passing.shares.codes)
            tensors[_name(layer, "input", "passing_exponent")] = passing.shares.exponents
            tensors[_name(layer, "input", "size")] = passing.sizes
        document = dump_json({"format": FORMAT, "version": VERSION, **vars(self.header)}, indent=None)
        content = b"".join(safetensors_parts(document, tensors))
        with write_atomic(path) as stream:
            stream.write(zstandard.ZstdCompressor(level=_LEVEL).compress(content))

    def require_model(self, fingerprint: str, name: str, file: str | os.PathLike[str]) -> None:
        """Raise ``OtherModel``, with both names, unless this was made for that very model."""
        if fingerprint != self.header.fingerprint:
            raise errors.OtherModel(file, f"was made for {self.header.model_name!r}, not for {name!r}")


def _unpack(where: Path, target: IO[bytes]) -> None:
    """Write the content of the frame at ``where`` to ``target``, once its header fits the announced size."""
    if where.exists() and not where.is_file():
        raise errors.NotARegularFile(where, "is not a regular file")
    try:
        with where.open("rb") as stream:
            reader = FrameReader(where, stream, _announced(where, stream))
            length = reader.take(8)
            nbytes = int.from_bytes(length, "little")
            if not 2 <= nbytes <= min(MAX_HEADER_BYTES, reader.left):
                raise errors.BadFrame(where, f"announces a header of {nbytes} bytes, which cannot be")
            header = reader.take(nbytes)
            _check_size(where, header, reader.left)
            target.write(length + header)
            reader.copy_to(target)
    except OSError as error:
        raise errors.CannotRead(where, f"cannot be read: {error.strerror or error}") from None


def _announced(where: Path, stream: BinaryIO) -> int:
    packed = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(32)
    stream.seek(0)
    if head[:4] != _MAGIC:
        raise errors.BadMagic(where, "is not a delta: no zstd frame")
    try:
        size = zstandard.frame_content_size(head)
    except zstandard.ZstdError as error:
        raise errors.BadFrame(where, f"is not one whole zstd frame: {error}") from None
    if not 8 < size <= MAX_BYTES:
        raise errors.BadFrame(where, f"its frame announces {size} bytes, expected 9 to {MAX_BYTES}")
    require_ratio(where, packed, size)
    require_one_frame(where, stream, head)
    stream.seek(0)
    return size


def _check_size(where: Path, header: bytes, left: int) -> None:
    """The tensors that the header of safetensors names fill what is left, to the byte."""
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.InvalidUTF8(where, f"its header is not UTF-8 at byte {error.start}") from None
    document = parse_json(text, where)
    rows = document.items() if isinstance(document, dict) else ()
    offsets = [row.get("data_offsets") for name, row in rows if name != "__metadata__" and type(row) is dict]
    ends = [pair[1] for pair in offsets if type(pair) is list and len(pair) == 2 and type(pair[1]) is int]
    if max(ends, default=0) != left:
        raise errors.BadFrame(where, f"its header names {max(ends, default=0)} bytes, its frame has {left}")


def _read_header(reader: SafetensorsReader, where: Path) -> DeltaHeader:
    document = parse_json(reader.document(), where)
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise errors.BadMagic(where, "does not hold a delta")
    version = document.pop("version", None)
    if version != VERSION:
        raise errors.UnsupportedVersion(where, f"is of version {version}, expected {VERSION}")
    header = RecordReader(where).read(DeltaHeader, document)
    limits = {"layers": 4096, "width": 1 << 24, "neurons": 1 << 24}
    for name, most in limits.items():
        if not 1 <= getattr(header, name) <= most:
            raise errors.BadField(where, f"{name} is {getattr(header, name)}, expected 1 to {most}")
    if not 0 <= header.rank <= min(header.width, MAX_RANK):
        raise errors.BadField(where, f"rank is {header.rank}, expected 0 to the width, at most {MAX_RANK}")
    if not 0 <= header.cut < 1e6 or (header.cut and header.activation != "fatrelu"):
        raise errors.BadField(where, f"cut is {header.cut}, expected 0 to 1e6, and 0 without fatrelu")
    for name in ("fingerprint", "result_sha256"):
        value = getattr(header, name)
        if len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise errors.BadField(where, f"{name} is not 64 hexadecimal digits")
    return header


def _scaled_layers(header: DeltaHeader) -> range:
    return range(header.layers if header.activation == "fatrelu" else 0)


def _passing_layers(header: DeltaHeader) -> range:
    return range(header.layers if header.row_type in PASSED_TYPES else 0)


def _take_passing(reader: SafetensorsReader, header: DeltaHeader, layer: int) -> Passing:
    width = header.width
    shares = _take(reader, layer, "input", "passing", (width, width))
    if np.tril(shares.codes).any():
        raise errors.BadValue(reader.path, f"layer {layer}: errors are passed on to columns before their own")
    sizes = reader.take(_name(layer, "input", "size"), "I8", (width,))
    if int(np.abs(sizes.astype(np.int16)).max()) > MAX_EXPONENT:
        raise errors.BadValue(reader.path, f"layer {layer}: a size of inputs is beyond ±{MAX_EXPONENT}")
    return Passing(shares, sizes)


def _take_scales(reader: SafetensorsReader, header: DeltaHeader, layer: int) -> NDArray[np.float32]:
    scales: NDArray[np.float32] = reader.take(_name(layer, "neuron", "scale"), "F32", (header.neurons,))
    if not np.all((scales >= MIN_SCALE) & (scales <= 1 / MIN_SCALE)):
        raise errors.BadValue(
            reader.path, f"layer {layer}: a neuron's scale is not within {MIN_SCALE:g} to {1 / MIN_SCALE:g}"
        )
    return scales


def _take_change(reader: SafetensorsReader, header: DeltaHeader, layer: int, kind: str) -> Change:
    rows, columns = header.neurons, header.width
    if kind == "down":
        rows, columns = columns, rows
    if kind == "down" or not header.rank:
        return Change(_take(reader, layer, kind, "outward", (rows, columns)))
    outward = _take(reader, layer, kind, "outward", (rows, header.rank))
    inward = _take(reader, layer, kind, "inward", (columns, header.rank))
    exponents = outward.exponents.astype(np.int32) + inward.exponents
    if int(np.ptp(exponents)) > MAX_SPREAD:
        raise errors.BadValue(
            reader.path, f"layer {layer}, {kind}: exponents more than {MAX_SPREAD} apart; sums are not exact"
        )
    return Change(outward, inward)


def _take(reader: SafetensorsReader, layer: int, kind: str, part: str, shape: tuple[int, int]) -> Scaled:
    codes = reader.take(_name(layer, kind, part), "I8", shape)
    exponents = reader.take(_name(layer, kind, part + "_exponent"), "I8", shape[1:])
    if int(np.abs(exponents.astype(np.int16)).max()) > MAX_EXPONENT:
        raise errors.BadValue(reader.path, f"layer {layer}, {kind}: an exponent is beyond ±{MAX_EXPONENT}")
    return Scaled(codes, exponents)


def _name(layer: int, kind: str, part: str) -> str:
    return f"blk.{layer}.{kind}_{part}"
