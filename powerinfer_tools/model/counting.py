"""The bytes and operations of a model, counted by going through its blocks.

:class:`CountingOperations` implements the vocabulary of :mod:`powerinfer_tools.model.operations` and computes
nothing: a value is a buffer's name and width. The planner, the hot side, the engine's checks of memory and
``inspect`` all take their numbers from here.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from powerinfer_formats.block_types import TensorType
from powerinfer_tools.model.hyperparameter_types import PositionScale, RecurrentSizes, Rope, Routing
from powerinfer_tools.model.matrices import TILE_ROWS, MatrixShape, round_up
from powerinfer_tools.model.operations import Activation, Attention, HeadPart
from powerinfer_tools.model.tensors import Norm, Table, Vector, Weight

KVType = Literal["f16", "q8_0"]
#: Rows of logits that the head computes at a time; 32 rows of a 150,000-token vocabulary are 19 MB.
HEAD_ROWS = 32
_F32, _F16, _BLOCK = 4, 2, 32


def held_bytes(values: int, kind: str) -> int:
    """Bytes of the keys, or of the values, of one head at one position: half precision, or with "q8_0" a byte
    a value and half precision for each 32."""
    return values + _F16 * (values // _BLOCK) if kind == "q8_0" else values * _F16


def quantised_bytes(columns: int) -> int:
    """One row of quantised activations: a byte per value, two floats per block. Widths without whole blocks
    have no quantised copy."""
    return columns + 2 * _F32 * (columns // _BLOCK) if columns % _BLOCK == 0 else 0


@dataclass(frozen=True)
class KeyValues:
    """The keys and values of ``kv_heads`` heads that one layer keeps for each position; ``window``: the most
    positions that it reads, 0 for all."""

    kv_heads: int
    head_dim: int
    value_dim: int
    window: int = 0

    def position_bytes(self, kind: str) -> int:
        """Bytes of one position."""
        return self.kv_heads * (held_bytes(self.head_dim, kind) + held_bytes(self.value_dim, kind))

    def nbytes(self, context: int, kind: str) -> int:
        """Bytes at ``context`` positions, without padding: what a hot device allocates."""
        return context * self.position_bytes(kind)

    def tiled_nbytes(self, context: int, kind: str) -> int:
        """Bytes of the CPU's cache of ``context`` positions, whose keys are in tiles of 16 positions."""
        padding = round_up(context, TILE_ROWS) - context
        return self.nbytes(context, kind) + padding * self.kv_heads * held_bytes(self.head_dim, kind)

    def bytes_read(self, position: int, kind: str) -> int:
        """Bytes that decoding at ``position`` reads."""
        return self.position_bytes(kind) * min(position, self.window or position)


