"""Families of Hugging Face directories with Mamba-2 blocks: rows of :mod:`.families`."""

from collections.abc import Callable
from dataclasses import replace

from powerinfer_tools.model.huggingface.changes import interleaved, minus_exp
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.expert_rules import GRANITE_EXPERTS, GRANITE_SCALES, TAKEN, halves
from powerinfer_tools.model.huggingface.family import (
    EMBEDDING,
    FFN,
    LAYER,
    Family,
    Real,
    Rule,
    Setting,
    attention,
    both,
    optional,
    sizes,
)


def _mamba(start: str) -> tuple[Rule, ...]:
    """The tensors of a state space model below ``start``."""
    return (
        Rule("blk.{i}.ssm_in.weight", f"{start}.in_proj.weight"),
        Rule("blk.{i}.ssm_conv1d.weight", f"{start}.conv1d.weight", single=True, squeezed=True),
        Rule("blk.{i}.ssm_conv1d.bias", f"{start}.conv1d.bias", optional=True),
        Rule("blk.{i}.ssm_dt.bias", f"{start}.dt_bias"),
        Rule("blk.{i}.ssm_a", f"{start}.A_log", minus_exp),
        Rule("blk.{i}.ssm_d", f"{start}.D"),
        Rule("blk.{i}.ssm_norm.weight", f"{start}.norm.weight"),
        Rule("blk.{i}.ssm_out.weight", f"{start}.out_proj.weight"),
    )


def _expanded(config: Config) -> int:
    name = "mamba_expand" if config.has("mamba_expand") else "expand"
    return config.integer(name, 2, high=64) * config.integer("hidden_size", high=1 << 20)


_GRANITE_SIZES = (
    *sizes(),
    Setting("ssm.conv_kernel", "mamba_d_conv", 4, high=64),
    Setting("ssm.state_size", "mamba_d_state", 256, high=1 << 12),
    Setting("ssm.group_count", "mamba_n_groups", 1, high=4096),
    Setting("ssm.time_step_rank", "mamba_n_heads", 128, high=4096),
    Setting("ssm.inner_size", "mamba_expand", derive=_expanded),
)
_GRANITE_MIXERS = (
    EMBEDDING,
    Rule("output_norm.weight", "model.norm.weight"),
    Rule("blk.{i}.attn_norm.weight", f"{LAYER}.input_layernorm.weight"),
    Rule("blk.{i}.ffn_norm.weight", f"{LAYER}.post_attention_layernorm.weight"),
    *optional(*attention(interleaved), *_mamba(f"{LAYER}.mamba")),
)


def _rotates(config: Config) -> bool:
    return config.text("position_embedding_type", "nope") == "rope"


_GRANITE_FAMILY = Family(
    "granitemoehybrid",
    ("GraniteMoeHybridForCausalLM",),
    "granitehybrid",
    (
        *_GRANITE_SIZES,
        Setting("expert_count", "num_local_experts", 8, high=4096),
        TAKEN,
        Setting("expert_shared_feed_forward_length", "shared_intermediate_size", 1024, high=1 << 22),
    ),
    (
        *_GRANITE_MIXERS,
        *GRANITE_EXPERTS,
        *halves("blk.{i}.ffn_{kind}_shexp.weight", f"{LAYER}.shared_mlp.input_linear.weight"),
        Rule("blk.{i}.ffn_down_shexp.weight", f"{LAYER}.shared_mlp.output_linear.weight"),
    ),
    flags=(("rope.scaling.finetuned", _rotates, True),),
    reals=GRANITE_SCALES,
    recurrent=lambda config, index: True,
    fixed=(("mamba_proj_bias", False), ("attention_bias", False)),
    without_experts=Family(
        "granitemoehybrid",
        ("GraniteMoeHybridForCausalLM",),
        "granitehybrid",
        (
            *(row for row in _GRANITE_SIZES if row.name != "intermediate_size"),
            Setting("feed_forward_length", "shared_intermediate_size", 1024, high=1 << 22),
        ),
        (
            *_GRANITE_MIXERS,
            *halves("blk.{i}.ffn_{kind}.weight", f"{LAYER}.shared_mlp.input_linear.weight"),
            Rule("blk.{i}.ffn_down.weight", f"{LAYER}.shared_mlp.output_linear.weight"),
        ),
        flags=(("rope.scaling.finetuned", _rotates, True),),
        reals=GRANITE_SCALES,
        recurrent=lambda config, index: True,
        fixed=(("mamba_proj_bias", False), ("attention_bias", False)),
    ),
)
_BACKBONE = "backbone.layers.{i}"
_MAMBA_ENDS = (
    Rule("token_embd.weight", "backbone.embeddings.weight"),
    Rule("output_norm.weight", "backbone.norm_f.weight"),
    Rule("blk.{i}.attn_norm.weight", f"{_BACKBONE}.norm.weight"),
)
_MAMBA2_FAMILY = Family(
    "mamba2",
    ("Mamba2ForCausalLM",),
    "mamba2",
    (
        Setting("block_count", "num_hidden_layers", 64, high=4096),
        Setting("embedding_length", "hidden_size", 4096, high=1 << 20),
        Setting("context_length", "max_position_embeddings", 1 << 20, high=1 << 31),
        Setting("ssm.conv_kernel", "conv_kernel", 4, high=64),
        Setting("ssm.state_size", "state_size", 128, high=1 << 12),
        Setting("ssm.group_count", "n_groups", 8, high=4096),
        Setting("ssm.time_step_rank", "num_heads", 128, high=4096),
        Setting("ssm.inner_size", "expand", derive=_expanded),
    ),
    (*_MAMBA_ENDS, *_mamba(f"{_BACKBONE}.mixer")),
    norm_name="layer_norm_epsilon",
    norm_eps=1e-5,
    fixed=(("use_bias", False),),
)

