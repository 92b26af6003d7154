"""Triton kernels for the experts that one token takes: all of them at once, whichever they are.

The experts of a layer lie one after the other in a matrix of each kind, planar as one. Which of them to
compute is read on the device, so the same launches do for every token. An expert of place -1 is none: its
rows are below 0, and nothing is read.

Parameters carry no annotations but constexpr, since Triton reads them; shapes stand in the docstrings.
"""

import triton
import triton.language as tl

from .triton_ffn import DRELU, FATRELU, activate, dot


@triton.jit(do_not_specialize=["rows", "total", "cut"])
def expert_hidden_kernel(x_gate, x_up, gate, up, places, out, rows, total, cut, COLUMNS: tl.constexpr,
                         GATE_TYPE: tl.constexpr, UP_TYPE: tl.constexpr, ACT: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    """out [K, rows] = act(gate rows · x_gate) · (up rows · x_up) of the experts in ``places`` int32 [K], both
    x [COLUMNS]; of each expert ``rows`` of the ``total``. Grid (⌈rows / BLOCK⌉, K).

    With the ReLU family no up row is read whose gate is not above ``cut`` (0 but for fatrelu).
    """
    taken = tl.program_id(1)
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(places + taken) * rows + local
    live = (local < rows) & (row >= 0)
    first = dot(x_gate, gate, total, row, live, COLUMNS, GATE_TYPE)
    value = activate(first, cut, ACT)
    wanted = live
    if ACT <= FATRELU:
        wanted = live & (first > cut)
    second = dot(x_up, up, total, row, wanted, COLUMNS, UP_TYPE)
    if ACT == DRELU:
        second = tl.maximum(second, 0.0)
    tl.store(out + taken * rows + local, tl.where(wanted, value * second, 0.0), mask=local < rows)


@triton.jit(do_not_specialize=["rows", "total", "count"])
def expert_sums_kernel(hidden, base, places, factors, out, rows, total, count, COLUMNS: tl.constexpr,
                       TYPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out [rows] += Σ_k factor_k · (rows of expert ``places``[k] · hidden_k), k from the first to the last,
    for hidden [count, COLUMNS]; of each expert ``rows`` of the ``total``. Grid (⌈rows / BLOCK⌉,)."""
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = local < rows
    acc = tl.load(out + local, mask=mask, other=0.0)
    for taken in range(count):
        row = tl.load(places + taken) * rows + local
        live = mask & (row >= 0)
        value = dot(hidden + taken * COLUMNS, base, total, row, live, COLUMNS, TYPE)
        acc += tl.where(live, tl.load(factors + taken) * value, 0.0)
    tl.store(out + local, acc, mask=mask)
