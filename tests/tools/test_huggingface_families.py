"""Directories of more families, as ``transformers`` writes them for tiny random models: the float64 reference
over the directory against ``transformers``' own logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from engine_logits import logits, near
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from tiny_folders import FolderCase, make_folder

_HEADS = {"head_dim": 12}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_WINDOW = {"sliding_window": 7}
#: Class of ``transformers`` → what its configuration has beside the common sizes.
CASES: dict[str, dict[str, Any]] = {
    "Granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "Olmo": {"clip_qkv": 0.9},
    "Olmo2": {},
    "Olmo3": _WINDOW,
    "Exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "Gemma": _HEADS,
    "Gemma2": _HEADS | _WINDOW | {"query_pre_attn_scalar": 20},
    "Phi3": {"pad_token_id": 0},
    "Starcoder2": {"rope_parameters": _DYNAMIC},
    "StableLm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "Cohere": {"logit_scale": 0.3},
    "Cohere2": _WINDOW | {"logit_scale": 0.3, "num_hidden_layers": 4},
    "GPTNeoX": {"rotary_pct": 0.5, "use_parallel_residual": True},
    "Phi": {"partial_rotary_factor": 0.5},
    "Bloom": {"n_layer": 3, "n_head": 3},
    "Glm": _HEADS | {"partial_rotary_factor": 0.5, "attention_bias": True, "pad_token_id": 0},
    "Glm4": _HEADS | {"partial_rotary_factor": 0.5, "pad_token_id": 0},
    "SeedOss": _HEADS,
    "Ernie4_5": _HEADS,
    "HunYuanDenseV1": _HEADS,
    "Jais2": {"hidden_act": "relu2"},
    "Ministral": _WINDOW | _HEADS,
}
_SPARSE = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 14,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}
CASES |= {
    "Olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "GraniteMoe": CASES["Granite"] | {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Glm4Moe": _HEADS | _SPARSE | {"partial_rotary_factor": 0.5},
    "Dots1": _SPARSE,
    "DeepseekV3": _SPARSE
    | {
        "n_group": 3,
        "topk_group": 2,
        "q_lora_rank": 22,
        "kv_lora_rank": 18,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "MiniMaxM2": _HEADS | {"num_local_experts": 5, "num_experts_per_tok": 2},
}
_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
#: These have an epsilon of 1e-6 in some norms, whatever the configuration says; all real models have it.
_EPS = {"rms_norm_eps": 1e-6}
_LATENT = {
    "q_lora_rank": 22,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DELTA = _EPS | {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_SHARED = {"shared_expert_intermediate_size": 18}
_CONVOLVES = {"pad_token_id": 0, "layer_types": ["conv", "full_attention", "conv"]}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
_GRANITE = CASES["Granite"] | {
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_local_experts": 5,
    "shared_intermediate_size": 18,
}
_NEMOTRON = {
    "head_dim": 12,
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 6,
    "moe_intermediate_size": 14,
    "moe_shared_expert_intermediate_size": 18,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
    "num_hidden_layers": None,
}
_GEMMA = {
    "head_dim": 12,
    "hidden_size_per_layer_input": 10,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 30.0,
    "pad_token_id": 0,
}
CASES["DeepseekV3"] |= _EPS
CASES |= {
    "Apertus": {"pad_token_id": 0},
    "Lfm2": _CONVOLVES | {"block_multiple_of": 8},
    "Lfm2Moe": _CONVOLVES | _MOE | {"num_dense_layers": 1},
    "Qwen3Next": _DELTA | _MOE | _SHARED,
    "Qwen3_5": _DELTA,
    "Qwen3_5Moe": _DELTA | _MOE | _SHARED,
    "GptOss": _HEADS
    | {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 7,
        "rope_parameters": _YARN | {"truncate": False},
    },
    "Llama4": _HEADS
    | {
        "num_local_experts": 5,
        "intermediate_size_mlp": 30,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
        "num_hidden_layers": 4,
    },
    "DeepseekV2": _SPARSE
    | _LATENT
    | _EPS
    | {"topk_method": "greedy", "rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
    "Glm4MoeLite": _SPARSE | _LATENT | _EPS | {"rope_parameters": _YARN | {"mscale": 1, "mscale_all_dim": 1}},
    "GraniteMoeHybrid": _GRANITE,
    "GraniteMoeHybrid-dense": _GRANITE | {"num_local_experts": 0, "position_embedding_type": "rope"},
    "Ernie4_5_Moe": _HEADS
    | {
        "moe_num_experts": 5,
        "moe_k": 2,
        "moe_intermediate_size": 14,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "HunYuanMoEV1": _HEADS | {"num_experts": 5, "moe_topk": 2, "pad_token_id": 0},
    "Ministral3": _HEADS
    | {"rope_parameters": _YARN | {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "Afmoe": _HEADS | _WINDOW | _MOE | {"num_dense_layers": 1, "num_hidden_layers": 4, "mup_enabled": True},
    "ExaoneMoe": _HEADS | _WINDOW | _MOE | {"num_hidden_layers": 4},
    "NemotronH": _NEMOTRON | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "NemotronH-dense": _NEMOTRON | {"layers_block_type": ["linear_attention", "mlp", "full_attention"]},
    "Mamba2": {"num_heads": 8, "head_dim": 12, "n_groups": 2, "state_size": 6},
    "Mamba": {"state_size": 6, "intermediate_size": 72, "num_hidden_layers": 2, "pad_token_id": 0},
    "Jamba": {
        "num_experts": 1,
        "mamba_d_state": 6,
        "mamba_dt_rank": 5,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "pad_token_id": 0,
    },
    "GPT2": {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64, "n_inner": 70},
    "Mpt": {
        "d_model": 36,
        "n_layers": 2,
        "n_heads": 2,
        "max_seq_len": 64,
        "expansion_ratio": 4,
        "attn_config": {"clip_qkv": 1.2},
    },
    "Gemma3n": _GEMMA
    | {
        "laurel_rank": 7,
        "altup_num_inputs": 3,
        "intermediate_size": [44, 60, 60, 44],
        "activation_sparsity_pattern": [0.7, 0.0, 0.0, 0.9],
    },
    "Gemma4": _GEMMA | {"global_head_dim": 20, "use_double_wide_mlp": True},
    "Gemma4-experts": _GEMMA
    | {
        "global_head_dim": 20,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 14,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
    "MiniCPM3": _LATENT | {"scale_emb": 3.0, "scale_depth": 0.9, "dim_model_base": 20},
}
#: A few hundred roundings of float32 of the largest logit.
BOUND = 300 * float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("kind", sorted(CASES))
def test_the_reference_agrees_with_transformers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    folder = make_folder(tmp_path / "model", FolderCase(kind.partition("-")[0], "gpt2", CASES[kind]))
    tokens = folder.tokens(24)
    expected = folder.logits(tokens)
    got = forward(load_model(folder.path), tokens)
    assert np.ptp(expected) > 1
    assert np.abs(got - expected).max() <= BOUND * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["GptOss", "Lfm2", "Qwen3_5Moe", "Llama4"])
def test_the_engine_computes_what_the_reference_does(kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", FolderCase(kind, "gpt2", CASES[kind]))
    tokens = folder.tokens(24)
    expected = forward(load_model(folder.path), tokens, half_cache=True)[11:]
    near(logits(folder.path, tokens), expected)


@pytest.mark.parametrize(
    ("of_text", "model_type", "kind", "start", "picture"),
    [
        (*("Qwen3", "qwen3_vl", "Qwen3VL"), "model.language_model.", "model.visual.patch.weight"),
        (*("Mistral", "mistral3", "Mistral3"), "language_model.model.", "vision_tower.patch.weight"),
        (*("Qwen3_5", "qwen3_5", "Qwen3_5"), "model.language_model.", "model.visual.patch.weight"),
        (*("Llama4", "llama4", "Llama4"), "language_model.model.", "vision_model.patch.weight"),
    ],
)
def test_text_models_inside_of_models_of_images(
    of_text: str, model_type: str, kind: str, start: str, picture: str, tmp_path: Path
) -> None:
    """The same model with its settings in a section, other names, and a part that is left out."""
    case = FolderCase(of_text, "gpt2", _HEADS | CASES.get(of_text, {}))
    folder = make_folder(tmp_path / "model", case)
    tokens = folder.tokens(12)
    expected = forward(load_model(folder.path), tokens)
    settings = json.loads((folder.path / "config.json").read_text())
    section = settings | {"model_type": "qwen3_vl_text" if of_text == "Qwen3" else settings["model_type"]}
    whole = {"model_type": model_type, "text_config": section}
    whole["architectures"] = [f"{kind}ForConditionalGeneration"]
    (folder.path / "config.json").write_text(json.dumps(whole))
    file = folder.path / "model.safetensors"
    named = {
        start + name.removeprefix("model.") if name.startswith("model.") else name: value
        for name, value in load_file(file).items()
    }
    if start.startswith("language_model"):
        named["language_model.lm_head.weight"] = named.pop("lm_head.weight")
    pictures = {
        "model": "model.visual.blocks.0.attn.qkv.weight",
        "language_model": "vision_model.layer.weight",
    }
    pictures["mistral3"] = "vision_tower.layer.weight"
    named[pictures.get(model_type, pictures[start.partition(".")[0]])] = np.ones((3, 4), np.float32)
    save_file(named, file)
    assert np.array_equal(forward(load_model(folder.path), tokens), expected)


_ORIGINAL = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
_LONG = {"long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("Qwen3", _ORIGINAL | {"rope_type": "yarn", "factor": 8.0}),
    "yarn-attention": (
        "Llama",
        _ORIGINAL | {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "beta_fast": 8.0},
    ),
    "yarn-scales": (
        "Llama",
        _ORIGINAL | {"rope_type": "yarn", "factor": 4.0, "mscale": 0.8, "mscale_all_dim": 0.5},
    ),
    "longrope": ("Phi3", _ORIGINAL | _LONG | {"rope_type": "longrope"}),
}


@pytest.mark.parametrize("name", sorted(ROPES))
def test_rotary_scaling_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """Beyond the original context, where it matters."""
    kind, rope = ROPES[name]
    config = {"rope_parameters": rope, "head_dim": 12, "pad_token_id": 0}
    if kind == "Phi3":
        config["original_max_position_embeddings"] = 16
    folder = make_folder(tmp_path / "model", FolderCase(kind, "gpt2", config))
    tokens = folder.tokens(40)
    expected = folder.logits(tokens)
    got = forward(load_model(folder.path), tokens)
    assert np.abs(got - expected).max() <= BOUND * np.abs(expected).max()


def test_sparselm_computes_relu_whatever_its_configuration_says(tmp_path: Path) -> None:
    """SakanaAI's SparseLM: the model type says it, ``hidden_act`` does not."""
    folder = make_folder(tmp_path / "model", FolderCase("Llama", "gpt2", {"hidden_act": "relu"}))
    changed = {
        "model_type": "llama_sparse_relu",
        "architectures": ["SparseLlamaForCausalLM"],
        "hidden_act": "silu",
        "sparsity_gated_mlp": True,
    }
    config = folder.path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    tokens, model = folder.tokens(24), load_model(folder.path)
    expected = folder.logits(tokens)
    assert model.hyper.activation == "relu"
    assert np.abs(forward(model, tokens) - expected).max() <= BOUND * np.abs(expected).max()


def test_turbosparse_mixtral_is_known_by_its_class(tmp_path: Path) -> None:
    """The model type is Mixtral's; the class applies ReLU to gate and up of its experts."""
    case = FolderCase("Mixtral", "llama2", {"num_local_experts": 5, "intermediate_size": 22})
    folder = make_folder(tmp_path / "model", case)
    config = folder.path / "config.json"
    changed = {"architectures": ["SuperSparseMixtralForCausalLM"], "hidden_act": "relu"}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    assert load_model(folder.path).hyper.activation == "drelu"
