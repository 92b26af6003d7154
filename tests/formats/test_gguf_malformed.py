"""Files that must not open, each with the error that names its fault."""

import re
from pathlib import Path

import pytest

from gguf_bytes import VALID, head, row, text, u32, u64, with_entries, with_tensors
from powerinfer_formats import errors
from powerinfer_formats.gguf_reader import GGUFFile

ALIGNMENT = text(b"general.alignment")

MALFORMED: list[tuple[str, bytes, type[errors.FormatError], str]] = [
    # --- preamble
    ("empty", b"", errors.TruncatedFile, "empty"),
    ("one byte", b"G", errors.TruncatedFile, "magic"),
    ("text", b"Hello, world", errors.BadMagic, "not a GGUF file"),
    ("lower case", b"gguf\x03\x00\x00\x00", errors.BadMagic, "b'gguf'"),
    ("older ggml", b"tjgg\x03\x00\x00\x00", errors.BadMagic, "before GGUF"),
    ("PWRI", b"PWRI\x03\x00\x00\x00", errors.BadMagic, "original PowerInfer"),
    ("zip", b"PK\x03\x04\x14\x00\x00\x00", errors.BadMagic, "zip"),
    ("no version", b"GGUF", errors.TruncatedFile, "version"),
    ("version 0", head(0, 0, version=0), errors.UnsupportedVersion, "version 0"),
    ("version 1", b"GGUF\x01\x00\x00\x00" + bytes(8), errors.UnsupportedVersion, "current converter"),
    ("version 4", head(0, 0, version=4), errors.UnsupportedVersion, "versions 2 and 3"),
    ("big endian 3", b"GGUF\x00\x00\x00\x03" + bytes(16), errors.BigEndianFile, "version 3"),
    ("big endian 2", b"GGUF\x00\x00\x00\x02" + bytes(16), errors.BigEndianFile, "little-endian"),
    # --- counts
    ("no tensor count", b"GGUF\x03\x00\x00\x00", errors.TruncatedFile, "number of tensors"),
    ("no entry count", b"GGUF\x03\x00\x00\x00" + u64(0), errors.TruncatedFile, "number of metadata"),
    ("tensors beyond the file", head(1, 0), errors.TooManyTensors, "room for 0"),
    ("tensors beyond the cap", head(2**17 + 1, 0), errors.TooManyTensors, "at most 131072"),
    ("all the tensors", head(2**64 - 1, 0), errors.TooManyTensors, "announced"),
    ("entries beyond the file", head(0, 1), errors.TooManyEntries, "room for 0"),
    ("entries beyond the cap", head(0, 2**16 + 1), errors.TooManyEntries, "at most 65536"),
    ("all the entries", head(0, 2**64 - 1), errors.TooManyEntries, "announced"),
    # --- keys
    ("empty key", with_entries(text(b"") + u32(4) + u32(1)), errors.EmptyKey, "at byte 24"),
    ("key too long", with_entries(u64(65_536) + b"k" * 65_536), errors.KeyTooLong, "at most 65535"),
    (
        "key length overflows",
        with_entries(u64(2**64 - 1) + bytes(8)),
        errors.KeyTooLong,
        "18446744073709551615",
    ),
    ("key beyond the file", with_entries(u64(40) + b"short" * 2), errors.TruncatedFile, "metadata key"),
    ("key not UTF-8", with_entries(text(b"\xff\xfe") + u32(4) + u32(1)), errors.InvalidUTF8, "key"),
    ("key a surrogate", with_entries(text(b"\xed\xa0\x80") + u32(4) + u32(1)), errors.InvalidUTF8, "key"),
    ("key with escape", with_entries(text(b"a\x1b[2J") + u32(4) + u32(1)), errors.BadKey, "control"),
    ("key with NUL", with_entries(text(b"a\x00b") + u32(4) + u32(1)), errors.BadKey, "control"),
    ("key with DEL", with_entries(text(b"a\x7fb") + u32(4) + u32(1)), errors.BadKey, "control"),
    ("key twice", with_entries(*[text(b"kk") + u32(4) + u32(1)] * 2), errors.DuplicateKey, "'kk'"),
    ("key without a type", with_entries(text(b"a" * 8)), errors.TruncatedFile, "type of"),
    # --- values
    ("value type 13", with_entries(text(b"kk") + u32(13) + bytes(8)), errors.UnknownValueType, "13"),
    ("value type huge", with_entries(text(b"kk") + u32(2**32 - 1)), errors.UnknownValueType, "0 to 12"),
    ("no value", with_entries(text(b"kk") + u32(4)), errors.TruncatedFile, "4 bytes expected at byte 38"),
    ("half a value", with_entries(text(b"kkkk") + u32(10) + bytes(7)), errors.TruncatedFile, "'kkkk'"),
    (
        "string not UTF-8",
        with_entries(text(b"tokenizer.k") + u32(8) + text(b"ab\xc3")),
        errors.InvalidUTF8,
        "tokenizer.k",
    ),
    (
        "string overlong UTF-8",
        with_entries(text(b"tokenizer.k") + u32(8) + text(b"\xc0\x80")),
        errors.InvalidUTF8,
        "tokenizer.k",
    ),
    (
        "string beyond the file",
        with_entries(text(b"kk") + u32(8) + u64(9) + b"a"),
        errors.TruncatedFile,
        "'kk'",
    ),
    (
        "string above the cap",
        with_entries(text(b"kk") + u32(8) + u64(2**24 + 1)),
        errors.StringTooLong,
        "16777216",
    ),
    ("string length negative", with_entries(text(b"kk") + u32(8) + u64(-1)), errors.StringTooLong, "bytes"),
    # --- arrays
    (
        "array of arrays",
        with_entries(text(b"kk") + u32(9) + u32(9) + u64(0)),
        errors.NestedArray,
        "array of arrays",
    ),
    (
        "array of type 13",
        with_entries(text(b"kk") + u32(9) + u32(13) + u64(0)),
        errors.UnknownValueType,
        "elements",
    ),
    ("array without a type", with_entries(text(b"kkkk") + u32(9)), errors.TruncatedFile, "elements"),
    ("array without a length", with_entries(text(b"kkkk") + u32(9) + u32(4)), errors.TruncatedFile, "length"),
    (
        "array beyond the file",
        with_entries(text(b"kk") + u32(9) + u32(4) + u64(3) + bytes(11)),
        errors.TruncatedFile,
        "3 values",
    ),
    (
        "array above the cap",
        with_entries(text(b"kk") + u32(9) + u32(0) + u64(2**24 + 1)),
        errors.ArrayTooLong,
        "at most 16777216",
    ),
    (
        "array length overflows",
        with_entries(text(b"kk") + u32(9) + u32(10) + u64(2**61)),
        errors.ArrayTooLong,
        "kk",
    ),
    (
        "strings beyond the file",
        with_entries(text(b"kk") + u32(9) + u32(8) + u64(2) + text(b"a")),
        errors.TruncatedFile,
        "2 values",
    ),
    (
        "second string beyond",
        with_entries(text(b"kk") + u32(9) + u32(8) + u64(2) + text(b"a" * 20)),
        errors.TruncatedFile,
        "string 1 of 2",
    ),
    (
        "last string beyond",
        with_entries(text(b"kk") + u32(9) + u32(8) + u64(2) + text(b"a") + u64(5) + b"abcd"),
        errors.TruncatedFile,
        "last string",
    ),
    (
        "string of an array too long",
        with_entries(text(b"kk") + u32(9) + u32(8) + u64(1) + u64(2**63)),
        errors.StringTooLong,
        "string 0",
    ),
    (
        "string of an array not UTF-8",
        with_entries(
            text(b"tokenizer.k") + u32(9) + u32(8) + u64(3) + text(b"a") + text(b"") + text(b"b\xff")
        ),
        errors.InvalidUTF8,
        "string 2",
    ),
    (
        "character across two strings",
        with_entries(text(b"tokenizer.k") + u32(9) + u32(8) + u64(2) + text(b"a\xc3") + text(b"\xa9")),
        errors.InvalidUTF8,
        "string 0",
    ),
    # --- alignment
    ("alignment 0", with_entries(ALIGNMENT + u32(4) + u32(0)), errors.BadAlignment, "is 0"),
    ("alignment 4", with_entries(ALIGNMENT + u32(4) + u32(4)), errors.BadAlignment, "from 8"),
    ("alignment 48", with_entries(ALIGNMENT + u32(4) + u32(48)), errors.BadAlignment, "power of two"),
    ("alignment 2^31", with_entries(ALIGNMENT + u32(4) + u32(2**31)), errors.BadAlignment, "to 1048576"),
    ("alignment as u64", with_entries(ALIGNMENT + u32(10) + u64(32)), errors.BadAlignment, "UINT64"),
    ("alignment as i32", with_entries(ALIGNMENT + u32(5) + u32(32)), errors.BadAlignment, "INT32"),
    ("alignment as text", with_entries(ALIGNMENT + u32(8) + text(b"32")), errors.BadAlignment, "STRING"),
    (
        "alignment as array",
        with_entries(ALIGNMENT + u32(9) + u32(4) + u64(1) + u32(32)),
        errors.BadAlignment,
        "ARRAY",
    ),
    # --- tensor names
    ("no name", with_tensors(row(b""), data=128), errors.EmptyTensorName, "at byte 24"),
    ("name too long", with_tensors(row(b"n" * 65), data=128), errors.TensorNameTooLong, "at most 64"),
    (
        "name length overflows",
        with_tensors(u64(2**64 - 1) + bytes(40)),
        errors.TensorNameTooLong,
        "1844674407",
    ),
    ("name not UTF-8", with_tensors(row(b"\x80"), data=128), errors.InvalidUTF8, "tensor name"),
    ("name with newline", with_tensors(row(b"a\nb"), data=128), errors.BadTensorName, "control"),
    ("name twice", with_tensors(row(), row(offset=128), data=256), errors.DuplicateTensor, "'w'"),
    # --- dimensions
    ("no dimensions", with_tensors(row(dimensions=()), data=128), errors.BadDimensionCount, "0 dimensions"),
    (
        "five dimensions",
        with_tensors(row(dimensions=(32, 1, 1, 1, 1)), data=128),
        errors.BadDimensionCount,
        "5 dimensions",
    ),
    (
        "2^32 - 1 dimensions",
        with_tensors(text(b"w") + u32(2**32 - 1) + bytes(64)),
        errors.BadDimensionCount,
        "4294967295",
    ),
    ("dimension 0", with_tensors(row(dimensions=(32, 0)), data=128), errors.BadDimension, "dimension of 0"),
    (
        "dimension -1",
        with_tensors(row(dimensions=(32, -1)), data=128),
        errors.BadDimension,
        "dimension of -1",
    ),
    ("dimension -2^63", with_tensors(row(dimensions=(2**63,))), errors.BadDimension, "-9223372036854775808"),
    ("values overflow", with_tensors(row(dimensions=(2**32, 2**32))), errors.TensorTooLarge, "63 bits"),
    ("bytes overflow", with_tensors(row(dimensions=(2**62,))), errors.TensorTooLarge, "63 bits"),
    (
        "four dimensions overflow",
        with_tensors(row(dimensions=(2**31,) * 4)),
        errors.TensorTooLarge,
        "63 bits",
    ),
    # --- tensor types
    ("type 42", with_tensors(row(row_type=42), data=128), errors.UnknownTensorType, "type 42"),
    ("type 2^32 - 1", with_tensors(row(row_type=2**32 - 1), data=128), errors.UnknownTensorType, "ggml"),
    ("type removed", with_tensors(row(row_type=31), data=128), errors.UnknownTensorType, "Q4_0_4_4"),
    (
        "part of a block",
        with_tensors(row(dimensions=(33,), row_type=8), data=128),
        errors.PartialBlock,
        "Q8_0",
    ),
    (
        "part of a super-block",
        with_tensors(row(dimensions=(32, 8), row_type=12), data=160),
        errors.PartialBlock,
        "blocks of 256",
    ),
    # --- places
    ("offset unaligned", with_tensors(row(offset=1), data=192), errors.UnalignedTensor, "offset 1"),
    (
        "offset unaligned by the key",
        with_tensors(
            row(), row(b"v", offset=128 + 32), data=512, alignment=64, entries=(ALIGNMENT + u32(4) + u32(64),)
        ),
        errors.UnalignedTensor,
        "alignment 64",
    ),
    ("first offset not 0", with_tensors(row(offset=32), data=160), errors.GapBetweenTensors, "expected 0"),
    ("gap", with_tensors(row(), row(b"v", offset=160), data=288), errors.GapBetweenTensors, "expected 128"),
    (
        "overlap",
        with_tensors(row(), row(b"v", offset=96), data=224),
        errors.OverlappingTensors,
        "reaches to 128",
    ),
    ("same place", with_tensors(row(), row(b"v", offset=0), data=128), errors.OverlappingTensors, "'v'"),
    (
        "out of order",
        with_tensors(row(), row(b"v", offset=128), row(b"u", offset=64), data=384),
        errors.TensorsOutOfOrder,
        "'u'",
    ),
    ("offset huge", with_tensors(row(offset=2**64 - 32), data=128), errors.GapBetweenTensors, "'w'"),
    ("past the end", with_tensors(row(), data=127), errors.TensorPastEnd, "incomplete"),
    ("no data at all", with_tensors(row()), errors.TensorPastEnd, "fetch or copy it again"),
    (
        "second past the end",
        with_tensors(row(), row(b"v", offset=128), data=128),
        errors.TensorPastEnd,
        "'v'",
    ),
]


