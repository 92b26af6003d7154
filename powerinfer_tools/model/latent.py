"""Multi-head latent attention (arXiv 2405.04434): its weights, and its block.

Keys and values are one vector of low rank for all heads, which is kept. The matrix that would make a head's
keys is applied to its query instead, and the matrix for its values is applied to the result of attention.
With files that have both as one matrix, the keys and values of each head are computed and kept.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

from powerinfer_tools.model.hyperparameter_types import LatentSizes, LayerFacts
from powerinfer_tools.model.operations import Activation, Attention, HeadPart, Operations
from powerinfer_tools.model.tensors import Norm, Tensors, Weight

V = TypeVar("V")


@dataclass(frozen=True)
class LatentWeights:
    """Queries of full rank come from ``query`` alone."""

    norm: Norm
    query_low: Weight | None  # (query_rank, width)
    query_norm: Norm | None
    query: Weight  # (heads · (plain + rotary), query_rank or width)
    latent: Weight  # (rank + rotary, width)
    latent_norm: Norm
    keys: tuple[Weight, ...]  # of each head, (rank, plain); none where they are not absorbed
    values: tuple[Weight, ...]  # of each head, (value, rank)
    both: Weight | None  # keys and values head by head, (heads · (plain + value), rank)
    output: Weight
    sizes: LatentSizes
    gate: Weight | None = None  # (heads, width): its sigmoid multiplies what each head attended


def read_latent(
    tensors: Tensors, sizes: LatentSizes, heads: int, width: int, prefix: str, *, gated: bool = False
) -> LatentWeights:
    """The weights of a layer. Raises FormatError and ModelError."""
    s, low = sizes, sizes.query_rank
    name = "attn_q_b" if low else "attn_q"
    keys: tuple[Weight, ...] = ()
    values: tuple[Weight, ...] = ()
    both = None
    if s.absorbed:
        keys = tensors.heads(f"{prefix}.attn_k_b.weight", heads, s.rank, s.plain)
        values = tensors.heads(f"{prefix}.attn_v_b.weight", heads, s.value, s.rank)
    else:
        both = tensors.matrix(f"{prefix}.attn_kv_b.weight", heads * (s.plain + s.value), s.rank)
    return LatentWeights(
        norm=Norm("rms", tensors.vector(f"{prefix}.attn_norm.weight", width)),
        query_low=tensors.matrix(f"{prefix}.attn_q_a.weight", low, width) if low else None,
        query_norm=Norm("rms", tensors.vector(f"{prefix}.attn_q_a_norm.weight", low)) if low else None,
        query=tensors.matrix(f"{prefix}.{name}.weight", heads * (s.plain + s.rotary), low or width),
        latent=tensors.matrix(f"{prefix}.attn_kv_a_mqa.weight", s.rank + s.rotary, width),
        latent_norm=Norm("rms", tensors.vector(f"{prefix}.attn_kv_a_norm.weight", s.rank)),
        keys=keys,
        values=values,
        both=both,
        output=tensors.matrix(f"{prefix}.attn_output.weight", width, heads * s.value),
        sizes=s,
        gate=tensors.matrix_or_row(f"{prefix}.attn_gate.weight", heads, width) if gated else None,
    )


def latent_attention(
    ops: Operations[V, Weight], how: Attention, facts: LayerFacts, eps: float, w: LatentWeights, x: V
) -> V:
    """The attention of a layer."""
    rope, growth = facts.rope, facts.position_scale
    s = w.sizes
    normed = low = ops.norm("attention_input", x, w.norm, eps)
    latent = ops.linear("latent", normed, w.latent)
    if w.query_low is not None and w.query_norm is not None:
        low = ops.linear("query_low", normed, w.query_low)
        low = ops.norm("query_low", low, w.query_norm, eps)
    query = ops.linear("query_heads", low, w.query)
    if rope is not None:
        query = ops.rotate(query, how.heads, s.plain + s.rotary, rope, s.plain)
        latent = ops.rotate(latent, 1, s.rank + s.rotary, rope, s.rank)
    value = ops.norm("value", ops.part("value", latent, 0, s.rank), w.latent_norm, eps)
    if growth is not None:
        query = ops.scale_by_position(query, growth)
    if w.both is not None:
        key, value = _expanded(ops, how.heads, s, ops.linear("expanded", value, w.both), latent)
        result = ops.attend(query, key, value, how)
        return ops.linear("block_out", _gated(ops, w, normed, result), w.output)
    query = ops.per_head("query", query, w.keys, s.rotary)
    key = ops.replace_first(latent, value)
    attended = ops.attend(query, key, value, replace(how, value_dim=s.rank))
    result = ops.per_head("attended_heads", attended, w.values, 0)
    return ops.linear("block_out", _gated(ops, w, normed, result), w.output)


def _gated(ops: Operations[V, Weight], w: LatentWeights, normed: V, result: V) -> V:
    if w.gate is None:
        return result
    gate = ops.activate(ops.linear("attention_gate", normed, w.gate), None, Activation("sigmoid"))
    return ops.times(result, gate, w.sizes.value)


def _expanded(ops: Operations[V, Weight], heads: int, s: LatentSizes, both: V, latent: V) -> tuple[V, V]:
    """Keys and values; the keys of all heads have the same rotary part."""
    step = s.plain + s.value
    plain = (HeadPart(both, 0, step, s.plain),) if s.plain else ()
    key = ops.gather_heads("key", heads, (*plain, HeadPart(latent, s.rank, 0, s.rotary)))
    return key, ops.gather_heads("value", heads, (HeadPart(both, s.plain, step, s.value),))
