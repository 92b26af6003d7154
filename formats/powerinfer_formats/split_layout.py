"""The layout of a split file: its keys, its tensor names, and where the rows of a neuron lie in a bundle.

Shared by the writer and the reader of split files, so that the two cannot disagree. The units of a layer
are groups of its neurons, or its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats.block_types import TensorType, row_bytes
from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.split_devices import SplitDevices
from powerinfer_formats.split_thresholds import SplitThresholding

VERSION = 1
#: Of a file whose units are experts.
EXPERTS_VERSION = 2
#: Of a file whose dense layers have the source's own down projection in addition.
COLUMNS_VERSION = 3
#: Of a file some of whose layers have experts, and others one FFN, all of them with sorted neurons or none.
MIXED_VERSION = 4
ALIGNMENT = 64  # of the file and of each row in a bundle: a cache line
#: Rows of a neuron; those of an FFN without gate are the last two.
KINDS = ("gate", "up", "down")

KEY_VERSION = "powerinfer.version"
KEY_SOURCE = "powerinfer.source_fingerprint"
KEY_GROUP = "powerinfer.group"
KEY_HOT_NEURONS = "powerinfer.hot_neurons"
KEY_MODE = "powerinfer.mode"
KEY_ACTIVATION = "powerinfer.activation"
KEY_FFN_TYPES = "powerinfer.ffn_types"
KEY_TOOL_VERSION = "powerinfer.tool_version"
KEY_REQUANTIZATION_ERROR = "powerinfer.requantization_error"
KEY_CORPUS_HASHES = "powerinfer.corpus_sha256"
KEY_CORPUS_TOKENS = "powerinfer.corpus_tokens"
# Only in files of experts.
KEY_HOT_EXPERTS = "powerinfer.hot_experts"
KEY_HOT_SHARED = "powerinfer.hot_shared_experts"
# Only in those whose experts have no gate.
KEY_EXPERT_GATE = "powerinfer.expert_gate"
# Only in files with predictors.
KEY_PREDICTORS = "powerinfer.predictors"
KEY_PREDICTOR_RECALL = "powerinfer.predictor_recall"
KEY_PREDICTOR_DENSITY = "powerinfer.predictor_density"
# Only where it was measured.
KEY_PREDICTION_COST = "powerinfer.prediction_cost"

#: The kinds of a layer's predictor, each with the endings of its tensors' names; thresholds come last.
PREDICTOR_TENSORS = {
    "none": (),
    "low-rank": ("in.weight", "out.weight", "threshold"),
    "residual-relu": ("in.weight", "out.weight", "threshold"),
    "sign": ("signs", "threshold"),
}


def order_name(layer: int) -> str:
    """I32 [neurons]: the original neuron at each position, hottest first."""
    return f"blk.{layer}.ffn_order"


def hot_name(layer: int, kind: str) -> str:
    """Rows of the hot neurons, [hot, width]; ``kind`` is gate, up or down (transposed: a row per neuron)."""
    return f"blk.{layer}.ffn_{kind}_hot.weight"


def bundle_name(layer: int) -> str:
    """I8 [cold, record_bytes]: one record per cold neuron."""
    return f"blk.{layer}.ffn_cold.bundle"


def columns_name(layer: int) -> str:
    """The source's own down projection, [width, neurons] in the source's order of neurons; only in files of
    ``COLUMNS_VERSION``, in layers of mode dense."""
    return f"blk.{layer}.ffn_down_columns.weight"


def bias_name(layer: int) -> str:
    """F32 [neurons]: what is added to the up rows' products of an FFN without gate, hottest neuron first."""
    return f"blk.{layer}.ffn_bias"


def predictor_names(layer: int, kind: str = "low-rank") -> tuple[str, ...]:
    """The tensors of a predictor of this kind. Low-rank: matrices [rank, width] and [neurons, rank]; sign: I8
    [neurons, ceil(width / 8)]; and thresholds F32 [neurons]."""
    return tuple(f"blk.{layer}.predictor_{ending}" for ending in PREDICTOR_TENSORS[kind])


