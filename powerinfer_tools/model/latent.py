"""Multi-head latent attention (arXiv 2405.04434): its weights, and its block.

Keys and values are one vector of low rank for all heads, which is kept; each head's part of the matrix that
would make its keys is applied to its query, and that of its values to what was attended.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

from powerinfer_tools.model.hyperparameters import LatentSizes, LayerFacts
from powerinfer_tools.model.operations import Attention, Operations
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
    keys: tuple[Weight, ...]  # of each head, (rank, plain)
    values: tuple[Weight, ...]  # of each head, (value, rank)
    output: Weight
    sizes: LatentSizes


def read_latent(tensors: Tensors, sizes: LatentSizes, heads: int, width: int, prefix: str) -> LatentWeights:
    """The weights of a layer. Raises FormatError and ModelError."""
    s, low = sizes, sizes.query_rank
    name = "attn_q_b" if low else "attn_q"
    keys = tensors.heads(f"{prefix}.attn_k_b.weight", heads, s.rank, s.plain)
    values = tensors.heads(f"{prefix}.attn_v_b.weight", heads, s.value, s.rank)
    return LatentWeights(
        norm=Norm("rms", tensors.vector(f"{prefix}.attn_norm.weight", width)),
        query_low=tensors.matrix(f"{prefix}.attn_q_a.weight", low, width) if low else None,
        query_norm=Norm("rms", tensors.vector(f"{prefix}.attn_q_a_norm.weight", low)) if low else None,
        query=tensors.matrix(f"{prefix}.{name}.weight", heads * (s.plain + s.rotary), low or width),
        latent=tensors.matrix(f"{prefix}.attn_kv_a_mqa.weight", s.rank + s.rotary, width),
        latent_norm=Norm("rms", tensors.vector(f"{prefix}.attn_kv_a_norm.weight", s.rank)),
        keys=keys,
        values=values,
        output=tensors.matrix(f"{prefix}.attn_output.weight", width, heads * s.value),
        sizes=s,
    )


def latent_attention(
    ops: Operations[V, Weight], how: Attention, facts: LayerFacts, eps: float, w: LatentWeights, x: V
) -> V:
    """The attention of a layer."""
    rope, growth = facts.rope, facts.position_scale
    assert rope is not None
    s = w.sizes
    normed = low = ops.norm("attention_input", x, w.norm, eps)
    latent = ops.linear("latent", normed, w.latent)
    if w.query_low is not None and w.query_norm is not None:
        low = ops.linear("query_low", normed, w.query_low)
        low = ops.norm("query_low", low, w.query_norm, eps)
    query = ops.linear("query_heads", low, w.query)
    query = ops.rotate(query, how.heads, s.plain + s.rotary, rope, s.plain)
    query = ops.per_head("query", query, w.keys, s.rotary)
    latent = ops.rotate(latent, 1, s.rank + s.rotary, rope, s.rank)
    value = ops.norm("value", ops.part("value", latent, 0, s.rank), w.latent_norm, eps)
    key = ops.replace_first(latent, value)
    if growth is not None:
        query = ops.scale_by_position(query, growth)
    attended = ops.attend(query, key, value, replace(how, value_dim=s.rank))
    result = ops.per_head("attended_heads", attended, w.values, 0)
    return ops.linear("block_out", result, w.output)
