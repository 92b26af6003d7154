"""Families of Hugging Face directories with experts: rows of :mod:`.families`.

Every layer has experts; directories in which some have not (``mlp_only_layers``, ``decoder_sparse_step``) are
refused. Routers are kept in float32, as GGUF has them.
"""

from dataclasses import replace

from powerinfer_tools.model.huggingface.changes import interleaved
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.family import (
    EMBEDDING,
    FFN,
    HEAD_NORMS,
    LAYER,
    NORMS,
    Family,
    Real,
    Rule,
    Setting,
    attention,
    every_layer,
    sizes,
)

_KINDS = ("gate", "up", "down")


def _router(stored: str) -> Rule:
    return Rule("blk.{i}.ffn_gate_inp.weight", f"{LAYER}.{stored}.weight", single=True)


def _experts(**stored: str) -> tuple[Rule, ...]:
    """A stack for each kind of matrix."""
    return tuple(
        Rule(f"blk.{{i}}.ffn_{kind}_exps.weight", f"{LAYER}.{name}.weight") for kind, name in stored.items()
    )


_MIXTRAL_EXPERT = "block_sparse_moe.experts.{e}"
_QWEN_EXPERTS = (
    _router("mlp.gate"),
    *_experts(**{kind: f"mlp.experts.{{e}}.{kind}_proj" for kind in _KINDS}),
)
_SHARED_EXPERT = (
    *(
        Rule(f"blk.{{i}}.ffn_{kind}_shexp.weight", f"{LAYER}.mlp.shared_expert.{kind}_proj.weight")
        for kind in _KINDS
    ),
    Rule(
        "blk.{i}.ffn_gate_inp_shexp.weight",
        f"{LAYER}.mlp.shared_expert_gate.weight",
        single=True,
        vector=True,
    ),
)


def _count(config: Config) -> int:
    """The newest files of Qwen3-MoE call it what Mixtral's do."""
    name = "num_local_experts" if config.has("num_local_experts") else "num_experts"
    return config.integer(name, high=4096)


_TAKEN = Setting("expert_used_count", "num_experts_per_tok", high=4096)
_QWEN_SIZES = (
    Setting("expert_count", "num_experts", derive=_count),
    _TAKEN,
    Setting("expert_feed_forward_length", "moe_intermediate_size", high=1 << 22),
)
_WITHOUT = "layers without experts"


def _qwen2_layers(config: Config, index: int) -> bool:
    """Every other of the first ``max_window_layers``."""
    limited = index % 2 == 0 and index < config.integer("max_window_layers", 28, low=0, high=4096)
    return config.flag("use_sliding_window", False) and limited


def _qwen3_layers(config: Config, index: int) -> bool:
    return config.flag("use_sliding_window", False)


