"""Constants of the GGUF container and the caps we read it under.

Source of the layout: the GGUF specification in ggml's ``docs/gguf.md``. The caps are ours: far above any
real model, low enough that a forged header cannot make the reader allocate or loop beyond reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

MAGIC = b"GGUF"
#: Models of the original PowerInfer: GGUF in all but the first four bytes.
ORIGINAL_MAGIC = b"PWRI"
VERSIONS = (2, 3)
WRITTEN_VERSION = 3
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MIN_ALIGNMENT = 8  # the specification asks for a multiple of 8
MAX_ALIGNMENT = 1 << 20
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = 65_535  # the specification's own limit
MAX_NAME_BYTES = 64  # likewise
MAX_STRING_BYTES = 1 << 24
MAX_ARRAY_VALUES = 1 << 24
MAX_DIMENSIONS = 4
MAX_COUNT = (1 << 63) - 1  # sizes beyond this are negative or overflow in every other reader

# The fewest bytes that one entry (key length, key, type, value) or one directory row (name length, name,
# dimension count, one dimension, type, offset) can take: counts are judged by them before anything is read.
MIN_ENTRY_BYTES = 8 + 1 + 4 + 1
MIN_DIRECTORY_ROW_BYTES = 8 + 1 + 4 + 8 + 4 + 8


class ValueType(IntEnum):
    """GGUF's ids of metadata value types."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct's code of each fixed-size type; numpy reads the same codes.
NUMBER_CODES: Mapping[ValueType, str] = MappingProxyType(
    {
        ValueType.UINT8: "<B",
        ValueType.INT8: "<b",
        ValueType.UINT16: "<H",
        ValueType.INT16: "<h",
        ValueType.UINT32: "<I",
        ValueType.INT32: "<i",
        ValueType.FLOAT32: "<f",
        ValueType.BOOL: "<B",
        ValueType.UINT64: "<Q",
        ValueType.INT64: "<q",
        ValueType.FLOAT64: "<d",
    }
)


def aligned(position: int, alignment: int) -> int:
    """``position`` rounded up to a multiple of ``alignment``."""
    return -(-position // alignment) * alignment


def has_control_characters(text: str) -> bool:
    """Whether ``text`` could move a terminal's cursor: names and keys are printed."""
    return any(character < " " or character == "\x7f" for character in text)
