"""Mixtures of experts in a program: the router's choice, and the computation of the chosen experts.

Every array is [max_tokens, width] float32 unless stated otherwise. A token and one of its experts are a pair;
arrays of pairs are [max_tokens · used, width], and the rows of one expert are neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ._kernels import KernelError
from .buffers import Activations, aligned
from .checks import Array, Floats, check_apart, check_array, check_positive
from .matrix import Layout, Matrix
from .program import Op
from .units import UNITS_AHEAD, Units
from .vector_builder import VectorOperations, activation_cut, activation_number, finite

#: How a router's scores become weights, in the order of the numbers in C.
ROUTER_KINDS = ("softmax", "sigmoid")
MAX_EXPERTS = 1024
#: Activations that make a neuron zero where its gate is not above the cut.
EXACT_ZEROS = ("relu", "relu2", "drelu", "fatrelu")
#: Matrices of experts by number; None for an expert that is computed elsewhere.
Matrices = Sequence[Matrix | None]
#: The arrays of :class:`Activations`, or None where nothing is rounded.
_Quantized = tuple[Array | None, Array | None, Array | None]
_NONE: _Quantized = (None, None, None)


@dataclass(frozen=True)
class Choice:
    """A router's choice: `chosen` int32 [max_tokens, used], ascending, and `weights` float32 of the same
    shape."""

    experts: int
    used: int
    chosen: npt.NDArray[np.int32]
    weights: Floats

    @classmethod
    def new(cls, max_tokens: int, experts: int, used: int) -> "Choice":
        """Arrays for the choice of up to `max_tokens` tokens. KernelError unless 0 < used ≤ experts ≤
        1024."""
        check_positive(max_tokens=max_tokens, experts=experts, used=used)
        if used > experts or experts > MAX_EXPERTS:
            raise KernelError(f"cannot choose {used} of {experts} experts (at most {MAX_EXPERTS})")
        shape = (max_tokens, used)
        return cls(experts, used, aligned(shape, np.int32), aligned(shape, np.float32))


@dataclass(frozen=True)
class ExpertWeights:
    """Σ over the chosen experts of weight · down(act(gate) · up), with biases [experts, rows] or without;
    act(gate) alone if there is no `up`. Experts that are None in `down` are computed elsewhere. Products of
    a matrix that has a scale are times that, before the bias.

    If the layout of `up` is picked rows and that of `down` is picked columns, only rows and columns of
    neurons with a gate above the cut are read, with the same bits. The activation must be zero below the cut
    (`EXACT_ZEROS`)."""

    gate: Matrices
    up: Matrices | None
    down: Matrices
    gate_bias: Floats | None = None
    up_bias: Floats | None = None
    down_bias: Floats | None = None


@dataclass(frozen=True)
class ExpertBuffers:
    """Scratch arrays of pairs, which layers may share: the pairs' input, both products, and the output."""

    rows: Floats  # (P, width)
    rows_acts: Activations | None
    gate: Floats  # (P, neurons)
    up: Floats | None
    hidden_acts: Activations | None
    out: Floats  # (P, width)

    @classmethod
    def new(cls, pairs: int, width: int, neurons: int, *, gated: bool) -> "ExpertBuffers":
        """Buffers for up to `pairs` pairs; quantised forms where the widths are multiples of 32."""
        return cls(
            rows=aligned((pairs, width), np.float32),
            rows_acts=None if width % 32 else Activations(pairs, width),
            gate=aligned((pairs, neurons), np.float32),
            up=aligned((pairs, neurons), np.float32) if gated else None,
            hidden_acts=None if neurons % 32 else Activations(pairs, neurons),
            out=aligned((pairs, width), np.float32),
        )

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        acts = [a for a in (self.rows_acts, self.hidden_acts) if a is not None]
        floats = [a for a in (self.rows, self.gate, self.up, self.out) if a is not None]
        return sum(a.q.nbytes + a.d.nbytes + a.s.nbytes for a in acts) + sum(f.nbytes for f in floats)