# --- Mamba, and Jamba without experts ----------------------------------------------------------------------


def _selective_scan(start: str) -> tuple[Rule, ...]:
    """The tensors of a selective scan below ``start``."""
    return (
        Rule("blk.{i}.ssm_in.weight", f"{start}.in_proj.weight"),
        Rule("blk.{i}.ssm_conv1d.weight", f"{start}.conv1d.weight", single=True, squeezed=True),
        Rule("blk.{i}.ssm_conv1d.bias", f"{start}.conv1d.bias", optional=True),
        Rule("blk.{i}.ssm_x.weight", f"{start}.x_proj.weight"),
        *both("blk.{i}.ssm_dt", f"{start}.dt_proj"),
        Rule("blk.{i}.ssm_a", f"{start}.A_log", minus_exp, single=True),
        Rule("blk.{i}.ssm_d", f"{start}.D"),
        Rule("blk.{i}.ssm_out.weight", f"{start}.out_proj.weight"),
    )


def _step_rank(name: str) -> Callable[[Config], int]:
    """A sixteenth of the width, rounded up, where the file does not say a number."""

    def read(config: Config) -> int:
        usual = -(-config.integer("hidden_size", high=1 << 20) // 16)
        return usual if config.get(name) in (None, "auto") else config.integer(name, high=1 << 20)

    return read


def _mamba_inner(config: Config) -> int:
    return config.integer("intermediate_size", _expanded(config), high=1 << 20)


_MAMBA_FAMILY = Family(
    "mamba",
    ("MambaForCausalLM",),
    "mamba",
    (
        Setting("block_count", "num_hidden_layers", 32, high=4096),
        Setting("embedding_length", "hidden_size", 768, high=1 << 20),
        Setting("context_length", "max_position_embeddings", 1 << 20, high=1 << 31),
        Setting("ssm.conv_kernel", "conv_kernel", 4, high=64),
        Setting("ssm.state_size", "state_size", 16, high=1 << 12),
        Setting("ssm.time_step_rank", "time_step_rank", derive=_step_rank("time_step_rank")),
        Setting("ssm.inner_size", "intermediate_size", derive=_mamba_inner),
    ),
    (*_MAMBA_ENDS, *_selective_scan(f"{_BACKBONE}.mixer")),
    norm_name="layer_norm_epsilon",
    norm_eps=1e-5,
    tied=True,
    fixed=(("use_bias", False), ("rms_norm", True), ("ssm_cfg", {})),
    same=(("d_model", "hidden_size"), ("d_inner", "intermediate_size"), ("n_layer", "num_hidden_layers")),
)


def _scans(config: Config, index: int) -> bool:
    period = config.integer("attn_layer_period", 8, high=4096)
    return index % period != config.integer("attn_layer_offset", 4, low=0, high=4096)


_JAMBA_FAMILY = Family(
    "jamba",
    ("JambaForCausalLM",),
    "jamba",
    (
        *sizes(num_key_value_heads=8, max_position_embeddings=262144),
        Setting("ssm.conv_kernel", "mamba_d_conv", 4, high=64),
        Setting("ssm.state_size", "mamba_d_state", 16, high=1 << 12),
        Setting("ssm.time_step_rank", "mamba_dt_rank", derive=_step_rank("mamba_dt_rank")),
        Setting("ssm.inner_size", "mamba_expand", derive=_expanded),
    ),
    (
        EMBEDDING,
        Rule("output_norm.weight", "model.final_layernorm.weight"),
        Rule("blk.{i}.attn_norm.weight", f"{LAYER}.input_layernorm.weight"),
        Rule("blk.{i}.ffn_norm.weight", f"{LAYER}.pre_ff_layernorm.weight"),
        *(replace(rule, stored=rule.stored.replace(".mlp.", ".feed_forward.")) for rule in FFN),
        *optional(
            *attention(),
            *_selective_scan(f"{LAYER}.mamba"),
            *(
                Rule(f"blk.{{i}}.ssm_{kind}_norm.weight", f"{LAYER}.mamba.{kind}_layernorm.weight")
                for kind in ("dt", "b", "c")
            ),
        ),
    ),
    recurrent=_scans,
    fixed=(("mamba_proj_bias", False), ("num_experts", 1)),
    reasons=(("num_experts", "mixtures of experts of this family"),),
)

# --- Nemotron-H: one block a layer -------------------------------------------------------------------------

_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_OTHER_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}


