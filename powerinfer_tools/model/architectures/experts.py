"""Families whose layers have a router and experts."""

from powerinfer_tools.model.architectures.spec import ArchitectureSpec

ROWS = (
    ArchitectureSpec(
        "qwen2moe", rope_style="neox", routed=True, shared_expert=True, expert_weights_norm=False
    ),
    ArchitectureSpec("qwen3moe", rope_style="neox", qk_norm="heads", routed=True),
    # gpt-oss: biases everywhere, sinks, every second layer local; the softmax is that of the chosen.
    ArchitectureSpec(
        "gpt-oss",
        rope_style="neox",
        activation="swiglu_oai",
        ffn_norm="post_attention_norm",
        routed=True,
        gated_biases=True,
        sliding_period=2,
        sinks=True,
    ),
    # DBRX: LayerNorm without biases.
    ArchitectureSpec(
        "dbrx",
        rope_style="neox",
        norm="layer",
        ffn_norm="attn_output_norm",
        clamped_qkv=True,
        routed=True,
    ),
    # OLMoE (arXiv 2409.02060).
    ArchitectureSpec("olmoe", rope_style="neox", qk_norm="row", routed=True, expert_weights_norm=False),
    # Sigmoid routers with a bias that chooses and does not weigh, shared experts, dense layers first
    # (arXiv 2412.19437).
    ArchitectureSpec(
        "dots1",
        rope_style="neox",
        qk_norm="heads",
        routed=True,
        shared_expert=True,
        router="file",
        expert_weights_norm=False,
    ),
    # DeepSeek V2 and V3, Kimi K2, GLM-4.7-Flash; Mistral 4.
    *(
        ArchitectureSpec(
            name,
            rope_style="norm",
            routed=True,
            shared_expert=True,
            router="file",
            expert_weights_norm=False,
            latent=True,
        )
        for name in ("deepseek2", "mistral4")
    ),
    ArchitectureSpec("qwen3vlmoe", rope_style="neox", qk_norm="heads", routed=True),
    ArchitectureSpec(
        "deepseek", rope_style="norm", routed=True, shared_expert=True, expert_weights_norm=False
    ),
    ArchitectureSpec(
        "bailingmoe", rope_style="norm", routed=True, shared_expert=True, expert_weights_norm=False
    ),
    ArchitectureSpec(
        "hunyuan-moe",
        rope_style="neox",
        qk_norm="heads",
        qk_norm_late=True,
        routed=True,
        shared_expert=True,
    ),
    ArchitectureSpec("minimax-m2", rope_style="neox", qk_norm="row", routed=True, router="file"),
    ArchitectureSpec(
        "glm4moe",
        rope_style="neox",
        qk_norm="heads",
        ffn_norm="post_attention_norm",
        routed=True,
        shared_expert=True,
        router="file",
        expert_weights_norm=False,
    ),
    ArchitectureSpec("ernie4_5-moe", rope_style="norm", routed=True, shared_expert=True, plain_sections=True),
    ArchitectureSpec(
        "bailingmoe2",
        rope_style="neox",
        qk_norm="heads",
        routed=True,
        shared_expert=True,
        router="file",
        expert_weights_norm=False,
    ),
    *(
        ArchitectureSpec(
            name,
            rope_style="norm",
            embedding_key=True,
            residual_scale=True,
            logit_scale="divided",
            rope_switch=True,
            routed=True,
            shared_expert=True,
            gated_biases=True,
        )
        for name in ("granite", "granitemoe")
    ),
    ArchitectureSpec("mellum", rope_style="neox", qk_norm="heads", routed=True, sliding_period=4),
    ArchitectureSpec(
        "exaone-moe",
        rope_style="neox",
        qk_norm="heads",
        sliding_period=4,
        rope_in_windows_alone=True,
        routed=True,
        shared_expert=True,
        router="file",
        expert_weights_norm=False,
    ),
    ArchitectureSpec("mistral3", rope_style="norm", routed=True),
    # SmallThinker (arXiv 2507.20984): ReLU experts, whose router reads the layer's input; three local layers
    # with rotary positions to a global one without, which comes first.
    ArchitectureSpec(
        "smallthinker",
        rope_style="neox",
        activation="relu",
        sliding_period=4,
        dense_first=True,
        rope_in_windows_alone=True,
        routed=True,
        router="file",
        early_router=True,
    ),
)
