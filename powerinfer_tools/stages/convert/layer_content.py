"""What a split file holds of each layer in place of the source's FFN: sorted neurons, or sorted experts.

Neurons keep the bits of gate and up rows; a permutation changes nothing. The transposed down projection of a
quantised source has to be quantised again, and the error of that is measured. Experts keep every bit: whole
matrices change their places.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from powerinfer_formats.block_types import TensorType
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.plan import Plan
from powerinfer_formats.profile import Profile
from powerinfer_formats.split_layout import (
    KINDS,
    BundleLayout,
    SplitSizes,
    bias_name,
    columns_name,
    declare_experts,
    declare_split_layer,
    expert_order_name,
    experts_name,
    order_name,
    source_bias_name,
    source_experts_name,
    source_names,
)
from powerinfer_formats.split_thresholds import threshold_name
from powerinfer_kernels import WRITTEN_TYPES, RowType, block_shape
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model import original_layout as original
from powerinfer_tools.model.counted_units import order_of
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.layer_weights import LayerWeights
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.split_rows import default_down_type, ffn_layout
from powerinfer_tools.model.tensors import Weight
from powerinfer_tools.stages.convert.neuron_records import NeuronRecords
from powerinfer_tools.stages.convert.selection import Selection

Order = npt.NDArray[np.int32]


def layer_content(
    model: Model, profile: Profile, plan: Plan, selection: Selection, quant: str | None
) -> "LayerContent":
    """The sorted neurons of ``model``, whose down rows have the type ``quant``, see :func:`down_type`, or its
    sorted experts. Beside experts, an FFN whose activation makes no zeros is one, and stays as it is."""
    whole = model.hyper.routing is not None and not model.exact_zeros
    layouts = tuple(None if whole else _layout(layer, quant) for layer in model.layers)
    return LayerContent(model, profile, plan, selection, layouts)


def _layout(layer: LayerWeights, quant: str | None) -> BundleLayout | None:
    if layer.feeds is None or isinstance(layer.feeds, ExpertsFFN):
        return None
    ffn = layer.source_ffn
    return ffn_layout(ffn, down_type(ffn, quant, ffn.up.columns))


def down_type(ffn: DenseFFN, quant: str | None, width: int) -> RowType:
    """Row type of the transposed down projection: ``quant``, else the source's own if it is a float, or is
    transposed already and can be written, else Q8_0."""
    if quant is None:
        return default_down_type(ffn)
    try:
        chosen = RowType[quant.upper()]
    except KeyError:
        chosen = None
    if chosen not in WRITTEN_TYPES:
        names = ", ".join(row_type.name for row_type in WRITTEN_TYPES)
        raise ConvertError(f"--quant {quant}: the down projection can be written as {names}")
    if width % block_shape(chosen)[0]:
        raise ConvertError(f"--quant {quant}: rows of {width} values are not whole blocks")
    return chosen


@dataclass(frozen=True)
class LayerContent:
    """The layers of one conversion: units in the order of ``profile``, rows of neurons as ``layouts`` say
    (None: the layer has the source's matrices), and what ``selection`` has of them."""

    model: Model
    profile: Profile
    plan: Plan
    selection: Selection
    layouts: tuple[BundleLayout | None, ...] = field(repr=False)

    @property
    def types(self) -> tuple[tuple[TensorType, ...], ...]:
        """Row types of the sorted neurons of each layer."""
        return tuple(() if layout is None else layout.types for layout in self.layouts)

    @property
    def columns(self) -> bool:
        """Whether some layer has the source's own down projection, too."""
        return any(self._columns(index) is not None for index in range(self.model.hyper.layers))

    @property
    def down_type(self) -> str:
        """Row type of the down projections of the first layer that has some."""
        first = next(i for i, layer in enumerate(self.model.layers) if layer.feeds is not None)
        layer, layout = self.model.layers[first], self.layouts[first]
        if layout is not None:
            return layout.types[-1].name
        down = layer.ffn.down if isinstance(layer.ffn, ExpertsFFN) else layer.source_ffn.down
        return down.row_type.name

    def replaced(self) -> set[str]:
        """The source's tensors that the file does not have."""
        names = set[str]()
        for index, layout in enumerate(self.layouts):
            if layout is None:
                kinds = (*KINDS, "gate_up")  # as files may have the rows of both in one tensor
                names |= {source_experts_name(index, kind) for kind in kinds}
                continue
            names |= {*source_names(index), source_bias_name(index)}
            names |= {matrix.name for matrix in self.model.layers[index].source_ffn.matrices}
            if self.model.is_original:
                names |= {*(original.ffn_name(index, kind) for kind in KINDS)}
                names |= {*original.predictor_names(index)}
        return names

    def declare(self, writer: GGUFWriter, index: int) -> None:
        """Declare the tensors of one layer, in the order of :meth:`write`."""
        hyper, ffn, layout = self.model.hyper, self.model.layers[index].feeds, self.layouts[index]
        order = self._order(index)
        if isinstance(ffn, ExpertsFFN):
            types = [TensorType(stack.row_type) for stack in ffn.stacks]
            declare_experts(
                writer, index, SplitSizes(hyper.layers, hyper.neurons, hyper.width, len(order)), types
            )
        if layout is None:
            return
        columns = self._columns(index)
        declare_split_layer(
            writer,
            index,
            layout,
            neurons=len(order),
            hot=self.plan.layers[index].hot_neurons,
            bias=self.model.layers[index].ffn_bias is not None,
            columns=None if columns is None else TensorType(columns.row_type),
        )
        predictor = self.selection.predictor(index, order)
        if predictor is not None:
            predictor.declare(writer, index, layout.width)
        if self.selection.threshold(index) is not None:
            writer.declare(threshold_name(index), TensorType.F32, (len(order),))

    def write(self, writer: GGUFWriter, index: int) -> float:
        """Write the data of the tensors of one layer; ‖D′ − D‖ / ‖D‖ of its down projection."""
        layout, ffn, order = self.layouts[index], self.model.layers[index].feeds, self._order(index)
        if layout is not None:
            return self._write_neurons(writer, index, layout, order)
        if isinstance(ffn, ExpertsFFN):
            writer.write(expert_order_name(index), order.astype("<i4"))
            for kind, stack in zip(KINDS[-len(ffn.stacks) :], ffn.stacks, strict=True):
                for expert in order.tolist():
                    matrix = stack.matrix(f"expert {expert}", expert, len(order))
                    writer.write(experts_name(index, kind), matrix.data)
        return 0.0

    def _write_neurons(self, writer: GGUFWriter, index: int, layout: BundleLayout, order: Order) -> float:
        hot, bias = self.plan.layers[index].hot_neurons, self.model.layers[index].ffn_bias
        ffn = self.model.layers[index].source_ffn
        writer.write(order_name(index), order.astype("<i4"))
        if bias is not None:
            writer.write(bias_name(index), bias[order])
        error = NeuronRecords(writer, index, ffn, layout, order, hot).write()
        if (columns := self._columns(index)) is not None:
            writer.write(columns_name(index), columns.data)
        if (predictor := self.selection.predictor(index, order)) is not None:
            for name, data in predictor.pieces(index):
                writer.write(name, data)
        if (threshold := self.selection.threshold(index)) is not None:
            writer.write(threshold_name(index), threshold[order])
        return error

    def _order(self, index: int) -> Order:
        """The units of a layer, hottest first."""
        ffn = self.model.layers[index].feeds
        units = ffn.router.rows if isinstance(ffn, ExpertsFFN) else self.model.hyper.facts[index].neurons
        return order_of(self.profile, index, units)

    def _columns(self, index: int) -> Weight | None:
        """The down projection as it is, to be kept beside the transposed one that was quantised again: of
        layers that are computed dense where the plan has no hot neurons at all. That is the source's form and
        speed. (Where some are hot, every split point has the same bits.)"""
        if self.layouts[index] is None:
            return None
        ffn, layers = self.model.layers[index].source_ffn, self.plan.layers
        keeps = layers[index].mode == "dense" and not any(layer.hot_neurons for layer in layers)
        return None if ffn.transposed or ffn.down.row_type.is_float or not keeps else ffn.down
