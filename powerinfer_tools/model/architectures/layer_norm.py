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
        parallel="always",
        attention_norms=("attn_norm_2", "attn_norm"),
        ffn_norm="attn_norm",
        fused_qkv=True,
    ),
    ArchitectureSpec(
        "gpt2", rope_style="none", activation="gelu_tanh", norm="layer", gated=False, position_offset=0
    ),
    ArchitectureSpec(
        "starcoder", rope_style="none", activation="gelu_tanh", norm="layer", gated=False, position_offset=0
    ),
    # StarCoder 2 (arXiv 2402.19173).
    ArchitectureSpec("starcoder2", rope_style="neox", activation="gelu_tanh", norm="layer", gated=False),
    ArchitectureSpec("codeshell", rope_style="neox", activation="gelu_tanh", norm="layer", gated=False),
    # GPT-NeoX (arXiv 2204.06745), Pythia.
    ArchitectureSpec(
        "gptneox", rope_style="neox", activation="gelu_tanh", norm="layer", gated=False, parallel="by key"
    ),
    ArchitectureSpec(
        "phi2",
        rope_style="neox",
        activation="gelu_tanh",
        norm="layer",
        gated=False,
        parallel="always",
        ffn_norm="attn_norm",
        head_bias=True,
    ),
    ArchitectureSpec("jais2", rope_style="neox", activation="relu2", norm="layer", gated=False),
    ArchitectureSpec("orion", rope_style="neox", norm="layer"),
    # Command R.
    ArchitectureSpec(
        "command-r",
        rope_style="norm",
        norm="layer",
        parallel="always",
        ffn_norm="attn_norm",
        logit_scale="times",
    ),
    # MPT: positions are in the scores, by distance (arXiv 2108.12409), or learnt.
    ArchitectureSpec(
        "mpt",
        rope_style="none",
        position_offset=0,
        positions_optional=True,
        activation="gelu_tanh",
        norm="layer",
        gated=False,
        clamped_qkv=True,
        alibi=True,
        qk_norm="row",
        qk_norm_optional=True,
        left_out=("blk.*.attn_k_norm.weight", "blk.*.attn_k_norm.bias"),  # not used without those of queries
    ),
    # BLOOM (arXiv 2211.05100).
    ArchitectureSpec(
        "bloom",
        rope_style="none",
        activation="gelu_tanh",
        norm="layer",
        gated=False,
        alibi=True,
        embedding_norm="weights",
    ),
    # Jais (arXiv 2308.16149).
    ArchitectureSpec("jais", rope_style="none", norm="layer", alibi=True, gated_biases=True, head_scale=True),
    # StableLM 2: the 12B model has no FFN norm, and its blocks read the same input.
    ArchitectureSpec(
        "stablelm", rope_style="neox", norm="layer", parallel="without FFN norm", qk_norm="own heads"
    ),
    # Nemotron-4 (arXiv 2402.16819): squared ReLU; GGUF stores LayerNorm1p's weights with the one added.
    ArchitectureSpec("nemotron", rope_style="neox", activation="relu2", norm="layer", gated=False),
)
