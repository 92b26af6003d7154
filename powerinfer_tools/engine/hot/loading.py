"""Loading the placed weights onto a device: one block of memory, given out piece by piece, with each matrix
in the form that the device reads quickest."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from powerinfer_formats.split import SplitLayer
from powerinfer_kernels import RowType, packed_row_bytes, repack
from powerinfer_kernels.triton_layout import PLANAR_TYPES, to_planar
from powerinfer_tools.engine.hot.dequantize import dequantize
from powerinfer_tools.engine.hot.devices import Device
from powerinfer_tools.engine.hot.elementwise import HotNorm
from powerinfer_tools.engine.hot.hot_ffn import FileRows, FusedRows, HotFFN, Rows, UnpackedRows
from powerinfer_tools.engine.hot.placement import ALIGNMENT
from powerinfer_tools.engine.hot.products import Product
from powerinfer_tools.model.tensors import Norm, Weight

#: Its name, and the cut of fatrelu.
Activation = tuple[str, float]
Tensor = torch.Tensor


class Arena:
    """One block of device memory, given out piece by piece; before :meth:`fill` it only counts."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._memory: Tensor | None = None

    def fill(self, memory: Tensor) -> None:
        """Begin anew, in ``memory`` uint8 (nbytes,)."""
        self.nbytes, self._memory = 0, memory

    @property
    def counting(self) -> bool:
        """Whether pieces have no memory yet."""
        return self._memory is None

    def take(self, nbytes: int) -> Tensor:
        """uint8 (nbytes,); without content while it counts."""
        first = self.nbytes
        self.nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT
        if self._memory is None:
            return torch.empty(nbytes, dtype=torch.uint8, device="meta")
        assert self.nbytes <= len(self._memory)
        return self._memory[first : first + nbytes]

    def floats(self, *shape: int) -> Tensor:
        """float32 of ``shape``."""
        return self.typed(torch.float32, *shape)

    def typed(self, kind: torch.dtype, *shape: int) -> Tensor:
        """``kind`` of ``shape``."""
        count = int(np.prod(shape))
        return self.take(count * kind.itemsize).view(kind).view(*shape)


@dataclass
class Form:
    """How matrices are kept: planar for the fused kernels, unpacked, or as in the file."""

    memory: Arena
    fused: bool
    unpack: bool
    not_fused: set[str] = field(default_factory=set)

    def window(self, device: Device, host: Tensor) -> Tensor | None:
        """The host's buffer of an exchange as a tensor that kernels can access; None without fused kernels,
        or if they cannot access it."""
        return device.window(host) if self.fused and not self.memory.counting and host.numel() else None

    def ffn(self, layer: SplitLayer, count: int, activation: Activation) -> HotFFN:
        """The first ``count`` neurons of ``layer``."""
        first, *factor, down = (self._neuron_rows(layer, kind, count) for kind in layer.kinds)
        bias = None if layer.bias is None else self.vector(layer.bias[:count])
        return HotFFN(first, factor[0] if factor else None, down, bias, count, activation)

    def product(self, weight: Weight, bias: npt.NDArray[np.float32] | None = None) -> Product:
        """A whole matrix."""
        source = weight.data.reshape(weight.rows, -1)
        rows = self.rows(source, weight.row_type, weight.columns)
        added = None if bias is None else self.vector(bias)
        return Product(rows, weight.rows, weight.columns, added, weight.scale)

    def vector(self, values: npt.NDArray[np.float32]) -> Tensor:
        """float32 (values,)."""
        placed = self.memory.floats(len(values))
        if not self.memory.counting:
            placed.copy_(torch.from_numpy(values.copy()))
        return placed

    def norm(self, norm: Norm, eps: float) -> HotNorm:
        """A norm."""
        bias = None if norm.bias is None else self.vector(norm.bias)
        return HotNorm(norm.kind, self.vector(norm.weight), bias, eps, self.fused)

    def rows(self, source: npt.NDArray[np.uint8], row_type: RowType, columns: int) -> Rows:
        """Rows of a matrix, uint8 (rows, row bytes), on the device."""
        counting = self.memory.counting
        if self.unpack:
            return UnpackedRows(
                row_type, torch.empty(0) if counting else _unpacked(source, row_type, columns)
            )
        placed = self.memory.take(len(source) * packed_row_bytes(row_type, columns))
        if self.fused and row_type in PLANAR_TYPES:
            from powerinfer_kernels.triton_launch import PlanarRows

            if not counting:
                placed.copy_(
                    torch.from_numpy(to_planar(_packed(source, row_type, columns), row_type, columns))
                )
            return FusedRows(PlanarRows(placed, row_type, len(source), columns))
        if self.fused and row_type is not RowType.F32:  # those are read as they are
            self.not_fused.add(row_type.name)
        if not counting:
            placed.copy_(torch.from_numpy(_packed(source, row_type, columns)).reshape(-1))
        return FileRows(row_type, placed.view(len(source), -1))

    def _neuron_rows(self, layer: SplitLayer, kind: str, count: int) -> Rows:
        return self.rows(layer.rows(kind, 0, count), RowType(layer.type_of(kind)), layer.width)


def _packed(source: npt.NDArray[np.uint8], row_type: RowType, columns: int) -> npt.NDArray[np.uint8]:
    """The rows in the form in which they are computed."""
    return repack(np.ascontiguousarray(source), row_type, len(source), columns)


def _unpacked(source: npt.NDArray[np.uint8], row_type: RowType, columns: int) -> Tensor:
    """The rows as float32 (rows, columns), in memory that begins at a multiple of 64 bytes: products of torch
    on the CPU round otherwise where a matrix begins elsewhere, and NumPy's memory begins anywhere."""
    values = dequantize(torch.from_numpy(_packed(source, row_type, columns)), row_type, columns)
    return values.clone() if row_type is RowType.F32 else values


def unpacked_values(
    layers: Sequence[SplitLayer | None], hot: Sequence[int], matrices: Sequence[Weight]
) -> int:
    """Values of all rows that are placed."""
    pairs = [(layer, count) for layer, count in zip(layers, hot, strict=True) if layer is not None]
    neurons = sum(len(layer.kinds) * layer.width * count for layer, count in pairs)
    return neurons + sum(matrix.rows * matrix.columns for matrix in matrices)
