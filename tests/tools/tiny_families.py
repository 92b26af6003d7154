"""The ``transformers`` module of each family of tiny models, and how its parameters are called in GGUF.

Names, metadata and row orders are those of llama.cpp's converters; for opt and bamboo, which llama.cpp has
not, those of PowerInfer's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGUFWriter
from numpy.typing import NDArray
from torch.nn import functional
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

if TYPE_CHECKING:
    from tiny_models import TinySpec

Shape = dict[str, Any]


def make_module(spec: TinySpec, tokens: int) -> PreTrainedModel:
    """The module of ``spec`` for a vocabulary of ``tokens``; its weights are not drawn yet."""
    shape: Shape = {
        "vocab_size": tokens,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    return _MAKERS[spec.family](spec, shape)


def _llama_like(spec: TinySpec, shape: Shape) -> Shape:
    rope: Shape = {"rope_type": "default", "rope_theta": spec.rope_base}
    if spec.rope_factors:
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    return shape | {
        "intermediate_size": spec.neurons,
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": 1e-5,
        "hidden_act": "relu" if spec.activation == "fatrelu" else spec.activation,
        "rope_parameters": rope,
    }


def _llama(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    module = LlamaForCausalLM(LlamaConfig(**_llama_like(spec, shape), head_dim=spec.head_dim))
    if spec.activation == "fatrelu":  # ProSparse's, which transformers has not
        for layer in module.model.layers:
            layer.mlp.act_fn = torch.nn.Threshold(spec.cut, 0.0)
    return module


def _mistral(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    shape = _llama_like(spec, shape) | {"head_dim": spec.head_dim, "sliding_window": None}
    return MistralForCausalLM(MistralConfig(**shape))


def _arcee(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    return ArceeForCausalLM(ArceeConfig(**_llama_like(spec, shape), head_dim=spec.head_dim))


def _smollm3(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    return SmolLM3ForCausalLM(SmolLM3Config(**_llama_like(spec, shape), head_dim=spec.head_dim))


def _bamboo(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    """transformers has no Bamboo; it is Llama with relu(gate)·relu(up)."""
    shape = _llama_like(spec, shape) | {"hidden_act": "relu", "head_dim": spec.head_dim}
    module = LlamaForCausalLM(LlamaConfig(**shape))
    for layer in module.model.layers:
        layer.mlp.forward = _drelu_forward(layer.mlp)
    return module


def _drelu_forward(mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = mlp.down_proj(functional.relu(mlp.gate_proj(x)) * functional.relu(mlp.up_proj(x)))
        return out

    return forward


def _qwen2(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    assert spec.head_dim * spec.heads == spec.width, "Qwen2 has no head_dim of its own"
    return Qwen2ForCausalLM(Qwen2Config(**_llama_like(spec, shape)))


def _mixtral(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    shape = _llama_like(spec, shape) | {"head_dim": spec.head_dim, "num_local_experts": spec.experts}
    shape |= {"num_experts_per_tok": spec.experts_used, "sliding_window": None}
    return MixtralForCausalLM(MixtralConfig(**shape))


def _qwen_experts(spec: TinySpec, shape: Shape) -> Shape:
    return _llama_like(spec, shape) | {
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.experts_used,
        "moe_intermediate_size": spec.neurons,
        "norm_topk_prob": spec.family == "qwen3moe",
    }


def _qwen2moe(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    shape = _qwen_experts(spec, shape) | {"shared_expert_intermediate_size": spec.shared_neurons}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**shape))


def _qwen3moe(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_qwen_experts(spec, shape), head_dim=spec.head_dim))


def _qwen3(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_llama_like(spec, shape), head_dim=spec.head_dim))


def _gemma3(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    everywhere: Shape = {"rope_type": "default", "rope_theta": spec.rope_base}
    if spec.linear_rope != 1.0:
        everywhere |= {"rope_type": "linear", "factor": spec.linear_rope}
    shape = _llama_like(spec, shape) | {
        "head_dim": spec.head_dim,
        "query_pre_attn_scalar": spec.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": spec.window,
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(spec.layers)],
        "rope_parameters": {
            "full_attention": everywhere,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    del shape["hidden_act"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape))


def _opt(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    shape = shape | {
        "ffn_dim": spec.neurons,
        "word_embed_proj_dim": spec.width,
        "activation_function": spec.activation,
        "do_layer_norm_before": True,
    }
    return OPTForCausalLM(OPTConfig(**shape))


def _falcon(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    """One key head: the multi-query form of 7B; several: that of 40B, with one norm (11B) or two."""
    shape = shape | {
        "ffn_hidden_size": spec.neurons,
        "num_kv_heads": spec.kv_heads,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": spec.kv_heads > 1,
        "num_ln_in_parallel_attn": (2 if spec.two_norms else 1) if spec.kv_heads > 1 else None,
        "bias": False,
        "alibi": False,
        "activation": {"gelu_erf": "gelu"}.get(spec.activation, spec.activation),
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_base},
    }
    return FalconForCausalLM(FalconConfig(**shape))


def _nemotron(spec: TinySpec, shape: Shape) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": spec.rope_base, "partial_rotary_factor": 0.5}
    shape = _llama_like(spec, shape) | {"head_dim": spec.head_dim, "rope_parameters": rope, "norm_eps": 1e-5}
    del shape["rms_norm_eps"]
    return NemotronForCausalLM(NemotronConfig(**shape))


_MAKERS: dict[str, Callable[[TinySpec, Shape], PreTrainedModel]] = {
    "llama": _llama,
    "mistral": _mistral,
    "arcee": _arcee,
    "smollm3": _smollm3,
    "bamboo": _bamboo,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "qwen2moe": _qwen2moe,
    "qwen3moe": _qwen3moe,
    "gemma3": _gemma3,
    "opt": _opt,
    "falcon": _falcon,
    "nemotron": _nemotron,
}

#: Families whose files pair neighbours of a head, as llama's do.
_LIKE_LLAMA = ("llama", "mistral", "mixtral", "bamboo", "arcee", "smollm3")
_LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_NAMES = {
    "gemma3": _LLAMA_NAMES
    | {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "opt": {
        "model.decoder.embed_tokens": "token_embd",
        "model.decoder.embed_positions": "position_embd",
        "model.decoder.final_layer_norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_output",
        "self_attn_layer_norm": "attn_norm",
        "fc1": "ffn_up",
        "fc2": "ffn_down",
        "final_layer_norm": "ffn_norm",
    },
    "falcon": {
        "transformer.word_embeddings": "token_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
        "input_layernorm": "attn_norm",
        "ln_mlp": "attn_norm",
        "ln_attn": "attn_norm_2",
    },
}
_LAYERS = ("model.layers.", "model.decoder.layers.", "transformer.h.")


def gguf_name(spec: TinySpec, name: str) -> tuple[str, str]:
    """GGUF name and kind of the parameter that ``transformers`` calls ``name``."""
    kinds = _NAMES.get(spec.family, _LLAMA_NAMES)
    module, _, leaf = name.rpartition(".")
    for prefix in _LAYERS:
        if module.startswith(prefix):
            layer, _, module = module.removeprefix(prefix).partition(".")
            return f"blk.{layer}.{kinds[module]}.{leaf}", kinds[module]
    return f"{kinds[module]}.{leaf}", kinds[module]


_EXPERT_KINDS = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
    "mlp.shared_expert_gate.weight": ("ffn_gate_inp_shexp",),
}


def is_expert(name: str) -> bool:
    """Whether the parameter is stored otherwise than as one matrix of its own."""
    return name.endswith(tuple(_EXPERT_KINDS))


def expert_names(name: str) -> list[tuple[str, str]]:
    """GGUF names and kinds of the tensors that such a parameter becomes."""
    layer, _, leaf = name.removeprefix("model.layers.").partition(".")
    return [(f"blk.{layer}.{kind}.weight", kind) for kind in _EXPERT_KINDS[leaf]]


def row_order(spec: TinySpec, kind: str, rows: int) -> NDArray[np.int64] | None:
    """The order in which the file has the rows of ``kind``; None: as transformers has them."""
    if spec.family in _LIKE_LLAMA and kind in ("attn_q", "attn_k"):
        # The file pairs neighbours instead of halves of a head.
        halves = np.arange(rows).reshape(-1, 2, spec.head_dim // 2)
        return halves.swapaxes(1, 2).reshape(-1)
    if spec.family == "falcon" and kind == "attn_qkv":
        # Each key head with its queries and values becomes all queries, all keys, all values.
        groups = np.arange(rows).reshape(spec.kv_heads, -1, spec.head_dim)
        return np.concatenate([part.reshape(-1) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])])
    return None


def stored_one_above(spec: TinySpec, name: str) -> bool:
    """Whether the file has what transformers has plus one: norms that are written as 1 + weight."""
    return spec.family in ("gemma3", "nemotron") and name.endswith("norm.weight")


def write_family_keys(writer: GGUFWriter, spec: TinySpec, tokens: int) -> None:
    """The metadata that families differ in."""
    if spec.family in ("opt", "falcon", "nemotron"):
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
    if spec.family != "opt":
        writer.add_rope_freq_base(spec.rope_base)
    if spec.family not in ("qwen2", "qwen2moe", "opt", "falcon"):
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
    if spec.experts:
        writer.add_expert_count(spec.experts)
        writer.add_expert_used_count(spec.experts_used)
    if spec.family in ("qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(spec.neurons)
    if spec.shared_neurons:
        writer.add_expert_shared_feed_forward_length(spec.shared_neurons)
    if spec.family in _LIKE_LLAMA:
        writer.add_vocab_size(tokens)
        writer.add_rope_dimension_count(spec.head_dim)
    if spec.family == "nemotron":
        writer.add_rope_dimension_count(spec.head_dim // 2)
