"""The architecture table: what a model family is, as data.

One :class:`ArchitectureSpec` row per value of ``general.architecture``. The forward pass of every backend
reads the row; nothing else in the project asks for a family by name.
"""

from dataclasses import dataclass
from typing import Literal

from powerinfer_tools.errors import ModelError

RopeStyle = Literal["norm", "neox", "none"]
NormKind = Literal["rms", "layer"]

#: Activations with exact zeros: a neuron adds nothing at all unless its gate (its up, where the FFN has no
#: gate) is positive.
RELU_FAMILY = frozenset({"relu", "relu2", "drelu", "fatrelu"})
ACTIVATIONS = frozenset({"silu", "gelu_tanh", "gelu_erf"}) | RELU_FAMILY


@dataclass(frozen=True)
class ArchitectureSpec:
    """One model family of pre-norm decoder transformers.

    ``gated``: the FFN is act(gate)·up, else act(up). ``parallel``: attention and FFN read the same residual
    stream, and both are added to it. ``attention_norms`` are the tensors that may normalise the input of
    attention, the first that is in the file does; ``ffn_norm`` that of the FFN. ``fused_qkv``: the rows of
    queries, keys and values are one tensor, in this order. ``position_offset`` o: the residual stream begins
    with row position + o of a learnt table (None: there is none). ``routed``: files may have experts instead
    of one FFN a layer, which a softmax router chooses; ``shared_expert``: and one that every token takes,
    times a sigmoid; ``expert_weights_norm``: the weights of the chosen ones are divided by their sum.
    ``sliding_period`` p > 0: every p-th layer attends to everything, the others to the last
    ``attention.sliding_window`` positions (and use the local rotary base). ``wide_attention_scale_layers``
    names the one size of a family that scales scores by width/heads instead of the head dimension.
    """

    name: str
    rope_style: RopeStyle
    activation: str = "silu"
    norm: NormKind = "rms"
    gated: bool = True
    parallel: bool = False
    attention_norms: tuple[str, ...] = ("attn_norm",)
    ffn_norm: str = "ffn_norm"
    fused_qkv: bool = False
    position_offset: int | None = None
    qk_norm: bool = False
    post_norms: bool = False
    scaled_embeddings: bool = False
    routed: bool = False
    shared_expert: bool = False
    expert_weights_norm: bool = True
    sliding_period: int = 0
    local_rope_base: float = 0.0
    default_rope_base: float = 10000.0
    wide_attention_scale_layers: int = 0


ARCHITECTURES: dict[str, ArchitectureSpec] = {
    spec.name: spec
    for spec in (
        # Llama 1 to 3, Mistral, SmolLM, TinyLlama: GGUF stores q and k permuted, so pairs are (2i, 2i+1).
        # Mixtral (arXiv 2401.04088) is this with experts.
        ArchitectureSpec("llama", rope_style="norm", routed=True),
        # TurboSparse (arXiv 2406.05955): Mistral's shape with relu(gate)·relu(up).
        ArchitectureSpec("bamboo", rope_style="norm", activation="drelu"),
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
        # Biases on q, k and v are found in the file; no row field is needed for them.
        ArchitectureSpec("qwen2", rope_style="neox"),
        ArchitectureSpec("qwen3", rope_style="neox", qk_norm=True),
        ArchitectureSpec(
            "qwen2moe", rope_style="neox", routed=True, shared_expert=True, expert_weights_norm=False
        ),
        ArchitectureSpec("qwen3moe", rope_style="neox", qk_norm=True, routed=True),
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
}


def architecture(name: str, file: str) -> ArchitectureSpec:
    """The row of ``name``. Raises ModelError naming ``file`` and the families that are known."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"{file}: architecture {name!r} is not supported (supported: {known})") from None
