"""Turns layers into programs of kernel operations, by reading the architecture row.

The order of operations here *is* the forward pass; :mod:`powerinfer_tools.model.reference` says the same in
float64. Nothing here depends on the number of tokens or on the thread count.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import Activations, Bundle, KVCache, Matrix, Pool, ProgramBuilder
from powerinfer_tools.engine.buffers import Buffers, Floats, narrowed
from powerinfer_tools.engine.factor_thresholds import FactorThresholds
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.predictor_programs import Predictor
from powerinfer_tools.engine.recall import GateAndUp
from powerinfer_tools.model.loading import AttentionWeights, Model
from powerinfer_tools.model.rotary import RotaryTables
from powerinfer_tools.model.tensors import Norm, Weight


@dataclass(frozen=True)
class DenseColumns:
    """FFN with the down projection as rows of the output: the source model's form.

    Here and below, ``gate`` are the rows that the activation reads: without gate, those of up, and there is
    no ``up``. ``bias`` is added to their products.
    """

    gate: Matrix
    up: Matrix | None
    down: Matrix
    bias: Floats | None = None


@dataclass(frozen=True)
class NeuronRows:
    """FFN with one row of ``down`` per neuron: the split file's form.

    With ``skips`` (gate-first) up rows lie in the bundle, with the down rows, and only those of neurons with
    a positive gate are read.
    """

    gate: Matrix
    up: Matrix | None
    bundle: Bundle
    skips: bool
    bias: Floats | None = None


@dataclass(frozen=True)
class PredictedRows:
    """FFN over the neurons that a predictor names: all rows of a neuron lie in the bundle."""

    predictor: Predictor
    bundle: Bundle
    bias: Floats | None = None


@dataclass(frozen=True)
class FFNOutput:
    """What happens to an FFN's sum on its way to the residual stream."""

    bias: Floats | None
    post_norm: Norm | None


@dataclass(frozen=True)
class ThresholdedRows:
    """FFN over the neurons whose ``factor``, act(gate) or up, is larger than ``threshold`` (neurons,):
    ``known`` are its rows, and the bundle has the others."""

    factor: str
    known: Matrix
    threshold: Floats
    bundle: Bundle


@dataclass
class Labels:
    """Which part of the work each operation belongs to: (first operation, label, layer or None),
    ascending."""

    marks: list[tuple[int, str, int | None]] = field(default_factory=list)

    def parts(self, first: int, last: int) -> Iterator[tuple[int, int, str, int | None]]:
        """The operations from ``first`` to ``last`` cut at the labels: first and last of each part, its
        label, and its layer (None for what is in none)."""
        ends = [index for index, _, _ in self.marks[1:]] + [last]
        for (begin, name, layer), end in zip(self.marks, ends, strict=True):
            begin, end = max(begin, first), min(end, last)
            if begin < end:
                yield begin, end, name, layer

    def seconds(self, nanoseconds: list[int]) -> dict[str, float]:
        """Sum the time of every operation by label, in seconds."""
        bounds = [first for first, _, _ in self.marks[1:]] + [len(nanoseconds)]
        totals: dict[str, float] = {}
        for (first, label, _), last in zip(self.marks, bounds, strict=True):
            totals[label] = totals.get(label, 0.0) + sum(nanoseconds[first:last]) / 1e9
        return totals


def pack(pool: Pool, weight: Weight) -> Matrix:
    """Interleave the rows of ``weight`` for the dense kernels (a copy in huge pages)."""
    return Matrix.pack(pool, weight.data, weight.row_type, weight.rows, weight.columns)


def append_norm(
    builder: ProgramBuilder, src: Floats, norm: Norm, out: Floats, eps: float, groups: int = 1
) -> None:
    """out = norm(src), of each of ``groups`` equal parts of a row by itself."""
    if norm.kind == "rms":
        builder.rms_norm(src, norm.weight, out, eps, groups=groups)
        return
    assert groups == 1, "layer norms of single heads are in no family"
    builder.layer_norm(src, norm.weight, norm.bias, out, eps)


