"""The vocabulary that the blocks of a model are written in: one method for each operation.

Each implementation defines the type of values: a buffer of the program that the C kernels run, a numpy array
of float64, a torch tensor, a count of bytes. Shapes are given for a batch of T tokens: a value of width n is
[T, n]. ``name`` is the purpose of a value. An implementation with memory of its own may give all values of
one name the same memory, so a value becomes invalid when the next value of its name is made.

A method that changes a value may do it in place: its arguments become invalid, except the residual stream,
the values that :meth:`Operations.norm` and :meth:`Operations.linear` read, and weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from powerinfer_tools.model.hyperparameter_types import PositionScale, RecurrentSizes, Rope, Routing
from powerinfer_tools.model.tensors import Norm, Table, Vector, Weight

V = TypeVar("V")
W = TypeVar("W", contravariant=True)


@dataclass(frozen=True, eq=False)
class Attention:
    """How a layer attends over keys and values that ``layer`` keeps, which is itself or an earlier one:
    ``heads`` query heads over ``kv_heads`` of keys of ``head_dim`` values, and of
    values of ``value_dim``; ``window`` 0: over all positions; ``softcap`` and ``alibi`` 0: none; ``sinks``
    (heads,): scores of no key, in the sum of the softmax alone (arXiv 2309.17453); ``chunk`` > 0: over the
    positions of the token's own chunk of so many."""

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float
    value_dim: int
    alibi: float = 0.0
    sinks: Vector | None = None
    chunk: int = 0


@dataclass(frozen=True)
class Activation:
    """One of :data:`~powerinfer_tools.model.architectures.ACTIVATIONS`; ``cut`` is what a gate must be above
    with fatrelu; ``constants`` are those of xielu (arXiv 2411.13010): of positive and of negative values,
    beta and epsilon."""

    kind: str
    cut: float = 0.0
    constants: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class HeadPart(Generic[V]):
    """``count`` columns of ``value`` for each head, those of head h from ``first`` + h · ``step`` on."""

    value: V
    first: int
    step: int
    count: int


