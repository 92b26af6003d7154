"""Checked access to a JSON file of someone else's: each value by name, type and range."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from powerinfer_formats.errors import BadField
from powerinfer_formats.records import parse_json, read_text

_REQUIRED: Any = object()
_MAX_TOKENS = 1 << 22


class Config:
    """An object of a JSON file. A value of null counts as absent. Errors are ``BadField``, with the path."""

    def __init__(self, file: Path, values: Any, path: str = "", read: set[str] | None = None) -> None:
        self.file, self.path = file, path
        #: Names that somebody asked for, with their paths: those of the whole document.
        self._read = set[str]() if read is None else read
        if type(values) is not dict:
            raise BadField(file, f"{path.rstrip('.') or 'the document'} is not an object")
        self.values: dict[str, Any] = values

    @classmethod
    def read(cls, file: Path) -> "Config":
        """The document of ``file``. Raises ``FormatError``."""
        return cls(file, parse_json(read_text(file), file))

    def fail(self, name: str, problem: str) -> BadField:
        """The error about the value ``name``, to be raised by the caller."""
        return BadField(self.file, f"{self.path}{name} {problem}")

    def get(self, name: str) -> Any:
        """The value as it stands; None where there is none."""
        self._read.add(f"{self.path}{name}")
        return self.values.get(name)

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Names here and in sections that were read, with their paths, and their values, which nobody asked
        for; null counts as absent."""
        for name, value in self.values.items():
            path = f"{self.path}{name}"
            if path not in self._read and value is not None:
                yield path, value
            elif path in self._read and type(value) is dict:
                yield from Config(self.file, value, f"{path}.", self._read).unread()

    def has(self, name: str) -> bool:
        """Whether there is a value."""
        return self.get(name) is not None

    def integer(self, name: str, default: Any = _REQUIRED, *, low: int = 1, high: int = 1 << 24) -> int:
        """A whole number within limits."""
        value = self._value(name, default)
        if type(value) is not int:
            raise self.fail(name, f"is {_shown(value)}, expected a whole number")
        if not low <= value <= high:
            raise self.fail(name, f"is {_shown(value)}, expected {low} to {high}")
        return value

    def real(self, name: str, default: Any = _REQUIRED, *, low: float, high: float) -> float:
        """A number within limits."""
        value = self._value(name, default)
        if type(value) not in (int, float):
            raise self.fail(name, f"is {_shown(value)}, expected a number")
        if not low <= value <= high:  # NaN is neither
            raise self.fail(name, f"is {_shown(value)}, expected {low:g} to {high:g}")
        return float(value)

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self._value(name, default)
        if type(value) is not str:
            raise self.fail(name, f"is {_shown(value)}, expected a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A truth value."""
        value = self._value(name, default)
        if type(value) is not bool:
            raise self.fail(name, f"is {_shown(value)}, expected true or false")
        return value

    def items(self, name: str) -> list[Any]:
        """A list; empty where there is none."""
        value = self._value(name, [])
        if type(value) is not list:
            raise self.fail(name, f"is {_shown(value)}, expected a list")
        return value

    def number(self, name: str) -> int:
        """The token id that ``name`` itself is."""
        if not (name.isascii() and name.isdigit() and len(name) <= 7) or int(name) > _MAX_TOKENS:
            raise self.fail(name[:40], f"is no token id up to {_MAX_TOKENS}")
        return int(name)

    def section(self, name: str) -> "Config":
        """An object inside; empty where there is none."""
        return Config(self.file, self._value(name, {}), f"{self.path}{name}.", self._read)

    def at(self, path: str) -> tuple["Config", str]:
        """Where a value is whose name may have those of sections in front of it, with dots."""
        *sections, name = path.split(".")
        place = self
        for section in sections:
            place = place.section(section)
        return place, name

    def _value(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.fail(name, "is missing")
        return default


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = "a huge number" if isinstance(value, int) and value.bit_length() > 1000 else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
