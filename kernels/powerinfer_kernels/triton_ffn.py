"""Triton kernels of the hot side: products of rows with a vector, the hidden values of an FFN, sums of rows.

All read planar rows (:mod:`powerinfer_kernels.triton_layout`). Products of codes with codes are whole numbers
within a block, as in the C kernels; everything else is float32. Nothing is added in an order that could
change from run to run: every sum is made by one program in a fixed order, and there are no atomics. Rows that
are not asked for are not read.

Parameters carry no annotations but constexpr, since Triton reads them; shapes stand in the docstrings.
"""

import triton
import triton.language as tl

from .triton_decode import (
    BLOCKS,
    NVFP4,
    VALUES,
    dp4a,
    half_of,
    has_halves,
    has_minimum,
    is_float,
    load_codes,
    load_scales,
    load_values,
    signed_byte,
    tiles,
)

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
    """Σ_c x_c · w_rc for each of ``row`` [R], 0 where not ``live`` [R]. ``x`` are float32 [COLUMNS], or for
    rows of codes also int32: what :func:`powerinfer_kernels.triton_elementwise.store_codes` writes."""
    if x.dtype.element_ty == tl.int32:
        out = code_dot(x, base, rows, row, live, COLUMNS, TYPE)
    elif is_float(TYPE):
        out = value_dot(x, base, row, live, COLUMNS, TYPE)
    else:
        out = weight_dot(x, base, rows, row, live, COLUMNS, TYPE)
    return out


@triton.jit
def of_token(x, token, COLUMNS: tl.constexpr):
    """Where the row of ``token`` begins in x."""
    words: tl.constexpr = COLUMNS // 4 + COLUMNS // 32 if x.dtype.element_ty == tl.int32 else COLUMNS
    return x + token.to(tl.int64) * words


