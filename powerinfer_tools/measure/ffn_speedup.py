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

from powerinfer_formats.hardware import NO_GATE, FFNCurve, Spread
from powerinfer_kernels import Pool, RowType, physical_cores
from powerinfer_tools.measure.random_ffns import FEW_LAYERS, SPARSE_MODES, FFNLayers, FFNShape
from powerinfer_tools.progress import Progress, Silent

_Case = tuple[str, float]
_Times = dict[_Case, list[float]]
#: Modes of a curve. Thresholded touches what gate-first does: one matrix, and two rows of the active neurons.
CURVE_MODES = ("predicted", "gate-first")
#: Densities of a curve.
CURVE_DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


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
        names = ", ".join(kind.name.lower() for kind in RowType)
        raise ValueError(f"{name!r} is not one of {names}")
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
    layers = FFNLayers(pool, FFNShape(width, neurons, (row_type,) * 3), "dense", SPARSE_MODES)
    cases = [("dense", 1.0), *((mode, density) for mode in SPARSE_MODES for density in densities)]
    progress.start("ffn", None, "passes")
    times = _interleaved(layers, cases, seconds, progress)
    progress.finish()
    return [_row(pool, layers, case, times) for case in cases]


def ffn_curve(
    pool: Pool, shape: FFNShape, path: str, seconds: float = 4.0
) -> tuple[FFNCurve, tuple[Spread, ...]]:
    """What the cold side of a split file reaches on FFNs of ``shape``, measured for about ``seconds``, and
    how far its passes lay apart; ``path`` is that of the curve in a hardware profile.

    Raises HardwareError when there is not enough memory.
    """
    bench = CurveBench(pool, shape)
    deadline = time.perf_counter() + seconds
    while bench.passes < 3 or time.perf_counter() < deadline:
        bench.sample()
    return bench.curve(), bench.spreads(path)


class CurveBench:
    """Measures an :class:`~powerinfer_formats.hardware.FFNCurve` pass by pass.

    ``layers`` None: as many FFNs as defeat caches; else so many, for the curve of a model that caches may
    hold. ``modes``: those of :data:`CURVE_MODES`, or none for what is only computed whole. Raises
    HardwareError when there is not enough memory.
    """

    def __init__(
        self,
        pool: Pool,
        shape: FFNShape,
        layers: int | None = None,
        modes: Sequence[str] = CURVE_MODES,
    ) -> None:
        self._shape, self._layers = shape, FFNLayers(pool, shape, shape.dense, modes, layers)
        self._small = FFNLayers(pool, shape.smallest, shape.dense, (), FEW_LAYERS)
        self._source = None
        if shape.columns is not None:
            self._source = FFNLayers(pool, shape.columns, "dense", (), layers)
            self._source.seconds("dense", 1.0)
        sparse = [(mode, density) for mode in modes for density in CURVE_DENSITIES]
        self._times: _Times = {case: [] for case in [(shape.dense, 1.0), *sparse]}
        self._overheads: list[float] = []
        self._source_times: list[float] = []
        for case in self._times:  # the first pass brings pages and threads in
            self._layers.seconds(*case)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of all FFNs."""
        return self._layers.nbytes

    @property
    def passes(self) -> int:
        """Passes that were measured."""
        return len(self._overheads)

    def sample(self) -> None:
        """One pass of every case, one after the other."""
        for case, times in self._times.items():
            times.append(self._layers.seconds(*case))
        self._overheads.append(self._small.seconds(self._shape.dense, 1.0))
        if self._source is not None:
            self._source_times.append(self._source.seconds("dense", 1.0))

    def curve(self, share: float = 0.5) -> FFNCurve:
        """The curve of the passes so far: of each case the time that ``share`` of its passes kept within
        (0.5: the median). What a nearly empty FFN takes is the overhead; rates count without it."""
        seconds = {case: float(np.quantile(times, share)) for case, times in self._times.items()}
        overhead = self._overhead(share)
        rates = {case: self._rate(case, seconds[case], overhead) for case in seconds}
        return replace(
            _curve(self._shape, rates, overhead), columns_bytes_per_s=self._source_rate(share, overhead)
        )

    def spreads(self, path: str) -> tuple[Spread, ...]:
        """How far apart the passes of each figure of :meth:`curve` lay; ``path`` is the curve's."""
        overhead, results = self._overhead(0.5), []
        for case, times in self._times.items():
            high, middle, low = (
                self._rate(case, float(np.quantile(times, share)), overhead) for share in (0.0, 0.5, 1.0)
            )
            results.append(Spread(f"{path}.{_field(*case)}", low, middle, high, len(times)))
        if self._source is not None:
            high, middle, low = (self._source_rate(share, overhead) for share in (0.0, 0.5, 1.0))
            results.append(Spread(f"{path}.columns_bytes_per_s", low, middle, high, len(self._source_times)))
        low, middle, high = (float(np.quantile(self._overheads, share)) for share in (0.0, 0.5, 1.0))
        return (*results, Spread(f"{path}.overhead_seconds", low, middle, high, len(self._overheads)))

    def _overhead(self, share: float) -> float:
        """An overhead that rivals a pass is noise: rates must stay positive."""
        least = min(float(np.quantile(times, share)) for times in self._times.values())
        return min(float(np.quantile(self._overheads, share)), 0.5 * least)

    def _source_rate(self, share: float, overhead: float) -> float:
        """Of the source's form; 0 where it has none."""
        if self._source is None:
            return 0.0
        seconds = float(np.quantile(self._source_times, share))
        return self._source.touched("dense", 1.0) / max(seconds - overhead, 0.5 * seconds)

    def _rate(self, case: _Case, seconds: float, overhead: float) -> float:
        return self._layers.touched(*case) / max(seconds - overhead, 0.5 * seconds)


def _field(mode: str, density: float) -> str:
    """The field of a curve that holds this rate."""
    if mode.startswith("dense"):
        return "dense_bytes_per_s"
    return f"{mode.replace('-', '_')}_bytes_per_s[{CURVE_DENSITIES.index(density)}]"


def _curve(shape: FFNShape, rates: dict[_Case, float], overhead: float) -> FFNCurve:
    *gate, up, down = (kind.name for kind in shape.types)
    dense = rates[shape.dense, 1.0]
    densities = CURVE_DENSITIES if len(rates) > 1 else (1.0,)  # what is only computed whole has one
    return FFNCurve(
        width=shape.width,
        neurons=shape.neurons,
        gate_type=gate[0] if gate else NO_GATE,
        up_type=up,
        down_type=down,
        dense_bytes_per_s=dense,
        densities=densities,
        gate_first_bytes_per_s=tuple(rates.get(("gate-first", density), dense) for density in densities),
        predicted_bytes_per_s=tuple(rates.get(("predicted", density), dense) for density in densities),
        overhead_seconds=overhead,
    )


def _interleaved(layers: FFNLayers, cases: list[_Case], seconds: float, progress: Progress) -> _Times:
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


def _row(pool: Pool, layers: FFNLayers, case: _Case, times: _Times) -> FFNRow:
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
