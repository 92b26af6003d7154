"""A validated view of a split file: units sorted hottest first.

Of neurons, hot rows stand plain and cold rows in bundles. Experts are whole matrices of the source, bit for
bit, in one tensor of each kind: the model's own reader takes them. Either way a smaller budget moves the
split point of a layer, and no rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats import split_layout as names
from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.model_source import ModelSource
from powerinfer_formats.split_devices import SplitDevices, all_on_cpu
from powerinfer_formats.split_header import HeaderReader, read_sizes
from powerinfer_formats.split_layout import BundleLayout, SplitHeader, SplitSizes, bundle_layout
from powerinfer_formats.split_predictors import SplitPredictor, read_predictor
from powerinfer_formats.split_thresholds import KEY_FACTORS, SplitThreshold, read_threshold

__all__ = [
    "BundleLayout",
    "SplitFile",
    "SplitHeader",
    "SplitLayer",
    "SplitPredictor",
    "SplitSizes",
    "SplitUnits",
    "bundle_layout",
]


@dataclass(frozen=True, eq=False)
class DownColumns:
    """The source's own down projection: uint8 [width, row bytes], neurons in the source's order; a read-only
    view."""

    row_type: TensorType
    rows: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class SplitLayer:
    """The FFN of one layer. Positions count from the hottest neuron; views are read-only.

    ``order`` int32 [neurons] gives the original neuron at each position. ``predictor`` and ``threshold`` are
    None where the file has none for this layer. ``hot`` holds the rows of the hot neurons, uint8 [hot, row
    bytes] for each of ``kinds``; ``cold`` the records of the others, uint8 [cold, record_bytes], see
    ``layout``. ``bias`` float32 [neurons] is added to the up rows' products of an FFN without gate; None
    where there is none. ``columns``: the source's down projection, where the file has it in addition.
    """

    index: int
    mode: str
    neurons: int
    hot_neurons: int
    width: int
    order: NDArray[np.int32]
    layout: BundleLayout
    hot: tuple[NDArray[np.uint8], ...]
    cold: NDArray[np.uint8]
    predictor: SplitPredictor | None = None
    bias: NDArray[np.float32] | None = None
    threshold: SplitThreshold | None = None
    columns: DownColumns | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The rows of a neuron: gate, up and down, or up and down."""
        return self.layout.kinds

    def type_of(self, kind: str) -> TensorType:
        """Tensor type of the rows of one of ``kinds``, hot and cold."""
        return self.layout.types[self.kinds.index(kind)]

    @property
    def neuron_bytes(self) -> int:
        """Bytes of the rows of a neuron without padding."""
        return sum(self.layout.row_sizes)

    def rows(self, kind: str, first: int, last: int) -> NDArray[np.uint8]:
        """Rows of one of ``kinds`` of positions [first, last): uint8 [last − first, row bytes].

        A view (not contiguous in the cold part); a copy where the range has hot and cold neurons.
        """
        if not 0 <= first <= last <= self.neurons:
            raise IndexError(f"neurons {first} to {last} of {self.neurons}")
        split = self.hot_neurons
        hot = self.hot[self.kinds.index(kind)][min(first, split) : min(last, split)]
        records = self.cold[max(first, split) - split : max(last, split) - split]
        cold = self.layout.rows(records, kind)
        if not len(cold):
            return hot
        return np.concatenate((hot, cold)) if len(hot) else cold


@dataclass(frozen=True, eq=False)
class SplitUnits:
    """The placement units of one layer, hottest first: neurons, ``group`` of which are placed together, or
    experts, which are placed one by one.

    ``order`` int32 has the source's neuron, or expert, at each position. By the plan the first ``hot`` are on
    the hot device, and with ``shared_hot`` the expert that every token takes.
    """

    order: NDArray[np.int32]
    hot: int
    group: int = 1
    shared_hot: bool = False

    @cached_property
    def positions(self) -> dict[int, int]:
        """Where each neuron, or expert, of the source is."""
        return {number: position for position, number in enumerate(self.order.tolist())}