def test_the_table_has_no_two_rows_alike() -> None:
    names = [name for name, *_ in MALFORMED]
    assert len(set(names)) == len(names) >= 50


@pytest.mark.parametrize(
    ("data", "error", "words"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED]
)
def test_each_fault_has_its_error(
    tmp_path: Path, data: bytes, error: type[errors.FormatError], words: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(errors.FormatError) as caught:
        GGUFFile.open(path)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_every_error_class_of_the_container_has_a_row() -> None:
    elsewhere = {
        # about the operating system or about what a caller asks for: other tests
        "CannotRead",
        "CannotWrite",
        "BeingWritten",
        "FileChanged",
        "NotARegularFile",
        "MissingKey",
        "WrongKeyType",
        "BadValue",
        "MissingTensor",
        "UnexpectedTensor",
        "WrongShape",
        "WrongType",
        "BadDocument",
        "BadFrame",
        "BadField",
        "WriteOrder",
        "BadSafetensors",
        "TrailingBytes",
        "MissingFile",
        "BadProtobuf",
        "NotASplitFile",
        "NotAPermutation",
        "UnfinishedProfile",
        "OtherModel",
        "CannotMerge",
        # about several files: test_gguf_shards.py
        "BadShard",
        "MissingShard",
    }
    classes = {c.__name__ for c in errors.FormatError.__subclasses__()}
    assert classes - elsewhere == {error.__name__ for _, _, error, _ in MALFORMED}


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [case[1:] for case in MALFORMED if case[1][:4] == b"GGUF"],
    ids=[case[0] for case in MALFORMED if case[1][:4] == b"GGUF"],
)
def test_models_of_the_original_are_judged_alike(
    tmp_path: Path, data: bytes, error: type[errors.FormatError], said: str
) -> None:
    """Every rule but the first four bytes, and those only where they are asked for."""
    path = tmp_path / "x.powerinfer.gguf"
    path.write_bytes(b"PWRI" + data[4:])
    with pytest.raises(error, match=re.escape(said)):
        GGUFFile.open(path, magics=(b"PWRI",))
    with pytest.raises(errors.BadMagic, match="a model of the original PowerInfer"):
        GGUFFile.open(path)
    path.write_bytes(data)
    with pytest.raises(errors.BadMagic):
        GGUFFile.open(path, magics=(b"PWRI",))


