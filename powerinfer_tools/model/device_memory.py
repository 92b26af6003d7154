"""The device memory that the hot side needs besides weights and KV cache. The planner, ``--vram`` and the
allocation all use the numbers of this module.

Weights are stored as in the file, without padding; pieces begin on boundaries of 256 bytes, which
:func:`overhead` pays for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from powerinfer_tools.model.counting import HEAD_ROWS
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.tensors import Stack, Weight

_F32 = 4
#: Rows that torch operations unpack at a time; bounds the scratch memory of the device.
CHUNK_ROWS = 512
#: Queries, and positions of the KV cache, that attention takes at a time. The first may not be the larger.
QUERIES_AT_ONCE, KEYS_AT_ONCE = 16, 512
#: Tokens whose scores a predictor holds at a time.
TOKENS_AT_ONCE = 32
#: Part of a GPU's budget for memory that is not requested by name: code and CUDA graphs, which the driver
#: places, and the rounding of allocators. Stated, not measured; see :func:`overhead`.
OVERHEAD = 32 << 20
#: Divisor for small budgets: an eighth of the budget is overhead, as few units are placed in it.
_OVERHEAD_PART = 8
#: Left free of a GPU's memory, besides, when no budget is given.
MARGIN = 256 << 20


@dataclass(frozen=True)
class HotSize:
    """Bytes on the hot device: weights, the KV cache of its attention blocks, and scratch. ``experts``: the
    experts' part of the weights, of which a token reads only the experts that a router chooses."""

    weights: int
    scratch: int
    cache: int = 0
    experts: int = 0

    @property
    def total(self) -> int:
        """Bytes of weights, cache and scratch."""
        return self.weights + self.cache + self.scratch


@dataclass(frozen=True)
class Widths:
    """The sizes that scratch memory depends on, in values."""

    width: int
    query_width: int
    kv_width: int
    heads: int
    vocabulary: int


@dataclass(frozen=True)
class ExpertWidths:
    """The sizes that the scratch of experts depends on, in values: the model's width, the most neurons of an
    expert that may be hot, the kinds of input (exact, rounded), and the experts of a token, the shared one
    included."""

    width: int
    neurons: int
    inputs: int
    taken: int

    @classmethod
    def of(cls, layers: Sequence[ExpertsFFN | DenseFFN], used: int) -> "ExpertWidths":
        """Of a model whose tokens take ``used`` experts; a dense FFN is one that every token takes."""
        return cls(
            width=input_matrices(layers[0])[0].columns,
            neurons=max(map(_most_neurons, layers)),
            inputs=len({weight.row_type.is_float for layer in layers for weight in input_matrices(layer)}),
            taken=used + 1,
        )

    @property
    def longest_row(self) -> int:
        """Most values of a row, and most rows of a matrix."""
        return max(self.width, self.neurons)


