"""Families of Hugging Face directories some of whose layers mix tokens without attention: rows of
:mod:`.families`."""

from dataclasses import replace

from powerinfer_tools.model.huggingface.changes import (
    minus_exp,
    tiled,
    tiled_columns,
    tiled_decays,
    tiled_values,
)
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.expert_rules import (
    QWEN_EXPERTS,
    QWEN_SIZES,
    SHARED_EXPERT,
    TAKEN,
    experts,
    router,
)
from powerinfer_tools.model.huggingface.family import (
    EMBEDDING,
    FFN,
    HEAD_NORMS,
    LAYER,
    Family,
    Real,
    Rule,
    Setting,
    attention,
    one_more,
    optional,
    sizes,
)

# --- LFM2: short convolutions ------------------------------------------------------------------------------

_LFM2_FFN = tuple(
    Rule(f"blk.{{i}}.ffn_{kind}.weight", f"{LAYER}.feed_forward.{name}.weight")
    for kind, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
)
_LFM2 = (
    EMBEDDING,
    Rule("token_embd_norm.weight", "model.embedding_norm.weight"),
    Rule("blk.{i}.attn_norm.weight", f"{LAYER}.operator_norm.weight"),
    Rule("blk.{i}.ffn_norm.weight", f"{LAYER}.ffn_norm.weight"),
    *optional(
        Rule("blk.{i}.shortconv.in_proj.weight", f"{LAYER}.conv.in_proj.weight"),
        Rule("blk.{i}.shortconv.conv.weight", f"{LAYER}.conv.conv.weight", single=True, squeezed=True),
        Rule("blk.{i}.shortconv.out_proj.weight", f"{LAYER}.conv.out_proj.weight"),
        *(
            Rule(f"blk.{{i}}.attn_{name}.weight", f"{LAYER}.self_attn.{stored}.weight")
            for name, stored in (
                ("q", "q_proj"),
                ("k", "k_proj"),
                ("v", "v_proj"),
                ("output", "out_proj"),
                ("q_norm", "q_layernorm"),
                ("k_norm", "k_layernorm"),
            )
        ),
    ),
)


