"""Directories of mixtures of experts: what is refused by name, and that stacks are never joined unasked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from powerinfer_formats import fingerprint
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.errors import FormatError
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_kernels import RowType
from powerinfer_tools.errors import PowerInferError
from powerinfer_tools.model.ffn_matrices import ExpertsFFN
from powerinfer_tools.model.huggingface import ModelFolder
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from powerinfer_tools.stages.quantize.quantization import quantize_model
from tiny_folders import FOLDER_CASES, FolderCase, TinyFolder, make_folder

#: Rows of whole blocks, to be quantised.
QWEN2 = {"hidden_size": 64, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
QWEN2 |= {"shared_expert_intermediate_size": 96}
STACKS = tuple(f"blk.{i}.ffn_{kind}_exps.weight" for i in range(3) for kind in ("gate", "up", "down"))
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    return make_folder(tmp_path_factory.mktemp("experts") / "model", FolderCase("Qwen2Moe", "qwen2", QWEN2))


@pytest.fixture
def copy(made: TinyFolder, tmp_path: Path) -> Path:
    """One of links to it, to be changed."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in made.path.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def change(
    folder: Path, settings: dict[str, Any], weights: Callable[[Weights], object] | None = None
) -> None:
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    if weights is not None:
        found = load_file(folder / "model.safetensors")
        weights(found)
        (folder / "model.safetensors").unlink()
        save_file(found, folder / "model.safetensors")


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("settings", "weights", "message"),
    [
        ({"decoder_sparse_step": 2}, None, r"decoder_sparse_step other than 1 .*layers without experts"),
        ({"mlp_only_layers": [0]}, None, r"mlp_only_layers other than \[\] .*layers without experts"),
        ({"num_experts": ...}, None, "num_experts is missing"),
        ({"num_experts": 0}, None, "num_experts is 0, expected 1 to 4096"),
        ({"num_experts": 4}, None, "has a tensor 'model.layers.*experts.4.*does not have"),
        ({"num_experts": 6}, None, r"no tensor 'model\.layers\.0\.mlp\.experts\.5\.gate_proj\.weight'"),
        ({"num_experts_per_tok": 9}, None, "expert_used_count is 9"),
        ({"num_experts_per_tok": ...}, None, "num_experts_per_tok is missing"),
        ({"norm_topk_prob": 1}, None, "norm_topk_prob is 1, expected true or false"),
        ({"moe_intermediate_size": 24}, None, "experts.0.gate_proj.weight' in model.safetensors and 4 more"),
        ({"shared_expert_intermediate_size": ...}, None, "shared_expert_intermediate_size is missing"),
        ({}, lambda w: w.pop(EXPERT), f"no tensor '{EXPERT}'"),
        (
            {},
            lambda w: w.update({EXPERT: np.zeros((31, 64), np.float32)}),
            f"'{EXPERT}' is 31 × 64 of F32, that of the first expert 32 × 64 of F32",
        ),
        (
            {},
            lambda w: w.update({EXPERT: w[EXPERT].astype(np.float16)}),
            f"'{EXPERT}' is 32 × 64 of F16, that of the first expert 32 × 64 of F32",
        ),
        (
            {},
            lambda w: w.update({"model.layers.0.mlp.shared_expert_gate.weight": np.zeros((2, 64), "f4")}),
            "shared_expert_gate.weight' in model.safetensors has the shape 2 × 64, expected 64",
        ),
        ({"layer_types": ["linear_attention"] * 3}, None, "layers of type 'linear_attention'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    copy: Path, settings: dict[str, Any], weights: Callable[[Weights], object] | None, message: str
) -> None:
    change(copy, settings, weights)
    with pytest.raises((FormatError, PowerInferError), match=message):
        load_model(copy)


def test_both_names_of_the_number_of_experts(made: TinyFolder, copy: Path) -> None:
    tokens = made.tokens(7)
    expected = forward(load_model(copy), tokens)
    change(copy, {"num_experts": ..., "num_local_experts": 5})
    assert np.array_equal(forward(load_model(copy), tokens), expected)


def test_weights_of_routers_add_up_to_one_where_the_file_says_so(made: TinyFolder, copy: Path) -> None:
    tokens = made.tokens(7)
    assert load_model(copy).hyper.routing.normalized is False  # type: ignore[union-attr]
    change(copy, {"norm_topk_prob": True})
    model = load_model(copy)
    assert model.hyper.routing is not None
    assert model.hyper.routing.normalized
    made.module.config.norm_topk_prob = True
    gates = [layer.mlp.gate for layer in made.module.model.layers]
    try:
        for gate in gates:
            gate.norm_topk_prob = True
        expected = made.logits(tokens)
    finally:
        for gate in gates:
            gate.norm_topk_prob = False
    assert np.abs(forward(model, tokens) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["mixtral-f16", "qwen3moe-sliding"])
def test_experts_are_mapped_one_by_one(name: str, tmp_path: Path) -> None:
    """No copy of any expert, of files and of shards; joined on demand, and then not kept."""
    folder = make_folder(tmp_path / "model", FOLDER_CASES[name])
    model = load_model(folder.path)
    source = model.source
    assert isinstance(source, ModelFolder)
    for layer in model.layers:
        assert isinstance(layer.ffn, ExpertsFFN)
        for index in range(layer.ffn.router.rows):
            for weight in layer.ffn.expert(index).matrices:
                assert not weight.data.flags.owndata
                assert not weight.data.flags.writeable
        assert layer.ffn.router.row_type == RowType.F32
    for name in STACKS:
        joined, pieces = source.tensor(name), source.pieces(name)
        assert np.array_equal(joined, np.concatenate(pieces))
        assert len(joined) == source.info(name).nbytes
        assert len(pieces) == source.info(name).shape[0]
        assert not joined.flags.writeable
        assert name not in source._changed


def test_the_fingerprint_samples_pieces_as_if_they_were_joined() -> None:
    random = np.random.default_rng(2)
    for cuts in ([], [1], [5, 5, 90], [50], [99], list(range(0, 100, 7))):
        data = random.integers(0, 256, 100, dtype=np.uint8)
        pieces = np.split(data, cuts)
        for first, size in ((0, 100), (0, 1), (3, 60), (49, 2), (99, 1), (88, 12), (50, 0)):
            found = list(fingerprint._range(pieces, first, size))
            assert np.array_equal(np.concatenate([[], *found]), data[first : first + size])


@pytest.mark.parametrize("row_type", ["Q8_0", "Q4_0"])
def test_quantize_writes_experts_and_keeps_routers(made: TinyFolder, tmp_path: Path, row_type: str) -> None:
    output = tmp_path / "out.gguf"
    report = quantize_model(made.path, output, row_type)
    assert set(report.kept) == {f"blk.{i}.ffn_gate_inp.weight" for i in range(3)}
    with GGUFFile.open(output) as gguf:
        for name in STACKS:
            assert gguf.info(name).row_type == TensorType[row_type]
            assert gguf.info(name).shape[0] == 5
        assert gguf.info("blk.0.ffn_gate_inp.weight").row_type == TensorType.F32
    assert report.errors["ffn_up_exps"] < (0.01 if row_type == "Q8_0" else 0.12)
    tokens = made.tokens(9)
    expected, got = (forward(load_model(path), tokens) for path in (made.path, output))
    difference = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert difference < (0.05 if row_type == "Q8_0" else 0.6)
