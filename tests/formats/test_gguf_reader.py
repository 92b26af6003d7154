import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_bytes import DATA, DATA_START, VALID, head, row, text, u32, u64, with_entries, with_tensors
from powerinfer_formats import errors
from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType, row_bytes, type_name
from powerinfer_formats.gguf_reader import GGUFFile, StringArray
from powerinfer_formats.gguf_writer import GGUFWriter, ValueType


@pytest.fixture
def valid(tmp_path: Path) -> GGUFFile:
    path = tmp_path / "valid.gguf"
    path.write_bytes(VALID)
    return GGUFFile.open(path)


def open_bytes(tmp_path: Path, data: bytes) -> GGUFFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return GGUFFile.open(path)


def test_a_valid_file_gives_what_its_bytes_say(valid: GGUFFile) -> None:
    assert valid.version == 3
    assert valid.alignment == 32
    assert valid.nbytes == len(VALID)
    assert valid.metadata["general.architecture"] == "llama"
    assert list(valid.get("words", StringArray)) == ["a", "é"]
    info = valid.tensors["w"]
    assert (info.row_type, info.shape, info.offset, info.nbytes) == (TensorType.Q8_0, (2, 32), DATA_START, 68)
    assert valid.tensor("w", shape=(2, 32), types={TensorType.Q8_0}).tobytes() == DATA


def test_version_2_is_read_as_version_3(tmp_path: Path) -> None:
    opened = open_bytes(tmp_path, VALID[:4] + b"\x02" + VALID[5:])
    assert opened.version == 2
    assert opened.tensor("w").tobytes() == DATA


def test_a_file_without_tensors_opens(tmp_path: Path) -> None:
    opened = open_bytes(tmp_path, with_entries(text(b"k.v") + u32(4) + u32(7)))
    assert dict(opened.metadata) == {"k.v": 7}
    assert not opened.tensors


def test_a_file_without_anything_opens(tmp_path: Path) -> None:
    opened = open_bytes(tmp_path, head(0, 0))
    assert not opened.metadata
    assert not opened.tensors


def test_the_alignment_key_moves_the_tensors(tmp_path: Path) -> None:
    entry = text(b"general.alignment") + u32(4) + u32(256)
    data = with_tensors(row(), row(b"v", offset=256), data=512, entries=(entry,), alignment=256)
    opened = open_bytes(tmp_path, data)
    assert opened.alignment == 256
    assert [info.offset % 256 for info in opened.tensors.values()] == [0, 0]


SCALARS = [
    (0, struct.pack("<B", 200), 200),
    (1, struct.pack("<b", -100), -100),
    (2, struct.pack("<H", 60_000), 60_000),
    (3, struct.pack("<h", -30_000), -30_000),
    (4, struct.pack("<I", 2**32 - 1), 2**32 - 1),
    (5, struct.pack("<i", -(2**31)), -(2**31)),
    (6, struct.pack("<f", 0.5), 0.5),
    (7, b"\x01", True),
    (7, b"\x00", False),
    (8, text("ü".encode()), "ü"),
    (10, struct.pack("<Q", 2**64 - 1), 2**64 - 1),
    (11, struct.pack("<q", -(2**63)), -(2**63)),
    (12, struct.pack("<d", 1e300), 1e300),
]


@pytest.mark.parametrize(("kind", "data", "expected"), SCALARS)
def test_every_scalar_type(tmp_path: Path, kind: int, data: bytes, expected: object) -> None:
    opened = open_bytes(tmp_path, with_entries(text(b"key") + u32(kind) + data))
    value = opened.metadata["key"]
    assert value == expected
    assert type(value) is type(expected)
    assert opened.entries["key"].value_type is ValueType(kind)


@pytest.mark.parametrize(("kind", "data", "expected"), SCALARS)
def test_every_array_type(tmp_path: Path, kind: int, data: bytes, expected: object) -> None:
    opened = open_bytes(tmp_path, with_entries(text(b"key") + u32(9) + u32(kind) + u64(2) + data + data))
    assert opened.get("key", list) == [expected, expected]
    assert opened.entries["key"].element_type is ValueType(kind)
    if kind != 8:
        array = opened.get("key", np.ndarray)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("kind", [0, 4, 7, 8, 12])
def test_empty_arrays(tmp_path: Path, kind: int) -> None:
    opened = open_bytes(tmp_path, with_entries(text(b"key") + u32(9) + u32(kind) + u64(0)))
    assert opened.get("key", list) == []


# --- typed access ------------------------------------------------------------------------------------


