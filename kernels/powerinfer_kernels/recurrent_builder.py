"""Recurrent blocks in a program: short convolutions, state space models, delta nets. Their state is kept from
token to token in a slot of the session's state.

Every array is [max_tokens, width] float32 unless said otherwise.
"""

from typing import Any

import numpy as np

from ._kernels import KernelError
from .checks import Floats, check_apart, check_array, check_positive
from .experts_builder import ExpertOperations
from .program import Op
from .state import RecurrentSlot
from .vector_builder import finite


class RecurrentOperations(ExpertOperations):
    """The part of a program's builder that knows recurrent blocks. All methods raise KernelError for arrays
    that do not fit."""

    def convolve(
        self,
        src: Floats,
        weight: Any,
        bias: Floats | None,
        out: Floats,
        slot: RecurrentSlot,
        *,
        src_first: int = 0,
        silu: bool = False,
    ) -> None:
        """out_t = bias + Σ_j weight_j · src_{t − length + 1 + j}, channel by channel over the columns of
        `src` from src_first on, followed by silu if requested. weight [length, width]; the slot holds the
        length − 1 inputs before."""
        src_width, width = self._width("src", src), self._width("out", out)
        self._check("out", out, width, written=True)
        if not isinstance(weight, np.ndarray) or weight.ndim != 2 or len(weight) < 2:
            raise KernelError(f"weight must be a float32 array [length, {width}] of length 2 or more")
        check_array("weight", weight, np.float32, (len(weight), width))
        if bias is not None:
            check_array("bias", bias, np.float32, (width,))
        _check_slice("src", src_width, src_first, width)
        check_apart("out", out, {"src": src})
        _check_slot(slot, (len(weight) - 1) * width)
        integers = (slot.index, src_width, src_first, width, len(weight), int(silu))
        self._append(Op.CONVOLVE, (src, weight, bias, out), integers)

    def scan_channels(
        self,
        x: Floats,
        step: Floats,
        decay: Any,
        inputs: tuple[Floats, int, int],
        direct: Floats,
        out: Floats,
        slot: RecurrentSlot,
    ) -> None:
        """Selective scan (Mamba, arXiv 2312.00752): for each channel c and i < size, with dt = step_c,
        S_ic = e^(dt · decay_ic) S_ic + dt · B_i · x_c, and out_c = Σ_i C_i S_ic + direct_c · x_c.

        step [max_tokens, width] after its softplus; decay [size, width], negative; direct [width]; `inputs`
        are an array and the columns where B and C begin in it; the slot holds S [size, width]."""
        width = self._width("out", out)
        self._check_scan(x, step, out, width, width)
        if not isinstance(decay, np.ndarray) or decay.ndim != 2 or not decay.size:
            raise KernelError(f"decay must be a float32 array [size, {width}]")
        size = len(decay)
        check_array("decay", decay, np.float32, (size, width))
        check_array("direct", direct, np.float32, (width,))
        source, *first = inputs
        for at in first:
            _check_slice("inputs", self._width("inputs", source), at, size)
        check_apart("out", out, {"inputs": source})
        _check_slot(slot, size * width)
        integers = (slot.index, width, width, 1, 1, size, source.shape[1], *first)
        self._append(Op.SCAN_CHANNELS, (x, step, decay, source, direct, out), integers)

    def scan_heads(
        self,
        x: Floats,
        step: Floats,
        decay: Floats,
        inputs: tuple[Floats, int, int],
        direct: Floats,
        out: Floats,
        slot: RecurrentSlot,
        *,
        size: int,
        groups: int = 1,
    ) -> None:
        """State space duality (Mamba-2, arXiv 2405.21060): as `scan_channels` with one step, decay and
        direct factor for all channels of a head, and B and C shared by the heads of a group.

        step [max_tokens, heads]; decay and direct [heads]; out [max_tokens, heads · head_dim], and `x` the
        same or wider (its first columns are read); the groups' B lie side by side, as do their C; the slot
        holds S [heads, size, head_dim]."""
        heads, width = self._width("step", step), self._width("out", out)
        check_positive(size=size, groups=groups)
        if width % heads or heads % groups:
            raise KernelError(f"{heads} heads in {groups} groups do not divide a width of {width}")
        self._check_scan(x, step, out, width, heads)
        check_array("decay", decay, np.float32, (heads,))
        check_array("direct", direct, np.float32, (heads,))
        source, *first = inputs
        for at in first:
            _check_slice("inputs", self._width("inputs", source), at, groups * size)
        check_apart("out", out, {"inputs": source})
        _check_slot(slot, size * width)
        integers = (slot.index, x.shape[1], heads, width // heads, groups, size, source.shape[1], *first)
        self._append(Op.SCAN_HEADS, (x, step, decay, source, direct, out), integers)

    def delta_net(
        self,
        qk: Floats,
        v: Floats,
        decay: Floats,
        rate: Floats,
        out: Floats,
        slot: RecurrentSlot,
        *,
        key_heads: int,
        scale: float,
        v_first: int = 0,
        interleaved: bool = True,
    ) -> None:
        """Gated delta rule (arXiv 2412.06464), for each head: S = e^decay S; S += k (rate · (v − Sᵀk))ᵀ;
        out = scale · Sᵀq.

        qk [max_tokens, 2 · key_heads · size]: all queries, then all keys, normalised; v from column v_first
        on; rate [max_tokens, heads]; decay of that shape, or [max_tokens, heads · size] with one for each row
        of S (arXiv 2510.26692); out [max_tokens, heads · head_dim]; the slot holds S [heads, size, head_dim].
        Key heads serve several heads: neighbouring ones where `interleaved`, else head h
        takes key head h mod key_heads."""
        heads, width = self._width("rate", rate), self._width("out", out)
        both = self._width("qk", qk)
        check_positive(key_heads=key_heads)
        if width % heads or heads % key_heads or both % (2 * key_heads):
            raise KernelError(
                f"{heads} heads of {key_heads} key heads do not divide widths of {width} and {both}"
            )
        size = both // (2 * key_heads)
        decays = size if self._width("decay", decay) == heads * size else 1
        self._check("decay", decay, heads * decays)
        self._check("out", out, width, written=True)
        v_width = self._width("v", v)
        _check_slice("v", v_width, v_first, width)
        check_apart("out", out, {"qk": qk, "v": v, "decay": decay, "rate": rate})
        _check_slot(slot, size * width)
        sizes = (slot.index, heads, width // heads, key_heads, size, v_width, v_first)
        integers = (*sizes, int(interleaved), decays)
        self._append(Op.DELTA_NET, (qk, v, decay, rate, out), integers, (finite("scale", scale),))

    def general_delta(
        self,
        q: Floats,
        k: Floats,
        v: Floats,
        decay: Floats,
        unit: Floats,
        rate: Floats,
        out: Floats,
        slot: RecurrentSlot,
        *,
        heads: int,
    ) -> None:
        """Generalised delta rule (RWKV-7, arXiv 2503.14456), for each head: S = diag(e^decay) S −
        (unit · rate) (Sᵀ unit)ᵀ + k vᵀ; out = Sᵀq.

        q, k, decay, unit, rate [max_tokens, heads · size]; v and out [max_tokens, heads · head_dim]; the slot
        holds S [heads, size, head_dim]."""
        check_positive(heads=heads)
        keys, values = self._width("q", q), self._width("out", out)
        if keys % heads or values % heads:
            raise KernelError(f"{heads} heads do not divide widths of {keys} and {values}")
        for name, array in (("k", k), ("decay", decay), ("unit", unit), ("rate", rate)):
            self._check(name, array, keys)
        self._check("v", v, values)
        self._check("out", out, values, written=True)
        inputs = {"q": q, "k": k, "v": v, "decay": decay, "unit": unit, "rate": rate}
        check_apart("out", out, inputs)
        _check_slot(slot, keys // heads * values)
        integers = (slot.index, heads, keys // heads, values // heads)
        self._append(Op.GENERAL_DELTA, (*inputs.values(), out), integers)

    def _check_scan(self, x: Floats, step: Floats, out: Floats, width: int, heads: int) -> None:
        _check_slice("x", self._width("x", x), 0, width)
        self._check("step", step, heads)
        self._check("out", out, width, written=True)
        check_apart("out", out, {"x": x, "step": step})


def _check_slice(name: str, width: int, first: int, count: int) -> None:
    if first < 0 or first + count > width:
        raise KernelError(f"columns [{first}, {first + count}) are not within {name}'s {width}")


def _check_slot(slot: RecurrentSlot, count: int) -> None:
    if slot.count != count:
        raise KernelError(f"the state needs {count} values, the slot has {slot.count}")
