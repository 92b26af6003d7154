"""Dense families some of whose layers attend to a window alone."""

from powerinfer_tools.model.architectures.spec import ArchitectureSpec

ROWS = (
    # Gemma 3 report (arXiv 2503.19786): 5 local layers to 1 global, rotary base 10k local, 1M global.
    ArchitectureSpec(
        "gemma3",
        rope_style="neox",
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        scaled_embeddings=True,
        sliding_period=6,
        local_rope_base=10000.0,
        default_rope_base=1000000.0,
        wide_attention_scale_layers=62,
    ),
)
