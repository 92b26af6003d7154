"""Hyper-parameters of a model, read from GGUF metadata and checked before anything is allocated from them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from powerinfer_formats.model_source import ModelSource
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import ACTIVATIONS, ArchitectureSpec
from powerinfer_tools.model.original import is_original, original_activation

_MISSING = object()


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

    ``window`` is 0 without sliding attention; ``local_layers[i]`` tells whether layer i is limited to it.
    ``rope_dim`` is 0 without rotary positions. ``rope_scale`` divides positions of global layers (linear
    scaling). ``*_softcap`` are 0 when unused. ``activation_cut`` is what a gate must be above with fatrelu
    (0 with others).
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
    rope_dim: int
    rope_base: float
    rope_local_base: float
    rope_scale: float
    window: int
    local_layers: tuple[bool, ...]
    attention_scale: float
    attention_softcap: float
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


class _Keys:
    """Checked access to the metadata below one architecture's prefix."""

    def __init__(self, gguf: ModelSource, prefix: str) -> None:
        self.gguf, self.prefix, self.file = gguf, prefix, str(gguf.path)

    def integer(self, key: str, default: Any = _MISSING, *, low: int = 1, high: int = 1 << 24) -> int:
        name = f"{self.prefix}.{key}"
        value = self._get(name, int, default)
        if not low <= value <= high:
            raise ModelError(f"{self.file}: {name} is {value}; it must be from {low} to {high}")
        return int(value)

    def real(self, key: str, default: Any = _MISSING, *, low: float = 0.0, high: float = 1e12) -> float:
        name = f"{self.prefix}.{key}"
        value = float(self._get(name, float, default))
        if not (math.isfinite(value) and low <= value <= high):
            raise ModelError(f"{self.file}: {name} is {value}; it must be from {low:g} to {high:g}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        return bool(self._get(f"{self.prefix}.{key}", bool, default))

    def text(self, key: str, default: str) -> str:
        return str(self._get(f"{self.prefix}.{key}", str, default))

    def _get(self, name: str, type_: type, default: Any) -> Any:
        return self.gguf.get(name, type_) if default is _MISSING else self.gguf.get(name, type_, default)


def read_hyperparameters(
    gguf: ModelSource, spec: ArchitectureSpec, vocabulary: int, positions: int
) -> Hyperparameters:
    """Read the hyper-parameters of ``spec``'s family.

    ``vocabulary`` is the number of rows of the embedding, ``positions`` that of the table of positions (0:
    there is none). Raises ModelError for values that make no model,
    and FormatError (from the reader) for missing keys or keys of the wrong type.
    """
    keys = _Keys(gguf, spec.name)
    routing = _routing(keys, spec)
    layers = keys.integer("block_count", high=4096)
    width = keys.integer("embedding_length", high=1 << 20)
    heads = keys.integer("attention.head_count", high=4096)
    kv_heads = keys.integer("attention.head_count_kv", heads, high=4096)
    if heads % kv_heads:
        raise ModelError(f"{keys.file}: {heads} attention heads are not a multiple of {kv_heads} key heads")
    head_dim = _head_dim(keys, width, heads)
    window, local_layers = _sliding(gguf, keys, spec, layers)
    rope_scale = _rope_scale(keys)
    return Hyperparameters(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        neurons=_neurons(keys, routing),
        vocabulary=vocabulary,
        trained_context=_trained_context(keys, spec, positions),
        norm_eps=_norm_eps(keys, spec),
        rope_dim=0 if spec.rope_style == "none" else _rope_dim(keys, head_dim),
        rope_base=keys.real("rope.freq_base", spec.default_rope_base, low=1.0),
        rope_local_base=keys.real("rope.freq_base_swa", spec.local_rope_base or 1.0, low=1.0),
        rope_scale=rope_scale,
        window=window,
        local_layers=local_layers,
        attention_scale=_attention_scale(keys, spec, layers, width, heads, head_dim),
        attention_softcap=keys.real("attn_logit_softcapping", 0.0),
        logit_softcap=keys.real("final_logit_softcapping", 0.0),
        embedding_scale=math.sqrt(width) if spec.scaled_embeddings else 1.0,
        activation=(activation := _activation(gguf, spec)),
        activation_cut=_activation_cut(gguf, activation),
        routing=routing,
    )


def _routing(keys: _Keys, spec: ArchitectureSpec) -> Routing | None:
    experts = keys.integer("expert_count", 0, low=0, high=4096)
    if not experts:
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


def _neurons(keys: _Keys, routing: Routing | None) -> int:
    """Mixtral's files say the size of an expert as that of an FFN."""
    if routing is not None:
        neurons = keys.integer("expert_feed_forward_length", 0, low=0, high=1 << 22)
        if neurons:
            return neurons
    return keys.integer("feed_forward_length", high=1 << 22)


def _trained_context(keys: _Keys, spec: ArchitectureSpec, positions: int) -> int:
    context = keys.integer("context_length", high=1 << 31)
    if spec.position_offset is None:
        return context
    if positions <= spec.position_offset:
        raise ModelError(
            f"{keys.file}: a table of {positions} positions is too short; the first {spec.position_offset} "
            "rows are not used"
        )
    return min(context, positions - spec.position_offset)


def _norm_eps(keys: _Keys, spec: ArchitectureSpec) -> float:
    if spec.norm == "rms":
        return keys.real("attention.layer_norm_rms_epsilon", high=1.0)
    # PowerInfer's OPT files leave it out; this is torch's default, with which OPT was made.
    return keys.real("attention.layer_norm_epsilon", 1e-5, high=1.0)


def _head_dim(keys: _Keys, width: int, heads: int) -> int:
    head_dim = keys.integer("attention.key_length", 0, low=0, high=1 << 14)
    if not head_dim:
        if width % heads:
            raise ModelError(f"{keys.file}: width {width} is not a multiple of {heads} attention heads")
        head_dim = width // heads
    value_dim = keys.integer("attention.value_length", head_dim, high=1 << 14)
    if value_dim != head_dim:
        raise ModelError(f"{keys.file}: key heads of {head_dim} and value heads of {value_dim} values differ")
    if head_dim % 2 or head_dim > 512:
        raise ModelError(f"{keys.file}: head dimension {head_dim} is not an even number up to 512")
    return head_dim


def _rope_dim(keys: _Keys, head_dim: int) -> int:
    rope_dim = keys.integer("rope.dimension_count", head_dim, low=2)
    if rope_dim > head_dim or rope_dim % 2:
        raise ModelError(f"{keys.file}: {rope_dim} rotary dimensions do not fit heads of {head_dim}")
    return rope_dim


def _rope_scale(keys: _Keys) -> float:
    kind = keys.text("rope.scaling.type", "none")
    if kind == "none":
        return 1.0
    if kind != "linear":
        raise ModelError(f"{keys.file}: rotary scaling {kind!r} is not supported (supported: none, linear)")
    return keys.real("rope.scaling.factor", low=1e-6)


def _sliding(
    gguf: ModelSource, keys: _Keys, spec: ArchitectureSpec, layers: int
) -> tuple[int, tuple[bool, ...]]:
    """The window and which layers have it: as a list of truth values in the file says, else by the family."""
    key = f"{spec.name}.attention.sliding_window_pattern"
    pattern = gguf.metadata.get(key)
    if isinstance(pattern, np.ndarray) and pattern.dtype == np.bool_:
        if len(pattern) != layers:
            raise ModelError(f"{keys.file}: {key} has {len(pattern)} values for {layers} layers")
        return keys.integer("attention.sliding_window", high=1 << 31), tuple(pattern.tolist())
    if not spec.sliding_period:
        return 0, (False,) * layers
    window = keys.integer("attention.sliding_window", 0, low=0, high=1 << 31)
    period = spec.sliding_period
    local = tuple(bool(window) and i % period != period - 1 for i in range(layers))
    return window, local


def _attention_scale(
    keys: _Keys, spec: ArchitectureSpec, layers: int, width: int, heads: int, head_dim: int
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
