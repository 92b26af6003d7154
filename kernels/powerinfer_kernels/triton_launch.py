"""Launching the Triton kernels on torch tensors; the only module that other packages use of them.

Tensors are contiguous, float32 unless said, on one device; outputs are written, not returned, so that nothing
is allocated and a CUDA graph can hold the launches. Importing this module imports Triton.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import triton

from . import triton_attention as attention
from . import triton_elementwise as elementwise
from . import triton_experts as experts
from . import triton_ffn as kernels
from .row_types import RowType
from .triton_decode import tiles
from .triton_layout import PLANAR_TYPES, SPLIT_ROWS

Tensor = Any
#: The oldest GPUs that Triton compiles for (Turing).
LEAST_CAPABILITY = (7, 5)
#: Rows in a program's tile, by kernel.
DOT_BLOCK, SUM_BLOCK, UNPACK_BLOCK = 8, 8, 8
ADD_BLOCK = 256
#: Positions of the KV cache that a program of attention takes at a time; the fewest that it takes in all, and
#: the most programs for one head.
KEYS_BLOCK, LEAST_SPLIT, MOST_SPLITS = 32, 256, 64
#: Values that a program rounds.
ROUND_VALUES = 512
WARPS = 4


@dataclass(frozen=True)
class PlanarRows:
    """Rows of one matrix on the device: uint8 [rows · row bytes] as ``to_planar`` gives them."""

    data: Tensor
    row_type: RowType
    rows: int
    columns: int

    def __post_init__(self) -> None:
        assert self.row_type in PLANAR_TYPES


def aligned(floats: int) -> int:
    """``floats`` rounded up to whole lines of memory, so that what follows can be read in wide pieces."""
    return -(-floats // 64) * 64


def splits(rows: int) -> int:
    """Partial sums of ``rows`` rows."""
    return -(-rows // SPLIT_ROWS)


def matvec(x: Tensor, matrix: PlanarRows, out: Tensor, bias: Tensor | None = None) -> None:
    """out (T, rows) = x (T, columns) · rowsᵀ + bias (rows,)."""
    grid = (triton.cdiv(matrix.rows, DOT_BLOCK), len(x))
    kernels.matvec_kernel[grid](
        x, matrix.data, bias, out, matrix.rows,
        COLUMNS=matrix.columns, TYPE=int(matrix.row_type), BLOCK=DOT_BLOCK, **options(),
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
        COLUMNS=gate.columns, GATE_TYPE=int(gate.row_type), UP_TYPE=int((up or gate).row_type),
        ACT=kernels.ACTIVATIONS[kind], BLOCK=DOT_BLOCK, **options(),
    )  # fmt: skip


def sum_rows(h: Tensor, down: PlanarRows, partial: Tensor, out: Tensor) -> None:
    """out (T, columns) = Σ h_i · row i for h (T, rows); rows with h_i = 0 are not read. ``partial`` is
    scratch, at least (T, splits(rows), columns)."""
    count, tokens = splits(down.rows), len(h)
    kernels.partial_sums_kernel[tiles(down.columns, int(down.row_type)), count, tokens](
        h, down.data, partial, down.rows, count,
        COLUMNS=down.columns, TYPE=int(down.row_type), ROWS=SPLIT_ROWS, BLOCK=SUM_BLOCK, **options(),
    )  # fmt: skip
    kernels.add_splits_kernel[triton.cdiv(down.columns, ADD_BLOCK), tokens](
        partial, out, count, COLUMNS=down.columns, BLOCK=ADD_BLOCK, **options()
    )


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
        COLUMNS=gate.columns, GATE_TYPE=int(gate.row_type), UP_TYPE=int(up.row_type),
        ACT=kernels.ACTIVATIONS[kind], BLOCK=DOT_BLOCK, **options(),
    )  # fmt: skip


def expert_sums(hidden: Tensor, down: PlanarRows, places: Tensor, factors: Tensor, out: Tensor) -> None:
    """out (1, width) += Σ_k factor_k · (down of expert ``places``[k] · hidden_k) for ``hidden`` (K, neurons),
    in that order; ``factors`` (K,), ``down`` the rows of all experts."""
    width = out.shape[1]
    experts.expert_sums_kernel[(triton.cdiv(width, DOT_BLOCK),)](
        hidden, down.data, places, factors, out, width, down.rows, len(hidden),
        COLUMNS=down.columns, TYPE=int(down.row_type), BLOCK=DOT_BLOCK, **options(),
    )  # fmt: skip


def unpack(matrix: PlanarRows, first: int, count: int, out: Tensor) -> None:
    """out (count, columns) = rows ``first`` … ``first + count``."""
    grid = (triton.cdiv(count, UNPACK_BLOCK), tiles(matrix.columns, int(matrix.row_type)))
    kernels.unpack_kernel[grid](
        matrix.data, out, matrix.rows, first, count,
        COLUMNS=matrix.columns, TYPE=int(matrix.row_type), BLOCK=UNPACK_BLOCK, **options(),
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


def attend(
    query: Tensor, keys: Vectors, values: Vectors, position: Tensor, partial: Tensor, out: Tensor, *,
    scale: float, window: int, softcap: float,
) -> None:  # fmt: skip
    """out (1, heads · head_dim) = softmax(scale · q kᵀ) v for ``query`` of the same shape, which stands at
    ``position`` int64 (1,) and sees the positions up to it, ``window`` back (0: all); ``softcap`` of the
    scores (0: none); ``partial`` as :func:`partial_floats` says."""
    kv_heads, context, dim = keys.data.shape
    heads, split, wide = query.shape[1] // dim, split_positions(context), int(triton.next_power_of_2(dim))
    splits = -(-context // split)
    shape = {"DIM": dim, "WIDE": wide, "WINDOW": window, "SPLIT": split}
    attention.attend_kernel[heads, splits](
        query, keys.data, keys.scales, values.data, values.scales, position, partial, context, splits,
        float(scale), float(softcap),
        **shape, GROUP=heads // kv_heads, CAPPED=softcap > 0, BLOCK=KEYS_BLOCK, **options(),
    )  # fmt: skip
    attention.combine_kernel[(heads,)](
        partial, position, out, splits, **shape, SPLITS=int(triton.next_power_of_2(splits)), **options()
    )


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, exact: Tensor, rounded: Tensor | None, *,
    layer: bool,
) -> None:  # fmt: skip
    """exact (1, groups · width) = the norm of x by root mean square, or of a ``layer`` by mean and
    deviation, of each ``width`` values by themselves, times ``weight`` (width,) + ``bias``; may be in place.
    ``rounded``: the same as the integer kernels take it."""
    width = len(weight)
    wide = max(32, int(triton.next_power_of_2(width)))
    elementwise.norm_kernel[(x.shape[1] // width,)](
        x, weight, bias, exact, rounded, float(eps), WIDTH=width, WIDE=wide, LAYER=layer, **exactly(wide)
    )


def round_values(x: Tensor, out: Tensor) -> None:
    """out (1, columns) = x as the integer kernels take it."""
    count = x.shape[1]
    grid = (triton.cdiv(count, ROUND_VALUES),)
    elementwise.round_kernel[grid](x, out, count, VALUES=ROUND_VALUES, **exactly(ROUND_VALUES))


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
        DIM=dim, WIDE=max(32, int(triton.next_power_of_2(dim))), **exactly(),
    )  # fmt: skip


def exactly(values: int = 0) -> dict[str, Any]:
    """As :func:`options`, but each product and each sum is rounded, as in the C kernels; for programs over so
    many ``values``."""
    return {"num_warps": 8 if values > 2048 else WARPS, "enable_fp_fusion": False}


def options() -> dict[str, Any]:
    """How all kernels are compiled: products and sums may be fused to one rounding."""
    return {"num_warps": WARPS, "enable_fp_fusion": True}
