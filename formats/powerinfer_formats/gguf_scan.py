"""Judges the header and the tensor directory of a GGUF file. Knows nothing of models.

Faults in data that does not affect any computation are notices, not errors: bytes after the last tensor,
truth values above 1, and strings that are not UTF-8, unless a tokenizer reads them.

Works on any buffer, so that tests need no files. Everything is checked before it is used: counts against
the bytes that are left, lengths against caps and the end, sizes in whole numbers of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats import gguf_layout as layout
from powerinfer_formats.block_types import BLOCK_SHAPES, REMOVED_TYPES, type_name
from powerinfer_formats.gguf_cursor import Cursor
from powerinfer_formats.gguf_layout import NUMBER_CODES, ValueType, aligned
from powerinfer_formats.string_array import StringArray, scan_strings

Number = int | float | bool
Value = Number | str | NDArray[np.generic] | StringArray

# The meaning of the first four bytes if they are not GGUF's own.
_KNOWN_MAGICS = {
    b"lmgg": "a ggml file from before GGUF",
    b"fmgg": "a ggml file from before GGUF",
    b"tjgg": "a ggml file from before GGUF",
    b"algg": "a LoRA adapter from before GGUF",
    layout.ORIGINAL_MAGIC: "a model of the original PowerInfer",
    b"PK\x03\x04": "a zip archive (a PyTorch checkpoint?)",
}


@dataclass(frozen=True)
class Entry:
    """One metadata entry. ``start`` and ``end`` are the bytes of the whole entry, key included."""

    key: str
    value_type: ValueType
    element_type: ValueType | None
    value: Value
    start: int
    end: int


@dataclass(frozen=True)
class TensorInfo:
    """One row of the directory. ``shape`` is in numpy's order (rows, columns); ``offset`` is absolute."""

    name: str
    row_type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        """Name of the tensor's type in ggml."""
        return type_name(self.row_type)


@dataclass(frozen=True)
class Header:
    """Everything before the tensor data; ``directory_end`` is the length of header and directory.
    ``notices``: faults with which the file was read nevertheless."""

    magic: bytes
    version: int
    alignment: int
    entries: dict[str, Entry]
    tensors: dict[str, TensorInfo]
    directory_end: int
    notices: tuple[str, ...] = ()


def scan_header(buffer: bytes | memoryview, file: str, magics: Collection[bytes] = (layout.MAGIC,)) -> Header:
    """Read and check everything up to the tensor data, and where that data lies in ``buffer``.

    ``magics``: first bytes that are accepted; every other rule is the same for all of them. Raises the named
    ``FormatError`` of the first fault.
    """
    cursor = Cursor(buffer, file)
    magic = _check_magic(cursor, magics)
    version = _check_version(cursor)
    tensor_count = cursor.count(
        layout.MAX_TENSORS, layout.MIN_DIRECTORY_ROW_BYTES, "tensors", errors.TooManyTensors
    )
    entry_count = cursor.count(
        layout.MAX_ENTRIES, layout.MIN_ENTRY_BYTES, "metadata entries", errors.TooManyEntries
    )
    entries: dict[str, Entry] = {}
    for _ in range(entry_count):
        entry = _read_entry(cursor)
        if entry.key in entries:
            raise errors.DuplicateKey(file, f"metadata key {entry.key!r} occurs twice")
        entries[entry.key] = entry
    alignment = _alignment(entries, file)
    rows = _read_directory(cursor, tensor_count)
    tensors = _place_tensors(rows, cursor, alignment)
    return Header(magic, version, alignment, entries, tensors, cursor.position, tuple(cursor.notices))


def scan_readable(
    buffer: bytes | memoryview, file: str, magics: Collection[bytes] = (layout.MAGIC,)
) -> tuple[dict[str, Entry], dict[str, TensorInfo]]:
    """As much of a damaged file's header as makes sense: entries and tensors up to the first fault, the
    offsets of tensors unchecked. For people who want to know what a file was; nothing computes with it."""
    cursor = Cursor(buffer, file)
    entries: dict[str, Entry] = {}
    tensors: dict[str, TensorInfo] = {}
    with suppress(errors.FormatError):
        _check_magic(cursor, magics)
        _check_version(cursor)
        counts = [cursor.number("<Q", "a count") for _ in range(2)]
        for _ in range(min(counts[1], layout.MAX_ENTRIES)):
            entry = _read_entry(cursor)
            entries[entry.key] = entry
        for _ in range(min(counts[0], layout.MAX_TENSORS)):
            row = _read_row(cursor)
            tensors[row.name] = TensorInfo(row.name, row.row_type, row.shape, row.relative, row.nbytes)
    return entries, tensors


def _check_magic(cursor: Cursor, magics: Collection[bytes]) -> bytes:
    start = cursor.need(4, "magic bytes")
    magic = bytes(cursor.buffer[start : start + 4])
    if magic not in magics:
        kind = _KNOWN_MAGICS.get(magic)
        hint = f", which is {kind}" if kind else ""
        raise errors.BadMagic(cursor.file, f"is not a GGUF file: it starts with {magic!r}{hint}, not b'GGUF'")
    return magic


