"""Weights of Hugging Face directories: headers as bytes, and a table of what can be wrong with them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from powerinfer_formats import errors
from powerinfer_formats.safetensors_folder import SafetensorsFolder
from powerinfer_formats.safetensors_header import scan_safetensors

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def header(document: Any, data: int = 32) -> bytes:
    """A file with this header and as many bytes of data."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(data))


def test_a_file_as_bytes() -> None:
    text = b'{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},'
    text += b'"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}  '
    tensors, start = scan_safetensors(header(text), "x")
    assert start == 8 + len(text)
    assert list(tensors) == ["a", "b"]
    assert (tensors["b"].dtype, tensors["b"].shape) == ("BF16", (4,))
    assert (tensors["b"].offset, tensors["b"].nbytes) == (start + 24, 8)


def test_what_the_package_writes_is_read() -> None:
    arrays = {"w": np.arange(6, dtype=np.float16).reshape(2, 3), "v": np.ones(5, np.float32)}
    data = save(arrays, metadata={"format": "pt"})
    tensors, _ = scan_safetensors(data, "x")
    for name, array in arrays.items():
        place = tensors[name]
        assert data[place.offset : place.offset + place.nbytes] == array.tobytes()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", errors.TruncatedFile, "not even the length"),
        (b"1234567", errors.TruncatedFile, "7 bytes"),
        ((1 << 40).to_bytes(8, "little") + b"{}", errors.BadSafetensors, "at most 100000000"),
        ((9).to_bytes(8, "little") + b"{}", errors.TruncatedFile, "header up to byte 17"),
        (header(b" {}"), errors.BadSafetensors, "does not begin with"),
        (header(b"{\xff}"), errors.InvalidUTF8, "at byte 1"),
        (header(b"{"), errors.BadDocument, "not valid JSON"),
        (header(b'{"a":1,"a":1}'), errors.BadDocument, "'a' occurs twice"),
        (header(b'{"a":' + b"[" * 100_000), errors.BadDocument, "nested too deeply"),
        (header({"__metadata__": {"a": 1}}, 0), errors.BadSafetensors, "__metadata__"),
        (header({"__metadata__": []}, 0), errors.BadSafetensors, "__metadata__"),
        (header({"": A, "b": B}), errors.EmptyTensorName, "is empty"),
        (header({"a\n": A, "b": B}), errors.BadTensorName, "control characters"),
        (header({"a" * 600: A, "b": B}), errors.TensorNameTooLong, "over 512"),
        (header({"a": 1}), errors.BadSafetensors, "exactly dtype"),
        (header({"a": {"dtype": "F32", "shape": [1]}}), errors.BadSafetensors, "exactly dtype"),
        (header({"a": A | {"more": 1}, "b": B}), errors.BadSafetensors, "exactly dtype"),
        (header({"a": A | {"dtype": "Q4"}, "b": B}), errors.UnknownTensorType, "'Q4'"),
        (header({"a": A | {"dtype": ["F32"]}, "b": B}), errors.UnknownTensorType, "is not known"),
        (header({"a": A | {"shape": []}, "b": B}), errors.WrongShape, r"its shape \[1\] of"),
        (header({"a": A | {"shape": [1] * 5}, "b": B}), errors.BadDimensionCount, "at most 4"),
        (header({"a": A | {"shape": [True, 6]}, "b": B}), errors.BadDimensionCount, "at most 4"),
        (header({"a": A | {"shape": [0, 3]}, "b": B}), errors.BadDimension, "dimension of 0"),
        (header({"a": A | {"shape": [-2, -3]}, "b": B}), errors.BadDimension, "dimension of -2"),
        (header({"a": A | {"shape": [1 << 40, 1 << 40]}, "b": B}), errors.TensorTooLarge, "63 bits"),
        (header({"a": A | {"shape": [2, 2]}, "b": B}), errors.WrongShape, "needs 16"),
        (header({"a": A | {"data_offsets": [24, 0]}, "b": B}), errors.BadSafetensors, "two numbers in order"),
        (header({"a": A | {"data_offsets": [0, 24, 24]}, "b": B}), errors.BadSafetensors, "two numbers"),
        (header({"a": A | {"data_offsets": [0.0, 24]}, "b": B}), errors.BadSafetensors, "two numbers"),
        (header({"a": A, "b": B | {"data_offsets": [16, 24]}}), errors.OverlappingTensors, "up to"),
        (header({"a": A, "b": B | {"data_offsets": [32, 40]}}, 40), errors.GapBetweenTensors, "expected"),
        (header({"a": A, "b": B}, 31), errors.TensorPastEnd, "incomplete"),
        (header({"a": A, "b": B}, 33), errors.TrailingBytes, "the file only at"),
    ],
)
def test_a_malformed_file_is_refused(data: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scan_safetensors(data, "x")


def test_truncation_at_every_byte_is_refused() -> None:
    whole = header({"a": A, "b": B})
    scan_safetensors(whole, "x")
    for length in range(len(whole)):
        with pytest.raises(errors.FormatError):
            scan_safetensors(whole[:length], "x")


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(data: st.DataObject) -> None:
    """Any bytes changed: nothing but a FormatError, and whatever is read lies inside of the file."""
    damaged = bytearray(header({"a": A, "b": B}))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        tensors, _ = scan_safetensors(bytes(damaged), "x")
    except errors.FormatError:
        return
    assert all(row.offset + row.nbytes <= len(damaged) for row in tensors.values())


# --- directories -------------------------------------------------------------------------------------------


def folder(path: Path, weight_map: Any = None) -> Path:
    """Two shards and an index."""
    save_file({"a": np.arange(4, dtype=np.float32)}, path / "one.safetensors")
    save_file({"b": np.arange(6, dtype=np.float16)}, path / "two.safetensors")
    index = {
        "weight_map": {"a": "one.safetensors", "b": "two.safetensors"} if weight_map is None else weight_map
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_shards(tmp_path: Path) -> None:
    opened = SafetensorsFolder.open(folder(tmp_path))
    assert opened.files == ("one.safetensors", "two.safetensors")
    assert opened.data("b").view(np.float16).tolist() == list(range(6))
    assert opened.file_of("a") == "one.safetensors"
    assert opened.nbytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    opened.close()
    with pytest.raises(ValueError, match="closed"):
        opened.data("a")


def test_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    folder(tmp_path / "blobs")
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert set(SafetensorsFolder.open(tmp_path / "snapshot").tensors) == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        ([], errors.BadDocument, "no 'weight_map'"),
        ({}, errors.BadDocument, "no 'weight_map'"),
        ({"a": "../one.safetensors"}, errors.BadValue, "not the plain name"),
        ({"a": "/etc/one.safetensors"}, errors.BadValue, "not the plain name"),
        ({"a": "sub/one.safetensors"}, errors.BadValue, "not the plain name"),
        ({"a": "..\\one.safetensors"}, errors.BadValue, "not the plain name"),
        ({"a": ".safetensors"}, errors.BadValue, "not the plain name"),
        ({"a": "one\n.safetensors"}, errors.BadValue, "not the plain name"),
        ({"a": "one.bin"}, errors.BadValue, "not the plain name"),
        ({"a": 7}, errors.BadValue, "not the plain name"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, errors.CannotRead, "three.safetensors"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, errors.MissingTensor, "no tensor 'b'"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, errors.UnexpectedTensor, "does not place there"),
        (
            {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"},
            errors.MissingTensor,
            "no tensor 'c'",
        ),
    ],
)
def test_a_malformed_index_is_refused(
    tmp_path: Path, weight_map: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SafetensorsFolder.open(folder(tmp_path, weight_map))


def test_the_same_tensor_twice(tmp_path: Path) -> None:
    folder(tmp_path)
    save_file({"a": np.zeros(4, np.float32), "b": np.zeros(2, np.float32)}, tmp_path / "two.safetensors")
    with pytest.raises(errors.DuplicateTensor, match="'a' is in another file"):
        SafetensorsFolder.open(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(errors.MissingFile, match=r"pickled files only.*not opened.*model\.safetensors"):
        SafetensorsFolder.open(tmp_path)


def test_no_weights_and_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(
        errors.MissingFile, match=r"without model.safetensors or model.safetensors.index.json"
    ):
        SafetensorsFolder.open(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(errors.NotARegularFile, match="a safetensors file is needed"):
        SafetensorsFolder.open(tmp_path)
