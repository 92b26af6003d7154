"""GGUF files as bytes, spelled out by hand: independent of the writer that is under test."""

import struct

# A small valid file, byte by byte: version 3, one tensor, two entries.
VALID = (
    b"GGUF"  # magic
    b"\x03\x00\x00\x00"  # version
    b"\x01\x00\x00\x00\x00\x00\x00\x00"  # one tensor
    b"\x02\x00\x00\x00\x00\x00\x00\x00"  # two entries
    b"\x14\x00\x00\x00\x00\x00\x00\x00general.architecture"
    b"\x08\x00\x00\x00"  # STRING
    b"\x05\x00\x00\x00\x00\x00\x00\x00llama"
    b"\x05\x00\x00\x00\x00\x00\x00\x00words"
    b"\x09\x00\x00\x00"  # ARRAY
    b"\x08\x00\x00\x00"  # of STRING
    b"\x02\x00\x00\x00\x00\x00\x00\x00"
    b"\x01\x00\x00\x00\x00\x00\x00\x00a"
    b"\x02\x00\x00\x00\x00\x00\x00\x00\xc3\xa9"  # é
    b"\x01\x00\x00\x00\x00\x00\x00\x00w"
    b"\x02\x00\x00\x00"  # two dimensions
    b"\x20\x00\x00\x00\x00\x00\x00\x00"  # 32 columns
    b"\x02\x00\x00\x00\x00\x00\x00\x00"  # 2 rows
    b"\x08\x00\x00\x00"  # Q8_0
    b"\x00\x00\x00\x00\x00\x00\x00\x00"  # offset 0
    b"\x00\x00"  # 158 bytes so far, 160 is the next multiple of 32
    + bytes(range(68))  # 2 rows of 34 bytes
    + b"\x00" * 28  # 68 to 96, the next multiple of 32
)
DATA_START = 160
DATA = bytes(range(68))


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value & (2**64 - 1))


def text(data: bytes) -> bytes:
    """A length-prefixed string."""
    return u64(len(data)) + data


def head(tensors: int, entries: int, version: int = 3) -> bytes:
    return b"GGUF" + u32(version) + u64(tensors) + u64(entries)


def row(name: bytes = b"w", dimensions: tuple[int, ...] = (32,), row_type: int = 0, offset: int = 0) -> bytes:
    """A directory row; ``dimensions`` in the file's order, fastest first."""
    return text(name) + u32(len(dimensions)) + b"".join(map(u64, dimensions)) + u32(row_type) + u64(offset)


def with_entries(*entries: bytes) -> bytes:
    """A file without tensors."""
    return head(0, len(entries)) + b"".join(entries)


def with_tensors(*rows: bytes, data: int = 0, entries: tuple[bytes, ...] = (), alignment: int = 32) -> bytes:
    """A file with the given directory and ``data`` zero bytes of tensor data."""
    directory = head(len(rows), len(entries)) + b"".join(entries) + b"".join(rows)
    return directory + bytes(-len(directory) % alignment) + bytes(data)