def _check_version(cursor: Cursor) -> int:
    version = cursor.number("<I", "version")
    if version in layout.VERSIONS:
        return version
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if 1 <= swapped <= 0xFFFF:
        raise errors.BigEndianFile(
            cursor.file, f"is a big-endian GGUF file (version {swapped}); only little-endian files are read"
        )
    hint = "; convert the model again with a current converter" if version == 1 else ""
    raise errors.UnsupportedVersion(
        cursor.file, f"is GGUF version {version}, versions 2 and 3 are read{hint}"
    )


# --- metadata ----------------------------------------------------------------------------------------


def scan_entry(data: bytes, file: str) -> Entry:
    """``data`` as one metadata entry. Raises the named ``FormatError`` of the first fault."""
    return _read_entry(Cursor(data, file))


def _read_entry(cursor: Cursor) -> Entry:
    start = cursor.position
    key = cursor.text(layout.MAX_KEY_BYTES, "a metadata key", errors.KeyTooLong)
    if not key:
        raise errors.EmptyKey(cursor.file, f"the metadata key at byte {start} is empty")
    if layout.has_control_characters(key):
        raise errors.BadKey(cursor.file, f"metadata key {key!r} has control characters")
    what = f"metadata {key!r}"
    value_type = _value_type(cursor, what)
    if value_type is not ValueType.ARRAY:
        value = _read_scalar(cursor, value_type, what, checked=_is_read_as_text(key))
        return Entry(key, value_type, None, value, start, cursor.position)
    element_type = _value_type(cursor, f"{what}, array elements")
    if element_type is ValueType.ARRAY:
        raise errors.NestedArray(cursor.file, f"{what} is an array of arrays, which is not read")
    array = _read_array(cursor, element_type, what, checked=_is_read_as_text(key))
    return Entry(key, value_type, element_type, array, start, cursor.position)


def _is_read_as_text(key: str) -> bool:
    """Whether strings of ``key`` must be UTF-8 for the file to mean anything; ``ModelSource.get`` judges the
    others where one is needed."""
    return key.startswith("tokenizer.") or key == "general.architecture"


def _value_type(cursor: Cursor, what: str) -> ValueType:
    number = cursor.number("<I", f"type of {what}")
    try:
        return ValueType(number)
    except ValueError:
        reason = f"{what} has value type {number}, known are 0 to 12"
        raise errors.UnknownValueType(cursor.file, reason) from None


def _read_scalar(cursor: Cursor, value_type: ValueType, what: str, *, checked: bool) -> Number | str:
    if value_type is ValueType.STRING:
        return cursor.text(layout.MAX_STRING_BYTES, what, errors.StringTooLong, checked=checked)
    value = cursor.number(NUMBER_CODES[value_type], what)
    if value_type is ValueType.BOOL:
        if value > 1:
            cursor.notices.append(f"{what} is a truth value of {value}: read as true")
        return bool(value)
    return value


def _read_array(cursor: Cursor, element_type: ValueType, what: str, *, checked: bool) -> Value:
    count = cursor.number("<Q", f"length of {what}")
    if count > layout.MAX_ARRAY_VALUES:
        raise errors.ArrayTooLong(
            cursor.file, f"{what} has {count} values, at most {layout.MAX_ARRAY_VALUES} are read"
        )
    least = 8 if element_type is ValueType.STRING else np.dtype(NUMBER_CODES[element_type]).itemsize
    start = cursor.need(count * least, f"{what}, {count} values")
    if element_type is ValueType.STRING:
        strings, cursor.position = scan_strings(
            cursor.buffer, start, count, cursor.end, file=cursor.file, what=what, checked=checked
        )
        if strings.lossy:
            cursor.notices.append(f"{what} has strings that are not UTF-8")
        return strings
    # A copy, so that metadata outlives the mapping; read-only, so that nobody edits what was validated.
    values = np.frombuffer(cursor.buffer, NUMBER_CODES[element_type], count, start).copy()
    if element_type is ValueType.BOOL:
        if count and int(values.max()) > 1:
            cursor.notices.append(f"{what} has a truth value of {int(values.max())}: read as true")
        values = values.astype(np.bool_)
    values.flags.writeable = False
    return values


def _alignment(entries: dict[str, Entry], file: str) -> int:
    entry = entries.get(layout.ALIGNMENT_KEY)
    if entry is None:
        return layout.DEFAULT_ALIGNMENT
    if entry.value_type is not ValueType.UINT32 or not isinstance(entry.value, int):
        raise errors.BadAlignment(file, f"{entry.key} is of type {entry.value_type.name}, expected UINT32")
    value = entry.value
    if not layout.MIN_ALIGNMENT <= value <= layout.MAX_ALIGNMENT or value & (value - 1):
        raise errors.BadAlignment(
            file,
            f"{entry.key} is {value}, expected a power of two "
            f"from {layout.MIN_ALIGNMENT} to {layout.MAX_ALIGNMENT}",
        )
    return value


# --- directory ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    name: str
    row_type: int
    shape: tuple[int, ...]
    relative: int
    nbytes: int


