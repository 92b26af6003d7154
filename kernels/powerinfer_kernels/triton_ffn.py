"""Triton kernels of the hot side: products of rows with a vector, the hidden values of an FFN, sums of rows.

All read planar rows (:mod:`powerinfer_kernels.triton_layout`) and compute in float32. Nothing is added in an
order that could change from run to run: every sum is made by one program in a fixed order, and there are no
atomics. Rows that are not asked for are not read.

Parameters carry no annotations but constexpr, since Triton reads them; shapes stand in the docstrings.
"""

import triton
import triton.language as tl

from .triton_decode import columns_of, lanes, load_codes, tile_words, tiles, weights

#: Kinds of activation, as numbers that kernels are compiled for; the first four skip where the gate is not
#: above the cut (0 but for fatrelu), since what they give there is zero.
ACTIVATIONS = {"relu": 0, "relu2": 1, "drelu": 2, "fatrelu": 3, "silu": 4, "gelu_tanh": 5, "gelu_erf": 6}
#: Tiles that are read ahead of the one that is computed, and this one: a GPU's memory answers after some
#: hundreds of cycles, in which one tile for each program leaves most of it idle.
STAGES = tl.constexpr(3)
RELU = tl.constexpr(0)
RELU2 = tl.constexpr(1)
DRELU = tl.constexpr(2)
FATRELU = tl.constexpr(3)
SILU = tl.constexpr(4)
GELU_TANH = tl.constexpr(5)


