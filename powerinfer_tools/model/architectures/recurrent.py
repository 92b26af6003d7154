"""Families some of whose layers mix tokens without attention."""

from powerinfer_tools.model.architectures.spec import ArchitectureSpec

ROWS = (
    # Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060): nothing but recurrent blocks.
    ArchitectureSpec(
        "mamba",
        rope_style="none",
        recurrent="selective scan",
        recurrent_layers="all",
        single_blocks=True,
    ),
    ArchitectureSpec(
        "mamba2", rope_style="none", recurrent="state space", recurrent_layers="all", single_blocks=True
    ),
    # Jamba (arXiv 2403.19887), the sizes without experts: its attention has no positions.
    ArchitectureSpec("jamba", rope_style="none", recurrent="selective scan"),
    # LFM2: convolutions over three tokens; GGUF calls the norm of the head after the embedding.
    ArchitectureSpec(
        "lfm2",
        rope_style="neox",
        qk_norm="heads",
        output_norm="token_embd_norm",
        recurrent="short convolution",
        sliding_everywhere=True,
    ),
    # Nemotron-H (arXiv 2504.03624): one block a layer, squared ReLU without gate, no positions; Nemotron 3
    # has experts of that kind, which a sigmoid router chooses.
    ArchitectureSpec(
        "nemotron_h",
        rope_style="none",
        activation="relu2",
        gated=False,
        ffn_norm="attn_norm",
        recurrent="state space",
        single_blocks=True,
    ),
    ArchitectureSpec(
        "nemotron_h_moe",
        rope_style="none",
        activation="relu2",
        gated=False,
        ffn_norm="attn_norm",
        recurrent="state space",
        single_blocks=True,
        routed=True,
        shared_expert=True,
        router="sigmoid",
    ),
    ArchitectureSpec(
        "granitehybrid",
        rope_style="norm",
        embedding_key=True,
        residual_scale=True,
        logit_scale="divided",
        recurrent="state space",
        gated_biases=True,
        rope_switch=True,
        routed=True,
        shared_expert=True,
    ),
    # Falcon-H1 (arXiv 2507.22448): attention and a state space side by side. No published model has a bias
    # of attention's output, and llama.cpp, whose files these are, leaves one out.
    ArchitectureSpec(
        "falcon-h1",
        rope_style="neox",
        recurrent="state space",
        recurrent_layers="beside attention",
        gated_biases=True,
        rope_factors=False,
        output_bias=False,
    ),
    # Qwen3.5: three delta nets to one attention, which has gates.
    ArchitectureSpec(
        "qwen35",
        rope_style="neox",
        qk_norm="heads",
        ffn_norm="post_attention_norm",
        recurrent="delta net",
        attention_gate="queries",
    ),
    # Qwen3-Next and the Qwen3.5 mixtures: the same with experts.
    *(
        ArchitectureSpec(
            name,
            rope_style="neox",
            qk_norm="heads",
            ffn_norm="post_attention_norm",
            recurrent="delta net",
            attention_gate="queries",
            routed=True,
            shared_expert=True,
        )
        for name in ("qwen3next", "qwen35moe")
    ),
    # Kimi Linear (arXiv 2510.26692): three delta nets to one latent attention without positions.
    ArchitectureSpec(
        "kimi-linear",
        rope_style="none",
        recurrent="channel delta net",
        latent=True,
        routed=True,
        shared_expert=True,
        router="file or sigmoid",
    ),
    # Ling 3 (Bailing MoE 3): the same with a bound of decays, matrices of full rank, gates of attention's
    # heads and limited gates.
    ArchitectureSpec(
        "bailingmoe3",
        rope_style="norm",
        halves_with_sections=True,
        recurrent="channel delta net",
        bounded_decay=True,
        latent=True,
        attention_gate="matrix",
        routed=True,
        shared_expert=True,
        expert_weights_norm=False,
        router="file",
        clamp="clamped_silu",
    ),
    # LFM2 with experts; the first layers have none.
    ArchitectureSpec(
        "lfm2moe",
        rope_style="neox",
        qk_norm="heads",
        output_norm="token_embd_norm",
        recurrent="short convolution",
        sliding_everywhere=True,
        routed=True,
        router="file",
    ),
    # RWKV-7 (arXiv 2503.14456): no attention; a squared ReLU without gate, which reads two tokens.
    ArchitectureSpec(
        "rwkv7",
        rope_style="none",
        norm="layer",
        activation="relu2",
        gated=False,
        embedding_norm="weights",
        ffn_norm="attn_norm_2",
        ffn_names=("channel_mix_key", "channel_mix_value"),
        ffn_shift=True,
        recurrent="time mixing",
        recurrent_layers="all",
    ),
    # The same in place of the attention of another family.
    ArchitectureSpec("arwkv7", rope_style="none", recurrent="time mixing", recurrent_layers="all"),
    # PLaMo 2: state spaces with normalised steps, and attention with a norm for each head.
    ArchitectureSpec(
        "plamo2",
        rope_style="neox",
        fused_qkv=True,
        fused_gate=True,
        qk_norm="own heads",
        post_norms=True,
        recurrent="head scan",
    ),
)