@dataclass
class Footprint:
    """The counts. ``matrices`` are the matrices of products; ``table_bytes`` are read row by row, as in the
    file; ``vector_bytes`` are norms, biases and other small weights; ``caches`` are the caches of layers with
    attention; ``state_bytes`` is the state that recurrent layers keep of a text; ``buffers`` are activations,
    float32 values of one token by name, with the quantised copies that exist, by name and width;
    ``pair_bytes`` of a token for the experts that it takes; ``expert_bytes``: the packed size of the experts'
    matrices, of which a token reads only the chosen experts; ``operations`` by name; ``products``:
    multiplications of one token."""

    matrices: list[MatrixShape] = field(default_factory=list)
    table_bytes: int = 0
    vector_bytes: int = 0
    caches: list[KeyValues] = field(default_factory=list)
    state_bytes: int = 0
    buffers: dict[str, int] = field(default_factory=dict)
    rounded: set[tuple[str, int]] = field(default_factory=set)
    pair_bytes: int = 0
    expert_bytes: int = 0
    ropes: set[Rope] = field(default_factory=set)
    growths: set[PositionScale] = field(default_factory=set)
    operations: Counter[str] = field(default_factory=Counter)
    products: int = 0

    @classmethod
    def sum(cls, parts: "Iterable[Footprint]") -> "Footprint":
        """The footprint of blocks that are computed one after the other, and share their buffers."""
        total = cls()
        for part in parts:
            total.matrices += part.matrices
            total.caches += part.caches
            for name in ("table_bytes", "vector_bytes", "state_bytes", "products", "expert_bytes"):
                setattr(total, name, getattr(total, name) + getattr(part, name))
            for name, width in part.buffers.items():
                total.buffers[name] = max(total.buffers.get(name, 0), width)
            total.pair_bytes = max(total.pair_bytes, part.pair_bytes)
            total.rounded |= part.rounded
            total.ropes |= part.ropes
            total.growths |= part.growths
            total.operations += part.operations
        return total

    @property
    def packed_nbytes(self) -> int:
        """Matrices as tiles of the CPU kernels."""
        return sum(matrix.packed_nbytes for matrix in self.matrices)

    @property
    def file_nbytes(self) -> int:
        """Matrices as in the file."""
        return sum(matrix.file_nbytes for matrix in self.matrices)

    @property
    def row_nbytes(self) -> int:
        """Matrices as plain rows, which is how a hot device has them."""
        return sum(matrix.nbytes for matrix in self.matrices)

    @property
    def packed_by_type(self) -> dict[str, int]:
        """:attr:`packed_nbytes` by row type, the largest first."""
        sizes: Counter[str] = Counter()
        for matrix in self.matrices:
            sizes[matrix.row_type.name] += matrix.packed_nbytes
        return dict(sizes.most_common())

    @property
    def token_bytes(self) -> int:
        """Activations of one token of a batch."""
        floats = sum(self.buffers.values())
        copies = sum(quantised_bytes(width) for _, width in self.rounded)
        return _F32 * floats + copies + self.pair_bytes

    def cache_bytes(self, context: int, kind: str) -> int:
        """The KV caches of a session of ``context`` positions."""
        return sum(cache.tiled_nbytes(context, kind) for cache in self.caches)

    def table_bytes_of(self, context: int) -> int:
        """Cosines and sines, and growths of queries, of every position."""
        return context * _F32 * (sum(rope.dim for rope in self.ropes) + len(self.growths))


@dataclass(frozen=True)
class Counted:
    """A value: the buffer that it lies in, and its width."""

    name: str
    width: int


