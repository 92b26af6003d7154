"""Hyper-parameters of a model, read from GGUF metadata and checked before anything is allocated from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from powerinfer_formats.model_source import ModelSource
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import ACTIVATIONS, ArchitectureSpec, RopeStyle
from powerinfer_tools.model.keys import MISSING, Keys
from powerinfer_tools.model.original import is_original, original_activation

#: Of Grok 1, whose files may lack it.
_GROK_SCALE = 128**-0.5
#: Keys of a part that is not computed, as long as it would choose everything.
_INDEXER_SIZES = ("head_count", "key_length", "types", "local_blocks")
#: Positions of a chunk of Llama 4, and of a step of its queries' scale.
_CHUNK = 8192


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): pairs that turn more than ``fast`` times in ``original`` positions are not
    scaled, those that turn less than ``slow`` times are, and the others in part."""

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


#: What mixes the tokens of a layer: "both" beside each other, or nothing.
Mixer = Literal["attention", "recurrent", "both", "none"]


@dataclass(frozen=True)
class RecurrentSizes:
    """Sizes of recurrent layers: ``length`` of the convolution, ``inner`` width, values of ``state`` per
    channel, ``heads`` (of a selective scan: the rank of its steps), ``groups`` that share what enters."""

    length: int
    inner: int
    state: int
    heads: int
    groups: int


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
class LayerFacts:
    """In what a layer differs from others: ``window`` is how many positions attention looks back (0: all of
    them), ``rope`` None without rotary positions; what mixes tokens; what its FFN is; heads of queries and of
    keys, and neurons of a dense FFN; how queries grow with their position."""

    window: int
    rope: Rope | None
    mixer: Mixer = "attention"
    ffn: Literal["dense", "experts", "none"] = "dense"
    heads: int = 0
    kv_heads: int = 0
    neurons: int = 0
    position_scale: PositionScale | None = None


@dataclass(frozen=True)
class Routing:
    """Experts of a layer: how many there are and how many a token takes; ``normalized``: the weights of those
    are divided by their sum. ``shared_neurons``: of the expert that every token takes (0: there is none).

    ``kind``: weights are the softmax or the sigmoids of scores; times ``scale``. Experts are chosen among
    those of the ``groups_used`` best of ``groups``. ``weigh_input``: each expert reads weight · x, and its
    output counts as it is.
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
        """Share of the experts that a router chooses from which a token takes."""
        return self.used / self.experts


@dataclass(frozen=True)
class Hyperparameters:
    """Sizes and constants of one model; widths are counted in values. ``neurons`` are those of a layer's FFN,
    or of one expert where there is ``routing``.

    ``facts`` has what differs between layers. ``parallel``: attention and FFN read the same residual stream;
    what they add is times ``residual_scale``. ``qkv_limit`` clamps queries, keys and values, ``alibi`` is the
    largest bias of scores (0: none). ``*_softcap`` are 0 when unused. ``activation_cut`` is what a gate must
    be above with fatrelu, and the largest gate with swiglu_oai (0 with others). ``dense_neurons`` are those
    of FFNs in layers without experts, where others have some. ``chunked``: windows are chunks of positions.
    ``further_layers`` of the file predict further tokens, and are left out. Where heads and neurons differ
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

    @property
    def uneven(self) -> str | None:
        """What differs between layers and is usually the same in all."""
        attending = [facts for facts in self.facts if facts.mixer in ("attention", "both")]
        if len({(facts.heads, facts.kv_heads) for facts in attending}) > 1:
            return "attention heads that differ between layers"
        dense = {facts.neurons for facts in self.facts if facts.ffn == "dense"}
        return "FFNs of sizes that differ between layers" if len(dense) > 1 else None

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


