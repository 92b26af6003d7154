"""Reads numbers and strings of a GGUF header one after another, and never beyond the end of the buffer."""

from __future__ import annotations

import struct

from powerinfer_formats import errors
from powerinfer_formats.string_array import LossyText


class Cursor:
    """A position in the buffer that cannot leave it."""

    def __init__(self, buffer: bytes | memoryview, file: str) -> None:
        self.buffer = buffer
        self.file = file
        self.position = 0
        self.end = len(buffer)
        self.notices: list[str] = []

    def need(self, nbytes: int, what: str) -> int:
        """Advance over ``nbytes`` that must be there; return where they start."""
        start = self.position
        if nbytes > self.end - start:
            raise errors.TruncatedFile(
                self.file, f"{what}: {nbytes} bytes expected at byte {start}, the file ends at {self.end}"
            )
        self.position = start + nbytes
        return start

    def number(self, code: str, what: str) -> int:
        """The number of the format ``code`` of :mod:`struct`."""
        start = self.need(struct.calcsize(code), what)
        value: int = struct.unpack_from(code, self.buffer, start)[0]
        return value

    def count(self, cap: int, least_bytes: int, what: str, error: type[errors.FormatError]) -> int:
        """A u64 count of things of at least ``least_bytes`` each: judged before any of them is read."""
        value = self.number("<Q", f"number of {what}")
        room = (self.end - self.position) // least_bytes
        if value > cap:
            raise error(self.file, f"{value} {what} announced, at most {cap} are read")
        if value > room:
            raise error(self.file, f"{value} {what} announced, the rest of the file has room for {room}")
        return value

    def text(self, cap: int, what: str, too_long: type[errors.FormatError], *, checked: bool = True) -> str:
        """A string. Not ``checked``: one that is not UTF-8 is a ``LossyText``, and a notice."""
        length = self.number("<Q", f"length of {what}")
        if length > cap:
            raise too_long(self.file, f"{what} has {length} bytes, at most {cap} are read")
        start = self.need(length, what)
        try:
            return str(self.buffer[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            if checked:
                raise errors.InvalidUTF8(self.file, f"{what} is not UTF-8 ({error.reason})") from None
        self.notices.append(f"{what} is not UTF-8")
        return LossyText(bytes(self.buffer[start : start + length]), "utf-8", "replace")
