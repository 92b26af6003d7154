"""What a row of the architecture table says."""

from dataclasses import dataclass
from typing import Literal

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
    ``attention.sliding_window`` positions (and use the local rotary base). ``no_rope_period`` p > 0: every
    p-th layer has no rotary positions. ``wide_attention_scale_layers`` names the one size of a family that
    scales scores by width/heads instead of the head dimension.
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
    no_rope_period: int = 0
    local_rope_base: float = 0.0
    default_rope_base: float = 10000.0
    wide_attention_scale_layers: int = 0