def _most_neurons(layer: ExpertsFFN | DenseFFN) -> int:
    """Neurons of the layer's widest expert."""
    if isinstance(layer, DenseFFN):
        return layer.up.rows
    shared = 0 if layer.shared is None else layer.shared.up.rows
    return max(layer.up.rows // layer.router.rows, shared)


def input_matrices(layer: ExpertsFFN | DenseFFN) -> list[Weight | Stack]:
    """The matrices that the layer's input is multiplied with: gates and ups."""
    if isinstance(layer, DenseFFN):
        return [*layer.matrices[:-1]]
    shared = [] if layer.shared is None else [*layer.shared.matrices[:-1]]
    return [*layer.stacks[:-1], *shared]


def overhead(budget: int) -> int:
    """Bytes of a GPU's ``budget`` that are not for weights, KV cache and scratch: :data:`OVERHEAD`, or an
    eighth of less than eight times that."""
    return min(OVERHEAD, budget // _OVERHEAD_PART)


def budget_for(nbytes: int) -> int:
    """The smallest budget that leaves ``nbytes`` for weights, KV cache and scratch."""
    return nbytes + min(OVERHEAD, max(0, nbytes - 1) // (_OVERHEAD_PART - 1))


def rows_at_once(chunks: Sequence[int], tokens: int) -> int:
    """Rows that fused kernels unpack at a time, in batches of ``tokens``. Unpacking takes no steps then, so
    all that is counted for it may hold rows, three times each of ``chunks`` (in values), but for what longer
    products (three of (tokens, rows)) take."""
    row = max(chunks) // CHUNK_ROWS
    return max(CHUNK_ROWS, (3 * sum(chunks) + 3 * tokens * CHUNK_ROWS) // max(1, row + 3 * tokens) // 64 * 64)


def neuron_scratch_bytes(width: int, most: int, tokens: int) -> int:
    """For ``most`` hot neurons a layer and ``tokens`` tokens: the input and the output (tokens, width), three
    (tokens, chunk) products, and a chunk of rows in float32 with as much again twice for the steps of
    unpacking it."""
    chunk = min(CHUNK_ROWS, most)
    return _F32 * (tokens * (2 * width + 3 * chunk) + 3 * chunk * width)


def experts_scratch_floats(widths: ExpertWidths, tokens: int) -> dict[str, int]:
    """Floats of each piece of scratch: for ``tokens`` tokens the inputs of a layer and of one expert, the
    layer's output, two products, and which tokens take an expert with what weight; and a chunk of rows."""
    each = tokens * widths.width
    pieces = {f"input {kind}": each for kind in range(widths.inputs)}
    pieces |= {f"taken {kind}": each for kind in range(widths.inputs)}
    most = max(tokens, widths.taken)  # a single token's experts are computed at once
    pieces |= {"out": each, "gate": most * widths.neurons, "up": tokens * widths.neurons}
    longest = widths.longest_row
    return pieces | {"routes": 2 * tokens * widths.taken, "chunk": min(CHUNK_ROWS, longest) * longest}


def experts_scratch_bytes(widths: ExpertWidths, tokens: int) -> int:
    """Bytes of all pieces, of two more chunks for the steps of unpacking, and of the products of a chunk."""
    pieces = experts_scratch_floats(widths, tokens)
    products = tokens * min(CHUNK_ROWS, widths.longest_row)
    return _F32 * (sum(pieces.values()) + 2 * pieces["chunk"] + products)


def attention_scratch_bytes(widths: Widths, tokens: int, context: int) -> int:
    """The residual stream, the cold side's part, a block's output, and the input of attention and of the FFN,
    exact and rounded; queries, what was attended to, exact and rounded; keys and values; the steps of norms
    and rounding; scores; keys unpacked; and a chunk of rows as in :func:`neuron_scratch_bytes`. Of a single
    token, what is rounded is kept as fused kernels take it, too: in less than a third of the space."""
    widest = max(widths.width, widths.query_width)
    kept = 7 * widths.width + 3 * widths.query_width + 2 * widths.kv_width + 4 * widest
    scores = QUERIES_AT_ONCE * widths.heads * (context + KEYS_AT_ONCE)
    unpacked = 3 * KEYS_AT_ONCE * widths.kv_width + 3 * CHUNK_ROWS * widest
    codes = widths.width + widths.query_width
    return _F32 * (tokens * (kept + 2 + CHUNK_ROWS) + codes + scores + unpacked)


def router_scratch_bytes(width: int, experts: int, tokens: int) -> int:
    """The scores of ``tokens`` tokens by routers of layers whose attention is on the device, with as much
    again for a chunk's products, and the sum of hot experts. Rows are unpacked in the same space as rows of
    attention."""
    return _F32 * tokens * (2 * (experts + 1) + width)


def predictor_scratch_bytes(width: int, neurons: int, tokens: int) -> int:
    """Which neurons are named (a byte each, and as much again to tell the host), and for a few tokens at a
    time their scores, compared and counted, the stream and its short form, exact and rounded. Rows are
    unpacked where those of neurons are."""
    few = min(TOKENS_AT_ONCE, tokens)
    return 2 * tokens * neurons + _F32 * few * (3 * neurons + 8 * width)


def head_scratch_bytes(widths: Widths, tokens: int) -> int:
    """Logits, the rows they are made from, exact and rounded, with the steps of the norm; and a chunk of
    rows as in :func:`neuron_scratch_bytes`."""
    rows = min(HEAD_ROWS, tokens)
    return _F32 * (rows * (2 * widths.vocabulary + 6 * widths.width) + (3 * CHUNK_ROWS + 1) * widths.width)
