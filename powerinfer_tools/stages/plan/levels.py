"""Levels: the few ways in which one layer can be placed, each with its bytes and its time.

A layer's neurons are sorted hottest first, so its placement is one number: how many groups are hot. Times
come from :mod:`powerinfer_tools.stages.plan.costs` and may be as nonlinear as they like; the solver only sees
tables.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.predictor_shapes import Predictors
from powerinfer_tools.model.shapes import LayerShape, ModelShape, NeuronBytes
from powerinfer_tools.stages.plan import costs, memory
from powerinfer_tools.stages.plan.capabilities import Capabilities
from powerinfer_tools.stages.plan.costs import BlockSeconds, Machine
from powerinfer_tools.stages.plan.ffn_levels import FFN, FFNWay, expected, ffn_ways
from powerinfer_tools.stages.plan.ffn_units import FFNUnits, ffn_units
from powerinfer_tools.stages.plan.memory import TOKENS_ALONE, RequestSize, SideBytes, Workload, router_bytes
from powerinfer_tools.stages.plan.thresholded_shapes import Thresholds

Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Home = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Inputs:
    """What the tables are made from. ``frequencies`` [layers] of descending [neurons], or None;
    ``predictors`` and ``thresholds`` [layers] that may be used (empty: none); ``inside`` experts, as
    :class:`~powerinfer_tools.stages.plan.frequencies.Frequencies` has it."""

    shape: ModelShape
    machine: Machine
    workload: Workload
    frequencies: tuple[Vector, ...] | None
    sizes: tuple[NeuronBytes, ...]
    predictors: Predictors
    thresholds: Thresholds = ()
    inside: tuple[Vector | None, ...] = ()


@dataclass(frozen=True)
class LevelTable:
    """The levels of one unit; all arrays are [levels].

    ``hot`` neurons on the accelerator; ``block_hot``: 1 where attention (or the head) is there too; ``mode``:
    index into MODES; ``predictor_hot``: 1 where the predictor is on the accelerator; ``vram`` and ``ram``
    bytes, of which ``predictor_bytes`` for the predictor; seconds of a token in parts (``block``: attention
    or head; hot and cold sides run at the same time, after a predictor on the accelerator; one on the CPU is
    a part of the cold side) and in total; ``activations``: expected number of active hot neurons.
    ``disk``: bytes that would be in RAM and are on disk alone, ``disk_seconds`` of reading what a token takes
    of them, which goes on beside all computing; ``prompt_seconds`` of the whole prompt.
    ``shared_hot``: 1 where the expert that every token takes is on the accelerator; ``uneven_seconds``: by
    how much the slower side is expected to take longer than its mean, because tokens take hot and cold
    experts in uneven numbers. ``padding``: bytes of ``ram`` that the layout for leaving out neurons of cold
    experts takes besides.

    The first levels, one for each hot count ascending, are exact and leave everything else on the CPU. A
    shared expert counts as the hottest of a layer's units there.
    """

    unit: str
    hot: Integers
    block_hot: Integers
    mode: Integers
    predictor_hot: Integers
    vram: Integers
    ram: Integers
    predictor_bytes: Integers
    block_seconds: Vector
    predictor_seconds: Vector
    hot_seconds: Vector
    cold_seconds: Vector
    sync_seconds: Vector
    activations: Vector
    shared_hot: Integers
    uneven_seconds: Vector
    disk: Integers
    disk_seconds: Vector
    prompt_seconds: Vector
    padding: Integers
    total_activations: float

    @property
    def seconds(self) -> Vector:
        """Time of the unit for one token [levels]: of computing, or of the disk where that takes longer."""
        return np.maximum(self.computing_seconds, self.disk_seconds)

    @property
    def computing_seconds(self) -> Vector:
        """Time of the unit for one token where nothing is waited for that is on disk [levels]."""
        first = self.block_seconds + self.predictor_hot * self.predictor_seconds
        both = np.maximum(self.hot_seconds, self.cold_seconds) + self.uneven_seconds
        return first + both + self.sync_seconds

    @property
    def counts(self) -> int:
        """How many hot counts there are: the levels below this index are the plain ones."""
        return int(np.argmax(self.hot)) + 1

    def ffn_bytes(self, units: FFNUnits, level: int) -> SideBytes:
        """Bytes of the FFN's ``units`` in both memories at ``level``."""
        placed = units.placed(int(self.hot[level]), int(self.shared_hot[level]))
        return SideBytes(placed.vram, placed.ram + int(self.padding[level] - self.disk[level]))

    def routed_share(self, units: FFNUnits, level: int) -> float:
        """Share of all activations that the hot neurons make; of experts, the share of the choices of routers
        that fall on hot ones."""
        total = self.total_activations - units.shared_neurons
        hot = float(self.activations[level]) - int(self.shared_hot[level]) * units.shared_neurons
        return min(1.0, max(0.0, hot / total)) if total > 0 else 0.0

    def fastest_like(self, level: int) -> int:
        """The fastest level that has as many hot neurons as ``level``, block and shared expert in the same
        place, and takes no more VRAM; the first of equals."""
        alike = (self.hot == self.hot[level]) & (self.block_hot == self.block_hot[level])
        alike &= (self.shared_hot == self.shared_hot[level]) & (self.disk == self.disk[level])
        allowed = np.flatnonzero(alike & (self.vram <= self.vram[level]))
        return int(allowed[np.argmin(self.seconds[allowed])])

    def __len__(self) -> int:
        return len(self.hot)