class BlockWriter:
    """Appends the blocks of one model to a program."""

    def __init__(self, model: Model, pool: Pool, builder: ProgramBuilder, buffers: Buffers) -> None:
        self.spec, self.hyper, self.eps = model.spec, model.hyper, model.hyper.norm_eps
        self.pool, self.builder, self.buffers = pool, builder, buffers
        self.labels = Labels()
        #: The layer that is being written, None before the first.
        self.layer: int | None = None
        self.weight_bytes = 0

    def label(self, name: str) -> int:
        """Everything from here on is counted as ``name``; returns the operation index."""
        index = self.builder.mark()
        self.labels.marks.append((index, name, self.layer))
        return index

    def embed(self, embedding: Weight, positions: Weight | None) -> None:
        """tokens (and where they stand) → residual stream."""
        self.label("embedding")
        b = self.buffers
        self._rows_of(embedding, b.tokens, b.x, scale=self.hyper.embedding_scale)
        if positions is not None and b.positions is not None:
            self._rows_of(positions, b.positions, b.block_out)
            self.builder.add(b.block_out, b.x)

    def attention(self, w: AttentionWeights, cache: KVCache, tables: RotaryTables, window: int) -> None:
        """One attention block, added to the residual stream."""
        self.label("attention")
        b, builder, hyper = self.buffers, self.builder, self.hyper
        self._norm(b.x, w.norm, b.attention_input)
        self._quantize(b.attention_input, b.attention_acts, w.query, w.key, w.value)
        self._project(w.query, b.query, w.query_bias, independent=True)
        self._project(w.key, b.key, w.key_bias, independent=True)
        self._project(w.value, b.value, w.value_bias)
        if w.query_norm is not None and w.key_norm is not None:
            self._norm(b.query, w.query_norm, b.query, groups=hyper.heads)
            self._norm(b.key, w.key_norm, b.key, groups=hyper.kv_heads)
        if hyper.rope_dim:
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

    def ffn_input(self, norm: Norm, *, quantized: bool) -> None:
        """Normalise (and quantise) the input of the FFN."""
        self.label("ffn")
        b = self.buffers
        self._norm(b.x, norm, b.normed)
        if quantized and b.normed_acts is not None:
            self.builder.quantize(b.normed, b.normed_acts)

    def cold_input(self, *, quantized: bool) -> None:
        """Quantise the input of the FFN, which the hot side has normalised."""
        self.label("ffn")
        b = self.buffers
        if quantized and b.normed_acts is not None:
            self.builder.quantize(b.normed, b.normed_acts)

    def ffn_columns(
        self,
        w: DenseColumns,
        output: FFNOutput,
        observed: LayerCounters | None = None,
        thresholds: FactorThresholds | None = None,
    ) -> None:
        """The FFN of a source model, added to the residual stream; counted where it is ``observed``. With
        ``thresholds`` (of a gated FFN), neurons below contribute nothing."""
        b, builder, kind = self.buffers, self.builder, self.hyper.activation
        self.label("ffn")
        up = self._gate_and_up(w.gate, w.bias, w.up, b.gate, b.up)
        if observed is not None:
            builder.observe(b.gate, up, kind, **vars(observed), cut=self.hyper.activation_cut)
        if thresholds is not None and up is not None and b.scores is not None:
            builder.activate(b.gate, None, b.scores, kind)
            builder.keep_large(b.scores, thresholds.gate, up)
            builder.keep_large(up, thresholds.up, up)
        builder.activate(b.gate, up, b.gate, kind, self.hyper.activation_cut)
        if not w.down.row_type.is_float and b.hidden_acts is not None:
            builder.quantize(b.gate, b.hidden_acts)
        fused = output.post_norm is None
        out = b.x if fused else b.block_out
        builder.matmul(w.down, b.gate, b.hidden_acts, out, bias=output.bias, accumulate=fused)
        self._join(output.post_norm)

    def expert(
        self, w: DenseColumns, src: Floats, acts: Activations | None, hidden: Activations | None, out: Floats
    ) -> None:
        """One FFN over ``src`` (and its quantised copy) into ``out``; ``hidden`` is scratch of its width."""
        b, builder = self.buffers, self.builder
        gate, up = narrowed(b.gate, w.gate.rows), narrowed(b.up, w.gate.rows)
        builder.matmul(w.gate, src, acts, gate, independent=w.up is not None)
        if w.up is not None:
            builder.matmul(w.up, src, acts, up)
        cut = self.hyper.activation_cut
        builder.activate(gate, None if w.up is None else up, gate, self.hyper.activation, cut)
        if not w.down.row_type.is_float and hidden is not None:
            builder.quantize(gate, hidden)
        builder.matmul(w.down, gate, hidden, out)

    def ffn_rows(
        self, w: NeuronRows, gate: Floats, up: Floats, observed: LayerCounters | None = None
    ) -> None:
        """The FFN over rows of neurons into ``block_out``, counted where it is ``observed``; ``gate`` and
        ``up`` are scratch (T, neurons)."""
        b, builder, kind, cut = self.buffers, self.builder, self.hyper.activation, self.hyper.activation_cut
        self.label("ffn")
        factor = self._gate_and_up(w.gate, w.bias, w.up, gate, up)
        if w.skips:
            assert observed is None, "gate-first does not compute what there is to observe"
            least = np.full(w.gate.rows, cut, np.float32) if cut else None
            builder.sparse_ffn(
                gate, b.normed, b.normed_acts, w.bundle, b.block_out, up, kind, threshold=least, cut=cut
            )
            return
        if observed is not None:
            builder.observe(gate, factor, kind, **vars(observed), cut=cut)
        builder.activate(gate, factor, gate, kind, cut)
        builder.sum_rows(gate, w.bundle, b.block_out)

    def predictor_input(self, w: PredictedRows) -> None:
        """The short form of what a predictor reads, where the residual stream is what the FFN's norm read."""
        b, builder = self.buffers, self.builder
        self.label("predictor")
        w.predictor.prepare(builder, b)

    def ffn_predicted(self, w: PredictedRows, scores: Floats, gate: Floats, up: Floats) -> None:
        """The FFN over predicted neurons into ``block_out``, after :meth:`predictor_input`; the last three
        are scratch (T, neurons)."""
        b, builder = self.buffers, self.builder
        self.label("predictor")
        w.predictor.write(builder, scores)
        self.label("ffn")
        builder.sparse_ffn(
            scores,
            b.normed,
            b.normed_acts,
            w.bundle,
            b.block_out,
            up,
            self.hyper.activation,
            threshold=w.predictor.threshold,
            gate=gate,
            bias=w.bias,
            cut=self.hyper.activation_cut,
        )

    def ffn_thresholded(self, w: ThresholdedRows, known: Floats, h: Floats) -> None:
        """The FFN over the neurons whose known factor is large, into ``block_out``; the last two are scratch
        (T, neurons)."""
        self.label("ffn")
        b, builder, kind = self.buffers, self.builder, self.hyper.activation
        builder.matmul(w.known, b.normed, b.normed_acts, known)
        if w.factor == "gate":
            builder.activate(known, None, known, kind)
        builder.thresholded_ffn(
            known, w.factor, w.threshold, b.normed, b.normed_acts, w.bundle, b.block_out, h, kind
        )

    def ffn_truth(self, w: GateAndUp, gate: Floats, up: Floats) -> None:
        """What every neuron would contribute, act(gate)·up, into ``gate`` (T, neurons); ``up`` is scratch."""
        self.label("recall")
        factor = self._gate_and_up(w.gate, w.bias, w.up, gate, up)
        self.builder.activate(gate, factor, gate, self.hyper.activation, self.hyper.activation_cut)
        self.label("ffn")

    def merge(self, output: FFNOutput, *, hot: bool, cold: bool) -> None:
        """Residual stream += post_norm(cold part + hot part + bias), in this order."""
        b, builder = self.buffers, self.builder
        out = b.block_out
        if hot and b.hot_out is not None:
            if cold:
                builder.add(b.hot_out, b.block_out)
            else:
                out = b.hot_out
        if output.bias is not None:
            builder.add(output.bias, out)
        if output.post_norm is not None:
            self._norm(out, output.post_norm, out)
        builder.add(out, b.x)

    def _gate_and_up(
        self, gate: Matrix, bias: Floats | None, up: Matrix | None, gate_out: Floats, up_out: Floats
    ) -> Floats | None:
        """Both products; returns where the second is, None where there is none."""
        b, gated = self.buffers, up is not None
        self.builder.matmul(gate, b.normed, b.normed_acts, gate_out, bias=bias, independent=gated)
        if up is None:
            return None
        self.builder.matmul(up, b.normed, b.normed_acts, up_out)
        return up_out

    def _join(self, post_norm: Norm | None) -> None:
        if post_norm is not None:
            self._norm(self.buffers.block_out, post_norm, self.buffers.block_out)
            self.builder.add(self.buffers.block_out, self.buffers.x)

    def _norm(self, src: Floats, norm: Norm, out: Floats, groups: int = 1) -> None:
        append_norm(self.builder, src, norm, out, self.eps, groups)

    def _rows_of(self, table: Weight, index: npt.NDArray[np.int32], out: Floats, scale: float = 1.0) -> None:
        self.builder.embed(index, table.data, table.row_type, table.rows, table.columns, out, scale=scale)

    def _project(
        self, weight: Weight, out: Floats, bias: Floats | None, *, independent: bool = False
    ) -> None:
        b = self.buffers
        matrix = self._packed(weight)
        self.builder.matmul(
            matrix, b.attention_input, b.attention_acts, out, bias=bias, independent=independent
        )

    def _packed(self, weight: Weight) -> Matrix:
        matrix = pack(self.pool, weight)
        self.weight_bytes += matrix.nbytes
        return matrix

    def _quantize(self, src: Floats, acts: Activations | None, *consumers: Weight) -> None:
        if acts is not None and not all(w.row_type.is_float for w in consumers):
            self.builder.quantize(src, acts)
