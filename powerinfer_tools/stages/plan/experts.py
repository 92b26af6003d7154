"""Levels of a layer of experts: how many of its busiest experts are hot, and whether the shared one is.

A token takes K of E experts. Which, is known only as shares of tokens, so the number j of hot ones among them
is counted as K independent draws that each are hot with the probability p, the hot experts' share of all
routing. The time of the experts is the expectation, over j, of the slower side:

    E[max(j · t_gpu + shared, (K - j) · t_cpu + shared)]

which is more than the larger of both means: with few experts a token, one side often waits for the other.

The router is where attention is. Where that is the accelerator, the CPU still chooses: what the router says
crosses over before any expert can begin, and which hot experts are taken goes back. That is one wait in every
such layer, even where all experts are hot.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.shapes import LayerShape, NeuronBytes
from powerinfer_tools.stages.plan import costs, memory
from powerinfer_tools.stages.plan.costs import BlockSeconds, Machine
from powerinfer_tools.stages.plan.expert_memory import (
    SideBytes,
    expert_bytes,
    experts_of,
    router_bytes,
    shared_bytes,
)
from powerinfer_tools.stages.plan.levels import Inputs, LevelOptions, LevelTable, check_frequencies, joined

Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
#: By how much the shares of a layer's experts may miss the number that a token takes: counts are whole.
_TOLERANCE = 1e-6
_F32 = 4


@dataclass(frozen=True)
class _Choices:
    """What a layer's experts may be: ``hot`` of them, and the shared one where ``shared`` is 1; [levels]."""

    hot: Integers
    shared: Integers


@dataclass(frozen=True)
class _Seconds:
    """Expected seconds of a token [levels]: each side's mean, by how much the slower side takes longer than
    its mean, and the probability that each side has something to do."""

    hot: Vector
    cold: Vector
    uneven: Vector
    some_hot: Vector
    some_cold: Vector


def expert_levels(index: int, inputs: Inputs, options: LevelOptions) -> LevelTable:
    """All levels of layer ``index``, which has experts. Raises PlanError for frequencies that are no shares,
    are not sorted, or do not add up to the experts that a token takes."""
    layer, engine, machine = inputs.shape.layers[index], options.engine, inputs.machine
    frequencies = _frequencies(index, layer, inputs)
    movable = machine.gpu is not None and "ffn" in engine.placeable
    choices = _choices(layer) if movable else _Choices(*np.zeros((2, 1), dtype=np.int64))
    block = _block_seconds(inputs, layer)
    shape, workload = inputs.shape, inputs.workload
    router = router_bytes(layer)
    here = memory.attention_bytes(layer) + memory.kv_cache_bytes(shape, workload) + router.ram
    there = memory.gpu_attention_bytes(layer) + memory.gpu_cache_bytes(shape, workload) + router.vram
    sides = [False]
    if machine.gpu is not None and "attention" in engine.placeable:
        sides.append(True)
    return joined(
        [
            _table(index, layer, frequencies, choices, block, (there, here), machine, options, block_hot)
            for block_hot in sides
        ]
    )


def ffn_bytes(layer: LayerShape, size: NeuronBytes, table: LevelTable, level: int) -> SideBytes:
    """Bytes of a layer's neurons, or experts, on both sides at ``level``."""
    hot = int(table.hot[level])
    if layer.experts is None:
        return SideBytes(hot * size.total, (layer.neurons - hot) * size.total)
    one, shared, there = expert_bytes(layer), shared_bytes(layer), int(table.shared_hot[level])
    count = hot // layer.up.rows
    vram = count * one.vram + there * shared.vram
    return SideBytes(vram, (layer.experts.count - count) * one.ram + (1 - there) * shared.ram)


def token_bytes(layer: LayerShape, size: NeuronBytes) -> SideBytes:
    """Bytes of a layer's FFN that a token reads where everything is computed on one side."""
    if layer.experts is None:
        return SideBytes(layer.neurons * size.total, layer.neurons * size.total)
    one, shared, used = expert_bytes(layer), shared_bytes(layer), layer.experts.used
    return SideBytes(used * one.vram + shared.vram, used * one.ram + shared.ram)


def whole_bytes(layer: LayerShape, size: NeuronBytes) -> int:
    """VRAM of a layer's whole FFN."""
    if layer.experts is None:
        return layer.neurons * size.total
    return layer.experts.count * expert_bytes(layer).vram + shared_bytes(layer).vram