@dataclass(frozen=True)
class LevelOptions:
    """``engine``: what may leave the CPU; ``home``: where the residual stream lives between layers;
    ``from_disk``: experts may be on disk alone; ``size``: of the requests that are to be fast."""

    group: int
    engine: Capabilities
    home: Home = "cpu"
    from_disk: bool = False
    size: RequestSize = TOKENS_ALONE


def hot_counts(neurons: int, group: int) -> Integers:
    """0, group, 2·group, …, neurons: the hot counts that a layer may have."""
    return np.append(np.arange(0, neurons, group, dtype=np.int64), np.int64(neurons))


@dataclass(frozen=True)
class LayerWays:
    """How the FFN of one layer can be computed: ``ways``, the first of them exact; the ``frequencies`` of its
    neurons, or experts, descending; ``router`` seconds that pass before the FFN can begin; and the seconds of
    hand-overs of a way, with the attention block on the accelerator or not."""

    ways: list[FFNWay]
    frequencies: Vector
    router: BlockSeconds
    sync_seconds: Callable[[FFNWay, bool], Vector]


def layer_levels(
    index: int,
    inputs: Inputs,
    options: LevelOptions,
    ways_of: Callable[[int, Inputs, LevelOptions], LayerWays],
) -> LevelTable:
    """All levels of layer ``index``, whose FFN can be computed in ``ways_of`` it. Raises
    PlanError for frequencies that are no shares or are not sorted."""
    shape, machine, layer = inputs.shape, inputs.machine, inputs.shape.layers[index]
    made, units = ways_of(index, inputs, options), ffn_units(layer, inputs.sizes[index])
    block = costs.attention_seconds(shape, layer, machine, inputs.workload)
    block = BlockSeconds(block.cpu + made.router.cpu, block.gpu + made.router.gpu)
    here = memory.attention_bytes(layer) + memory.kv_cache_bytes(shape, inputs.workload)
    on_gpu = memory.gpu_attention_bytes(layer) + memory.gpu_cache_bytes(shape, inputs.workload)
    router = router_bytes(layer)
    places = [(False, block.cpu, SideBytes(0, here + router.ram))]
    if machine.gpu is not None and "attention" in options.engine.placeable:
        places.append((True, block.gpu, SideBytes(on_gpu + router.vram, 0)))
    return joined(
        [
            _table(index, units, made, way, nbytes, seconds, block_hot)
            for block_hot, seconds, nbytes in places
            for way in made.ways
        ]
    )


