"""What the C kernels compute of a layer's FFN: all of it, or the neurons of a split file from a split point
on. Experts, of which a dense FFN is one that every token takes with weight one, are laid out in
:mod:`powerinfer_tools.engine.routed`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from powerinfer_formats.split import SplitLayer
from powerinfer_kernels import Bundle, Matrix, Pool
from powerinfer_tools.engine.blocks import (
    BlockWriter,
    DenseColumns,
    FFNOutput,
    NeuronRows,
    PredictedRows,
    RowsOnDisk,
    ThresholdedRows,
    pack_columns,
)
from powerinfer_tools.engine.buffers import Buffers, Floats, narrowed
from powerinfer_tools.engine.cold_side import ColdFFN, Computed, Part, Plain
from powerinfer_tools.engine.factor_thresholds import FactorThresholds
from powerinfer_tools.engine.layers_on_disk import LayersOnDisk
from powerinfer_tools.engine.neurons_on_disk import NeuronsOnDisk, OfLayer
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.engine.packed import PackedWeights
from powerinfer_tools.engine.predictor_programs import NamedElsewhere, Predictor, lay_out, named_elsewhere
from powerinfer_tools.engine.recall import GateAndUp, RecallCheck
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model.ffn_matrices import DenseFFN
from powerinfer_tools.model.loading import Model


def load_cold_ffn(model: Model, index: int, pool: Pool, part: Part) -> ColdFFN:
    """Lay out ``part`` of layer ``index``, which has no experts."""
    layer, ffn, mode = model.layers[index], model.layers[index].ffn, part.mode
    if isinstance(part.on_disk, LayersOnDisk):
        return _PassingFFN(part.on_disk.columns(index), part.observed, disk=part.on_disk, layer=index)
    deviations = model.hyper.facts[index].deviations
    if part.hot_neurons and deviations is not None:
        raise ModelError(
            f"{model.path}: layer {index} has neurons on the hot side, which does not compute gates that "
            "depend on all neurons; plan again"
        )
    if isinstance(ffn, DenseFFN):
        if part.hot_neurons:
            return _NoneFFN()
        rest = (layer.ffn_bias, layer.ffn_factor_bias, layer.ffn_inner_norm, deviations)
        return _ColumnsFFN(
            pack_columns(partial(part.packed.of, pool), ffn, *rest), part.observed, part.thresholds
        )
    assert isinstance(ffn, SplitLayer), "experts are laid out in routed.py"
    if part.hot_neurons == ffn.neurons:
        return _NoneFFN()
    if mode == "predicted":
        return _load_predicted(ffn, pool, part)
    if mode == "thresholded":
        return _load_thresholded(ffn, pool, part)
    if mode == "dense" and part.alone and ffn.columns is not None:
        return _load_columns(ffn, pool, part, deviations)
    return _load_rows(ffn, pool, part)


@dataclass(frozen=True)
class _ColumnsFFN(Plain):
    weights: DenseColumns
    observed: LayerCounters | None = None
    thresholds: FactorThresholds | None = None
    in_rows: bool = False

    @property
    def neurons(self) -> int:
        return self.weights.gate.rows

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    @property
    def quantized(self) -> bool:
        return not all(matrix.row_type.is_float for matrix in self.weights.products)

    def bytes_per_token(self, computed: Computed) -> float:
        return float(self.nbytes)

    def write(self, writer: BlockWriter, buffers: Buffers, output: FFNOutput) -> None:
        writer.ffn_columns(self.weights, output, self.observed, self.thresholds)


@dataclass(frozen=True, kw_only=True)
class _PassingFFN(_ColumnsFFN):
    """One that is read from disk into memory that is counted there."""

    disk: LayersOnDisk
    layer: int

    @property
    def nbytes(self) -> int:
        return 0

    def bytes_per_token(self, computed: Computed) -> float:
        return float(self.weights.nbytes)

    def choose(self, writer: BlockWriter, first: int) -> int:
        self.disk.write_fetch(writer, self.layer)
        return writer.label("ffn")


class _BundledFFN(Plain, ABC):
    """An FFN whose neurons' rows lie in a bundle, beside matrices that are read for all neurons."""

    @property
    @abstractmethod
    def bundle(self) -> Bundle:
        """The rows that only active neurons are read from."""

    @property
    def whole(self) -> tuple[Matrix, ...]:
        """Matrices whose rows are read for all neurons."""
        return ()

    @property
    def beside(self) -> int:
        """Bytes of what is neither in a matrix nor in the bundle; all of it is read for every token."""
        return 0

    @property
    def neurons(self) -> int:
        return self.bundle.rows

    @property
    def nbytes(self) -> int:
        held = 0 if self.bundle.is_absent else self.bundle.nbytes  # what is read from disk counts there
        return self.beside + held + sum(matrix.nbytes for matrix in self.whole)

    @property
    def quantized(self) -> bool:
        kinds = (*(matrix.row_type for matrix in self.whole), *self.bundle.types[:2])
        return not all(kind is None or kind.is_float for kind in kinds)

    def bytes_per_token(self, computed: Computed) -> float:
        gates = self.bundle.gate_nbytes
        rows = gates * computed.named + (self.bundle.nbytes - gates) * computed.confirmed
        return self.beside + sum(matrix.nbytes for matrix in self.whole) + rows


