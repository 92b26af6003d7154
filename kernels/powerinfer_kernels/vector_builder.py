"""Operations on vectors that families put between their matrices: norms, products, copies of columns.

Every array is [max_tokens, width] float32 unless said otherwise.
"""

from typing import Any

import numpy as np

from ._kernels import KernelError
from .checks import Floats, check_apart, check_apart_or_same, check_array, check_positive
from .program import Op, OperationList

#: Activation functions by the number that C knows them by: out = act(gate) · up; drelu: relu(gate) ·
#: relu(up); fatrelu: gate · up where the gate is above a cut; swiglu_oai: g σ(1.702 g) · (u + 1) with
#: g = min(gate, cut) and u = up within ± cut; swiglu_clamped: silu(g) · u; clamped_silu: min(silu(gate),
#: cut) · u.
ACTIVATION_KINDS = (
    "silu",
    "gelu_tanh",
    "gelu_erf",
    "relu",
    "relu2",
    "drelu",
    "fatrelu",
    "sigmoid",
    "softplus",
    "swiglu_oai",
    "swiglu_clamped",
    "clamped_silu",
)
#: Those that limit gate and up by a cut.
CLAMPED_KINDS = frozenset({"swiglu_oai", "swiglu_clamped", "clamped_silu"})
#: Those whose result is exactly zero wherever the gate is not positive.
ZERO_KINDS = frozenset({"relu", "relu2", "drelu", "fatrelu"})
_MAP_SCALE, _MAP_SOFTCAP, _MAP_CLAMP, _MAP_XIELU = range(4)