def neuron_ways(index: int, inputs: Inputs, options: LevelOptions) -> LayerWays:
    """The ways to compute the neurons of layer ``index``, which are placed in groups."""
    shape, machine, engine = inputs.shape, inputs.machine, options.engine
    layer = shape.layers[index]
    frequencies = None if inputs.frequencies is None else inputs.frequencies[index]
    if frequencies is not None:
        check_frequencies(index, frequencies, layer.neurons)
    on_gpu = machine.gpu is not None and "ffn" in engine.placeable
    movable = on_gpu and not layer.top_alone
    hot = hot_counts(layer.neurons, options.group) if movable else np.zeros(1, dtype=np.int64)
    ffn = FFN(
        layer=layer,
        sizes=inputs.sizes[index],
        frequencies=np.ones(layer.neurons) if frequencies is None else frequencies,
        skips=shape.has_zeros(index) and frequencies is not None,
        predictor=inputs.predictors[index] if inputs.predictors else None,
        threshold=inputs.thresholds[index] if inputs.thresholds else None,
        columns=not on_gpu,
    )
    ways = ffn_ways(
        ffn,
        hot,
        machine,
        inputs.workload.batch,
        sparse_hot=engine.sparse_hot,
        predictors_move="predictors" in engine.placeable,
    )

    def sync_seconds(way: FFNWay, block_hot: bool) -> Vector:
        return ffn_sync(layer, way.hot, machine, options.home, block_hot, way.predictor_hot)

    return LayerWays(ways, ffn.frequencies, BlockSeconds(0.0, 0.0), sync_seconds)


def _table(
    index: int,
    units: FFNUnits,
    made: LayerWays,
    way: FFNWay,
    block_bytes: SideBytes,
    block_seconds: float,
    block_hot: bool,
) -> LevelTable:
    """The levels of one way to compute the FFN, with the attention block on one side; ``block_bytes`` and
    ``block_seconds`` of it there."""
    active, levels = expected(made.frequencies), len(way.hot)
    shared = np.zeros(levels, dtype=np.int64) if way.shared_hot is None else way.shared_hot
    padding = np.zeros(levels, dtype=np.int64) if way.padding is None else way.padding
    hot = way.hot // units.neurons
    return LevelTable(
        unit=f"layer {index}",
        hot=way.hot,
        block_hot=np.full(levels, int(block_hot)),
        mode=way.mode,
        predictor_hot=np.full(levels, int(way.predictor_hot)),
        vram=hot * units.each.vram + shared * units.shared.vram + way.vram + block_bytes.vram,
        ram=(units.count - hot) * units.each.ram
        + (1 - shared) * units.shared.ram
        + way.ram
        + padding
        + block_bytes.ram,
        predictor_bytes=way.vram + way.ram,
        block_seconds=np.full(levels, block_seconds),
        predictor_seconds=way.predictor_seconds,
        hot_seconds=way.hot_seconds,
        cold_seconds=way.cold_seconds,
        sync_seconds=made.sync_seconds(way, block_hot),
        activations=active[hot] * units.neurons + shared * float(units.shared_neurons),
        shared_hot=shared,
        uneven_seconds=np.zeros(levels) if way.uneven_seconds is None else way.uneven_seconds,
        disk=np.zeros(levels, dtype=np.int64),
        disk_seconds=np.zeros(levels),
        prompt_seconds=np.zeros(levels),
        padding=padding,
        total_activations=float(active[-1]) * units.neurons + units.shared_neurons,
    )


