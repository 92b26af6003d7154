"""Operations that an implementer of the vocabulary does not have.

Whoever computes models refuses those with such an operation by name before it computes anything; that an
operation is asked for all the same ends in the same words. The operations are described in
:mod:`powerinfer_tools.model.operations`.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NoReturn, TypeVar

from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.hyperparameter_types import RecurrentSizes, Routing
from powerinfer_tools.model.operations import HeadPart
from powerinfer_tools.model.tensors import Table, Vector, Weight

V = TypeVar("V")
W = TypeVar("W", contravariant=True)


class _Refusing:
    #: Who does not have the operations, in words for the user.
    place = "this part"

    def _refuse(self, what: str) -> NoReturn:
        raise ModelError(f"{self.place} does not compute {what}; run, eval and bench do on the CPU")


class WithoutEmbedding(_Refusing, Generic[V]):
    """The residual stream begins elsewhere."""

    def embed(self, name: str, table: Weight, scale: float) -> V:
        """Refused."""
        self._refuse("embeddings")

    def embed_positions(self, x: V, table: Weight, offset: int) -> V:
        """Refused."""
        self._refuse("embeddings of positions")


class WithoutExperts(_Refusing, Generic[V]):
    """Mixtures of experts are computed in another way, or not at all."""

    def experts(
        self,
        scores: V,
        x: V,
        routing: Routing,
        expert: Callable[[int, V], V],
        choice_bias: Vector | None,
    ) -> V:
        """Refused."""
        self._refuse("experts one by one")

    def weigh(self, x: V, score: V) -> V:
        """Refused."""
        self._refuse("weighed experts one by one")


class WithoutRecurrence(_Refusing, Generic[V, W]):
    """No recurrent layers and no latent attention."""

    def part(self, name: str, x: V, first: int, count: int) -> V:
        """Refused."""
        self._refuse("recurrent layers or latent attention")

    def unit_heads(self, x: V, heads: int, eps: float) -> V:
        """Refused."""
        self._refuse("recurrent layers")

    def convolve(self, name: str, x: V, weight: Table, bias: Vector | None, first: int, *, silu: bool) -> V:
        """Refused."""
        self._refuse("recurrent layers")

    def scan_channels(self, name: str, x: V, steps: V, vectors: V, decay: Table, direct: Vector) -> V:
        """Refused."""
        self._refuse("recurrent layers")

    def scan_heads(
        self, name: str, x: V, steps: V, decay: Vector, direct: Vector, sizes: RecurrentSizes
    ) -> V:
        """Refused."""
        self._refuse("recurrent layers")

    def delta_net(
        self, name: str, both: V, x: V, decay: V, rate: V, sizes: RecurrentSizes, *, interleaved: bool
    ) -> V:
        """Refused."""
        self._refuse("recurrent layers")

    def general_delta(
        self, name: str, query: V, key: V, value: V, decay: V, unit: V, rate: V, heads: int
    ) -> V:
        """Refused."""
        self._refuse("recurrent layers")

    def per_head(self, name: str, x: V, matrices: Sequence[W], rest: int) -> V:
        """Refused."""
        self._refuse("latent attention")

    def gather_heads(self, name: str, heads: int, parts: Sequence[HeadPart[V]]) -> V:
        """Refused."""
        self._refuse("latent attention")

    def replace_first(self, x: V, y: V) -> V:
        """Refused."""
        self._refuse("latent attention")


class WithoutStreams(_Refusing, Generic[V]):
    """One residual stream, and activations that look at single neurons."""

    def combine(self, name: str, x: V, factors: V, width: int) -> V:
        """Refused."""
        self._refuse("streams beside the residual stream")

    def keep_top(self, x: V, deviations: float) -> V:
        """Refused."""
        self._refuse("gates that depend on all neurons")