@dataclass(frozen=True)
class _RowsFFN(_BundledFFN):
    weights: NeuronRows
    observed: LayerCounters | None = None

    @property
    def bundle(self) -> Bundle:
        return self.weights.bundle

    @property
    def whole(self) -> tuple[Matrix, ...]:
        gate, up = self.weights.gate, self.weights.up
        return (gate,) if up is None else (gate, up)

    def bytes_per_token(self, computed: Computed) -> float:
        return super().bytes_per_token(computed if self.weights.skips else Computed(1, 1))

    def write(self, writer: BlockWriter, buffers: Buffers, output: FFNOutput) -> None:
        gate = narrowed(buffers.gate, self.neurons)
        writer.ffn_rows(self.weights, gate, narrowed(buffers.up, self.neurons), self.observed)


@dataclass(frozen=True)
class _PredictedFFN(_BundledFFN):
    weights: PredictedRows

    @property
    def bundle(self) -> Bundle:
        return self.weights.bundle

    @property
    def beside(self) -> int:
        return self.weights.predictor.nbytes

    @property
    def quantized(self) -> bool:
        return self.weights.predictor.quantized or super().quantized

    def prepare(self, writer: BlockWriter) -> None:
        writer.predictor_input(self.weights)

    def write(self, writer: BlockWriter, buffers: Buffers, output: FFNOutput) -> None:
        assert buffers.scores is not None
        scratch = [narrowed(buffer, self.neurons) for buffer in (buffers.scores, buffers.gate, buffers.up)]
        writer.ffn_predicted(self.weights, *scratch)


@dataclass(frozen=True)
class _ThresholdedFFN(_BundledFFN):
    weights: ThresholdedRows

    @property
    def bundle(self) -> Bundle:
        return self.weights.bundle

    @property
    def whole(self) -> tuple[Matrix, ...]:
        return (self.weights.first,)

    @property
    def beside(self) -> int:
        return self.weights.threshold.nbytes

    def write(self, writer: BlockWriter, buffers: Buffers, output: FFNOutput) -> None:
        values, h = narrowed(buffers.gate, self.neurons), narrowed(buffers.up, self.neurons)
        writer.ffn_thresholded(self.weights, values, h)


@dataclass(frozen=True)
class _NoneFFN(Plain):
    """A layer whose neurons are all on the hot device."""

    neurons: int = 0
    nbytes: int = 0
    quantized: bool = False

    def works(self, count: int) -> bool:
        return False

    def write(self, writer: BlockWriter, buffers: Buffers, output: FFNOutput) -> None:
        return


def _load_rows(layer: SplitLayer, pool: Pool, part: Part) -> ColdFFN:
    skips, first, packed = part.mode == "gate-first", part.hot_neurons, part.packed
    dense = layer.kinds[:1] if skips else layer.kinds[:-1]
    matrices = [packed.rows(pool, layer, kind, first) for kind in dense]
    bundle, disk = _bundle(layer, pool, part, layer.kinds[len(dense) :])
    up = matrices[1] if len(matrices) == 2 else None
    return _RowsFFN(NeuronRows(matrices[0], up, bundle, skips, _bias(layer, first), disk), part.observed)


