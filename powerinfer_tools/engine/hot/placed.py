"""The data of a model's blocks on a device: weights and KV caches, each loaded when a block first requests
it, and buffers by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from powerinfer_tools.engine.hot.cache import Attending, HeldVectors, HotCache
from powerinfer_tools.engine.hot.elementwise import BLOCK, HotNorm
from powerinfer_tools.engine.hot.hot_ffn import Inputs
from powerinfer_tools.engine.hot.loading import Arena, Form
from powerinfer_tools.engine.hot.placement import Workload
from powerinfer_tools.engine.hot.products import Product
from powerinfer_tools.model import device_memory
from powerinfer_tools.model.hyperparameter_types import PositionScale, Rope
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.operations import Attention
from powerinfer_tools.model.rotary import position_factors, rotary_tables
from powerinfer_tools.model.tensors import Norm, Vector, Weight

Tensor = torch.Tensor
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Rotary:
    """Cosines and sines of every position, float32 (context, rope_dim / 2), and which values make a pair."""

    cos: Tensor
    sin: Tensor
    style: str


class Named:
    """Buffers float32 (rows, width) by name and width, taken from ``memory`` when they are first named.
    ``fused``: rounded values of a single token are also kept in the form for fused kernels."""

    def __init__(self, memory: Arena, rows: int, *, fused: bool) -> None:
        self._memory, self.rows, self._fused = memory, rows, fused
        self._held: dict[tuple[str, int], Tensor] = {}

    def floats(self, name: str, width: int) -> Tensor:
        """The buffer of that name and width."""
        if (name, width) not in self._held:
            self._held[name, width] = self._memory.floats(self.rows, width)
        return self._held[name, width]

    def inputs(self, name: str, width: int, *, rounded: bool) -> Inputs:
        """The buffer of that name, in all forms where something reads the ``rounded`` ones."""
        exact = self.floats(name, width)
        if not rounded or width % BLOCK:
            # Rows of a quantised matrix are whole blocks: nothing would read a rounded form.
            return Inputs(exact, exact)
        return Inputs(exact, self.floats(f"{name}, rounded", width), self._codes(name, width))

    def _codes(self, name: str, width: int) -> Tensor | None:
        if not self._fused:
            return None
        from powerinfer_kernels.triton_launch import code_words

        key = (f"{name}, codes", width)
        if key not in self._held:
            self._held[key] = self._memory.typed(torch.int32, 1, code_words(width))
        return self._held[key]


class Placed:
    """Weights, rotary angles and KV caches of ``model`` in the form's memory. ``chunk``: flat space for
    unpacked rows; ``positions`` int64 (T,) of the tokens."""

    def __init__(self, model: Model, form: Form, work: Workload, chunk: Tensor) -> None:
        self.chunk, self.fused = chunk, form.fused
        self._model, self._form, self._work, self._memory = model, form, work, form.memory
        self._held: dict[tuple[object, ...], tuple[Any, ...]] = {}
        self.positions = self._memory.typed(torch.int64, work.tokens)
        if not self._memory.counting:
            self.positions.copy_(torch.zeros(work.tokens, dtype=torch.int64))

    def product(self, weight: Weight, bias: Vector | None) -> Product:
        """A matrix, and the bias that is added to its products."""
        return self._once(("product", id(weight), id(bias)), lambda: self._form.product(weight, bias))

    def vector(self, values: Vector) -> Tensor:
        """float32 (values,)."""
        return self._once(("vector", id(values)), lambda: self._form.vector(values))

    def norm(self, norm: Norm, eps: float, groups: int = 1) -> HotNorm:
        """A norm, of rows or of ``groups`` equal parts of each; where its weight is as wide as all of them,
        each part has its own."""

        def make() -> HotNorm:
            placed = self._form.norm(norm, eps)
            if groups == 1:
                return placed
            bias = None if placed.bias is None else placed.bias.view(groups, -1)
            return HotNorm(placed.kind, placed.weight.view(groups, -1), bias, eps)

        return self._once(("norm", id(norm), eps, groups), make)

    def rotary(self, rope: Rope) -> Rotary:
        """The angles of one kind of rotary positions."""

        def make() -> Rotary:
            table = rotary_tables(rope, self._work.context, self._model.rope_factors)
            cos, sin = (
                self._form.vector(part.reshape(-1)).view(part.shape) for part in (table.cos, table.sin)
            )
            return Rotary(cos, sin, rope.style)

        return self._once(("rotary", rope), make)

    def growth(self, how: PositionScale) -> Tensor:
        """The factors of every position, float32 (context, 1)."""

        def make() -> Tensor:
            factors = position_factors(how, self._work.context).astype("float32")
            return self._form.vector(factors).view(-1, 1)

        return self._once(("growth", how), make)

    def cache(self, how: Attention) -> HotCache:
        """The KV cache of a layer."""
        kinds = (how.head_dim, how.value_dim)
        return self._once(
            ("cache", how.layer), lambda: HotCache(*(self._vectors(how.kv_heads, size) for size in kinds))
        )

    def caches(self) -> list[Tensor]:
        """The contents of all caches, (kv_heads, context, …) each, in the order of the layers."""
        held = sorted((key[1], made) for key, (made,) in self._held.items() if key[0] == "cache")
        parts = (part for _, cache in held for part in (cache.keys, cache.values))
        return [tensor for part in parts for tensor in (part.data, part.scales) if tensor is not None]

    def attending(self, how: Attention) -> Attending:
        """How a layer looks at its cache."""

        def make() -> Attending:
            sinks = None if how.sinks is None else self._form.vector(how.sinks)
            slopes = self._slopes(how)
            return Attending(how.heads, how.scale, how.window, how.softcap, slopes, sinks, how.chunk)

        return self._once(("attending", how.layer), make)

    def scores(self, how: Attention) -> Tensor:
        """Flat space for scores, or for the partial results of fused kernels, which replace the scores of one
        token."""

        def make() -> Tensor:
            queries = min(device_memory.QUERIES_AT_ONCE, self._work.tokens)
            floats = queries * how.heads * self._work.context
            if self.fused:
                from powerinfer_kernels.triton_launch import partial_floats

                floats = max(floats, partial_floats(how.heads, how.value_dim, self._work.context))
            return self._memory.floats(floats)

        return self._once(("scores", how.heads, how.value_dim), make)

    def room_for_scores(self, scores: Tensor, tokens: int) -> tuple[Tensor, int]:
        """Space for the scores of a batch, and the largest number of queries that it is used for at a time.
        With fused kernels, the space of unpacked rows is used if it is larger, as nothing else uses it
        meanwhile."""
        if self.fused and len(self.chunk) > len(scores):
            return self.chunk, tokens
        return scores, device_memory.QUERIES_AT_ONCE

    def _slopes(self, how: Attention) -> Tensor | None:
        if not how.alibi:
            return None
        from powerinfer_kernels.reference import alibi_slopes

        return self._form.vector(alibi_slopes(how.heads, how.alibi).astype("float32"))

    def _vectors(self, kv_heads: int, size: int) -> HeldVectors:
        shape = (kv_heads, self._work.context, size)
        if self._work.kv_type == "f16":
            return HeldVectors(self._memory.typed(torch.float16, *shape), None)
        scales = self._memory.typed(torch.float16, *shape[:2], size // BLOCK)
        return HeldVectors(self._memory.typed(torch.int8, *shape), scales)

    def _once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        if key not in self._held:
            self._held[key] = (make(),)
        made: T = self._held[key][0]
        return made
