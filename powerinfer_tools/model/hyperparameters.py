"""Hyper-parameters of a model, read from GGUF metadata and checked before anything is allocated from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from powerinfer_formats.model_source import ModelSource
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import ACTIVATIONS, ArchitectureSpec, RopeStyle
from powerinfer_tools.model.keys import Keys
from powerinfer_tools.model.original import is_original, original_activation


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
class LayerFacts:
    """In what a layer differs from others: ``window`` is how many positions attention looks back (0: all of
    them), ``rope`` None without rotary positions; what mixes tokens; what its FFN is."""

    window: int
    rope: Rope | None
    mixer: Literal["attention"] = "attention"
    ffn: Literal["dense", "experts"] = "dense"


@dataclass(frozen=True)
class Routing:
    """Experts of a layer: how many there are and how many a token takes; ``normalized``: the weights of those
    are divided by their sum. ``shared_neurons``: of the expert that every token takes (0: there is none)."""

    experts: int
    used: int
    normalized: bool
    shared_neurons: int

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
    largest bias of scores (0: none). ``*_softcap`` are 0 when unused. ``activation_cut`` is what a
    gate must be above with fatrelu (0 with others).
    """

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
    routing: Routing | None

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads together."""
        return self.kv_heads * self.head_dim

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
    routing = _routing(keys, spec)
    layers = keys.integer("block_count", high=4096)
    width = keys.integer("embedding_length", high=1 << 20)
    heads = keys.integer("attention.head_count", high=4096)
    kv_heads = keys.integer("attention.head_count_kv", heads, high=4096)
    if heads % kv_heads:
        raise ModelError(f"{keys.file}: {heads} attention heads are not a multiple of {kv_heads} key heads")
    head_dim = _head_dim(keys, width, heads)
    hyper = Hyperparameters(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        neurons=_neurons(keys, spec, routing),
        vocabulary=vocabulary,
        trained_context=_trained_context(keys, spec, positions),
        norm_eps=_norm_eps(keys, spec),
        facts=_facts(keys, spec, layers, head_dim, routed=routing is not None),
        parallel=_parallel(keys, spec),
        attention_scale=_attention_scale(keys, spec, layers, width, heads, head_dim),
        attention_softcap=keys.real("attn_logit_softcapping", 0.0),
        qkv_limit=keys.real("attention.clamp_kqv", 0.0) if spec.clamped_qkv else 0.0,
        alibi=_alibi(keys, spec, layers),
        residual_scale=keys.factor("residual_scale") if spec.residual_scale else 1.0,
        logit_scale=_logit_scale(keys, spec),
        logit_softcap=keys.real("final_logit_softcapping", 0.0),
        embedding_scale=_embedding_scale(keys, spec, width),
        activation=(activation := _activation(gguf, spec)),
        activation_cut=_activation_cut(gguf, activation),
        routing=routing,
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


def _logit_scale(keys: Keys, spec: ArchitectureSpec) -> float:
    if spec.logit_scale == "none":
        return 1.0
    scale = keys.factor("logit_scale")
    return scale if spec.logit_scale == "times" else 1.0 / scale


def _embedding_scale(keys: Keys, spec: ArchitectureSpec, width: int) -> float:
    if spec.embedding_key:
        return keys.factor("embedding_scale")
    return math.sqrt(width) if spec.scaled_embeddings else 1.0


def _facts(
    keys: Keys, spec: ArchitectureSpec, layers: int, head_dim: int, *, routed: bool
) -> tuple[LayerFacts, ...]:
    windows = _windows(keys, spec, layers)
    wide, local = _ropes(keys, spec, head_dim, local=any(windows))
    windowed = spec.rope_in_windows_alone and any(windows)
    return tuple(
        LayerFacts(
            window=window,
            rope=(local if window else wide) if rotated and (window or not windowed) else None,
            ffn="experts" if routed else "dense",
        )
        for window, rotated in zip(windows, _rotated(keys, spec, layers), strict=True)
    )


def _rotated(keys: Keys, spec: ArchitectureSpec, layers: int) -> Sequence[bool]:
    """Which layers have rotary positions: where the file has no value for each, the family says it."""
    if spec.rotary_depths and layers not in spec.rotary_depths:
        return (False,) * layers
    if isinstance(keys.raw("attention.rope_pattern"), np.ndarray):
        return [bool(value) for value in keys.integers("attention.rope_pattern", layers, low=0, high=1)]
    if keys.integer("attention.rope_pattern", 1, low=0, high=1) == 0:
        return (False,) * layers
    period = spec.no_rope_period
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
    if isinstance(sections, np.ndarray) and sections.any() and style == "norm":
        if not spec.halves_with_sections:
            raise ModelError(f"{keys.name('rope.dimension_sections')} is not supported for this architecture")
        style = "neox"
    dim = _rope_dim(keys, "rope.dimension_count", head_dim, head_dim)
    base = keys.real("rope.freq_base", spec.default_rope_base, low=1.0)
    wide = _scaled(keys, Rope(style, dim, base))
    local_dim = _rope_dim(keys, "rope.dimension_count_swa", head_dim, dim)
    local_base = keys.real("rope.freq_base_swa", spec.local_rope_base or base, low=1.0)
    if not local:
        return wide, wide
    if not spec.local_rope_base:
        return wide, replace(wide, dim=local_dim, base=local_base)
    return wide, Rope(style, local_dim, local_base, factored=False)


def _routing(keys: Keys, spec: ArchitectureSpec) -> Routing | None:
    experts = keys.integer("expert_count", 0, low=0, high=4096)
    if not experts:
        keys.ignore("router_logit_softcapping")
        return None
    if not spec.routed:
        raise ModelError(
            f"{keys.file}: mixtures of experts of the architecture {spec.name} are not supported"
        )
    return Routing(
        experts=experts,
        used=keys.integer("expert_used_count", high=experts),
        normalized=keys.flag("expert_weights_norm", default=spec.expert_weights_norm),
        shared_neurons=keys.integer("expert_shared_feed_forward_length", high=1 << 22)
        if spec.shared_expert
        else 0,
    )


def _neurons(keys: Keys, spec: ArchitectureSpec, routing: Routing | None) -> int:
    """Mixtral's files say the size of an expert as that of an FFN."""
    if routing is not None:
        neurons = keys.integer("expert_feed_forward_length", 0, low=0, high=1 << 22)
        if neurons:
            keys.raw("feed_forward_length")  # that of dense layers, of which there are none
            return neurons
    return keys.integer("feed_forward_length", high=1 << 22) // spec.neurons_divisor


