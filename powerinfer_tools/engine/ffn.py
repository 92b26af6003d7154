"""The FFNs that the C kernels compute: of a source model, or the neurons of a split file from a split point
on."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from powerinfer_formats.split import SplitLayer
from powerinfer_kernels import Matrix, Pool, RowMatrix, RowType, aligned, row_bytes
from powerinfer_tools.engine.blocks import BlockWriter, DenseColumns, NeuronRows, pack
from powerinfer_tools.engine.buffers import Buffers, Floats
from powerinfer_tools.engine.observation import LayerCounters
from powerinfer_tools.errors import ModelError
from powerinfer_tools.model import DenseFFN, Model

#: Modes that this engine can run. Both are exact; gate-first needs an activation with exact zeros.
MODES = ("dense", "gate-first")


class ColdFFN(Protocol):
    """One layer's FFN, laid out for the kernels."""

    @property
    def neurons(self) -> int:
        """Neurons computed here."""

    @property
    def nbytes(self) -> int:
        """Size of the weights as laid out, in bytes."""

    @property
    def quantized(self) -> bool:
        """Whether gate or up need the quantised input."""

    @property
    def in_rows(self) -> bool:
        """Whether the result is left in ``block_out`` for a merge, instead of in the residual stream."""

    def bytes_per_token(self, density: float) -> float:
        """Bytes that one decoded token touches."""

    def write(
        self, writer: BlockWriter, buffers: Buffers, post_norm: Floats | None, observed: LayerCounters | None
    ) -> None:
        """Append the operations."""


def layer_modes(model: Model, asked: str | None) -> tuple[str, ...]:
    """The mode of each layer: ``asked``, else what a split file says, else dense.

    Raises ModelError for a mode that the model does not allow.
    """
    layers = model.hyper.layers
    if asked is None:
        modes = model.split.modes if model.split else ("dense",) * layers
        for mode in sorted(set(modes)):
            _check_mode(model, mode)
        return modes
    _check_mode(model, asked)
    return (asked,) * layers


def _check_mode(model: Model, asked: str) -> None:
    if asked not in MODES:
        raise ModelError(
            f"{model.path}: mode {asked!r} is not one that this version runs ({', '.join(MODES)})"
        )
    if asked == "gate-first" and not model.exact_zeros:
        raise ModelError(
            f"{model.path}: gate-first skips neurons whose activation is exactly zero; "
            f"{model.hyper.activation} has no exact zeros, use --mode dense"
        )
    if asked == "gate-first" and model.split is None:
        raise ModelError(f"{model.path}: gate-first needs a split file; make one with powerinfer convert")


def load_cold_ffn(model: Model, index: int, pool: Pool, mode: str, hot_neurons: int) -> ColdFFN:
    """Lay out layer ``index`` without its first ``hot_neurons`` neurons, which the hot device computes."""
    ffn = model.layers[index].ffn
    if isinstance(ffn, DenseFFN):
        columns = DenseColumns(pack(pool, ffn.gate), pack(pool, ffn.up), pack(pool, ffn.down))
        return _ColumnsFFN(columns)
    return _load_rows(ffn, pool, mode, hot_neurons)


@dataclass(frozen=True)
class _ColumnsFFN:
    weights: DenseColumns
    in_rows: bool = False

    @property
    def neurons(self) -> int:
        return self.weights.gate.rows

    @property
    def nbytes(self) -> int:
        return self.weights.gate.nbytes + self.weights.up.nbytes + self.weights.down.nbytes

    @property
    def quantized(self) -> bool:
        return not (self.weights.gate.row_type.is_float and self.weights.up.row_type.is_float)

    def bytes_per_token(self, density: float) -> float:
        return float(self.nbytes)

    def write(
        self, writer: BlockWriter, buffers: Buffers, post_norm: Floats | None, observed: LayerCounters | None
    ) -> None:
        writer.ffn_columns(self.weights, post_norm, observed)


@dataclass(frozen=True)
class _RowsFFN:
    weights: NeuronRows
    in_rows: bool = True

    @property
    def neurons(self) -> int:
        return self.weights.gate.rows

    @property
    def skips(self) -> bool:
        return isinstance(self.weights.up, RowMatrix)

    @property
    def nbytes(self) -> int:
        w = self.weights
        return w.gate.nbytes + w.up.nbytes + w.down.nbytes

    @property
    def quantized(self) -> bool:
        return not (self.weights.gate.row_type.is_float and self.weights.up.row_type.is_float)

    def bytes_per_token(self, density: float) -> float:
        w = self.weights
        rest = w.up.nbytes + w.down.nbytes
        return w.gate.nbytes + (rest * density if self.skips else rest)

    def write(
        self, writer: BlockWriter, buffers: Buffers, post_norm: Floats | None, observed: LayerCounters | None
    ) -> None:
        gate = _narrowed(buffers.gate, self.neurons)
        writer.ffn_rows(self.weights, gate, _narrowed(buffers.up, self.neurons))


@dataclass(frozen=True)
class _NoneFFN:
    """A layer whose neurons are all on the hot device."""

    neurons: int = 0
    nbytes: int = 0
    quantized: bool = False
    in_rows: bool = True

    def bytes_per_token(self, density: float) -> float:
        return 0.0

    def write(
        self, writer: BlockWriter, buffers: Buffers, post_norm: Floats | None, observed: LayerCounters | None
    ) -> None:
        return


def _load_rows(layer: SplitLayer, pool: Pool, mode: str, first: int) -> ColdFFN:
    last = layer.neurons
    if first == last:
        return _NoneFFN()
    gate = _matrix(pool, layer.rows("gate", first, last), RowType(layer.gate_type), layer.width)
    down = _row_matrix(layer.rows("down", first, last), RowType(layer.down_type), layer.width)
    up_rows, up_type = layer.rows("up", first, last), RowType(layer.up_type)
    up: Matrix | RowMatrix
    if mode == "gate-first":
        up = _row_matrix(up_rows, up_type, layer.width)
    else:
        up = _matrix(pool, up_rows, up_type, layer.width)
    return _RowsFFN(NeuronRows(gate, up, down))


def _narrowed(buffer: Floats, width: int) -> Floats:
    """The same memory as (tokens, width), contiguous."""
    tokens = len(buffer)
    return buffer.reshape(-1)[: tokens * width].reshape(tokens, width)


def _matrix(pool: Pool, rows: npt.NDArray[np.uint8], row_type: RowType, columns: int) -> Matrix:
    return Matrix.pack(pool, rows.reshape(-1), row_type, len(rows), columns)


def _row_matrix(rows: npt.NDArray[np.uint8], row_type: RowType, columns: int) -> RowMatrix:
    data = aligned((len(rows), row_bytes(row_type, columns)), np.uint8)
    data[:] = rows
    return RowMatrix(data, row_type, len(rows), columns)