def launches(layer: LayerShape) -> int:
    """GPU kernels for a token's FFN where all of it is there."""
    experts = layer.experts
    units = 1 if experts is None else experts.used + bool(experts.shared)
    return costs.FFN_LAUNCHES * units


def routed_share(layer: LayerShape, table: LevelTable, level: int) -> float:
    """Share of all activations that the hot neurons make; of experts, the share of the choices of routers
    that fall on hot ones."""
    shared = layer.experts.shared_neurons if layer.experts else 0
    total = table.total_activations - shared
    hot = float(table.activations[level]) - int(table.shared_hot[level]) * shared
    return min(1.0, max(0.0, hot / total)) if total > 0 else 0.0


def _frequencies(index: int, layer: LayerShape, inputs: Inputs) -> Vector:
    experts = experts_of(layer)
    if inputs.frequencies is None:
        return np.full(experts.count, experts.used / experts.count)
    known = inputs.frequencies[index]
    check_frequencies(index, known, experts.count)
    if abs(float(known.sum()) - experts.used) > _TOLERANCE * experts.count:
        raise PlanError(
            f"layer {index}: experts are taken {known.sum():.4f} times a token, and the model says "
            f"{experts.used}; the profile is of another model, or damaged"
        )
    return known


def _choices(layer: LayerShape) -> _Choices:
    """Hot counts ascending, the shared expert first; then those that leave the shared expert cold."""
    experts = experts_of(layer)
    counts = np.arange(experts.count + 1, dtype=np.int64)
    if not experts.shared:
        return _Choices(counts, np.zeros(len(counts), dtype=np.int64))
    hot = np.concatenate([[0], counts, counts[1:]])
    shared = np.concatenate([[0], np.ones(len(counts), dtype=np.int64), np.zeros(experts.count, np.int64)])
    return _Choices(hot, shared)


def _block_seconds(inputs: Inputs, layer: LayerShape) -> BlockSeconds:
    """Attention, and the router, which is beside it: no expert can begin before."""
    block = costs.attention_seconds(inputs.shape, layer, inputs.machine, inputs.workload)
    router, gpu = router_bytes(layer), inputs.machine.gpu
    on_gpu = math.inf if gpu is None else block.gpu + router.vram / gpu.bandwidth + gpu.launch_seconds
    return BlockSeconds(block.cpu + router.ram / inputs.machine.bandwidth, on_gpu)


def _table(
    index: int,
    layer: LayerShape,
    frequencies: Vector,
    choices: _Choices,
    block: BlockSeconds,
    block_bytes: tuple[int, int],
    machine: Machine,
    options: LevelOptions,
    block_hot: bool,
) -> LevelTable:
    """The levels with the attention block on one side."""
    experts, one, shared = experts_of(layer), expert_bytes(layer), shared_bytes(layer)
    active = np.concatenate([np.zeros(1), np.cumsum(frequencies)])
    seconds = _expert_seconds(layer, choices, active[choices.hot] / active[-1], machine)
    there, here = (block_bytes[0], 0) if block_hot else (0, block_bytes[1])
    none, levels = np.zeros(len(choices.hot), dtype=np.int64), len(choices.hot)
    return LevelTable(
        unit=f"layer {index}",
        hot=choices.hot * layer.up.rows,
        block_hot=np.full(levels, int(block_hot)),
        mode=none,
        predictor_hot=none,
        vram=choices.hot * one.vram + choices.shared * shared.vram + there,
        ram=(experts.count - choices.hot) * one.ram + (1 - choices.shared) * shared.ram + here,
        predictor_bytes=none,
        block_seconds=np.full(levels, block.gpu if block_hot else block.cpu),
        predictor_seconds=np.zeros(levels),
        hot_seconds=seconds.hot,
        cold_seconds=seconds.cold,
        sync_seconds=_sync(layer, choices, seconds, machine, options, block_hot),
        activations=active[choices.hot] * layer.up.rows + choices.shared * float(experts.shared_neurons),
        shared_hot=choices.shared,
        uneven_seconds=seconds.uneven,
        total_activations=float(active[-1]) * layer.up.rows + experts.shared_neurons,
    )