def source_names(layer: int) -> tuple[str, ...]:
    """The FFN matrices of the source model, which a split file does not contain."""
    return tuple(f"blk.{layer}.ffn_{kind}.weight" for kind in KINDS)


def source_bias_name(layer: int) -> str:
    """The source's own bias of the up rows, which a split file does not contain, either."""
    return f"blk.{layer}.ffn_up.bias"


def expert_order_name(layer: int) -> str:
    """I32 [experts]: the source's expert at each position, hottest first."""
    return f"blk.{layer}.expert_order"


def experts_name(layer: int, kind: str) -> str:
    """The matrices of all experts, hottest first, of the shape that :meth:`SplitSizes.matrices` says."""
    return f"blk.{layer}.ffn_{kind}_experts.weight"


def source_experts_name(layer: int, kind: str) -> str:
    """The same in a source model, in its own order."""
    return f"blk.{layer}.ffn_{kind}_exps.weight"


@dataclass(frozen=True)
class SplitSizes:
    """What a split file must fit: layers; the neurons of the FFN of each, or of each of its ``experts`` (0:
    the model has none); the model's width; whether every token takes a shared expert besides. In a model with
    experts, the layers ``dense`` have one FFN of ``dense_neurons`` instead, and those ``without`` nothing.
    Where FFNs differ, ``each`` has the neurons of every layer, 0 of one without, and the others are the
    most."""

    layers: int
    neurons: int
    width: int
    experts: int = 0
    shared: bool = False
    dense: frozenset[int] = frozenset()
    dense_neurons: int = 0
    without: frozenset[int] = frozenset()
    each: tuple[int, ...] = ()

    def routed(self, layer: int) -> bool:
        """Whether ``layer`` has experts."""
        return self.experts > 0 and layer not in self.dense | self.without

    @property
    def most_neurons(self) -> int:
        """Neurons of a layer with one FFN; the most where they differ."""
        return self.dense_neurons if self.experts else self.neurons

    def neurons_of(self, layer: int) -> int:
        """Neurons of the one FFN of ``layer``; 0 where it has experts, or nothing."""
        if self.routed(layer) or layer in self.without:
            return 0
        return self.each[layer] if self.each else self.most_neurons

    def matrices(self, kind: str) -> tuple[int, int, int]:
        """Shape of the matrices of all experts of a layer: [experts, neurons, width], or [experts, width,
        neurons] for ``kind`` down."""
        rows, columns = (self.width, self.neurons) if kind == "down" else (self.neurons, self.width)
        return self.experts, rows, columns


@dataclass(frozen=True)
class BundleLayout:
    """A record: gate row ‖ up row ‖ down row (up ‖ down without gate), each padded with zeros to 64 bytes.

    ``offsets`` and ``row_sizes`` are in bytes, in the order of ``kinds``; ``types`` are tensor types.
    """

    types: tuple[TensorType, ...]
    width: int
    offsets: tuple[int, ...]
    row_sizes: tuple[int, ...]
    record_bytes: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which rows a neuron has, in order: the last of ``KINDS``."""
        return KINDS[-len(self.types) :]

    def rows(self, records: NDArray[np.uint8], kind: str) -> NDArray[np.uint8]:
        """The rows of one kind in ``records`` [k, record_bytes]: a view [k, row bytes]."""
        index = self.kinds.index(kind)
        start = self.offsets[index]
        return records[:, start : start + self.row_sizes[index]]

    def pack(self, *rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Records [k, record_bytes] from the rows [k, row bytes] of k neurons, an array for each of
        ``kinds``; padding is zero."""
        records = np.zeros((len(rows[0]), self.record_bytes), np.uint8)
        for kind, source in zip(self.kinds, rows, strict=True):
            self.rows(records, kind)[:] = source
        return records