def read_hyperparameters(
    gguf: ModelSource, spec: ArchitectureSpec, vocabulary: int, positions: int
) -> Hyperparameters:
    """Read the hyper-parameters of ``spec``'s family.

    ``vocabulary`` is the number of rows of the embedding, ``positions`` that of the table of positions (0:
    there is none). Raises ModelError for values that make no model,
    and FormatError (from the reader) for missing keys or keys of the wrong type.
    """
    keys = Keys(gguf, spec.name)
    layers, width = _layers(keys), keys.integer("embedding_length", high=1 << 20)
    routing = _routing(keys, spec, width)
    mixers = _mixers(keys, spec, layers)
    heads_of = _heads(keys, spec, mixers)
    heads, kv_heads = (max(pair[part] for pair in heads_of) for part in (0, 1))
    head_dim = _head_dim(keys, spec, width, heads)
    latent = _latent_sizes(keys) if spec.latent else None
    value_dim = _value_dim(keys, spec, head_dim)
    if latent is not None and latent.absorbed:
        kv_heads, head_dim, value_dim = 1, latent.rank + latent.rotary, latent.rank
    elif latent is not None:
        kv_heads, head_dim, value_dim = heads, latent.plain + latent.rotary, latent.value
    heads_of = [(count, kv_heads if latent else shared) for count, shared in heads_of]
    hyper = Hyperparameters(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        neurons=_neurons(keys, spec, routing, layers),
        vocabulary=vocabulary,
        trained_context=_trained_context(keys, spec, positions),
        norm_eps=_norm_eps(keys, spec),
        facts=_facts(keys, spec, mixers, head_dim, heads_of, routed=routing is not None),
        parallel=_parallel(keys, spec),
        attention_scale=_attention_scale(keys, spec, layers, width, heads, head_dim)
        if latent is None
        else _latent_scale(keys, latent),
        attention_softcap=keys.real("attn_logit_softcapping", 0.0),
        qkv_limit=keys.real("attention.clamp_kqv", 0.0) if spec.clamped_qkv else 0.0,
        alibi=_alibi(keys, spec, layers),
        residual_scale=_residual_scale(keys, spec, layers),
        logit_scale=_logit_scale(keys, spec, width),
        logit_softcap=keys.real("final_logit_softcapping", 0.0),
        embedding_scale=_embedding_scale(keys, spec, width),
        activation=(activation := _activation(gguf, spec)),
        activation_cut=_activation_cut(gguf, activation),
        xielu=_xielu(keys, layers) if activation == "xielu" else (),
        value_scale=keys.factor("attention.value_scale") if spec.value_scale else 1.0,
        routing=routing,
        recurrent=_recurrent_sizes(keys, spec, width, layers),
        value_dim=value_dim,
        latent=latent,
        dense_neurons=max(_dense_neurons(keys, layers, 1)) if routing is not None else 0,
        chunked=spec.chunked,
        further_layers=keys.blocks - layers,
        post_norm_eps=spec.post_norm_eps or _norm_eps(keys, spec),
    )
    keys.refuse_unread()
    return hyper


def _parallel(keys: Keys, spec: ArchitectureSpec) -> bool:
    if spec.parallel == "by key":
        return keys.flag("use_parallel_residual", default=True)
    if spec.parallel == "without FFN norm":
        return f"blk.0.{spec.ffn_norm}.weight" not in keys.gguf.tensors
    return spec.parallel == "always"


def _alibi(keys: Keys, spec: ArchitectureSpec, layers: int) -> float:
    if not spec.alibi or layers in spec.rotary_depths:
        return 0.0
    return keys.real("attention.max_alibi_bias", 0.0 if spec.rotary_depths else 8.0, high=1e3)


def _residual_scale(keys: Keys, spec: ArchitectureSpec, layers: int) -> float:
    if not spec.residual_scale:
        return 1.0
    if spec.default_scales is not None and keys.raw("residual_scale") is None:
        return spec.default_scales[1] / math.sqrt(layers)
    return keys.factor("residual_scale")


def _logit_scale(keys: Keys, spec: ArchitectureSpec, width: int) -> float:
    if spec.logit_scale == "none":
        return 1.0
    if spec.default_scales is not None and keys.raw("logit_scale") is None:
        return spec.default_scales[2] / width
    scale = keys.factor("logit_scale")
    return scale if spec.logit_scale == "times" else 1.0 / scale