class CountingOperations:
    """Adds to :attr:`counted`. ``aliases``: names that share the buffers of other names."""

    def __init__(self, aliases: dict[str, str] | None = None) -> None:
        self.counted, self._aliases = Footprint(), aliases or {}

    def embed(self, name: str, table: Weight, scale: float) -> Counted:
        """Its table stays as in the file."""
        self._count("embed")
        self.counted.table_bytes += _shape(table).file_nbytes
        return self.made(name, table.columns)

    def embed_positions(self, x: Counted, table: Weight, offset: int) -> Counted:
        """As :meth:`embed`."""
        self._count("embed_positions")
        self.counted.table_bytes += _shape(table).file_nbytes
        self.made("block_out", table.columns)
        return x

    def norm(self, name: str, x: Counted, norm: Norm, eps: float) -> Counted:
        """Its weights."""
        self._count("norm")
        self.counted.vector_bytes += norm.nbytes
        return self.made(name, x.width)

    def norm_heads(self, x: Counted, heads: int, norm: Norm, eps: float) -> Counted:
        """Its weights."""
        self._count("norm_heads")
        self.counted.vector_bytes += norm.nbytes
        return x

    def linear(self, name: str, x: Counted, weight: Weight, bias: Vector | None = None) -> Counted:
        """A matrix, its bias, and its input rounded."""
        self.vectors(bias)
        return self.rows(name, x, _shape(weight))

    def rotate(self, x: Counted, heads: int, head_dim: int, rope: Rope, first: int = 0) -> Counted:
        """The tables."""
        self._count("rotate")
        self.counted.ropes.add(rope)
        return x

    def attend(self, query: Counted, key: Counted | None, value: Counted | None, how: Attention) -> Counted:
        """The cache, where the layer has one of its own."""
        self._count("attend")
        self.vectors(how.sinks)
        window = how.window or how.chunk
        if key is not None:
            self.counted.caches.append(KeyValues(how.kv_heads, how.head_dim, how.value_dim, window))
        return self.made("attended", how.heads * how.value_dim)

    def activate(self, gate: Counted, up: Counted | None, how: Activation) -> Counted:
        """In place."""
        self._count("activate")
        return gate

    def combine(self, name: str, x: Counted, factors: Counted, width: int) -> Counted:
        """A buffer."""
        self._count("combine")
        return self.made(name, factors.width * width // x.width * width)

    def keep_top(self, x: Counted, deviations: float) -> Counted:
        """In place."""
        self._count("keep_top")
        return x

    def clamp(self, x: Counted, limit: float) -> Counted:
        """In place."""
        self._count("clamp")
        return x

    def join(self, x: Counted, y: Counted, factor: float = 1.0) -> Counted:
        """In place."""
        self._count("join")
        return x

    def copy(self, name: str, x: Counted) -> Counted:
        """A buffer."""
        self._count("copy")
        return self.made(name, x.width)

    def scale(self, x: Counted, factor: float) -> Counted:
        """In place."""
        self._count("scale")
        return x

    def scale_by_position(self, x: Counted, how: PositionScale) -> Counted:
        """The table."""
        self._count("scale_by_position")
        self.counted.growths.add(how)
        return x

    def softcap(self, x: Counted, cap: float) -> Counted:
        """In place."""
        self._count("softcap")
        return x

    def experts(
        self,
        scores: Counted,
        x: Counted,
        routing: Routing,
        expert: Callable[[int, Counted], Counted],
        choice_bias: Vector | None,
    ) -> Counted:
        """All have the shape of the first. Each pair of a token and an expert that it takes has an input,
        products and an output of its own, with quantised copies."""
        self._count("experts")
        self.vectors(choice_bias)
        outer, self.counted = self.counted, Footprint()
        expert(0, x)
        one, self.counted = self.counted, outer
        outer.matrices += one.matrices * routing.experts
        outer.expert_bytes += one.packed_nbytes * routing.experts
        outer.vector_bytes += one.vector_bytes * routing.experts
        outer.products += one.products * routing.used
        outer.operations += one.operations
        floats = x.width + sum(one.buffers.values())
        copies = sum(quantised_bytes(width) for _, width in one.rounded)
        outer.pair_bytes = max(outer.pair_bytes, routing.used * (_F32 * (floats + 2) + copies))
        outer.rounded.add((self._buffer(x.name), x.width))
        self.made("shared_score", 1)
        self.made("shared_weight", 1)
        return self.made("block_out", x.width)

    def weigh(self, x: Counted, score: Counted) -> Counted:
        """In place."""
        self._count("weigh")
        return x

    def part(self, name: str, x: Counted, first: int, count: int) -> Counted:
        """A buffer."""
        self._count("part")
        return self.made(name, count)

    def times(self, x: Counted, y: Counted | Vector, repeat: int = 1) -> Counted:
        """In place."""
        self._count("times")
        self.vectors(None if isinstance(y, Counted) else y)
        return x

    def plus(self, x: Counted, vector: Vector) -> Counted:
        """In place."""
        self._count("plus")
        self.vectors(vector)
        return x

    def unit_heads(self, x: Counted, heads: int, eps: float) -> Counted:
        """In place."""
        self._count("unit_heads")
        return x

    def convolve(
        self, name: str, x: Counted, weight: Table, bias: Vector | None, first: int, *, silu: bool
    ) -> Counted:
        """Its inputs are kept."""
        self._count("convolve")
        length, width = weight.shape
        self.vectors(weight, bias)
        return self._kept(name, width, (length - 1) * width)

    def scan_channels(
        self, name: str, x: Counted, steps: Counted, vectors: Counted, decay: Table, direct: Vector
    ) -> Counted:
        """S is kept."""
        self._count("scan_channels")
        size, width = decay.shape
        self.vectors(decay, direct)
        return self._kept(name, width, size * width)

    def scan_heads(
        self, name: str, x: Counted, steps: Counted, decay: Vector, direct: Vector, sizes: RecurrentSizes
    ) -> Counted:
        """S is kept."""
        self._count("scan_heads")
        self.vectors(decay, direct)
        return self._kept(name, sizes.inner, sizes.state * sizes.inner)

    def delta_net(
        self,
        name: str,
        both: Counted,
        x: Counted,
        decay: Counted,
        rate: Counted,
        sizes: RecurrentSizes,
        *,
        interleaved: bool,
    ) -> Counted:
        """S is kept."""
        self._count("delta_net")
        return self._kept(name, sizes.inner, sizes.state * sizes.inner)

    def general_delta(
        self,
        name: str,
        query: Counted,
        key: Counted,
        value: Counted,
        decay: Counted,
        unit: Counted,
        rate: Counted,
        heads: int,
    ) -> Counted:
        """S is kept."""
        self._count("general_delta")
        return self._kept(name, value.width, query.width // heads * value.width)

    def per_head(self, name: str, x: Counted, matrices: Sequence[Weight], rest: int) -> Counted:
        """A matrix for each head."""
        self._count("per_head")
        self.matrices(*map(_shape, matrices))
        return self.made(name, len(matrices) * (matrices[0].rows + rest))

    def gather_heads(self, name: str, heads: int, parts: Sequence[HeadPart[Counted]]) -> Counted:
        """A buffer."""
        self._count("gather_heads")
        return self.made(name, heads * sum(part.count for part in parts))

    def replace_first(self, x: Counted, y: Counted) -> Counted:
        """In place."""
        self._count("replace_first")
        return x

    def tokens(self, *, with_positions: bool) -> None:
        """The inputs set for each token before a pass: its id, and its row in a table of positions."""
        self.made("tokens", 2 if with_positions else 1)

    def rows(self, name: str, x: Counted, matrix: MatrixShape) -> Counted:
        """As :meth:`linear`, for a matrix that is given by its shape alone."""
        self._count("linear")
        self.matrices(matrix)
        self.counted.rounded.add((self._buffer(x.name), x.width))
        return self.made(name, matrix.rows)

    def matrices(self, *matrices: MatrixShape) -> None:
        """Add matrices of products."""
        self.counted.matrices += matrices
        self.counted.products += sum(matrix.rows * matrix.columns for matrix in matrices)

    def bits(self, packed: npt.NDArray[np.uint8]) -> None:
        """Weights of one bit."""
        self.counted.vector_bytes += packed.nbytes

    def _count(self, operation: str) -> None:
        self.counted.operations[operation] += 1

    def vectors(self, *vectors: Vector | Table | None) -> None:
        """Norms, biases and the like; None: there is none."""
        self.counted.vector_bytes += sum(vector.nbytes for vector in vectors if vector is not None)

    def _kept(self, name: str, width: int, floats: int) -> Counted:
        self.counted.state_bytes += _F32 * floats
        return self.made(name, width)

    def _buffer(self, name: str) -> str:
        return self._aliases.get(name, name)

    def made(self, name: str, width: int) -> Counted:
        """A value in the buffer of that name."""
        buffer = self._buffer(name)
        self.counted.buffers[buffer] = max(self.counted.buffers.get(buffer, 0), width)
        return Counted(name, width)


def _shape(weight: Weight) -> MatrixShape:
    return MatrixShape(TensorType(weight.row_type), weight.rows, weight.columns)
