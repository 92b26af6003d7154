"""MXFP4 experts of gpt-oss's directories: the values that the format gives them, without rounding."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_logits import logits
from powerinfer_formats import errors
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_kernels import RowType
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from powerinfer_tools.stages.quantize.quantization import quantize_model
from tiny_folders import FolderCase, TinyFolder, make_folder

WIDTH, NEURONS, EXPERTS = 64, 32, 3
CASE = FolderCase(
    "GptOss",
    "gpt2",
    {
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "head_dim": 12,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": 7,
    },
)
#: The 16 numbers of E2M1 (OCP microscaling formats).
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(experts, rows, columns): two neighbours in a byte, the first in the low half; scales are powers."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).reshape(*blocks.shape[:-1], 32).long()
    each = E2M1[codes] * torch.exp2(scales[..., None].float() - 127)
    return each.reshape(*blocks.shape[:2], -1)


def in_mxfp4(folder: TinyFolder) -> None:
    """Random codes in the place of all experts, in the files and in the module."""
    random = torch.Generator().manual_seed(7)
    file = folder.path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape  # stored as columns
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=random).byte()
        scales = torch.randint(123, 126, (experts, rows, columns // 32), generator=random).byte()
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        folder.module.get_parameter(name).data = values(blocks, scales).transpose(1, 2).contiguous()
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder.path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder.path / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    made = make_folder(tmp_path_factory.mktemp("oss") / "model", CASE)
    in_mxfp4(made)
    return made


def test_logits_are_those_of_transformers(folder: TinyFolder) -> None:
    tokens = folder.tokens(24)
    expected = folder.logits(tokens)
    model = load_model(folder.path)
    assert model.layers[0].feeds.down.row_type == RowType.MXFP4
    got = forward(model, tokens)
    assert np.abs(got - expected).max() <= 300 * np.finfo(np.float32).eps * np.abs(expected).max()


def test_a_file_made_of_it_has_the_same_experts(folder: TinyFolder, tmp_path: Path) -> None:
    """``quantize`` writes the other matrices anew, and the blocks as they are."""
    output = tmp_path / "oss.gguf"
    report = quantize_model(folder.path, output, "F16")
    assert any("ffn_gate_exps" in name for name in report.kept)
    with GGUFFile.open(output) as made:
        source = load_model(folder.path).source
        for kind in ("gate", "up", "down"):
            name = f"blk.1.ffn_{kind}_exps.weight"
            assert made.info(name).row_type == RowType.MXFP4
            np.testing.assert_array_equal(made.tensor(name), source.tensor(name))
    tokens = folder.tokens(16)
    expected = forward(load_model(output), tokens, half_cache=True)[7:]
    error = np.sqrt(np.mean((logits(output, tokens) - expected) ** 2) / np.mean(expected**2))
    assert error < 0.01 * np.sqrt(3 * 3)  # activations of 8 bits, for experts in three layers


def without_scales(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]


def with_short_scales(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, :-1].contiguous()


def with_an_odd_row(tensors: dict[str, torch.Tensor]) -> None:
    for kind in ("blocks", "scales"):
        name = f"model.layers.1.mlp.experts.gate_up_proj_{kind}"
        tensors[name] = tensors[name][:, :-1].contiguous()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without_scales, errors.MissingTensor, "no tensor 'model.layers.1.mlp.experts.down_proj_scales'"),
        (with_short_scales, errors.WrongShape, "no blocks of 32 codes, 16 bytes, with a scale each"),
        (with_an_odd_row, errors.WrongShape, "have no halves along axis 1"),
    ],
)
def test_blocks_that_do_not_fit(
    folder: TinyFolder,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    error: type[Exception],
    message: str,
) -> None:
    for file in folder.path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    tensors = load_file(folder.path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=message):
        load_model(tmp_path)