@dataclass(frozen=True, eq=False)
class SplitFile:
    """A split file whose every rule has been checked; ``gguf`` holds the other tensors and the metadata.

    ``orders`` of each layer are those of neurons or of experts, see :attr:`units`; ``layers`` are those with
    rows of neurons, ascending.
    """

    gguf: ModelSource
    header: SplitHeader
    orders: tuple[NDArray[np.int32], ...]
    layers: tuple[SplitLayer, ...] = ()

    @classmethod
    def of_layers(cls, gguf: ModelSource, header: SplitHeader, layers: Sequence[SplitLayer]) -> Self:
        """One of neurons."""
        return cls(gguf, header, tuple(layer.order for layer in layers), tuple(layers))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open ``path``; the model's sizes are taken from its own metadata. Raises ``FormatError``."""
        gguf = GGUFFile.open(path)
        try:
            split = cls.read(gguf, read_sizes(gguf))
            if split is None:
                raise errors.NotASplitFile(gguf.path, "is not a split file; powerinfer convert makes one")
        except BaseException:
            gguf.close()
            raise
        return split

    @classmethod
    def read(cls, gguf: ModelSource, sizes: SplitSizes) -> Self | None:
        """The split view of an open file, or None where it is a source model. Raises ``FormatError``."""
        if not is_split(gguf):
            return None
        checker = _Checker(gguf, sizes)
        header = checker.header()
        layers = {index: checker.layer(index, header) for index in header.row_layers}
        orders = (
            layers[index].order if index in layers else checker.experts(index, header)
            for index in range(sizes.layers)
        )
        return cls(gguf, header, tuple(orders), tuple(layers.values()))

    @cached_property
    def units(self) -> tuple[SplitUnits, ...]:
        """The units of each layer, of either kind."""
        header, shared = self.header, self.header.hot_shared or (False,) * len(self.orders)
        return tuple(
            SplitUnits(
                order,
                hot // header.unit_neurons(index),
                header.ffn_group if index in header.row_layers else 1,
                shared_hot,
            )
            for index, (order, hot, shared_hot) in enumerate(
                zip(self.orders, self.hot_neurons, shared, strict=True)
            )
        )

    @property
    def source_fingerprint(self) -> str:
        """Fingerprint of the model that was converted."""
        return self.header.source_fingerprint

    @property
    def modes(self) -> tuple[str, ...]:
        """The mode of each layer."""
        return self.header.modes

    @property
    def gated(self) -> bool:
        """Whether neurons have gate rows."""
        return all(len(types) == len(names.KINDS) for types in self.header.types if types)

    @property
    def group(self) -> int:
        """Neurons that are placed together: hot counts are multiples of it, or all."""
        return self.header.group

    @property
    def hot_neurons(self) -> tuple[int, ...]:
        """Hot neurons of each layer, as planned."""
        return self.header.hot_neurons

    @property
    def devices(self) -> SplitDevices:
        """Where everything else is, as planned."""
        return self.header.devices or all_on_cpu(len(self.orders))

    def layer(self, index: int) -> SplitLayer | None:
        """The rows of neurons of layer ``index``; None where it has the source's matrices."""
        return self._by_index.get(index)

    @cached_property
    def _by_index(self) -> dict[int, SplitLayer]:
        return {layer.index: layer for layer in self.layers}

    def close(self) -> None:
        """Let go of the file."""
        self.gguf.close()


def is_split(gguf: ModelSource) -> bool:
    """Whether the file claims to be a split file; a source may carry ``powerinfer.activation`` alone."""
    return names.KEY_VERSION in gguf.metadata