class VectorOperations(OperationList):
    """The part of a program's builder that works on vectors alone. All methods raise KernelError for arrays
    that do not fit."""

    def rms_norm(self, src: Floats, weight: Floats | None, out: Floats, eps: float, groups: int = 1) -> None:
        """out = src / sqrt(mean(src²) + eps) · weight over each of `groups` equal parts of a row; weight
        [width / groups], or [width] where every part has its own. `out` may be `src`."""
        width = self._norm(src, out, groups)
        step = _weight_step(weight, None, width, groups)
        self._append(Op.RMS_NORM, (src, weight, out), (width, groups, step), (finite("eps", eps),))

    def layer_norm(
        self,
        src: Floats,
        weight: Floats | None,
        bias: Floats | None,
        out: Floats,
        eps: float,
        groups: int = 1,
    ) -> None:
        """out = (src − mean) / sqrt(variance + eps) · weight + bias over each of `groups` equal parts of a
        row; weight and bias as in `rms_norm`. `out` may be `src`."""
        width = self._norm(src, out, groups)
        step = _weight_step(weight, bias, width, groups)
        self._append(Op.LAYER_NORM, (src, weight, bias, out), (width, groups, step), (finite("eps", eps),))

    def l2_norm(self, src: Floats, out: Floats, eps: float, groups: int = 1) -> None:
        """out = src / sqrt(Σ src² + eps) over each of `groups` equal parts of a row. `out` may be `src`."""
        width = self._norm(src, out, groups)
        self._append(Op.L2_NORM, (src, out), (width, groups), (finite("eps", eps),))

    def keep_top(self, src: Floats, out: Floats, deviations: float) -> None:
        """out = max(src − mean − deviations · standard deviation, 0) over each row, with exact zeros (the
        gate of Gemma 3n). `out` may be `src`."""
        width = self._norm(src, out, 1)
        self._append(Op.KEEP_TOP, (src, out), (width, 1), (finite("deviations", deviations),))

    def add(self, src: Floats, out: Floats, factor: float = 1.0) -> None:
        """out += factor · src; a `src` of [width] is added for every token."""
        width, stride = self._operand(src, out, 1)
        self._append(Op.ADD, (src, out), (width, stride), (finite("factor", factor),))

    def multiply(self, src: Floats, out: Floats, repeat: int = 1) -> None:
        """out *= src, where each value of `src`, [max_tokens, width / repeat] or, for all tokens,
        [width / repeat], counts for `repeat` neighbouring columns."""
        width, stride = self._operand(src, out, repeat)
        self._append(Op.MULTIPLY, (src, out), (width, repeat, stride))

    def scale(self, x: Floats, factor: float) -> None:
        """x = factor · x"""
        self._map(x, _MAP_SCALE, factor)

    def softcap(self, x: Floats, cap: float) -> None:
        """x = cap · tanh(x / cap)"""
        if not cap > 0:
            raise KernelError(f"a soft cap must be positive, got {cap}")
        self._map(x, _MAP_SOFTCAP, cap)

    def clamp(self, x: Floats, low: float, high: float) -> None:
        """x = low where it is smaller, high where it is larger; NaN stays."""
        if not low <= high:
            raise KernelError(f"cannot clamp to [{low}, {high}]")
        self._map(x, _MAP_CLAMP, low, high)

    def xielu(self, x: Floats, positive: float, negative: float, beta: float, eps: float) -> None:
        """x = positive · x² + beta · x where x > 0, else negative · (e^min(x, eps) − 1 − x) + beta · x (arXiv
        2411.13010)."""
        self._map(x, _MAP_XIELU, positive, negative, beta, eps)

    def scale_by_position(self, x: Floats, table: Any) -> None:
        """x = x · table[position]; table [capacity]."""
        width = self._width("x", x)
        self._check("x", x, width, written=True)
        if not isinstance(table, np.ndarray) or table.ndim != 1 or not table.size:
            raise KernelError("table must be a float32 array [capacity]")
        check_array("table", table, np.float32, table.shape)
        self._limit(len(table))
        self._append(Op.SCALE_BY_POSITION, (x, table), (width,))

    def combine(self, src: Floats, coefficients: Floats, out: Floats, width: int) -> None:
        """Of vectors of `width` values that lie side by side, `count` in a row of `src`, make others:
        out_b = Σ_a coefficients[b, a] · src_a, in the order of a; coefficients [max_tokens, made · count]."""
        count, made = self._width("src", src) // width, self._width("out", out) // width
        check_positive(width=width, count=count, made=made)
        self._check("src", src, count * width)
        self._check("out", out, made * width, written=True)
        self._check("coefficients", coefficients, made * count)
        check_apart("out", out, {"src": src, "coefficients": coefficients})
        self._append(Op.COMBINE, (src, coefficients, out), (count, width, made))

    def copy(
        self,
        src: Floats,
        out: Floats,
        count: int,
        *,
        src_first: int = 0,
        out_first: int = 0,
        heads: int = 1,
        src_step: int = 0,
        out_step: int = 0,
    ) -> None:
        """For each of `heads`, copy `count` columns: those of `src` begin at src_first + head · src_step,
        those of `out` at out_first + head · out_step. A src_step of 0 repeats one slice for all heads."""
        src_width, out_width = self._width("src", src), self._width("out", out)
        self._check("out", out, out_width, written=True)
        check_positive(count=count, heads=heads)
        for name, width, first, step in (
            ("src", src_width, src_first, src_step),
            ("out", out_width, out_first, out_step),
        ):
            if first < 0 or step < 0 or first + (heads - 1) * step + count > width:
                raise KernelError(
                    f"{heads} times {count} columns, {step} apart from {first} on, do not fit {name}'s"
                    f" {width}"
                )
        if heads > 1 and out_step < count:
            raise KernelError(f"slices of {count} columns overlap when they are {out_step} apart")
        check_apart("out", out, {"src": src})
        integers = (src_width, out_width, src_first, out_first, heads, src_step, out_step, count)
        self._append(Op.COPY, (src, out), integers)

    def _norm(self, src: Floats, out: Floats, groups: int) -> int:
        width = self._width("src", src)
        check_positive(groups=groups)
        if width % groups:
            raise KernelError(f"{groups} groups do not divide a width of {width}")
        self._check("out", out, width, written=True)
        check_apart_or_same("out", out, {"src": src})
        return width

    def _operand(self, src: Floats, out: Floats, repeat: int) -> tuple[int, int]:
        """The width of `out`, and how far apart tokens are in `src`: 0 for a vector that all get."""
        check_positive(repeat=repeat)
        shared = getattr(src, "ndim", 0) == 1
        if shared:
            width = self._width("out", out)
            check_array("src", src, np.float32, (width // repeat,))
            if width % repeat:
                raise KernelError(f"a width of {width} is no multiple of {repeat}")
        else:
            width = self._width("src", src) * repeat
        self._check("out", out, width, written=True)
        check_apart("out", out, {"src": src})
        return width, 0 if shared else width // repeat

    def _map(self, x: Floats, kind: int, *constants: float) -> None:
        width = self._width("x", x)
        self._check("x", x, width, written=True)
        values = [finite("a constant", value) for value in constants]
        self._append(Op.MAP, (x,), (kind, width), (*values, *[0.0] * (4 - len(values))))


def _weight_step(weight: Floats | None, bias: Floats | None, width: int, groups: int) -> int:
    """How far apart the weights of neighbouring groups are: 0 where they share them."""
    one = width // groups
    step = one if groups > 1 and any(a is not None and a.shape == (width,) for a in (weight, bias)) else 0
    for name, array in (("weight", weight), ("bias", bias)):
        if array is not None:
            check_array(name, array, np.float32, (width if step else one,))
    return step


def finite(name: str, value: float) -> float:
    """`value` as a float; KernelError unless it is finite."""
    if not np.isfinite(value):
        raise KernelError(f"{name} must be finite, got {value}")
    return float(value)


def activation_number(kind: str) -> int:
    """The number that C knows an activation function by."""
    if kind not in ACTIVATION_KINDS:
        raise KernelError(f"activation {kind!r} is not one of {', '.join(ACTIVATION_KINDS)}")
    return ACTIVATION_KINDS.index(kind)


def activation_cut(kind: str, cut: float) -> float:
    """`cut`, where it goes with the activation function."""
    if kind in CLAMPED_KINDS:
        if not 0 < cut < float("inf"):
            raise KernelError(f"{kind} needs a positive cut, got {cut}")
    elif not 0 <= cut < float("inf") or (cut and kind != "fatrelu"):
        raise KernelError(f"a cut of {cut} does not go with {kind}: fatrelu has one, not negative, alone")
    return float(cut)