def _embedding_scale(keys: Keys, spec: ArchitectureSpec, width: int) -> float:
    if spec.default_scales is not None and keys.raw("embedding_scale") is None:
        return spec.default_scales[0]
    if spec.embedding_key:
        return keys.factor("embedding_scale")
    return math.sqrt(width) if spec.scaled_embeddings else 1.0


def _layers(keys: Keys) -> int:
    """Those that compute the next token: files count layers for further ones, which come last, among them."""
    keys.blocks = keys.integer("block_count", high=4096)
    return keys.blocks - keys.integer("nextn_predict_layers", 0, low=0, high=keys.blocks - 1)


def _mixers(keys: Keys, spec: ArchitectureSpec, layers: int) -> tuple[Mixer, ...]:
    """What mixes tokens in each layer: the file lists recurrent layers, gives them no key heads, or leaves
    attention to every p-th layer."""
    only: Mixer = "attention"
    if spec.recurrent == "none":
        return _attending(keys, layers)
    listed = keys.raw("attention.recurrent_layers")
    if spec.recurrent_layers != "listed":
        only = "recurrent" if spec.recurrent_layers == "all" else "both"
        return (only,) * layers
    key_heads = keys.raw("attention.head_count_kv")
    period = keys.integer("full_attention_interval", 4, low=1, high=4096)
    if isinstance(listed, np.ndarray):
        recurs = [bool(one) for one in keys.integers("attention.recurrent_layers", layers, low=0, high=1)]
    elif isinstance(key_heads, np.ndarray):
        recurs = [one == 0 for one in keys.integers("attention.head_count_kv", layers, low=0, high=4096)]
    else:
        recurs = [(index + 1) % period != 0 for index in range(layers)]
    feeds, mixers = _feeds(keys, spec, layers), list[Mixer]()
    for recurrent, feed in zip(recurs, feeds, strict=True):
        if spec.single_blocks and feed:
            mixers.append("none")
        else:
            mixers.append("recurrent" if recurrent else "attention")
    return tuple(mixers)


def _attending(keys: Keys, layers: int) -> tuple[Mixer, ...]:
    """Of families without recurrent blocks: a layer may have no heads, and no attention."""
    only: Mixer = "attention"
    if not isinstance(keys.raw("attention.head_count"), np.ndarray):
        return (only,) * layers
    heads = keys.integers("attention.head_count", layers, low=0, high=4096)
    mixers: list[Mixer] = ["attention" if count else "none" for count in heads]
    return tuple(mixers)


def _feeds(keys: Keys, spec: ArchitectureSpec, layers: int) -> list[bool]:
    """Which layers have an FFN: those whose size is not 0."""
    if spec.recurrent_layers == "all":
        return [False] * layers
    return [size > 0 for size in _dense_neurons(keys, layers, 1)]


def _dense_neurons(keys: Keys, layers: int, default: Any = MISSING) -> list[int]:
    return keys.integers("feed_forward_length", layers, default, low=0, high=1 << 22)


def _heads(keys: Keys, spec: ArchitectureSpec, mixers: Sequence[Mixer]) -> list[tuple[int, int]]:
    """Heads of queries and of keys, layer by layer: those of layers without attention are the most of other
    layers. A family without any has one of two values, which nothing is computed with."""
    layers = len(mixers)
    if spec.recurrent_layers == "all":
        keys.ignore("attention.head_count", "attention.head_count_kv")
        return [(1, 1)] * layers
    heads = keys.integers("attention.head_count", layers, low=0, high=4096)
    same = heads if isinstance(keys.raw("attention.head_count"), np.ndarray) else heads[0]
    shared = keys.integers("attention.head_count_kv", layers, same, low=0, high=4096)
    attends = [index for index, mixer in enumerate(mixers) if mixer in ("attention", "both")]
    for index in attends:
        if not heads[index] or not shared[index] or heads[index] % shared[index]:
            keys.refuse(
                f"{heads[index]} attention heads are not a multiple of {shared[index]} key heads (layer "
                f"{index})"
            )
    most = max((heads[index] for index in attends), default=1), max((shared[i] for i in attends), default=1)
    return [(heads[index], shared[index]) if index in attends else most for index in range(layers)]


