"""Dense families that are llama but for a norm, a bias, an activation or their positions."""

from powerinfer_tools.model.architectures.spec import ArchitectureSpec

#: Pairs of a head are neighbours, or stand half a head apart.
_LIKE_LLAMA = ("internlm2", "xverse", "nanbeige")
_LIKE_LLAMA_IN_HALVES = ("exaone",)

ROWS = (
    ArchitectureSpec("ernie4_5", rope_style="norm", plain_sections=True),
    # Llama 1 to 3, Mistral, SmolLM, TinyLlama: GGUF stores q and k permuted, so pairs are (2i, 2i+1).
    # Mixtral (arXiv 2401.04088) is this with experts.
    ArchitectureSpec("llama", rope_style="norm", routed=True),
    # TurboSparse (arXiv 2406.05955): Mistral's shape with relu(gate)·relu(up).
    ArchitectureSpec("bamboo", rope_style="norm", activation="drelu"),
    # AFM-4.5B: two matrices with squared ReLU, no gate.
    ArchitectureSpec("arcee", rope_style="norm", activation="relu2", gated=False),
    # SmolLM3: no rotary positions on every fourth layer (arXiv 2501.18795).
    ArchitectureSpec("smollm3", rope_style="norm", no_rope_period=4),
    # Layers and norms are llama's.
    *(ArchitectureSpec(name, rope_style="norm") for name in _LIKE_LLAMA),
    *(ArchitectureSpec(name, rope_style="neox") for name in _LIKE_LLAMA_IN_HALVES),
    # One matrix for gate and up (ChatGLM3, arXiv 2406.12793).
    ArchitectureSpec("chatglm", rope_style="norm", fused_gate=True),
    ArchitectureSpec("glm4", rope_style="norm", fused_gate=True, post_norms=True, halves_with_sections=True),
    # MiniCPM (arXiv 2404.06395): blocks, embeddings and logits are scaled.
    ArchitectureSpec(
        "minicpm",
        rope_style="norm",
        embedding_key=True,
        residual_scale=True,
        logit_scale="times",
        default_scales=(12.0, 1.4, 256.0),
        routed=True,
    ),
    # MiniCPM 3: latent attention.
    ArchitectureSpec(
        "minicpm3",
        rope_style="neox",
        embedding_key=True,
        residual_scale=True,
        logit_scale="times",
        default_scales=(12.0, 1.4, 256.0),
        latent=True,
    ),
    # PLM (arXiv 2503.12167): latent attention, and squared ReLU without gate.
    ArchitectureSpec("plm", rope_style="norm", activation="relu2", gated=False, latent=True),
    # Apertus (arXiv 2509.14233): xIELU without gate.
    ArchitectureSpec("apertus", rope_style="neox", activation="xielu", gated=False, qk_norm="heads"),
    # BitNet b1.58: norms before the last matrix of each block.
    ArchitectureSpec("bitnet", rope_style="neox", inner_norms=True),
    # Norms after the blocks instead of before them (OLMo 2, arXiv 2501.00656; EXAONE 4, arXiv 2507.11407).
    ArchitectureSpec(
        "olmo2",
        rope_style="neox",
        attention_norms=(),
        ffn_norm="",
        qk_norm="row",
        post_norms=True,
        sliding_period=4,
    ),
    ArchitectureSpec(
        "exaone4",
        rope_style="neox",
        attention_norms=(),
        ffn_norm="",
        qk_norm="heads",
        post_norms=True,
        sliding_period=4,
        windowed_depths=(64,),
        rope_in_windows_alone=True,
    ),
    # Norms without weights (OLMo, arXiv 2402.00838).
    ArchitectureSpec("olmo", rope_style="norm", norm="layer", norm_weights=False, clamped_qkv=True),
    # Biases by distance instead of rotary positions; of Baichuan, in models that are not 32 layers deep.
    ArchitectureSpec("refact", rope_style="none", alibi=True),
    ArchitectureSpec("baichuan", rope_style="norm", alibi=True, rotary_depths=(32,), alibi_depths=(40,)),
    # Qwen 1: the files count gate and up together.
    ArchitectureSpec("qwen", rope_style="neox", neurons_divisor=2),
    # Norms of queries and keys after they are turned.
    ArchitectureSpec("hunyuan-dense", rope_style="neox", qk_norm="heads", qk_norm_late=True),
    ArchitectureSpec("maincoder", rope_style="norm", qk_norm="heads", qk_norm_late=True),
    # The norm before the FFN is called after the block before it.
    ArchitectureSpec("seed_oss", rope_style="neox", ffn_norm="post_attention_norm"),
    ArchitectureSpec("pangu-embedded", rope_style="neox", rope_factors=False),
    # Phi-3 (arXiv 2404.14219): LongRoPE.
    ArchitectureSpec("phi3", rope_style="neox", fused_gate=True, sliding_everywhere=True),
    # Attention and FFN read one norm.
    ArchitectureSpec("plamo", rope_style="neox", parallel="always", ffn_norm="attn_norm"),
    ArchitectureSpec("hunyuan_vl", rope_style="neox", qk_norm="heads", qk_norm_late=True, rope_alpha=True),
    # ERNIE 4.5's text model; pairs stand half a head apart in it.
    ArchitectureSpec("paddleocr", rope_style="neox"),
    # OpenELM (arXiv 2404.14619): heads and neurons differ from layer to layer.
    ArchitectureSpec("openelm", rope_style="neox", qk_norm="heads", fused_qkv=True),
    # Llama-Nemotron (arXiv 2411.19146): so they do, and some layers have no attention or no FFN.
    ArchitectureSpec("deci", rope_style="norm"),
    # CogVLM's text model (arXiv 2311.03079): matrices for pictures are left out.
    ArchitectureSpec("cogvlm", rope_style="neox", rope_factors=False, left_out=("blk.*.vis_*",)),
    # Positions of text alone are the same in every section of a head.
    ArchitectureSpec("qwen2vl", rope_style="neox", default_norm_eps=1e-6),
    ArchitectureSpec("qwen3vl", rope_style="neox", qk_norm="heads"),
    # Biases on q, k and v are read where the file has them; no row field is needed for them.
    ArchitectureSpec("qwen2", rope_style="neox"),
    ArchitectureSpec("qwen3", rope_style="neox", qk_norm="heads"),
    # Talkie: norms have no weights, and every layer adds a share of the embedding.
    ArchitectureSpec(
        "talkie",
        rope_style="neox",
        norm_weights=False,
        embedding_norm="plain",
        qk_norm="gains",
        qk_norm_late=True,
        logit_scale="times",
        embedding_shares=True,
    ),
)
