"""Judges the header of a safetensors file of someone else's. Knows nothing of models.

Source of the layout: the README of the safetensors package. Stricter than that package in one point and no
looser in any: every tensor has at most 4 dimensions of at least 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

from powerinfer_formats import errors
from powerinfer_formats import gguf_layout as layout
from powerinfer_formats.gguf_scan import check_tensor_name
from powerinfer_formats.records import parse_json

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_NAME_BYTES = 512
_LENGTH_BYTES = 8
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})

#: Bits of a value of each type that the format defines.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
        "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
        "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    }
)  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file; ``offset`` is absolute, ``shape`` as numpy's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def scan_safetensors(buffer: bytes | memoryview, file: str) -> tuple[dict[str, StoredTensor], int]:
    """All tensors in the order of their places, and where their data begins.

    Raises the named ``FormatError`` of the first fault.
    """
    text, start = _header_text(buffer, file)
    document = parse_json(text, file)
    if type(document) is not dict:
        raise errors.BadSafetensors(file, "has a header that is not a JSON object")
    notes = document.pop("__metadata__", {})
    if type(notes) is not dict or not all(type(value) is str for value in notes.values()):
        raise errors.BadSafetensors(file, "has a '__metadata__' that is not an object of strings")
    if len(document) > layout.MAX_TENSORS:
        raise errors.TooManyTensors(
            file, f"has {len(document)} tensors, at most {layout.MAX_TENSORS} are read"
        )
    rows = [_row(name, fields, start, file) for name, fields in document.items()]
    rows.sort(key=lambda row: row.offset)
    _check_places(rows, start, len(buffer), file)
    return {row.name: row for row in rows}, start


def _header_text(buffer: bytes | memoryview, file: str) -> tuple[str, int]:
    if len(buffer) < _LENGTH_BYTES:
        raise errors.TruncatedFile(file, f"has {len(buffer)} bytes, not even the length of its header")
    length = int.from_bytes(buffer[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise errors.BadSafetensors(
            file, f"announces a header of {length} bytes, at most {MAX_HEADER_BYTES} are read"
        )
    end = _LENGTH_BYTES + length
    if end > len(buffer):
        raise errors.TruncatedFile(file, f"has a header up to byte {end}, the file ends at {len(buffer)}")
    data = bytes(buffer[_LENGTH_BYTES:end])
    if not data.startswith(b"{"):
        raise errors.BadSafetensors(file, "is not a safetensors file: its header does not begin with '{'")
    try:
        return data.decode("utf-8"), end
    except UnicodeDecodeError as error:
        raise errors.InvalidUTF8(file, f"has a header that is not UTF-8 at byte {error.start}") from None


def _row(name: str, fields: Any, start: int, file: str) -> StoredTensor:
    what = f"tensor {name!r}"
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise errors.TensorNameTooLong(file, f"has a tensor name of over {MAX_NAME_BYTES} bytes")
    check_tensor_name(name, file)
    if type(fields) is not dict or fields.keys() != _FIELDS:
        raise errors.BadSafetensors(file, f"{what} is not described by exactly dtype, shape and data_offsets")
    bits = DTYPE_BITS.get(fields["dtype"]) if type(fields["dtype"]) is str else None
    if bits is None:
        raise errors.UnknownTensorType(file, f"{what} is of type {fields['dtype']!r}, which is not known")
    shape, (first, last) = _shape(what, fields["shape"], file), _offsets(what, fields["data_offsets"], file)
    size = prod(shape) * bits
    if size > layout.MAX_COUNT:
        raise errors.TensorTooLarge(file, f"{what} has {size} bits, which overflows 63 bits")
    if size != 8 * (last - first):
        raise errors.WrongShape(
            file,
            f"{what} has {last - first} bytes, "
            f"its shape {list(shape)} of {fields['dtype']} needs {size / 8:g}",
        )
    return StoredTensor(name, fields["dtype"], shape, start + first, last - first)


def _shape(what: str, value: Any, file: str) -> tuple[int, ...]:
    """A number alone counts as a vector of one."""
    if not _whole_numbers(value) or len(value) > layout.MAX_DIMENSIONS:
        raise errors.BadDimensionCount(
            file, f"{what} has a shape that is not a list of at most 4 whole numbers"
        )
    for dimension in value:
        if not 1 <= dimension <= layout.MAX_COUNT:
            raise errors.BadDimension(file, f"{what} has a dimension of {dimension}, expected 1 or more")
    return tuple(value) or (1,)


def _offsets(what: str, value: Any, file: str) -> tuple[int, int]:
    if not _whole_numbers(value) or len(value) != 2 or not 0 <= value[0] < value[1] <= layout.MAX_COUNT:
        raise errors.BadSafetensors(file, f"{what} has data_offsets that are not two numbers in order")
    return value[0], value[1]


def _whole_numbers(value: Any) -> bool:
    return type(value) is list and all(type(item) is int for item in value)


def _check_places(rows: list[StoredTensor], start: int, end: int, file: str) -> None:
    """The tensors follow each other from the header to the end of the file: no gap, no overlap."""
    expected = start
    for row in rows:
        what = f"tensor {row.name!r} is at byte {row.offset}"
        if row.offset < expected:
            raise errors.OverlappingTensors(file, f"{what}, inside the tensor before it, up to {expected}")
        if row.offset > expected:
            raise errors.GapBetweenTensors(file, f"{what}, expected {expected}: bytes between belong to none")
        expected = row.offset + row.nbytes
        if expected > end:
            raise errors.TensorPastEnd(
                file, f"{what} and reaches to {expected}, the file ends at {end}; it is incomplete"
            )
    if expected < end:
        raise errors.TrailingBytes(file, f"the last tensor ends at byte {expected}, the file only at {end}")
