"""What a row of the architecture table says."""

from dataclasses import dataclass
from typing import Literal

RopeStyle = Literal["norm", "neox", "none"]
NormKind = Literal["rms", "layer"]
Parallel = Literal["never", "always", "by key", "without FFN norm"]
QKNorm = Literal["none", "heads", "row", "own heads", "plain", "gains"]
LogitScale = Literal["none", "times", "divided"]
EmbeddingNorm = Literal["none", "weights", "plain"]
AttentionGate = Literal["none", "queries", "matrix"]
DenseBeside = Literal["none", "optional", "square"]
Temperature = Literal["none", "by key", "without positions"]
#: What mixes the tokens of a family's recurrent layers, and which layers those are: those that the file
#: lists, all (there is no attention), or all, each beside attention.
RecurrentKind = Literal[
    "none",
    "short convolution",
    "selective scan",
    "state space",
    "delta net",
    "channel delta net",
    "time mixing",
    "head scan",
]
#: How a router's scores become weights; "file": the key ``expert_gating_func`` says it, and where it does
#: not, it is a softmax, or a sigmoid.
RouterKind = Literal["softmax", "sigmoid", "file", "file or sigmoid"]
RecurrentLayers = Literal["listed", "all", "beside attention"]

#: Activations with exact zeros: a neuron adds nothing at all unless its gate (its up, where the FFN has no
#: gate) is positive.
RELU_FAMILY = frozenset({"relu", "relu2", "drelu", "fatrelu"})
ACTIVATIONS = frozenset({"silu", "gelu_tanh", "gelu_erf", "swiglu_oai", "xielu"}) | RELU_FAMILY


