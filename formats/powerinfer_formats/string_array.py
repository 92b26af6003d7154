"""The strings of a GGUF string array, validated at once and decoded only when asked for.

A vocabulary has hundreds of thousands of strings and most commands look at few of them. Finding where they
start takes one pass in Python; their UTF-8 is checked a megabyte at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats.errors import InvalidUTF8, StringTooLong, TruncatedFile
from powerinfer_formats.gguf_layout import MAX_STRING_BYTES

_LENGTH = struct.Struct("<Q")
_CHECKED_AT_ONCE = 1 << 20


class LossyText(str):
    """A string whose bytes were not UTF-8: what could not be decoded is U+FFFD. Only for people to read."""

    __slots__ = ()


class StringArray(Sequence[str]):
    """An immutable sequence of ``str``; ``bytes_at(i)`` gives a string's bytes without decoding."""

    __slots__ = ("_data", "_starts", "lossy")

    def __init__(self, data: bytes, starts: NDArray[np.int64], *, lossy: bool = False) -> None:
        #: Whether bytes were not UTF-8, so that some of these strings are not what the file has.
        self.lossy = lossy
        # starts[i] is where string i begins in data; 8 bytes (its length field) lie between two strings,
        # and starts[n] is the end of the last one plus 8, so that every end is starts[i + 1] - 8.
        self._data = data
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.bytes_at(index).decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        starts = self._starts.tolist()
        data = self._data
        for start, following in pairwise(starts):
            yield str(data[start : following - 8], "utf-8")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray | list | tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have no hash either

    def __repr__(self) -> str:
        return f"StringArray({len(self)} strings)"

    def bytes_at(self, index: int) -> bytes:
        """The UTF-8 bytes of string ``index`` (negative counts from the end; ``IndexError`` beyond)."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"string {index} of {count}")
        index %= count
        return self._data[int(self._starts[index]) : int(self._starts[index + 1]) - 8]


def lossy_strings(strings: StringArray) -> StringArray:
    """``strings`` with U+FFFD for what is not UTF-8."""
    texts = [strings.bytes_at(index).decode("utf-8", "replace").encode() for index in range(len(strings))]
    starts = np.cumsum([8, *(len(text) + 8 for text in texts)], dtype=np.int64)
    return StringArray(b"".join(bytes(8) + text for text in texts), starts, lossy=True)


def scan_strings(
    buffer: bytes | memoryview,
    position: int,
    count: int,
    end: int,
    *,
    file: str,
    what: str,
    checked: bool = True,
) -> tuple[StringArray, int]:
    """Read ``count`` length-prefixed strings that start at ``position``; return them and where they end.

    The caller has checked that ``count * 8`` bytes are there. Raises ``TruncatedFile``, ``StringTooLong``
    or ``InvalidUTF8``, naming ``what`` and the string's index. Copies the strings once and nothing before
    all lengths have been found good. Not ``checked``: strings that are not UTF-8 come with U+FFFD, and the
    array says so.
    """
    starts = _find_starts(buffer, position, count, end, file, what)
    starts -= position
    used = int(starts[-1]) - 8
    region = np.frombuffer(buffer, np.uint8, used, position).copy() if used else np.zeros(0, np.uint8)
    # With the length fields zeroed the region is valid UTF-8 exactly when every string in it is: NUL is
    # ASCII, so no character can reach across it.
    for offset in range(8):
        region[starts[:-1] - 8 + offset] = 0
    data = region.tobytes()
    strings = StringArray(data, starts)
    try:
        _check_utf8(data, starts, file, what)
    except InvalidUTF8:
        if checked:
            raise
        strings = lossy_strings(strings)
    return strings, position + used


def _find_starts(
    buffer: bytes | memoryview, position: int, count: int, end: int, file: str, what: str
) -> NDArray[np.int64]:
    """Absolute start of every string and, last, the end of the last one plus 8: int64 [count + 1]."""
    starts = np.empty(count + 1, np.int64)
    unpack = _LENGTH.unpack_from
    for first in range(0, count, 65_536):
        positions: list[int] = []
        for index in range(first, min(first + 65_536, count)):
            position += 8
            if position > end:
                raise TruncatedFile(file, f"{what}: string {index} of {count} lies past the end, byte {end}")
            length = unpack(buffer, position - 8)[0]
            if length > MAX_STRING_BYTES:
                reason = f"{what}: string {index} has {length} bytes, at most {MAX_STRING_BYTES} are read"
                raise StringTooLong(file, reason)
            positions.append(position)
            position += length
        starts[first : first + len(positions)] = positions
    if position > end:
        raise TruncatedFile(file, f"{what}: the last string ends at byte {position}, the file at {end}")
    starts[count] = position + 8
    return starts


def _check_utf8(data: bytes, starts: NDArray[np.int64], file: str, what: str) -> None:
    view = memoryview(data)
    first, count = 0, len(starts) - 1
    while first < count:
        begin = int(starts[first])
        beyond = int(np.searchsorted(starts, begin + _CHECKED_AT_ONCE, side="right"))
        last = min(max(beyond - 1, first + 1), count)
        try:
            str(view[begin : int(starts[last]) - 8], "utf-8")
        except UnicodeDecodeError as error:
            index = int(np.searchsorted(starts, begin + error.start, side="right")) - 1
            raise InvalidUTF8(file, f"{what}: string {index} is not UTF-8 ({error.reason})") from None
        first = last
