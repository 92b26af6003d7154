"""The layout of a split file: its keys, its tensor names, and where the rows of a neuron lie in a bundle.

Shared by what writes split files and what reads them, so that the two cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats.block_types import TensorType, row_bytes
from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.gguf_writer import GGUFWriter

VERSION = 1
ALIGNMENT = 64  # of the file and of each row in a bundle: a cache line
KINDS = ("gate", "up", "down")
MODES = ("dense", "gate-first", "predicted", "thresholded")

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


def order_name(layer: int) -> str:
    """I32 [neurons]: the original neuron at each position, hottest first."""
    return f"blk.{layer}.ffn_order"


def hot_name(layer: int, kind: str) -> str:
    """Rows of the hot neurons, [hot, width]; ``kind`` is gate, up or down (transposed: a row per neuron)."""
    return f"blk.{layer}.ffn_{kind}_hot.weight"


def bundle_name(layer: int) -> str:
    """I8 [cold, record_bytes]: one record per cold neuron."""
    return f"blk.{layer}.ffn_cold.bundle"


def predictor_names(layer: int) -> tuple[str, str, str]:
    """The predictor: matrices [rank, width] and [neurons, rank], and thresholds F32 [neurons]."""
    prefix = f"blk.{layer}.predictor"
    return f"{prefix}_in.weight", f"{prefix}_out.weight", f"{prefix}_threshold"


def source_names(layer: int) -> tuple[str, ...]:
    """The FFN matrices of the source model, which a split file does not contain."""
    return tuple(f"blk.{layer}.ffn_{kind}.weight" for kind in KINDS)


@dataclass(frozen=True)
class BundleLayout:
    """A record: gate row ‖ up row ‖ down row, each padded with zeros to 64 bytes.

    ``offsets`` and ``row_sizes`` are in bytes, in the order of ``KINDS``; ``types`` are tensor types.
    """

    types: tuple[TensorType, TensorType, TensorType]
    width: int
    offsets: tuple[int, int, int]
    row_sizes: tuple[int, int, int]
    record_bytes: int

    def rows(self, records: NDArray[np.uint8], kind: str) -> NDArray[np.uint8]:
        """The rows of one kind in ``records`` [k, record_bytes]: a view [k, row bytes]."""
        index = KINDS.index(kind)
        start = self.offsets[index]
        return records[:, start : start + self.row_sizes[index]]

    def pack(
        self, gate: NDArray[np.uint8], up: NDArray[np.uint8], down: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """Records [k, record_bytes] from the rows [k, row bytes] of k neurons; padding is zero."""
        records = np.zeros((len(gate), self.record_bytes), np.uint8)
        for kind, source in zip(KINDS, (gate, up, down), strict=True):
            self.rows(records, kind)[:] = source
        return records


def bundle_layout(gate_type: int, up_type: int, down_type: int, width: int) -> BundleLayout:
    """Where the rows of ``width`` values lie in a record; raises ``ValueError`` as ``row_bytes`` does."""
    types = (TensorType(gate_type), TensorType(up_type), TensorType(down_type))
    gate, up, down = (row_bytes(kind, width) for kind in types)
    up_start = _padded(gate)
    down_start = up_start + _padded(up)
    return BundleLayout(types, width, (0, up_start, down_start), (gate, up, down), down_start + _padded(down))


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class SplitHeader:
    """What a split file says about itself: one item per layer in every tuple but the last two.

    ``types`` are (gate, up, down), the same for the hot and the cold part of a layer.
    ``requantization_error`` is ‖D' − D‖ / ‖D‖ (Frobenius) of the transposed down projection.
    ``corpus_hashes`` and ``corpus_tokens`` name the profile's corpora; none without a profile.
    """

    source_fingerprint: str
    activation: str
    group: int
    hot_neurons: tuple[int, ...]
    modes: tuple[str, ...]
    types: tuple[tuple[TensorType, TensorType, TensorType], ...]
    requantization_error: tuple[float, ...]
    tool_version: str
    corpus_hashes: tuple[str, ...] = ()
    corpus_tokens: int = 0

    def write(self, writer: GGUFWriter) -> None:
        """Add the ``powerinfer.*`` keys."""
        writer.add(KEY_VERSION, VERSION, ValueType.UINT32)
        writer.add(KEY_SOURCE, self.source_fingerprint)
        writer.add(KEY_GROUP, self.group, ValueType.UINT32)
        writer.add(KEY_HOT_NEURONS, self.hot_neurons, ValueType.UINT32)
        writer.add(KEY_MODE, self.modes, ValueType.STRING)
        writer.add(KEY_ACTIVATION, self.activation)
        writer.add(KEY_FFN_TYPES, [int(kind) for types in self.types for kind in types], ValueType.UINT32)
        writer.add(KEY_TOOL_VERSION, self.tool_version)
        writer.add(KEY_REQUANTIZATION_ERROR, self.requantization_error, ValueType.FLOAT32)
        writer.add(KEY_CORPUS_HASHES, self.corpus_hashes, ValueType.STRING)
        writer.add(KEY_CORPUS_TOKENS, self.corpus_tokens, ValueType.UINT64)


def declare_split_layer(
    writer: GGUFWriter, layer: int, layout: BundleLayout, *, neurons: int, hot: int
) -> None:
    """Declare the tensors of one layer, in the order in which their data has to be written.

    Order, hot gate, hot up, hot down, bundle; tensors of zero neurons are left out.
    """
    writer.declare(order_name(layer), TensorType.I32, (neurons,))
    if hot:
        for kind, row_type in zip(KINDS, layout.types, strict=True):
            writer.declare(hot_name(layer, kind), row_type, (hot, layout.width))
    if neurons > hot:
        writer.declare(bundle_name(layer), TensorType.I8, (neurons - hot, layout.record_bytes))


def declare_predictor(
    writer: GGUFWriter, layer: int, types: tuple[int, int], *, width: int, neurons: int, rank: int
) -> None:
    """Declare the predictor of one layer, in the order in which its data has to be written; ``types`` are
    those of the two matrices."""
    inward, outward, threshold = predictor_names(layer)
    writer.declare(inward, TensorType(types[0]), (rank, width))
    writer.declare(outward, TensorType(types[1]), (neurons, rank))
    writer.declare(threshold, TensorType.F32, (neurons,))
