"""What convert and train share: the rows of a split file's FFN, and a model split in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from powerinfer_formats.plan import Plan
from powerinfer_formats.predictors import LayerPredictor
from powerinfer_formats.split import SplitFile, SplitHeader, SplitLayer
from powerinfer_formats.split_devices import SplitDevices
from powerinfer_formats.split_layout import BundleLayout, SplitPrediction, bundle_layout
from powerinfer_kernels import RowType, dequantize
from powerinfer_tools import __version__
from powerinfer_tools.model.down_rows import DownRows, on_threads
from powerinfer_tools.model.ffn_matrices import DenseFFN
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.predictor_scores import split_predictor
from powerinfer_tools.model.tensors import Weight

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
#: Neurons whose rows are made at a time.
_STRIP = 256


def planned_devices(plan: Plan) -> SplitDevices:
    """Where ``plan`` has what is no neuron and no expert."""
    return SplitDevices(
        attention=tuple(layer.attention for layer in plan.layers),
        predictor=tuple(layer.predictor or "cpu" for layer in plan.layers),
        head=next((unit.device for unit in plan.units if unit.name == "head"), "cpu"),
    )


def plain_rows(weight: Weight) -> Bytes:
    """The rows of ``weight`` as (rows, row bytes)."""
    return weight.data.reshape(weight.rows, -1)


def transposed_down(ffn: DenseFFN) -> Floats:
    """The down projection as float32 (neurons, width): one row per neuron, in the source's order."""
    down = ffn.down
    values = dequantize(down.data, down.row_type, down.rows, down.columns)
    return values if ffn.transposed else np.ascontiguousarray(values.T)


def stored_down(ffn: DenseFFN, row_type: RowType) -> Bytes:
    """The same rows as ``row_type``: the source's bits where it has such."""
    rows = DownRows(ffn, row_type)
    stored: Bytes = np.empty((rows.neurons, rows.nbytes), np.uint8)
    for _ in on_threads(lambda strip: rows.write(*strip, stored[slice(*strip)]), rows.strips(_STRIP)):
        pass
    return stored


def ffn_layout(ffn: DenseFFN, down: RowType) -> BundleLayout:
    """The records of one layer, with down rows of this type."""
    gate = None if ffn.gate is None else ffn.gate.row_type
    return bundle_layout(gate, ffn.up.row_type, down, ffn.up.columns)


def default_down_type(ffn: DenseFFN) -> RowType:
    """Type of the transposed down projection where none is asked for: the source's own if it is a float, or
    is transposed already and can be written, else Q8_0."""
    source = ffn.down.row_type
    kept = source.is_float or (ffn.transposed and source in (RowType.Q8_0, RowType.Q4_0))
    return source if kept else RowType.Q8_0


def split_in_memory(model: Model, predictors: Sequence[LayerPredictor], row_type: str) -> Model:
    """``model`` as its split file would be opened, all neurons cold and in the source's order; mode predicted
    in layers with a predictor, else gate-first. Rows are read from the source when they are needed.
    """
    layers = tuple(_split_layer(model, index, made, row_type) for index, made in enumerate(predictors))
    header = SplitHeader(
        source_fingerprint=model.fingerprint,
        activation=model.hyper.activation,
        group=model.hyper.neurons,
        hot_neurons=(0,) * len(layers),
        modes=tuple(layer.mode for layer in layers),
        types=tuple(layer.layout.types for layer in layers),
        requantization_error=(0.0,) * len(layers),
        tool_version=__version__,
        prediction=SplitPrediction(
            tuple(layer.predictor.kind if layer.predictor else "none" for layer in layers), (), ()
        ),
    )
    weights = tuple(replace(source, feeds=layer) for source, layer in zip(model.layers, layers, strict=True))
    return replace(model, layers=weights, split=SplitFile.of_layers(model.source, header, layers))


@dataclass(frozen=True, eq=False)
class _SourceLayer(SplitLayer):
    """A layer whose rows are those of ``source``: it holds no copy of them."""

    source: DenseFFN = field(kw_only=True)

    def rows(self, kind: str, first: int, last: int) -> Bytes:
        """Rows of one of ``kinds``; the down projection is transposed for this."""
        if not 0 <= first <= last <= self.neurons:
            raise IndexError(f"neurons {first} to {last} of {self.neurons}")
        if kind == "down":
            return stored_down(self.source, RowType(self.type_of(kind)))[first:last]
        return plain_rows(self.source.matrices[self.kinds.index(kind)])[first:last]


def _split_layer(model: Model, index: int, made: LayerPredictor, row_type: str) -> SplitLayer:
    ffn, neurons, width = model.layers[index].source_ffn, model.hyper.neurons, model.hyper.width
    layout, order = ffn_layout(ffn, default_down_type(ffn)), np.arange(neurons, dtype=np.int32)
    return _SourceLayer(
        index=index,
        mode="gate-first" if made is None else "predicted",
        neurons=neurons,
        hot_neurons=0,
        width=width,
        order=order,
        layout=layout,
        hot=(np.zeros((0, 0), np.uint8),) * len(layout.kinds),
        cold=np.zeros((0, layout.record_bytes), np.uint8),
        predictor=split_predictor(made, row_type, order),
        bias=model.layers[index].ffn_bias,
        source=ffn,
    )