def test_the_magic_is_known(tmp_path: Path) -> None:
    path = tmp_path / "x.powerinfer.gguf"
    path.write_bytes(b"PWRI" + VALID[4:])
    with GGUFFile.open(path, magics=(b"GGUF", b"PWRI")) as gguf:
        assert gguf.magic == b"PWRI"
        assert list(gguf.tensors) == ["w"]
    path.write_bytes(VALID)
    with GGUFFile.open(path) as gguf:
        assert gguf.magic == b"GGUF"


@pytest.mark.parametrize("length", range(len(VALID)))
def test_a_file_cut_anywhere_does_not_open(tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(VALID[:length])
    # The padding after the last tensor is not needed: all of the data is there before it.
    if length >= len(VALID) - 28:
        GGUFFile.open(path).close()
        return
    with pytest.raises(errors.FormatError):
        GGUFFile.open(path)


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(errors.NotARegularFile, match="regular file"):
        GGUFFile.open(tmp_path)


def test_a_pipe_nobody_writes_to_is_refused_without_waiting(tmp_path: Path) -> None:
    import os

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(errors.NotARegularFile):
        GGUFFile.open(pipe)


@pytest.mark.parametrize("name", ["not-there.gguf", "no/such/folder.gguf", "nul\0inside"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.CannotRead, match="cannot be opened"):
        GGUFFile.open(tmp_path / name)
