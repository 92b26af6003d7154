"""What a split file holds of each layer in place of the source's FFN: sorted neurons, or sorted experts.

Neurons keep the bits of gate and up rows; a permutation changes nothing. The transposed down projection of a
quantised source has to be quantised again, and the error of that is measured. Experts keep every bit: whole
matrices change their places.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

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
    bundle_name,
    columns_name,
    declare_experts,
    declare_split_layer,
    expert_order_name,
    experts_name,
    hot_name,
    order_name,
    source_bias_name,
    source_experts_name,
    source_names,
)
from powerinfer_formats.split_thresholds import threshold_name
from powerinfer_kernels import WRITTEN_TYPES, RowType, block_shape
from powerinfer_tools.errors import ConvertError
from powerinfer_tools.model import original_layout as original
from powerinfer_tools.model.down_rows import down_rows
from powerinfer_tools.model.ffn_matrices import DenseFFN, ExpertsFFN
from powerinfer_tools.model.loading import Model
from powerinfer_tools.model.split_rows import (
    default_down_type,
    ffn_layout,
    plain_rows,
    stored_down,
)
from powerinfer_tools.model.tensors import Weight
from powerinfer_tools.stages.convert.selection import Selection

#: A tensor's name, and a piece of its data.
Piece = tuple[str, npt.NDArray[np.generic]]


class LayerContent(Protocol):
    """The layers of one conversion."""

    @property
    def types(self) -> tuple[tuple[TensorType, ...], ...]:
        """Row types of each layer, as the header has them: none of experts."""

    @property
    def columns(self) -> bool:
        """Whether some layer has the source's own down projection, too."""

    @property
    def down_type(self) -> str:
        """Row type of the first layer's down projections."""

    def replaced(self) -> set[str]:
        """The source's tensors that the file does not have."""

    def error(self, index: int) -> float:
        """‖D′ − D‖ / ‖D‖ of the down projection of one layer."""

    def declare(self, writer: GGUFWriter, index: int) -> None:
        """Declare the tensors of one layer."""

    def pieces(self, index: int) -> Iterator[Piece]:
        """Their data, in the same order."""


def layer_content(
    model: Model, profile: Profile, plan: Plan, selection: Selection, quant: str | None
) -> LayerContent:
    """The sorted experts of ``model``, or its sorted neurons, whose down rows have the type ``quant``, see
    :func:`down_type`."""
    if model.hyper.routing is not None:
        return _Experts(model, profile)
    ffns = [layer.source_ffn for layer in model.layers]
    layouts = tuple(ffn_layout(ffn, down_type(ffn, quant, ffn.up.columns)) for ffn in ffns)
    return _Neurons(model, profile, plan, selection, layouts)


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
class _Experts:
    """Whole experts, in the order of ``profile``."""

    model: Model
    profile: Profile
    types: tuple[tuple[TensorType, ...], ...] = ()
    columns: bool = False

    @property
    def down_type(self) -> str:
        return self._ffn(0).down.row_type.name

    def replaced(self) -> set[str]:
        kinds = (*KINDS, "gate_up")  # as files may have the rows of both in one tensor
        return {source_experts_name(i, kind) for i in range(self.model.hyper.layers) for kind in kinds}

    def error(self, index: int) -> float:
        return 0.0

    def declare(self, writer: GGUFWriter, index: int) -> None:
        hyper, types = self.model.hyper, [TensorType(stack.row_type) for stack in self._ffn(index).stacks]
        sizes = SplitSizes(hyper.layers, hyper.neurons, hyper.width, self.profile.neurons(index))
        declare_experts(writer, index, sizes, types)

    def pieces(self, index: int) -> Iterator[Piece]:
        order = self.profile.order(index)
        yield expert_order_name(index), order.astype("<i4")
        for kind, stack in zip(KINDS, self._ffn(index).stacks, strict=True):
            for expert in order.tolist():
                yield experts_name(index, kind), stack.matrix(f"expert {expert}", expert, len(order)).data

    def _ffn(self, index: int) -> ExpertsFFN:
        ffn = self.model.layers[index].ffn
        assert isinstance(ffn, ExpertsFFN)
        return ffn