MIXTRAL = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    "llama",
    (
        *sizes(num_key_value_heads=8, max_position_embeddings=131072),
        Setting("expert_count", "num_local_experts", 8, high=4096),
        Setting("expert_used_count", "num_experts_per_tok", 2, high=4096),
    ),
    (
        EMBEDDING,
        *NORMS,
        *attention(interleaved),
        _router("block_sparse_moe.gate"),
        *_experts(gate=f"{_MIXTRAL_EXPERT}.w1", up=f"{_MIXTRAL_EXPERT}.w3", down=f"{_MIXTRAL_EXPERT}.w2"),
    ),
    rope_base=1e6,
    norm_eps=1e-5,
    sliding=every_layer,
)
QWEN2_MOE = Family(
    "qwen2_moe",
    ("Qwen2MoeForCausalLM",),
    "qwen2moe",
    (
        *sizes(num_key_value_heads=16, max_position_embeddings=32768),
        *_QWEN_SIZES,
        Setting("expert_shared_feed_forward_length", "shared_expert_intermediate_size", high=1 << 22),
    ),
    (EMBEDDING, *NORMS, *attention(), *_QWEN_EXPERTS, *_SHARED_EXPERT),
    window=4096,
    sliding=_qwen2_layers,
    flags=(("expert_weights_norm", "norm_topk_prob", False),),
    fixed=(("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    reasons=(("decoder_sparse_step", _WITHOUT), ("mlp_only_layers", _WITHOUT)),
)
QWEN3_MOE = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    "qwen3moe",
    (*sizes(num_key_value_heads=4, max_position_embeddings=32768), *_QWEN_SIZES),
    (EMBEDDING, *NORMS, *attention(), *HEAD_NORMS, *_QWEN_EXPERTS),
    window=4096,
    sliding=_qwen3_layers,
    flags=(("expert_weights_norm", "norm_topk_prob", False),),
    fixed=(("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    reasons=(("decoder_sparse_step", _WITHOUT), ("mlp_only_layers", _WITHOUT)),
)


# --- sigmoid routers, dense layers first -------------------------------------------------------------------

#: Layers have a dense FFN, or these.
_SPARSE = (
    *(replace(rule, optional=True) for rule in (*FFN, *_QWEN_EXPERTS)),
    Rule("blk.{i}.exp_probs_b.bias", f"{LAYER}.mlp.gate.e_score_correction_bias", optional=True),
    *(
        Rule(
            f"blk.{{i}}.ffn_{kind}_shexp.weight",
            f"{LAYER}.mlp.shared_experts.{kind}_proj.weight",
            optional=True,
        )
        for kind in _KINDS
    ),
)
_SPARSE_SIZES = (
    Setting("expert_count", "n_routed_experts", high=4096),
    _TAKEN,
    Setting("expert_feed_forward_length", "moe_intermediate_size", high=1 << 22),
    Setting("expert_shared_count", "n_shared_experts", 1, high=1 << 10),
    Setting("expert_group_count", "n_group", 1, high=4096),
    Setting("expert_group_used_count", "topk_group", 1, high=4096),
)
_SIGMOID = (("expert_gating_func", 2),)
_SCALED = (Real("expert_weights_scale", "routed_scaling_factor", 1.0),)
_CHOSEN = (("expert_weights_norm", "norm_topk_prob", True),)


def _latent_key(config: Config) -> int:
    """Values of a head without positions and with them."""
    plain = config.integer("qk_nope_head_dim", high=1 << 12)
    return plain + config.integer("qk_rope_head_dim", high=1 << 10)


def _low_rank(config: Config) -> int:
    """Of queries; 0 for full rank."""
    return config.integer("q_lora_rank", high=1 << 14) if config.has("q_lora_rank") else 0


_LATENT = (
    Rule("blk.{i}.attn_q.weight", f"{LAYER}.self_attn.q_proj.weight", optional=True),
    Rule("blk.{i}.attn_q_a.weight", f"{LAYER}.self_attn.q_a_proj.weight", optional=True),
    Rule("blk.{i}.attn_q_a_norm.weight", f"{LAYER}.self_attn.q_a_layernorm.weight", optional=True),
    Rule("blk.{i}.attn_q_b.weight", f"{LAYER}.self_attn.q_b_proj.weight", optional=True),
    Rule("blk.{i}.attn_kv_a_mqa.weight", f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight"),
    Rule("blk.{i}.attn_kv_a_norm.weight", f"{LAYER}.self_attn.kv_a_layernorm.weight"),
    Rule("blk.{i}.attn_kv_b.weight", f"{LAYER}.self_attn.kv_b_proj.weight"),
    Rule("blk.{i}.attn_output.weight", f"{LAYER}.self_attn.o_proj.weight"),
)
_LATENT_SIZES = (
    *(row for row in sizes() if row.name != "head_dim"),
    Setting("attention.key_length", "qk_nope_head_dim", derive=_latent_key),
    Setting("attention.value_length", "v_head_dim", high=1 << 12),
    Setting("attention.kv_lora_rank", "kv_lora_rank", high=1 << 12),
    Setting("attention.q_lora_rank", "q_lora_rank", derive=_low_rank),
)
_MINIMAX_EXPERT = "block_sparse_moe.experts.{e}"

EXPERTS = (
    Family(
        "olmoe",
        ("OlmoeForCausalLM",),
        "olmoe",
        (*sizes(), Setting("expert_count", "num_experts", 64, high=4096), _TAKEN),
        (EMBEDDING, *NORMS, *attention(), *HEAD_NORMS, *_QWEN_EXPERTS),
        norm_eps=1e-5,
        flags=(("expert_weights_norm", "norm_topk_prob", False),),
        fixed=(("clip_qkv", None),),
    ),
    Family(
        "granitemoe",
        ("GraniteMoeForCausalLM",),
        "granitemoe",
        (*sizes(), Setting("expert_count", "num_local_experts", 8, high=4096), _TAKEN),
        (
            EMBEDDING,
            *NORMS,
            *attention(interleaved),
            _router("block_sparse_moe.router.layer"),
            Rule("blk.{i}.ffn_gate_up_exps.weight", f"{LAYER}.block_sparse_moe.input_linear.weight"),
            Rule("blk.{i}.ffn_down_exps.weight", f"{LAYER}.block_sparse_moe.output_linear.weight"),
        ),
        reals=(
            Real("embedding_scale", "embedding_multiplier", 1.0),
            Real("residual_scale", "residual_multiplier", 1.0),
            Real("attention.scale", "attention_multiplier", 1.0),
            Real("logit_scale", "logits_scaling", 1.0),
        ),
    ),
    Family(
        "glm4_moe",
        ("Glm4MoeForCausalLM",),
        "glm4moe",
        (*sizes(num_key_value_heads=8, head_dim=128), *_SPARSE_SIZES),
        (
            EMBEDDING,
            Rule("output_norm.weight", "model.norm.weight"),
            Rule("blk.{i}.attn_norm.weight", f"{LAYER}.input_layernorm.weight"),
            Rule("blk.{i}.post_attention_norm.weight", f"{LAYER}.post_attention_layernorm.weight"),
            *attention(),
            *(replace(rule, optional=True) for rule in HEAD_NORMS),
            *_SPARSE,
        ),
        norm_eps=1e-5,
        rotary_share=0.5,
        flags=_CHOSEN,
        reals=_SCALED,
        constants=_SIGMOID,
        further_layers=True,
    ),
    Family(
        "dots1",
        ("Dots1ForCausalLM",),
        "dots1",
        (*sizes(num_key_value_heads=32), *_SPARSE_SIZES),
        (EMBEDDING, *NORMS, *attention(), *HEAD_NORMS, *_SPARSE),
        flags=(("expert_weights_norm", "norm_topk_prob", False),),
        reals=_SCALED,
        constants=_SIGMOID,
    ),
    Family(
        "deepseek_v3",
        ("DeepseekV3ForCausalLM",),
        "deepseek2",
        (*_LATENT_SIZES, *_SPARSE_SIZES),
        (EMBEDDING, *NORMS, *_LATENT, *_SPARSE),
        rotary_values="qk_rope_head_dim",
        natively_paired=True,
        flags=_CHOSEN,
        reals=(Real("expert_weights_scale", "routed_scaling_factor", 2.5),),
        constants=_SIGMOID,
        further_layers=True,
        fixed=(("rope_interleave", True), ("attention_bias", False)),
    ),
    Family(
        "minimax_m2",
        ("MiniMaxM2ForCausalLM",),
        "minimax-m2",
        (
            *sizes(num_key_value_heads=8, head_dim=128),
            Setting("expert_count", "num_local_experts", 256, high=4096),
            _TAKEN,
        ),
        (
            EMBEDDING,
            *NORMS,
            *attention(),
            *HEAD_NORMS,
            _router("block_sparse_moe.gate"),
            Rule("blk.{i}.exp_probs_b.bias", f"{LAYER}.block_sparse_moe.e_score_correction_bias"),
            *_experts(gate=f"{_MINIMAX_EXPERT}.w1", up=f"{_MINIMAX_EXPERT}.w3", down=f"{_MINIMAX_EXPERT}.w2"),
        ),
        rope_base=5e6,
        constants=_SIGMOID,
        further_layers=True,
    ),
)
