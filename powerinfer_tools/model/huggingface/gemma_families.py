"""Gemma 3n and Gemma 4 as Hugging Face directories: rows of :mod:`.families`."""

import math
from statistics import NormalDist
from typing import Any

from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.family import (
    EMBEDDING,
    FFN,
    HEAD_NORMS,
    LAYER,
    Family,
    Rule,
    Setting,
    attention,
    optional,
    sizes,
)

_FULL = "full_attention"
_RULES = (
    EMBEDDING,
    Rule("output_norm.weight", "model.norm.weight"),
    Rule("blk.{i}.attn_norm.weight", f"{LAYER}.input_layernorm.weight"),
    Rule("blk.{i}.post_attention_norm.weight", f"{LAYER}.post_attention_layernorm.weight"),
    Rule("blk.{i}.ffn_norm.weight", f"{LAYER}.pre_feedforward_layernorm.weight"),
    Rule("blk.{i}.post_ffw_norm.weight", f"{LAYER}.post_feedforward_layernorm.weight"),
    *optional(*attention(), *HEAD_NORMS),
    *FFN,
)
#: Inputs of single layers.
_INPUTS = optional(
    Rule("per_layer_token_embd.weight", "model.embed_tokens_per_layer.weight"),
    Rule("per_layer_model_proj.weight", "model.per_layer_model_projection.weight"),
    Rule("per_layer_proj_norm.weight", "model.per_layer_projection_norm.weight"),
    Rule("blk.{i}.inp_gate.weight", f"{LAYER}.per_layer_input_gate.weight"),
    Rule("blk.{i}.proj.weight", f"{LAYER}.per_layer_projection.weight"),
    Rule("blk.{i}.post_norm.weight", f"{LAYER}.post_per_layer_input_norm.weight"),
)
_STREAMS = (
    Rule("altup_proj.weight", "model.altup_projections.{e}.weight"),
    Rule("altup_unembd_proj.weight", "model.altup_unembed_projections.{e}.weight"),
    Rule("blk.{i}.altup_correct_scale.weight", f"{LAYER}.altup.correct_output_scale"),
    *(
        Rule(f"blk.{{i}}.{name}.weight", f"{LAYER}.{stored}.weight")
        for name, stored in (
            ("altup_correct_coef", "altup.correction_coefs"),
            ("altup_predict_coef", "altup.prediction_coefs"),
            ("altup_router", "altup.modality_router"),
            ("altup_router_norm", "altup.router_norm"),
            ("laurel_l", "laurel.linear_left"),
            ("laurel_r", "laurel.linear_right"),
            ("laurel_post_norm", "laurel.post_laurel_norm"),
        )
    ),
)
_EXPERTS = optional(
    Rule("blk.{i}.ffn_gate_inp.weight", f"{LAYER}.router.proj.weight", single=True),
    Rule("blk.{i}.ffn_gate_inp.scale", f"{LAYER}.router.scale"),
    Rule("blk.{i}.ffn_gate_up_exps.weight", f"{LAYER}.experts.gate_up_proj"),
    Rule("blk.{i}.ffn_down_exps.weight", f"{LAYER}.experts.down_proj"),
    Rule("blk.{i}.ffn_down_exps.scale", f"{LAYER}.router.per_expert_scale"),
    Rule("blk.{i}.pre_ffw_norm_2.weight", f"{LAYER}.pre_feedforward_layernorm_2.weight"),
    Rule("blk.{i}.post_ffw_norm_1.weight", f"{LAYER}.post_feedforward_layernorm_1.weight"),
    Rule("blk.{i}.post_ffw_norm_2.weight", f"{LAYER}.post_feedforward_layernorm_2.weight"),
)


def _layers(config: Config) -> int:
    return config.integer("num_hidden_layers", high=4096)


def _kinds(config: Config) -> list[Any]:
    """The kind of each layer, which these files have to say."""
    kinds = config.items("layer_types")
    if len(kinds) != _layers(config):
        raise config.fail("layer_types", f"has {len(kinds)} entries for {_layers(config)} layers")
    return kinds


def _of_layers(config: Config, name: str, older: str, default: int) -> list[int]:
    """``name`` of each layer: where there are settings of single layers, they go before; layers without a
    window may have a value of their own under an ``older`` name."""
    usual = config.integer(name, default, high=1 << 22)
    wide = config.integer(older, usual, high=1 << 22)
    singles = config.section("per_layer_config")
    return [
        singles.section(str(index)).integer(name, wide if kind == _FULL else usual, high=1 << 22)
        for index, kind in enumerate(_kinds(config))
    ]


def _head_dim(config: Config, *, wide: bool) -> int:
    """Values of a head of layers without a window (``wide``), or of the others."""
    pairs = zip(_kinds(config), _of_layers(config, "head_dim", "global_head_dim", 256), strict=True)
    dims = {dim for kind, dim in pairs if (kind == _FULL) == wide}
    if len(dims) > 1:
        raise config.fail("per_layer_config", "has heads of several widths in layers of one kind")
    return dims.pop() if dims else config.integer("head_dim", 256, high=1 << 14)