def test_get_names_the_missing_key_and_the_file(valid: GGUFFile) -> None:
    with pytest.raises(errors.MissingKey, match=r"valid\.gguf.*'llama\.block_count'"):
        valid.get("llama.block_count", int)


def test_get_takes_a_default_only_for_a_missing_key(valid: GGUFFile) -> None:
    assert valid.get("llama.block_count", int, None) is None
    with pytest.raises(errors.WrongKeyType):
        valid.get("general.architecture", int, None)


@pytest.mark.parametrize(
    ("data", "type_"),
    [
        (u32(4) + u32(1), float),
        (u32(4) + u32(1), bool),
        (u32(4) + u32(1), list),
        (u32(7) + b"\x01", int),
        (u32(6) + bytes(4), int),
        (u32(8) + text(b"1"), int),
        (u32(9) + u32(4) + u64(0), StringArray),
        (u32(9) + u32(8) + u64(0), np.ndarray),
        (u32(9) + u32(8) + u64(0), str),
    ],
)
def test_get_confuses_no_types(tmp_path: Path, data: bytes, type_: type) -> None:
    opened = open_bytes(tmp_path, with_entries(text(b"key") + data))
    with pytest.raises(errors.WrongKeyType, match=r"'key' is of type .*, expected "):
        opened.get("key", type_)


def test_tensor_names_what_is_missing(valid: GGUFFile) -> None:
    with pytest.raises(errors.MissingTensor, match=r"'output\.weight'"):
        valid.tensor("output.weight")


def test_tensor_names_both_shapes(valid: GGUFFile) -> None:
    with pytest.raises(errors.WrongShape, match="'w' has the shape 2 × 32, expected 32 × 2"):
        valid.tensor("w", shape=(32, 2))


def test_tensor_names_the_type_that_cannot_be_used(valid: GGUFFile) -> None:
    with pytest.raises(errors.WrongType, match=r"'w' is of type Q8_0.*\(can: F32, Q4_0\)"):
        valid.tensor("w", types={TensorType.Q4_0, TensorType.F32})


def test_views_are_read_only(valid: GGUFFile) -> None:
    with pytest.raises(ValueError, match="read-only"):
        valid.tensor("w")[0] = 1


def test_a_view_outlives_close(valid: GGUFFile) -> None:
    view = valid.tensor("w")
    valid.close()
    valid.close()
    assert view.tobytes() == DATA
    with pytest.raises(ValueError, match="closed"):
        valid.tensor("w")


def test_metadata_outlives_close(tmp_path: Path) -> None:
    with open_bytes(tmp_path, VALID) as opened:
        words = opened.get("words", StringArray)
    assert list(words) == ["a", "é"]


def test_string_arrays_are_sequences(valid: GGUFFile) -> None:
    words = valid.get("words", StringArray)
    assert words == ["a", "é"]
    assert words != ["a"]
    assert words[-1] == "é"
    assert words[0:2] == ["a", "é"]
    assert words.bytes_at(1) == b"\xc3\xa9"
    assert "é" in words
    assert words.index("é") == 1
    for index in (2, -3):
        with pytest.raises(IndexError):
            words[index]


def test_strings_may_hold_nul_and_be_empty(tmp_path: Path) -> None:
    strings = ["", "\0", "", "a\0b", "🙂", ""]
    data = b"".join(text(s.encode()) for s in strings)
    opened = open_bytes(tmp_path, with_entries(text(b"key") + u32(9) + u32(8) + u64(len(strings)) + data))
    assert list(opened.get("key", StringArray)) == strings


def test_utf8_is_checked_in_every_stretch(tmp_path: Path) -> None:
    """Text is checked a megabyte at a time; the fault is found, and named by index, in any of them."""
    strings = [b"x" * 700_000, b"\xc3\xa9" * 600_000, b"ok", b"y" * 300_000, b"bad\xff", b"z"]
    data = b"".join(map(text, strings))
    with pytest.raises(errors.InvalidUTF8, match="string 4"):
        open_bytes(tmp_path, with_entries(text(b"tokenizer.key") + u32(9) + u32(8) + u64(6) + data))


