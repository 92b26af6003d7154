"""Turns layers into programs of kernel operations: the blocks of :mod:`powerinfer_tools.model.blocks`, and
the forms of an FFN that only the kernels have, over rows of neurons.

Nothing here depends on the number of tokens or on the thread count.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from powerinfer_kernels import (
    Bundle,
    Choice,
    ExpertBuffers,
    ExpertWeights,
    Layout,
    Matrix,
    Pool,
    ProgramBuilder,
    RecordsOf,
)
from powerinfer_tools.engine.buffers import Buffers, Floats
from powerinfer_tools.engine.factor_thresholds import FactorThresholds
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.predictor_programs import Predictor
from powerinfer_tools.engine.program_operations import ProgramOperations
from powerinfer_tools.engine.recall import GateAndUp
from powerinfer_tools.engine.values import Value
from powerinfer_tools.model import blocks
from powerinfer_tools.model.ffn_matrices import DenseFFN
from powerinfer_tools.model.layer_weights import LayerWeights
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.operations import Activation
from powerinfer_tools.model.streams import Along
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
    up_bias: Floats | None = None
    inner_norm: Norm | None = None
    deviations: float | None = None

    @property
    def products(self) -> tuple[Matrix, ...]:
        """What the FFN's input is multiplied with: gate, and up where there is one."""
        return (self.gate,) if self.up is None else (self.gate, self.up)

    @property
    def nbytes(self) -> int:
        """Size of all matrices, in bytes."""
        return sum(matrix.nbytes for matrix in (*self.products, self.down))


class RowsOnDisk(Protocol):
    """Where the rows of one layer's neurons come from, if not from memory."""

    @property
    def records(self) -> RecordsOf:
        """The layer."""

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """The rows in which gates are computed, in this order; each is followed by what asks for its
        neurons."""

    def write_ahead(self, writer: "BlockWriter") -> None:
        """Append what asks for rows of the next layer, those that it is likely to need."""


@dataclass(frozen=True)
class NeuronRows:
    """FFN with one row of ``down`` per neuron: the split file's form.

    With ``skips`` (gate-first) up rows lie in the bundle, with the down rows, and only those of neurons with
    a positive gate are read. ``disk``: where they come from, if not from memory.
    """

    gate: Matrix
    up: Matrix | None
    bundle: Bundle
    skips: bool
    bias: Floats | None = None
    disk: RowsOnDisk | None = None


@dataclass(frozen=True)
class PredictedRows:
    """FFN over the neurons that a predictor names: all rows of a neuron lie in the bundle."""

    predictor: Predictor
    bundle: Bundle
    bias: Floats | None = None
    disk: RowsOnDisk | None = None


@dataclass(frozen=True)
class FFNOutput:
    """What happens to an FFN's sum on its way to the residual stream."""

    bias: Floats | None
    post_norm: Norm | None


@dataclass(frozen=True)
class ThresholdedRows:
    """FFN over the neurons whose ``factor``, act(gate) or up, is larger than ``threshold`` (neurons,):
    ``first`` are its rows, and the bundle has the others."""

    factor: str
    first: Matrix
    threshold: Floats
    bundle: Bundle
    disk: RowsOnDisk | None = None


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


def pack(pool: Pool, weight: Weight, layout: Layout = Layout.TILES) -> Matrix:
    """The rows of ``weight`` for the dense kernels, or in another layout (a copy in huge pages)."""
    shape = (weight.row_type, weight.rows, weight.columns)
    return Matrix.pack(pool, weight.data, *shape, layout, weight.scale)


def pack_columns(
    packed: Callable[[Weight], Matrix], ffn: DenseFFN, *rest: Floats | Norm | float | None
) -> DenseColumns:
    """The matrices of ``ffn``, each as ``packed`` has it, and the ``rest`` of what it has."""
    up = None if ffn.factor is None else packed(ffn.factor)
    return DenseColumns(packed(ffn.first), up, packed(ffn.down), *rest)  # type: ignore[arg-type]


def pack_picked(pool: Pool, ffn: DenseFFN) -> DenseColumns:
    """The matrices of ``ffn``, of which neurons that are zero can be left out."""
    up = None if ffn.factor is None else pack(pool, ffn.factor, Layout.PICKED_ROWS)
    return DenseColumns(pack(pool, ffn.first), up, pack(pool, ffn.down, Layout.PICKED_COLUMNS))


