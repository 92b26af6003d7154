"""Keys of what mixes the tokens of each layer: attention, heads, recurrent and latent sizes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.hyperparameter_types import LatentSizes, Mixer, RecurrentSizes
from powerinfer_tools.model.keys import MISSING, Keys

#: Of Grok 1, whose files may lack it.
_GROK_SCALE = 128**-0.5


def read_layers(keys: Keys) -> int:
    """Those that compute the next token: files count layers for further ones, which come last, among them."""
    keys.blocks = keys.integer("block_count", high=4096)
    return keys.blocks - keys.integer("nextn_predict_layers", 0, low=0, high=keys.blocks - 1)


def read_mixers(keys: Keys, spec: ArchitectureSpec, layers: int) -> tuple[Mixer, ...]:
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
    if spec.recurrent_layers == "all":
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


def read_latent_scale(keys: Keys, latent: LatentSizes) -> float:
    """1 / √(a head's keys), and with YaRN times the square of what it does to the magnitude of positions,
    which these families leave to the scores."""
    factor = keys.real("rope.scaling.factor", 0.0) or 1.0
    magnitude = 1.0 + keys.real("rope.scaling.yarn_log_multiplier", 0.0) * math.log(max(factor, 1.0))
    return magnitude * magnitude / math.sqrt(latent.plain + latent.rotary)


def read_head_dim(keys: Keys, spec: ArchitectureSpec, width: int, heads: int) -> int:
    """Values of a query and of a key of one head. Raises ModelError."""
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


def read_value_dim(keys: Keys, spec: ArchitectureSpec, head_dim: int) -> int:
    """Values of a value of one head. Raises ModelError."""
    if spec.latent or spec.recurrent_layers == "all":
        return head_dim
    value_dim = keys.integer("attention.value_length", head_dim, high=512)
    if keys.integer("attention.value_length_swa", value_dim, high=1 << 14) != value_dim:
        keys.refuse(f"attention.value_length_swa is not {value_dim}, as heads of other layers are wide")
    return value_dim


def read_attention_scale(
    keys: Keys, spec: ArchitectureSpec, layers: int, width: int, heads: int, head_dim: int
) -> float:
    """What scores are multiplied with. Raises ModelError."""
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
