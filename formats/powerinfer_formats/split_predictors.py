"""The predictors in a split file: checked views of their tensors, by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from powerinfer_formats import errors
from powerinfer_formats.block_types import BLOCK_SHAPES, TensorType
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_formats.model_source import ModelSource
from powerinfer_formats.split_layout import PREDICTOR_TENSORS, predictor_names

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class SplitLowRank:
    """Names the neurons to compute: those where ``outward`` · (``inward`` · normalised FFN input) is above
    their ``threshold``, float32 [neurons].

    ``inward`` holds ``rank`` rows of ``width`` values of the first of ``types``, ``outward`` one row of
    ``rank`` values per neuron of the second, both uint8 [rows, row bytes]; neurons by position, as in
    a split file's layer.
    """

    kind: ClassVar[str] = "low-rank"
    #: Whether it reads the residual stream, and sets what is negative between its matrices to 0.
    residual: ClassVar[bool] = False
    relu: ClassVar[bool] = False
    rank: int
    types: tuple[TensorType, TensorType]
    inward: Bytes
    outward: Bytes
    threshold: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes that one token reads of it."""
        return self.inward.nbytes + self.outward.nbytes + self.threshold.nbytes

    def declare(self, writer: GGUFWriter, layer: int, width: int) -> None:
        """Declare its tensors, in the order of :meth:`pieces`."""
        types = (int(self.types[0]), int(self.types[1]))
        declare_low_rank(writer, layer, types, width=width, neurons=len(self.outward), rank=self.rank)

    def pieces(self, layer: int) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Its tensors, each with its name."""
        parts = (self.inward, self.outward, self.threshold)
        yield from zip(predictor_names(layer, self.kind), parts, strict=True)


class SplitResidualRelu(SplitLowRank):
    """The same with ``outward`` · relu(``inward`` · h), where h is the residual stream that the FFN's norm
    reads (in a parallel block, the layer's input): the original PowerInfer's kind."""

    kind: ClassVar[str] = "residual-relu"
    residual: ClassVar[bool] = True
    relu: ClassVar[bool] = True


@dataclass(frozen=True, eq=False)
class SplitSigns:
    """Names the neurons whose signs agree enough with the input, see
    :class:`~powerinfer_formats.predictors.SignBits`: ``signs`` uint8 [neurons, ceil(width / 8)], neurons by
    position."""

    kind: ClassVar[str] = "sign"
    types: ClassVar[tuple[TensorType, ...]] = ()
    signs: Bytes
    threshold: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes that one token reads of it."""
        return self.signs.nbytes + self.threshold.nbytes

    def declare(self, writer: GGUFWriter, layer: int, width: int) -> None:
        """Declare its tensors, in the order of :meth:`pieces`."""
        signs, threshold = predictor_names(layer, self.kind)
        writer.declare(signs, TensorType.I8, (len(self.signs), -(-width // 8)))
        writer.declare(threshold, TensorType.F32, (len(self.signs),))

    def pieces(self, layer: int) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Its tensors, each with its name."""
        yield from zip(predictor_names(layer, self.kind), (self.signs, self.threshold), strict=True)


#: A predictor of any kind.
SplitPredictor = SplitLowRank | SplitSigns


def declare_low_rank(
    writer: GGUFWriter, layer: int, types: tuple[int, int], *, width: int, neurons: int, rank: int
) -> None:
    """Declare the predictor of one layer, in the order in which its data has to be written; ``types`` are
    those of the two matrices."""
    inward, outward, threshold = predictor_names(layer, "low-rank")
    writer.declare(inward, TensorType(types[0]), (rank, width))
    writer.declare(outward, TensorType(types[1]), (neurons, rank))
    writer.declare(threshold, TensorType.F32, (neurons,))


def read_predictor(
    gguf: ModelSource, layer: int, kind: str, *, neurons: int, width: int
) -> SplitPredictor | None:
    """The predictor of ``layer``, or None where ``kind`` is "none".

    Raises ``MissingTensor``, ``UnexpectedTensor`` (of another kind), ``WrongShape``, ``WrongType`` or
    ``BadValue``.
    """
    names = predictor_names(layer, kind)
    for other in PREDICTOR_TENSORS:
        for name in predictor_names(layer, other):
            if name in gguf.tensors and name not in names:
                raise errors.UnexpectedTensor(
                    gguf.path, f"has a tensor {name!r}, but the predictor of layer {layer} is {kind!r}"
                )
    for name in names:
        if name not in gguf.tensors:
            raise errors.MissingTensor(
                gguf.path, f"has no tensor {name!r}, which the predictor of layer {layer} needs"
            )
    return _READERS[kind](gguf, layer, neurons, width)


def _low_rank(gguf: ModelSource, layer: int, neurons: int, width: int) -> SplitLowRank:
    return SplitLowRank(*_two_matrices(gguf, layer, neurons, width, width))


def _residual_relu(gguf: ModelSource, layer: int, neurons: int, width: int) -> SplitLowRank:
    return SplitResidualRelu(*_two_matrices(gguf, layer, neurons, width, max(width, neurons)))


def _two_matrices(
    gguf: ModelSource, layer: int, neurons: int, width: int, widest: int
) -> tuple[int, tuple[TensorType, TensorType], Bytes, Bytes, NDArray[np.float32]]:
    inward_name, outward_name, threshold_name = predictor_names(layer, "low-rank")
    rank = gguf.info(inward_name).shape[0]
    if not 1 <= rank <= widest:
        raise errors.WrongShape(gguf.path, f"tensor {inward_name!r} has {rank} rows, expected 1 to {widest}")
    inward, inward_type = _matrix(gguf, inward_name, rank, width)
    outward, outward_type = _matrix(gguf, outward_name, neurons, rank)
    threshold = _floats(gguf, threshold_name, neurons)
    return rank, (inward_type, outward_type), inward, outward, threshold


def _signs(gguf: ModelSource, layer: int, neurons: int, width: int) -> SplitSigns:
    signs_name, threshold_name = predictor_names(layer, "sign")
    row = -(-width // 8)
    signs = gguf.tensor(signs_name, shape=(neurons, row), types={TensorType.I8}).reshape(neurons, row)
    if width % 8 and (signs[:, -1] >> (width % 8)).any():
        raise errors.BadValue(gguf.path, f"tensor {signs_name!r} has bits beyond column {width - 1}")
    return SplitSigns(signs, _floats(gguf, threshold_name, neurons))


def _matrix(gguf: ModelSource, name: str, rows: int, columns: int) -> tuple[Bytes, TensorType]:
    row_type = TensorType(gguf.info(name).row_type)
    data = gguf.tensor(name, shape=(rows, columns), types=BLOCK_SHAPES.keys())
    return data.reshape(rows, -1), row_type


def _floats(gguf: ModelSource, name: str, count: int) -> NDArray[np.float32]:
    values = gguf.tensor(name, shape=(count,), types={TensorType.F32}).view("<f4")
    if not np.isfinite(values).all():
        raise errors.BadValue(gguf.path, f"tensor {name!r} has values that are not finite")
    return values


_Reader = Callable[[ModelSource, int, int, int], SplitPredictor | None]
_READERS: dict[str, _Reader] = {
    "none": lambda *_: None,
    "low-rank": _low_rank,
    "residual-relu": _residual_relu,
    "sign": _signs,
}
