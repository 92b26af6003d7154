"""GPT-2, MPT and MiniCPM 3 as Hugging Face directories: rows of :mod:`.families`."""

import math

from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.family import (
    EMBEDDING,
    FFN,
    NORMS,
    Family,
    Real,
    Rule,
    Setting,
    both,
)
from powerinfer_tools.model.huggingface.sigmoid_families import LATENT, LATENT_SIZES


def _transposed(name: str, stored: str) -> tuple[Rule, Rule]:
    """A matrix whose columns are stored as rows, and its bias."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    return Rule(weight, f"{stored}.weight", transposed=True), Rule(bias, f"{stored}.bias")


_GPT2_LAYER = "model.h.{i}"
_GPT2 = (
    Rule("token_embd.weight", "model.wte.weight"),
    Rule("position_embd.weight", "model.wpe.weight"),
    *both("output_norm", "model.ln_f"),
    *both("blk.{i}.attn_norm", f"{_GPT2_LAYER}.ln_1"),
    *both("blk.{i}.ffn_norm", f"{_GPT2_LAYER}.ln_2"),
    *_transposed("blk.{i}.attn_qkv", f"{_GPT2_LAYER}.attn.c_attn"),
    *_transposed("blk.{i}.attn_output", f"{_GPT2_LAYER}.attn.c_proj"),
    *_transposed("blk.{i}.ffn_up", f"{_GPT2_LAYER}.mlp.c_fc"),
    *_transposed("blk.{i}.ffn_down", f"{_GPT2_LAYER}.mlp.c_proj"),
)


def _gpt2_neurons(config: Config) -> int:
    """Four times the width, where the file does not say it."""
    return config.integer("n_inner", 4 * config.integer("n_embd", high=1 << 20), high=1 << 22)


_MPT_LAYER = "transformer.blocks.{i}"
_MPT = (
    Rule("token_embd.weight", "transformer.wte.weight"),
    *both("output_norm", "transformer.norm_f"),
    *both("blk.{i}.attn_norm", f"{_MPT_LAYER}.norm_1"),
    *both("blk.{i}.ffn_norm", f"{_MPT_LAYER}.norm_2"),
    *both("blk.{i}.attn_qkv", f"{_MPT_LAYER}.attn.Wqkv"),
    *both("blk.{i}.attn_output", f"{_MPT_LAYER}.attn.out_proj"),
    *both("blk.{i}.ffn_up", f"{_MPT_LAYER}.ffn.up_proj"),
    *both("blk.{i}.ffn_down", f"{_MPT_LAYER}.ffn.down_proj"),
)


def _mpt_neurons(config: Config) -> int:
    return config.integer("expansion_ratio", 4, high=64) * config.integer("d_model", high=1 << 20)


def _mpt_heads(config: Config) -> int:
    """With another number of heads, their biases by distance are in another order than GGUF's."""
    heads = config.integer("n_heads", 16, high=4096)
    if heads & (heads - 1):
        raise config.fail("n_heads", f"is {heads}, expected a power of two")
    return heads


def _minicpm_residual(config: Config) -> float:
    scale = config.real("scale_depth", 1.4, low=-1e6, high=1e6)
    return scale / math.sqrt(config.integer("num_hidden_layers", high=4096))


def _minicpm_logits(config: Config) -> float:
    base = config.integer("dim_model_base", 256, high=1 << 20)
    return base / config.integer("hidden_size", high=1 << 20)


OLDER = (
    Family(
        "gpt2",
        ("GPT2LMHeadModel",),
        "gpt2",
        (
            Setting("block_count", "n_layer", 12, high=4096),
            Setting("embedding_length", "n_embd", 768, high=1 << 20),
            Setting("attention.head_count", "n_head", 12, high=4096),
            Setting("feed_forward_length", "n_inner", derive=_gpt2_neurons),
            Setting("context_length", "n_positions", 1024, high=1 << 31),
        ),
        _GPT2,
        spellings=("transformer.", ""),
        activation_name="activation_function",
        activation="gelu_new",
        tied=True,
        norm_name="layer_norm_epsilon",
        norm_eps=1e-5,
        fixed=(("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)),
        same=(("n_ctx", "n_positions"),),
        # Masks, which old files have.
        derived=(".attn.bias", ".attn.masked_bias"),
    ),
    # With positions in the scores alone.
    Family(
        "mpt",
        ("MptForCausalLM", "MPTForCausalLM"),
        "mpt",
        (
            Setting("block_count", "n_layers", 24, high=4096),
            Setting("embedding_length", "d_model", 2048, high=1 << 20),
            Setting("attention.head_count", "n_heads", derive=_mpt_heads),
            Setting("feed_forward_length", "expansion_ratio", derive=_mpt_neurons),
            Setting("context_length", "max_seq_len", 2048, high=1 << 31),
        ),
        _MPT,
        activation_name="",
        activation="gelu",
        tied=True,
        norm_name="layer_norm_epsilon",
        norm_eps=1e-5,
        reals=(
            Real("attention.max_alibi_bias", "attn_config.alibi_bias_max", 8.0),
            Real("attention.clamp_kqv", "attn_config.clip_qkv", 0.0),
        ),
        fixed=(
            ("logit_scale", None),
            ("attn_config.alibi", True),
            ("attn_config.attn_type", "multihead_attention"),
            ("attn_config.attn_uses_sequence_id", False),
            ("attn_config.prefix_lm", False),
            ("attn_config.qk_ln", False),
            ("attn_config.softmax_scale", None),
        ),
    ),
    Family(
        "minicpm3",
        ("MiniCPM3ForCausalLM",),
        "minicpm3",
        LATENT_SIZES,
        (EMBEDDING, *NORMS, *LATENT, *FFN),
        norm_eps=1e-5,
        tied=True,
        rotary_values="qk_rope_head_dim",
        reals=(
            Real("embedding_scale", "scale_emb", 12.0),
            Real("residual_scale", "scale_depth", 0.0, derive=_minicpm_residual),
            Real("logit_scale", "dim_model_base", 0.0, derive=_minicpm_logits),
        ),
        fixed=(("attention_bias", False), ("mlp_bias", False)),
    ),
)
