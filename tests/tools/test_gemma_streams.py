"""Gemma 3n and Gemma 4 as ``transformers`` computes them: streams, inputs of layers, gates that keep the
largest, heads of two widths, layers without keys."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward

WIDTH, HEADS, KV_HEADS, DIM, WIDE, NEURONS, VOCABULARY, INPUT = 36, 3, 1, 12, 20, 44, 50, 10
TOKENS = [3, 41, 7, 7, 12, 1, 49, 25, 30, 2, 18, 5, 44, 9, 33, 21, 6, 4, 28]
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
SPARSE = [0.7, 0.0, 0.0, 0.9]
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": WIDTH,
    "hidden_size_per_layer_input": INPUT,
    "num_hidden_layers": len(KINDS),
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "intermediate_size": NEURONS,
    "sliding_window": 5,
    "layer_types": KINDS,
    "num_kv_shared_layers": 2,
    "max_position_embeddings": 64,
    "final_logit_softcapping": 30.0,
    "attn_implementation": "eager",
}
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "per_layer_token_embd": "embed_tokens_per_layer",
    "per_layer_model_proj": "per_layer_model_projection",
    "per_layer_proj_norm": "per_layer_projection_norm",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "altup_correct_coef": "altup.correction_coefs",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}


def gemma3n() -> Any:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    return Gemma3nForCausalLM(
        Gemma3nTextConfig(**COMMON, laurel_rank=7, altup_num_inputs=3, activation_sparsity_pattern=SPARSE)
    )


def gemma4() -> Any:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    return Gemma4ForCausalLM(Gemma4TextConfig(**COMMON, global_head_dim=WIDE, use_double_wide_mlp=True))


def randomized(model: Any) -> Any:
    """With weights, and factors of layers, of float32 that are nowhere one or zero."""
    torch.manual_seed(1)
    model.eval()
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if values.ndim == 1:
                values.uniform_(0.6, 1.3)
            else:
                values.normal_(std=0.5 if "embed" in name else 1.2 / math.sqrt(values.shape[-1]))
    return model


def write(path: Path, family: str, model: Any) -> Path:
    """The file that holds it."""
    state = {name.removeprefix("model."): values.numpy() for name, values in model.state_dict().items()}
    writer, layers = GGUFWriter(path, family), len(KINDS)
    tensors = {f"{ours}.weight": state[f"{theirs}.weight"] for ours, theirs in NAMES.items()}
    if family == "gemma3n":
        for ours, theirs in (("proj", "projections"), ("unembd_proj", "unembed_projections")):
            tensors[f"altup_{ours}.weight"] = np.stack(
                [state[f"altup_{theirs}.{i}.weight"] for i in range(2)]
            )
    else:
        kept = WIDE // 8  # a quarter of the pairs is turned
        tensors["rope_freqs.weight"] = np.where(np.arange(WIDE // 2) < kept, 1.0, 1e30).astype(np.float32)
    for index in range(layers):
        for ours, theirs in LAYER.items():
            if (values := state.get(f"layers.{index}.{theirs}.weight")) is not None:
                tensors[f"blk.{index}.{ours}.weight"] = values
        for ours, theirs in (
            ("altup_correct_scale", "altup.correct_output_scale"),
            ("layer_output_scale", "layer_scalar"),
        ):
            if (values := state.get(f"layers.{index}.{theirs}")) is not None:
                tensors[f"blk.{index}.{ours}.weight"] = values.reshape(-1)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(5)
    writer.add_array(f"{family}.attention.sliding_window_pattern", [kind == KINDS[0] for kind in KINDS])
    writer.add_rope_freq_base(1e6)
    writer.add_float32(f"{family}.rope.freq_base_swa", 1e4)
    writer.add_uint32(f"{family}.attention.shared_kv_layers", 2)
    writer.add_uint32(f"{family}.embedding_length_per_layer_input", INPUT)
    writer.add_final_logit_softcapping(30.0)
    if family == "gemma3n":
        writer.add_uint32(f"{family}.altup.num_inputs", 3)
        writer.add_uint32(f"{family}.altup.active_idx", 0)
        cuts = [torch.distributions.Normal(0, 1).icdf(torch.tensor(share)).item() for share in SPARSE]
        writer.add_array(f"{family}.activation_sparsity_scale", cuts)
    for end, dim in (("", DIM if family == "gemma3n" else WIDE), ("_swa", DIM)):
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            writer.add_uint32(f"{family}.{key}{end}", dim)
    sizes = [state[f"layers.{index}.mlp.up_proj.weight"].shape[0] for index in range(layers)]
    writer.add_feed_forward_length(sizes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_the_reference_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    """Both in float64, but for tables of angles and constants, which are float32 there."""
    model = randomized({"gemma3n": gemma3n, "gemma4": gemma4}[family]())
    path = write(tmp_path / "model.gguf", family, model)
    with torch.no_grad():
        expected = model.double()(torch.tensor([TOKENS])).logits[0].numpy()
    got = forward(load_model(path), TOKENS)
    assert expected.std() > 1
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
