"""The checked way to write programs: one method for each operation that the C extension knows.

Every array is [max_tokens, width] float32 unless said otherwise; a run uses its first `n_tokens` rows.
"""

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ._kernels import KernelError
from .buffers import Activations, RowMatrix
from .checks import Floats, check_apart, check_apart_or_same, check_array, check_positive
from .matrix import Bundle, Matrix
from .program import Op
from .records import RecordsOf
from .recurrent_builder import RecurrentOperations
from .signs import Signs, sign_code_words
from .state import KVSlot
from .vector_builder import ZERO_KINDS, activation_cut, activation_number, finite

ROPE_STYLES = ("norm", "neox")
#: Bins of a histogram of contributions: four to an octave from 2^-16 to 2^16.
HISTOGRAM_BINS = 128
#: The factors of a neuron's product that can select it by their size, in the order of the numbers in C.
FACTORS = ("gate", "up")
#: When records are needed; the position is the number of the C operation.
When = Literal["now", "perhaps", "soon"]
WHEN = get_args(When)


class ProgramBuilder(RecurrentOperations):
    """Appends operations after checking every type, shape and overlap, so that C need not check them. All
    methods raise KernelError for arrays that do not fit."""

    def embed(
        self,
        tokens: npt.NDArray[np.int32],
        table: Any,
        row_type: int,
        rows: int,
        columns: int,
        out: Floats,
        scale: float = 1.0,
    ) -> None:
        """out[t] = scale · row tokens[t] of `table` (plain rows); tokens int32 [max_tokens]."""
        check_array("tokens", tokens, np.int32, (self.max_tokens,))
        self._check("out", out, columns, written=True)
        source = RowMatrix(table, row_type, rows, columns)
        self._append(Op.EMBED, (tokens, source.data, out), _rows_integers(source), (scale,))

    def quantize(self, src: Floats, activations: Activations) -> None:
        """Round `src` to 8 bits in blocks of 32."""
        self._check("src", src, activations.columns)
        self._check_activations(activations, activations.columns)
        a = activations
        self._append(Op.QUANTIZE, (src, a.q, a.d, a.s), (a.columns,))

    def matmul(
        self,
        matrix: Matrix,
        src: Floats,
        activations: Activations | None,
        out: Floats,
        bias: Floats | None = None,
        accumulate: bool = False,
        independent: bool = False,
        rows: tuple[int, int] | None = None,
    ) -> None:
        """out (+)= matrix · input + bias: `src` for float row types, `activations` for the others. `rows`: of
        these alone, from the first, a multiple of 16, to the last, which is another one or the end.

        `independent`: the next operation is a matmul that neither reads nor writes `out`, so no thread
        waits between. If the matrix has a scale, the product is multiplied by it afterwards, and cannot be
        added to `out`.
        """
        self._check("out", out, matrix.rows, written=True)
        if bias is not None:
            check_array("bias", bias, np.float32, (matrix.rows,))
        inputs = self._inputs(matrix.row_type.is_float, src, activations, matrix.columns)
        check_apart("out", out, {"src": src})
        first, end = rows or (0, matrix.rows)
        if matrix.scale != 1.0:
            if rows is not None:
                raise KernelError("a product that is times a scale is computed as a whole")
            if accumulate:
                raise KernelError("a product that is times a scale is not added as it is computed")
            self._append(Op.MATMUL, (matrix.handle, *inputs, None, out), (0, 0, first, end))
            self.scale(out, matrix.scale)
            if bias is not None:
                self.add(bias, out)
            return
        flags = (int(accumulate), int(independent), first, end - first)
        self._append(Op.MATMUL, (matrix.handle, *inputs, bias, out), flags)

    def rope(
        self, x: Floats, cos: Any, sin: Floats, heads: int, head_dim: int, style: str, offset: int = 0
    ) -> None:
        """Rotate pairs of each head in place by the angles of the position; cos and sin [capacity, rotary /
        2] include a factor of the magnitude if a family has one.

        Style "norm" pairs (2i, 2i + 1), "neox" (i, i + rotary / 2), both counted from `offset` on.
        """
        check_positive(heads=heads, head_dim=head_dim)
        self._check("x", x, heads * head_dim, written=True)
        if offset < 0 or offset >= head_dim:
            raise KernelError(f"an offset of {offset} is not within a head of {head_dim}")
        rest = head_dim - offset
        if not isinstance(cos, np.ndarray) or cos.ndim != 2 or 2 * cos.shape[1] > rest or not cos.size:
            raise KernelError(f"cos must be [capacity, rotary / 2] with rotary up to {rest}")
        check_array("cos", cos, np.float32, cos.shape)
        check_array("sin", sin, np.float32, cos.shape)
        if style not in ROPE_STYLES:
            raise KernelError(f"rope style {style!r} is not one of {', '.join(ROPE_STYLES)}")
        self._limit(len(cos))
        self._append(Op.ROPE, (x, cos, sin), (heads, head_dim, cos.shape[1], offset, int(style == "neox")))

    def store_kv(self, k: Floats, v: Floats, slot: KVSlot) -> None:
        """Write the keys and values of this run's positions into the caches of their sessions, rounded to
        the caches' type."""
        widths = (slot.kv_heads * slot.head_dim, slot.kv_heads * slot.value_dim)
        self._check("k", k, widths[0])
        self._check("v", v, widths[1])
        self._limit(slot.capacity)
        self._append(Op.STORE_KV, (k, v), (slot.index, *widths))

    def attention(
        self,
        q: Floats,
        slot: KVSlot,
        out: Floats,
        heads: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        *,
        chunk: int = 0,
        sinks: Floats | None = None,
        slopes: Floats | None = None,
    ) -> None:
        """Causal attention of `heads` query heads over the cache of each token's session, which must hold
        this run's positions already; out [max_tokens, heads · value_dim].

        scores = scale · q·k, softcapped (c · tanh(s / c)) where softcap > 0, less `slopes` [heads] times the
        distance of the key (ALiBi). With a window, a query sees only the last `window` positions, its own
        included; with chunks, only the positions of its own chunk. `sinks` [heads] are scores that belong to
        no key and appear only in the sum of the exponentials.
        """
        check_positive(heads=heads)
        if heads % slot.kv_heads:
            raise KernelError(f"{heads} query heads are no multiple of {slot.kv_heads} key heads")
        if window < 0 or chunk < 0 or not softcap >= 0:
            raise KernelError(f"window {window}, chunk {chunk} and softcap {softcap} must not be negative")
        self._check("q", q, heads * slot.head_dim)
        self._check("out", out, heads * slot.value_dim, written=True)
        for name, array in (("sinks", sinks), ("slopes", slopes)):
            if array is not None:
                check_array(name, array, np.float32, (heads,))
        check_apart("out", out, {"q": q, "sinks": sinks, "slopes": slopes})
        self._limit(slot.capacity)
        # Beyond the capacity both are without effect.
        integers = (slot.index, heads, min(window, slot.capacity), min(chunk, slot.capacity))
        floats = (finite("scale", scale), finite("softcap", softcap))
        self._append(Op.ATTENTION, (q, out, sinks, slopes), integers, floats)

    def activate(self, gate: Floats, up: Floats | None, out: Floats, kind: str, cut: float = 0.0) -> None:
        """out = act(gate) · up, or act(gate) without `up`. `out` may be either input. Here and below, with
        fatrelu `cut` is the value that a gate must exceed; with `CLAMPED_KINDS` it limits gate and |up|."""
        width = self._width("gate", gate)
        if up is not None:
            self._check("up", up, width)
        self._check("out", out, width, written=True)
        check_apart_or_same("out", out, {"gate": gate, "up": up})
        self._append(
            Op.ACTIVATE, (gate, up, out), (activation_number(kind), width), (activation_cut(kind, cut),)
        )

    def sum_rows(self, h: Floats, bundle: Bundle, out: Floats, accumulate: bool = False) -> None:
        """out (+)= Σ_i h_i · down row i, in chunks of 512 neurons in order.

        Rows of quantised types are summed as integers: the coefficients of each chunk and block are rounded
        to 16 bits.
        """
        self._check_parts(bundle, down=True)
        self._check("h", h, bundle.rows)
        self._check("out", out, bundle.columns, written=True)
        check_apart("out", out, {"h": h})
        self._append(Op.SUM_ROWS, (h, bundle.handle, out), (int(accumulate),))

    def sparse_ffn(
        self,
        select: Floats,
        src: Floats,
        activations: Activations | None,
        bundle: Bundle,
        out: Floats,
        h: Floats,
        kind: str,
        threshold: Floats | None = None,
        gate: Floats | None = None,
        bias: Floats | None = None,
        cut: float = 0.0,
        accumulate: bool = False,
    ) -> None:
        """out (+)= Σ_i act(gate_i) · (up_i · input) · down_i over the neurons whose `select` is above
        `threshold` ([neurons]; None: above zero).

        Gate-first: `select` is the gate and the bundle has up and down rows. Predicted: `select` are a
        predictor's scores, the bundle also has gate rows, `gate` is scratch, and `bias` [neurons], if given,
        is added to the products of the gate rows. A bundle without up rows belongs to an FFN of two matrices:
        Σ_i act(gate_i) · down_i. If no active neuron is left out, the bits equal those of matmul, activate
        and sum_rows over all neurons. `h` and `gate` [max_tokens, neurons] are scratch. When decoding, rows
        of other neurons are not read.
        """
        if kind not in ZERO_KINDS:
            raise KernelError(f"sparse_ffn needs an activation with exact zeros, {kind!r} has none")
        self._check_parts(bundle, gate=gate is not None, up=bundle.types[1] is not None, down=True)
        self._check("select", select, bundle.rows)
        self._check("h", h, bundle.rows, written=True)
        self._check("out", out, bundle.columns, written=True)
        if threshold is not None:
            check_array("threshold", threshold, np.float32, (bundle.rows,))
        if gate is not None:
            self._check("gate", gate, bundle.rows, written=True)
            check_apart("gate", gate, {"select": select, "src": src, "h": h, "threshold": threshold})
        if bias is not None:
            if gate is None:
                raise KernelError("a bias is added to the products of gate rows, and there are none")
            check_array("bias", bias, np.float32, (bundle.rows,))
        inputs = self._both_inputs(bundle.types[:2], src, activations, bundle.columns)
        check_apart("out", out, {"select": select, "src": src, "h": h, "gate": gate})
        check_apart("h", h, {"select": select, "src": src})
        objects = (select, threshold, *inputs, bundle.handle, out, h, gate, bias)
        self._append(
            Op.SPARSE_FFN,
            objects,
            (activation_number(kind), int(accumulate), 0),
            (activation_cut(kind, cut),),
        )

    def thresholded_ffn(
        self,
        known: Floats,
        factor: str,
        threshold: Floats,
        src: Floats,
        activations: Activations | None,
        bundle: Bundle,
        out: Floats,
        h: Floats,
        kind: str,
    ) -> None:
        """out = Σ_i act(gate_i) · up_i · down_i over the neurons with |known_i| above `threshold` [neurons].

        `known` holds one of :data:`FACTORS`: either act(gate), with up and down rows in the bundle; or up,
        with gate and down rows in the bundle. The bits equal those of matmul, activate and sum_rows over all
        neurons with the products of the other neurons set to zero. `h` [max_tokens, neurons] is scratch. When
        decoding, rows of other neurons are not read.
        """
        if factor not in FACTORS:
            raise KernelError(f"{factor!r} is not one of the factors {', '.join(FACTORS)}")
        by_gate = factor == "gate"
        self._check_parts(bundle, gate=not by_gate, up=by_gate, down=True)
        if by_gate and kind == "drelu":
            raise KernelError("drelu acts on up, too: select by up")
        self._check("known", known, bundle.rows)
        check_array("threshold", threshold, np.float32, (bundle.rows,))
        self._check("h", h, bundle.rows, written=True)
        self._check("out", out, bundle.columns, written=True)
        inputs = self._both_inputs(bundle.types[:2], src, activations, bundle.columns)
        check_apart("out", out, {"known": known, "src": src, "h": h})
        check_apart("h", h, {"known": known, "src": src, "threshold": threshold})
        objects = (known, threshold, *inputs, bundle.handle, out, h, None, None)
        self._append(Op.SPARSE_FFN, objects, (activation_number(kind), 0, 1 + FACTORS.index(factor)), (0.0,))

    def fetch_records(
        self,
        of: RecordsOf,
        select: Floats,
        threshold: Floats | None = None,
        *,
        neurons: int,
        factor: str | None = None,
        when: When = "now",
        rows: tuple[int, int] | None = None,
    ) -> None:
        """Wait until the neurons' rows that the next sparse FFN reads are in memory. These are the neurons
        whose `select` is above `threshold` ([neurons]; None: above zero); if `select` is a known `factor`,
        the neurons where its magnitude is above. Up to 8 tokens need the union of their neurons, more tokens
        need all neurons. `when`: "perhaps" and "soon" wait for nothing; with "perhaps" the neurons are a
        guess, with "soon" this operation follows with "now". `rows`: of these neurons alone, if not "now"."""
        first, end = rows or (0, neurons)
        self._check("select", select, neurons)
        if threshold is not None:
            check_array("threshold", threshold, np.float32, (neurons,))
        rule = 0 if factor is None else 1 + FACTORS.index(factor)
        objects = (of.records.handle, select, threshold)
        self._append(
            Op.FETCH_RECORDS, objects, (of.layer, neurons, rule, WHEN.index(when), first, end - first)
        )

    def keep_large(self, value: Floats, threshold: Floats, out: Floats) -> None:
        """out = 0 where |value| is not above `threshold` [width]; a NaN counts as above. `out` may be
        `value`."""
        width = self._width("value", value)
        check_array("threshold", threshold, np.float32, (width,))
        self._check("out", out, width, written=True)
        check_apart_or_same("out", out, {"value": value})
        self._append(Op.KEEP_LARGE, (value, threshold, out), (width,))

    def observe(
        self,
        gate: Floats,
        up: Floats | None,
        kind: str,
        counts: npt.NDArray[np.uint64],
        histogram: npt.NDArray[np.uint32] | None,
        gate_squares: npt.NDArray[np.float64],
        up_squares: npt.NDArray[np.float64],
        cut: float = 0.0,
    ) -> None:
        """Count the contribution of each neuron, c = act(gate) · up, for every token of a run; without `up`,
        act(gate) · 1.

        Adds to `counts` uint64 [n] where c ≠ 0, to `histogram` uint32 [n, 128] of |c| (four bins to an
        octave from 2^-16), and act(gate)² and up² to `gate_squares` and `up_squares` float64 [n].
        """
        width = self._width("gate", gate)
        if up is not None:
            self._check("up", up, width)
        check_array("counts", counts, np.uint64, (width,), written=True)
        if histogram is not None:
            check_array("histogram", histogram, np.uint32, (width, HISTOGRAM_BINS), written=True)
        check_array("gate_squares", gate_squares, np.float64, (width,), written=True)
        check_array("up_squares", up_squares, np.float64, (width,), written=True)
        objects = (gate, up, counts, histogram, gate_squares, up_squares)
        self._append(Op.OBSERVE, objects, (activation_number(kind), width), (activation_cut(kind, cut),))

    def sign_code(self, src: Floats, code: npt.NDArray[np.uint32]) -> None:
        """The input of sign predictors, in sign and magnitude: |q| = |src| / step rounded half to even, at
        most 15, with step = 3 / 15 of the row's root mean square. `code` [max_tokens, `sign_code_words`]."""
        width = self._width("src", src)
        check_array("code", code, np.uint32, (self.max_tokens, sign_code_words(width)), written=True)
        self._append(Op.SIGN_CODE, (src, code), (width,))

    def sign_scores(self, signs: Signs, code: npt.NDArray[np.uint32], out: Floats) -> None:
        """out = step · Σ_j s_ij · q_j for each of the rows of `signs`, s_ij = ±1; exact but for the product
        with the step. `code` is the result of `sign_code`."""
        check_array("code", code, np.uint32, (self.max_tokens, sign_code_words(signs.columns)))
        self._check("out", out, signs.rows, written=True)
        self._append(Op.SIGN_SCORES, (signs.words, code, out), (signs.rows, signs.columns))


def _rows_integers(rows: RowMatrix) -> tuple[int, int, int, int]:
    return (int(rows.row_type), rows.rows, rows.columns, rows.stride)
