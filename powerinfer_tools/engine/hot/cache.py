"""The KV cache of one layer on a device, and attention over it.

It has the contents of the C kernels' cache: half-precision values, or with "q8_0" codes with one
half-precision scale for each 32 values of a head. A position is rewritten when it occurs again, and no
position is read before it has been written. So the caller forgets the end of a text by continuing from an
earlier position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from powerinfer_tools.engine.hot.elementwise import BLOCK, block_codes
from powerinfer_tools.model.device_memory import KEYS_AT_ONCE, QUERIES_AT_ONCE

Tensor = torch.Tensor


@dataclass(frozen=True)
class HeldVectors:
    """Keys, or values, of every position: float16, or int8 codes with float16 ``scales``
    (kv_heads, context, head_dim / 32); ``data`` (kv_heads, context, head_dim)."""

    data: Tensor
    scales: Tensor | None

    def store(self, positions: Tensor, vectors: Tensor) -> None:
        """Keep ``vectors`` float32 (T, kv_heads · head_dim) at ``positions`` int64 (T,)."""
        heads = vectors.view(len(vectors), self.data.shape[0], -1).transpose(0, 1)
        if self.scales is None:
            self.data.index_copy_(1, positions, heads.to(torch.float16))
            return
        codes, scale = block_codes(heads.reshape(*heads.shape[:2], -1, BLOCK))
        kept = scale.to(torch.float16)
        codes = codes.masked_fill(kept == 0, 0.0)
        kept = kept.masked_fill(~torch.isfinite(scale), torch.nan)
        self.data.index_copy_(1, positions, codes.flatten(-2).to(torch.int8))
        self.scales.index_copy_(1, positions, kept.squeeze(-1))

    def between(self, first: int, last: int) -> Tensor:
        """float32 (kv_heads, last - first, head_dim) of the positions from ``first`` to ``last``."""
        data = self.data[:, first:last].to(torch.float32)
        if self.scales is None:
            return data
        scales = self.scales[:, first:last, :, None].to(torch.float32)
        return (data.view(*scales.shape[:3], BLOCK) * scales).flatten(-2)


@dataclass(frozen=True)
class HotCache:
    """Keys and values of one layer."""

    keys: HeldVectors
    values: HeldVectors

    def store(self, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep ``key`` and ``value`` float32 (T, kv_heads · head_dim) at ``positions`` int64 (T,)."""
        self.keys.store(positions, key)
        self.values.store(positions, value)


@dataclass(frozen=True)
class Attending:
    """How queries look at a cache: ``scale`` of the scores, ``window`` positions back (0: all), ``softcap``
    (0: none); of each head, float32 (heads,), how much scores fall with distance, and the score of no
    position (None: none); ``chunk`` > 0: only within the query's own chunk of so many positions."""

    heads: int
    scale: float
    window: int
    softcap: float
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    chunk: int = 0

    @property
    def plain(self) -> bool:
        """Whether the fused kernels support this kind of attention."""
        return self.slopes is None and self.sinks is None and not self.chunk

    def attend(
        self,
        query: Tensor,
        cache: HotCache,
        position: int,
        space: Tensor,
        out: Tensor,
        most: int = QUERIES_AT_ONCE,
    ) -> None:
        """out (T, heads · head_dim) = softmax(scale · q kᵀ) v for queries at ``position`` and after it; each
        sees the positions up to its own. ``space`` is flat scratch for scores: as many queries are computed
        at a time as fit in it, but at most ``most``."""
        step = max(1, min(most, len(space) // (self.heads * (position + len(query)))))
        for first in range(0, len(query), step):
            last = min(first + step, len(query))
            out[first:last] = self._some(query[first:last], cache, position + first, space)

    def _some(self, query: Tensor, cache: HotCache, position: int, space: Tensor) -> Tensor:
        """As :meth:`attend`, for queries whose scores fit."""
        tokens, kv_heads = len(query), cache.keys.data.shape[0]
        group, end = self.heads // kv_heads, position + tokens
        begin = max(0, position + 1 - self.window) if self.window else 0
        begin = position // self.chunk * self.chunk if self.chunk else begin
        # (kv_heads, group · T, head_dim): the queries that share keys, beside each other
        shared = query.view(tokens, kv_heads, group, -1).permute(1, 2, 0, 3)
        shared = shared.reshape(kv_heads, group * tokens, -1)
        scores = space[: self.heads * tokens * (end - begin)].view(kv_heads, group * tokens, end - begin)
        pieces = [(a, min(a + KEYS_AT_ONCE, end)) for a in range(begin, end, KEYS_AT_ONCE)]
        for a, b in pieces:
            keys = cache.keys.between(a, b).transpose(1, 2)
            torch.bmm(shared, keys, out=scores[..., a - begin : b - begin])
        scores *= self.scale
        if self.softcap:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        apart = scores.view(kv_heads, group, tokens, -1)
        if self.slopes is not None:
            stands, keys = _places(apart, position, begin)
            slopes = self.slopes.view(kv_heads, group, 1, 1)
            apart.addcmul_(slopes, (stands - keys).to(torch.float32), value=-1.0)
        if tokens > 1:
            self._hide(apart, position, begin)
        total = self._weights(scores, apart)
        value_dim = cache.values.data.shape[2]
        alike = value_dim == shared.shape[2]
        sums = torch.zeros_like(shared) if alike else scores.new_zeros(*shared.shape[:2], value_dim)
        for a, b in pieces:
            sums += torch.bmm(scores[..., a - begin : b - begin], cache.values.between(a, b))
        sums /= total
        return sums.view(kv_heads, group, tokens, -1).permute(2, 0, 1, 3).reshape(tokens, -1)

    def _weights(self, scores: Tensor, apart: Tensor) -> Tensor:
        """Turn ``scores`` into exp(score - largest) in place; ``apart`` is a view of them by head,
        (kv_heads, group, T, …). Returns their sums (kv_heads, group · T, 1), including the sinks."""
        largest = scores.amax(dim=-1, keepdim=True)
        if self.sinks is None:
            scores.sub_(largest).exp_()
            return scores.sum(dim=-1, keepdim=True)
        sinks = self.sinks.view(*apart.shape[:2], 1, 1)
        largest = torch.maximum(largest.view(*apart.shape[:3], 1), sinks)
        apart.sub_(largest).exp_()
        return (apart.sum(dim=-1, keepdim=True) + (sinks - largest).exp()).view(len(scores), -1, 1)

    def _hide(self, scores: Tensor, position: int, begin: int) -> None:
        """Hide from the t-th query the positions that it does not see; ``scores`` (…, T, positions from
        ``begin`` on)."""
        stands, keys = _places(scores, position, begin)
        hidden = keys > stands
        if self.window:
            hidden |= stands - keys >= self.window
        if self.chunk:
            hidden |= stands // self.chunk > keys // self.chunk
        scores.masked_fill_(hidden, -torch.inf)


def fill(parts: Sequence[Tensor], data: bytes) -> None:
    """Write ``data`` into ``parts``, one after the other."""
    at = 0
    for part in parts:
        values = torch.frombuffer(bytearray(data[at : at + part.nbytes]), dtype=part.dtype)
        part.copy_(values.view(part.shape))
        at += part.nbytes


def _places(scores: Tensor, position: int, begin: int) -> tuple[Tensor, Tensor]:
    """The positions of the queries (T, 1) and of the keys (1, positions) of ``scores`` (…, T, positions)."""
    tokens, count = scores.shape[-2:]
    stands = torch.arange(position, position + tokens, device=scores.device)[:, None]
    return stands, torch.arange(begin, begin + count, device=scores.device)[None, :]