def bundle_layout(gate_type: int | None, up_type: int, down_type: int, width: int) -> BundleLayout:
    """Where the rows of ``width`` values lie in a record, ``gate_type`` None without gate rows; raises
    ``ValueError`` as ``row_bytes`` does."""
    types = tuple(TensorType(kind) for kind in (gate_type, up_type, down_type) if kind is not None)
    sizes = tuple(row_bytes(kind, width) for kind in types)
    ends = tuple(accumulate(_padded(size) for size in sizes))
    return BundleLayout(types, width, (0, *ends[:-1]), sizes, ends[-1])


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class SplitPrediction:
    """What a split file says of its predictors: for each layer the kind, and recall and predicted density on
    tokens not learnt from (1 and the true density where there is no predictor); both empty where that was
    not measured.

    ``cost`` is what mode predicted costs in quality where that was measured: perplexity without and with
    predictors, Kullback-Leibler divergence in nats a token, and the relative increase of perplexity that was
    asked for (0 where none was).
    """

    kinds: tuple[str, ...]
    recall: tuple[float, ...]
    density: tuple[float, ...]
    cost: tuple[float, float, float, float] | None = None

    def write(self, writer: GGUFWriter) -> None:
        """Add the keys."""
        writer.add(KEY_PREDICTORS, self.kinds, ValueType.STRING)
        writer.add(KEY_PREDICTOR_RECALL, self.recall, ValueType.FLOAT32)
        writer.add(KEY_PREDICTOR_DENSITY, self.density, ValueType.FLOAT32)
        if self.cost is not None:
            writer.add(KEY_PREDICTION_COST, self.cost, ValueType.FLOAT32)


