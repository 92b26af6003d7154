"""Rules and settings that families with experts have in common. Routers are kept in float32, as GGUF has
them."""

from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.family import LAYER, Real, Rule, Setting
from powerinfer_tools.model.huggingface.parts import FIRST, SECOND

KINDS = ("gate", "up", "down")


def router(stored: str) -> Rule:
    """The scores' matrix."""
    return Rule("blk.{i}.ffn_gate_inp.weight", f"{LAYER}.{stored}.weight", single=True)


def experts(**stored: str) -> tuple[Rule, ...]:
    """A stack for each kind of matrix."""
    return tuple(
        Rule(f"blk.{{i}}.ffn_{kind}_exps.weight", f"{LAYER}.{name}.weight") for kind, name in stored.items()
    )


def shared(stored: str, *, optional: bool = False) -> tuple[Rule, ...]:
    """The expert that every token takes."""
    return tuple(
        Rule(f"blk.{{i}}.ffn_{kind}_shexp.weight", f"{LAYER}.{stored}.{kind}_proj.weight", optional=optional)
        for kind in KINDS
    )


#: Experts whose matrices are called w1 (gate), w2 (down) and w3 (up), as Mixtral's are.
MIXTRAL_EXPERT = "block_sparse_moe.experts.{e}"
QWEN_EXPERTS = (
    router("mlp.gate"),
    *experts(**{kind: f"mlp.experts.{{e}}.{kind}_proj" for kind in KINDS}),
)
SHARED_EXPERT = (
    *shared("mlp.shared_expert"),
    Rule(
        "blk.{i}.ffn_gate_inp_shexp.weight",
        f"{LAYER}.mlp.shared_expert_gate.weight",
        single=True,
        squeezed=True,
    ),
)


def count(config: Config) -> int:
    """The newest files of Qwen3-MoE call it what Mixtral's do."""
    name = "num_local_experts" if config.has("num_local_experts") else "num_experts"
    return config.integer(name, high=4096)


TAKEN = Setting("expert_used_count", "num_experts_per_tok", high=4096)
QWEN_SIZES = (
    Setting("expert_count", "num_experts", derive=count),
    TAKEN,
    Setting("expert_feed_forward_length", "moe_intermediate_size", high=1 << 22),
)
GRANITE_SCALES = (
    Real("embedding_scale", "embedding_multiplier", 1.0),
    Real("residual_scale", "residual_multiplier", 1.0),
    Real("attention.scale", "attention_multiplier", 1.0),
    Real("logit_scale", "logits_scaling", 1.0),
)
GRANITE_EXPERTS = (
    router("block_sparse_moe.router.layer"),
    Rule("blk.{i}.ffn_gate_up_exps.weight", f"{LAYER}.block_sparse_moe.input_linear.weight"),
    Rule("blk.{i}.ffn_down_exps.weight", f"{LAYER}.block_sparse_moe.output_linear.weight"),
)


def halves(name: str, stored: str) -> tuple[Rule, Rule]:
    """Gate and up, rows of one matrix, those of gate first."""
    gate, up = (name.replace("{kind}", kind) for kind in ("gate", "up"))
    return Rule(gate, stored, part=FIRST), Rule(up, stored, part=SECOND)