def _recurrent_sizes(keys: Keys, spec: ArchitectureSpec, width: int, layers: int) -> RecurrentSizes | None:
    kind = spec.recurrent
    if kind == "none":
        return None
    if kind == "short convolution":
        return RecurrentSizes(keys.integer("shortconv.l_cache", low=2, high=64), width, 0, 1, 1)
    if kind == "channel delta net":
        state = keys.integer("kda.head_dim", high=1 << 12)
        heads = max(keys.integers("attention.head_count", layers, low=0, high=4096)) or 1
        length = keys.integer("ssm.conv_kernel", low=2, high=64)
        return RecurrentSizes(length, heads * state, state, heads, heads)
    inner = keys.integer("ssm.inner_size", high=1 << 20)
    sizes = RecurrentSizes(
        length=keys.integer("ssm.conv_kernel", low=2, high=64),
        inner=inner,
        state=keys.integer("ssm.state_size", high=1 << 12),
        heads=keys.integer("ssm.time_step_rank", high=inner),
        groups=1 if kind == "selective scan" else keys.integer("ssm.group_count", 1, high=inner),
    )
    if kind == "selective scan":
        keys.ignore("ssm.group_count")
    elif inner % sizes.heads or sizes.heads % sizes.groups:
        raise ModelError(
            f"{keys.file}: {sizes.heads} recurrent heads in {sizes.groups} groups do not divide {inner} "
            "values"
        )
    return sizes


def _facts(
    keys: Keys,
    spec: ArchitectureSpec,
    mixers: Sequence[Mixer],
    head_dim: int,
    heads: Sequence[tuple[int, int]],
    *,
    routed: bool,
) -> tuple[LayerFacts, ...]:
    layers = len(mixers)
    feeds, neurons = _feeds(keys, spec, layers), _dense_neurons(keys, layers, 1)
    keys.ignore("interleave_moe_layer_step")
    first = keys.integer("leading_dense_block_count", 0, low=0, high=layers)
    windows = _windows(keys, spec, layers)
    wide, local = _ropes(keys, spec, head_dim, local=any(windows))
    windowed = spec.rope_in_windows_alone and any(windows)
    scale = _position_scale(keys, spec, windowed=any(windows))
    facts = []
    for index, (window, rotated) in enumerate(zip(windows, _rotated(keys, spec, layers), strict=True)):
        turned = rotated and (window or not windowed or (spec.rope_in_dense and index < first))
        rope = (local if window else wide) if turned else None
        # A layer has experts where it has a router: keys that say it are not read alike by all families.
        experts = routed and f"blk.{index}.ffn_gate_inp.weight" in keys.gguf.tensors
        facts.append(
            LayerFacts(
                window=window,
                rope=rope,
                mixer=mixers[index],
                ffn="experts" if experts else "dense" if feeds[index] else "none",
                heads=heads[index][0],
                kv_heads=heads[index][1],
                neurons=neurons[index] // spec.neurons_divisor,
                position_scale=None if spec.temperature == "without positions" and rope else scale,
            )
        )
    return tuple(facts)


def _position_scale(keys: Keys, spec: ArchitectureSpec, *, windowed: bool) -> PositionScale | None:
    """Llama 4's scale, length and offset are the same in all its models; those of others are in their
    files."""
    if spec.temperature == "none":
        return None
    if spec.temperature == "without positions":
        scale = keys.real("attention.temperature_scale", 0.1)
        return PositionScale(scale, _CHUNK, 1) if windowed else None
    scale = keys.real("attention.temperature_scale", 0.0)
    original = keys.integer("rope.scaling.original_context_length", 0, low=0, high=1 << 31)
    length = keys.integer("attention.temperature_length", 0, low=0, high=1 << 31) or original
    if scale and not length:
        keys.refuse("attention.temperature_scale has no length that it belongs to")
    return PositionScale(scale, length, 0) if scale else None


