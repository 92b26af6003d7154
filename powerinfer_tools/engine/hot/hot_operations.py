"""The vocabulary of :mod:`powerinfer_tools.model.operations` as work of a device, in torch operations and
Triton kernels.

A block is written once for each batch size, and run as often as needed. Values are named buffers. The form of
a launch depends on the operations after it: a norm also writes its output rounded for the integer kernels if
a matrix reads that; see also :func:`~powerinfer_tools.engine.hot.launches.fewer`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from powerinfer_tools.engine.hot.elementwise import BLOCK
from powerinfer_tools.engine.hot.hot_ffn import Inputs, activate
from powerinfer_tools.engine.hot.launches import (
    Attended,
    HostAttended,
    Joined,
    Multiplied,
    Normed,
    Rotation,
    fewer,
)
from powerinfer_tools.engine.hot.placed import Named, Placed
from powerinfer_tools.engine.hot.products import Product, round_where_needed
from powerinfer_tools.engine.hot.work import Launches, Work
from powerinfer_tools.model.hyperparameter_types import PositionScale, Rope
from powerinfer_tools.model.operations import Activation, Attention
from powerinfer_tools.model.refused_operations import (
    WithoutEmbedding,
    WithoutExperts,
    WithoutRecurrence,
    WithoutStreams,
)
from powerinfer_tools.model.tensors import Norm, Vector, Weight

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class HotValue:
    """float32 (T, width) in a buffer of the device, by the ``name`` of that buffer; ``made``: the norm, or
    the attention, that produced it, if nothing has changed it since."""

    name: str
    floats: Tensor
    made: Normed | Attended | None = None


@dataclass(frozen=True)
class Written:
    """The launches of a block: all of them in ``before``, if they are the same for every position. Otherwise
    ``before`` ends at ``attend``, which the host gives the position of the first token, and ``after`` has the
    launches after it."""

    before: Work
    attend: Callable[[int], None] | None
    after: Work


class HotOperations(
    WithoutEmbedding[HotValue],
    WithoutExperts[HotValue],
    WithoutRecurrence[HotValue, Weight],
    WithoutStreams[HotValue],
):
    """Writes work for batches of ``tokens`` over the ``placed`` weights and caches. Values are in ``named``
    buffers, except the values in ``elsewhere``."""

    place = "the hot side"

    def __init__(
        self, placed: Placed, named: Named, tokens: int, elsewhere: Mapping[str, Tensor] | None = None
    ) -> None:
        self._elsewhere = elsewhere or {}
        self._placed, self._named, self._tokens = placed, named, tokens
        self._launches: list[Work] = []
        self._rounded: set[HotValue] = set()

    def written(self) -> Written:
        """All launches that were written."""
        launches = fewer(self._launches)
        places = [i for i, launch in enumerate(launches) if isinstance(launch, HostAttended)]
        if not places:
            return Written(Launches(launches), None, _nothing)
        (at,) = places
        attend = launches[at]
        assert isinstance(attend, HostAttended)
        return Written(Launches(launches[:at]), attend.at, Launches(launches[at + 1 :]))

    def round(self, x: HotValue, reader: Product | None = None) -> Inputs:
        """x in all forms, for ``reader``, or for readers outside the vocabulary."""
        named = self._named.inputs(x.name, x.floats.shape[1], rounded=True).first(self._tokens)
        inputs = Inputs(x.floats, named.rounded, named.codes)
        if x not in self._rounded:
            self._rounded.add(x)
            if x.made is not None:
                x.made.rounded = inputs
            elif reader is not None:
                self._launches.append(partial(round_where_needed, inputs, reader))
            else:
                self._launches.append(inputs.round)
        return inputs

    def norm(self, name: str, x: HotValue, norm: Norm, eps: float) -> HotValue:
        """In place if ``name`` is the name of ``x``."""
        out = self._buffer(name, x.floats.shape[1])
        made = Normed(self._placed.norm(norm, eps), x.floats, out)
        self._launches.append(made)
        return HotValue(name, out, made)

    def norm_heads(self, x: HotValue, heads: int, norm: Norm, eps: float) -> HotValue:
        """In place."""
        own = heads > 1 and norm.weight.size == x.floats.shape[1]
        placed = self._placed.norm(norm, eps, heads if own else 1)
        self._launches.append(partial(placed.apply, x.floats, x.floats, heads))
        return HotValue(x.name, x.floats)

    def linear(self, name: str, x: HotValue, weight: Weight, bias: Vector | None = None) -> HotValue:
        """Inputs of quantised matrices are rounded as the integer kernels round them."""
        product = self._placed.product(weight, bias)
        inputs = self.round(x, product) if product.rounds else Inputs(x.floats, x.floats)
        out = self._buffer(name, product.count)
        self._launches.append(Multiplied(product, inputs, self._placed.chunk, out))
        return HotValue(name, out)

    def rotate(self, x: HotValue, heads: int, head_dim: int, rope: Rope, first: int = 0) -> HotValue:
        """In place, queries and keys together."""
        positions, rotary = self._placed.positions[: self._tokens], self._placed.rotary(rope)
        whole = heads * head_dim == x.floats.shape[1] and first == 0
        fused = self._placed.fused and self._tokens == 1 and whole
        self._launches.append(Rotation([(x.floats, heads)], rotary, positions, head_dim, first, fused))
        return HotValue(x.name, x.floats)

    def attend(
        self, query: HotValue, key: HotValue | None, value: HotValue | None, how: Attention
    ) -> HotValue:
        """Over the cache of the layer. Fused kernels read the position of a single token on the device."""
        assert key is not None
        assert value is not None, "layers without keys stay on the CPU"
        p = self._placed
        cache, positions, looks = p.cache(how), p.positions[: self._tokens], p.attending(how)
        out, scores = self._buffer("attended", how.heads * how.value_dim), p.scores(how)
        if p.fused and self._tokens == 1 and how.head_dim == how.value_dim:
            if looks.plain:
                made = Attended(
                    query.floats, key.floats, value.floats, cache, positions, scores, out, how
                )  # fmt: skip
                self._launches.append(made)
                return HotValue("attended", out, made if how.head_dim % BLOCK == 0 else None)
            from powerinfer_kernels.triton_launch import store

            self._launches.append(
                partial(store, key.floats, value.floats, cache.keys, cache.values, positions)
            )
        else:
            self._launches.append(partial(cache.store, positions, key.floats, value.floats))
        space, most = p.room_for_scores(scores, self._tokens)
        attend_some = partial(looks.attend, query.floats, cache, most=most)
        self._launches.append(HostAttended(attend_some, space, out))
        return HotValue("attended", out)

    def activate(self, gate: HotValue, up: HotValue | None, how: Activation) -> HotValue:
        """In place of ``gate``."""
        factor = None if up is None else up.floats
        self._launches.append(partial(_activate, gate.floats, factor, how))
        return HotValue(gate.name, gate.floats)

    def clamp(self, x: HotValue, limit: float) -> HotValue:
        """In place."""
        self._launches.append(partial(_clamp, x.floats, limit))
        return HotValue(x.name, x.floats)

    def join(self, x: HotValue, y: HotValue, factor: float = 1.0) -> HotValue:
        """In place of ``x``."""
        self._launches.append(Joined(x.floats, y.floats, factor))
        return HotValue(x.name, x.floats)

    def times(self, x: HotValue, y: HotValue | Vector, repeat: int = 1) -> HotValue:
        """In place of ``x``."""
        factors = y.floats if isinstance(y, HotValue) else self._placed.vector(y).view(1, -1)
        self._launches.append(partial(_multiply, x.floats.view(*x.floats.shape[:1], -1, repeat), factors))
        return HotValue(x.name, x.floats)

    def scale_by_position(self, x: HotValue, how: PositionScale) -> HotValue:
        """In place."""
        positions = self._placed.positions[: self._tokens]
        self._launches.append(partial(_grow, x.floats, self._placed.growth(how), positions))
        return HotValue(x.name, x.floats)

    def plus(self, x: HotValue, vector: Vector) -> HotValue:
        """In place."""
        self._launches.append(Joined(x.floats, self._placed.vector(vector), 1.0))
        return HotValue(x.name, x.floats)

    def copy(self, name: str, x: HotValue) -> HotValue:
        """Into the buffer of that name."""
        out = self._buffer(name, x.floats.shape[1])
        self._launches.append(partial(_copy, out, x.floats))
        return HotValue(name, out)

    def scale(self, x: HotValue, factor: float) -> HotValue:
        """In place."""
        self._launches.append(partial(_scale, x.floats, factor))
        return HotValue(x.name, x.floats)

    def softcap(self, x: HotValue, cap: float) -> HotValue:
        """In place."""
        self._launches.append(partial(_softcap, x.floats, cap))
        return HotValue(x.name, x.floats)

    def _buffer(self, name: str, width: int) -> Tensor:
        buffer = self._elsewhere.get(name)
        return self._named.floats(name, width)[: self._tokens] if buffer is None else buffer


def _nothing() -> None:
    pass


def _activate(gate: Tensor, up: Tensor | None, how: Activation) -> None:
    out = activate(gate, up, how.kind, how.cut)
    if out is not gate:
        gate.copy_(out)


def _multiply(x: Tensor, y: Tensor) -> None:
    x.mul_(y[..., None])


def _grow(x: Tensor, factors: Tensor, positions: Tensor) -> None:
    x.mul_(factors.index_select(0, positions))


def _clamp(x: Tensor, limit: float) -> None:
    x.clamp_(-limit, limit)


def _copy(out: Tensor, x: Tensor) -> None:
    out.copy_(x)


def _scale(x: Tensor, factor: float) -> None:
    x.mul_(factor)


def _softcap(x: Tensor, cap: float) -> None:
    x.div_(cap).tanh_().mul_(cap)