class Operations(Protocol[V, W]):
    """The operations that blocks consist of. Matrices of a model are given as ``W``; tables that are read row
    by row, norms and biases are given as they are in the file."""

    def embed(self, name: str, table: Weight, scale: float) -> V:
        """Row token(t) of ``table`` (vocabulary, n), times ``scale``; the residual stream is called x."""

    def embed_positions(self, x: V, table: Weight, offset: int) -> V:
        """x_t + row position(t) + ``offset`` of ``table`` (positions, n)."""

    def norm(self, name: str, x: V, norm: Norm, eps: float) -> V:
        """x / sqrt(mean(x²) + eps) · weight + bias (arXiv 1910.07467); with a "layer" norm, x is x − mean(x)
        (arXiv 1607.06450)."""

    def norm_heads(self, x: V, heads: int, norm: Norm, eps: float) -> V:
        """:meth:`norm` of each of ``heads`` equal parts of x by itself, with the same weight, or, where the
        weight is as wide as x, with its own part of it."""

    def linear(self, name: str, x: V, weight: W, bias: Vector | None = None) -> V:
        """x · weightᵀ + bias, for ``weight`` (rows, width of x)."""

    def rotate(self, x: V, heads: int, head_dim: int, rope: Rope, first: int = 0) -> V:
        """Turn the pairs (a, b) of each head by the angle φ of the token's position and of the pair:
        (a cos φ − b sin φ, a sin φ + b cos φ) (arXiv 2104.09864). Style "norm" pairs (2i, 2i + 1), "neox"
        (i, i + dim / 2), counted from ``first`` on; other values of a head stay."""

    def attend(self, query: V, key: V | None, value: V | None, how: Attention) -> V:
        """Σ_s softmax_s(score) · value_s over the positions s up to the token's own (with a window: the last
        ``how.window`` of them, with chunks: from the last multiple of ``how.chunk`` on), where score =
        how.scale · query·key_s, soft-capped (arXiv 2408.00118: c · tanh(score / c)) where there is a cap.
        With ``how.alibi``, the slope of the head for that largest bias times the distance of s is taken from
        the score (arXiv 2108.12409); ``how.sinks`` are scores of no position, which take part in the
        softmax's sum alone (arXiv 2309.17453). Query head h reads the key head h · kv_heads / heads. Keys and
        values (T, kv_heads · head_dim) are kept for later tokens, and for later layers that have none of
        their own: those read what the layer ``how.layer`` kept."""

    def activate(self, gate: V, up: V | None, how: Activation) -> V:
        """act(gate) · up, or act(gate); of drelu, relu(gate) · relu(up)."""

    def clamp(self, x: V, limit: float) -> V:
        """x between −limit and limit."""

    def join(self, x: V, y: V, factor: float = 1.0) -> V:
        """The residual stream x + factor · y."""

    def copy(self, name: str, x: V) -> V:
        """x, which stays as it is."""

    def scale(self, x: V, factor: float) -> V:
        """x · factor."""

    def softcap(self, x: V, cap: float) -> V:
        """cap · tanh(x / cap)."""

    def experts(
        self,
        scores: V,
        x: V,
        routing: Routing,
        expert: Callable[[int, V], V],
        choice_bias: Vector | None,
    ) -> V:
        """Σ weight_e · expert(e, x) over the ``routing.used`` experts with the largest scores (T, experts),
        lower ones first where scores tie; weights are the softmax of the scores (arXiv 2401.04088), divided
        by their sum over the chosen ones where ``routing.normalized``; other kinds of routers, and what
        ``choice_bias`` does: :func:`powerinfer_kernels.reference_experts.route`. With
        ``routing.weigh_input``, Σ expert(e, weight_e · x)."""

    def weigh(self, x: V, score: V) -> V:
        """sigmoid(score) · x, for ``score`` (T, 1)."""

    def part(self, name: str, x: V, first: int, count: int) -> V:
        """``count`` columns of x from ``first`` on."""

    def scale_by_position(self, x: V, how: PositionScale) -> V:
        """x_t · (1 + how.scale · ln(⌊(position(t) + how.offset) / how.length⌋ + 1))."""

    def times(self, x: V, y: V | Vector, repeat: int = 1) -> V:
        """x · y, where each value of y counts for ``repeat`` neighbouring columns of x; a vector is the same
        for all tokens."""

    def combine(self, name: str, x: V, factors: V, width: int) -> V:
        """Vectors of ``width`` values that lie side by side, made of those in x: vector b is Σ_a
        factors[b, a] · vector a of x, for ``factors`` (T, made · those in x)."""

    def keep_top(self, x: V, deviations: float) -> V:
        """max(x − mean − ``deviations`` · standard deviation, 0), token by token, with exact zeros."""

    def plus(self, x: V, vector: Vector) -> V:
        """x + ``vector`` (width of x)."""

    def unit_heads(self, x: V, heads: int, eps: float) -> V:
        """Each of ``heads`` equal parts of x over the root of eps + its sum of squares."""

    def convolve(self, name: str, x: V, weight: Table, bias: Vector | None, first: int, *, silu: bool) -> V:
        """bias + Σ_j weight_j · x_{t − length + 1 + j}, channel by channel, over the columns of x from
        ``first`` on, for ``weight`` (length, width); zeros before the first token; silu of that, where asked
        for."""

    def scan_channels(self, name: str, x: V, steps: V, vectors: V, decay: Table, direct: Vector) -> V:
        """S_ic = e^(step_c · decay_ic) S_ic + step_c · b_i · x_c from token to token, and Σ_i c_i S_ic +
        direct_c · x_c (arXiv 2312.00752); ``vectors`` (T, 2 · size) are b and c, ``decay`` (size, width)."""

    def scan_heads(
        self, name: str, x: V, steps: V, decay: Vector, direct: Vector, sizes: RecurrentSizes
    ) -> V:
        """As :meth:`scan_channels`, with one step, decay and direct factor for each head (arXiv 2405.21060);
        x (T, inner + 2 · groups · state) holds x, and b and c of each group."""

    def delta_net(
        self, name: str, both: V, x: V, decay: V, rate: V, sizes: RecurrentSizes, *, interleaved: bool
    ) -> V:
        """S = e^decay S; S += k (rate · (v − Sᵀk))ᵀ; Sᵀq / √state, head by head (arXiv 2412.06464); decay
        (T, heads · state) has a factor for each row of S (arXiv 2510.26692). ``both``
        (T, 2 · groups · state) are queries and keys; values are the last ``inner`` columns of x; which key
        head a head takes: :class:`~powerinfer_tools.model.recurrent.DeltaNet`."""

    def general_delta(
        self, name: str, query: V, key: V, value: V, decay: V, unit: V, rate: V, heads: int
    ) -> V:
        """S = diag(e^decay) S − (unit · rate) (Sᵀ unit)ᵀ + key valueᵀ; Sᵀ query, head by head (RWKV-7, arXiv
        2503.14456)."""

    def per_head(self, name: str, x: V, matrices: Sequence[W], rest: int) -> V:
        """For each head of x, the first values times its matrix, then its last ``rest`` values as they are;
        ``matrices`` are one for each head."""

    def gather_heads(self, name: str, heads: int, parts: Sequence[HeadPart[V]]) -> V:
        """For each head its columns of each part, side by side."""

    def replace_first(self, x: V, y: V) -> V:
        """x with y in place of its first columns."""
