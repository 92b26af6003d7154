"""The numbers of a model: rotary positions, recurrent and latent sizes, layers, routing."""

from dataclasses import dataclass
from typing import Literal

from powerinfer_tools.model.architectures import RopeStyle


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): pairs that turn more than ``fast`` times in ``original`` positions are not
    scaled, pairs that turn less than ``slow`` times are scaled, and the others are scaled in part."""

    original: int
    fast: float
    slow: float


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the first ``dim`` values of a head are turned by pairs, p · base^(-2i/dim) / scale
    for position p and pair i, or as ``yarn`` says. ``style`` says which values make a pair; ``factored``: a
    table of divisors that the model may have divides the angles, too. Cosines and sines are times
    ``magnitude``. ``original`` is the longest context for which the short one of two tables holds."""

    style: RopeStyle
    dim: int
    base: float
    scale: float = 1.0
    factored: bool = True
    yarn: Yarn | None = None
    magnitude: float = 1.0
    original: int = 0


@dataclass(frozen=True)
class PositionScale:
    """Queries are times 1 + scale · ln(⌊(position + offset) / length⌋ + 1)."""

    scale: float
    length: int
    offset: int


#: The token mixer of a layer: attention, a recurrent block, "both" in parallel, or "none".
Mixer = Literal["attention", "recurrent", "both", "none"]


@dataclass(frozen=True)
class RecurrentSizes:
    """Sizes of recurrent layers: ``length`` of the convolution, ``inner`` width, values of ``state`` per
    channel, ``heads`` (of a selective scan: the rank of its steps), ``groups`` that share what enters.
    ``bound``: the least logarithm of a decay (0: there is no such bound)."""

    length: int
    inner: int
    state: int
    heads: int
    groups: int
    bound: float = 0.0


@dataclass(frozen=True)
class LatentSizes:
    """Multi-head latent attention (arXiv 2405.04434): ``rank`` of keys and values together, ``query_rank``
    (0: queries have full rank), ``plain`` values of a head without and ``rotary`` with positions, and
    ``value`` values of a head's result. ``absorbed``: the vector of low rank is kept, not each head's
    keys and values."""

    rank: int
    query_rank: int
    plain: int
    rotary: int
    value: int
    absorbed: bool = True


@dataclass(frozen=True)
class StreamSizes:
    """Residual streams (arXiv 2301.13310): how many, and which of them layers read."""

    count: int
    active: int


@dataclass(frozen=True)
class LayerFacts:
    """The properties that differ between layers: ``window`` is the number of positions that attention looks
    back (0: all of them), ``rope`` None without rotary positions; the token mixer; the kind of FFN; heads of
    queries and of keys, their values, and neurons of a dense FFN; how queries grow with their position.
    ``cache``: the layer whose keys and values it reads (None: its own). ``deviations``: how many standard
    deviations above the mean a gate must be (None: any counts). ``limits``: of gates in routed experts, and
    in other FFNs (0: none)."""

    window: int
    rope: Rope | None
    mixer: Mixer = "attention"
    ffn: Literal["dense", "experts", "none"] = "dense"
    heads: int = 0
    kv_heads: int = 0
    neurons: int = 0
    position_scale: PositionScale | None = None
    head_dim: int = 0
    value_dim: int = 0
    cache: int | None = None
    deviations: float | None = None
    limits: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Routing:
    """Experts of a layer: their number, and the number that a token takes; ``normalized``: the weights of the
    chosen experts are divided by their sum. ``shared_neurons``: the neurons of the expert that every token
    takes (0: there is none).

    ``kind``: weights are the softmax or the sigmoids of scores, times ``scale``. Experts are chosen from the
    ``groups_used`` best of ``groups`` groups. ``weigh_input``: each expert reads weight · x, and its output
    is not weighted again.
    """

    experts: int
    used: int
    normalized: bool
    shared_neurons: int
    kind: Literal["softmax", "sigmoid"] = "softmax"
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    weigh_input: bool = False

    @property
    def plain(self) -> bool:
        """Whether the router is of the kind that all stages know: a softmax, and nothing else."""
        return self == Routing(self.experts, self.used, self.normalized, self.shared_neurons)

    @property
    def share(self) -> float:
        """The share of the routed experts that a token takes."""
        return self.used / self.experts


@dataclass(frozen=True)
class Hyperparameters:
    """Sizes and constants of one model; widths are counted in values. ``neurons`` is the number of neurons of
    a layer's FFN, or of one expert if there is ``routing``.

    ``facts`` has what differs between layers. ``parallel``: attention and FFN read the same residual stream;
    what they add is times ``residual_scale``. ``qkv_limit`` clamps queries, keys and values, ``alibi`` is the
    largest bias of scores (0: none). ``*_softcap`` are 0 when unused. ``activation_cut`` is what a gate must
    be above with fatrelu, and the largest gate with swiglu_oai (0 with others). ``dense_neurons`` are those
    of FFNs in layers without experts, where others have some. ``chunked``: windows are chunks of positions.
    ``further_layers`` of the file predict further tokens, and are left out. ``input_size``: values of each
    layer's own input (0: there is none). ``clamp``: the activation of layers whose gates are limited. Where
    heads and neurons differ
    between layers, those here are the most, and ``uneven`` names what differs."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    vocabulary: int
    trained_context: int
    norm_eps: float
    facts: tuple[LayerFacts, ...]
    parallel: bool
    attention_scale: float
    attention_softcap: float
    qkv_limit: float
    alibi: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float
    embedding_scale: float
    activation: str
    activation_cut: float
    xielu: tuple[tuple[float, float, float, float], ...]
    value_scale: float
    routing: Routing | None
    recurrent: RecurrentSizes | None
    dense_neurons: int
    value_dim: int
    latent: LatentSizes | None
    chunked: bool
    post_norm_eps: float
    further_layers: int
    input_size: int = 0
    streams: StreamSizes | None = None
    clamp: str = ""

    @property
    def limited(self) -> bool:
        """Whether gates of some layer are limited."""
        return any(any(facts.limits) for facts in self.facts)

    @property
    def uneven(self) -> str | None:
        """The property that differs between layers, though it is usually the same in all."""
        attending = [facts for facts in self.facts if facts.mixer in ("attention", "both")]
        if len({(facts.heads, facts.kv_heads) for facts in attending}) > 1:
            return "attention heads that differ between layers"
        if len({(facts.head_dim, facts.value_dim) for facts in attending}) > 1:
            return "attention heads whose width differs between layers"
        return "FFNs of sizes that differ between layers" if self.uneven_ffns else None

    @property
    def uneven_ffns(self) -> bool:
        """Whether FFNs have more or fewer neurons than others."""
        return len({facts.neurons for facts in self.facts if facts.ffn == "dense"}) > 1

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads together."""
        return self.kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Width of all value heads together."""
        return self.kv_heads * self.value_dim

    @property
    def rope_dim(self) -> int:
        """Values of a head that are turned, in the layers that turn the most; 0 without rotary positions."""
        return max((facts.rope.dim for facts in self.facts if facts.rope is not None), default=0)

    @property
    def window(self) -> int:
        """The widest window of a layer; 0 where none has one."""
        return max(facts.window for facts in self.facts)

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Which layers attend to a window alone."""
        return tuple(facts.window > 0 for facts in self.facts)
