"""Families of Hugging Face directories with experts: rows of :mod:`.families`.

Every layer has experts; directories in which some have not (``mlp_only_layers``, ``decoder_sparse_step``) are
refused. Routers are kept in float32, as GGUF has them.
"""

from powerinfer_tools.model.huggingface.changes import interleaved
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.family import (
    EMBEDDING,
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
