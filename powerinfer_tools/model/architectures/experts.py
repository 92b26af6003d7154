"""Families whose layers have a router and experts."""

from powerinfer_tools.model.architectures.spec import ArchitectureSpec

ROWS = (
    ArchitectureSpec(
        "granitemoe",
        rope_style="norm",
        routed=True,
        embedding_key=True,
        residual_scale=True,
        logit_scale="divided",
    ),
    ArchitectureSpec(
        "qwen2moe", rope_style="neox", routed=True, shared_expert=True, expert_weights_norm=False
    ),
    ArchitectureSpec("qwen3moe", rope_style="neox", qk_norm="heads", routed=True),
)
