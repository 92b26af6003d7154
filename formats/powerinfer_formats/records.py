"""Frozen dataclasses from parsed JSON or TOML, and back. Strict: every field, none unknown, exact types.

Numbers must be finite, whole numbers are not taken for truth values, and each error names the path of the
field, such as ``layers[3].seconds.total``. A field with a default may be left out of the document.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from powerinfer_formats.errors import (
    BadDocument,
    BadField,
    BadMagic,
    CannotRead,
    InvalidUTF8,
    NotARegularFile,
    UnsupportedVersion,
)

T = TypeVar("T")
MAX_DOCUMENT_BYTES = 64 << 20
_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a small file.

    Raises ``CannotRead``, ``NotARegularFile``, ``BadDocument`` (too large) or ``InvalidUTF8``.
    """
    where = Path(path)
    if where.exists() and not where.is_file():
        raise NotARegularFile(where, "is not a regular file")
    try:
        with where.open("rb") as stream:
            data = stream.read(MAX_DOCUMENT_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CannotRead(where, f"cannot be opened: {reason}") from None
    if len(data) > MAX_DOCUMENT_BYTES:
        raise BadDocument(where, f"is larger than {MAX_DOCUMENT_BYTES} bytes, more than any such file has")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidUTF8(where, f"is not UTF-8 at byte {error.start}") from None


def parse_json(text: str, file: str | os.PathLike[str]) -> Any:
    """JSON without what JSON does not define: NaN, infinities, a key twice. Raises ``BadDocument``."""

    def refuse_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} occurs twice")
        return result

    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
    except RecursionError:
        raise BadDocument(file, "is nested too deeply") from None
    except ValueError as error:
        raise BadDocument(file, f"is not valid JSON: {error}") from None


def read_header(
    kind: type[T], text: str, file: str | os.PathLike[str], form: tuple[str, int], what: str, again: str = ""
) -> T:
    """The document of a file of ours as the dataclass ``kind``: JSON that begins with the format and the
    version, which must be those of ``form``.

    ``what`` is what such a file holds and ``again`` how to make it anew, for errors: ``BadDocument``,
    ``BadMagic``, ``UnsupportedVersion`` and ``BadField``.
    """
    document = parse_json(text, file)
    if not isinstance(document, dict) or document.pop("format", None) != form[0]:
        raise BadMagic(file, f"does not hold {what}")
    version = document.pop("version", None)
    if version != form[1] or type(version) is not int:
        raise UnsupportedVersion(file, f"is of version {version}, expected {form[1]}{again}")
    return RecordReader(file).read(kind, document)


def dump_header(record: Any, form: tuple[str, int]) -> str:
    """What :func:`read_header` reads, in one line."""
    return dump_json({"format": form[0], "version": form[1], **vars(record)}, indent=None)


def dump_json(record: Any, *, indent: int | None = 2) -> str:
    """A record as JSON text: same record, same bytes. Numbers that JSON lacks raise ``ValueError``."""
    return json.dumps(to_plain(record), indent=indent, ensure_ascii=False, allow_nan=False)


def to_plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as dicts and lists, fields in the order of declaration."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


class RecordReader:
    """Builds dataclasses from parsed values of one file; keeps the file's name for the errors."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = file

    def read(self, kind: type[T], value: Any, path: str = "") -> T:
        """``value`` as an instance of the dataclass ``kind``; raises ``BadField``."""
        result: T = self._record(kind, value, path)
        return result

    def fail(self, path: str, problem: str) -> BadField:
        """The error about the field at ``path``, to be raised by the caller."""
        return BadField(self.file, f"{path or 'the document'} {problem}")

    def _value(self, kind: Any, value: Any, path: str) -> Any:
        origin = get_origin(kind)
        if origin in (Union, types.UnionType):
            return self._union(kind, value, path)
        if origin is Literal:
            if not any(
                value is choice or (type(value) is type(choice) and value == choice)
                for choice in get_args(kind)
            ):
                raise self.fail(
                    path, f"is {_shown(value)}, expected one of {', '.join(map(repr, get_args(kind)))}"
                )
            return value
        if origin is tuple:
            return self._tuple(get_args(kind), value, path)
        if origin is not None and issubclass(origin, Mapping):
            return self._mapping(get_args(kind)[1], value, path)
        if dataclasses.is_dataclass(kind):
            return self._record(typing.cast("type[Any]", kind), value, path)
        return self._plain(kind, value, path)

    def _plain(self, kind: Any, value: Any, path: str) -> Any:
        if kind is float and type(value) is int:
            value = self._to_float(value, path)
        if type(value) is not kind:
            raise self.fail(path, f"is {_shown(value)}, expected {_NAMES[kind]}")
        if kind is float and not math.isfinite(value):
            raise self.fail(path, f"is {value}, expected a finite number")
        return value

    def _to_float(self, value: int, path: str) -> float:
        try:
            return float(value)
        except OverflowError:
            raise self.fail(path, "is larger than the largest number allowed here") from None

    def _union(self, kind: Any, value: Any, path: str) -> Any:
        """Only ``X | None`` is used: a value that may be absent."""
        if value is None:
            return None
        (inner,) = (choice for choice in get_args(kind) if choice is not types.NoneType)
        return self._value(inner, value, path)

    def _tuple(self, items: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
        if type(value) is not list:
            raise self.fail(path, f"is {_shown(value)}, expected a list")
        return tuple(self._value(items[0], item, f"{path}[{index}]") for index, item in enumerate(value))

    def _mapping(self, item_kind: Any, value: Any, path: str) -> dict[str, Any]:
        if type(value) is not dict:
            raise self.fail(path, f"is {_shown(value)}, expected an object")
        return {key: self._value(item_kind, item, _join(path, key)) for key, item in value.items()}

    def _record(self, kind: type[Any], value: Any, path: str) -> Any:
        if type(value) is not dict:
            raise self.fail(path, f"is {_shown(value)}, expected an object")
        hints = typing.get_type_hints(kind)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        for key in value:
            if key not in fields:
                raise self.fail(
                    _join(path, key), f"is not a known field; the known fields are {', '.join(fields)}"
                )
        record: dict[str, Any] = {}
        for name, field in fields.items():
            if name in value:
                record[name] = self._value(hints[name], value[name], _join(path, name))
            elif field.default is dataclasses.MISSING:
                raise self.fail(_join(path, name), "is missing")
        return kind(**record)


def _join(path: str, key: str) -> str:
    shown = key if key.isidentifier() and len(key) <= 100 else repr(key[:100])
    return f"{path}.{shown}" if path else shown


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "null"
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 1000 else "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}…"