def _rotated(keys: Keys, spec: ArchitectureSpec, layers: int) -> Sequence[bool]:
    """Which layers have rotary positions: where the file has no value for each, the family says it."""
    if spec.rotary_depths and layers not in spec.rotary_depths:
        return (False,) * layers
    if isinstance(keys.raw("attention.rope_pattern"), np.ndarray):
        return [bool(value) for value in keys.integers("attention.rope_pattern", layers, low=0, high=1)]
    switched = spec.rope_switch and not keys.flag("rope.scaling.finetuned", default=True)
    if switched or keys.integer("attention.rope_pattern", 1, low=0, high=1) == 0:
        return (False,) * layers
    period = spec.no_rope_period if not spec.chunked or any(_windows(keys, spec, layers)) else 0
    return [not period or index % period != period - 1 for index in range(layers)]


def _ropes(
    keys: Keys, spec: ArchitectureSpec, head_dim: int, *, local: bool
) -> tuple[Rope | None, Rope | None]:
    """Rotary positions of layers that attend to everything, and of those with a window."""
    sections = keys.raw("rope.dimension_sections")
    if spec.rope_style == "none":
        keys.ignore(
            "rope.dimension_count", "rope.dimension_count_swa", "rope.freq_base", "rope.freq_base_swa"
        )
        return None, None
    style = spec.rope_style
    if isinstance(sections, np.ndarray) and sections.any() and style == "norm" and not spec.plain_sections:
        if not spec.halves_with_sections:
            raise ModelError(f"{keys.name('rope.dimension_sections')} is not supported for this architecture")
        style = "neox"
    dim = _rope_dim(keys, "rope.dimension_count", head_dim, head_dim)
    base = keys.real("rope.freq_base", spec.default_rope_base, low=1.0)
    if alpha := keys.real("rope.scaling.alpha", 0.0, high=1e6) if spec.rope_alpha else 0.0:
        base *= alpha ** (head_dim / (head_dim - 2))  # NTK-aware scaling
    wide = _scaled(keys, Rope(style, dim, base))
    if spec.latent and wide.yarn is not None:
        wide = replace(wide, magnitude=1.0)  # that of the scores is
    local_dim = _rope_dim(keys, "rope.dimension_count_swa", head_dim, dim)
    local_base = keys.real("rope.freq_base_swa", spec.local_rope_base or base, low=1.0)
    if spec.plain_local_rope:
        return wide, Rope(style, local_dim, local_base, factored=False)
    if not local:
        return wide, wide
    if not spec.local_rope_base:
        return wide, replace(wide, dim=local_dim, base=local_base)
    return wide, Rope(style, local_dim, local_base, factored=False)


def _routing(keys: Keys, spec: ArchitectureSpec, width: int) -> Routing | None:
    experts = keys.integer("expert_count", 0, low=0, high=4096)
    if experts and not any(name.endswith(".ffn_gate_inp.weight") for name in keys.gguf.tensors):
        experts = 0  # one writer counts experts in files that have no router
        keys.ignore("expert_used_count")
    if not experts:
        keys.ignore("router_logit_softcapping", "leading_dense_block_count")
        return None
    if not spec.routed:
        raise ModelError(
            f"{keys.file}: mixtures of experts of the architecture {spec.name} are not supported"
        )
    groups = keys.integer("expert_group_count", 1, low=0, high=experts) or 1
    groups_used = keys.integer("expert_group_used_count", groups, low=0, high=groups) or groups
    used = keys.integer("expert_used_count", high=experts)
    if experts % groups or experts // groups * groups_used < used:
        raise ModelError(
            f"{keys.file}: {used} experts cannot be chosen in {groups_used} of {groups} groups of {experts}"
        )
    return Routing(
        experts=experts,
        used=used,
        normalized=keys.flag("expert_weights_norm", default=spec.expert_weights_norm),
        shared_neurons=_shared_neurons(keys, spec, width),
        kind=_router_kind(keys, spec),
        scale=keys.factor("expert_weights_scale"),
        groups=groups,
        groups_used=groups_used,
        weigh_input=spec.weigh_input,
    )


