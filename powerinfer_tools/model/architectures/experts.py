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
            temperature="by key",
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
        qk_norm_optional=True,
        ffn_norm="post_attention_norm",
        routed=True,
        shared_expert=True,
        router="file or sigmoid",
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
    # Ministral 3: queries grow with their position.
    ArchitectureSpec("mistral3", rope_style="norm", routed=True, temperature="by key"),
    # DeepSeek V3.2, GLM 5: attention reads everything up to as much as their indexers would choose.
    *(
        ArchitectureSpec(
            name,
            rope_style="norm",
            plain_sections=True,
            routed=True,
            shared_expert=True,
            router="file or sigmoid",
            expert_weights_norm=False,
            latent=True,
            indexed=True,
            left_out=("blk.*.indexer.*",),
        )
        for name in ("deepseek32", "glm-dsa")
    ),
    # MiniMax M3: so does its attention.
    ArchitectureSpec(
        "minimax-m3",
        rope_style="neox",
        activation="swiglu_oai",
        qk_norm="heads",
        routed=True,
        shared_expert=True,
        router="file or sigmoid",
        expert_weights_norm=False,
        indexed=True,
        left_out=("blk.*.indexer.*",),
    ),
    # MiMo V2: sinks, values of another width.
    ArchitectureSpec(
        "mimo2",
        rope_style="neox",
        sinks=True,
        routed=True,
        router="sigmoid",
        spare_dense=True,
        value_scale=True,
    ),
    # Llama 4: three layers of chunks with rotary positions to one without; experts read what their sigmoid
    # weighs.
    ArchitectureSpec(
        "llama4",
        rope_style="norm",
        qk_norm="plain",
        qk_norm_late=True,
        unnormed_experts=128,
        sliding_period=4,
        no_rope_period=4,
        chunked=True,
        temperature="without positions",
        routed=True,
        shared_expert=True,
        default_shared_count=1,
        expert_weights_norm=False,
        router="sigmoid",
        weigh_input=True,
    ),
    # Command A's mixtures: experts and the shared one count half each.
    ArchitectureSpec(
        "cohere2moe",
        rope_style="norm",
        norm="layer",
        norm_by_key=True,
        parallel="always",
        ffn_norm="attn_norm",
        logit_scale="times",
        sliding_period=4,
        dense_first=True,
        rope_in_windows_alone=True,
        rope_in_dense=True,
        routed=True,
        shared_expert=True,
        shared_factor=0.5,
        expert_weights_norm=False,
        router="file or sigmoid",
    ),
    # Phi-3.5 MoE, as GGUF files of it are computed: by root mean square, and with a plain softmax.
    ArchitectureSpec("phimoe", rope_style="neox", rms_biases=True, head_bias=True, routed=True),
    # Trinity.
    ArchitectureSpec(
        "afmoe",
        rope_style="neox",
        qk_norm="heads",
        post_norms=True,
        scaled_embeddings=True,
        sliding_period=4,
        no_rope_period=4,
        attention_gate="matrix",
        routed=True,
        shared_expert=True,
        expert_weights_norm=False,
        router="file or sigmoid",
    ),
    # Laguna: gates of heads, or of single values; windows have rotary positions of their own.
    ArchitectureSpec(
        "laguna",
        rope_style="neox",
        qk_norm="heads",
        sliding_period=4,
        dense_first=True,
        plain_local_rope=True,
        attention_gate="matrix",
        gate_activation="softplus",
        routed=True,
        shared_expert=True,
        default_shared_count=1,
        expert_weights_norm=False,
        router="file or sigmoid",
    ),
    # Hunyuan 3: files may have dense FFNs beside the experts, which are not used.
    ArchitectureSpec(
        "hy_v3",
        rope_style="neox",
        qk_norm="heads",
        routed=True,
        shared_expert=True,
        spare_dense=True,
        expert_weights_norm=False,
        router="file or sigmoid",
    ),
    # Grok 1 and 2: a dense FFN beside the experts.
    ArchitectureSpec(
        "grok",
        rope_style="neox",
        activation="gelu_tanh",
        embedding_key=True,
        logit_scale="times",
        post_norms=True,
        post_norm_names=(("attn_output_norm",), ("layer_output_norm", "post_ffw_norm")),
        output_scale=True,
        # Files of Grok-1, 6,144 wide, that were made before there were keys for it.
        default_scales=(6144**0.5, 1.0, 6144 * 3**-0.5),
        default_softcap=30.0,
        routed=True,
        dense_beside="optional",
        shared_factor=0.5**0.5,
    ),
    # Snowflake Arctic: experts read the layer's input, and the FFN beside them what attention left.
    ArchitectureSpec(
        "arctic", rope_style="norm", routed=True, dense_beside="square", beside_norm="ffn_norm_exps"
    ),
    # Step 3.5: gates of attention's heads; layers without a window turn half as many values; gates of the
    # last layers are limited.
    ArchitectureSpec(
        "step35",
        rope_style="neox",
        qk_norm="heads",
        qk_norm_optional=True,
        half_rope=True,
        attention_gate="matrix",
        routed=True,
        shared_expert=True,
        expert_weights_norm=False,
        router="file or sigmoid",
        clamp="clamped_silu",
    ),
    # Maple: rotary positions where there is a window alone; limited gates.
    ArchitectureSpec(
        "maple",
        rope_style="neox",
        qk_norm="heads",
        rope_in_windows_alone=True,
        routed=True,
        clamp="swiglu_clamped",
    ),
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