def _blocks(config: Config) -> list[str]:
    """The block of each layer: a list, or a letter for each. Raises BadField for others."""
    name = "layers_block_type" if config.has("layers_block_type") else "layer_types"
    kinds = [_OTHER_NAMES.get(str(kind), str(kind)) for kind in config.items(name)]
    if not kinds:
        name = "hybrid_override_pattern"
        kinds = [_LETTERS.get(letter, letter) for letter in config.text(name)]
    for kind in kinds:
        if kind not in _LETTERS.values():
            raise config.fail(name, f"has a layer of type {kind[:40]!r}, expected {', '.join(_LETTERS)}")
    return kinds


def _sizes_where(size: str, *kinds: str) -> Callable[[Config], list[int]]:
    """``size`` in layers of those kinds, and 0 in others."""

    def read(config: Config) -> list[int]:
        value = config.integer(size, high=1 << 22)
        return [value if kind in kinds else 0 for kind in _blocks(config)]

    return read


def _nemotron_inner(config: Config) -> int:
    return config.integer("mamba_num_heads", 128, high=4096) * config.integer("mamba_head_dim", 64, high=4096)


_MIXER = f"{_BACKBONE}.mixer"
_NEMOTRON_DENSE = Family(
    "nemotron_h",
    ("NemotronHForCausalLM",),
    "nemotron_h",
    (
        Setting("block_count", "num_hidden_layers", derive=lambda config: len(_blocks(config))),
        *(
            row
            for row in sizes(head_dim=128)
            if row.name in ("hidden_size", "num_attention_heads", "head_dim")
        ),
        Setting("context_length", "max_position_embeddings", 4096, high=1 << 31),
        Setting("ssm.conv_kernel", "conv_kernel", 4, high=64),
        Setting("ssm.state_size", "ssm_state_size", 128, high=1 << 12),
        Setting("ssm.group_count", "n_groups", 8, high=4096),
        Setting("ssm.time_step_rank", "mamba_num_heads", 128, high=4096),
        Setting("ssm.inner_size", "mamba_head_dim", derive=_nemotron_inner),
    ),
    (
        *_MAMBA_ENDS,
        *optional(
            *_mamba(_MIXER),
            *(
                Rule(f"blk.{{i}}.attn_{name}.weight", f"{_MIXER}.{stored}_proj.weight")
                for name, stored in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))
            ),
            Rule("blk.{i}.ffn_up.weight", f"{_MIXER}.up_proj.weight"),
            Rule("blk.{i}.ffn_down.weight", f"{_MIXER}.down_proj.weight"),
        ),
    ),
    activation_name="mlp_hidden_act",
    activation="relu2",
    norm_name="layer_norm_epsilon",
    norm_eps=1e-5,
    layer_list="",
    recurrent=lambda config, index: _blocks(config)[index] == "mamba",
    lists=(
        ("attention.head_count_kv", _sizes_where("num_key_value_heads", "attention")),
        ("feed_forward_length", _sizes_where("intermediate_size", "mlp", "moe")),
    ),
    fixed=(
        *(("use_bias", False), ("mlp_bias", False), ("attention_bias", False), ("mamba_proj_bias", False)),
        ("moe_latent_size", None),
    ),
    ignored=("mtp.",),
)
_NEMOTRON_FAMILY = replace(
    _NEMOTRON_DENSE,
    architecture="nemotron_h_moe",
    settings=(
        *_NEMOTRON_DENSE.settings,
        Setting("expert_count", "n_routed_experts", high=4096),
        TAKEN,
        Setting("expert_feed_forward_length", "moe_intermediate_size", high=1 << 22),
        Setting("expert_shared_feed_forward_length", "moe_shared_expert_intermediate_size", high=1 << 22),
        Setting("expert_group_count", "n_group", 1, high=4096),
        Setting("expert_group_used_count", "topk_group", 1, high=4096),
    ),
    rules=(
        *_NEMOTRON_DENSE.rules,
        *optional(
            Rule("blk.{i}.ffn_gate_inp.weight", f"{_MIXER}.gate.weight", single=True),
            Rule("blk.{i}.exp_probs_b.bias", f"{_MIXER}.gate.e_score_correction_bias"),
            *(
                Rule(f"blk.{{i}}.ffn_{kind}_{end}.weight", f"{_MIXER}.{stored}.{kind}_proj.weight")
                for kind in ("up", "down")
                for end, stored in (("exps", "experts.{e}"), ("shexp", "shared_experts"))
            ),
        ),
    ),
    flags=(("expert_weights_norm", "norm_topk_prob", True),),
    reals=(Real("expert_weights_scale", "routed_scaling_factor", 1.0),),
    without_experts=_NEMOTRON_DENSE,
    has_experts=lambda config: "moe" in _blocks(config),
)

STATE_SPACES = (_GRANITE_FAMILY, _MAMBA_FAMILY, _MAMBA2_FAMILY, _JAMBA_FAMILY, _NEMOTRON_FAMILY)