def _shared_neurons(keys: Keys, spec: ArchitectureSpec, width: int) -> int:
    """Of the expert that every token takes: files say it, or how many routed ones it is as large as, or it is
    a dense FFN beside them."""
    if spec.dense_beside == "square":
        return width
    if spec.dense_beside == "optional":
        there = "blk.0.ffn_up.weight" in keys.gguf.tensors
        return keys.integer("feed_forward_length", high=1 << 22) if there else 0
    if not spec.shared_expert:
        return 0
    count = keys.integer("expert_shared_count", spec.default_shared_count, low=0, high=1 << 10)
    given = keys.integer("expert_shared_feed_forward_length", 0, low=0, high=1 << 22)
    if given or not count:
        return given
    return count * keys.integer("expert_feed_forward_length", high=1 << 22)


def _router_kind(keys: Keys, spec: ArchitectureSpec) -> Literal["softmax", "sigmoid"]:
    """llama.cpp's numbers; 0 and a missing one mean softmax, and 3 the softmax over the chosen experts."""
    if spec.router == "softmax" or spec.router == "sigmoid":
        keys.ignore("expert_gating_func")
        return spec.router
    number = keys.integer("expert_gating_func", 0, low=0, high=4)
    if number > 2:
        raise ModelError(f"{keys.name('expert_gating_func')} is {number}, which is not supported")
    return "sigmoid" if number == 2 or (number == 0 and spec.router != "file") else "softmax"


def _neurons(keys: Keys, spec: ArchitectureSpec, routing: Routing | None, layers: int) -> int:
    """Mixtral's files say the size of an expert as that of an FFN."""
    if spec.recurrent_layers == "all":
        keys.ignore("feed_forward_length")
        return 1  # of no FFN at all
    if routing is not None:
        neurons = keys.integer("expert_feed_forward_length", 0, low=0, high=1 << 22)
        if neurons:
            keys.raw("feed_forward_length")  # that of dense layers, of which there are none
            return neurons
    neurons = max(_dense_neurons(keys, layers)) // spec.neurons_divisor
    return neurons or keys.refuse("feed_forward_length is 0")


def _trained_context(keys: Keys, spec: ArchitectureSpec, positions: int) -> int:
    context = keys.integer("context_length", high=1 << 31)
    if spec.indexed:  # up to here, attention reads everything
        chosen = keys.integer("attention.indexer.top_k", high=1 << 31)
        context = min(context, chosen * keys.integer("attention.indexer.block_size", 1, high=1 << 20))
        keys.ignore(*(f"attention.indexer.{name}" for name in _INDEXER_SIZES))
    if spec.position_offset is None:
        return context
    if positions <= spec.position_offset:
        raise ModelError(
            f"{keys.file}: a table of {positions} positions is too short; the first {spec.position_offset} "
            "rows are not used"
        )
    return min(context, positions - spec.position_offset)


def _norm_eps(keys: Keys, spec: ArchitectureSpec) -> float:
    if spec.norm == "rms":
        keys.ignore("attention.layer_norm_epsilon")  # of norms that the family has not
        default = () if spec.default_norm_eps is None else (spec.default_norm_eps,)
        return keys.real("attention.layer_norm_rms_epsilon", *default, high=1.0)
    # PowerInfer's OPT files leave it out; this is torch's default, with which OPT was made.
    return keys.real("attention.layer_norm_epsilon", 1e-5, high=1.0)


