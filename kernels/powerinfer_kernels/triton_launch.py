"""Launching the Triton kernels on torch tensors; the only module that other packages use of them.

Tensors are contiguous, float32 unless said, on one device; outputs are written, not returned, so that nothing
is allocated and a CUDA graph can hold the launches. Importing this module imports Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import triton

from . import triton_attention as attention
from . import triton_elementwise as elementwise
from . import triton_experts as experts
from . import triton_ffn as kernels
from .row_types import RowType
from .triton_decode import tiles
from .triton_layout import PLANAR_TYPES, SPLIT_ROWS, form_of

Tensor = Any
#: The oldest GPUs that Triton compiles for (Turing).
LEAST_CAPABILITY = (7, 5)
#: Rows in a program's tile, by kernel.
DOT_BLOCK, SUM_BLOCK, UNPACK_BLOCK = 8, 8, 8
#: Columns, and splits, whose partial sums a program adds at a time.
ADD_BLOCK, ADD_SPLITS = 32, 16
#: Positions of the KV cache that a program of attention takes at a time; the fewest that it takes in all, and
#: the most programs for one head.
KEYS_BLOCK, LEAST_SPLIT, MOST_SPLITS = 32, 64, 128
#: Values that a program rounds, or joins.
ROUND_VALUES = 512
WARPS = 4
#: Values above which a program has twice as many warps.
MOST_VALUES = 2048


@dataclass(frozen=True)
class PlanarRows:
    """Rows of one matrix on the device: uint8 [rows · packed row bytes] as ``to_planar`` gives them."""

    data: Tensor
    row_type: RowType
    rows: int
    columns: int

    def __post_init__(self) -> None:
        assert self.row_type in PLANAR_TYPES

    @property
    def kind(self) -> int:
        """The number that kernels are compiled for."""
        return int(form_of(self.row_type))


def aligned(floats: int) -> int:
    """``floats`` rounded up to whole lines of memory, so that what follows can be read in wide pieces."""
    return -(-floats // 64) * 64


def code_words(columns: int) -> int:
    """Words of a row of so many activations as :func:`round_values` leaves it: codes, then scales."""
    return columns // 4 + columns // 32


def splits(rows: int) -> int:
    """Partial sums of ``rows`` rows."""
    return -(-rows // SPLIT_ROWS)


def matvec(
    x: Tensor, matrix: PlanarRows, out: Tensor, bias: Tensor | None = None, joins: float | None = None
) -> None:
    """out (T, rows) = x (T, columns) · rowsᵀ + bias (rows,), or where it ``joins``, that times so much is
    added to ``out``. Where the matrix has codes, x may be codes, too: int32 (T, :func:`code_words`)."""
    grid = (triton.cdiv(matrix.rows, DOT_BLOCK), len(x))
    kernels.matvec_kernel[grid](
        x, matrix.data, bias, out, matrix.rows, 1.0 if joins is None else joins, JOINS=joins is not None,
        COLUMNS=matrix.columns, TYPE=matrix.kind, BLOCK=DOT_BLOCK, **options(),
    )  # fmt: skip


def matvecs(
    x: Tensor, matrices: Sequence[PlanarRows], outs: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> None:
    """:func:`matvec` of one token with two or three matrices of as many columns."""
    (a, b, *rest), third = matrices, len(matrices) > 2
    c = rest[0] if third else b
    programs = sum(triton.cdiv(matrix.rows, DOT_BLOCK) for matrix in matrices)
    kernels.matvecs_kernel[(programs,)](
        x, a.data, b.data, c.data if third else None, *biases, *(() if third else (None,)),
        *outs, *(() if third else (None,)), a.rows, b.rows, c.rows,
        COLUMNS=a.columns, TYPE_0=a.kind, TYPE_1=b.kind, TYPE_2=c.kind, BLOCK=DOT_BLOCK, **options(),
    )  # fmt: skip


def hidden(
    x_gate: Tensor, x_up: Tensor, gate: PlanarRows, up: PlanarRows | None, activation: tuple[str, float],
    out: Tensor, *, bias: Tensor | None = None, active: Tensor | None = None,
) -> None:  # fmt: skip
    """out (T, neurons) = act(gate · x_gate + bias) · (up · x_up); ``activation`` has the cut of fatrelu
    beside its name; ``active`` uint8 (T, neurons) or None: all."""
    kind, cut = activation
    grid = (triton.cdiv(gate.rows, DOT_BLOCK), len(x_gate))
    kernels.hidden_kernel[grid](
        x_gate, x_up, gate.data, None if up is None else up.data, bias, active, out, gate.rows,
        float(cut) if kind == "fatrelu" else 0.0,
        COLUMNS=gate.columns, GATE_TYPE=gate.kind, UP_TYPE=(up or gate).kind,
        ACT=kernels.ACTIVATIONS[kind], BLOCK=DOT_BLOCK, **options(),
    )  # fmt: skip


def sum_rows(
    h: Tensor, down: PlanarRows, partial: Tensor, out: Tensor, bias: Tensor | None = None,
    joins: float | None = None,
) -> None:  # fmt: skip
    """out (T, columns) = Σ h_i · row i + bias (columns,) for h (T, rows), or where it ``joins``, that times
    so much is added to ``out``; rows with h_i = 0 are not read. ``partial`` is scratch, at least
    (T, splits(rows), columns)."""
    count, tokens = splits(down.rows), len(h)
    kernels.partial_sums_kernel[tiles(down.columns, down.kind), count, tokens](
        h, down.data, partial, down.rows, count,
        COLUMNS=down.columns, TYPE=down.kind, ROWS=SPLIT_ROWS, BLOCK=SUM_BLOCK, **options(),
    )  # fmt: skip
    kernels.add_splits_kernel[triton.cdiv(down.columns, ADD_BLOCK), tokens](
        partial, bias, out, count, 1.0 if joins is None else joins, JOINS=joins is not None,
        COLUMNS=down.columns, SPLITS=ADD_SPLITS, BLOCK=ADD_BLOCK, **options(),
    )  # fmt: skip


def expert_hidden(
    x_gate: Tensor, x_up: Tensor, gate: PlanarRows, up: PlanarRows, places: Tensor,
    activation: tuple[str, float], out: Tensor,
) -> None:  # fmt: skip
    """out (K, neurons) = act(gate · x_gate) · (up · x_up) of the experts ``places`` int32 (K,), -1 for none,
    for one token (1, columns); ``gate`` and ``up`` are the rows of all experts."""
    kind, cut = activation
    count, neurons = out.shape
    experts.expert_hidden_kernel[triton.cdiv(neurons, DOT_BLOCK), count](
        x_gate, x_up, gate.data, up.data, places, out, neurons, gate.rows,
        float(cut) if kind == "fatrelu" else 0.0,
        COLUMNS=gate.columns, GATE_TYPE=gate.kind, UP_TYPE=up.kind,
        ACT=kernels.ACTIVATIONS[kind], BLOCK=DOT_BLOCK, **options(),
    )  # fmt: skip


def expert_sums(hidden: Tensor, down: PlanarRows, places: Tensor, factors: Tensor, out: Tensor) -> None:
    """out (1, width) += Σ_k factor_k · (down of expert ``places``[k] · hidden_k) for ``hidden`` (K, neurons),
    in that order; ``factors`` (K,), ``down`` the rows of all experts."""
    width = out.shape[1]
    experts.expert_sums_kernel[(triton.cdiv(width, DOT_BLOCK),)](
        hidden, down.data, places, factors, out, width, down.rows, len(hidden),
        COLUMNS=down.columns, TYPE=down.kind, BLOCK=DOT_BLOCK, **options(),
    )  # fmt: skip


def unpack(matrix: PlanarRows, first: int, count: int, out: Tensor) -> None:
    """out (count, columns) = rows ``first`` … ``first + count``."""
    grid = (triton.cdiv(count, UNPACK_BLOCK), tiles(matrix.columns, matrix.kind))
    kernels.unpack_kernel[grid](
        matrix.data, out, matrix.rows, first, count,
        COLUMNS=matrix.columns, TYPE=matrix.kind, BLOCK=UNPACK_BLOCK, **options(),
    )  # fmt: skip


class Vectors(Protocol):
    """Keys, or values, of every position."""

    @property
    def data(self) -> Tensor:
        """float16 or int8 (kv_heads, context, head_dim)."""

    @property
    def scales(self) -> Tensor | None:
        """Of int8: float16 (kv_heads, context, head_dim / 32)."""


def split_positions(context: int) -> int:
    """Positions in a split of a cache of ``context`` positions: a power of two."""
    return max(LEAST_SPLIT, int(triton.next_power_of_2(-(-context // MOST_SPLITS))))


def partial_floats(heads: int, head_dim: int, context: int) -> int:
    """Scratch of :func:`attend`."""
    return heads * -(-context // split_positions(context)) * (head_dim + 2)


@dataclass(frozen=True)
class Turn:
    """How queries and keys are rotated: ``cos`` and ``sin`` (context, rope_dim / 2) of every position; pairs
    are (i, i + rope_dim / 2) with ``neox``, else (2i, 2i + 1)."""

    cos: Tensor
    sin: Tensor
    neox: bool


def attend(
    query: Tensor, key: Tensor, value: Tensor, keys: Vectors, values: Vectors, position: Tensor,
    partial: Tensor, out: Tensor, rounded: Tensor | None = None, codes: Tensor | None = None, *,
    scale: float, window: int, softcap: float, turn: Turn | None = None,
) -> None:  # fmt: skip
    """out (1, heads · head_dim) = softmax(scale · q kᵀ) v for ``query`` of the same shape, which stands at
    ``position`` int64 (1,) and sees the positions up to it, ``window`` back (0: all); ``softcap`` of the
    scores (0: none); ``partial`` as :func:`partial_floats` says. ``key`` and ``value`` (1, kv_heads ·
    head_dim) are those of that position, and are kept; with ``turn``, queries and keys are rotated first.
    ``rounded`` and ``codes``: out as :func:`round_values` leaves it, for heads of whole blocks of 32."""
    kv_heads, context, dim = keys.data.shape
    heads, split = query.shape[1] // dim, split_positions(context)
    splits = -(-context // split)
    shape = {"DIM": dim, "WIDE": _wide(dim), "WINDOW": window, "SPLIT": split}
    rotary = {"HALF": 0 if turn is None else turn.cos.shape[1], "NEOX": turn is not None and turn.neox}
    attention.attend_kernel[heads, splits](
        query, key, value, None if turn is None else turn.cos, None if turn is None else turn.sin,
        keys.data, keys.scales, values.data, values.scales, position, partial, context, splits,
        float(scale), float(softcap),
        **shape, **rotary, GROUP=heads // kv_heads, CAPPED=softcap > 0, BLOCK=KEYS_BLOCK, **exactly(),
    )  # fmt: skip
    attention.combine_kernel[(heads,)](
        partial, position, out, rounded, codes, splits, **shape, SPLITS=int(triton.next_power_of_2(splits)),
        **exactly(MOST_SPLITS * dim),
    )  # fmt: skip


def _wide(dim: int) -> int:
    return max(32, int(triton.next_power_of_2(dim)))


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, exact: Tensor, rounded: Tensor | None,
    codes: Tensor | None = None, *, layer: bool,
) -> None:  # fmt: skip
    """exact (1, groups · width) = the norm of x by root mean square, or of a ``layer`` by mean and
    deviation, of each ``width`` values by themselves, times ``weight`` (width,) + ``bias``; may be in place.
    ``rounded`` and ``codes``: the same as :func:`round_values` leaves it."""
    width = len(weight)
    wide = _wide(width)
    elementwise.norm_kernel[(x.shape[1] // width,)](
        x,
        weight,
        bias,
        exact,
        rounded,
        codes,
        float(eps),
        WIDTH=width,
        WIDE=wide,
        LAYER=layer,
        **exactly(wide),
    )


def round_values(x: Tensor, rounded: Tensor | None, codes: Tensor | None = None) -> None:
    """x (1, columns) as the integer kernels take it: in float32, and as int32 (1, :func:`code_words`)."""
    count = x.shape[1]
    grid = (triton.cdiv(count, ROUND_VALUES),)
    elementwise.round_kernel[grid](x, rounded, codes, count, VALUES=ROUND_VALUES, **exactly(ROUND_VALUES))


def join(x: Tensor, first: Tensor, second: Tensor | None, bias: Tensor | None, factor: float) -> None:
    """x += factor · (first + second + bias), all of them of x's size; in this order."""
    count = x.numel()
    elementwise.join_kernel[(triton.cdiv(count, ROUND_VALUES),)](
        x, first, second, bias, float(factor), count, VALUES=ROUND_VALUES, **exactly(ROUND_VALUES)
    )


def rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, position: Tensor, head_dim: int, *, neox: bool
) -> None:
    """Rotate the pairs of each head of ``query`` and ``key`` (1, heads · head_dim) in place by the angles of
    ``position`` int64 (1,); ``cos`` and ``sin`` (context, rope_dim / 2)."""
    heads, half = query.shape[1] // head_dim, cos.shape[1]
    elementwise.rotate_kernel[(heads + key.shape[1] // head_dim,)](
        query, key, cos, sin, position,
        HEADS=heads, DIM=head_dim, HALF=half, WIDE=int(triton.next_power_of_2(half)), NEOX=neox, **exactly(),
    )  # fmt: skip


def store(key: Tensor, value: Tensor, keys: Vectors, values: Vectors, position: Tensor) -> None:
    """Keep ``key`` and ``value`` (1, kv_heads · head_dim) at ``position`` int64 (1,)."""
    kv_heads, context, dim = keys.data.shape
    elementwise.store_kernel[kv_heads, 2](
        key, value, keys.data, keys.scales, values.data, values.scales, position, context,
        DIM=dim, WIDE=_wide(dim), **exactly(),
    )  # fmt: skip


def exactly(values: int = 0) -> dict[str, Any]:
    """As :func:`options`, but each product and each sum is rounded, as in the C kernels; for programs over so
    many ``values``."""
    return {"num_warps": 2 * WARPS if values > MOST_VALUES else WARPS, "enable_fp_fusion": False}


def options() -> dict[str, Any]:
    """How all kernels are compiled: products and sums may be fused to one rounding."""
    return {"num_warps": WARPS, "enable_fp_fusion": True}