def _trained_context(keys: Keys, spec: ArchitectureSpec, positions: int) -> int:
    context = keys.integer("context_length", high=1 << 31)
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
        default = () if spec.default_norm_eps is None else (spec.default_norm_eps,)
        return keys.real("attention.layer_norm_rms_epsilon", *default, high=1.0)
    # PowerInfer's OPT files leave it out; this is torch's default, with which OPT was made.
    return keys.real("attention.layer_norm_epsilon", 1e-5, high=1.0)


def _head_dim(keys: Keys, width: int, heads: int) -> int:
    head_dim = keys.integer("attention.key_length", 0, low=0, high=1 << 14)
    if not head_dim:
        if width % heads:
            raise ModelError(f"{keys.file}: width {width} is not a multiple of {heads} attention heads")
        head_dim = width // heads
    value_dim = keys.integer("attention.value_length", head_dim, high=1 << 14)
    for key in ("attention.key_length_swa", "attention.value_length_swa"):
        if keys.integer(key, head_dim, high=1 << 14) != head_dim:
            raise ModelError(f"{keys.name(key)} is not {head_dim}, as heads of other layers are wide")
    if value_dim != head_dim:
        raise ModelError(f"{keys.file}: key heads of {head_dim} and value heads of {value_dim} values differ")
    if head_dim % 2 or head_dim > 512:
        raise ModelError(f"{keys.file}: head dimension {head_dim} is not an even number up to 512")
    return head_dim


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
    window = keys.integer("attention.sliding_window", *(() if listed else (0,)), low=0, high=1 << 31)
    if isinstance(pattern, np.ndarray):
        if len(pattern) != layers or pattern.dtype.kind not in "iub":
            raise ModelError(
                f"{keys.name('attention.sliding_window_pattern')} has {len(pattern)} values for {layers} "
                "layers"
            )
        return tuple(window if local else 0 for local in pattern.tolist())
    if spec.sliding_everywhere:
        return (window,) * layers
    period = keys.integer("attention.sliding_window_pattern", spec.sliding_period, low=0, high=4096)
    dense = 0 if spec.dense_first else period - 1
    return tuple(window if not period or i % period != dense else 0 for i in range(layers))


def _attention_scale(
    keys: Keys, spec: ArchitectureSpec, layers: int, width: int, heads: int, head_dim: int
) -> float:
    given = keys.real("attention.scale", 0.0)
    if given:
        return given
    per_head = width // heads if layers == spec.wide_attention_scale_layers else head_dim
    return 1.0 / math.sqrt(per_head)


def _activation(gguf: ModelSource, spec: ArchitectureSpec) -> str:
    if is_original(gguf):
        return original_activation(spec.name, gguf.path)
    activation = str(gguf.get("powerinfer.activation", str, spec.activation))
    if activation not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise ModelError(f"{gguf.path}: powerinfer.activation {activation!r} is unknown (known: {known})")
    return activation


def _activation_cut(gguf: ModelSource, activation: str) -> float:
    if activation != "fatrelu":
        return 0.0
    cut = gguf.get("powerinfer.activation_threshold", float)
    if not (math.isfinite(cut) and 0 <= cut < 1e6):
        raise ModelError(f"{gguf.path}: powerinfer.activation_threshold is {cut}; it must be from 0 to 1e6")
    return float(cut)
