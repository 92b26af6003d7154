"""Dense families some of whose layers attend to a window alone."""

from powerinfer_tools.model.architectures.spec import ArchitectureSpec

ROWS = (
    ArchitectureSpec(
        "granite_swa",
        rope_style="norm",
        embedding_key=True,
        residual_scale=True,
        logit_scale="divided",
        sliding_period=4,
        sinks=True,
    ),
    # Gemma (arXiv 2403.08295); Gemma 2 (arXiv 2408.00118): every second layer is local.
    ArchitectureSpec("gemma", rope_style="neox", activation="gelu_tanh", scaled_embeddings=True),
    ArchitectureSpec(
        "gemma2",
        rope_style="neox",
        activation="gelu_tanh",
        post_norms=True,
        scaled_embeddings=True,
        sliding_period=2,
        wide_attention_scale_layers=46,
    ),
    # Command R7B: three local layers with rotary positions to a global one without.
    ArchitectureSpec(
        "cohere2",
        rope_style="norm",
        norm="layer",
        parallel="always",
        ffn_norm="attn_norm",
        logit_scale="times",
        sliding_period=4,
        rope_in_windows_alone=True,
    ),
    # PLaMo 3.
    ArchitectureSpec(
        "plamo3", rope_style="neox", fused_gate=True, qk_norm="heads", post_norms=True, sliding_period=8
    ),
    # Spark 2.5: what each head attended has a gate of its own.
    ArchitectureSpec(
        "spark2_5",
        rope_style="neox",
        activation="gelu_tanh",
        attention_gate="matrix",
        sliding_everywhere=True,
    ),
    ArchitectureSpec(
        "muse-glimmer",
        rope_style="norm",
        qk_norm="heads",
        post_norms=True,
        post_norm_eps=1e-8,
        sliding_period=4,
        rope_in_windows_alone=True,
        attention_gate="matrix",
        embedding_norm="plain",
        logit_scale="times",
    ),
    # Gemma 3 report (arXiv 2503.19786): 5 local layers to 1 global, rotary base 10k local, 1M global.
    ArchitectureSpec(
        "gemma3",
        rope_style="neox",
        activation="gelu_tanh",
        qk_norm="heads",
        post_norms=True,
        scaled_embeddings=True,
        sliding_period=6,
        local_rope_base=10000.0,
        default_rope_base=1000000.0,
        wide_attention_scale_layers=62,
    ),
    # Gemma 3n: several residual streams, inputs for each layer, and gates of the first layers that count if
    # they are among the largest 5 %, which makes exact zeros.
    ArchitectureSpec(
        "gemma3n",
        rope_style="neox",
        activation="gelu_tanh",
        qk_norm="heads",
        post_norms=True,
        scaled_embeddings=True,
        sliding_period=5,
        local_rope_base=10000.0,
        attention_scale=1.0,
        value_norm=True,
        layer_inputs=True,
        shares_caches=True,
        keeping_layers=20,
        streams=True,
        mixed_scale=0.5**0.5,
        top_layers=10,
    ),
    # Gemma 4: heads of layers without a window are wider, and the last layers may have no keys. Layers may
    # have experts beside their FFN.
    ArchitectureSpec(
        "gemma4",
        rope_style="neox",
        activation="gelu_tanh",
        qk_norm="heads",
        post_norms=True,
        scaled_embeddings=True,
        local_rope_base=10000.0,
        attention_scale=1.0,
        value_norm=True,
        layer_inputs=True,
        shares_caches=True,
        output_scales=True,
        routed=True,
        dense_beside="optional",
        expert_norms=True,
    ),
)