def test_what_nothing_is_computed_from_is_a_notice(tmp_path: Path) -> None:
    """llama.cpp reads such files, too: see gguf.cpp."""
    strings = u64(3) + text(b"a") + text(b"caf\xe9") + text(b"b")
    entries = (
        text(b"general.name") + u32(8) + text(b"caf\xe9"),
        text(b"general.tags") + u32(9) + u32(8) + strings,
        text(b"x.note") + u32(8) + text(b"\xff"),
        text(b"x.notes") + u32(9) + u32(8) + strings,
        text(b"x.flag") + u32(7) + b"\x02",
        text(b"x.flags") + u32(9) + u32(7) + u64(3) + b"\x00\x01\xff",
    )
    opened = open_bytes(tmp_path, with_entries(*entries) + bytes(64))
    assert opened.get("general.name", str) == "caf\ufffd"
    assert list(opened.get("general.tags", StringArray)) == ["a", "caf\ufffd", "b"]
    assert opened.get("x.flag", bool) is True
    assert opened.get("x.flags", list) == [False, True, True]
    for key, kind in (("x.note", str), ("x.notes", StringArray)):
        with pytest.raises(errors.InvalidUTF8, match=f"'{key}' is not UTF-8, and is needed here"):
            opened.get(key, kind)
    said = "\n".join(opened.notices)
    for key in ("general.name", "general.tags", "x.note", "x.notes", "x.flag", "x.flags"):
        assert f"metadata '{key}'" in said
    assert "bytes behind the last tensor are not used" in said
    assert len(opened.notices) == 7


# --- types we cannot compute with --------------------------------------------------------------------


def test_block_sizes_are_those_of_ggml() -> None:
    for kind, (values, nbytes) in gguf.GGML_QUANT_SIZES.items():
        shape = BLOCK_SHAPES[int(kind)]
        assert (shape.values, shape.nbytes, type_name(int(kind))) == (values, nbytes, kind.name)
    assert set(BLOCK_SHAPES) == {int(kind) for kind in gguf.GGML_QUANT_SIZES}


@pytest.mark.parametrize("kind", list(TensorType))
def test_every_type_of_ggml_is_listed_and_sized(tmp_path: Path, kind: TensorType) -> None:
    block = BLOCK_SHAPES[kind]
    nbytes = 3 * 2 * block.nbytes
    opened = open_bytes(
        tmp_path, with_tensors(row(dimensions=(2 * block.values, 3), row_type=kind), data=nbytes)
    )
    info = opened.tensors["w"]
    assert (info.nbytes, info.type_name, info.shape) == (nbytes, kind.name, (3, 2 * block.values))


@pytest.mark.parametrize(
    ("kind", "columns"), [(4, 32), (99, 32), (TensorType.Q4_K, 128), (TensorType.F32, 0)]
)
def test_row_bytes_refuses_what_has_no_size(kind: int, columns: int) -> None:
    with pytest.raises(ValueError, match=r"not one that ggml|whole number"):
        row_bytes(kind, columns)


# --- real and large files ----------------------------------------------------------------------------


def test_smollm2_opens_and_agrees_with_the_gguf_package(smollm2: Path) -> None:
    theirs = gguf.GGUFReader(smollm2)
    with GGUFFile.open(smollm2) as ours:
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            info = ours.tensors[tensor.name]
            assert info.row_type == int(tensor.tensor_type)
            assert list(info.shape) == list(reversed(tensor.shape.tolist()))
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
        assert set(ours.metadata) == set(fields)
        for name in ours.metadata:
            if not isinstance(ours.metadata[name], StringArray):
                assert np.array_equal(ours.metadata[name], fields[name].contents())  # type: ignore[arg-type]
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
            assert list(ours.get(key, StringArray)) == fields[key].contents()


def test_a_large_vocabulary_takes_little_memory(tmp_path: Path) -> None:
    """150,000 tokens and as many merges: far under the 150 MB that opening may take."""
    path = tmp_path / "large.gguf"
    tokens = [f"token-{index}-é" for index in range(150_000)]
    with GGUFWriter(path) as writer:
        writer.add("tokenizer.ggml.tokens", tokens)
        writer.add("tokenizer.ggml.merges", [f"{token} {token}" for token in tokens])
        writer.add("tokenizer.ggml.scores", np.zeros(len(tokens), np.float32))
    tracemalloc.start()
    try:
        opened = GGUFFile.open(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60e6
    assert opened.get("tokenizer.ggml.tokens", StringArray)[149_999] == tokens[-1]
    assert list(opened.get("tokenizer.ggml.tokens", StringArray)) == tokens


def test_a_forged_length_allocates_nothing(tmp_path: Path) -> None:
    """A file of a kilobyte announces 16 million values: refused before memory is taken for them."""
    path = tmp_path / "forged.gguf"
    path.write_bytes(with_entries(text(b"key") + u32(9) + u32(12) + u64(2**24) + bytes(1000)))
    tracemalloc.start()
    try:
        with pytest.raises(errors.TruncatedFile):
            GGUFFile.open(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1e6
