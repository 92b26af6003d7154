"""Turns layers into programs of kernel operations, by reading the architecture row.

The order of operations here *is* the forward pass; :mod:`powerinfer_tools.reference_forward` says the same in
float64. Nothing here depends on the number of tokens or on the thread count.
"""

from dataclasses import dataclass, field

from powerinfer_kernels import Activations, Bundle, KVCache, Matrix, Pool, ProgramBuilder
from powerinfer_tools.architectures import RELU_FAMILY
from powerinfer_tools.engine.buffers import Buffers, Floats
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.recall import GateAndUp
from powerinfer_tools.engine.rotary import RotaryTables
from powerinfer_tools.model import AttentionWeights, Model, Weight


@dataclass(frozen=True)
class DenseColumns:
    """FFN with the down projection as rows of the output: the source model's form."""

    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class NeuronRows:
    """FFN with one row of ``down`` per neuron: the split file's form. Gate-first has no ``up``: those rows
    lie in the bundle, with the down rows."""

    gate: Matrix
    up: Matrix | None
    bundle: Bundle


@dataclass(frozen=True)
class PredictedRows:
    """FFN over the neurons that a predictor names: all rows of a neuron lie in the bundle.

    ``low`` (T, rank) is scratch for the input's short form, ``low_acts`` its quantised copy (None where
    ``outward`` is of a float type).
    """

    inward: Matrix
    outward: Matrix
    threshold: Floats
    low: Floats
    low_acts: Activations | None
    bundle: Bundle


@dataclass
class Labels:
    """Which part of the work each operation belongs to: (first operation, label), ascending."""

    marks: list[tuple[int, str]] = field(default_factory=list)

    def seconds(self, nanoseconds: list[int]) -> dict[str, float]:
        """Sum the time of every operation by label, in seconds."""
        bounds = [first for first, _ in self.marks[1:]] + [len(nanoseconds)]
        totals: dict[str, float] = {}
        for (first, label), last in zip(self.marks, bounds, strict=True):
            totals[label] = totals.get(label, 0.0) + sum(nanoseconds[first:last]) / 1e9
        return totals


def pack(pool: Pool, weight: Weight) -> Matrix:
    """Interleave the rows of ``weight`` for the dense kernels (a copy in huge pages)."""
    return Matrix.pack(pool, weight.data, weight.row_type, weight.rows, weight.columns)


