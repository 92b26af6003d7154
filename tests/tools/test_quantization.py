"""quantize: what is written is the model, with exactly the error that is said; the rest is untouched."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType, WrittenType
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_kernels import WRITTEN_TYPES, RowType, block_shape, dequantize
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model.huggingface import ModelFolder
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from powerinfer_tools.stages.quantize.quantization import quantize_model
from powerinfer_tools.text import Tokenizer
from tiny_folders import FolderCase, TinyFolder, make_folder

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 90,
    "hidden_act": "relu",
}  # 90: down rows are no whole blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """A small ReLU-LLaMA whose down projection cannot be quantised."""
    return make_folder(tmp_path_factory.mktemp("q") / "model", FolderCase("Llama", "llama2", SIZES))


@pytest.mark.parametrize(("name", "bound"), [("Q8_0", 0.01), ("Q4_0", 0.12), ("F16", 5e-4), ("BF16", 4e-3)])
def test_errors_are_those_of_the_file(folder: TinyFolder, tmp_path: Path, name: str, bound: float) -> None:
    """A block of 32 normal values reaches about 2.2 deviations: a step of that over 127 or 8, a third of it
    as the rounding's deviation."""
    report = quantize_model(folder.path, tmp_path / "out.gguf", name)
    with ModelFolder.open(folder.path) as source, GGUFFile.open(tmp_path / "out.gguf") as made:
        assert list(made.tensors) == list(source.tensors)
        squares: dict[str, list[float]] = {}
        for tensor, info in made.tensors.items():
            if len(info.shape) == 1 or tensor in report.kept:
                assert np.array_equal(made.tensor(tensor), source.tensor(tensor))
                continue
            finer = name == "Q4_0" and tensor in ("token_embd.weight", "output.weight")
            assert info.type_name == ("Q8_0" if finer else name)
            before, after = (
                dequantize(
                    np.ascontiguousarray(f.tensor(tensor)), RowType(f.info(tensor).row_type), *info.shape
                )
                for f in (source, made)
            )
            found = squares.setdefault(tensor.removesuffix(".weight").rpartition(".")[2], [0.0, 0.0])
            found[0] += float(np.sum((after - before).astype(np.float64) ** 2))
            found[1] += float(np.sum(before.astype(np.float64) ** 2))
        for kind, (error, whole) in squares.items():
            assert report.errors[kind] == pytest.approx(np.sqrt(error / whole), rel=1e-6)
            assert report.errors[kind] < bound
    blocks = name in ("Q8_0", "Q4_0")
    assert report.kept == (tuple(f"blk.{i}.ffn_down.weight" for i in range(3)) if blocks else ())


def test_the_file_is_the_model(folder: TinyFolder, tmp_path: Path) -> None:
    quantize_model(folder.path, tmp_path / "out.gguf", "F16")
    tokens = folder.tokens(12)
    source, made = load_model(folder.path), load_model(tmp_path / "out.gguf")
    expected = forward(source, tokens)
    assert np.abs(forward(made, tokens) - expected).max() < 0.01 * np.abs(expected).max()
    assert made.hyper == source.hyper
    assert made.source.get("general.file_type", int) == 1
    text = "two boats <tool>"
    assert Tokenizer.from_gguf(made.source).encode(text) == Tokenizer.from_gguf(source.source).encode(text)


def test_what_is_refused(folder: TinyFolder, tmp_path: Path) -> None:
    quantize_model(folder.path, tmp_path / "half.gguf", "F16")
    with pytest.raises(ConvertError, match="no float matrices to write as F16"):
        quantize_model(tmp_path / "half.gguf", tmp_path / "again.gguf", "F16")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.path.iterdir():
        (broken / file.name).symlink_to(file)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][70, 3] = np.inf
    (broken / "model.safetensors").unlink()
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(
        ConvertError, match=r"blk\.1\.ffn_up\.weight has a value that is not finite in row 70"
    ):
        quantize_model(broken, tmp_path / "out.gguf", "Q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_types_of_rows_are_those_of_the_format() -> None:
    """The kernels have numbers and sizes from C, the file formats from their own table."""
    for kind in RowType:
        shape = BLOCK_SHAPES[TensorType[kind.name]]
        assert (TensorType[kind.name], block_shape(kind)) == (kind, (shape.values, shape.nbytes))
    assert {kind.name for kind in WRITTEN_TYPES} == set(get_args(WrittenType))
