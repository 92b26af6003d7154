"""Families of Hugging Face directories whose routers are sigmoids, with a bias that chooses, and dense layers
before those with experts: rows of :mod:`.families`."""

from dataclasses import replace

from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.expert_rules import (
    MIXTRAL_EXPERT,
    QWEN_EXPERTS,
    TAKEN,
    experts,
    router,
    shared,
)
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
    sizes,
)

#: Layers have a dense FFN, or these.
_SPARSE = (
    *(replace(rule, optional=True) for rule in (*FFN, *QWEN_EXPERTS)),
    Rule("blk.{i}.exp_probs_b.bias", f"{LAYER}.mlp.gate.e_score_correction_bias", optional=True),
    *shared("mlp.shared_experts", optional=True),
)
_SPARSE_SIZES = (
    Setting("expert_count", "n_routed_experts", high=4096),
    TAKEN,
    Setting("expert_feed_forward_length", "moe_intermediate_size", high=1 << 22),
    Setting("expert_shared_count", "n_shared_experts", 1, high=1 << 10),
    Setting("expert_group_count", "n_group", 1, high=4096),
    Setting("expert_group_used_count", "topk_group", 1, high=4096),
)
_SIGMOID = (("expert_gating_func", 2),)
#: The same in words, where a file has them.
_SIGMOID_SAID = (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"))
_SCALED = (Real("expert_weights_scale", "routed_scaling_factor", 1.0),)
_CHOSEN = (("expert_weights_norm", "norm_topk_prob", True),)


def _latent_key(config: Config) -> int:
    """Values of a head without positions and with them."""
    plain = config.integer("qk_nope_head_dim", high=1 << 12)
    return plain + config.integer("qk_rope_head_dim", high=1 << 10)


def _low_rank(config: Config) -> int:
    """Of queries; 0 for full rank."""
    return config.integer("q_lora_rank", high=1 << 14) if config.has("q_lora_rank") else 0


#: Latent attention.
LATENT = (
    Rule("blk.{i}.attn_q.weight", f"{LAYER}.self_attn.q_proj.weight", optional=True),
    Rule("blk.{i}.attn_q_a.weight", f"{LAYER}.self_attn.q_a_proj.weight", optional=True),
    Rule("blk.{i}.attn_q_a_norm.weight", f"{LAYER}.self_attn.q_a_layernorm.weight", optional=True),
    Rule("blk.{i}.attn_q_b.weight", f"{LAYER}.self_attn.q_b_proj.weight", optional=True),
    Rule("blk.{i}.attn_kv_a_mqa.weight", f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight"),
    Rule("blk.{i}.attn_kv_a_norm.weight", f"{LAYER}.self_attn.kv_a_layernorm.weight"),
    Rule("blk.{i}.attn_kv_b.weight", f"{LAYER}.self_attn.kv_b_proj.weight"),
    Rule("blk.{i}.attn_output.weight", f"{LAYER}.self_attn.o_proj.weight"),
)
LATENT_SIZES = (
    *(row for row in sizes() if row.name != "head_dim"),
    Setting("attention.key_length", "qk_nope_head_dim", derive=_latent_key),
    Setting("attention.value_length", "v_head_dim", high=1 << 12),
    Setting("attention.kv_lora_rank", "kv_lora_rank", high=1 << 12),
    Setting("attention.q_lora_rank", "q_lora_rank", derive=_low_rank),
)


def _three_of_four(config: Config, index: int) -> bool:
    return (index + 1) % config.integer("sliding_window_pattern", 4, high=4096) != 0


def _llama4_experts(config: Config) -> int:
    """The models of 128 experts, and no others, have no norms of queries and keys."""
    count = config.integer("num_local_experts", 16, high=4096)
    if config.flag("use_qk_norm", True) != (count != 128):
        raise config.fail("use_qk_norm", f"is not what models of {count} experts have")
    return count


_AFMOE = (
    EMBEDDING,
    Rule("output_norm.weight", "model.norm.weight"),
    Rule("blk.{i}.attn_norm.weight", f"{LAYER}.input_layernorm.weight"),
    Rule("blk.{i}.post_attention_norm.weight", f"{LAYER}.post_attention_layernorm.weight"),
    Rule("blk.{i}.ffn_norm.weight", f"{LAYER}.pre_mlp_layernorm.weight"),
    Rule("blk.{i}.post_ffw_norm.weight", f"{LAYER}.post_mlp_layernorm.weight"),
    Rule("blk.{i}.attn_gate.weight", f"{LAYER}.self_attn.gate_proj.weight"),
    *attention(),
    *HEAD_NORMS,
)


def _routed(bias: str, gate: str, shared_as: str) -> tuple[Rule, ...]:
    """As :data:`_SPARSE`, with other names."""
    rules = (*FFN, router(gate), *QWEN_EXPERTS[1:], Rule("blk.{i}.exp_probs_b.bias", f"{LAYER}.mlp.{bias}"))
    return tuple(replace(rule, optional=True) for rule in (*rules, *shared(shared_as)))


_LLAMA4_FFN = tuple(
    replace(rule, stored=rule.stored.replace(".mlp.", ".feed_forward."), optional=True) for rule in FFN
)
_LLAMA4 = (
    EMBEDDING,
    *NORMS,
    *attention(),
    *_LLAMA4_FFN,
    *(
        replace(rule, optional=True)
        for rule in (
            router("feed_forward.router"),
            Rule(
                "blk.{i}.ffn_gate_up_exps.weight",
                f"{LAYER}.feed_forward.experts.gate_up_proj",
                transposed=True,
            ),
            Rule("blk.{i}.ffn_down_exps.weight", f"{LAYER}.feed_forward.experts.down_proj", transposed=True),
            *shared("feed_forward.shared_expert"),
        )
    ),
)
_EXAONE_SIZES = tuple(
    {
        "expert_count": Setting("expert_count", "num_experts", high=4096),
        "expert_shared_count": Setting("expert_shared_count", "num_shared_experts", 1, high=1 << 10),
    }.get(row.key, row)
    for row in _SPARSE_SIZES
)

SIGMOIDS = (
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
        (*LATENT_SIZES, *_SPARSE_SIZES),
        (EMBEDDING, *NORMS, *LATENT, *_SPARSE),
        rotary_values="qk_rope_head_dim",
        natively_paired=True,
        flags=_CHOSEN,
        reals=(Real("expert_weights_scale", "routed_scaling_factor", 2.5),),
        constants=_SIGMOID,
        further_layers=True,
        fixed=(*_SIGMOID_SAID, ("rope_interleave", True), ("attention_bias", False)),
    ),
    Family(
        "minimax_m2",
        ("MiniMaxM2ForCausalLM",),
        "minimax-m2",
        (
            *sizes(num_key_value_heads=8, head_dim=128),
            Setting("expert_count", "num_local_experts", 256, high=4096),
            TAKEN,
        ),
        (
            EMBEDDING,
            *NORMS,
            *attention(),
            *HEAD_NORMS,
            router("block_sparse_moe.gate"),
            Rule("blk.{i}.exp_probs_b.bias", f"{LAYER}.block_sparse_moe.e_score_correction_bias"),
            *experts(gate=f"{MIXTRAL_EXPERT}.w1", up=f"{MIXTRAL_EXPERT}.w3", down=f"{MIXTRAL_EXPERT}.w2"),
        ),
        rope_base=5e6,
        constants=_SIGMOID,
        further_layers=True,
        fixed=_SIGMOID_SAID[:1],
    ),
    Family(
        "glm4_moe_lite",
        ("Glm4MoeLiteForCausalLM",),
        "deepseek2",
        (*LATENT_SIZES, *_SPARSE_SIZES),
        (EMBEDDING, *NORMS, *LATENT, *_SPARSE),
        norm_eps=1e-5,
        rotary_values="qk_rope_head_dim",
        natively_paired=True,
        flags=_CHOSEN,
        reals=(Real("expert_weights_scale", "routed_scaling_factor", 1.8),),
        constants=_SIGMOID,
        further_layers=True,
        fixed=(*_SIGMOID_SAID, ("rope_interleave", True), ("attention_bias", False)),
    ),
    # A softmax chooses; groups of experts would be judged by their best one.
    Family(
        "deepseek_v2",
        ("DeepseekV2ForCausalLM",),
        "deepseek2",
        (*LATENT_SIZES, *(row for row in _SPARSE_SIZES if "group" not in row.key)),
        (EMBEDDING, *NORMS, *LATENT, *_SPARSE),
        rotary_values="qk_rope_head_dim",
        natively_paired=True,
        flags=(("expert_weights_norm", "norm_topk_prob", False),),
        reals=_SCALED,
        constants=(("expert_gating_func", 1),),
        fixed=(
            ("attention_bias", False),
            ("scoring_func", "softmax"),
            ("topk_method", "greedy"),
            ("norm_topk_prob", False),
        ),
    ),
    Family(
        "exaone_moe",
        ("ExaoneMoeForCausalLM",),
        "exaone-moe",
        (*sizes(num_key_value_heads=32), *_EXAONE_SIZES),
        (
            EMBEDDING,
            *NORMS,
            *attention(),
            *HEAD_NORMS,
            *_routed("e_score_correction_bias", "mlp.gate", "mlp.shared_experts"),
        ),
        norm_eps=1e-5,
        window=4096,
        sliding=_three_of_four,
        flags=_CHOSEN,
        reals=(Real("expert_weights_scale", "routed_scaling_factor", 2.5),),
        constants=_SIGMOID,
        further_layers=True,
        ignored=("mtp.",),
    ),
    Family(
        "afmoe",
        ("AfmoeForCausalLM",),
        "afmoe",
        (*sizes(), *_EXAONE_SIZES[:4]),
        (*_AFMOE, *_routed("expert_bias", "mlp.router.gate", "mlp.shared_experts")),
        norm_eps=1e-5,
        window=1024,
        sliding=_three_of_four,
        reals=(Real("expert_weights_scale", "route_scale", 1.0),),
        flags=(("expert_weights_norm", "route_norm", True),),
        constants=_SIGMOID,
        fixed=(("mup_enabled", True), ("n_group", 1), ("topk_group", 1)),
    ),
    Family(
        "llama4_text",
        ("Llama4ForCausalLM",),
        "llama4",
        (
            *(row for row in sizes(num_key_value_heads=8, head_dim=128) if row.name != "intermediate_size"),
            Setting("feed_forward_length", "intermediate_size_mlp", 16384, high=1 << 22),
            Setting("expert_feed_forward_length", "intermediate_size", 8192, high=1 << 22),
            Setting("expert_count", "num_local_experts", derive=_llama4_experts),
            Setting("expert_used_count", "num_experts_per_tok", 1, high=4096),
        ),
        _LLAMA4,
        rope_base=5e5,
        norm_eps=1e-5,
        natively_paired=True,
        rotary_layers="no_rope_layers",
        window=8192,
        window_name="attention_chunk_size",
        reals=(Real("attention.temperature_scale", "attn_scale", 0.1),),
        fixed=(("attn_temperature_tuning", True), ("floor_scale", 8192), ("no_rope_layer_interval", 4)),
        ignored=("vision_model.", "multi_modal_projector."),
    ),
)