def _read_directory(cursor: Cursor, count: int) -> list[_Row]:
    rows: list[_Row] = []
    names: set[str] = set()
    for _ in range(count):
        row = _read_row(cursor)
        if row.name in names:
            raise errors.DuplicateTensor(cursor.file, f"tensor {row.name!r} occurs twice")
        names.add(row.name)
        rows.append(row)
    return rows


def _read_row(cursor: Cursor) -> _Row:
    start = cursor.position
    name = cursor.text(layout.MAX_NAME_BYTES, "a tensor name", errors.TensorNameTooLong)
    check_tensor_name(name, cursor.file, f" at byte {start}")
    what = f"tensor {name!r}"
    dimensions = cursor.number("<I", f"{what}, number of dimensions")
    if not 1 <= dimensions <= layout.MAX_DIMENSIONS:
        raise errors.BadDimensionCount(cursor.file, f"{what} has {dimensions} dimensions, expected 1 to 4")
    # The file lists the fastest-varying dimension first; numpy lists it last.
    shape = tuple(cursor.number("<Q", f"{what}, dimensions") for _ in range(dimensions))[::-1]
    row_type = cursor.number("<I", f"{what}, type")
    relative = cursor.number("<Q", f"{what}, offset")
    return _Row(name, row_type, shape, relative, tensor_bytes(name, row_type, shape, cursor.file))


def check_tensor_name(name: str, file: str, where: str = "") -> None:
    """Raise ``EmptyTensorName`` or ``BadTensorName`` unless ``name`` can be printed and looked up."""
    if not name:
        raise errors.EmptyTensorName(file, f"the tensor name{where} is empty")
    if layout.has_control_characters(name):
        raise errors.BadTensorName(file, f"tensor name {name!r} has control characters")


def tensor_bytes(name: str, row_type: int, shape: tuple[int, ...], file: str) -> int:
    """Bytes of a tensor; raises the named error for every shape or type that has no size."""
    for dimension in shape:
        if not 1 <= dimension <= layout.MAX_COUNT:
            shown = dimension - (1 << 64) if dimension > layout.MAX_COUNT else dimension
            raise errors.BadDimension(file, f"tensor {name!r} has a dimension of {shown}, expected 1 or more")
    block = BLOCK_SHAPES.get(row_type)
    if block is None:
        removed = REMOVED_TYPES.get(row_type)
        hint = f" ({removed}, which ggml has removed; requantise the model)" if removed else ""
        raise errors.UnknownTensorType(
            file, f"tensor {name!r} is of type {row_type}, which ggml does not define{hint}"
        )
    if shape[-1] % block.values:
        raise errors.PartialBlock(
            file,
            f"tensor {name!r} has rows of {shape[-1]} values, "
            f"not a whole number of {type_name(row_type)} blocks of {block.values}",
        )
    values = prod(shape)
    nbytes = values // block.values * block.nbytes
    if values > layout.MAX_COUNT or nbytes > layout.MAX_COUNT:
        raise errors.TensorTooLarge(
            file, f"tensor {name!r} has {values} values in {nbytes} bytes, which overflows 63 bits"
        )
    return nbytes


def _place_tensors(rows: list[_Row], cursor: Cursor, alignment: int) -> dict[str, TensorInfo]:
    """Check that the tensors follow each other, aligned and without a gap, within the file. Bytes behind them
    are a notice."""
    directory_end, end, file = cursor.position, cursor.end, cursor.file
    base = aligned(directory_end, alignment)
    tensors: dict[str, TensorInfo] = {}
    expected = previous = 0
    last_end = directory_end
    for row in rows:
        _check_offset(row, previous, expected, alignment, file)
        last_end = base + row.relative + row.nbytes
        if last_end > end:
            raise errors.TensorPastEnd(
                file,
                f"tensor {row.name!r} needs bytes {base + row.relative} to {last_end}, "
                f"the file ends at {end}; the file is incomplete: fetch or copy it again",
            )
        tensors[row.name] = TensorInfo(row.name, row.row_type, row.shape, base + row.relative, row.nbytes)
        previous, expected = row.relative, aligned(row.relative + row.nbytes, alignment)
    if end > aligned(last_end, alignment):
        cursor.notices.append(f"the {end - last_end} bytes behind the last tensor are not used")
    return tensors


def _check_offset(row: _Row, previous: int, expected: int, alignment: int, file: str) -> None:
    def fault(error: Callable[[str, str], errors.FormatError], why: str) -> errors.FormatError:
        return error(file, f"tensor {row.name!r} is at offset {row.relative}, {why}")

    if row.relative % alignment:
        raise fault(errors.UnalignedTensor, f"not a multiple of the alignment {alignment}")
    if row.relative < previous:
        raise fault(errors.TensorsOutOfOrder, f"before the tensor listed before it ({previous})")
    if row.relative < expected:
        raise fault(errors.OverlappingTensors, f"inside the tensor before it, which reaches to {expected}")
    if row.relative > expected:
        raise fault(
            errors.GapBetweenTensors, f"expected {expected}: the bytes between them belong to no tensor"
        )
