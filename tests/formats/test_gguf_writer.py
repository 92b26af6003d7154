# ruff: noqa: PT012 - an error has to come out of the whole with block: that is what is tested

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_bytes import DATA, VALID
from powerinfer_formats import errors
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_writer import GGUFWriter, ValueType


def test_the_file_is_the_one_spelled_out_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", "llama")
        writer.add("words", ["a", "é"])
        writer.declare("w", TensorType.Q8_0, (2, 32))
        writer.write("w", DATA)
    assert path.read_bytes() == VALID
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("piece", [1, 7, 34, 67])
def test_data_may_come_in_pieces(tmp_path: Path, piece: int) -> None:
    path = tmp_path / "out.gguf"
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", "llama")
        writer.add("words", ["a", "é"])
        writer.declare("w", TensorType.Q8_0, (2, 32))
        for start in range(0, 68, piece):
            writer.write("w", memoryview(DATA)[start : start + piece])
    assert path.read_bytes() == VALID


def test_the_header_of_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with GGUFWriter(path):
        pass
    assert path.read_bytes() == b"GGUF\x03\x00\x00\x00" + b"\x00" * 16 + b"\x00" * 8
    assert not GGUFFile.open(path).tensors


def test_numbers_are_written_as_named(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with GGUFWriter(path) as writer:
        writer.add("a", 7, ValueType.UINT16)
        writer.add("b", True)
        writer.add("c", [1.5], ValueType.FLOAT32)
    assert path.read_bytes()[24:] == (
        b"\x01\x00\x00\x00\x00\x00\x00\x00a\x02\x00\x00\x00\x07\x00"
        b"\x01\x00\x00\x00\x00\x00\x00\x00b\x07\x00\x00\x00\x01"
        b"\x01\x00\x00\x00\x00\x00\x00\x00c\x09\x00\x00\x00\x06\x00\x00\x00"
        b"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\xc0\x3f" + b"\x00" * 14
    )


ARRAYS = [
    np.array([1, 2], np.uint8),
    np.array([-1, 2], np.int8),
    np.array([1, 60_000], np.uint16),
    np.array([-1, 2], np.int16),
    np.array([1, 2**32 - 1], np.uint32),
    np.array([-1, 2], np.int32),
    np.array([1, 2**64 - 1], np.uint64),
    np.array([-(2**63), 2], np.int64),
    np.array([0.1, np.inf], np.float32),
    np.array([0.1, 1e300], np.float64),
    np.array([True, False]),
    np.array([1, 2], ">i4"),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: a.dtype.str)
def test_arrays_keep_type_and_values(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "out.gguf"
    with GGUFWriter(path) as writer:
        writer.add("key", array)
    read = GGUFFile.open(path).get("key", np.ndarray)
    assert read.dtype == array.dtype.newbyteorder("<")
    assert np.array_equal(read, array)


TENSORS: list[tuple[str, int, np.ndarray]] = [
    ("f32", TensorType.F32, np.arange(12, dtype=np.float32).reshape(3, 4)),
    ("f16", TensorType.F16, np.arange(5, dtype=np.float16)),
    ("i32", TensorType.I32, np.arange(7, dtype=np.int32)),
    ("cube", TensorType.F32, np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
    ("four", TensorType.I8, np.arange(16, dtype=np.int8).reshape(2, 2, 2, 2)),
]


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_the_gguf_package_reads_what_we_write(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "ours.gguf"
    with GGUFWriter(path, alignment=alignment) as writer:
        writer.add("general.architecture", "llama")
        writer.add("llama.block_count", 3, ValueType.UINT32)
        writer.add("tokens", ["a", "", "é"])
        writer.add("scores", np.array([0.5, -1.0], np.float32))
        for name, kind, array in TENSORS:
            writer.declare(name, kind, array.shape)
        for name, _, array in TENSORS:
            writer.write(name, array)
    theirs = gguf.GGUFReader(path)
    assert theirs.alignment == alignment
    assert theirs.fields["general.architecture"].contents() == "llama"
    assert theirs.fields["llama.block_count"].contents() == 3
    assert theirs.fields["tokens"].contents() == ["a", "", "é"]
    assert theirs.fields["scores"].contents() == [0.5, -1.0]
    assert [tensor.name for tensor in theirs.tensors] == [name for name, _, _ in TENSORS]
    for tensor, (_, _, array) in zip(theirs.tensors, TENSORS, strict=True):
        assert tensor.data.tobytes() == array.tobytes()
        assert tensor.data_offset % alignment == 0
    assert list(GGUFFile.open(path).tensors) == [name for name, _, _ in TENSORS]


def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((6, 64)).astype(np.float32)
    packed = gguf.quantize(weights, gguf.GGMLQuantizationType.Q4_1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("flag", True)
    writer.add_token_list(["<s>", "ä", "🙂"])
    writer.add_token_scores([0.0, -1.0, -2.0])
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for name, _, array in TENSORS:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = GGUFFile.open(path)
    assert ours.get("llama.block_count", int) == 2
    assert ours.get("llama.rope.freq_base", float) == 10000.0
    assert ours.get("flag", bool) is True
    assert ours.get("tokenizer.ggml.tokens", list) == ["<s>", "ä", "🙂"]
    assert ours.tensor("packed", shape=(6, 64), types={TensorType.Q4_1}).tobytes() == packed.tobytes()
    for name, kind, array in TENSORS:
        assert ours.tensor(name, shape=array.shape, types={kind}).tobytes() == array.tobytes()


def test_copied_metadata_keeps_its_bytes(tmp_path: Path, smollm2: Path) -> None:
    path = tmp_path / "copy.gguf"
    dropped = {"tokenizer.chat_template"}
    with GGUFFile.open(smollm2) as source:
        with GGUFWriter(path, alignment=64) as writer:
            writer.copy_metadata(source, without=dropped)
        kept = {e.key: data for e, data in source.metadata_bytes() if e.key not in dropped}
    with GGUFFile.open(path) as copy:
        found = {entry.key: data for entry, data in copy.metadata_bytes()}
    assert found.pop("general.alignment")[-4:] == b"\x40\x00\x00\x00"
    assert found == kept


# --- what cannot be written --------------------------------------------------------------------------

ADD: list[tuple[str, Any, ValueType | None, type[errors.FormatError]]] = [
    ("", "x", None, errors.EmptyKey),
    ("a\n", "x", None, errors.BadKey),
    ("k" * 65_536, "x", None, errors.KeyTooLong),
    ("\ud800", "x", None, errors.InvalidUTF8),
    ("k", "\ud800", None, errors.InvalidUTF8),
    ("k", "x" * (2**24 + 1), None, errors.StringTooLong),
    ("k", ["x" * (2**24 + 1)], None, errors.StringTooLong),
    ("k", 1, None, errors.WrongKeyType),
    ("k", 1.5, None, errors.WrongKeyType),
    ("k", [1, 2], None, errors.WrongKeyType),
    ("k", [], None, errors.WrongKeyType),
    ("k", 1.5, ValueType.UINT32, errors.WrongKeyType),
    ("k", True, ValueType.UINT32, errors.WrongKeyType),
    ("k", "1", ValueType.UINT32, errors.WrongKeyType),
    ("k", 1, ValueType.STRING, errors.WrongKeyType),
    ("k", 1, ValueType.BOOL, errors.WrongKeyType),
    ("k", 1, ValueType.ARRAY, errors.WrongKeyType),
    ("k", -1, ValueType.UINT32, errors.BadValue),
    ("k", 256, ValueType.UINT8, errors.BadValue),
    ("k", 2**63, ValueType.INT64, errors.BadValue),
    ("k", [0, 2**32], ValueType.UINT32, errors.BadValue),
    ("k", ["a", 1], ValueType.STRING, errors.WrongKeyType),
    ("k", [[1], [2]], ValueType.UINT32, errors.NestedArray),
    ("k", [1], ValueType.ARRAY, errors.NestedArray),
    ("k", np.zeros(2**24 + 1, np.uint8), None, errors.ArrayTooLong),
]


@pytest.mark.parametrize(("key", "value", "kind", "error"), ADD, ids=range(len(ADD)))
def test_metadata_that_cannot_be_written(
    tmp_path: Path, key: str, value: Any, kind: ValueType | None, error: type[errors.FormatError]
) -> None:
    with pytest.raises(error), GGUFWriter(tmp_path / "out.gguf") as writer:
        writer.add(key, value, kind)
    assert not list(tmp_path.iterdir())


DECLARE: list[tuple[str, int, tuple[int, ...], type[errors.FormatError]]] = [
    ("", 0, (4,), errors.EmptyTensorName),
    ("n" * 65, 0, (4,), errors.TensorNameTooLong),
    ("é" * 33, 0, (4,), errors.TensorNameTooLong),
    ("a\x1b", 0, (4,), errors.BadTensorName),
    ("taken", 0, (4,), errors.DuplicateTensor),
    ("n", 0, (), errors.BadDimensionCount),
    ("n", 0, (1,) * 5, errors.BadDimensionCount),
    ("n", 0, (0,), errors.BadDimension),
    ("n", 0, (-4,), errors.BadDimension),
    ("n", 4, (32,), errors.UnknownTensorType),
    ("n", 99, (32,), errors.UnknownTensorType),
    ("n", TensorType.Q4_0, (33,), errors.PartialBlock),
    ("n", 0, (2**40, 2**40), errors.TensorTooLarge),
]


@pytest.mark.parametrize(("name", "kind", "shape", "error"), DECLARE, ids=range(len(DECLARE)))
def test_tensors_that_cannot_be_declared(
    tmp_path: Path, name: str, kind: int, shape: tuple[int, ...], error: type[errors.FormatError]
) -> None:
    with pytest.raises(error), GGUFWriter(tmp_path / "out.gguf") as writer:
        writer.declare("taken", 0, (4,))
        writer.declare(name, kind, shape)
    assert not list(tmp_path.iterdir())


def _second_first(writer: GGUFWriter) -> None:
    writer.write("b", bytes(16))


def _too_much(writer: GGUFWriter) -> None:
    writer.write("a", bytes(17))


def _too_much_in_pieces(writer: GGUFWriter) -> None:
    writer.write("a", bytes(10))
    writer.write("a", bytes(7))


def _too_little(writer: GGUFWriter) -> None:
    writer.write("a", bytes(16))
    writer.write("b", bytes(15))


def _nothing(writer: GGUFWriter) -> None:
    pass


def _one_more(writer: GGUFWriter) -> None:
    for name in "abc":
        writer.write(name, bytes(16))


def _key_too_late(writer: GGUFWriter) -> None:
    writer.write("a", bytes(16))
    writer.add("key", "value")


def _tensor_too_late(writer: GGUFWriter) -> None:
    writer.write("a", bytes(16))
    writer.declare("c", 0, (4,))


def _row_twice(writer: GGUFWriter) -> None:
    writer.write_rows("m", np.array([0, 1, 1]), np.zeros((3, 8), np.uint8))
    writer.write_rows("m", np.array([2]), np.zeros((1, 8), np.uint8))


def _row_beyond(writer: GGUFWriter) -> None:
    writer.write_rows("m", np.array([0, 3]), np.zeros((2, 8), np.uint8))


def _rows_of_another_size(writer: GGUFWriter) -> None:
    writer.write_rows("m", np.array([0]), np.zeros((1, 4), np.uint8))


def _rows_of_no_tensor(writer: GGUFWriter) -> None:
    writer.write_rows("x", np.array([0]), np.zeros((1, 8), np.uint8))


def _replaced_by_another_size(writer: GGUFWriter) -> None:
    writer.replace("errors", [1.0, 2.0], ValueType.FLOAT32)


def _replaced_without_being_there(writer: GGUFWriter) -> None:
    writer.replace("other", [1.0, 2.0, 3.0], ValueType.FLOAT32)


@pytest.mark.parametrize(
    "misuse",
    [
        _row_twice,
        _row_beyond,
        _rows_of_another_size,
        _rows_of_no_tensor,
        _replaced_by_another_size,
        _replaced_without_being_there,
    ],
)
def test_misused_rows_and_entries_leave_no_file(tmp_path: Path, misuse: Any) -> None:
    with pytest.raises(errors.WriteOrder), GGUFWriter(tmp_path / "out.gguf") as writer:
        writer.add("errors", [0.0, 0.0, 0.0], ValueType.FLOAT32)
        writer.declare("m", 0, (3, 2))
        misuse(writer)
    assert not list(tmp_path.iterdir())


def test_rows_in_any_order_and_a_late_entry(tmp_path: Path) -> None:
    """Byte for byte the file of a writer that had all of it at once."""
    rng, order = np.random.default_rng(0), np.array([5, 1, 2, 3, 0, 4])
    rows = {name: rng.integers(0, 256, (6, nbytes), np.uint8) for name, nbytes in (("m", 12), ("n", 20))}
    tail = rng.integers(0, 256, 12, np.uint8)
    written = []
    for by_rows in (False, True):
        with GGUFWriter(tmp_path / f"{by_rows}.gguf", alignment=64) as writer:
            writer.add("errors", [0.0, 0.0] if by_rows else [0.5, 0.25], ValueType.FLOAT32)
            writer.declare("first", 0, (3,))
            for name, data in rows.items():
                writer.declare(name, 0, (6, data.shape[1] // 4))
            writer.declare("tail", 0, (3,))
            writer.write("first", tail)
            if by_rows:
                for some in (order[:4], order[4:]):
                    for name, data in reversed(rows.items()):
                        writer.write_rows(name, some, data[some])
                writer.write("tail", tail)
                writer.replace("errors", [0.5, 0.25], ValueType.FLOAT32)
            else:
                for name, data in (*rows.items(), ("tail", tail)):
                    writer.write(name, data)
        written.append((tmp_path / f"{by_rows}.gguf").read_bytes())
    assert written[0] == written[1]


def test_padding_behind_rows_at_the_end(tmp_path: Path) -> None:
    with GGUFWriter(tmp_path / "out.gguf", alignment=64) as writer:
        writer.declare("m", 0, (2, 2))
        writer.write_rows("m", np.array([1, 0]), np.ones((2, 8), np.uint8))
    assert (tmp_path / "out.gguf").stat().st_size % 64 == 0
    assert GGUFFile.open(tmp_path / "out.gguf").tensor("m").tobytes() == bytes([1] * 16)


@pytest.mark.parametrize(
    "misuse",
    [
        _second_first,
        _too_much,
        _too_much_in_pieces,
        _too_little,
        _nothing,
        _one_more,
        _key_too_late,
        _tensor_too_late,
    ],
)
def test_calls_out_of_order_leave_no_file(tmp_path: Path, misuse: Any) -> None:
    with pytest.raises(errors.WriteOrder), GGUFWriter(tmp_path / "out.gguf") as writer:
        writer.declare("a", 0, (4,))
        writer.declare("b", 0, (4,))
        misuse(writer)
    assert not list(tmp_path.iterdir())


def test_a_writer_works_only_inside_its_block(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "out.gguf")
    with pytest.raises(errors.WriteOrder, match="with block"):
        writer.add("key", "value")
    with writer:
        pass
    with pytest.raises(errors.WriteOrder, match="with block"):
        writer.declare("a", 0, (4,))


def test_a_key_twice(tmp_path: Path) -> None:
    with pytest.raises(errors.DuplicateKey), GGUFWriter(tmp_path / "out.gguf") as writer:
        writer.add("key", "value")
        writer.add("key", "value")


@pytest.mark.parametrize("alignment", [0, 4, 24, 2**21])
def test_alignments_that_no_reader_takes(tmp_path: Path, alignment: int) -> None:
    with pytest.raises(errors.BadAlignment):
        GGUFWriter(tmp_path / "out.gguf", alignment=alignment)


def test_a_model_larger_than_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(errors.CannotWrite, match="free some space"),
        GGUFWriter(tmp_path / "out.gguf") as writer,
    ):
        writer.declare("huge", TensorType.I8, (2**40, 2**20))
        writer.write("huge", b"\x00")
    assert not list(tmp_path.iterdir())


KEYS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12)
VALUES = st.one_of(
    st.tuples(st.text(max_size=20), st.none()),
    st.tuples(st.booleans(), st.none()),
    st.tuples(st.integers(0, 2**32 - 1), st.just(ValueType.UINT32)),
    st.tuples(st.integers(-(2**63), 2**63 - 1), st.just(ValueType.INT64)),
    st.tuples(st.floats(allow_nan=False), st.just(ValueType.FLOAT64)),
    st.tuples(st.lists(st.text(max_size=8), max_size=8), st.just(ValueType.STRING)),
    st.tuples(st.lists(st.integers(0, 255), max_size=8), st.just(ValueType.UINT8)),
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.dictionaries(KEYS, VALUES, max_size=6), st.lists(st.integers(1, 9), max_size=4))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, tuple[Any, Any]], rows: list[int]
) -> None:
    path = tmp_path_factory.mktemp("trip") / "out.gguf"
    tensors = {f"t{i}": np.arange(32 * n, dtype=np.float32).reshape(n, 32) for i, n in enumerate(rows)}
    entries.pop("general.alignment", None)
    with GGUFWriter(path) as writer:
        for key, (value, kind) in entries.items():
            writer.add(key, value, kind)
        for name, array in tensors.items():
            writer.declare(name, TensorType.F32, array.shape)
        for name, array in tensors.items():
            writer.write(name, array)
    with GGUFFile.open(path) as read:
        assert list(read.metadata) == list(entries)
        for key, (value, _) in entries.items():
            found = read.get(key, list) if isinstance(value, list) else read.metadata[key]
            assert found == value
        for name, array in tensors.items():
            assert read.tensor(name, shape=array.shape).tobytes() == array.tobytes()