@dataclass(frozen=True)
class SplitHeader:
    """What a split file says about itself: one item per layer in every tuple but ``corpus_hashes``.

    ``hot_neurons`` are multiples of ``group``, the neurons that are placed together, or all; of ``experts``
    (how many a layer has, 0: the units are groups of neurons) the neurons of one, but in the layers
    ``dense``, which have one FFN of ``dense_neurons``. Those are sorted, and ``dense_group`` of them are
    placed together; where that is 0, such an FFN is one expert, with the source's matrices. ``hot_shared``:
    whether the expert that every token takes is hot, empty where there is none. ``corpus_hashes`` and
    ``corpus_tokens`` name the profile's corpora; none without a profile. ``devices`` None: all but units is
    on the CPU.

    ``types`` are (gate, up, down), without gate (up, down), the same for both parts of a layer, and nothing
    of a layer whose neurons are not sorted, which has the source's matrices, or no FFN.
    ``requantization_error`` is ‖D' − D‖ / ‖D‖ (Frobenius) of the transposed down projection, 0 of such a
    layer. Where all are, both are empty, like ``activation``.
    ``prediction`` is None in a file without predictors, ``thresholding`` in one without thresholds.
    ``columns``: layers may have the source's own down projection, see :func:`columns_name`. ``expert_gate``:
    experts have gate matrices.
    """

    source_fingerprint: str
    activation: str
    group: int
    hot_neurons: tuple[int, ...]
    modes: tuple[str, ...]
    types: tuple[tuple[TensorType, ...], ...]
    requantization_error: tuple[float, ...]
    tool_version: str
    corpus_hashes: tuple[str, ...] = ()
    corpus_tokens: int = 0
    prediction: SplitPrediction | None = None
    thresholding: SplitThresholding | None = None
    devices: SplitDevices | None = None
    columns: bool = False
    experts: int = 0
    hot_shared: tuple[bool, ...] = ()
    dense: tuple[int, ...] = ()
    dense_neurons: int = 0
    dense_group: int = 0
    expert_gate: bool = True

    @property
    def version(self) -> int:
        """The version of the file."""
        if self.experts:
            return MIXED_VERSION if self.dense else EXPERTS_VERSION
        return COLUMNS_VERSION if self.columns else VERSION

    @property
    def row_layers(self) -> tuple[int, ...]:
        """The layers whose neurons are sorted."""
        if self.experts:
            return self.dense if self.dense_group else ()
        return tuple(layer for layer, types in enumerate(self.types) if types)

    def unit_neurons(self, layer: int) -> int:
        """Neurons of a unit of ``layer``: one, or those of an expert, or of a whole FFN."""
        if layer in self.row_layers:
            return 1
        return self.dense_neurons if layer in self.dense else self.group

    @property
    def ffn_group(self) -> int:
        """Neurons of one FFN that are placed together."""
        return self.dense_group if self.experts else self.group

    def write(self, writer: GGUFWriter) -> None:
        """Add the ``powerinfer.*`` keys, in their order: those of all files, and those of layers with and
        without experts, in which all others have 0."""
        rows, experts = self.row_layers, bool(self.experts)
        neurons, types = bool(rows), [int(kind) for types in self.types for kind in types]
        skips = any(mode != "dense" for mode in self.modes)
        layers = list(enumerate(self.hot_neurons))
        hot_experts = [0 if layer in rows else count // self.unit_neurons(layer) for layer, count in layers]
        hot_neurons = [count if layer in rows else 0 for layer, count in layers]
        entries: tuple[tuple[bool, str, Any, ValueType | None], ...] = (
            (True, KEY_VERSION, self.version, ValueType.UINT32),
            (True, KEY_SOURCE, self.source_fingerprint, None),
            (neurons, KEY_GROUP, self.ffn_group, ValueType.UINT32),
            (neurons, KEY_HOT_NEURONS, hot_neurons, ValueType.UINT32),
            (neurons or skips, KEY_MODE, self.modes, ValueType.STRING),
            (neurons, KEY_ACTIVATION, self.activation, None),
            (neurons, KEY_FFN_TYPES, types, ValueType.UINT32),
            (experts, KEY_HOT_EXPERTS, hot_experts, ValueType.UINT32),
            (bool(self.hot_shared), KEY_HOT_SHARED, [int(hot) for hot in self.hot_shared], ValueType.UINT32),
            (not self.expert_gate, KEY_EXPERT_GATE, False, ValueType.BOOL),
            (True, KEY_TOOL_VERSION, self.tool_version, None),
            (neurons, KEY_REQUANTIZATION_ERROR, self.requantization_error, ValueType.FLOAT32),
            (True, KEY_CORPUS_HASHES, self.corpus_hashes, ValueType.STRING),
            (True, KEY_CORPUS_TOKENS, self.corpus_tokens, ValueType.UINT64),
        )
        for applies, key, value, kind in entries:
            if applies:
                writer.add(key, value, kind)
        for part in (self.prediction, self.thresholding, self.devices):
            if part is not None:
                part.write(writer)


def declare_split_layer(
    writer: GGUFWriter,
    layer: int,
    layout: BundleLayout,
    *,
    neurons: int,
    hot: int,
    bias: bool = False,
    columns: TensorType | None = None,
) -> None:
    """Declare the tensors of one layer, in the order in which their data has to be written.

    Order, bias if there is one, hot gate, hot up, hot down, bundle, down projection of the source with its
    type ``columns`` if it is kept; tensors of zero neurons are left out.
    """
    writer.declare(order_name(layer), TensorType.I32, (neurons,))
    if bias:
        writer.declare(bias_name(layer), TensorType.F32, (neurons,))
    if hot:
        for kind, row_type in zip(layout.kinds, layout.types, strict=True):
            writer.declare(hot_name(layer, kind), row_type, (hot, layout.width))
    if neurons > hot:
        writer.declare(bundle_name(layer), TensorType.I8, (neurons - hot, layout.record_bytes))
    if columns is not None:
        writer.declare(columns_name(layer), columns, (layout.width, neurons))


def declare_experts(writer: GGUFWriter, layer: int, sizes: SplitSizes, types: Sequence[TensorType]) -> None:
    """Declare the tensors of one layer of experts, in the order in which their data has to be written: the
    order of experts, then gate, up and down (up and down without gate) of ``types``."""
    writer.declare(expert_order_name(layer), TensorType.I32, (sizes.experts,))
    for kind, row_type in zip(KINDS[-len(types) :], types, strict=True):
        writer.declare(experts_name(layer, kind), row_type, sizes.matrices(kind))
