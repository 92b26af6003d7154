"""Keys of positions: rotary angles and their scaling, windows, scales by position."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.architectures import ArchitectureSpec
from powerinfer_tools.model.hyperparameter_types import PositionScale, Rope, Yarn
from powerinfer_tools.model.keys import Keys

#: Keys of a part that is not computed, as long as it would choose everything.
_INDEXER_SIZES = ("head_count", "key_length", "types", "local_blocks")


#: Positions of a chunk of Llama 4, and of a step of its queries' scale.
_CHUNK = 8192


def read_position_scale(keys: Keys, spec: ArchitectureSpec, *, windowed: bool) -> PositionScale | None:
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


def read_rotated(keys: Keys, spec: ArchitectureSpec, layers: int) -> Sequence[bool]:
    """Which layers have rotary positions: where the file has no value for each, the family says it."""
    if spec.rotary_depths and layers not in spec.rotary_depths:
        return (False,) * layers
    if isinstance(keys.raw("attention.rope_pattern"), np.ndarray):
        return [bool(value) for value in keys.integers("attention.rope_pattern", layers, low=0, high=1)]
    switched = spec.rope_switch and not keys.flag("rope.scaling.finetuned", default=True)
    if switched or keys.integer("attention.rope_pattern", 1, low=0, high=1) == 0:
        return (False,) * layers
    period = spec.no_rope_period if not spec.chunked or any(read_windows(keys, spec, layers)) else 0
    return [not period or index % period != period - 1 for index in range(layers)]


def read_ropes(
    keys: Keys, spec: ArchitectureSpec, head_dim: int, local_head_dim: int, *, local: bool
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
        if sections[:2].all():  # a model of pictures
            style = "neox"
    dim = _rope_dim(keys, "rope.dimension_count", head_dim, head_dim)
    base = keys.real("rope.freq_base", spec.default_rope_base, low=1.0)
    if alpha := keys.real("rope.scaling.alpha", 0.0, high=1e6) if spec.rope_alpha else 0.0:
        base *= alpha ** (head_dim / (head_dim - 2))  # NTK-aware scaling
    wide = _scaled(keys, Rope(style, dim // 2 if spec.half_rope else dim, base))
    if spec.latent and wide.yarn is not None:
        # that of the scores is
        wide = replace(wide, magnitude=keys.factor("rope.scaling.attn_factor"))
    local_dim = _rope_dim(keys, "rope.dimension_count_swa", local_head_dim, dim)
    local_base = keys.real("rope.freq_base_swa", spec.local_rope_base or base, low=1.0)
    if spec.plain_local_rope:
        return wide, Rope(style, local_dim, local_base, factored=False)
    if not local:
        return wide, wide
    if not spec.local_rope_base:
        factored = wide.factored and not spec.half_rope
        return wide, replace(wide, dim=local_dim, base=local_base, factored=factored)
    magnitude = keys.factor("rope.scaling.attn_factor")
    return wide, Rope(style, local_dim, local_base, factored=False, magnitude=magnitude)


def read_trained_context(keys: Keys, spec: ArchitectureSpec, positions: int) -> int:
    """Tokens that the model was trained for. Raises ModelError."""
    context = keys.integer("context_length", high=1 << 31)
    if spec.indexed:  # up to here, attention reads everything
        chosen = keys.integer("attention.indexer.top_k", high=1 << 31)
        context = min(context, chosen * keys.integer("attention.indexer.block_size", 1, high=1 << 20))
        keys.ignore(*(f"attention.indexer.{name}" for name in _INDEXER_SIZES))
    if spec.position_offset is None or (spec.positions_optional and not positions):
        return context
    if positions <= spec.position_offset:
        raise ModelError(
            f"{keys.file}: a table of {positions} positions is too short; the first {spec.position_offset} "
            "rows are not used"
        )
    return min(context, positions - spec.position_offset)


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


def read_windows(keys: Keys, spec: ArchitectureSpec, layers: int) -> Sequence[int]:
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