def _latent_sizes(keys: Keys) -> LatentSizes:
    """Files with one matrix for keys and values of each head give the sizes of those."""
    rotary = keys.integer("rope.dimension_count", high=1 << 10)
    absorbed = bool(keys.integer("attention.key_length_mla", 0, low=0, high=1 << 12))
    end = "_mla" if absorbed else ""
    key = keys.integer(f"attention.key_length{end}", high=1 << 12)
    if key < rotary + absorbed or rotary % 2:
        keys.refuse(f"{rotary} rotary dimensions do not fit keys of {key}")
    return LatentSizes(
        rank=keys.integer("attention.kv_lora_rank", high=1 << 12),
        query_rank=keys.integer("attention.q_lora_rank", 0, low=0, high=1 << 14),
        plain=key - rotary,
        rotary=rotary,
        value=keys.integer(f"attention.value_length{end}", high=1 << 12),
        absorbed=absorbed,
    )


def _latent_scale(keys: Keys, latent: LatentSizes) -> float:
    """1 / √(a head's keys), and with YaRN times the square of what it does to the magnitude of positions,
    which these families leave to the scores."""
    factor = keys.real("rope.scaling.factor", 0.0) or 1.0
    magnitude = 1.0 + keys.real("rope.scaling.yarn_log_multiplier", 0.0) * math.log(max(factor, 1.0))
    return magnitude * magnitude / math.sqrt(latent.plain + latent.rotary)


def _head_dim(keys: Keys, spec: ArchitectureSpec, width: int, heads: int) -> int:
    if spec.latent:
        keys.ignore(*(f"attention.{kind}_length{end}" for kind in ("key", "value") for end in ("", "_swa")))
        return 1024  # what heads of low rank are wide is known by other keys
    if spec.recurrent_layers == "all":
        keys.ignore(*(f"attention.{kind}_length{end}" for kind in ("key", "value") for end in ("", "_swa")))
        return 2
    head_dim = keys.integer("attention.key_length", 0, low=0, high=1 << 14)
    if not head_dim:
        if width % heads:
            raise ModelError(f"{keys.file}: width {width} is not a multiple of {heads} attention heads")
        head_dim = width // heads
    if keys.integer("attention.key_length_swa", head_dim, high=1 << 14) != head_dim:
        keys.refuse(f"attention.key_length_swa is not {head_dim}, as heads of other layers are wide")
    if head_dim % 2 or head_dim > 512:
        raise ModelError(f"{keys.file}: head dimension {head_dim} is not an even number up to 512")
    return head_dim


def _value_dim(keys: Keys, spec: ArchitectureSpec, head_dim: int) -> int:
    if spec.latent or spec.recurrent_layers == "all":
        return head_dim
    value_dim = keys.integer("attention.value_length", head_dim, high=512)
    if keys.integer("attention.value_length_swa", value_dim, high=1 << 14) != value_dim:
        keys.refuse(f"attention.value_length_swa is not {value_dim}, as heads of other layers are wide")
    return value_dim


def _rope_dim(keys: Keys, key: str, head_dim: int, default: int) -> int:
    rope_dim = keys.integer(key, default, low=0) or default
    if rope_dim > head_dim or rope_dim % 2:
        raise ModelError(f"{keys.file}: {rope_dim} rotary dimensions do not fit heads of {head_dim}")
    return rope_dim


def _scaled(keys: Keys, rope: Rope) -> Rope:
    """``rope`` as the file scales it. A factor without a type is linear, and one of 0 is none."""
    kind = keys.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise ModelError(
            f"{keys.file}: rotary scaling {kind!r} is not supported (supported: none, linear, yarn, longrope)"
        )
    context = keys.integer("context_length", high=1 << 31)
    original = keys.integer("rope.scaling.original_context_length", 0, low=0, high=1 << 31) or context
    rope = replace(rope, magnitude=keys.factor("rope.scaling.attn_factor"), original=original)
    if kind == "none":
        keys.ignore("rope.scaling.factor", "rope.scale_linear")
        return rope
    factor = keys.real("rope.scaling.factor", 0.0) or keys.real("rope.scale_linear", 0.0) or 1.0
    rope = replace(rope, scale=factor)
    return rope if kind != "yarn" else _yarn(keys, rope, original)