def mean_seconds(layer: LayerShape, hot: int, share: float, machine: Machine) -> tuple[float, float, float]:
    """Expected seconds of a token on the hot and on the cold side, and the probability that it waits for the
    hot one, where ``hot`` experts, which have the ``share`` of what the router chooses, are there, and the
    shared one is not."""
    choices = _Choices(np.array([hot]), np.zeros(1, dtype=np.int64))
    seconds = _expert_seconds(layer, choices, np.array([share]), machine)
    return float(seconds.hot[0]), float(seconds.cold[0]), float(seconds.some_hot[0])


def _expert_seconds(layer: LayerShape, choices: _Choices, share: Vector, machine: Machine) -> _Seconds:
    """Expected times where a draw of the router is hot with probability ``share`` [levels]."""
    experts, gpu = experts_of(layer), machine.gpu
    drawn = np.arange(experts.used + 1)
    probability = _binomial(experts.used, np.clip(share, 0.0, 1.0))
    on_cpu = _cpu_seconds(layer.ffn, layer, machine)
    cold = (experts.used - drawn) * on_cpu + _column(1 - choices.shared) * _cpu_seconds(
        experts.shared, layer, machine
    )
    hot = np.zeros_like(cold)
    if gpu is not None:
        launch = costs.FFN_LAUNCHES * gpu.launch_seconds
        routed = expert_bytes(layer).vram / gpu.bandwidth + launch
        shared = shared_bytes(layer).vram / gpu.bandwidth + launch if experts.shared else 0.0
        hot = drawn * routed + _column(choices.shared) * shared
    mean_hot, mean_cold = (probability * hot).sum(axis=1), (probability * cold).sum(axis=1)
    both = (probability * np.maximum(hot, cold)).sum(axis=1)
    shared_cold = (1 - choices.shared) * bool(experts.shared)
    return _Seconds(
        hot=mean_hot,
        cold=mean_cold,
        uneven=np.maximum(0.0, both - np.maximum(mean_hot, mean_cold)),
        some_hot=np.where(choices.shared > 0, 1.0, 1.0 - probability[:, 0]),
        some_cold=np.where(shared_cold > 0, 1.0, 1.0 - probability[:, -1]),
    )


def _cpu_seconds(matrices: tuple[MatrixShape, ...], layer: LayerShape, machine: Machine) -> float:
    """Time of the CPU for one expert of these matrices: a stream, from the curve of its shape where there is
    one."""
    if not matrices:
        return 0.0
    types = tuple(matrix.row_type.name for matrix in matrices)
    curve = machine.ffn_curve(layer.width, types, matrices[0].rows)
    nbytes = np.array([float(sum(matrix.packed_nbytes for matrix in matrices))])
    return float(costs.dense_seconds(nbytes, machine, curve)[0])


def _sync(
    layer: LayerShape,
    choices: _Choices,
    seconds: _Seconds,
    machine: Machine,
    options: LevelOptions,
    block_hot: bool,
) -> Vector:
    """Expected hand-overs. A token that takes no hot expert does not wait for the accelerator, and one that
    takes no cold one sends no sum there."""
    gpu = machine.gpu
    if gpu is None:
        return np.zeros(len(choices.hot))
    whole, at_home = costs.sync_seconds(gpu, layer.width), block_hot == (options.home == "gpu")
    away = 0.0 if at_home else whole  # the residual stream goes there and comes back
    if not block_hot:
        return away + seconds.some_hot * whole
    experts = experts_of(layer)
    some_cold = seconds.some_cold > 0  # so the FFN's input goes with what the router says
    values = experts.count + 1 + 2 * (experts.used + 1) + layer.width * some_cold
    choosing = gpu.sync_seconds + 2 * gpu.link_latency + _F32 * values / gpu.link_bandwidth
    result: Vector = away + choosing + seconds.some_cold * costs.copy_seconds(gpu, layer.width)
    return result


def _binomial(draws: int, share: Vector) -> Vector:
    """Probability [levels, draws + 1] of j hot ones among ``draws``, each hot with probability ``share``."""
    probability = np.zeros((len(share), draws + 1))
    probability[:, 0] = 1.0
    for _ in range(draws):
        moved = probability[:, :-1] * _column(share)
        probability *= _column(1.0 - share)
        probability[:, 1:] += moved
    return probability


def _column(values: npt.NDArray[np.generic]) -> Vector:
    return values[:, None].astype(np.float64)
