"""Products with matrices on a device: the matrices of attention, predictors and the head."""

from dataclasses import dataclass

import torch

from powerinfer_tools.engine.hot.hot_ffn import FusedRows, Inputs, Rows, UnpackedRows

Tensor = torch.Tensor


@dataclass(frozen=True)
class Product:
    """A matrix (count, columns), times ``scale``, and the bias of its products (count,), if any."""

    rows: Rows
    count: int
    columns: int
    bias: Tensor | None = None
    scale: float = 1.0

    @property
    def is_fused(self) -> bool:
        """Whether a fused kernel makes the whole product of a single token."""
        return isinstance(self.rows, FusedRows) and self.scale == 1.0

    @property
    def rounds(self) -> bool:
        """Whether the integer kernels would round its input."""
        return not self.rows.row_type.is_float

    def times(self, inputs: Inputs, chunk: Tensor, out: Tensor) -> None:
        """out (T, count) = input · rowsᵀ + bias; ``chunk`` is flat scratch for unpacked rows."""
        if isinstance(self.rows, FusedRows) and len(out) == 1:
            from powerinfer_kernels import triton_launch

            bias = self.bias if self.is_fused else None
            triton_launch.matvec(inputs.taken_by(self.rows.row_type), self.rows.planar, out, bias)
            if not self.is_fused:
                self._finish(out)
            return
        source = inputs.of(self.rows)
        if isinstance(self.rows, UnpackedRows):
            torch.mm(source, self.rows.data.T, out=out)
        else:
            self._chunked(source, chunk, out)
        self._finish(out)

    def _finish(self, out: Tensor) -> None:
        if self.scale != 1.0:
            out *= self.scale
        if self.bias is not None:
            out += self.bias

    def _chunked(self, source: Tensor, chunk: Tensor, out: Tensor) -> None:
        step = min(self.count, len(chunk) // self.columns)
        space = chunk[: step * self.columns].view(step, self.columns)
        for first in range(0, self.count, step):
            last = min(first + step, self.count)
            torch.mm(source, self.rows.chunk(first, last, space).T, out=out[:, first:last])


def round_where_needed(inputs: Inputs, *consumers: Product) -> None:
    """Fill in the rounded forms, where some consumer takes them."""
    if any(product.rounds for product in consumers):
        inputs.round(fused=isinstance(consumers[0].rows, FusedRows))
