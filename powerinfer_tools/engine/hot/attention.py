"""One layer's attention block on a device: norm, projections, rotary positions, KV cache, output.

Which of these a layer has comes from its weights and from the architecture table; the order of operations is
that of :mod:`powerinfer_tools.engine.blocks`.
"""

from dataclasses import dataclass

import torch

from powerinfer_tools.engine.hot.cache import Attending, HotCache
from powerinfer_tools.engine.hot.elementwise import HotNorm, rotate, round_activations
from powerinfer_tools.engine.hot.hot_ffn import FusedRows, Inputs
from powerinfer_tools.engine.hot.products import Product

Tensor = torch.Tensor


@dataclass(frozen=True)
class AttentionScratch:
    """Memory that all attention blocks share: their input, what they attended to, each exact and as the
    integer kernels round it (the same tensor where nothing is rounded); queries, keys, values, the block's
    output (T, …); ``positions`` int64 (T,) of the tokens; flat space for scores and for a chunk of rows."""

    input: Inputs
    attended: Inputs
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    positions: Tensor
    scores: Tensor
    chunk: Tensor


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of every position, float32 (context, rope_dim / 2), and which values make a pair."""

    cos: Tensor
    sin: Tensor
    style: str


@dataclass(frozen=True)
class HotAttention:
    """The block. Parts that the family does not have are None. ``fused``: there are Triton kernels."""

    norm: HotNorm
    query: Product
    key: Product
    value: Product
    output: Product
    query_norm: HotNorm | None
    key_norm: HotNorm | None
    post_norm: HotNorm | None
    rotary: Rotary | None
    cache: HotCache
    attending: Attending
    kv_heads: int
    fused: bool = False

    def project(self, s: AttentionScratch, x: Tensor) -> None:
        """Queries of the residual stream ``x`` (T, width), and its keys and values into the cache."""
        tokens = len(x)
        inputs, positions = s.input.first(tokens), s.positions[:tokens]
        query, key, value = s.query[:tokens], s.key[:tokens], s.value[:tokens]
        rounds = any(product.rounds for product in (self.query, self.key, self.value))
        self.norm.into(x, inputs.exact, inputs.rounded if rounds else None)
        self.query.times(inputs, s.chunk, query)
        self.key.times(inputs, s.chunk, key)
        self.value.times(inputs, s.chunk, value)
        if self.query_norm is not None and self.key_norm is not None:
            self.query_norm.apply(query, query, self.attending.heads)
            self.key_norm.apply(key, key, self.kv_heads)
        if self.fused and tokens == 1:
            self._place_one(query, key, value, positions)
            return
        if self.rotary is not None:
            cos, sin = (table.index_select(0, positions) for table in (self.rotary.cos, self.rotary.sin))
            rotate(query, cos, sin, self.attending.heads, self.rotary.style)
            rotate(key, cos, sin, self.kv_heads, self.rotary.style)
        self.cache.store(positions, key, value)

    def _place_one(self, query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> None:
        """Rotary positions and the cache, by fused kernels."""
        from powerinfer_kernels import triton_launch

        keys, rotary = self.cache.keys, self.rotary
        if rotary is not None:
            neox = rotary.style != "norm"
            triton_launch.rotate(query, key, rotary.cos, rotary.sin, position, keys.data.shape[2], neox=neox)
        triton_launch.store(key, value, keys, self.cache.values, position)

    def attend(self, s: AttentionScratch, tokens: int, position: int) -> None:
        """What the queries find in the cache; the first stands at ``position``."""
        out = s.attended.exact[:tokens]
        self.attending.attend(s.query[:tokens], self.cache, position, s.scores, out)

    def attend_one(self, s: AttentionScratch) -> None:
        """:meth:`attend` for one token with fused kernels, which read on the device where it stands: so the
        same work does for every position."""
        from powerinfer_kernels import triton_launch

        looks, out = self.attending, s.attended.exact[:1]
        triton_launch.attend(
            s.query[:1], self.cache.keys, self.cache.values, s.positions[:1], s.scores, out,
            scale=looks.scale, window=looks.window, softcap=looks.softcap,
        )  # fmt: skip

    def add(self, s: AttentionScratch, x: Tensor) -> None:
        """Add the block's output to the residual stream ``x`` (T, width)."""
        attended, out = s.attended.first(len(x)), s.out[: len(x)]
        round_where_needed(attended, self.output)
        self.output.times(attended, s.chunk, out)
        if self.post_norm is not None:
            self.post_norm.apply(out, out)
        x += out


def round_where_needed(inputs: Inputs, *consumers: Product) -> None:
    """Fill in the rounded form, where some consumer takes it."""
    if not any(product.rounds for product in consumers):
        return
    if len(inputs.exact) == 1 and isinstance(consumers[0].rows, FusedRows):
        from powerinfer_kernels.triton_launch import round_values

        round_values(inputs.exact, inputs.rounded)
    else:
        round_activations(inputs.exact, inputs.rounded)
