"""Turns metadata values into the bytes of a GGUF header. The counterpart of ``gguf_scan``."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats import gguf_layout as layout
from powerinfer_formats.gguf_layout import NUMBER_CODES, ValueType

Writable = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float] | NDArray[np.generic]


def encode_string(text: str, cap: int, too_long: type[errors.FormatError], what: str, file: str) -> bytes:
    """Length (u64) and UTF-8 bytes; raises where our own reader would refuse the result."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise errors.InvalidUTF8(file, f"{what} cannot be written as UTF-8 ({error.reason})") from None
    if len(data) > cap:
        raise too_long(file, f"{what} has {len(data)} bytes, at most {cap} can be written")
    return struct.pack("<Q", len(data)) + data


def encode_key(key: str, file: str) -> bytes:
    """A metadata key, judged as the reader judges it."""
    if not key:
        raise errors.EmptyKey(file, "a metadata key is empty")
    if layout.has_control_characters(key):
        raise errors.BadKey(file, f"metadata key {key!r} has control characters")
    return encode_string(key, layout.MAX_KEY_BYTES, errors.KeyTooLong, "a metadata key", file)


def encode_entry(key: str, value: Writable, value_type: ValueType | None, file: str) -> bytes:
    """A whole metadata entry: key, type, value.

    ``value_type`` is the type of the value or, for a sequence, of its elements. It may be left out for
    truth values, strings, sequences of strings and numpy arrays; a Python number has no size of its own, so
    there it must be named. Raises ``WrongKeyType`` or ``BadValue`` where value and type do not fit.
    """
    what = f"metadata {key!r}"
    head = encode_key(key, file)
    if isinstance(value, str | bool | int | float):
        kind = value_type if value_type is not None else _type_of_scalar(value, what, file)
        return head + struct.pack("<I", kind) + _encode_scalar(value, kind, what, file)
    kind = value_type if value_type is not None else _type_of_elements(value, what, file)
    if kind is ValueType.ARRAY:
        raise errors.NestedArray(file, f"{what} is an array of arrays, which is not written")
    if len(value) > layout.MAX_ARRAY_VALUES:
        raise errors.ArrayTooLong(
            file, f"{what} has {len(value)} values, at most {layout.MAX_ARRAY_VALUES} can be written"
        )
    elements = _encode_elements(value, kind, what, file)
    return head + struct.pack("<IIQ", ValueType.ARRAY, kind, len(value)) + elements


def _type_of_scalar(value: bool | int | float | str, what: str, file: str) -> ValueType:
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, str):
        return ValueType.STRING
    raise errors.WrongKeyType(file, f"{what}: the type of the number {value} has to be named")


def _type_of_elements(value: Sequence[object] | NDArray[np.generic], what: str, file: str) -> ValueType:
    if isinstance(value, np.ndarray):
        if value.dtype == np.bool_:
            return ValueType.BOOL
        code = value.dtype.newbyteorder("<").str
        for kind, number_type in NUMBER_CODES.items():
            if kind is not ValueType.BOOL and np.dtype(number_type).str == code:
                return kind
    elif len(value) and all(isinstance(element, str) for element in value):
        return ValueType.STRING
    raise errors.WrongKeyType(file, f"{what}: the type of the array's elements has to be named")


def _encode_scalar(value: bool | int | float | str, kind: ValueType, what: str, file: str) -> bytes:
    if kind is ValueType.STRING:
        if not isinstance(value, str):
            raise errors.WrongKeyType(file, f"{what} is {value!r}, expected a string")
        return encode_string(value, layout.MAX_STRING_BYTES, errors.StringTooLong, what, file)
    return _encode_elements([value], kind, what, file)


def _encode_elements(
    values: Sequence[object] | NDArray[np.generic], kind: ValueType, what: str, file: str
) -> bytes:
    if kind is ValueType.STRING:
        return _encode_strings(values, what, file)
    if kind is ValueType.ARRAY:
        raise errors.WrongKeyType(file, f"{what}: ARRAY is not the type of a single value")
    array = np.asarray(values)
    _check_kind(array, kind, what, file)
    if array.size == 0:
        return b""
    target = np.dtype(NUMBER_CODES[kind])
    if target.kind == "f":
        return array.astype(target).tobytes()
    least, most = (0, 1) if kind is ValueType.BOOL else (int(np.iinfo(target).min), int(np.iinfo(target).max))
    if int(array.min()) < least or int(array.max()) > most:
        raise errors.BadValue(file, f"{what} holds a value outside {kind.name} ({least} to {most})")
    return array.astype(target).tobytes()


def _encode_strings(values: Sequence[object] | NDArray[np.generic], what: str, file: str) -> bytes:
    try:  # vocabularies have hundreds of thousands: all at once, and one by one only to name the fault
        data = [value.encode("utf-8") for value in values]  # type: ignore[union-attr]
    except (AttributeError, UnicodeEncodeError):
        data = []
    lengths = list(map(len, data))
    if len(data) != len(values) or max(lengths, default=0) > layout.MAX_STRING_BYTES:
        return b"".join(
            _encode_scalar(value, ValueType.STRING, what, file)  # type: ignore[arg-type]
            for value in values
        )
    packed = struct.pack(f"<{len(lengths)}Q", *lengths)
    return b"".join(packed[8 * index : 8 * index + 8] + text for index, text in enumerate(data))


def _check_kind(values: NDArray[np.generic], kind: ValueType, what: str, file: str) -> None:
    if values.ndim != 1:
        raise errors.NestedArray(file, f"{what} has {values.ndim} dimensions, only one can be written")
    allowed = {"BOOL": "b", "FLOAT32": "iuf", "FLOAT64": "iuf"}.get(kind.name, "iu")
    if values.size and values.dtype.kind not in allowed:
        raise errors.WrongKeyType(
            file, f"{what} cannot be written as {kind.name}: it holds {values.dtype} values"
        )