def head_levels(shape: ModelShape, machine: Machine, batch: int, options: LevelOptions) -> LevelTable:
    """The output head as a unit: on the CPU, and on the accelerator where that is allowed, with scratch for
    ``batch`` tokens."""
    zero, none = np.zeros(1, dtype=np.int64), np.zeros(1)
    block, nbytes = costs.head_seconds(shape, machine), shape.head.packed_nbytes
    one_sync = costs.sync_seconds(machine.gpu, shape.width) if machine.gpu else 0.0
    base = LevelTable(
        unit="head",
        hot=zero,
        block_hot=zero,
        mode=zero,
        predictor_hot=zero,
        vram=zero,
        ram=zero + nbytes,
        predictor_bytes=zero,
        block_seconds=none + block.cpu,
        predictor_seconds=none,
        hot_seconds=none,
        cold_seconds=none,
        sync_seconds=none + (one_sync if options.home == "gpu" else 0.0),
        activations=none,
        shared_hot=zero,
        uneven_seconds=none,
        disk=zero,
        disk_seconds=none,
        prompt_seconds=none,
        padding=zero,
        total_activations=0.0,
    )
    if machine.gpu is None or "head" not in options.engine.placeable:
        return base
    moved = replace(
        base,
        block_hot=zero + 1,
        vram=zero + memory.gpu_head_bytes(shape, batch),
        ram=zero,
        block_seconds=none + block.gpu,
        sync_seconds=none + (one_sync if options.home == "cpu" else 0.0),
    )
    return joined([base, moved])


def check_frequencies(index: int, frequencies: Vector, neurons: int) -> None:
    """Raise PlanError unless there is a share for each of ``neurons`` (or experts), descending."""
    if frequencies.shape != (neurons,):
        raise PlanError(f"layer {index}: {frequencies.shape} frequencies for {neurons} neurons")
    if not ((frequencies >= 0) & (frequencies <= 1)).all():
        raise PlanError(f"layer {index}: activation frequencies must be numbers from 0 to 1")
    if np.any(np.diff(frequencies) > 0):
        raise PlanError(f"layer {index}: activation frequencies are not sorted hottest first")


def ffn_sync(
    layer: LayerShape, hot: Integers, machine: Machine, home: Home, block_hot: bool, predictor_hot: bool
) -> Vector:
    """Synchronisations of a layer: one for each piece that leaves the home of the residual stream. Attention
    and an FFN that is away as a whole leave together. A predictor that is away while cold neurons are at home
    has to answer before they can begin: one more."""
    if machine.gpu is None:
        return np.zeros(len(hot))
    if home == "cpu":
        attention_away, some_away, all_away = block_hot, (hot > 0) | predictor_hot, hot == layer.neurons
        waits = predictor_hot & ~all_away
    else:
        attention_away, some_away = not block_hot, hot < layer.neurons
        all_away = (hot == 0) & (not predictor_hot)
        waits = np.zeros(len(hot), dtype=np.bool_)
    times: Vector = some_away.astype(np.float64) + waits
    if attention_away:
        times = times + 1.0 - (all_away & some_away)
    seconds: Vector = times * costs.sync_seconds(machine.gpu, layer.width)
    return seconds


def joined(tables: list[LevelTable]) -> LevelTable:
    """The levels of all tables of one unit."""
    first = tables[0]
    arrays = {
        field.name: np.concatenate([getattr(table, field.name) for table in tables])
        for field in fields(LevelTable)
        if field.name not in ("unit", "total_activations")
    }
    return LevelTable(unit=first.unit, total_activations=first.total_activations, **arrays)


def undominated(value: Vector, vram: Integers, ram: Integers | None) -> Integers:
    """Indexes, ascending by VRAM, of the levels that no other level beats or equals in value and in bytes.

    ``ram`` is None when RAM cannot run out. Of equal levels the first stays.
    """
    order = np.lexsort((value, vram)) if ram is None else np.lexsort((ram, value, vram))
    if ram is None:
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(value[order])[:-1]])
        return np.asarray(order[value[order] < best_before], dtype=np.int64)
    sorted_value, sorted_ram = value[order], ram[order]
    # In this order only an earlier level can dominate a later one.
    beats = (sorted_value[:, None] <= sorted_value[None, :]) & (sorted_ram[:, None] <= sorted_ram[None, :])
    dominated = np.triu(beats, k=1).any(axis=0)
    return np.asarray(order[~dominated], dtype=np.int64)
