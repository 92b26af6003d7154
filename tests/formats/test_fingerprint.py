import hashlib
from pathlib import Path

import numpy as np
import pytest

from gguf_bytes import DATA, VALID
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.fingerprint import model_fingerprint
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_writer import GGUFWriter


def test_of_a_small_file_it_is_the_hash_spelled_out(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(VALID)
    expected = hashlib.sha256(VALID[:158] + DATA * 3).hexdigest()
    assert model_fingerprint(GGUFFile.open(path)) == expected


def write(path: Path, data: np.ndarray, name: str = "llama") -> str:
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", name)
        writer.declare("w", TensorType.I8, data.shape)
        writer.write("w", data)
    with GGUFFile.open(path) as opened:
        return model_fingerprint(opened)


def test_samples_are_at_start_middle_and_end(tmp_path: Path) -> None:
    data = np.zeros(100_001, np.int8)
    plain = write(tmp_path / "a.gguf", data)
    middle = (100_001 - 4096) // 2
    sampled = {0, 4095, middle, middle + 4095, 100_001 - 4096, 100_000}
    for position in sampled | {4096, middle - 1, middle + 4096, 100_001 - 4097}:
        data[position] = 1
        assert (write(tmp_path / "b.gguf", data) != plain) == (position in sampled)
        data[position] = 0
    assert write(tmp_path / "elsewhere.gguf", data) == plain


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097])
def test_every_byte_of_a_short_tensor_counts(tmp_path: Path, size: int) -> None:
    data = np.zeros(size, np.int8)
    plain = write(tmp_path / "a.gguf", data)
    for position in {0, size // 2, size - 1}:
        data[position] = 1
        assert write(tmp_path / "a.gguf", data) != plain
        data[position] = 0


def test_metadata_counts(tmp_path: Path) -> None:
    data = np.zeros(10, np.int8)
    assert write(tmp_path / "a.gguf", data) != write(tmp_path / "a.gguf", data, "qwen2")