@triton.jit
def blocks_of(tile, live, COLUMNS: tl.constexpr):
    """The blocks [1, BLOCKS] of a tile, and which of them may be read in each row: [R, BLOCKS]."""
    block = tile * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    return block, live[:, None] & (block < COLUMNS // 32)


@triton.jit
def code_dot(x, base, rows, row, live, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """:func:`dot` of codes with codes, in whole numbers within each block, as the C kernels do it; blocks are
    added with one rounding each, in BLOCKS sums that are added at the end."""
    scales = (x + COLUMNS // 4).to(tl.pointer_type(tl.float32), bitcast=True)
    i = tl.arange(0, 4)[None, None, :]
    acc = tl.zeros((row.shape[0], BLOCKS), tl.float32)
    for tile in tl.range(tiles(COLUMNS, TYPE), num_stages=STAGES):
        block, there = blocks_of(tile, live, COLUMNS)
        low, high = load_codes(base, rows, row[:, None], block, there, COLUMNS, TYPE)
        mask = block < COLUMNS // 32
        at = x + block[:, :, None] * 8 + i
        x_low = tl.load(at, mask=mask[:, :, None], other=0)
        x_high = tl.load(at + 4, mask=mask[:, :, None], other=0)
        x_scale = tl.load(scales + block, mask=mask, other=0.0)
        scale, first, second, minimum, below, above = load_scales(
            base, rows, row[:, None], block, there, COLUMNS, TYPE
        )
        if TYPE == NVFP4:
            both = first * tl.sum(dp4a(low, x_low, low & 0), axis=2).to(tl.float32)
            total = tl.fma(second, tl.sum(dp4a(high, x_high, low & 0), axis=2).to(tl.float32), both)
        elif has_halves(TYPE):
            both = first * tl.sum(dp4a(low, x_low, low & 0), axis=2)
            total = (both + second * tl.sum(dp4a(high, x_high, low & 0), axis=2)).to(tl.float32)
        else:
            total = tl.sum(dp4a(high, x_high, dp4a(low, x_low, low & 0)), axis=2).to(tl.float32)
        acc = tl.fma(scale * x_scale, total, acc)
        if has_minimum(TYPE):
            first_sum = tl.sum(dp4a(x_low, (x_low & 0) + 0x01010101, x_low & 0), axis=2)
            second_sum = tl.sum(dp4a(x_high, (x_low & 0) + 0x01010101, x_low & 0), axis=2)
            acc = tl.fma(minimum, x_scale * (below * first_sum + above * second_sum).to(tl.float32), acc)
    return tl.sum(acc, axis=1)


@triton.jit
def value_dot(x, base, row, live, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """:func:`dot` of rows of floats."""
    acc = tl.zeros((row.shape[0], VALUES), tl.float32)
    for tile in tl.range(tiles(COLUMNS, TYPE), num_stages=STAGES):
        column = tile * VALUES + tl.arange(0, VALUES)
        values = tl.load(x + column, mask=column < COLUMNS, other=0.0)
        acc += values[None, :] * load_values(base, row[:, None], live[:, None], tile, COLUMNS, TYPE)
    return tl.sum(acc, axis=1)


@triton.jit
def weight_dot(x, base, rows, row, live, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    """:func:`dot` of rows of codes with float32."""
    i = tl.arange(0, 4)[None, None, :]
    acc = tl.zeros((row.shape[0], BLOCKS, 4), tl.float32)
    for tile in tl.range(tiles(COLUMNS, TYPE), num_stages=STAGES):
        block, there = blocks_of(tile, live, COLUMNS)
        codes = load_codes(base, rows, row[:, None], block, there, COLUMNS, TYPE)
        numbers = load_scales(base, rows, row[:, None], block, there, COLUMNS, TYPE)
        mask = (block < COLUMNS // 32)[:, :, None]
        for half in tl.static_range(2):
            for byte in tl.static_range(4):
                at = x + block[:, :, None] * 32 + (16 * half + byte) + 4 * i
                acc += tl.load(at, mask=mask, other=0.0) * weights(codes, numbers, half, byte, TYPE)
    return tl.sum(tl.sum(acc, axis=2), axis=1)


@triton.jit
def weights(codes, numbers, HALF: tl.constexpr, BYTE: tl.constexpr, TYPE: tl.constexpr):
    """float32 [R, BLOCKS, 4]: the weights in a half of each block whose codes are in byte BYTE of words."""
    scale, first, second, minimum, below, above = numbers
    code = signed_byte(codes[HALF], BYTE).to(tl.float32)
    out = half_of(scale, first, second, HALF) * code
    if has_minimum(TYPE):
        out += half_of(minimum, below, above, HALF)
    return out


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


@triton.jit(do_not_specialize=["rows", "factor"])
def matvec_kernel(x, base, bias, out, rows, factor, JOINS: tl.constexpr, COLUMNS: tl.constexpr,
                  TYPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out [T, rows] = x · rowsᵀ (+ bias [rows], or None), for x see :func:`dot`; where it JOINS, ``factor``
    times that is added to ``out``. Grid (⌈rows / BLOCK⌉, T)."""
    token = tl.program_id(1)
    x, out = of_token(x, token, COLUMNS), out + token.to(tl.int64) * rows
    some_products(x, base, bias, out, tl.program_id(0), rows, factor, JOINS, COLUMNS, TYPE, BLOCK)


@triton.jit
def some_products(x, base, bias, out, group, rows, factor, JOINS: tl.constexpr, COLUMNS: tl.constexpr,
                  TYPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Those of one token with BLOCK rows from row ``group`` · BLOCK on."""
    row = group * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    value = dot(x, base, rows, row, live, COLUMNS, TYPE)
    if bias is not None:
        value += tl.load(bias + row, mask=live, other=0.0)
    if JOINS:
        value = tl.load(out + row, mask=live, other=0.0) + factor * value
    tl.store(out + row, value, mask=live)


@triton.jit(do_not_specialize=["rows_0", "rows_1", "rows_2"])
def matvecs_kernel(x, base_0, base_1, base_2, bias_0, bias_1, bias_2, out_0, out_1, out_2, rows_0, rows_1,
                   rows_2, COLUMNS: tl.constexpr, TYPE_0: tl.constexpr, TYPE_1: tl.constexpr,
                   TYPE_2: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Products of one token with two matrices or three (``base_2`` None: two), as :func:`matvec_kernel` makes
    them. Grid (⌈rows / BLOCK⌉ of all)."""
    group = tl.program_id(0)
    second = tl.cdiv(rows_0, BLOCK)
    third = second + tl.cdiv(rows_1, BLOCK)
    if group < second:
        some_products(x, base_0, bias_0, out_0, group, rows_0, 1.0, False, COLUMNS, TYPE_0, BLOCK)
    elif group < third:
        some_products(x, base_1, bias_1, out_1, group - second, rows_1, 1.0, False, COLUMNS, TYPE_1, BLOCK)
    elif base_2 is not None:
        some_products(x, base_2, bias_2, out_2, group - third, rows_2, 1.0, False, COLUMNS, TYPE_2, BLOCK)


@triton.jit(do_not_specialize=["rows", "cut"])
def hidden_kernel(x_gate, x_up, gate, up, bias, active, out, rows, cut, COLUMNS: tl.constexpr,
                  GATE_TYPE: tl.constexpr, UP_TYPE: tl.constexpr, ACT: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """out [T, rows] = act(gate rows · x_gate + bias) · (up rows · x_up), for both x see :func:`dot`; ``up``
    None: the first factor; ``bias`` [rows], or None. Grid (⌈rows / BLOCK⌉, T).

    Neurons whose ``active`` [T, rows] (uint8, or None: all) is 0 give 0 and none of their rows is read; with
    the ReLU family neither is an up row whose gate is not above ``cut`` (0 but for fatrelu).
    """
    token = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = token.to(tl.int64) * rows + row
    live = row < rows
    if active is not None:
        live = live & (tl.load(active + at, mask=live, other=0) != 0)
    first = dot(of_token(x_gate, token, COLUMNS), gate, rows, row, live, COLUMNS, GATE_TYPE)
    if bias is not None:
        first += tl.load(bias + row, mask=live, other=0.0)
    value = activate(first, cut, ACT)
    if up is not None:
        wanted = live
        if ACT <= FATRELU:
            wanted = live & (first > cut)
        second = dot(of_token(x_up, token, COLUMNS), up, rows, row, wanted, COLUMNS, UP_TYPE)
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
    hidden += token.to(tl.int64) * rows
    out += (token.to(tl.int64) * splits + split) * COLUMNS
    first, last = split * ROWS, tl.minimum(rows, (split + 1) * ROWS)
    if is_float(TYPE):
        values = tl.zeros((BLOCK, VALUES), tl.float32)
        for start in tl.range(first, last, BLOCK, num_stages=STAGES):
            row, h = some_hidden(hidden, start, last, BLOCK)
            values += h * load_values(base, row, h != 0, tile, COLUMNS, TYPE)
        column = tile * VALUES + tl.arange(0, VALUES)
        tl.store(out + column, tl.sum(values, axis=0), mask=column < COLUMNS)
    else:
        zero = tl.zeros((BLOCK, BLOCKS, 4), tl.float32)
        sums = (zero, zero, zero, zero, zero, zero, zero, zero)
        for start in tl.range(first, last, BLOCK, num_stages=STAGES):
            row, h = some_hidden(hidden, start, last, BLOCK)
            block = tile * BLOCKS + tl.arange(0, BLOCKS)[None, :]
            live = (h != 0) & (block < COLUMNS // 32)
            codes = load_codes(base, rows, row, block, live, COLUMNS, TYPE)
            numbers = load_scales(base, rows, row, block, live, COLUMNS, TYPE)
            added = ()
            for lane in tl.static_range(8):
                added = added + (
                    sums[lane] + h[:, :, None] * weights(codes, numbers, lane // 4, lane % 4, TYPE),
                )
            sums = added
        column = half_columns(tile)
        for half in tl.static_range(2):
            total = four_of(
                tl.sum(sums[4 * half], 0), tl.sum(sums[4 * half + 1], 0),
                tl.sum(sums[4 * half + 2], 0), tl.sum(sums[4 * half + 3], 0),
            )  # fmt: skip
            tl.store(out + column + 16 * half, tl.reshape(total, (16 * BLOCKS,)), mask=column < COLUMNS)


@triton.jit(do_not_specialize=["splits", "factor"])
def add_splits_kernel(partial, bias, out, splits, factor, JOINS: tl.constexpr, COLUMNS: tl.constexpr,
                      SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out [T, COLUMNS] = Σ over the splits of partial [T, splits, COLUMNS], in SPLITS sums that are added at
    the end (+ bias [COLUMNS], or None); where it JOINS, ``factor`` times that is added to ``out``. Grid
    (⌈COLUMNS / BLOCK⌉, T)."""
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < COLUMNS
    acc = tl.zeros((SPLITS, BLOCK), tl.float32)
    for first in tl.range(0, splits, SPLITS, num_stages=STAGES):
        split = first + tl.arange(0, SPLITS)[:, None]
        at = partial + (token * splits + split) * COLUMNS + column[None, :]
        acc += tl.load(at, mask=mask[None, :] & (split < splits), other=0.0)
    total = tl.sum(acc, axis=0)
    if bias is not None:
        total += tl.load(bias + column, mask=mask, other=0.0)
    out += token * COLUMNS + column
    if JOINS:
        total = tl.load(out, mask=mask, other=0.0) + factor * total
    tl.store(out, total, mask=mask)


@triton.jit
def some_hidden(hidden, start, last, BLOCK: tl.constexpr):
    """Rows [BLOCK, 1] from ``start`` on, and their hidden values; 0 from ``last`` on."""
    row = start + tl.arange(0, BLOCK)[:, None]
    return row, tl.load(hidden + row, mask=row < last, other=0.0)


@triton.jit
def half_columns(tile):
    """The columns of the first halves of a tile's blocks: [16 · BLOCKS]."""
    place = tl.arange(0, 16 * BLOCKS)
    return tile * (32 * BLOCKS) + place + place // 16 * 16


@triton.jit
def four_of(a, b, c, d):
    """[…, n] each, to […, n, 2, 2]: one of each after the other."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit(do_not_specialize=["rows", "first", "count"])
def unpack_kernel(base, out, rows, first, count, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """out [count, COLUMNS] = rows ``first`` … ``first + count`` as float32. Grid (⌈count / BLOCK⌉, tiles)."""
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    live, tile = local < count, tl.program_id(1)
    out += local.to(tl.int64) * COLUMNS
    if is_float(TYPE):
        column = tile * VALUES + tl.arange(0, VALUES)[None, :]
        values = load_values(base, first + local, live, tile, COLUMNS, TYPE)
        tl.store(out + column, values, mask=live & (column < COLUMNS))
    else:
        block = tile * BLOCKS + tl.arange(0, BLOCKS)[None, :]
        there = live & (block < COLUMNS // 32)
        codes = load_codes(base, rows, first + local, block, there, COLUMNS, TYPE)
        numbers = load_scales(base, rows, first + local, block, there, COLUMNS, TYPE)
        column = half_columns(tile)[None, :]
        for half in tl.static_range(2):
            values = four_of(
                weights(codes, numbers, half, 0, TYPE), weights(codes, numbers, half, 1, TYPE),
                weights(codes, numbers, half, 2, TYPE), weights(codes, numbers, half, 3, TYPE),
            )  # fmt: skip
            values = tl.reshape(values, (BLOCK, 16 * BLOCKS))
            tl.store(out + column + 16 * half, values, mask=live & (column < COLUMNS))