def _lfm2_neurons(config: Config) -> int:
    """Two thirds of what the file says, rounded up to a multiple, where it says so."""
    name = "block_ff_dim" if config.has("block_ff_dim") else "intermediate_size"
    neurons = config.integer(name, 12288, high=1 << 22)
    if not config.flag("block_auto_adjust_ff_dim", True):
        return neurons
    factor = config.real("block_ffn_dim_multiplier", 1.0, low=0.01, high=100.0)
    neurons, multiple = int(factor * (2 * neurons // 3)), config.integer("block_multiple_of", 256)
    return -(-neurons // multiple) * multiple


def _lfm2_convolves(config: Config, index: int) -> bool:
    return index not in config.items("full_attn_idxs") if config.has("full_attn_idxs") else False


_LFM2_SIZES = (
    *(row for row in sizes(num_key_value_heads=8) if row.name != "intermediate_size"),
    Setting("shortconv.l_cache", "conv_L_cache", 3, high=64),
)
_LFM2_FAMILY = Family(
    "lfm2",
    ("Lfm2ForCausalLM",),
    "lfm2",
    (*_LFM2_SIZES, Setting("feed_forward_length", "intermediate_size", derive=_lfm2_neurons)),
    (*_LFM2, *_LFM2_FFN),
    activation_name="",
    tied=True,
    rope_base=1e6,
    norm_name="norm_eps",
    norm_eps=1e-5,
    recurrent=_lfm2_convolves,
    fixed=(("conv_bias", False),),
    same=(("theta", "rope_theta"),),
)

# --- gated delta nets --------------------------------------------------------------------------------------


def _inner(config: Config) -> int:
    heads = config.integer("linear_num_value_heads", high=4096)
    return heads * config.integer("linear_value_head_dim", high=1 << 12)


_DELTA_SIZES = (
    Setting("ssm.conv_kernel", "linear_conv_kernel_dim", 4, high=64),
    Setting("ssm.state_size", "linear_key_head_dim", high=1 << 12),
    Setting("ssm.group_count", "linear_num_key_heads", high=4096),
    Setting("ssm.time_step_rank", "linear_num_value_heads", high=4096),
    Setting("ssm.inner_size", "linear_value_head_dim", derive=_inner),
)
_QWEN_NORMS = one_more(
    (
        Rule("output_norm.weight", "model.norm.weight"),
        Rule("blk.{i}.attn_norm.weight", f"{LAYER}.input_layernorm.weight"),
        Rule("blk.{i}.post_attention_norm.weight", f"{LAYER}.post_attention_layernorm.weight"),
        *optional(*HEAD_NORMS),
    )
)
_DELTA = f"{LAYER}.linear_attn"
_DELTA_ENDS = (
    Rule("blk.{i}.ssm_conv1d.weight", f"{_DELTA}.conv1d.weight", single=True, squeezed=True),
    Rule("blk.{i}.ssm_dt.bias", f"{_DELTA}.dt_bias"),
    Rule("blk.{i}.ssm_a", f"{_DELTA}.A_log", minus_exp),
    Rule("blk.{i}.ssm_out.weight", f"{_DELTA}.out_proj.weight"),
)
_GATED_NORM = Rule("blk.{i}.ssm_norm.weight", f"{_DELTA}.norm.weight")
#: The rows of one key head after those of the other: its query, key, values and gates.
_NEXT = optional(
    Rule("blk.{i}.ssm_in.weight", f"{_DELTA}.in_proj_qkvz.weight"),
    Rule("blk.{i}.ssm_ba.weight", f"{_DELTA}.in_proj_ba.weight"),
    _GATED_NORM,
    *_DELTA_ENDS,
    *attention(),
)
#: Files count value heads in another order than GGUF.
_QWEN35 = optional(
    Rule("blk.{i}.attn_qkv.weight", f"{_DELTA}.in_proj_qkv.weight", tiled_values),
    Rule("blk.{i}.attn_gate.weight", f"{_DELTA}.in_proj_z.weight", tiled),
    Rule("blk.{i}.ssm_beta.weight", f"{_DELTA}.in_proj_b.weight", tiled),
    Rule("blk.{i}.ssm_alpha.weight", f"{_DELTA}.in_proj_a.weight", tiled),
    _GATED_NORM,
    *(
        replace(rule, change=change)
        for rule, change in zip(_DELTA_ENDS, (tiled_values, tiled, tiled_decays, tiled_columns), strict=True)
    ),
    *attention(),
)


def _three_of_four(config: Config, index: int) -> bool:
    return (index + 1) % config.integer("full_attention_interval", 4, high=4096) != 0


_SHARED_SIZE = Setting("expert_shared_feed_forward_length", "shared_expert_intermediate_size", high=1 << 22)
_QWEN35_FAMILY = Family(
    "qwen3_5_text",
    ("Qwen3_5ForCausalLM",),
    "qwen35",
    (*sizes(num_key_value_heads=4, head_dim=256, max_position_embeddings=32768), *_DELTA_SIZES),
    (EMBEDDING, *_QWEN_NORMS, *_QWEN35, *FFN),
    rotary_share=0.25,
    recurrent=_three_of_four,
    fixed=(("attn_output_gate", True), ("partial_rotary_factor", 0.25)),
    ignored=("mtp.", "model.mtp.", "model.visual."),
)
_QWEN35_MOE_FAMILY = replace(
    _QWEN35_FAMILY,
    model_type="qwen3_5_moe_text",
    classes=("Qwen3_5MoeForCausalLM",),
    architecture="qwen35moe",
    settings=(
        *(row for row in _QWEN35_FAMILY.settings if row.name != "intermediate_size"),
        *QWEN_SIZES,
        _SHARED_SIZE,
    ),
    rules=(EMBEDDING, *_QWEN_NORMS, *_QWEN35, *QWEN_EXPERTS, *SHARED_EXPERT),
)
_NEXT_FAMILY = replace(
    _QWEN35_MOE_FAMILY,
    model_type="qwen3_next",
    classes=("Qwen3NextForCausalLM",),
    architecture="qwen3next",
    rules=(EMBEDDING, *_QWEN_NORMS, *_NEXT, *QWEN_EXPERTS, *SHARED_EXPERT),
    flags=(("expert_weights_norm", "norm_topk_prob", True),),
    fixed=(("decoder_sparse_step", 1), ("mlp_only_layers", []), ("attn_output_gate", True)),
)

RECURRENT = (
    _LFM2_FAMILY,
    replace(
        _LFM2_FAMILY,
        model_type="lfm2_moe",
        classes=("Lfm2MoeForCausalLM",),
        architecture="lfm2moe",
        settings=(
            *_LFM2_SIZES,
            Setting("feed_forward_length", "intermediate_size", high=1 << 22),
            Setting("leading_dense_block_count", "num_dense_layers", 2, high=4096),
            Setting("expert_count", "num_experts", high=4096),
            TAKEN,
            Setting("expert_feed_forward_length", "moe_intermediate_size", high=1 << 22),
        ),
        rules=(
            *_LFM2,
            *optional(
                *_LFM2_FFN,
                router("feed_forward.gate"),
                *experts(
                    **{
                        kind: f"feed_forward.experts.{{e}}.{name}"
                        for kind, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
                    }
                ),
                Rule("blk.{i}.exp_probs_b.bias", f"{LAYER}.feed_forward.expert_bias"),
            ),
        ),
        flags=(("expert_weights_norm", "norm_topk_prob", True),),
        reals=(Real("expert_weights_scale", "routed_scaling_factor", 1.0),),
        constants=(("expert_gating_func", 2),),
    ),
    _QWEN35_FAMILY,
    _QWEN35_MOE_FAMILY,
    _NEXT_FAMILY,
)