def _bundle(
    layer: SplitLayer, pool: Pool, part: Part, kinds: Sequence[str]
) -> tuple[Bundle, RowsOnDisk | None]:
    """The rows of ``kinds`` of the neurons that are computed here, and where they come from, if not from
    memory."""
    if isinstance(part.on_disk, NeuronsOnDisk):
        return part.on_disk.bundle(layer.index), OfLayer(part.on_disk, layer.index, part.tokens)
    return part.packed.bundle(pool, layer, part.hot_neurons, kinds), None


def _load_columns(layer: SplitLayer, pool: Pool, part: Part, deviations: float | None) -> ColdFFN:
    """All neurons in the source's order, with its own down projection: the source's form, speed and bits."""
    gate, *up = (part.packed.columns(pool, layer, kind) for kind in layer.kinds[:-1])
    down = part.packed.columns(pool, layer, "down")
    bias = None if layer.bias is None else layer.bias[np.argsort(layer.order)].astype(np.float32)
    weights = DenseColumns(gate, up[0] if up else None, down, bias, deviations=deviations)
    return _ColumnsFFN(weights, part.observed)


def _load_thresholded(layer: SplitLayer, pool: Pool, part: Part) -> ColdFFN:
    threshold, first = layer.threshold, part.hot_neurons
    assert threshold is not None
    bundle, disk = _bundle(layer, pool, part, [kind for kind in layer.kinds if kind != threshold.factor])
    return _ThresholdedFFN(
        ThresholdedRows(
            factor=threshold.factor,
            first=part.packed.rows(pool, layer, threshold.factor, first),
            threshold=threshold.values[first:].copy(),
            bundle=bundle,
            disk=disk,
        )
    )


def _load_predicted(layer: SplitLayer, pool: Pool, part: Part) -> ColdFFN:
    assert layer.predictor is not None
    first = part.hot_neurons
    here: Predictor | None = None
    if isinstance(part.on_disk, NeuronsOnDisk):
        here = part.on_disk.predictor(layer.index, part.tokens)
    elif not part.named:
        here = lay_out(layer.predictor, pool, first, layer.width, part.tokens)
    bundle, disk = _bundle(layer, pool, part, layer.kinds)
    return _PredictedFFN(
        PredictedRows(
            predictor=here or named_elsewhere(layer.neurons - first),
            bundle=bundle,
            bias=_bias(layer, first),
            disk=disk,
        )
    )


def predictor_thresholds(ffn: object) -> Floats | None:
    """The thresholds of the predictor of ``ffn``, which may be written to between runs; None without one, or
    where the hot device predicts."""
    if not isinstance(ffn, _PredictedFFN) or isinstance(ffn.weights.predictor, NamedElsewhere):
        return None
    return ffn.weights.predictor.threshold


def write_recall_check(
    model: Model,
    index: int,
    pool: Pool,
    packed: PackedWeights,
    ffn: ColdFFN,
    writer: BlockWriter,
    buffers: Buffers,
) -> RecallCheck | None:
    """Append, right after the operations of ``ffn``, operations that compute the truth of its predictions;
    None for an FFN without one."""
    layer = model.layers[index].ffn
    if not isinstance(ffn, _PredictedFFN) or not isinstance(layer, SplitLayer):
        return None
    assert buffers.scores is not None
    first = layer.neurons - ffn.neurons
    gate_rows, *up_rows = (packed.rows(pool, layer, kind, first) for kind in layer.kinds[:-1])
    truth = GateAndUp(gate_rows, up_rows[0] if up_rows else None, ffn.weights.bias)
    scores, gate, up = (narrowed(b, ffn.neurons) for b in (buffers.scores, buffers.gate, buffers.up))
    writer.ffn_truth(truth, gate, up)
    return RecallCheck(writer.builder.mark(), scores, ffn.weights.predictor.threshold, gate)


def _bias(layer: SplitLayer, first: int) -> Floats | None:
    """The biases of all neurons from position ``first`` on."""
    return None if layer.bias is None else layer.bias[first:].astype(np.float32)
