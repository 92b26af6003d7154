"""Levels: the few ways in which one layer can be placed, each with its bytes and its time.

A layer's neurons are sorted hottest first, so its placement is one number: how many groups are hot. Times
come from :mod:`powerinfer_tools.planning.costs` and may be as nonlinear as they like; the solver only sees
tables.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PlanError
from powerinfer_tools.planning import costs
from powerinfer_tools.planning.costs import BlockSeconds, Machine
from powerinfer_tools.planning.memory import Workload, attention_bytes, kv_cache_bytes
from powerinfer_tools.planning.shapes import LayerShape, ModelShape, NeuronBytes

Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Home = Literal["cpu", "gpu"]
MODES = ("dense", "gate-first")


@dataclass(frozen=True)
class LevelTable:
    """The levels of one unit; all arrays are [levels].

    ``hot`` neurons on the accelerator; ``block_hot``: 1 where attention (or the head) is there too; ``mode``:
    index into MODES for the cold side; ``vram`` and ``ram`` bytes; seconds of a token in parts (``block``:
    attention or head; hot and cold sides run at the same time) and in total; ``activations``: expected number
    of active hot neurons.
    """

    unit: str
    hot: Integers
    block_hot: Integers
    mode: Integers
    vram: Integers
    ram: Integers
    block_seconds: Vector
    hot_seconds: Vector
    cold_seconds: Vector
    sync_seconds: Vector
    activations: Vector
    total_activations: float

    @property
    def seconds(self) -> Vector:
        """Time of the unit for one token [levels]."""
        return self.block_seconds + np.maximum(self.hot_seconds, self.cold_seconds) + self.sync_seconds

    def __len__(self) -> int:
        return len(self.hot)


@dataclass(frozen=True)
class LevelOptions:
    """``placeable``: units that may leave the CPU; ``home``: where the residual stream lives between layers;
    ``sparse_hot``: whether the accelerator skips inactive neurons too (this version's engine does not)."""

    group: int
    placeable: frozenset[str]
    home: Home = "cpu"
    sparse_hot: bool = False


def hot_counts(neurons: int, group: int) -> Integers:
    """0, group, 2·group, …, neurons: the hot counts that a layer may have."""
    return np.append(np.arange(0, neurons, group, dtype=np.int64), np.int64(neurons))


def layer_levels(
    index: int,
    shape: ModelShape,
    frequencies: Vector | None,
    sizes: NeuronBytes,
    machine: Machine,
    workload: Workload,
    options: LevelOptions,
) -> LevelTable:
    """All levels of layer ``index``; ``frequencies`` [neurons], descending, or None when nothing is known.

    Raises PlanError for frequencies that are no shares or are not sorted.
    """
    layer = shape.layers[index]
    if frequencies is not None:
        _check_frequencies(index, frequencies, layer.neurons)
    on_gpu = machine.gpu is not None and "ffn" in options.placeable
    hot = hot_counts(layer.neurons, options.group) if on_gpu else np.zeros(1, dtype=np.int64)
    active = _cumulative(frequencies, layer.neurons)
    cold_seconds, mode = _cold(
        layer, hot, active, sizes, machine, skip=shape.exact_zeros and frequencies is not None
    )
    skip_hot = options.sparse_hot and shape.exact_zeros and frequencies is not None
    block = costs.attention_seconds(shape, layer, machine, workload)
    fixed_bytes = attention_bytes(layer) + kv_cache_bytes(shape, workload.context)
    base = LevelTable(
        unit=f"layer {index}",
        hot=hot,
        block_hot=np.zeros_like(hot),
        mode=mode,
        vram=hot * sizes.total,
        ram=(layer.neurons - hot) * sizes.total + fixed_bytes,
        block_seconds=np.full(len(hot), block.cpu),
        hot_seconds=_hot(hot, active, sizes, machine, skip_hot),
        cold_seconds=cold_seconds,
        sync_seconds=_sync(layer, hot, False, machine, options.home),
        activations=active[hot],
        total_activations=float(active[-1]),
    )
    if machine.gpu is None or "attention" not in options.placeable:
        return base
    moved = replace(
        _with_block_on_gpu(base, block, fixed_bytes),
        sync_seconds=_sync(layer, hot, True, machine, options.home),
    )
    return _joined(base, moved)


def head_levels(shape: ModelShape, machine: Machine, options: LevelOptions) -> LevelTable:
    """The output head as a unit: on the CPU, and on the accelerator where that is allowed."""
    zero, none = np.zeros(1, dtype=np.int64), np.zeros(1)
    block, nbytes = costs.head_seconds(shape, machine), shape.head.packed_nbytes
    one_sync = costs.sync_seconds(machine.gpu, shape.width) if machine.gpu else 0.0
    base = LevelTable(
        unit="head",
        hot=zero,
        block_hot=zero,
        mode=zero,
        vram=zero,
        ram=zero + nbytes,
        block_seconds=none + block.cpu,
        hot_seconds=none,
        cold_seconds=none,
        sync_seconds=none + (one_sync if options.home == "gpu" else 0.0),
        activations=none,
        total_activations=0.0,
    )
    if machine.gpu is None or "head" not in options.placeable:
        return base
    moved = _with_block_on_gpu(base, block, nbytes)
    return _joined(base, replace(moved, sync_seconds=none + (one_sync if options.home == "cpu" else 0.0)))


def _check_frequencies(index: int, frequencies: Vector, neurons: int) -> None:
    if frequencies.shape != (neurons,):
        raise PlanError(f"layer {index}: {frequencies.shape} frequencies for {neurons} neurons")
    if not np.isfinite(frequencies).all() or frequencies.min() < 0 or frequencies.max() > 1:
        raise PlanError(f"layer {index}: activation frequencies must be numbers from 0 to 1")
    if np.any(np.diff(frequencies) > 0):
        raise PlanError(f"layer {index}: activation frequencies are not sorted hottest first")


def _cumulative(frequencies: Vector | None, neurons: int) -> Vector:
    """Expected active neurons among the first k, k = 0 … neurons. All neurons count when nothing is known."""
    if frequencies is None:
        return np.arange(neurons + 1, dtype=np.float64)
    return np.concatenate([np.zeros(1), np.cumsum(frequencies)])


def _cold(
    layer: LayerShape, hot: Integers, active: Vector, sizes: NeuronBytes, machine: Machine, skip: bool
) -> tuple[Vector, Integers]:
    """Seconds of the cold side and the mode (index into MODES) that takes them, [levels]."""
    cold = (layer.neurons - hot).astype(np.float64)
    curve = machine.ffn_curve(layer.width, sizes.types, layer.neurons)
    dense = costs.dense_seconds(cold * sizes.total, machine, curve)
    if not skip:
        return dense, np.zeros(len(hot), dtype=np.int64)
    density = np.clip((active[-1] - active[hot]) / np.maximum(cold, 1.0), 0.0, 1.0)
    first = costs.gate_first_seconds(cold * sizes.always, cold * sizes.skippable, density, machine, curve)
    return np.minimum(dense, first), (first < dense).astype(np.int64)


def _hot(hot: Integers, active: Vector, sizes: NeuronBytes, machine: Machine, skip: bool) -> Vector:
    if machine.gpu is None:
        return np.zeros(len(hot))
    counted = active[hot] if skip else hot.astype(np.float64)
    nbytes = hot * float(sizes.always) + counted * sizes.skippable
    launches = costs.FFN_LAUNCHES * machine.gpu.launch_seconds * (hot > 0)
    return nbytes / machine.gpu.bandwidth + launches


def _sync(layer: LayerShape, hot: Integers, block_hot: bool, machine: Machine, home: Home) -> Vector:
    """Synchronisations of a layer: one for each piece that leaves the home of the residual stream. Attention
    and an FFN that is away as a whole leave together."""
    if machine.gpu is None:
        return np.zeros(len(hot))
    if home == "cpu":
        attention_away, some_away, all_away = block_hot, hot > 0, hot == layer.neurons
    else:
        attention_away, some_away, all_away = not block_hot, hot < layer.neurons, hot == 0
    times = some_away.astype(np.float64)
    if attention_away:
        times += 1.0 - (all_away & some_away)
    return times * costs.sync_seconds(machine.gpu, layer.width)


def _with_block_on_gpu(table: LevelTable, block: BlockSeconds, nbytes: int) -> LevelTable:
    return replace(
        table,
        block_hot=np.ones_like(table.hot),
        vram=table.vram + nbytes,
        ram=table.ram - nbytes,
        block_seconds=np.full(len(table), block.gpu),
    )


def _joined(first: LevelTable, second: LevelTable) -> LevelTable:
    """The levels of both tables of one unit."""
    arrays = {
        field.name: np.concatenate([getattr(first, field.name), getattr(second, field.name)])
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
