"""config.json → the hyper-parameter keys of GGUF."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.metadata import Metadata
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import ARCHITECTURES
from powerinfer_tools.model.huggingface.changes import HeadShape
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.families import ACTIVATIONS
from powerinfer_tools.model.huggingface.family import Family, Real, Setting
from powerinfer_tools.model.huggingface.rope import Rope, read_rope

#: Kinds of layers: those that see all positions, those with a window or chunks, and those without attention.
_WIDE, _LIMITED = ("full_attention", "attention"), ("sliding_attention", "chunked_attention")
_RECURRENT = ("linear_attention", "mamba", "conv")


@dataclass(frozen=True)
class Shape:
    """What mapping the tensors needs to know; ``stacked``: experts, or residual streams beside the first."""

    layers: int
    stacked: int
    heads: HeadShape
    tied: bool
    rope: Rope


def add_hyperparameters(metadata: Metadata, family: Family, config: Config) -> Shape:
    """Add all keys below the architecture's prefix. Raises FormatError or ModelError for what is not
    supported."""
    _check_fixed(family, config)
    prefix = family.architecture
    sizes: dict[str, int] = {}
    for setting in family.settings:
        sizes[setting.key] = _size(setting, config)
        if sizes[setting.key] or setting.zero:
            metadata.add(f"{prefix}.{setting.key}", sizes[setting.key], ValueType.UINT32)
    for key, name, default in family.flags:
        metadata.add(f"{prefix}.{key}", config.flag(name, default) if isinstance(name, str) else name(config))
    for key, read in family.lists:
        metadata.add(f"{prefix}.{key}", np.array(read(config), np.uint32))
    for key, read_numbers in family.real_lists:
        metadata.add(f"{prefix}.{key}", np.array(read_numbers(config), np.float32))
    for real in family.reals:
        value = _real(real, config)
        if value:
            metadata.add(f"{prefix}.{real.key}", value, ValueType.FLOAT32)
    heads = _heads(config, sizes)
    _add_norm_eps(metadata, family, config)
    for key, number in family.constants:
        metadata.add(f"{prefix}.{key}", number, ValueType.UINT32)
    share = config.real(family.rotary_name, family.rotary_share, low=0.0, high=1.0)
    if family.rotary_values:
        share = config.integer(family.rotary_values, high=heads.head_dim) / heads.head_dim
    rope, local = Rope(family.rope_base, heads.head_dim), None
    if ARCHITECTURES[prefix].rope_style != "none":
        rope, local = read_rope(config, family.rope_base, share, heads.head_dim)
        _add_rope(metadata, family, rope, heads)
    _add_rotary_layers(metadata, family, config, sizes["block_count"])
    _add_window(metadata, family, config, sizes["block_count"], rope, local)
    _add_recurrent_layers(metadata, family, config, sizes["block_count"])
    _add_scores(metadata, prefix, config, heads)
    _add_activation(metadata, family, config)
    tied = config.flag("tie_word_embeddings", family.tied)
    stacked = sizes.get("expert_count", 0) or sizes.get("altup.num_inputs", 1) - 1
    return Shape(sizes["block_count"], stacked, heads, tied, rope)


def _check_fixed(family: Family, config: Config) -> None:
    for name, value in family.fixed:
        place, last = config.at(name)
        if place.has(last) and place.get(last) != value:
            raise _unsupported(family, config, name, value)
    for name, other in family.same:
        if config.has(name) and config.get(name) != config.get(other):
            raise _unsupported(family, config, name, f"{other} ({config.get(other)})")


def _unsupported(family: Family, config: Config, name: str, value: Any) -> ModelError:
    reason = dict(family.reasons).get(name)
    meaning = f" ({reason})" if reason else ""
    return ModelError(f"{config.file}: {config.path}{name} other than {value} is not supported{meaning}")


def _heads(config: Config, sizes: dict[str, int]) -> HeadShape:
    heads = sizes.get("attention.head_count", 1)
    kv_heads = sizes.get("attention.head_count_kv") or heads
    width = sizes["embedding_length"]
    head_dim = sizes.get("attention.key_length", 0)
    if not head_dim and width % heads:
        raise config.fail("hidden_size", f"is {width}, no multiple of {heads} attention heads")
    head_dim = head_dim or width // heads
    if head_dim % 2:
        raise config.fail("head_dim", f"is {head_dim}, expected an even number")
    groups, values = sizes.get("ssm.group_count", 1), sizes.get("ssm.time_step_rank", 1)
    return HeadShape(heads, kv_heads, head_dim, groups, sizes.get("ssm.state_size", 0), values)


def _real(real: Real, config: Config) -> float:
    if real.derive is not None:
        return real.derive(config)
    place, name = config.at(real.name)
    return place.real(name, real.default, low=-1e6, high=1e6)


def _size(setting: Setting, config: Config) -> int:
    if setting.derive is not None:
        return setting.derive(config)
    if setting.default is None:
        return config.integer(setting.name, high=setting.high)
    return config.integer(setting.name, setting.default, low=min(1, setting.default), high=setting.high)


def _add_norm_eps(metadata: Metadata, family: Family, config: Config) -> None:
    kind = (
        "layer_norm_rms_epsilon" if ARCHITECTURES[family.architecture].norm == "rms" else "layer_norm_epsilon"
    )
    named = config.real(family.norm_name, family.norm_eps, low=0.0, high=1.0) if family.norm_name else None
    value = family.norm_eps if named is None else named
    metadata.add(f"{family.architecture}.attention.{kind}", value, ValueType.FLOAT32)


def _add_rope(metadata: Metadata, family: Family, rope: Rope, heads: HeadShape) -> None:
    prefix = family.architecture
    metadata.add(f"{prefix}.rope.freq_base", rope.base, ValueType.FLOAT32)
    metadata.add(f"{prefix}.rope.dimension_count", rope.dim, ValueType.UINT32)
    whole = rope.dim == heads.head_dim or family.natively_paired
    if not whole and ARCHITECTURES[prefix].rope_style != "neox":
        raise ModelError(
            f"{metadata.file}: partly rotated heads (partial_rotary_factor) are not supported here"
        )
    scaling = f"{prefix}.rope.scaling"
    if rope.yarn is not None:
        if ARCHITECTURES[prefix].latent and abs(rope.yarn.whole_magnitude - 1.0) > 1e-6:
            raise ModelError(
                f"{metadata.file}: growing rotary positions of latent attention are not supported"
            )
        metadata.add(f"{scaling}.type", "yarn")
        metadata.add(f"{scaling}.original_context_length", rope.yarn.original, ValueType.UINT32)
        for key, value in (
            ("factor", rope.yarn.factor),
            ("yarn_beta_fast", rope.yarn.fast),
            ("yarn_beta_slow", rope.yarn.slow),
            ("yarn_log_multiplier", rope.yarn.log_multiplier)
            if ARCHITECTURES[prefix].latent
            else ("attn_factor", rope.yarn.magnitude),
        ):
            metadata.add(f"{scaling}.{key}", value, ValueType.FLOAT32)
    if rope.long is not None:
        metadata.add(f"{scaling}.type", "longrope")
        metadata.add(f"{scaling}.original_context_length", rope.long.original, ValueType.UINT32)
        metadata.add(f"{scaling}.attn_factor", rope.long.magnitude, ValueType.FLOAT32)
    if rope.magnitude != 1.0:
        metadata.add(f"{scaling}.attn_factor", rope.magnitude, ValueType.FLOAT32)
    if rope.growth:
        metadata.add(f"{prefix}.attention.temperature_scale", rope.growth, ValueType.FLOAT32)
    if rope.linear != 1.0:
        metadata.add(f"{prefix}.rope.scaling.type", "linear")
        metadata.add(f"{prefix}.rope.scaling.factor", rope.linear, ValueType.FLOAT32)


def _add_rotary_layers(metadata: Metadata, family: Family, config: Config, layers: int) -> None:
    """Which layers have rotary positions, where the file says it."""
    kinds = config.items(family.rotary_layers) if family.rotary_layers else []
    if not kinds:
        return
    if len(kinds) != layers or any(kind not in (0, 1) for kind in kinds):
        raise config.fail(family.rotary_layers, f"is no list of 0 and 1 for each of {layers} layers")
    pattern = np.array(kinds, np.bool_)
    metadata.add(f"{family.architecture}.attention.rope_pattern", pattern)


def _add_window(
    metadata: Metadata, family: Family, config: Config, layers: int, rope: Rope, local: Rope | None
) -> None:
    """Which layers are limited to the window; the rotary base of those, and that they scale nothing."""
    limited = _limited_layers(family, config, layers)
    if not any(limited):
        return
    depths = ARCHITECTURES[family.architecture].windowed_depths
    if depths and layers not in depths:
        raise ModelError(
            f"{config.file}: sliding windows in models of {layers} layers are not supported here"
        )
    window = config.integer(family.window_name, family.window, high=1 << 31)
    base, spec = local if local is not None else rope, ARCHITECTURES[family.architecture]
    plain = spec.plain_local_rope or spec.local_rope_base > 0
    if (plain and base.scaled) or (not plain and local is not None and (rope.scaled or base.scaled)):
        raise ModelError(f"{config.file}: scaled rotary positions of sliding layers are not supported")
    prefix = family.architecture
    metadata.add(f"{prefix}.attention.sliding_window", window, ValueType.UINT32)
    metadata.add(f"{prefix}.attention.sliding_window_pattern", np.array(limited))
    metadata.add(f"{prefix}.rope.freq_base_swa", base.base, ValueType.FLOAT32)


def _limited_layers(family: Family, config: Config, layers: int) -> list[bool]:
    kinds = _kinds(family, config, layers)
    if not kinds:
        # A window of null switches it off; where the name is missing, the family's own holds, if it has one.
        rule, named = family.sliding, "sliding_window" in config.values
        if rule is None:
            return [False] * layers
        off = not config.has("sliding_window") if named else not family.window
        return [not off and rule(config, index) for index in range(layers)]
    return [kind in _LIMITED for kind in kinds]


def _kinds(family: Family, config: Config, layers: int) -> list[Any]:
    """The kind of each layer; none where the file does not say it."""
    name, recurrent = family.layer_list, ARCHITECTURES[family.architecture].recurrent != "none"
    kinds = config.items(name)
    if kinds and len(kinds) != layers:
        raise config.fail(name, f"has {len(kinds)} entries for {layers} layers")
    kind_names = (*_WIDE, *_LIMITED, *(_RECURRENT if recurrent else ()))
    for kind in kinds:
        if type(kind) is not str or kind not in kind_names:
            raise ModelError(f"{config.file}: layers of type {str(kind)[:80]!r} are not supported")
    return kinds


def _add_recurrent_layers(metadata: Metadata, family: Family, config: Config, layers: int) -> None:
    """Which layers mix tokens without attention, in families some of whose layers do."""
    spec = ARCHITECTURES[family.architecture]
    if spec.recurrent == "none" or spec.recurrent_layers != "listed":
        return
    recurs = [kind in _RECURRENT for kind in _kinds(family, config, layers)]
    if not recurs:
        rule = family.recurrent
        recurs = [rule is not None and rule(config, index) for index in range(layers)]
    metadata.add(f"{family.architecture}.attention.recurrent_layers", np.array(recurs))


def _add_scores(metadata: Metadata, prefix: str, config: Config, heads: HeadShape) -> None:
    """What scores are divided by, and limits of scores and logits."""
    if config.has("query_pre_attn_scalar"):
        scalar = config.real("query_pre_attn_scalar", low=1e-6, high=1e6)
        metadata.add(f"{prefix}.attention.scale", scalar**-0.5, ValueType.FLOAT32)
    for key, name in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if config.has(name):
            metadata.add(f"{prefix}.{key}", config.real(name, low=0.0, high=1e6), ValueType.FLOAT32)


def _add_activation(metadata: Metadata, family: Family, config: Config) -> None:
    name = config.text("hidden_act", family.activation)
    if family.activation_name:
        name = config.text(family.activation_name, name)
    activations = {**ACTIVATIONS, **dict(family.activations)}
    if name not in activations:
        raise ModelError(
            f"{config.file}: activation {name[:80]!r} is not supported (supported: {', '.join(activations)})"
        )
    if activations[name] != ARCHITECTURES[family.architecture].activation:
        metadata.add("powerinfer.activation", activations[name])
    if activations[name] == "fatrelu":
        cut = config.real("hidden_act_param", low=0.0, high=1e6)
        metadata.add("powerinfer.activation_threshold", cut, ValueType.FLOAT32)
