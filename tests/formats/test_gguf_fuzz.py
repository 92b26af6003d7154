"""Whatever the bytes: a file opens with tensors that lie inside it, or a FormatError says why not."""

from math import prod

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gguf_bytes import VALID
from powerinfer_formats.block_types import BLOCK_SHAPES
from powerinfer_formats.errors import FormatError
from powerinfer_formats.gguf_scan import Header, scan_header
from powerinfer_formats.string_array import StringArray

SETTINGS = settings(derandomize=True, deadline=None, max_examples=600)


def judge(data: bytes) -> Header | None:
    """The header, checked for consistency with the bytes; None where it is refused."""
    try:
        header = scan_header(data, "fuzzed")
    except FormatError:
        return None
    position = header.directory_end
    assert position <= len(data)
    for info in header.tensors.values():
        block = BLOCK_SHAPES[info.row_type]
        assert info.nbytes == prod(info.shape) // block.values * block.nbytes > 0
        assert info.offset % header.alignment == 0
        assert position <= info.offset
        position = info.offset + info.nbytes
        assert position <= len(data)
    for entry in header.entries.values():
        assert 24 <= entry.start < entry.end <= header.directory_end
        if isinstance(entry.value, StringArray):
            assert all(isinstance(string, str) for string in entry.value)
        elif isinstance(entry.value, np.ndarray):
            assert not entry.value.flags.writeable
    return header


@SETTINGS
@given(st.binary(max_size=400))
@example(VALID)
def test_random_bytes(data: bytes) -> None:
    judge(data)


@SETTINGS
@given(st.binary(max_size=400))
def test_random_bytes_behind_a_good_preamble(data: bytes) -> None:
    judge(VALID[:8] + data)


@SETTINGS
@given(st.integers(0, len(VALID) - 1), st.integers(0, 255))
def test_one_byte_changed(position: int, value: int) -> None:
    changed = bytearray(VALID)
    changed[position] = value
    judge(bytes(changed))


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=2, max_size=8))
def test_several_bytes_changed(changes: list[tuple[int, int]]) -> None:
    changed = bytearray(VALID)
    for position, value in changes:
        changed[position] = value
    judge(bytes(changed))


@SETTINGS
@given(st.integers(0, len(VALID)), st.integers(0, len(VALID)), st.binary(max_size=40))
def test_a_stretch_replaced(start: int, stop: int, replacement: bytes) -> None:
    judge(VALID[:start] + replacement + VALID[stop:])


def test_every_single_bit_flipped() -> None:
    """All 2,048 of them: those in text and weights go unnoticed, the others are refused or consistent."""
    opened = 0
    for position in range(len(VALID)):
        for bit in range(8):
            changed = bytearray(VALID)
            changed[position] ^= 1 << bit
            opened += judge(bytes(changed)) is not None
    # The weights and the paddings (2 + 68 + 28 bytes) are not judged, so at least these open.
    assert opened >= 8 * (2 + 68 + 28)
    assert judge(VALID) is not None
