"""Dense families that are llama but for a norm, a bias, an activation or their positions."""

from powerinfer_tools.model.architectures.spec import ArchitectureSpec

ROWS = (
    # Llama 1 to 3, Mistral, SmolLM, TinyLlama: GGUF stores q and k permuted, so pairs are (2i, 2i+1).
    # Mixtral (arXiv 2401.04088) is this with experts.
    ArchitectureSpec("llama", rope_style="norm", routed=True),
    # TurboSparse (arXiv 2406.05955): Mistral's shape with relu(gate)·relu(up).
    ArchitectureSpec("bamboo", rope_style="norm", activation="drelu"),
    # AFM-4.5B: two matrices with squared ReLU, no gate.
    ArchitectureSpec("arcee", rope_style="norm", activation="relu2", gated=False),
    # SmolLM3: no rotary positions on every fourth layer (arXiv 2501.18795).
    ArchitectureSpec("smollm3", rope_style="norm", no_rope_period=4),
    # Biases on q, k and v are read where the file has them; no row field is needed for them.
    ArchitectureSpec("qwen2", rope_style="neox"),
    ArchitectureSpec("qwen3", rope_style="neox", qk_norm=True),
)