class BlockWriter:
    """Appends the blocks of one model to a program."""

    def __init__(self, model: Model, ops: ProgramOperations, buffers: Buffers) -> None:
        self.spec, self.hyper, self.eps = model.spec, model.hyper, model.hyper.norm_eps
        self.ops, self.buffers = ops, buffers
        self.labels = Labels()
        #: The layer that is being written, None before the first.
        self.layer: int | None = None
        #: What runs beside the residual stream.
        self.along = Along[Value]()

    @property
    def activation(self) -> Activation:
        """The activation of the layer's FFN, or of the expert that every token takes."""
        return blocks.activation_of(self.hyper, self.layer or 0)

    @property
    def builder(self) -> ProgramBuilder:
        """Where operations outside the vocabulary are appended."""
        return self.ops.flush()

    def mark(self) -> int:
        """The index of the next operation."""
        return self.builder.mark()

    def label(self, name: str) -> int:
        """Everything from here on is counted as ``name``; returns the operation index."""
        index = self.builder.mark()
        self.labels.marks.append((index, name, self.layer))
        return index

    def embed(self, model: Model) -> None:
        """tokens (and where they stand) → residual stream."""
        self.label("embedding")
        self.along = blocks.along(self.ops, model, blocks.embedding(self.ops, model))

    def finish(self, w: LayerWeights) -> None:
        """What comes at the end of a layer, after its FFN."""
        if w.input is not None or w.output_scale != 1.0 or w.embedding_share:
            self.label("layer input")
            blocks.finish(self.ops, self.hyper, w, self._x, self.along)
            self.ops.flush()

    def merge_streams(self, model: Model) -> None:
        """What the head reads, where there are several streams."""
        if self.along.streams is not None:
            self.label("embedding")
            blocks.merged(self.ops, model, self._x, self.along)
            self.ops.flush()

    def mix(self, layer: int, w: LayerWeights) -> None:
        """What mixes the tokens of a layer, added to the residual stream."""
        self.label("recurrent" if w.attends is None else "attention")
        blocks.mix(self.ops, self.spec, self.hyper, layer, w, self._x, self.along)
        self.ops.flush()

    def ffn_input(self, w: LayerWeights, *, quantized: bool) -> None:
        """Normalise (and quantise) the input of the FFN."""
        self.label("ffn")
        normed = blocks.ffn_input(self.ops, w.ffn_norm, self.eps, self._x, w.ffn_shift)
        if quantized:
            self.ops.round(normed.floats)

    def normed(self, name: str, norm: Norm) -> Floats:
        """Where the residual stream is that experts or their router read, normalised for them."""
        self.label("ffn")
        normed = self.ops.norm(name, self._x, norm, self.eps)
        self.ops.round(normed.floats)
        return normed.floats

    def post_norm(self, name: str, norm: Norm) -> Floats:
        """``block_out`` normalised, in the buffer of that name."""
        return self.ops.norm(name, Value(self.buffers.block_out), norm, self.eps).floats

    def add_to_block(self, part: Floats) -> None:
        """``block_out`` plus ``part``."""
        self.ops.join(Value(self.buffers.block_out), Value(part))

    def scale_block(self, factor: float) -> None:
        """``block_out`` times ``factor``."""
        if factor != 1.0:
            self.ops.scale(Value(self.buffers.block_out), factor)

    def cold_input(self, *, quantized: bool) -> None:
        """Quantise the input of the FFN, which the hot side has normalised."""
        self.label("ffn")
        self.ops.changed(self.buffers.normed)
        if quantized:
            self.ops.round(self.buffers.normed)

    def ffn_columns(
        self,
        w: DenseColumns,
        output: FFNOutput,
        observed: LayerCounters | None = None,
        thresholds: FactorThresholds | None = None,
    ) -> None:
        """The FFN of a source model, added to the residual stream; counted where it is ``observed``. With
        ``thresholds`` (of a gated FFN), neurons below contribute nothing."""
        self.label("ffn")
        ops, biases = self.ops, (w.bias, output.bias, w.up_bias)
        weights = blocks.FFN(w.gate, w.up, w.down, *biases, w.inner_norm, self.eps, w.deviations)
        ops.observed, ops.thresholds = observed, thresholds
        out = blocks.ffn(ops, self.activation, weights, Value(self.buffers.normed))
        ops.observed = ops.thresholds = None
        self._join(blocks.post_normed(ops, out, output.post_norm, self.hyper.post_norm_eps))

    def expert(self, w: DenseColumns, source: Floats, out: str) -> None:
        """One FFN over ``source`` into the buffer ``out``."""
        blocks.ffn(self.ops, self.activation, blocks.FFN(w.gate, w.up, w.down), Value(source), out)
        self.ops.flush()

    def experts(
        self,
        weights: ExpertWeights,
        choice: Choice,
        pairs: ExpertBuffers,
        source: Floats,
        *,
        accumulate: bool,
        weigh_input: bool,
    ) -> None:
        """Σ weight · expert(``source``) over what was chosen, into ``block_out``, or added to what it
        holds."""
        b, how = self.buffers, blocks.activation_of(self.hyper, self.layer or 0, routed=True)
        self.builder.experts(
            choice,
            source,
            self.ops.rounded(source),
            weights,
            pairs,
            b.block_out,
            how.kind,
            cut=how.cut,
            accumulate=accumulate,
            weigh_input=weigh_input,
        )
        self.ops.changed(b.block_out)

    def ffn_rows(
        self, w: NeuronRows, gate: Floats, up: Floats, observed: LayerCounters | None = None
    ) -> None:
        """The FFN over rows of neurons into ``block_out``, counted where it is ``observed``; ``gate`` and
        ``up`` are scratch (T, neurons)."""
        b, builder, kind, cut = self.buffers, self.builder, self.hyper.activation, self.hyper.activation_cut
        self.label("ffn")
        deviations = None if self.layer is None else self.hyper.facts[self.layer].deviations
        if w.disk is not None and w.skips and deviations is None and w.gate.scale == 1.0:
            self._gate_piece_by_piece(w, w.disk, gate)
            factor = None
        else:
            factor = self._gate_and_up(w.gate, w.bias, w.up, gate, up)
        if deviations is not None:
            builder.keep_top(gate, gate, deviations)
            if w.skips:  # what the gate keeps is positive, and so is what the activation makes of it
                builder.activate(gate, None, gate, kind, cut)
                kind, cut = "relu", 0.0
        if w.skips:
            if observed is not None:  # up rows are not computed for all: each counts as a factor of one
                builder.observe(gate, None, kind, **vars(observed), cut=cut)
            least = np.full(w.gate.rows, cut, np.float32) if cut else None
            self._fetch(w.disk, gate, least)
            builder.sparse_ffn(
                gate, b.normed, b.normed_acts, w.bundle, b.block_out, up, kind, threshold=least, cut=cut
            )
            return
        if observed is not None:
            builder.observe(gate, factor, kind, **vars(observed), cut=cut)
        builder.activate(gate, factor, gate, kind, cut)
        builder.sum_rows(gate, w.bundle, b.block_out)

    def _gate_piece_by_piece(self, w: NeuronRows, disk: RowsOnDisk, gate: Floats) -> None:
        """The gates, those of neurons on disk first: what a piece names is read while others are computed."""
        b, cut = self.buffers, self.hyper.activation_cut
        least = np.full(w.gate.rows, cut, np.float32) if cut else None
        for rows in disk.pieces:
            self.builder.matmul(w.gate, b.normed, b.normed_acts, gate, bias=w.bias, rows=rows)
            self.label("disk")
            self.builder.fetch_records(disk.records, gate, least, neurons=w.gate.rows, when="soon", rows=rows)
            self.label("ffn")

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
        self._fetch(w.disk, scores, w.predictor.threshold)
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

    def ffn_thresholded(self, w: ThresholdedRows, values: Floats, h: Floats) -> None:
        """The FFN over the neurons whose known factor is large, into ``block_out``; the last two are scratch
        (T, neurons)."""
        self.label("ffn")
        b, builder, kind = self.buffers, self.builder, self.hyper.activation
        builder.matmul(w.first, b.normed, b.normed_acts, values)
        if w.factor == "gate":
            builder.activate(values, None, values, kind)
        self._fetch(w.disk, values, w.threshold, w.factor)
        builder.thresholded_ffn(
            values, w.factor, w.threshold, b.normed, b.normed_acts, w.bundle, b.block_out, h, kind
        )

    def _fetch(
        self, disk: RowsOnDisk | None, select: Floats, threshold: Floats | None, factor: str | None = None
    ) -> None:
        """Wait for the rows that the sparse FFN after it reads, where they are on ``disk``."""
        if disk is None:
            return
        self.label("disk")
        self.builder.fetch_records(disk.records, select, threshold, neurons=select.shape[1], factor=factor)
        disk.write_ahead(self)
        self.label("ffn")

    def ffn_truth(self, w: GateAndUp, gate: Floats, up: Floats) -> None:
        """What every neuron would contribute, act(gate)·up, into ``gate`` (T, neurons); ``up`` is scratch."""
        self.label("recall")
        factor = self._gate_and_up(w.gate, w.bias, w.up, gate, up)
        self.builder.activate(gate, factor, gate, self.hyper.activation, self.hyper.activation_cut)
        self.label("ffn")

    def merge(self, output: FFNOutput) -> None:
        """Residual stream += post_norm(``block_out`` + bias), in this order."""
        b, builder = self.buffers, self.builder
        out = b.block_out
        if output.bias is not None:
            builder.add(output.bias, out)
        if output.post_norm is not None:
            out = self.ops.norm("block_out", Value(out), output.post_norm, self.hyper.post_norm_eps).floats
        builder.add(out, b.x, self.hyper.residual_scale)

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

    @property
    def _x(self) -> Value:
        return Value(self.buffers.x)

    def _join(self, out: Value) -> None:
        self.ops.join(self._x, out, self.hyper.residual_scale)
        self.ops.flush()