class ExpertOperations(VectorOperations):
    """The part of a program's builder that knows routers and experts. All methods raise KernelError for
    arrays that do not fit."""

    def route(
        self,
        scores: Floats,
        choice: Choice,
        *,
        kind: str = "softmax",
        bias: Floats | None = None,
        groups: int = 1,
        groups_used: int = 1,
        normalized: bool = False,
        scale: float = 1.0,
        shared: tuple[Floats, Floats] | None = None,
    ) -> None:
        """Choose the experts of each token by the router's `scores` [max_tokens, experts], in double.

        p = softmax(scores) or sigmoid(scores); the `used` experts with the largest p + `bias` [experts]
        (ties: the lower number) are chosen, among the `groups_used` groups of experts whose two largest
        values of p + `bias` have the largest sums (arXiv 2412.19437). The weight of an expert is scale · p.
        If `normalized`, p is first divided by the sum over the chosen experts (at least 2^-14); with softmax
        and without bias, that is the softmax over the chosen experts. If a score is NaN, so are all weights.
        `shared` are the scores [max_tokens, 1] of a shared expert and an array for their sigmoids.
        """
        if kind not in ROUTER_KINDS:
            raise KernelError(f"router {kind!r} is not one of {', '.join(ROUTER_KINDS)}")
        self._check("scores", scores, choice.experts)
        self._check_choice(choice, written=True)
        if bias is not None:
            check_array("bias", bias, np.float32, (choice.experts,))
        check_positive(groups=groups, groups_used=groups_used)
        if choice.experts % groups or groups_used > groups:
            raise KernelError(f"cannot take {groups_used} of {groups} groups of {choice.experts} experts")
        if choice.experts // groups * groups_used < choice.used:
            raise KernelError(f"{groups_used} of {groups} groups have fewer than {choice.used} experts")
        for name, array in zip(("score", "weight"), shared or (None, None), strict=True):
            if array is not None:
                self._check(f"shared {name}", array, 1, written=name == "weight")
        integers = (
            choice.experts,
            choice.used,
            groups,
            groups_used,
            ROUTER_KINDS.index(kind),
            int(normalized),
        )
        objects = (scores, bias, choice.chosen, choice.weights, *(shared or (None, None)))
        self._append(Op.ROUTE, objects, integers, (finite("scale", scale),))

    def experts(
        self,
        choice: Choice,
        src: Floats,
        activations: Activations | None,
        weights: ExpertWeights,
        buffers: ExpertBuffers,
        out: Floats,
        kind: str,
        *,
        cut: float = 0.0,
        accumulate: bool = False,
        weigh_input: bool = False,
    ) -> None:
        """out (+)= Σ weight · expert(src), in ascending order of experts; with `weigh_input` each expert
        reads weight · src instead. Experts that are computed elsewhere contribute nothing. `activations` are
        `src` rounded, if a row type needs them. A token's bits do not depend on the other tokens."""
        types = self._check_experts(choice, weights)
        width, neurons = types[2].rows, types[0].rows
        self._check("src", src, width)
        self._check("out", out, width, written=True)
        self._check_buffers(choice, buffers, width, neurons)
        floats = weigh_input or any(m.row_type.is_float for m in types[:2] if m is not None)
        token, rows, hidden = self._rounded_inputs(choice, activations, types, buffers)
        here, sparse = _handles(weights.gate), types[2].layout == Layout.PICKED_COLUMNS
        if sparse and kind not in EXACT_ZEROS:
            raise KernelError(f"no neuron of {kind} can be left out: it has no exact zeros")
        integers = (choice.experts, choice.used, self.max_tokens)
        chosen = (choice.chosen, choice.weights)
        gather = (width, int(weigh_input), int(floats))
        self._append(
            Op.EXPERT_GATHER, (*chosen, here, src, *token, buffers.rows, *rows), (*integers, *gather)
        )
        inputs = (src, *token, buffers.rows, *rows)
        of_tokens = int(not weigh_input)
        up = weights.up if buffers.up is not None else None
        pair = [(weights.gate, weights.gate_bias, buffers.gate), (up, weights.up_bias, buffers.up)]
        for index, (matrices, bias, result) in enumerate(pair):
            if matrices is not None and index == 1 and sparse:
                self._append(
                    Op.EXPERT_ROWS,
                    (choice.chosen, _handles(matrices), *inputs, bias, buffers.gate, result),
                    (*integers, of_tokens, neurons),
                    (activation_cut(kind, cut),),
                )
            elif matrices is not None:
                independent = int(index == 0 and up is not None and not sparse)
                self._append(
                    Op.EXPERT_MATMUL,
                    (choice.chosen, _handles(matrices), *inputs, bias, _scales(matrices), result),
                    (*integers, of_tokens, independent),
                )
        self._append(
            Op.EXPERT_ACTIVATE,
            (
                choice.chosen,
                here,
                buffers.gate,
                buffers.up if up is not None else None,
                buffers.gate,
                *hidden,
            ),
            (*integers, activation_number(kind), neurons),
            (activation_cut(kind, cut),),
        )
        down, bias = _handles(weights.down), weights.down_bias
        if sparse:
            self._append(Op.EXPERT_COLUMNS, (choice.chosen, down, *hidden, bias, buffers.out), integers)
        else:
            product = (buffers.gate, *hidden)
            self._append(
                Op.EXPERT_MATMUL,
                (choice.chosen, down, *product, *product, bias, _scales(weights.down), buffers.out),
                (*integers, 0, 0),
            )
        self._append(
            Op.EXPERT_SUM,
            (*chosen, here, buffers.out, out),
            (*integers, width, int(accumulate), int(not weigh_input)),
        )

    def fetch(
        self,
        units: Units,
        first: int,
        choice: Choice,
        ahead: Sequence[tuple[int, Choice]] = (),
    ) -> None:
        """Wait until the experts of `choice`, which are units from `first` on, are in memory. Before waiting,
        request the experts of `ahead` (first unit, choice), of up to two later layers, to be read meanwhile.
        Must come before operations on absent matrices."""
        groups = ((first, choice), *ahead)
        if len(groups) > 1 + UNITS_AHEAD:
            raise KernelError(f"units of {len(ahead)} layers ahead, of {UNITS_AHEAD} at most")
        for group, one in groups:
            self._check_choice(one)
            if not 0 <= group <= units.count - one.experts:
                raise KernelError(f"units {group} to {group + one.experts} are not among {units.count}")
        none = 1 + UNITS_AHEAD - len(groups)
        chosen = (*(one.chosen for _, one in groups), *[None] * none)
        sizes = [size for group, one in groups for size in (group, one.experts, one.used)]
        self._append(Op.FETCH, (units.handle, *chosen), (*sizes, *[0] * 3 * none))

    def fetch_all(self, units: Units, unit: int, ahead: Sequence[int] = ()) -> None:
        """Wait until `unit`, which every token takes, is in memory. Before waiting, request the units
        `ahead`, up to two, to be read meanwhile. Must come before operations on absent matrices."""
        groups = (unit, *ahead)
        if len(groups) > 1 + UNITS_AHEAD:
            raise KernelError(f"{len(ahead)} units ahead, of {UNITS_AHEAD} at most")
        if not all(0 <= one < units.count for one in groups):
            raise KernelError(f"units {groups} are not all among {units.count}")
        sizes = [size for one in groups for size in (one, 1, 1)]
        none = 1 + UNITS_AHEAD - len(groups)
        self._append(Op.FETCH, (units.handle, *[None] * (1 + UNITS_AHEAD)), (*sizes, *[0] * 3 * none))

    def count_experts(
        self,
        choice: Choice,
        totals: npt.NDArray[np.int64],
        counts: npt.NDArray[np.uint64] | None = None,
        gate_squares: npt.NDArray[np.float64] | None = None,
        up_squares: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Add one run, and the number of experts that any of its tokens took, to `totals` int64 [2]. Where
        given: add each expert's number of tokens to `counts` uint64 [experts], and their squared weights and
        ones to the two arrays of squares, float64 [experts]."""
        self._check_choice(choice)
        check_array("totals", totals, np.int64, (2,), written=True)
        parts = (counts, gate_squares, up_squares)
        if any(part is None for part in parts) and any(part is not None for part in parts):
            raise KernelError("counts and both squares go together")
        if counts is not None:
            check_array("counts", counts, np.uint64, (choice.experts,), written=True)
            for name, array in (("gate_squares", gate_squares), ("up_squares", up_squares)):
                check_array(name, array, np.float64, (choice.experts,), written=True)
        objects = (choice.chosen, choice.weights, totals, *parts)
        self._append(Op.EXPERT_COUNT, objects, (choice.experts, choice.used, self.max_tokens))

    def head_matmul(
        self,
        matrices: Sequence[Matrix],
        src: Floats,
        out: Floats,
        *,
        src_first: int = 0,
        src_step: int | None = None,
        out_first: int = 0,
        out_step: int | None = None,
    ) -> None:
        """For head h: columns of `src` from src_first + h · src_step on, times matrix h, go to the columns of
        `out` from out_first + h · out_step on (steps: as wide as the matrices unless given). Inputs of
        quantised rows are rounded to 8 bits here."""
        if not matrices:
            raise KernelError("head_matmul needs a matrix for each head")
        one = matrices[0]
        for matrix in matrices:
            if (matrix.rows, matrix.columns, matrix.row_type) != (one.rows, one.columns, one.row_type):
                raise KernelError("the matrices of heads must be of one size and type")
            if matrix.scale != 1.0:
                raise KernelError("the matrices of heads are times no scale")
        src_width, out_width = self._width("src", src), self._width("out", out)
        self._check("out", out, out_width, written=True)
        check_apart("out", out, {"src": src})
        steps = (one.columns if src_step is None else src_step, one.rows if out_step is None else out_step)
        last = len(matrices) - 1
        if src_first < 0 or steps[0] < 0 or src_first + last * steps[0] + one.columns > src_width:
            raise KernelError(f"heads of {one.columns} columns, {steps[0]} apart, do not fit {src_width}")
        if out_first < 0 or steps[1] < one.rows or out_first + last * steps[1] + one.rows > out_width:
            raise KernelError(f"heads of {one.rows} rows, {steps[1]} apart, do not fit {out_width}")
        integers = (len(matrices), self.max_tokens, src_width, src_first, steps[0])
        objects = (_handles(matrices), src, out)
        self._append(Op.HEAD_MATMUL, objects, (*integers, out_width, out_first, steps[1]))

    def _check_choice(self, choice: Choice, written: bool = False) -> None:
        shape = (self.max_tokens, choice.used)
        check_array("chosen", choice.chosen, np.int32, shape, written)
        check_array("weights", choice.weights, np.float32, shape, written)

    def _check_experts(self, choice: Choice, w: ExpertWeights) -> tuple[Matrix, Matrix | None, Matrix]:
        """One matrix of each kind; all others of that kind have the same size and type."""
        self._check_choice(choice)
        here = [matrix is not None for matrix in w.down]
        some: list[Matrix | None] = []
        for name, matrices in (("gate", w.gate), ("up", w.up), ("down", w.down)):
            if matrices is None:
                some.append(None)
                continue
            present = [matrix for matrix in matrices if matrix is not None]
            if len(matrices) != choice.experts or [m is not None for m in matrices] != here or not present:
                raise KernelError(f"{name} must have a matrix of every expert that is here, and one at least")
            if present[0].layout != Layout.TILES and any(m.scale != 1.0 for m in present):
                raise KernelError("picked rows and columns of experts are times no scale")
            sizes = {(m.rows, m.columns, m.row_type, m.layout) for m in present}
            if len(sizes) > 1:
                raise KernelError(f"the {name} matrices of experts must be of one size, type and layout")
            some.append(present[0])
        gate, up, down = some
        assert gate is not None
        assert down is not None
        rows = Layout.PICKED_ROWS if down.layout == Layout.PICKED_COLUMNS else Layout.TILES
        if gate.layout != Layout.TILES or down.layout == Layout.PICKED_ROWS or (up and up.layout != rows):
            raise KernelError("experts are tiles, or have picked rows of up and picked columns of down")
        for matrix in (gate, up):
            if matrix is not None and (matrix.rows, matrix.columns) != (down.columns, down.rows):
                raise KernelError(f"gate and up must be {down.columns} rows of {down.rows} columns")
        for name, bias, matrix in (
            ("gate_bias", w.gate_bias, gate),
            ("up_bias", w.up_bias, up),
            ("down_bias", w.down_bias, down),
        ):
            if bias is not None:
                if matrix is None:
                    raise KernelError(f"{name} has no matrix")
                check_array(name, bias, np.float32, (choice.experts, matrix.rows))
        return gate, up, down

    def _check_buffers(self, choice: Choice, buffers: ExpertBuffers, width: int, neurons: int) -> None:
        pairs = self.max_tokens * choice.used
        check_array("rows", buffers.rows, np.float32, (pairs, width), written=True)
        check_array("gate", buffers.gate, np.float32, (pairs, neurons), written=True)
        check_array("out", buffers.out, np.float32, (pairs, width), written=True)
        if buffers.up is not None:
            check_array("up", buffers.up, np.float32, (pairs, neurons), written=True)

    def _rounded_inputs(
        self,
        choice: Choice,
        activations: Activations | None,
        types: tuple[Matrix, Matrix | None, Matrix],
        buffers: ExpertBuffers,
    ) -> tuple[_Quantized, _Quantized, _Quantized]:
        """The rounded forms of tokens, of pairs and of their hidden values, where matrices of these `types`
        read them."""
        width, neurons, pairs = types[2].rows, types[0].rows, self.max_tokens * choice.used
        token = rows = hidden = _NONE
        if not all(m.row_type.is_float for m in types[:2] if m is not None):
            token = self._quantized("activations", activations, width, self.max_tokens)
            rows = self._quantized("rows_acts", buffers.rows_acts, width, pairs)
        if not types[2].row_type.is_float:
            hidden = self._quantized("hidden_acts", buffers.hidden_acts, neurons, pairs)
        return token, rows, hidden

    def _quantized(self, name: str, activations: Activations | None, columns: int, rows: int) -> _Quantized:
        if activations is None or activations.columns != columns or activations.max_tokens < rows:
            raise KernelError(f"{name} must be activations for {rows} rows of {columns} values")
        return (activations.q, activations.d, activations.s)


def _scales(matrices: Matrices) -> Floats | None:
    """What the products with each matrix are times, [experts]; None where that is 1."""
    scales = np.array([1.0 if matrix is None else matrix.scale for matrix in matrices], np.float32)
    return None if (scales == 1.0).all() else scales


def _handles(matrices: Matrices) -> tuple[Any, ...]:
    return tuple(None if matrix is None else matrix.handle for matrix in matrices)
