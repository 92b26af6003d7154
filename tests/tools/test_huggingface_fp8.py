"""FP8 weights with scales of blocks: exactly the values that torch and transformers take them for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from powerinfer_formats import errors
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.huggingface import ModelFolder
from powerinfer_tools.model.huggingface.block_scales import BlockScales, _table
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from tiny_folders import FOLDER_CASES, FolderCase, make_folder

BLOCK = (16, 24)  # neither divides the matrices
CASES = {
    "qwen3": FolderCase("Qwen3", "qwen2", {"head_dim": 12}),
    "qwen3moe": FOLDER_CASES["qwen3moe-sliding"],
}


def test_all_256_numbers() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(_table(), expected)


def in_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Rewrite the matrices of the layers; gives the values that they stand for."""
    exact: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in list(tensors.items()):
            if value.ndim == 2 and "_proj" in name:
                rows, columns = (-(-size // block) for size, block in zip(value.shape, BLOCK, strict=True))
                scales = torch.rand(rows, columns) * 0.01 + 0.001
                each = scales.repeat_interleave(BLOCK[0], 0)[: value.shape[0]]
                each = each.repeat_interleave(BLOCK[1], 1)[:, : value.shape[1]]
                tensors[name] = (value.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = scales
                exact[name] = tensors[name].float() * each
        save_file(tensors, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.unlink()
        everything = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for file in folder.glob("*.safetensors"):
            file.unlink()
        save_file(everything, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, {"quant_method": "fp8", "weight_block_size": list(BLOCK)})
    return exact


def change_config(folder: Path, quantised: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantised
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_widened_weights(name: str, tmp_path: Path) -> None:
    made = make_folder(tmp_path / "m", CASES[name])
    exact = in_fp8(made.path)
    assert exact
    state = made.module.state_dict()
    stacked = {key: value for key, value in state.items() if "experts." in key}
    if not stacked:
        made.module.load_state_dict({key: exact.get(key, value).float() for key, value in state.items()})
    tokens = made.tokens(12)
    model = load_model(made.path)
    assert model.embedding.row_type.name == "F32"
    logits = forward(model, tokens)
    if not stacked:
        assert np.abs(logits - made.logits(tokens)).max() < 2e-3
    layer = model.source
    for stored, value in exact.items():
        if ".experts." not in stored and "down_proj" in stored:
            number = stored.split(".")[2]
            rows = layer.tensor(f"blk.{number}.ffn_down.weight").view(np.float32).reshape(value.shape)
            np.testing.assert_array_equal(rows, value.numpy())
        if ".experts.1.down_proj" in stored:
            number = stored.split(".")[2]
            stack = layer.tensor(f"blk.{number}.ffn_down_exps.weight").view(np.float32)
            each = len(stack) // layer.info(f"blk.{number}.ffn_down_exps.weight").shape[0]
            np.testing.assert_array_equal(stack[each : 2 * each], value.numpy().reshape(-1))


def remove_scales(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]


def cut_scales(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    tensors[name] = tensors[name][:-1].contiguous()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (remove_scales, errors.MissingTensor, "scales of 'model.layers.0.mlp.up_proj.weight'"),
        (cut_scales, errors.WrongShape, "up_proj.weight_scale_inv' is .* expected"),
    ],
)
def test_scales_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], error: type[Exception], message: str
) -> None:
    made = make_folder(tmp_path / "m", CASES["qwen3"])
    in_fp8(made.path)
    tensors = load_file(made.path / "model.safetensors")
    change(tensors)
    save_file(tensors, made.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=message):
        ModelFolder.open(made.path)


@pytest.mark.parametrize(
    ("quantised", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by 'gptq'"),
        ({"quant_method": "awq"}, "quantised by 'awq'"),
        ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes'"),
        ({"quant_method": "compressed-tensors"}, "quantised by 'compressed-tensors'"),
        ({"quant_method": "hqq"}, "quantised by 'hqq'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantised by 'modelopt'"),
        ({"quant_method": "fp8"}, "quantised by 'fp8' without scales of blocks"),
        ({}, "quantised by 'None'"),
    ],
)
def test_other_ways_of_quantising_are_refused_by_name(
    tmp_path: Path, quantised: dict[str, Any], message: str
) -> None:
    made = make_folder(tmp_path / "m", CASES["qwen3"])
    change_config(made.path, quantised)
    with pytest.raises(ModelError, match=message):
        ModelFolder.open(made.path)


def test_a_block_size_that_is_none(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "m", CASES["qwen3"])
    change_config(made.path, {"quant_method": "fp8", "weight_block_size": [128, 0]})
    with pytest.raises(errors.BadField, match="weight_block_size is no pair"):
        ModelFolder.open(made.path)


def test_blocks_at_the_edges() -> None:
    data = np.full((3, 5), 0x38, np.uint8)  # 1.0
    scales = np.array([[1, 2], [3, 4]], np.float32)
    expected = [[1, 1, 1, 2, 2], [1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]
    np.testing.assert_array_equal(BlockScales(2, 3).values(data, scales), expected)
