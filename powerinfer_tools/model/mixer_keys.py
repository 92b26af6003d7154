"""Keys of the token mixer of each layer: attention, heads, recurrent and latent sizes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.hyperparameter_types import LatentSizes, Mixer, RecurrentSizes, StreamSizes
from powerinfer_tools.model.keys import MISSING, Keys

#: Of Grok 1, whose files may lack it.
_GROK_SCALE = 128**-0.5
#: Ranks that RWKV-7's files say, and their tensors show.
_LOW_RANKS = ("decay", "iclr", "value_residual_mix", "gate")
#: Above it are the largest 5 % of values that are normally distributed (Gemma 3n).
_TOP_DEVIATIONS = 1.6448533535003662


def read_layers(keys: Keys) -> int:
    """The layers that compute the next token. Files also count layers for further tokens, which come last."""
    keys.blocks = keys.integer("block_count", high=4096)
    return keys.blocks - keys.integer("nextn_predict_layers", 0, low=0, high=keys.blocks - 1)


def read_mixers(keys: Keys, spec: ArchitectureSpec, layers: int) -> tuple[Mixer, ...]:
    """The token mixer of each layer: the file lists recurrent layers, gives them no key heads, or has
    attention in every p-th layer only."""
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
    feeds, mixers = read_feeds(keys, spec, layers), list[Mixer]()
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


def read_feeds(keys: Keys, spec: ArchitectureSpec, layers: int) -> list[bool]:
    """Which layers have an FFN: those whose size is not 0."""
    if spec.recurrent_layers == "all" and spec.single_blocks:
        return [False] * layers
    return [size > 0 for size in read_dense_neurons(keys, layers, 1)]


def read_dense_neurons(keys: Keys, layers: int, default: Any = MISSING) -> list[int]:
    """Neurons of the dense FFN of each layer; 0 where there is none. Raises ModelError."""
    return keys.integers("feed_forward_length", layers, default, low=0, high=1 << 22)


def read_heads(keys: Keys, spec: ArchitectureSpec, mixers: Sequence[Mixer]) -> list[tuple[int, int]]:
    """Heads of queries and of keys, layer by layer: those of layers without attention are the most of other
    layers. A family without any has one of two values, which nothing is computed with."""
    layers = len(mixers)
    if spec.recurrent_layers == "all":
        keys.ignore("attention.head_count", "attention.head_count_kv")
        return [(1, 1)] * layers
    heads = keys.integers("attention.head_count", layers, low=0, high=4096)
    shared = heads
    if keys.raw("attention.head_count_kv") is not None:
        shared = keys.integers("attention.head_count_kv", layers, low=0, high=4096)
    attends = [index for index, mixer in enumerate(mixers) if mixer in ("attention", "both")]
    for index in attends:
        if not heads[index] or not shared[index] or heads[index] % shared[index]:
            keys.refuse(
                f"{heads[index]} attention heads are not a multiple of {shared[index]} key heads (layer "
                f"{index})"
            )
    most = max((heads[index] for index in attends), default=1), max((shared[i] for i in attends), default=1)
    return [(heads[index], shared[index]) if index in attends else most for index in range(layers)]


def read_recurrent_sizes(
    keys: Keys, spec: ArchitectureSpec, width: int, layers: int
) -> RecurrentSizes | None:
    """Sizes of the recurrent blocks; None without any. Raises ModelError."""
    kind = spec.recurrent
    if kind == "none":
        return None
    if kind == "short convolution":
        return RecurrentSizes(keys.integer("shortconv.l_cache", low=2, high=64), width, 0, 1, 1)
    if kind == "channel delta net":
        state = keys.integer("kda.head_dim", high=1 << 12)
        heads = max(keys.integers("attention.head_count", layers, low=0, high=4096)) or 1
        length = keys.integer("ssm.conv_kernel", low=2, high=64)
        return RecurrentSizes(length, heads * state, state, heads, heads, _decay_bound(keys, spec))
    if kind == "time mixing":
        size = keys.integer("wkv.head_size", high=1 << 10)
        if width % size:
            keys.refuse(f"heads of {size} values do not divide a width of {width}")
        keys.ignore(*(f"attention.{name}_lora_rank" for name in _LOW_RANKS))
        return RecurrentSizes(2, width, size, width // size, width // size)
    inner = keys.integer("ssm.inner_size", high=1 << 20)
    sizes = RecurrentSizes(
        length=keys.integer("ssm.conv_kernel", low=2, high=64),
        inner=inner,
        state=keys.integer("ssm.state_size", high=1 << 12),
        heads=keys.integer("ssm.time_step_rank", high=inner),
        groups=1
        if kind in ("selective scan", "head scan")
        else keys.integer("ssm.group_count", 1, high=inner),
    )
    if kind in ("selective scan", "head scan"):
        keys.ignore("ssm.group_count")
    elif inner % sizes.heads or sizes.heads % sizes.groups:
        raise ModelError(
            f"{keys.file}: {sizes.heads} recurrent heads in {sizes.groups} groups do not divide {inner} "
            "values"
        )
    return sizes


def _decay_bound(keys: Keys, spec: ArchitectureSpec) -> float:
    """0 without one. Raises ModelError."""
    if not spec.bounded_decay:
        return 0.0
    if not keys.flag("kda.safe_gate", default=True):
        keys.refuse("kda.safe_gate is off, which is not supported")
    return keys.real("kda.gate_lower_bound", low=-1e3, high=-1e-3)


def read_latent_sizes(keys: Keys) -> LatentSizes:
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


def read_latent_scale(keys: Keys, latent: LatentSizes, *, rotary: bool) -> float:
    """1 / √(values of a head's keys); with YaRN, times the square of its factor for the magnitude of
    positions, which these families apply to the scores, where there are ``rotary`` ones."""
    factor = keys.real("rope.scaling.factor", 0.0) or 1.0
    magnitude = 1.0 + keys.real("rope.scaling.yarn_log_multiplier", 0.0) * math.log(max(factor, 1.0))
    attn_factor = keys.factor("rope.scaling.attn_factor")
    magnitude *= attn_factor if rotary else 1.0
    return magnitude * magnitude / math.sqrt(latent.plain + latent.rotary)


@dataclass(frozen=True)
class HeadSizes:
    """Values of a key (and of a query), and of a value, of one head: of layers that attend to everything, and
    of those with a window."""

    key: int
    value: int
    local_key: int
    local_value: int


def read_head_sizes(keys: Keys, spec: ArchitectureSpec, width: int, heads: int) -> HeadSizes:
    """How wide heads are. Raises ModelError."""
    if spec.latent or spec.recurrent_layers == "all":
        keys.ignore(*(f"attention.{kind}_length{end}" for kind in ("key", "value") for end in ("", "_swa")))
        dim = 1024 if spec.latent else 2  # what heads of low rank are wide is known by other keys
        return HeadSizes(dim, dim, dim, dim)
    key = keys.integer("attention.key_length", 0, low=0, high=1 << 14)
    if not key:
        if width % heads:
            raise ModelError(f"{keys.file}: width {width} is not a multiple of {heads} attention heads")
        key = width // heads
    local_key = keys.integer("attention.key_length_swa", key, high=1 << 14)
    for dim in (key, local_key):
        if dim % 2 or dim > 512:
            raise ModelError(f"{keys.file}: head dimension {dim} is not an even number up to 512")
    value = keys.integer("attention.value_length", key, high=512)
    local_value = keys.integer("attention.value_length_swa", local_key if value == key else value, high=512)
    return HeadSizes(key, value, local_key, local_value)


def read_caches(keys: Keys, spec: ArchitectureSpec, windows: Sequence[int]) -> list[int | None]:
    """The layer whose keys and values each layer reads, None for its own: the last ones read what the last
    layer of their kind before them keeps. Raises ModelError."""
    layers = len(windows)
    if not spec.shares_caches:
        return [None] * layers
    default = max(0, layers - spec.keeping_layers) if spec.keeping_layers else 0
    first = layers - keys.integer("attention.shared_kv_layers", default, low=0, high=layers - 1)
    caches: list[int | None] = [None] * first
    for index in range(first, layers):
        alike = [one for one in range(first) if (windows[one] > 0) == (windows[index] > 0)]
        if not alike:
            keys.refuse(f"layer {index} has no keys, and no layer of its kind before layer {first} has any")
        caches.append(alike[-1])
    return caches


def read_streams(keys: Keys, spec: ArchitectureSpec) -> StreamSizes | None:
    """Residual streams; None in a family with one. Raises ModelError."""
    if not spec.streams:
        return None
    count = keys.integer("altup.num_inputs", 4, low=2, high=64)
    return StreamSizes(count, keys.integer("altup.active_idx", 0, low=0, high=count - 1))


def read_deviations(keys: Keys, spec: ArchitectureSpec, layers: int) -> list[float | None]:
    """How many standard deviations above the mean gates must be; None where every gate counts, for which
    files have −∞. Raises ModelError."""
    values = keys.raw("activation_sparsity_scale") if spec.top_layers else None
    if values is None:
        return [_TOP_DEVIATIONS if index < spec.top_layers else None for index in range(layers)]
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or len(values) != layers:
        keys.refuse("activation_sparsity_scale is not a number for each layer")
    if not (values < 100).all():
        keys.refuse("activation_sparsity_scale holds a value that no gate reaches")
    return [float(one) if one > -math.inf else None for one in values]


def read_attention_scale(
    keys: Keys, spec: ArchitectureSpec, layers: int, width: int, heads: int, head_dim: int
) -> float:
    """The factor of the scores. Raises ModelError."""
    if spec.output_scale:
        keys.ignore(
            "router_logit_softcapping", "attention.temperature_length"
        )  # no reader of files uses them
        return keys.real("attention.output_scale", _GROK_SCALE)
    scale = keys.real("attention.scale", 0.0)
    if scale:
        return scale
    if spec.attention_scale:
        return spec.attention_scale
    per_head = width // heads if layers == spec.wide_attention_scale_layers else head_dim
    return 1.0 / (per_head if spec.head_scale else math.sqrt(per_head))