@triton.jit
def dot(x, base, rows, row, live, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """Σ_c x_c · w_rc for each of ``row`` [BLOCK], 0 where not ``live`` [BLOCK]."""
    acc = tl.zeros((row.shape[0], tile_words(TYPE)), tl.float32)
    for tile in tl.range(tiles(COLUMNS, TYPE), num_stages=STAGES):
        codes, high = load_codes(base, rows, row, tile, live[:, None], COLUMNS, TYPE)
        for lane in tl.static_range(lanes(TYPE)):
            columns = columns_of(tile, lane, COLUMNS, TYPE)
            values = tl.load(x + columns, mask=columns < COLUMNS, other=0.0)
            acc += values[None, :] * weights(
                codes, high, base, rows, row, tile, live[:, None], lane, COLUMNS, TYPE
            )
    return tl.sum(acc, axis=1)


@triton.jit
def tanh(x):
    """(1 − e^−2|x|) / (1 + e^−2|x|), with the sign of x: never overflows."""
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * tl.div_rn(1.0 - e, 1.0 + e)


@triton.jit
def activate(gate, cut, ACT: tl.constexpr):
    """The activation function; see :func:`powerinfer_kernels.reference.act`."""
    if ACT == SILU:
        out = tl.div_rn(gate, 1.0 + tl.exp(-gate))
    elif ACT == GELU_TANH:
        out = 0.5 * gate * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    elif ACT == RELU or ACT == DRELU:  # noqa: SIM109 - Triton has no `in`
        out = tl.maximum(gate, 0.0)
    elif ACT == FATRELU:
        out = tl.where(gate > cut, gate, 0.0)
    elif ACT == RELU2:
        positive = tl.maximum(gate, 0.0)
        out = positive * positive
    else:
        out = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return out


@triton.jit(do_not_specialize=["rows"])
def matvec_kernel(x, base, bias, out, rows, COLUMNS: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, rows] = x [T, COLUMNS] · rowsᵀ (+ bias [rows], or None). Grid (⌈rows / BLOCK⌉, T)."""
    token = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    value = dot(x + token * COLUMNS, base, rows, row, live, COLUMNS, TYPE)
    if bias is not None:
        value += tl.load(bias + row, mask=live, other=0.0)
    tl.store(out + token.to(tl.int64) * rows + row, value, mask=live)


@triton.jit(do_not_specialize=["rows", "cut"])
def hidden_kernel(x_gate, x_up, gate, up, bias, active, out, rows, cut, COLUMNS: tl.constexpr,
                  GATE_TYPE: tl.constexpr, UP_TYPE: tl.constexpr, ACT: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """out [T, rows] = act(gate rows · x_gate + bias) · (up rows · x_up), both x [T, COLUMNS]; ``up`` None:
    the first factor; ``bias`` [rows], or None. Grid (⌈rows / BLOCK⌉, T).

    Neurons whose ``active`` [T, rows] (uint8, or None: all) is 0 give 0 and none of their rows is read; with
    the ReLU family neither is an up row whose gate is not above ``cut`` (0 but for fatrelu).
    """
    token = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = token.to(tl.int64) * rows + row
    live = row < rows
    if active is not None:
        live = live & (tl.load(active + at, mask=live, other=0) != 0)
    first = dot(x_gate + token * COLUMNS, gate, rows, row, live, COLUMNS, GATE_TYPE)
    if bias is not None:
        first += tl.load(bias + row, mask=live, other=0.0)
    value = activate(first, cut, ACT)
    if up is not None:
        wanted = live
        if ACT <= FATRELU:
            wanted = live & (first > cut)
        second = dot(x_up + token * COLUMNS, up, rows, row, wanted, COLUMNS, UP_TYPE)
        if ACT == DRELU:
            second = tl.maximum(second, 0.0)
        value = tl.where(wanted, value * second, 0.0)
    tl.store(out + at, tl.where(live, value, 0.0), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "splits"])
def partial_sums_kernel(hidden, base, out, rows, splits, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
                        ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out [T, splits, COLUMNS] = Σ h_i · row i over ROWS rows for each split, for hidden [T, rows]; rows
    whose h is 0 are not read. Grid (tiles, splits, T)."""
    tile, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    zero = tl.zeros((BLOCK, tile_words(TYPE)), tl.float32)
    sums = ()
    for _ in tl.static_range(lanes(TYPE)):
        sums = sums + (zero,)
    for first in tl.range(0, tl.minimum(ROWS, rows - split * ROWS), BLOCK, num_stages=STAGES):
        row = split * ROWS + first + tl.arange(0, BLOCK)
        h = tl.load(hidden + token.to(tl.int64) * rows + row, mask=row < rows, other=0.0)[:, None]
        live = h != 0
        codes, high = load_codes(base, rows, row, tile, live, COLUMNS, TYPE)
        added = ()
        for lane in tl.static_range(lanes(TYPE)):
            w = weights(codes, high, base, rows, row, tile, live, lane, COLUMNS, TYPE)
            added = added + (sums[lane] + h * w,)
        sums = added
    out += (token.to(tl.int64) * splits + split) * COLUMNS
    for lane in tl.static_range(lanes(TYPE)):
        columns = columns_of(tile, lane, COLUMNS, TYPE)
        tl.store(out + columns, tl.sum(sums[lane], axis=0), mask=columns < COLUMNS)


@triton.jit(do_not_specialize=["splits"])
def add_splits_kernel(partial, out, splits, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, COLUMNS] = Σ over the splits of partial [T, splits, COLUMNS], from the first to the last. Grid
    (⌈COLUMNS / BLOCK⌉, T)."""
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < COLUMNS
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        at = partial + (token.to(tl.int64) * splits + split) * COLUMNS + column
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(out + token.to(tl.int64) * COLUMNS + column, acc, mask=mask)


@triton.jit(do_not_specialize=["rows", "first", "count"])
def unpack_kernel(base, out, rows, first, count, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """out [count, COLUMNS] = rows ``first`` … ``first + count`` as float32. Grid (⌈count / BLOCK⌉, tiles)."""
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = (local < count)[:, None]
    tile = tl.program_id(1)
    codes, high = load_codes(base, rows, first + local, tile, live, COLUMNS, TYPE)
    for lane in tl.static_range(lanes(TYPE)):
        columns = columns_of(tile, lane, COLUMNS, TYPE)[None, :]
        w = weights(codes, high, base, rows, first + local, tile, live, lane, COLUMNS, TYPE)
        tl.store(out + local.to(tl.int64)[:, None] * COLUMNS + columns, w, mask=live & (columns < COLUMNS))
