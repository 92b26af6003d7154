"""Families of Hugging Face directories with experts that a softmax chooses: rows of :mod:`.families`.

Every layer has experts; directories in which some have not (``mlp_only_layers``, ``decoder_sparse_step``) are
refused, but for families that say otherwise.
"""

from dataclasses import replace

from powerinfer_tools.model.huggingface.changes import interleaved
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.expert_rules import (
    GRANITE_EXPERTS,
    GRANITE_SCALES,
    MIXTRAL_EXPERT,
    QWEN_EXPERTS,
    QWEN_SIZES,
    SHARED_EXPERT,
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
    Rule,
    Setting,
    attention,
    every_layer,
    sizes,
)
from powerinfer_tools.model.huggingface.parts import EVEN, ODD

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
        router("block_sparse_moe.gate"),
        *experts(gate=f"{MIXTRAL_EXPERT}.w1", up=f"{MIXTRAL_EXPERT}.w3", down=f"{MIXTRAL_EXPERT}.w2"),
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
        *QWEN_SIZES,
        Setting("expert_shared_feed_forward_length", "shared_expert_intermediate_size", high=1 << 22),
    ),
    (EMBEDDING, *NORMS, *attention(), *QWEN_EXPERTS, *SHARED_EXPERT),
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
    (*sizes(num_key_value_heads=4, max_position_embeddings=32768), *QWEN_SIZES),
    (EMBEDDING, *NORMS, *attention(), *HEAD_NORMS, *QWEN_EXPERTS),
    window=4096,
    sliding=_qwen3_layers,
    flags=(("expert_weights_norm", "norm_topk_prob", False),),
    fixed=(("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    reasons=(("decoder_sparse_step", _WITHOUT), ("mlp_only_layers", _WITHOUT)),
)


_OSS_EXPERTS = f"{LAYER}.mlp.experts"
_OSS = (
    EMBEDDING,
    Rule("output_norm.weight", "model.norm.weight"),
    Rule("blk.{i}.attn_norm.weight", f"{LAYER}.input_layernorm.weight"),
    Rule("blk.{i}.post_attention_norm.weight", f"{LAYER}.post_attention_layernorm.weight"),
    *attention(),
    Rule("blk.{i}.attn_sinks.weight", f"{LAYER}.self_attn.sinks"),
    router("mlp.router"),
    Rule("blk.{i}.ffn_gate_inp.bias", f"{LAYER}.mlp.router.bias"),
    # Rows of gate and up take turns; the matrices are stored as columns.
    Rule("blk.{i}.ffn_gate_exps.weight", f"{_OSS_EXPERTS}.gate_up_proj", part=EVEN, transposed=True),
    Rule("blk.{i}.ffn_up_exps.weight", f"{_OSS_EXPERTS}.gate_up_proj", part=ODD, transposed=True),
    Rule("blk.{i}.ffn_down_exps.weight", f"{_OSS_EXPERTS}.down_proj", transposed=True),
    Rule("blk.{i}.ffn_gate_exps.bias", f"{_OSS_EXPERTS}.gate_up_proj_bias", part=EVEN, single=True),
    Rule("blk.{i}.ffn_up_exps.bias", f"{_OSS_EXPERTS}.gate_up_proj_bias", part=ODD, single=True),
    Rule("blk.{i}.ffn_down_exps.bias", f"{_OSS_EXPERTS}.down_proj_bias", single=True),
)
_HUNYUAN_NORMS = (
    Rule("blk.{i}.attn_q_norm.weight", f"{LAYER}.self_attn.query_layernorm.weight"),
    Rule("blk.{i}.attn_k_norm.weight", f"{LAYER}.self_attn.key_layernorm.weight"),
)


def _every_second(config: Config, index: int) -> bool:
    return index % 2 == 0


EXPERTS = (
    QWEN2_MOE,
    QWEN3_MOE,
    replace(
        QWEN3_MOE,
        model_type="qwen3_vl_moe_text",
        classes=("Qwen3VLMoeForConditionalGeneration",),
        architecture="qwen3vlmoe",
        ignored=("model.visual.", "visual."),
    ),
    Family(
        "olmoe",
        ("OlmoeForCausalLM",),
        "olmoe",
        (*sizes(), Setting("expert_count", "num_experts", 64, high=4096), TAKEN),
        (EMBEDDING, *NORMS, *attention(), *HEAD_NORMS, *QWEN_EXPERTS),
        norm_eps=1e-5,
        flags=(("expert_weights_norm", "norm_topk_prob", False),),
        fixed=(("clip_qkv", None),),
    ),
    Family(
        "granitemoe",
        ("GraniteMoeForCausalLM",),
        "granitemoe",
        (*sizes(), Setting("expert_count", "num_local_experts", 8, high=4096), TAKEN),
        (EMBEDDING, *NORMS, *attention(interleaved), *GRANITE_EXPERTS),
        reals=GRANITE_SCALES,
    ),
    Family(
        "gpt_oss",
        ("GptOssForCausalLM",),
        "gpt-oss",
        (
            *sizes(num_key_value_heads=8, head_dim=64),
            Setting("expert_count", "num_local_experts", high=4096),
            TAKEN,
            Setting("expert_feed_forward_length", "intermediate_size", high=1 << 22),
        ),
        _OSS,
        activations=(("silu", "swiglu_oai"),),
        rope_base=150000.0,
        norm_eps=1e-5,
        window=128,
        sliding=_every_second,
        fixed=(("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)),
    ),
    Family(
        "hunyuan_v1_moe",
        ("HunYuanMoEV1ForCausalLM",),
        "hunyuan-moe",
        (
            *sizes(),
            Setting("expert_count", "num_experts", high=4096),
            Setting("expert_used_count", "moe_topk", high=4096),
            Setting("expert_feed_forward_length", "intermediate_size", high=1 << 22),
            Setting("expert_shared_feed_forward_length", "intermediate_size", high=1 << 22),
        ),
        (
            EMBEDDING,
            *NORMS,
            *attention(),
            *_HUNYUAN_NORMS,
            router("mlp.gate.wg"),
            *QWEN_EXPERTS[1:],
            *shared("mlp.shared_mlp"),
        ),
        norm_eps=1e-5,
    ),
    Family(
        "ernie4_5_moe",
        ("Ernie4_5_MoeForCausalLM",),
        "ernie4_5-moe",
        (
            *sizes(num_key_value_heads=4),
            Setting("expert_count", "moe_num_experts", high=4096),
            Setting("expert_used_count", "moe_k", high=4096),
            Setting("expert_feed_forward_length", "moe_intermediate_size", high=1 << 22),
            Setting("expert_shared_count", "moe_num_shared_experts", 0, high=1 << 10),
        ),
        (
            EMBEDDING,
            *NORMS,
            *attention(),
            *(replace(rule, optional=True) for rule in (*FFN, *QWEN_EXPERTS)),
            Rule(
                "blk.{i}.exp_probs_b.bias",
                f"{LAYER}.mlp.moe_statics.e_score_correction_bias",
                optional=True,
                squeezed=True,
            ),
            *shared("mlp.shared_experts", optional=True),
        ),
        tied=True,
        rope_base=5e5,
        norm_eps=1e-5,
        natively_paired=True,
        fixed=(("use_bias", False),),
    ),
)
