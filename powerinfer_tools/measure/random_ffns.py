"""Equal FFNs with random weights in every layout that the engine has, to time one against the other."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from powerinfer_kernels import (
    Activations,
    Bundle,
    Matrix,
    Pool,
    Program,
    ProgramBuilder,
    RowType,
    aligned,
    block_shape,
    dequantize,
    packed_row_bytes,
)
from powerinfer_tools import detect
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.measure.synthetic.random_blocks import random_rows

Floats = npt.NDArray[np.float32]
#: Modes that leave neurons out; an FFN without gate has the first two.
SPARSE_MODES = ("predicted", "gate-first", "thresholded")
#: Distinct rows; more only repeat them, which no cache can tell from different ones.
_PATTERN_ROWS = 64
#: Bytes of one layout of the weights: beyond what caches of this size of machine hold.
_DEFEAT_CACHES = 640 << 20
_SEED = 1
#: Neurons of an FFN that is nearly empty, and how many of those make up a pass.
_FEW = 32
FEW_LAYERS = 64


@dataclass(frozen=True)
class FFNShape:
    """``types`` are those of gate, up and down rows, or of up and down rows of an FFN without gate.
    ``expert``: computed as whole matrices, as an expert is, not by neurons."""

    width: int
    neurons: int
    types: tuple[RowType, ...]
    expert: bool = False

    @property
    def gated(self) -> bool:
        """Whether neurons have gate rows."""
        return len(self.types) == 3

    @property
    def dense(self) -> str:
        """The dense form in which it is computed, as :class:`FFNLayers` calls them."""
        return "dense" if self.expert else "dense-rows"

    @property
    def columns(self) -> "FFNShape | None":
        """The same with the down projection as a source model has it, in the type of up rows; None where the
        neurons are no whole blocks of it."""
        up = self.types[-2]
        whole = not self.expert and self.neurons % block_shape(up)[0] == 0
        return replace(self, types=(*self.types[:-1], up)) if whole else None

    @property
    def smallest(self) -> "FFNShape":
        """One of few neurons, to measure what an FFN costs besides reading its rows."""
        block = block_shape(self.types[-1])[0] if self.expert else 1
        return replace(self, neurons=max(_FEW, block))


class FFNLayers:
    """As many FFNs as defeat caches (or ``layers``), and one program per mode that runs all of them, as
    decoding would: threads that sleep between layers would have to be woken for each.

    ``dense`` names the dense form: "dense" as a source model has it, "dense-rows" as a split file has it;
    ``modes`` are some of :data:`SPARSE_MODES`. Raises HardwareError when there is not enough memory.
    """

    def __init__(
        self, pool: Pool, shape: FFNShape, dense: str, modes: Sequence[str], layers: int | None = None
    ) -> None:
        self._pool, self._shape = pool, shape
        self._size = (shape.neurons, shape.width)
        self._row_bytes = [packed_row_bytes(kind, shape.width) for kind in shape.types]
        layer_bytes = shape.neurons * sum(self._row_bytes)
        self._count = max(2, -(-_DEFEAT_CACHES // layer_bytes)) if layers is None else layers
        _require_memory(self._count * layer_bytes * 8 // 3)
        self._random = np.random.default_rng(_SEED)
        self._x = aligned((1, shape.width), np.float32)
        self._x[:] = self._random.standard_normal(shape.width)
        quantized = [kind for kind in shape.types if not kind.is_float]
        self._acts = Activations(1, shape.width) if quantized else None
        self._out = aligned((1, shape.width), np.float32)
        self._buffers = [aligned((1, shape.neurons), np.float32) for _ in range(2)]
        self._threshold = np.full(shape.neurons, 0.5, np.float32)
        self._selects = [aligned((1, shape.neurons), np.float32) for _ in range(self._count)]
        self._programs = self._write((dense, *modes))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of all FFNs, as rows."""
        return self._count * self._shape.neurons * sum(self._row_bytes)

    def touched(self, mode: str, density: float) -> float:
        """Bytes of weights that one token reads in one layer."""
        rows = {"gate-first": 1, "thresholded": 1, "predicted": 0}.get(mode, len(self._row_bytes))
        always, skippable = sum(self._row_bytes[:rows]), sum(self._row_bytes[rows:])
        return self._shape.neurons * (always + skippable * density)

    def seconds(self, mode: str, density: float) -> float:
        """Mean seconds of a layer: one pass over all of them, with other active neurons in each."""
        neurons = self._shape.neurons
        active = max(1, round(density * neurons))
        for select in self._selects:
            select[:] = 0.0
            select[0, self._random.choice(neurons, active, replace=False)] = 1.0
        program = self._programs[mode]
        started = time.perf_counter()
        program.run(self._pool, 0, program.operations, 1, 0)
        return (time.perf_counter() - started) / self._count

    def _write(self, modes: Sequence[str]) -> dict[str, Program]:
        writers = {
            "dense": self._dense,
            "dense-rows": self._dense_rows,
            "predicted": self._predicted,
            "gate-first": self._gate_first,
            "thresholded": self._thresholded,
        }
        kinds = ("gate", "up", "down") if self._shape.gated else ("gate", "down")
        rows = {
            kind: (self._rows(row_type, positive=kind == "gate"), row_type)
            for kind, row_type in zip(kinds, self._shape.types, strict=True)
        }
        builders = {mode: ProgramBuilder(1) for mode in modes}
        for select in self._selects:
            weights = _Weights(self._pool, *self._size, rows)
            for mode, builder in builders.items():
                if self._acts is not None:
                    builder.quantize(self._x, self._acts)
                writers[mode](builder, select, weights)
        return {mode: builder.build() for mode, builder in builders.items()}

    def _rows(self, row_type: RowType, *, positive: bool = False) -> npt.NDArray[np.uint8]:
        """Plain rows of all neurons; ``positive``: with positive products, so that every neuron that is
        predicted turns out to be active."""
        rows = random_rows(self._random, row_type.name, 4 * _PATTERN_ROWS, self._shape.width)
        if positive:
            products = dequantize(rows, row_type, len(rows), self._shape.width) @ self._x[0]
            rows = rows[products > 0.1 * np.abs(products).max()]
        return np.resize(rows[:_PATTERN_ROWS], (self._shape.neurons, rows.shape[1]))

    def _hidden(self, builder: ProgramBuilder, weights: "_Weights") -> Floats:
        """act(gate) · up of all neurons."""
        g, u = self._buffers
        gated = self._shape.gated
        builder.matmul(weights.gate, self._x, self._acts, g, independent=gated)
        if gated:
            builder.matmul(weights.up, self._x, self._acts, u)
        builder.activate(g, u if gated else None, g, "relu")
        return g

    def _dense(self, builder: ProgramBuilder, select: Floats, weights: "_Weights") -> None:
        """With the down projection as rows of the output."""
        del select
        down_type = self._shape.types[-1]
        rows = random_rows(self._random, down_type.name, _PATTERN_ROWS, self._shape.neurons)
        rows = np.resize(rows, (self._shape.width, rows.shape[1]))
        down = Matrix.pack(self._pool, rows, down_type, self._shape.width, self._shape.neurons)
        hidden, rounded = self._hidden(builder, weights), None
        if not down_type.is_float:
            rounded = Activations(1, self._shape.neurons)
            builder.quantize(hidden, rounded)
        builder.matmul(down, hidden, rounded, self._out)

    def _dense_rows(self, builder: ProgramBuilder, select: Floats, weights: "_Weights") -> None:
        del select
        builder.sum_rows(self._hidden(builder, weights), weights.down, self._out)

    def _gate_first(self, builder: ProgramBuilder, select: Floats, weights: "_Weights") -> None:
        """The gate's products are computed, but the drawn values select: that sets the density."""
        g, h = self._buffers
        builder.matmul(weights.gate, self._x, self._acts, g)
        builder.sparse_ffn(select, self._x, self._acts, weights.pair, self._out, h, "relu")

    def _predicted(self, builder: ProgramBuilder, select: Floats, weights: "_Weights") -> None:
        g, h = self._buffers
        builder.sparse_ffn(select, self._x, self._acts, weights.whole, self._out, h, "relu", gate=g)

    def _thresholded(self, builder: ProgramBuilder, select: Floats, weights: "_Weights") -> None:
        """By the size of act(gate): it is computed, but the drawn values are compared."""
        g, h = self._buffers
        builder.matmul(weights.gate, self._x, self._acts, g)
        builder.activate(g, None, g, "silu")
        builder.thresholded_ffn(
            select, "gate", self._threshold, self._x, self._acts, weights.pair, self._out, h, "silu"
        )