def _yarn(keys: Keys, rope: Rope, original: int) -> Rope:
    """Queries and keys both grow by 0.1 · ln(factor) + 1 (arXiv 2309.00071 eq. 15), or by what of it the
    multiplier of DeepSeek's files leaves."""
    fast = keys.real("rope.scaling.yarn_beta_fast", 32.0, low=1e-3, high=1e6)
    slow = keys.real("rope.scaling.yarn_beta_slow", 1.0, low=1e-3, high=1e6)
    growth = 0.1 * math.log(max(rope.scale, 1.0))
    rest = growth * keys.real("rope.scaling.yarn_log_multiplier", 0.0) + 1.0
    magnitude = rope.magnitude * (growth + 1.0) / rest
    return replace(rope, yarn=Yarn(original, fast, slow), magnitude=magnitude)


def _windows(keys: Keys, spec: ArchitectureSpec, layers: int) -> Sequence[int]:
    """The window of each layer, 0 for those without one: where there is one at all, the file says which
    layers have it by a value for each or by a period, else the family does."""
    pattern = keys.raw("attention.sliding_window_pattern")
    listed = isinstance(pattern, np.ndarray)
    if spec.windowed_depths and layers not in spec.windowed_depths:
        keys.ignore("attention.sliding_window")
        return (0,) * layers
    if not spec.sliding_period and not listed and not spec.sliding_everywhere:
        return (0,) * layers
    default = (_CHUNK,) if spec.chunked else () if listed else (0,)
    window = keys.integer("attention.sliding_window", *default, low=0, high=1 << 31)
    if listed:
        local = keys.integers("attention.sliding_window_pattern", layers, low=0, high=1)
        return tuple(window if one else 0 for one in local)
    if spec.sliding_everywhere:
        return (window,) * layers
    period = keys.integer("attention.sliding_window_pattern", spec.sliding_period, low=0, high=4096)
    dense = 0 if spec.dense_first else period - 1
    return tuple(window if not period or i % period != dense else 0 for i in range(layers))


def _attention_scale(
    keys: Keys, spec: ArchitectureSpec, layers: int, width: int, heads: int, head_dim: int
) -> float:
    if spec.output_scale:
        keys.ignore(
            "router_logit_softcapping", "attention.temperature_length"
        )  # no reader of files uses them
        return keys.real("attention.output_scale", _GROK_SCALE)
    given = keys.real("attention.scale", 0.0)
    if given:
        return given
    per_head = width // heads if layers == spec.wide_attention_scale_layers else head_dim
    return 1.0 / (per_head if spec.head_scale else math.sqrt(per_head))


def _activation(gguf: ModelSource, spec: ArchitectureSpec) -> str:
    if is_original(gguf):
        return original_activation(spec.name, gguf.path)
    activation = str(gguf.get("powerinfer.activation", str, spec.activation))
    if activation not in ACTIVATIONS or (activation == "xielu" and spec.activation != "xielu"):
        known = ", ".join(sorted(ACTIVATIONS))
        raise ModelError(f"{gguf.path}: powerinfer.activation {activation!r} is unknown (known: {known})")
    return activation


def _xielu(keys: Keys, layers: int) -> tuple[tuple[float, float, float, float], ...]:
    """The constants of each layer: files have what a softplus makes positive."""
    positive, negative, beta, eps = (
        keys.reals(f"xielu.{name}", layers) for name in ("alpha_p", "alpha_n", "beta", "eps")
    )
    rows = zip(positive, negative, beta, eps, strict=True)
    return tuple((_softplus(p), b + _softplus(n), b, e) for p, n, b, e in rows)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _activation_cut(gguf: ModelSource, activation: str) -> float:
    if activation == "swiglu_oai":
        return 7.0
    if activation != "fatrelu":
        return 0.0
    cut = gguf.get("powerinfer.activation_threshold", float)
    if not (math.isfinite(cut) and 0 <= cut < 1e6):
        raise ModelError(f"{gguf.path}: powerinfer.activation_threshold is {cut}; it must be from 0 to 1e6")
    return float(cut)
