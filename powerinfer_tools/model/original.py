"""A model of the original PowerInfer as a split file whose neurons stand in their own order, all of them hot.

Its FFN rows stand one neuron each already, so nothing is copied: views point into the mapped file.
"""

from pathlib import Path
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType
from powerinfer_formats.errors import BadValue, WrongShape
from powerinfer_formats.fingerprint import model_fingerprint
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.split import SplitFile, SplitHeader, SplitLayer, SplitSizes, bundle_layout
from powerinfer_formats.split_layout import SplitPrediction
from powerinfer_formats.split_predictors import SplitResidualRelu
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model import original_layout as layout

Bytes = npt.NDArray[np.uint8]
#: Neurons that are placed together when a device takes some of them.
_GROUP = 64


def is_original(source: object) -> TypeGuard[GGUFFile]:
    """Whether an open model is one of the original PowerInfer."""
    return isinstance(source, GGUFFile) and source.magic == layout.MAGIC


def original_activation(architecture: str, file: Path) -> str:
    """The activation of a file of this ``architecture``. Raises ModelError for one that it does not know."""
    if architecture not in layout.ACTIVATIONS:
        supported = ", ".join(layout.ACTIVATIONS)
        raise ModelError(
            f"{file}: models of the original PowerInfer are of {supported}; this one is of {architecture!r}"
        )
    return layout.ACTIVATIONS[architecture]


def above(threshold: float) -> float:
    """The bound b for which score > b says the same of float32 scores as score ≥ ``threshold``."""
    return float(np.nextafter(np.float32(threshold), np.float32(-np.inf)))


def read_original(gguf: GGUFFile, sizes: SplitSizes, *, activation: str, gated: bool) -> SplitFile:
    """The split view of an open file. It runs gate-first, which is exact. Raises ``FormatError``."""
    threshold = np.float32(gguf.get(layout.KEY_THRESHOLD, float, 0.0))
    bound = above(float(threshold))
    if not np.isfinite(threshold) or not np.isfinite(bound):
        raise BadValue(gguf.path, f"metadata {layout.KEY_THRESHOLD!r} is {threshold}, expected a number")
    layers, neurons = sizes.layers, sizes.neurons
    kinds = ("gate", "up", "down") if gated else ("up", "down")
    checker = _Layers(gguf, neurons, sizes.width, kinds, bound)
    made = tuple(checker.layer(index) for index in range(layers))
    header = SplitHeader(
        source_fingerprint=model_fingerprint(gguf),
        activation=activation,
        group=min(_GROUP, neurons),
        hot_neurons=(neurons,) * layers,
        modes=("gate-first",) * layers,
        types=tuple(layer.layout.types for layer in made),
        requantization_error=(0.0,) * layers,
        tool_version="",
        prediction=SplitPrediction((SplitResidualRelu.kind,) * layers, (), ()),
    )
    return SplitFile.of_layers(gguf, header, made)


class _Layers:
    """Views of the layers of one file."""

    def __init__(
        self, gguf: GGUFFile, neurons: int, width: int, kinds: tuple[str, ...], bound: float
    ) -> None:
        self.gguf, self.neurons, self.width, self.kinds = gguf, neurons, width, kinds
        self.order = np.arange(neurons, dtype=np.int32)
        self.threshold = np.full(neurons, bound, np.float32)

    def layer(self, index: int) -> SplitLayer:
        rows = {kind: self._rows(layout.ffn_name(index, kind)) for kind in self.kinds}
        types = {kind: row_type for kind, (_, row_type) in rows.items()}
        bundles = bundle_layout(types.get("gate"), types["up"], types["down"], self.width)
        return SplitLayer(
            index=index,
            mode="gate-first",
            neurons=self.neurons,
            hot_neurons=self.neurons,
            width=self.width,
            order=self.order,
            layout=bundles,
            hot=tuple(data for data, _ in rows.values()),
            cold=np.zeros((0, bundles.record_bytes), np.uint8),
            predictor=self._predictor(index),
            bias=self._bias(f"blk.{index}.ffn_up.bias"),
        )

    def _predictor(self, index: int) -> SplitResidualRelu:
        first, second = layout.predictor_names(index)
        rank = self.gguf.info(first).shape[0]
        widest = max(self.width, self.neurons)
        if rank > widest:
            raise WrongShape(self.gguf.path, f"tensor {first!r} has {rank} rows, expected 1 to {widest}")
        inward, inward_type = self._rows(first, rank, self.width)
        outward, outward_type = self._rows(second, self.neurons, rank)
        return SplitResidualRelu(rank, (inward_type, outward_type), inward, outward, self.threshold)

    def _rows(
        self, name: str, rows: int | None = None, columns: int | None = None
    ) -> tuple[Bytes, TensorType]:
        shape = (rows or self.neurons, columns or self.width)
        row_type = TensorType(self.gguf.info(name).row_type)
        data = self.gguf.tensor(name, shape=shape, types=BLOCK_SHAPES.keys())
        return data.reshape(shape[0], -1), row_type

    def _bias(self, name: str) -> npt.NDArray[np.float32] | None:
        if name not in self.gguf.tensors:
            return None
        values = self.gguf.tensor(name, shape=(self.neurons,), types={TensorType.F32}).view("<f4")
        if not np.isfinite(values).all():
            raise BadValue(self.gguf.path, f"tensor {name!r} has values that are not finite")
        return values
