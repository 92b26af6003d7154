"""Dense families that normalise by mean and deviation, most of them with FFNs of two matrices."""

from powerinfer_tools.model.architectures.spec import ArchitectureSpec

ROWS = (
    # OPT (arXiv 2205.01068), of the sizes that normalise before each block: all but 350m.
    ArchitectureSpec(
        "opt", rope_style="none", activation="relu", norm="layer", gated=False, position_offset=2
    ),
    # Falcon (arXiv 2311.16867). 7B has one norm for both branches; 40B and 180B have two, and GGUF calls
    # the one of attention attn_norm_2. The GGUF row order of q, k and v is that of three tensors.
    ArchitectureSpec(
        "falcon",
        rope_style="neox",
        activation="gelu_erf",
        norm="layer",
        gated=False,
        parallel=True,
        attention_norms=("attn_norm_2", "attn_norm"),
        ffn_norm="attn_norm",
        fused_qkv=True,
    ),
    # Nemotron-4 (arXiv 2402.16819): squared ReLU; GGUF stores LayerNorm1p's weights with the one added.
    ArchitectureSpec("nemotron", rope_style="neox", activation="relu2", norm="layer", gated=False),
)