@dataclass(frozen=True)
class ArchitectureSpec:
    """One model family of pre-norm decoder transformers.

    ``gated``: the FFN is act(gate)·up, else act(up); ``fused_gate``: the rows of gate and up are one tensor
    ``ffn_up``, in this order; ``neurons_divisor``: the files give the number of neurons times this.
    ``parallel``: attention and FFN read the same residual stream, and both are added to it: never, always,
    where the key ``use_parallel_residual`` says it, or where the FFN has no norm of its own; where it has
    none, it reads what attention reads. ``attention_norms`` are the tensors that may normalise the input of
    attention, the first that is in the file does; ``ffn_norm`` that of the FFN, ``output_norm`` that of the
    head. ``norm_weights``: norms have weights (else only the output's may have some). ``qk_norm``: queries
    and keys are normalised, head by head with one weight for all, or over the whole row, or in files that
    have weights for it each head with its own; "plain": head by head without weights, where they are turned;
    "gains": without weights, and each head of queries has a factor; ``qk_norm_late``: after they are turned.
    ``fused_qkv``: the rows of queries, keys and values are one
    tensor, in this order, as they may be in files of other families, too. ``position_offset`` o: the
    residual stream begins with row position + o of a learnt table (None: there is none). ``routed``: files
    may have experts instead of one FFN a layer, which a softmax router chooses; ``shared_expert``: and one
    that every token takes, times a sigmoid; ``expert_weights_norm``: the weights of the chosen ones are
    divided by their sum. ``scaled_embeddings``: by the root of the width; ``embedding_key``: by the key
    ``embedding_scale``; ``residual_scale``: what blocks add is times that key; ``logit_scale``: how logits
    are scaled by that key. ``sliding_period`` p > 0: every p-th layer attends to everything (with
    ``dense_first``, the first of each p), the others to the last ``attention.sliding_window`` positions (and
    use the local rotary base); ``sliding_everywhere``: all have the window, where there is one;
    ``windowed_depths``: only models of so many layers have one; ``rope_in_windows_alone``: where some layers
    have windows, the others have no rotary positions. ``no_rope_period`` p > 0: every p-th layer has no
    rotary positions. ``halves_with_sections``: where heads have sections for positions of pictures, pairs
    stand half a head apart. ``rope_factors``: tables of divisors that a file has are used.
    ``default_norm_eps``: where the file does not say it. ``clamped_qkv``: by the key ``attention.clamp_kqv``;
    ``alibi``: scores are biased by distance; ``rotary_depths``: models of so many layers have rotary
    positions instead; ``sinks``: layers may have them. ``wide_attention_scale_layers`` names the one size of
    a family that scales scores by width/heads instead of the head dimension. ``recurrent``: what mixes tokens
    in ``recurrent_layers``; ``single_blocks``: each layer is one block, attention, recurrent or FFN.
    ``attention_gate``: a gate, whose sigmoid (or ``gate_activation``) multiplies what was attended, has the
    rows after those of each head's queries, or a matrix, of one row for each value or for each head.
    ``gated_biases``: FFNs and experts with gates may have biases. ``router``: how scores become weights;
    ``weigh_input``: which are those of the experts' inputs. ``latent``: keys and values are one vector of low
    rank (arXiv 2405.04434). ``early_router``: the router reads the layer's input. ``plain_sections``:
    sections of a head for positions of pictures leave its pairs as they are. ``output_bias``: a bias of
    attention's output counts, where a file has one. ``rope_switch``: the key ``rope.scaling.finetuned`` says
    whether there are rotary positions. Fields that few families have are explained where they stand."""

    name: str
    rope_style: RopeStyle
    activation: str = "silu"
    norm: NormKind = "rms"
    gated: bool = True
    fused_gate: bool = False
    neurons_divisor: int = 1
    parallel: Parallel = "never"
    attention_norms: tuple[str, ...] = ("attn_norm",)
    ffn_norm: str = "ffn_norm"
    output_norm: str = "output_norm"
    norm_weights: bool = True
    fused_qkv: bool = False
    position_offset: int | None = None
    qk_norm: QKNorm = "none"
    qk_norm_late: bool = False
    post_norms: bool = False
    scaled_embeddings: bool = False
    embedding_key: bool = False
    residual_scale: bool = False
    logit_scale: LogitScale = "none"
    routed: bool = False
    shared_expert: bool = False
    expert_weights_norm: bool = True
    sliding_period: int = 0
    dense_first: bool = False
    sliding_everywhere: bool = False
    windowed_depths: tuple[int, ...] = ()
    rope_in_windows_alone: bool = False
    no_rope_period: int = 0
    halves_with_sections: bool = False
    rope_factors: bool = True
    default_norm_eps: float | None = None
    local_rope_base: float = 0.0
    default_rope_base: float = 10000.0
    wide_attention_scale_layers: int = 0
    head_bias: bool = False
    clamped_qkv: bool = False
    alibi: bool = False
    rotary_depths: tuple[int, ...] = ()
    #: Of those with rotary depths, models of so many layers have biases, which their files do not say.
    alibi_depths: tuple[int, ...] = ()
    sinks: bool = False
    recurrent: RecurrentKind = "none"
    recurrent_layers: RecurrentLayers = "listed"
    single_blocks: bool = False
    attention_gate: AttentionGate = "none"
    gate_activation: str = "sigmoid"
    gated_biases: bool = False
    rope_switch: bool = False
    output_bias: bool = True
    router: RouterKind = "softmax"
    weigh_input: bool = False
    latent: bool = False
    plain_sections: bool = False
    early_router: bool = False
    #: The residual stream begins normalised, with weights or without.
    embedding_norm: EmbeddingNorm = "none"
    #: Norms are by root mean square where the file has an epsilon for those.
    norm_by_key: bool = False
    #: Norms by root mean square may have biases.
    rms_biases: bool = False
    #: Of the norms after attention and after the FFN: the first that is in the file counts.
    post_norm_names: tuple[tuple[str, ...], tuple[str, ...]] = (("post_attention_norm",), ("post_ffw_norm",))
    #: Their epsilon, where it is not that of other norms.
    post_norm_eps: float = 0.0
    #: Scores are divided by the head dimension, not by its root.
    head_scale: bool = False
    #: Scores are times the key ``attention.output_scale``.
    output_scale: bool = False
    #: Where the file does not say them: the scale of embeddings, that of blocks times the root of the layers,
    #: and that of logits times the width.
    default_scales: tuple[float, float, float] | None = None
    #: Where the file does not say it: the cap of scores.
    default_softcap: float = 0.0
    #: Beside its experts a layer has a dense FFN that every token takes, where the file has one, or one as
    #: large as the model is wide.
    dense_beside: DenseBeside = "none"
    #: Experts read the layer's input, normalised by this.
    beside_norm: str = ""
    #: What experts and the one that every token takes add together is times this.
    shared_factor: float = 1.0
    #: Of experts that every token takes, where the file does not say how many there are.
    default_shared_count: int = 0
    #: Layers with experts may have a dense FFN, which is not used.
    spare_dense: bool = False
    #: Layers before those with experts have rotary positions in any case.
    rope_in_dense: bool = False
    #: Rotary positions of layers with a window are not scaled.
    plain_local_rope: bool = False
    #: The base of rotary positions grows by the key ``rope.scaling.alpha``.
    rope_alpha: bool = False
    #: Windows are chunks of positions.
    chunked: bool = False
    #: Queries grow with their position, as keys say, or in layers without rotary positions.
    temperature: Temperature = "none"
    #: Files have an indexer, by which attention chooses what it reads where there is much of it.
    indexed: bool = False
    #: What was attended is normalised before the output, and what an FFN's activation leaves before down.
    inner_norms: bool = False
    #: Files may lack the norms of queries and keys.
    qk_norm_optional: bool = False
    #: Tensors that text does not need, as patterns of their names.
    left_out: tuple[str, ...] = ()
    #: What was attended is times the key ``attention.value_scale``.
    value_scale: bool = False
    #: Every layer has an input of its own, of as many values as the key ``embedding_length_per_layer_input``
    #: says.
    layer_inputs: bool = False
    #: The last ``attention.shared_kv_layers`` layers read what the last layer of their kind before them
    #: keeps; where that key is missing, those after the first so many.
    shares_caches: bool = False
    keeping_layers: int = 0
    #: Values are normalised head by head, without weights; where there is no matrix for them, they are the
    #: keys.
    value_norm: bool = False
    #: What files call up and down of a dense FFN.
    ffn_names: tuple[str, str] = ("ffn_up", "ffn_down")
    #: The FFN's input is mixed with that of the token before.
    ffn_shift: bool = False
    #: What scores are times, where the file does not say it (0: by the head dimension).
    attention_scale: float = 0.0
    #: Layers may end with a factor of the residual stream.
    output_scales: bool = False
    #: Layers add a share of the embedding at their end.
    embedding_shares: bool = False
    #: There are several residual streams (arXiv 2301.13310), and a low-rank path beside attention.
    streams: bool = False
    #: What the residual stream is times after attention.
    mixed_scale: float = 1.0
    #: Gates of the first so many layers count if they are among the largest 5 %, where the file does not say
    #: how many deviations they must be above the mean.
    top_layers: int = 0
    #: Files may lack the table of learnt positions.
    positions_optional: bool = False
    #: The activation of FFNs in layers whose gates the file limits; "": no file does.
    clamp: str = ""
    #: The router, the experts and the dense FFN beside them have norms of their own.
    expert_norms: bool = False
    #: Layers without a window turn half of the values that the file says.
    half_rope: bool = False
    #: Decays of a channel delta net have a lower bound, which the file says.
    bounded_decay: bool = False
    #: Models of so many experts have no norms of queries and keys.
    unnormed_experts: int = 0