class _Weights:
    """One FFN in the forms that programs ask for; each is made once. ``rows``: plain rows and their type by
    kind, gate being what the activation reads."""

    def __init__(
        self, pool: Pool, neurons: int, width: int, rows: dict[str, tuple[npt.NDArray[np.uint8], RowType]]
    ) -> None:
        self._pool, self._size, self._rows = pool, (neurons, width), rows

    @cached_property
    def gate(self) -> Matrix:
        """What the activation reads."""
        return Matrix.pack(self._pool, *self._rows["gate"], *self._size)

    @cached_property
    def up(self) -> Matrix:
        """The rows whose products the result of the activation is multiplied with."""
        return Matrix.pack(self._pool, *self._rows["up"], *self._size)

    @cached_property
    def down(self) -> Bundle:
        """Down rows alone."""
        return self._bundle("down")

    @cached_property
    def pair(self) -> Bundle:
        """What is read where the gate is known."""
        return self._bundle(*(kind for kind in self._rows if kind != "gate"))

    @cached_property
    def whole(self) -> Bundle:
        """All rows."""
        return self._bundle(*self._rows)

    def _bundle(self, *kinds: str) -> Bundle:
        gate, up, down = (self._rows[kind] if kind in kinds else None for kind in ("gate", "up", "down"))
        return Bundle.pack(self._pool, *self._size, gate=gate, up=up, down=down)


def _require_memory(nbytes: int) -> None:
    available = detect.available_ram_bytes() or nbytes
    if nbytes > available * 3 // 4:
        raise HardwareError(
            f"measuring this FFN takes {nbytes} bytes of weights, and {available} bytes of memory are free; "
            "ask for fewer neurons or a smaller type"
        )