class _Checker(HeaderReader):
    """Judges one file against the sizes that its model has."""

    def __init__(self, gguf: ModelSource, sizes: SplitSizes) -> None:
        super().__init__(gguf, sizes)
        self.width = sizes.width

    def experts(self, index: int, header: SplitHeader) -> NDArray[np.int32]:
        """The order of the experts of one layer, whose matrices must be there, too; an FFN is one, and a
        layer without has none."""
        if not self.sizes.routed(index):
            if not self.sizes.neurons_of(index):
                for name in (names.order_name(index), names.bundle_name(index)):
                    self.absent(name, "the layer has no FFN")
            return np.zeros(min(1, self.sizes.neurons_of(index)), np.int32)
        for kind in names.KINDS:
            self.absent(names.source_experts_name(index, kind), "experts are in the order of the plan")
            if kind == "gate" and not header.expert_gate:
                self.absent(names.experts_name(index, kind), "the file's experts have no gate")
                continue
            shape = self.sizes.matrices(kind)
            self.gguf.tensor(names.experts_name(index, kind), shape=shape, types=frozenset(BLOCK_SHAPES))
        return self.permutation(names.expert_order_name(index), self.sizes.experts, "experts")

    def layer(self, index: int, header: SplitHeader) -> SplitLayer:
        neurons, hot = self.sizes.neurons_of(index), header.hot_neurons[index]
        cold = neurons - hot
        types = header.types[index]
        gate_type = types[0] if len(types) == len(names.KINDS) else None
        try:
            layout = bundle_layout(gate_type, types[-2], types[-1], self.width)
        except ValueError as error:
            self.fail(names.KEY_FFN_TYPES, f"does not suit layer {index}: {error}")
        for name in names.source_names(index):
            self.absent(name, "the rows are in the hot and cold parts")
        self.absent(names.source_bias_name(index), "the bias is there in the order of the neurons")
        hot_rows = tuple(
            self._rows(names.hot_name(index, kind), hot, self.width, row_type, size)
            for kind, row_type, size in zip(layout.kinds, layout.types, layout.row_sizes, strict=True)
        )
        if gate_type is None:
            self.absent(names.hot_name(index, "gate"), "the file's FFNs have no gate")
        record = layout.record_bytes
        return SplitLayer(
            index=index,
            mode=header.modes[index],
            neurons=neurons,
            hot_neurons=hot,
            width=self.width,
            order=self.permutation(names.order_name(index), neurons, "neurons"),
            layout=layout,
            hot=hot_rows,
            cold=self._rows(names.bundle_name(index), cold, record, TensorType.I8, record),
            predictor=self._predictor(index, header),
            bias=self._bias(index, gated=gate_type is not None),
            threshold=self._threshold(index, header, gated=gate_type is not None),
            columns=self._columns(index, header),
        )

    def _columns(self, index: int, header: SplitHeader) -> DownColumns | None:
        """The source's down projection, which only dense layers of files of its version may have."""
        name = names.columns_name(index)
        if not header.columns:
            self.absent(name, f"the file is of version {names.VERSION}")
        if name not in self.gguf.tensors:
            return None
        if header.modes[index] != "dense":
            self.absent(name, f"the layer's mode is {header.modes[index]}")
        shape = (self.width, self.sizes.neurons_of(index))
        rows = self.gguf.tensor(name, shape=shape, types=set(BLOCK_SHAPES))
        row_type = TensorType(self.gguf.info(name).row_type)
        return DownColumns(row_type, rows.reshape(self.width, -1))

    def _bias(self, index: int, *, gated: bool) -> NDArray[np.float32] | None:
        name = names.bias_name(index)
        if gated:
            self.absent(name, "FFNs with a gate have no bias")
        return self._vector(name, self.sizes.neurons_of(index)) if name in self.gguf.tensors else None

    def _threshold(self, index: int, header: SplitHeader, *, gated: bool) -> SplitThreshold | None:
        """The thresholds as in the header; a layer of mode thresholded has some."""
        factor = header.thresholding.factors[index] if header.thresholding else "none"
        if factor == "none" and header.modes[index] == "thresholded":
            self.fail(names.KEY_MODE, f"is thresholded for layer {index}, which has no thresholds")
        if factor != "none" and not gated:
            self.fail(KEY_FACTORS, f"is {factor} for layer {index}, which has no gate")
        return read_threshold(self.gguf, index, factor, self.sizes.neurons_of(index))

    def _vector(self, name: str, neurons: int) -> NDArray[np.float32]:
        """One finite value for each neuron."""
        values = self.gguf.tensor(name, shape=(neurons,), types={TensorType.F32}).view("<f4")
        if not np.isfinite(values).all():
            raise errors.BadValue(self.gguf.path, f"tensor {name!r} has values that are not finite")
        return values

    def _predictor(self, index: int, header: SplitHeader) -> SplitPredictor | None:
        """The predictor as in the header; a layer of mode predicted has one."""
        kind = header.prediction.kinds[index] if header.prediction else "none"
        if kind == "none" and header.modes[index] == "predicted":
            self.fail(names.KEY_MODE, f"is predicted for layer {index}, which has no predictor")
        neurons = self.sizes.neurons_of(index)
        return read_predictor(self.gguf, index, kind, neurons=neurons, width=self.width)

    def _rows(self, name: str, rows: int, columns: int, row_type: TensorType, size: int) -> NDArray[np.uint8]:
        if rows == 0:
            self.absent(name, "the layer has no neurons there")
            empty = np.zeros((0, size), np.uint8)
            empty.flags.writeable = False
            return empty
        return self.gguf.tensor(name, shape=(rows, columns), types={row_type}).reshape(rows, size)