@dataclass(frozen=True)
class _Neurons:
    """Neurons in the order of ``profile``, rows as ``layouts`` say, and what ``selection`` has of them."""

    model: Model
    profile: Profile
    plan: Plan
    selection: Selection
    layouts: tuple[BundleLayout, ...] = field(repr=False)

    @property
    def types(self) -> tuple[tuple[TensorType, ...], ...]:
        return tuple(layout.types for layout in self.layouts)

    @property
    def columns(self) -> bool:
        return any(self._columns(index) is not None for index in range(self.model.hyper.layers))

    @property
    def down_type(self) -> str:
        return self.types[0][-1].name

    def replaced(self) -> set[str]:
        names = set[str]()
        for index in range(self.model.hyper.layers):
            names |= {*source_names(index), source_bias_name(index)}
            if self.model.is_original:
                names |= {*(original.ffn_name(index, kind) for kind in KINDS)}
                names |= {*original.predictor_names(index)}
        return names

    def error(self, index: int) -> float:
        ffn, row_type = self._ffn(index), self._down_type(index)
        kept = ffn.transposed and ffn.down.row_type == row_type
        return 0.0 if kept else down_rows(ffn, row_type)[1]

    def declare(self, writer: GGUFWriter, index: int) -> None:
        columns, neurons = self._columns(index), self.model.hyper.neurons
        declare_split_layer(
            writer,
            index,
            self.layouts[index],
            neurons=neurons,
            hot=self.plan.layers[index].hot_neurons,
            bias=self.model.layers[index].ffn_bias is not None,
            columns=None if columns is None else TensorType(columns.row_type),
        )
        predictor = self.selection.predictor(index, self.profile.order(index))
        if predictor is not None:
            predictor.declare(writer, index, self.layouts[index].width)
        if self.selection.threshold(index) is not None:
            writer.declare(threshold_name(index), TensorType.F32, (neurons,))

    def pieces(self, index: int) -> Iterator[Piece]:
        order, hot = self.profile.order(index), self.plan.layers[index].hot_neurons
        ffn, layout, bias = self._ffn(index), self.layouts[index], self.model.layers[index].ffn_bias
        sources = [*(plain_rows(weight) for weight in ffn.matrices[:-1])]
        sources.append(stored_down(ffn, self._down_type(index)))
        yield order_name(index), order.astype("<i4")
        if bias is not None:
            yield bias_name(index), bias[order]
        if hot:
            for kind, rows in zip(layout.kinds, sources, strict=True):
                yield hot_name(index, kind), rows[order[:hot]]
        if hot < len(order):
            yield bundle_name(index), layout.pack(*(rows[order[hot:]] for rows in sources))
        if (columns := self._columns(index)) is not None:
            yield columns_name(index), columns.data
        if (predictor := self.selection.predictor(index, order)) is not None:
            yield from predictor.pieces(index)
        if (threshold := self.selection.threshold(index)) is not None:
            yield threshold_name(index), threshold[order]

    def _ffn(self, index: int) -> DenseFFN:
        return self.model.layers[index].source_ffn

    def _down_type(self, index: int) -> RowType:
        return RowType(self.layouts[index].types[-1])

    def _columns(self, index: int) -> Weight | None:
        """The down projection as it is, to be kept beside the transposed one that was quantised again: of
        layers that are computed dense where the plan has no hot neurons at all. That is the source's form and
        speed. (Where some are hot, every split point has the same bits.)"""
        ffn, layers = self._ffn(index), self.plan.layers
        wanted = layers[index].mode == "dense" and not any(layer.hot_neurons for layer in layers)
        return None if ffn.transposed or ffn.down.row_type.is_float or not wanted else ffn.down