class BlockWriter:
    """Appends the blocks of one model to a program."""

    def __init__(self, model: Model, pool: Pool, builder: ProgramBuilder, buffers: Buffers) -> None:
        self.spec, self.hyper, self.eps = model.spec, model.hyper, model.hyper.norm_eps
        self.pool, self.builder, self.buffers = pool, builder, buffers
        self.labels = Labels()
        self.weight_bytes = 0

    def label(self, name: str) -> int:
        """Everything from here on is counted as ``name``; returns the operation index."""
        index = self.builder.mark()
        self.labels.marks.append((index, name))
        return index

    def embed(self, embedding: Weight) -> None:
        """tokens → residual stream."""
        self.label("embedding")
        self.builder.embed(
            self.buffers.tokens,
            embedding.data,
            embedding.row_type,
            embedding.rows,
            embedding.columns,
            self.buffers.x,
            scale=self.hyper.embedding_scale,
        )

    def attention(self, w: AttentionWeights, cache: KVCache, tables: RotaryTables, window: int) -> None:
        """One attention block, added to the residual stream."""
        self.label("attention")
        b, builder, hyper = self.buffers, self.builder, self.hyper
        builder.rms_norm(b.x, w.norm, b.normed, self.eps)
        self._quantize(b.normed, b.normed_acts, w.query, w.key, w.value)
        self._project(w.query, b.query, w.query_bias, independent=True)
        self._project(w.key, b.key, w.key_bias, independent=True)
        self._project(w.value, b.value, w.value_bias)
        if w.query_norm is not None and w.key_norm is not None:
            builder.rms_norm(b.query, w.query_norm, b.query, self.eps, groups=hyper.heads)
            builder.rms_norm(b.key, w.key_norm, b.key, self.eps, groups=hyper.kv_heads)
        style = self.spec.rope_style
        builder.rope(b.query, tables.cos, tables.sin, hyper.heads, hyper.head_dim, style)
        builder.rope(b.key, tables.cos, tables.sin, hyper.kv_heads, hyper.head_dim, style)
        builder.store_kv(b.key, b.value, cache)
        builder.attention(
            b.query,
            cache,
            b.attended,
            hyper.heads,
            hyper.attention_scale,
            window=window,
            softcap=hyper.attention_softcap,
        )
        self._quantize(b.attended, b.attended_acts, w.output)
        output = self._packed(w.output)
        fused = w.post_norm is None
        out = b.x if fused else b.block_out
        builder.matmul(output, b.attended, b.attended_acts, out, bias=w.output_bias, accumulate=fused)
        self._join(w.post_norm)

    def ffn_input(self, norm: Floats, *, quantized: bool) -> None:
        """Normalise (and quantise) the input of the FFN."""
        self.label("ffn")
        b = self.buffers
        self.builder.rms_norm(b.x, norm, b.normed, self.eps)
        if quantized and b.normed_acts is not None:
            self.builder.quantize(b.normed, b.normed_acts)

    def ffn_columns(
        self, w: DenseColumns, post_norm: Floats | None, observed: LayerCounters | None = None
    ) -> None:
        """The FFN of a source model, added to the residual stream; counted where it is ``observed``."""
        b, builder = self.buffers, self.builder
        self._gate_and_up(w.gate, w.up)
        if observed is not None:
            builder.observe(b.gate, b.up, self.hyper.activation, **vars(observed))
        builder.activate(b.gate, b.up, b.gate, self.hyper.activation)
        if not w.down.row_type.is_float and b.hidden_acts is not None:
            builder.quantize(b.gate, b.hidden_acts)
        fused = post_norm is None
        builder.matmul(w.down, b.gate, b.hidden_acts, b.x if fused else b.block_out, accumulate=fused)
        self._join(post_norm)

    def ffn_rows(self, w: NeuronRows, gate: Floats, up: Floats) -> None:
        """The FFN over rows of neurons into ``block_out``; ``gate`` and ``up`` are scratch (T, neurons)."""
        b, builder, kind = self.buffers, self.builder, self.hyper.activation
        if w.up is None:
            if kind not in RELU_FAMILY:
                raise AssertionError(f"gate-first needs exact zeros, {kind} has none")
            builder.matmul(w.gate, b.normed, b.normed_acts, gate)
            builder.sparse_ffn(gate, b.normed, b.normed_acts, w.bundle, b.block_out, up, kind)
            return
        builder.matmul(w.gate, b.normed, b.normed_acts, gate, independent=True)
        builder.matmul(w.up, b.normed, b.normed_acts, up)
        builder.activate(gate, up, gate, kind)
        builder.sum_rows(gate, w.bundle, b.block_out)

    def ffn_predicted(self, w: PredictedRows, scores: Floats, gate: Floats, up: Floats) -> None:
        """The FFN over predicted neurons into ``block_out``; the last three are scratch (T, neurons)."""
        b, builder = self.buffers, self.builder
        self.label("predictor")
        builder.matmul(w.inward, b.normed, b.normed_acts, w.low)
        if w.low_acts is not None:
            builder.quantize(w.low, w.low_acts)
        builder.matmul(w.outward, w.low, w.low_acts, scores)
        self.label("ffn")
        builder.sparse_ffn(
            scores,
            b.normed,
            b.normed_acts,
            w.bundle,
            b.block_out,
            up,
            self.hyper.activation,
            threshold=w.threshold,
            gate=gate,
        )

    def ffn_truth(self, w: GateAndUp, gate: Floats, up: Floats) -> None:
        """What every neuron would contribute, act(gate)·up, into ``gate`` (T, neurons); ``up`` is scratch."""
        self.label("recall")
        b, builder = self.buffers, self.builder
        builder.matmul(w.gate, b.normed, b.normed_acts, gate, independent=True)
        builder.matmul(w.up, b.normed, b.normed_acts, up)
        builder.activate(gate, up, gate, self.hyper.activation)
        self.label("ffn")

    def merge(self, post_norm: Floats | None, *, hot: bool, cold: bool) -> None:
        """Residual stream += post_norm(cold part + hot part), in this order."""
        b, builder = self.buffers, self.builder
        out = b.block_out
        if hot and b.hot_out is not None:
            if cold:
                builder.add(b.hot_out, b.block_out)
            else:
                out = b.hot_out
        if post_norm is not None:
            builder.rms_norm(out, post_norm, out, self.eps)
        builder.add(out, b.x)

    def _gate_and_up(self, gate: Matrix, up: Matrix) -> None:
        b = self.buffers
        self.builder.matmul(gate, b.normed, b.normed_acts, b.gate, independent=True)
        self.builder.matmul(up, b.normed, b.normed_acts, b.up)

    def _join(self, post_norm: Floats | None) -> None:
        if post_norm is not None:
            self.builder.rms_norm(self.buffers.block_out, post_norm, self.buffers.block_out, self.eps)
            self.builder.add(self.buffers.block_out, self.buffers.x)

    def _project(
        self, weight: Weight, out: Floats, bias: Floats | None, *, independent: bool = False
    ) -> None:
        b = self.buffers
        matrix = self._packed(weight)
        self.builder.matmul(matrix, b.normed, b.normed_acts, out, bias=bias, independent=independent)

    def _packed(self, weight: Weight) -> Matrix:
        matrix = pack(self.pool, weight)
        self.weight_bytes += matrix.nbytes
        return matrix

    def _quantize(self, src: Floats, acts: Activations | None, *consumers: Weight) -> None:
        if acts is not None and not all(w.row_type.is_float for w in consumers):
            self.builder.quantize(src, acts)
