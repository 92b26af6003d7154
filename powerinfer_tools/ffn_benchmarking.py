"""One FFN block alone: how much faster it is to compute some neurons than all of them.

Weights are random and several times the size of the caches; which neurons are active is drawn anew for every
pass. Passes of all cases are interleaved, and each ratio compares neighbours, so that a machine that slows
down for a while slows all of them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_formats.hardware import FFNCurve
from powerinfer_kernels import (
    Activations,
    Bundle,
    Matrix,
    Pool,
    Program,
    ProgramBuilder,
    RowType,
    aligned,
    dequantize,
    physical_cores,
    row_bytes,
)
from powerinfer_tools.errors import HardwareError
from powerinfer_tools.hardware import detect
from powerinfer_tools.progress import Progress, Silent
from powerinfer_tools.synthetic.random_blocks import random_rows

Floats = npt.NDArray[np.float32]
_Case = tuple[str, float]
_Times = dict[_Case, list[float]]
#: Modes with a speed-up to measure.
SPARSE_MODES = ("predicted", "gate-first")
#: Densities of a curve.
CURVE_DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
#: Distinct rows; more only repeat them, which no cache can tell from different ones.
_PATTERN_ROWS = 64
#: Bytes of one layout of the weights: beyond what caches of this size of machine hold.
_DEFEAT_CACHES = 640 << 20
_SEED = 1
#: Neurons of an FFN that is nearly empty, to measure what an FFN costs besides reading its rows.
_SMALL = 32


@dataclass(frozen=True)
class FFNShape:
    """``types`` are those of gate, up and down rows."""

    width: int
    neurons: int
    types: tuple[RowType, RowType, RowType]


@dataclass(frozen=True)
class FFNRow:
    """Speed at one density. ``speedup``: over the dense FFN, median of neighbouring passes, with the extremes
    in ``low`` and ``high``; ``gbps``: bytes of weights touched per second / 1e9; ``microseconds``: per token.
    """

    density: float
    mode: str
    speedup: float
    low: float
    high: float
    gbps: float
    microseconds: float
    threads: int
    isa: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


def row_type_named(name: str) -> RowType:
    """The row type called ``name``, in any case; ValueError names the known ones."""
    if name.upper() not in RowType.__members__:
        known = ", ".join(kind.name.lower() for kind in RowType)
        raise ValueError(f"{name!r} is not one of {known}")
    return RowType[name.upper()]


def bench_ffn_with(
    threads: int | None,
    width: int,
    neurons: int,
    row_type: RowType,
    densities: Sequence[float],
    progress: Progress | None = None,
) -> list[FFNRow]:
    """:func:`bench_ffn` with ``threads`` of its own (None: one a core)."""
    with Pool(threads or physical_cores()) as pool:
        return bench_ffn(pool, width, neurons, row_type, densities, progress=progress)


def bench_ffn(
    pool: Pool,
    width: int,
    neurons: int,
    row_type: RowType,
    densities: Sequence[float],
    *,
    seconds: float = 25.0,
    progress: Progress | None = None,
) -> list[FFNRow]:
    """A dense row, then one per mode and density, measured for about ``seconds``.

    All matrices are of ``row_type``. Raises HardwareError when there is not enough memory, and KernelError
    when rows of ``width`` do not fit the type.
    """
    progress = progress or Silent()
    layers = _Layers(pool, FFNShape(width, neurons, (row_type,) * 3), "dense")
    cases = [("dense", 1.0), *((mode, density) for mode in SPARSE_MODES for density in densities)]
    progress.start("ffn", None, "passes")
    times = _interleaved(layers, cases, seconds, progress)
    progress.finish()
    return [_row(pool, layers, case, times) for case in cases]


def ffn_curve(pool: Pool, shape: FFNShape, seconds: float = 4.0) -> FFNCurve:
    """What the cold side of a split file reaches on FFNs of ``shape``, measured for about ``seconds``.

    Raises HardwareError when there is not enough memory.
    """
    bench = CurveBench(pool, shape)
    deadline = time.perf_counter() + seconds
    while bench.passes < 3 or time.perf_counter() < deadline:
        bench.sample()
    return bench.curve()


class CurveBench:
    """Measures an :class:`~powerinfer_formats.hardware.FFNCurve` pass by pass.

    ``layers`` None: as many FFNs as defeat caches; else so many, for the curve of a model that caches may
    hold. Raises HardwareError when there is not enough memory.
    """

    def __init__(self, pool: Pool, shape: FFNShape, layers: int | None = None) -> None:
        self._shape, self._layers = shape, _Layers(pool, shape, "dense-rows", layers)
        self._small = _Layers(pool, replace(shape, neurons=_SMALL), "dense-rows", 2 * _SMALL)
        sparse = [(mode, density) for mode in SPARSE_MODES for density in CURVE_DENSITIES]
        self._times: _Times = {case: [] for case in [("dense-rows", 1.0), *sparse]}
        self._overheads: list[float] = []
        for case in self._times:  # the first pass brings pages and threads in
            self._layers.seconds(*case)

    @property
    def passes(self) -> int:
        """Passes that were measured."""
        return len(self._overheads)

    def sample(self) -> None:
        """One pass of every case, one after the other."""
        for case, times in self._times.items():
            times.append(self._layers.seconds(*case))
        self._overheads.append(self._small.seconds("dense-rows", 1.0))

    def curve(self, share: float = 0.5) -> FFNCurve:
        """The curve of the passes so far: of each case the time that ``share`` of its passes kept within
        (0.5: the median). What a nearly empty FFN takes is the overhead; rates count without it."""
        seconds = {case: float(np.quantile(times, share)) for case, times in self._times.items()}
        overhead = float(np.quantile(self._overheads, share))
        # An overhead that rivals a pass is noise: rates must stay positive.
        overhead = min(overhead, 0.5 * min(seconds.values()))
        rates = {case: self._layers.touched(*case) / (seconds[case] - overhead) for case in seconds}
        gate, up, down = (kind.name for kind in self._shape.types)
        return _curve(self._shape, (gate, up, down), rates, overhead)


def _curve(
    shape: FFNShape, types: tuple[str, str, str], rates: dict[_Case, float], overhead: float
) -> FFNCurve:
    gate, up, down = types
    return FFNCurve(
        width=shape.width,
        neurons=shape.neurons,
        gate_type=gate,
        up_type=up,
        down_type=down,
        dense_bytes_per_s=rates["dense-rows", 1.0],
        densities=CURVE_DENSITIES,
        gate_first_bytes_per_s=tuple(rates["gate-first", density] for density in CURVE_DENSITIES),
        predicted_bytes_per_s=tuple(rates["predicted", density] for density in CURVE_DENSITIES),
        overhead_seconds=overhead,
    )


def _interleaved(layers: "_Layers", cases: list[_Case], seconds: float, progress: Progress) -> _Times:
    """Times of all cases, one after the other again and again for ``seconds``, at least three times."""
    times: _Times = {case: [] for case in cases}
    for case in cases:  # the first pass brings pages and threads in
        layers.seconds(*case)
    deadline = time.perf_counter() + seconds
    while len(times[cases[0]]) < 3 or time.perf_counter() < deadline:
        for case in cases:
            times[case].append(layers.seconds(*case))
        progress.advance(len(cases))
    return times


def _row(pool: Pool, layers: "_Layers", case: _Case, times: _Times) -> FFNRow:
    ratios = [dense / mine for dense, mine in zip(times["dense", 1.0], times[case], strict=True)]
    seconds = median(times[case])
    return FFNRow(
        density=case[1],
        mode=case[0],
        speedup=median(ratios),
        low=min(ratios),
        high=max(ratios),
        gbps=layers.touched(*case) / seconds / 1e9,
        microseconds=seconds * 1e6,
        threads=pool.threads,
        isa=pool.isa,
    )


class _Layers:
    """Equal FFNs in every layout, and one program per mode that runs all of them, as decoding would: threads
    that sleep between layers would have to be woken for each.

    ``dense`` names the dense form: "dense" as a source model has it, "dense-rows" as a split file has it.
    """

    def __init__(self, pool: Pool, shape: FFNShape, dense: str, layers: int | None = None) -> None:
        self._pool, self._width, self._neurons = pool, shape.width, shape.neurons
        width, neurons = shape.width, shape.neurons
        self._row_bytes = [row_bytes(kind, width) for kind in shape.types]
        layer_bytes = neurons * sum(self._row_bytes)
        self._count = max(2, -(-_DEFEAT_CACHES // layer_bytes)) if layers is None else layers
        _require_memory(self._count * layer_bytes * 8 // 3)
        self._dense_form = dense
        self._random = np.random.default_rng(_SEED)
        self._x = aligned((1, width), np.float32)
        self._x[:] = self._random.standard_normal(width)
        self._acts, self._out = Activations(1, width), aligned((1, width), np.float32)
        self._acts_hidden = Activations(1, neurons)
        self._buffers = [aligned((1, neurons), np.float32) for _ in range(3)]
        self._selects = [aligned((1, neurons), np.float32) for _ in range(self._count)]
        self._programs = self._write(shape.types)

    def touched(self, mode: str, density: float) -> float:
        """Bytes of weights that one token reads in one layer."""
        rows = {"gate-first": 1, "predicted": 0}.get(mode, 3)
        always, skippable = sum(self._row_bytes[:rows]), sum(self._row_bytes[rows:])
        return self._neurons * (always + skippable * density)

    def seconds(self, mode: str, density: float) -> float:
        """Mean seconds of a layer: one pass over all of them, with other active neurons in each."""
        active = max(1, round(density * self._neurons))
        for select in self._selects:
            select[:] = -1.0
            select[0, self._random.choice(self._neurons, active, replace=False)] = 1.0
        program = self._programs[mode]
        started = time.perf_counter()
        program.run(self._pool, 0, program.operations, 1, 0)
        return (time.perf_counter() - started) / self._count

    def _write(self, types: tuple[RowType, RowType, RowType]) -> dict[str, Program]:
        gate_type, up_type, down_type = types
        gate, up = self._rows(gate_type, positive=True), self._rows(up_type)
        down = (self._rows(down_type), down_type)
        size = (self._neurons, self._width)
        builders = {mode: ProgramBuilder(1) for mode in (self._dense_form, *SPARSE_MODES)}
        for select in self._selects:
            for builder in builders.values():
                builder.quantize(self._x, self._acts)
            gate_matrix = Matrix.pack(self._pool, gate, gate_type, *size)
            up_matrix = Matrix.pack(self._pool, up, up_type, *size)
            pair = Bundle.pack(self._pool, *size, up=(up, up_type), down=down)
            whole = Bundle.pack(self._pool, *size, gate=(gate, gate_type), up=(up, up_type), down=down)
            if self._dense_form == "dense":
                self._dense(builders["dense"], gate_matrix, up_matrix, self._columns(down_type))
            else:
                rows = Bundle.pack(self._pool, *size, down=down)
                self._dense_rows(builders["dense-rows"], gate_matrix, up_matrix, rows)
            self._gate_first(builders["gate-first"], select, gate_matrix, pair)
            self._predicted(builders["predicted"], select, whole)
        return {mode: builder.build() for mode, builder in builders.items()}

    def _rows(self, row_type: RowType, *, positive: bool = False) -> npt.NDArray[np.uint8]:
        """Plain rows of all neurons; ``positive``: with positive products, so that every neuron that is
        predicted turns out to be active."""
        rows = random_rows(self._random, row_type.name, 4 * _PATTERN_ROWS, self._width)
        if positive:
            products = dequantize(rows, row_type, len(rows), self._width) @ self._x[0]
            rows = rows[products > 0.1 * np.abs(products).max()]
        return np.resize(rows[:_PATTERN_ROWS], (self._neurons, rows.shape[1]))

    def _columns(self, row_type: RowType) -> Matrix:
        """The down projection as rows of the output."""
        rows = random_rows(self._random, row_type.name, _PATTERN_ROWS, self._neurons)
        rows = np.resize(rows, (self._width, rows.shape[1]))
        return Matrix.pack(self._pool, rows, row_type, self._width, self._neurons)

    def _dense_rows(self, builder: ProgramBuilder, gate: Matrix, up: Matrix, down: Bundle) -> None:
        g, u, _ = self._buffers
        builder.matmul(gate, self._x, self._acts, g, independent=True)
        builder.matmul(up, self._x, self._acts, u)
        builder.activate(g, u, g, "relu")
        builder.sum_rows(g, down, self._out)

    def _dense(self, builder: ProgramBuilder, gate: Matrix, up: Matrix, down: Matrix) -> None:
        g, u, _ = self._buffers
        builder.matmul(gate, self._x, self._acts, g, independent=True)
        builder.matmul(up, self._x, self._acts, u)
        builder.activate(g, u, g, "relu")
        if not down.row_type.is_float:
            builder.quantize(g, self._acts_hidden)
        builder.matmul(down, g, self._acts_hidden, self._out)

    def _gate_first(self, builder: ProgramBuilder, select: Floats, gate: Matrix, pair: Bundle) -> None:
        """The gate's products are computed, but the drawn values select: that sets the density."""
        g, h, _ = self._buffers
        builder.matmul(gate, self._x, self._acts, g)
        builder.sparse_ffn(select, self._x, self._acts, pair, self._out, h, "relu")

    def _predicted(self, builder: ProgramBuilder, select: Floats, whole: Bundle) -> None:
        g, h, _ = self._buffers
        builder.sparse_ffn(select, self._x, self._acts, whole, self._out, h, "relu", gate=g)


def _require_memory(nbytes: int) -> None:
    available = detect.available_ram_bytes() or nbytes
    if nbytes > available * 3 // 4:
        raise HardwareError(
            f"measuring this FFN takes {nbytes} bytes of weights, and {available} bytes of memory are free; "
            "ask for fewer neurons or a smaller type"
        )
