"""The hot neurons of one layer on a device, and the scratch memory that all layers share.

One token goes through fused Triton kernels, if available. More tokens, and row types or devices without such
kernels, go through float32 rows, unpacked chunk by chunk, and torch's matrix products. Both have the same
results, except for the order of float32 sums.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from powerinfer_kernels import RowType
from powerinfer_tools.engine.hot.dequantize import dequantize
from powerinfer_tools.engine.hot.elementwise import round_activations
from powerinfer_tools.model.device_memory import CHUNK_ROWS

if TYPE_CHECKING:
    from powerinfer_kernels.triton_launch import PlanarRows

Tensor = torch.Tensor


class Rows(Protocol):
    """Rows of one matrix on the device."""

    @property
    def row_type(self) -> RowType:
        """As in the file."""

    def chunk(self, first: int, last: int, space: Tensor) -> Tensor:
        """float32 (last - first, columns); may lie in ``space`` (at least as many, columns)."""

    def some(self, index: Tensor, columns: int) -> Tensor | None:
        """float32 (k, columns) of the rows ``index`` int64 (k,), without reading other rows; None if this
        form cannot be read that way."""


@dataclass(frozen=True)
class UnpackedRows:
    """float32 (neurons, width): unpacked once, where memory is not scarce."""

    row_type: RowType
    data: Tensor

    def chunk(self, first: int, last: int, space: Tensor) -> Tensor:
        """A view."""
        return self.data[first:last]

    def some(self, index: Tensor, columns: int) -> Tensor | None:
        """Gathered."""
        return self.data.index_select(0, index)


@dataclass(frozen=True)
class FileRows:
    """uint8 (neurons, packed_row_bytes), unpacked by torch operations."""

    row_type: RowType
    data: Tensor

    def chunk(self, first: int, last: int, space: Tensor) -> Tensor:
        """Unpacked anew."""
        return dequantize(self.data[first:last], self.row_type, space.shape[1])

    def some(self, index: Tensor, columns: int) -> Tensor | None:
        """Gathered, then unpacked."""
        return dequantize(self.data.index_select(0, index), self.row_type, columns)


@dataclass(frozen=True)
class FusedRows:
    """Planar rows, which Triton kernels read."""

    planar: "PlanarRows"

    @property
    def row_type(self) -> RowType:
        """As in the file."""
        return self.planar.row_type

    def chunk(self, first: int, last: int, space: Tensor) -> Tensor:
        """Unpacked by a kernel, into ``space``."""
        from powerinfer_kernels.triton_launch import unpack

        unpack(self.planar, first, last - first, space)
        return space[: last - first]

    def some(self, index: Tensor, columns: int) -> Tensor | None:
        """Planes are not gathered; the fused kernels skip rows themselves."""
        return None


@dataclass(frozen=True)
class PartRows:
    """Some rows of a planar matrix, from ``first`` on; code that launches kernels on it has faster ways."""

    whole: FusedRows
    first: int

    @property
    def row_type(self) -> RowType:
        """As in the file."""
        return self.whole.row_type

    def chunk(self, first: int, last: int, space: Tensor) -> Tensor:
        """Unpacked by a kernel, into ``space``."""
        return self.whole.chunk(self.first + first, self.first + last, space)

    def some(self, index: Tensor, columns: int) -> Tensor | None:
        """As of the whole."""
        return None


@dataclass(frozen=True)
class Inputs:
    """float32 (T, width): the normalised input, and its form rounded for the integer kernels. If all gate and
    up rows take one form, both are the same tensor. ``codes``: of a single token, the input of fused kernels
    in place of the rounded form, int32 (1, ``code_words(width)``)."""

    exact: Tensor
    rounded: Tensor
    codes: Tensor | None = None

    def first(self, tokens: int) -> "Inputs":
        """The inputs of the first ``tokens`` tokens, all tokens of the batch."""
        return Inputs(self.exact[:tokens], self.rounded[:tokens], self.codes if tokens == 1 else None)

    def between(self, first: int, last: int) -> "Inputs":
        """The inputs of some tokens of the batch."""
        alone = len(self.exact) == 1
        return Inputs(self.exact[first:last], self.rounded[first:last], self.codes if alone else None)

    @property
    def apart(self) -> bool:
        """Whether there are two."""
        return self.exact.data_ptr() != self.rounded.data_ptr()

    def of(self, rows: Rows) -> Tensor:
        """The input that rows of this type take."""
        return self.exact if rows.row_type.is_float else self.rounded

    def taken_by(self, row_type: RowType) -> Tensor:
        """The input that fused kernels take with rows of this type."""
        if row_type.is_float:
            return self.exact
        return self.rounded if self.codes is None else self.codes

    def round(self, *, fused: bool = False) -> None:
        """Make all other forms of the exact one; ``fused``: there is a kernel for it."""
        if self.codes is None and not (fused and self.exact.is_contiguous()):
            round_activations(self.exact, self.rounded)
            return
        from powerinfer_kernels.triton_launch import round_values

        round_values(self.exact.view(1, -1), self.rounded.view(1, -1), self.codes)


@dataclass(frozen=True)
class Scratch:
    """Memory for one layer at work: a chunk of unpacked rows (chunk, width), two products (T, chunk), and for
    the fused kernels the hidden values (1, neurons) and partial sums."""

    chunk: Tensor
    gate: Tensor
    up: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Joining:
    """How the sum of an FFN is added to the residual stream: with ``bias`` (width,), if anything, then times
    ``factor``."""

    bias: Tensor | None
    factor: float


@dataclass(frozen=True)
class HotFFN:
    """One layer's hot neurons. The activation reads the products of ``gate``; an FFN of two matrices has no
    other factor, and ``up`` is None. ``bias`` is added to the products of ``gate``; ``activation`` is the
    name of the activation, and the cut of fatrelu."""

    gate: Rows
    up: Rows | None
    down: Rows
    bias: Tensor | None
    neurons: int
    activation: tuple[str, float]

    @property
    def fused(self) -> bool:
        """Whether fused kernels compute a single token, and write each value of its sum once."""
        return all(isinstance(rows, FusedRows) for rows in (self.gate, self.up or self.gate, self.down))

    def compute(
        self,
        inputs: Inputs,
        scratch: Scratch,
        out: Tensor,
        named: Tensor | None = None,
        joins: Joining | None = None,
    ) -> None:
        """out (T, width) = Σ over the hot neurons of act(gate · x + bias) · (up · x) · down row; with
        ``named`` uint8 (T, neurons), over the neurons that are not 0 there. Fused kernels can also add the
        sum to ``out`` at once.

        One token reads no row of another neuron, on the host and in the fused kernels; other ways compute
        them and leave them out.
        """
        alone = len(out) == 1
        if self.fused and alone:
            self._fused(inputs, scratch.rest, out, named, joins)
            return
        assert joins is None
        if alone and named is not None and out.device.type == "cpu":
            # Sizes here depend on the number of named neurons: an asynchronous device would have to wait.
            self._gathered(inputs, scratch, out, named)
        else:
            self._chunked(inputs, scratch, out, named)

    def count(self, inputs: Inputs, scratch: Scratch, named: Tensor, counts: Tensor) -> None:
        """Add to ``counts`` int64 (3,), second and third, how many neurons are active, and how many of those
        are not 0 in ``named`` (T, neurons). All gate and up rows are read for it."""
        for first, last in self._pieces(scratch):
            active = self._hidden(inputs, scratch, first, last) != 0
            counts[1:2].add_(active.sum())
            counts[2:3].add_((active & (named[:, first:last] != 0)).sum())

    def _fused(
        self, inputs: Inputs, rest: Tensor, out: Tensor, named: Tensor | None, joins: Joining | None
    ) -> None:
        from powerinfer_kernels import triton_launch

        gate, up, down = self.gate, self.up, self.down
        assert isinstance(gate, FusedRows)
        assert isinstance(down, FusedRows)
        factor = up.planar if isinstance(up, FusedRows) else None
        hidden, partial = rest[: self.neurons].view(1, -1), rest[triton_launch.aligned(self.neurons) :]
        x_gate, x_up = inputs.taken_by(gate.row_type), inputs.taken_by((up or gate).row_type)
        triton_launch.hidden(
            x_gate, x_up, gate.planar, factor, self.activation, hidden, bias=self.bias, active=named
        )
        more = (None, None) if joins is None else (joins.bias, joins.factor)
        triton_launch.sum_rows(hidden, down.planar, partial, out, *more)

    def _gathered(self, inputs: Inputs, scratch: Scratch, out: Tensor, named: Tensor) -> None:
        out.zero_()
        for index in torch.split(named[0].nonzero().squeeze(1), CHUNK_ROWS):
            gate_rows, down = self.gate.some(index, out.shape[1]), self.down.some(index, out.shape[1])
            up_rows = None if self.up is None else self.up.some(index, out.shape[1])
            if gate_rows is None or down is None or (self.up is not None and up_rows is None):
                self._chunked(inputs, scratch, out, named)
                return
            gate = torch.mm(inputs.of(self.gate), gate_rows.T)
            if self.bias is not None:
                gate += self.bias[index]
            up = None
            if self.up is not None and up_rows is not None:
                up = torch.mm(inputs.of(self.up), up_rows.T)
            out.addmm_(activate(gate, up, *self.activation), down)

    def _chunked(self, inputs: Inputs, scratch: Scratch, out: Tensor, named: Tensor | None) -> None:
        out.zero_()
        for first, last in self._pieces(scratch):
            hidden = self._hidden(inputs, scratch, first, last)
            if named is not None:
                hidden.masked_fill_(named[:, first:last] == 0, 0.0)
            out.addmm_(hidden, self.down.chunk(first, last, scratch.chunk))

    def _pieces(self, scratch: Scratch) -> list[tuple[int, int]]:
        """Which neurons are computed at a time."""
        step = len(scratch.chunk)
        return [(first, min(first + step, self.neurons)) for first in range(0, self.neurons, step)]

    def _hidden(self, inputs: Inputs, scratch: Scratch, first: int, last: int) -> Tensor:
        """act(gate) · up of some neurons, (T, last - first)."""
        tokens = len(inputs.exact)

        def products(rows: Rows, space: Tensor) -> Tensor:
            out = space[: tokens * (last - first)].view(tokens, last - first)
            return torch.mm(inputs.of(rows), rows.chunk(first, last, scratch.chunk).T, out=out)

        gate = products(self.gate, scratch.gate)
        if self.bias is not None:
            gate += self.bias[first:last]
        return activate(gate, None if self.up is None else products(self.up, scratch.up), *self.activation)


def activate(gate: Tensor, up: Tensor | None, kind: str, cut: float) -> Tensor:
    """act(gate) · up, or act(gate); ``cut`` is the cut of fatrelu. Both inputs may be overwritten."""
    functional = torch.nn.functional
    match kind:
        case "silu":
            act = functional.silu(gate, inplace=True)
        case "gelu_tanh":
            act = functional.gelu(gate, approximate="tanh")
        case "gelu_erf":
            act = functional.gelu(gate)
        case "relu" | "drelu":
            act = functional.relu_(gate)
        case "relu2":
            act = functional.relu_(gate).square_()
        case "fatrelu":
            act = functional.threshold(gate, cut, 0.0, inplace=True)
        case "sigmoid":
            act = gate.sigmoid_()
        case "softplus":
            act = functional.softplus(gate)
        case _:
            raise AssertionError(f"activation {kind!r} has no torch form")
    if up is None:
        return act
    return act.mul_(functional.relu_(up) if kind == "drelu" else up)