def _wide_dim(config: Config) -> int:
    return _head_dim(config, wide=True)


def _local_dim(config: Config) -> int:
    return _head_dim(config, wide=False)


def _key_heads(config: Config) -> list[int]:
    return _of_layers(config, "num_key_value_heads", "num_global_key_value_heads", 4)


def _shared(config: Config) -> int:
    return config.integer("num_kv_shared_layers", 0, low=0, high=_layers(config))


def _input_size(config: Config) -> int:
    return config.integer("hidden_size_per_layer_input", 256, low=0, high=1 << 16)


def _gemma4_neurons(config: Config) -> list[int]:
    """Layers without keys may have twice as many."""
    neurons = config.integer("intermediate_size", high=1 << 22)
    doubled = _shared(config) if config.flag("use_double_wide_mlp", False) else 0
    first = _layers(config) - doubled
    return [neurons * (2 if index >= first else 1) for index in range(_layers(config))]


def _gemma3n_neurons(config: Config) -> list[int]:
    """One number, or one for each layer."""
    value = config.get("intermediate_size")
    values = value if isinstance(value, list) else [value] * _layers(config)
    if len(values) != _layers(config) or any(type(one) is not int or not 0 < one < 1 << 22 for one in values):
        raise config.fail("intermediate_size", "is no size of the FFN of each layer")
    return values


def _deviations(config: Config) -> list[float]:
    """How many standard deviations above the mean are as many values as a share says, if they are normally
    distributed; −∞ where every value counts."""
    value = config.get("activation_sparsity_pattern")
    shares = value if isinstance(value, list) else [0.0 if value is None else value] * _layers(config)
    if len(shares) != _layers(config) or any(
        type(share) not in (int, float) or not 0 <= share < 1 for share in shares
    ):
        raise config.fail("activation_sparsity_pattern", "is no share of the FFN of each layer")
    return [NormalDist().inv_cdf(share) if share else -math.inf for share in shares]


def _expert_count(config: Config) -> int:
    return config.integer("num_experts", high=4096) if config.flag("enable_moe_block", False) else 0


_SIZES = (
    *(
        row
        for row in sizes(max_position_embeddings=131072)
        if row.name not in ("intermediate_size", "num_key_value_heads", "head_dim")
    ),
    Setting("attention.key_length", "head_dim", derive=_wide_dim),
    Setting("attention.value_length", "head_dim", derive=_wide_dim),
    Setting("attention.key_length_swa", "head_dim", derive=_local_dim),
    Setting("attention.value_length_swa", "head_dim", derive=_local_dim),
    Setting("rope.dimension_count_swa", "head_dim", derive=_local_dim),
    Setting("attention.shared_kv_layers", "num_kv_shared_layers", derive=_shared, zero=True),
    Setting("embedding_length_per_layer_input", "hidden_size_per_layer_input", derive=_input_size, zero=True),
)
#: In front of the names of a text model inside of one of pictures and sound, and what belongs to those.
_SPELLINGS = ("model.", "model.language_model.", "language_model.model.")
_OTHERS = tuple(
    f"{start}{name}"
    for start in ("model.", "")
    for name in ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")
)

GEMMAS = (
    Family(
        "gemma3n_text",
        ("Gemma3nForCausalLM",),
        "gemma3n",
        (
            *_SIZES,
            Setting("altup.num_inputs", "altup_num_inputs", 4, high=64),
            Setting("altup.active_idx", "altup_active_idx", 0, high=64),
        ),
        (*_RULES, *_INPUTS, *_STREAMS),
        spellings=_SPELLINGS,
        activation_name="hidden_activation",
        activation="gelu_pytorch_tanh",
        tied=True,
        rope_base=1e6,
        window=512,
        lists=(("attention.head_count_kv", _key_heads), ("feed_forward_length", _gemma3n_neurons)),
        real_lists=(("activation_sparsity_scale", _deviations),),
        same=(("vocab_size_per_layer_input", "vocab_size"),),
        fixed=(("altup_correct_scale", True),),
        reasons=(("vocab_size_per_layer_input", "tokens of pictures that have no inputs of layers"),),
        ignored=_OTHERS,
    ),
    Family(
        "gemma4_text",
        ("Gemma4ForCausalLM",),
        "gemma4",
        (
            *_SIZES,
            Setting("expert_count", "num_experts", derive=_expert_count),
            Setting("expert_used_count", "top_k_experts", 0, high=4096),
            Setting("expert_feed_forward_length", "moe_intermediate_size", 0, high=1 << 22),
        ),
        (*_RULES, *_INPUTS, *_EXPERTS, Rule("blk.{i}.layer_output_scale.weight", f"{LAYER}.layer_scalar")),
        spellings=_SPELLINGS,
        activation_name="hidden_activation",
        activation="gelu_pytorch_tanh",
        tied=True,
        rope_base=1e6,
        window=512,
        lists=(("attention.head_count_kv", _key_heads), ("feed_forward_length", _gemma4_neurons)),
        same=(("vocab_size_per_layer_input", "vocab_size"),),
        ignored=_OTHERS,
    ),
)
