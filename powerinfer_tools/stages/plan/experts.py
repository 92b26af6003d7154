"""How a layer of experts is placed: how many of its busiest experts are hot, and whether the shared one is.

A token takes K of E experts. Which, is known only as shares of tokens, so the number j of hot ones among them
is counted as K independent draws that each are hot with the probability p, the hot experts' share of all
routing. The time of the experts is the expectation, over j, of the slower side:

    E[max(j · t_gpu + shared, (K - j) · t_cpu + shared)]

which is more than the larger of both means: with few experts a token, one side often waits for the other.

If the experts' activation makes exact zeros and a profile has counted the neurons inside, the CPU may also
read less than a whole expert: its gate rows, and of the rest the share that the profile found active in the
cold experts. The bits are the same, so the faster of both forms is chosen, level by level. An expert is
placed as a whole either way: its neurons keep the source's order, since the columns of a quantised down
projection cannot change places without another rounding, or another order of sums.

The router is where attention is. Where that is the accelerator, the CPU still chooses: what the router says
crosses over before any expert can begin, and which hot experts are taken goes back. That is one wait in every
such layer, even where all experts are hot.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_formats.modes import MODES, Mode
from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.matrices import MatrixShape
from powerinfer_tools.model.shapes import LayerShape
from powerinfer_tools.stages.plan import costs
from powerinfer_tools.stages.plan.costs import BlockSeconds, Machine
from powerinfer_tools.stages.plan.ffn_levels import FFNWay, expected
from powerinfer_tools.stages.plan.levels import Inputs, LayerWays, LevelOptions, check_frequencies, ffn_sync
from powerinfer_tools.stages.plan.memory import (
    down_codes,
    expert_bytes,
    experts_of,
    picked_padding,
    router_bytes,
    shared_bytes,
)

Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
#: By how much the shares of a layer's experts may miss the number that a token takes: counts are whole.
_TOLERANCE = 1e-6
_F32 = 4
#: The CPU's share of a stream's rate when it leaves out neurons of an expert: 1.27 to 1.53 times as fast as
#: whole experts, and bytes alone would give 1.6 (docs/LOG.md, 2026-11-30 and 2026-12-01).
_PICKED_RATE = 0.8


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


def expert_ways(index: int, inputs: Inputs, options: LevelOptions) -> LayerWays:
    """The ways to compute the experts of layer ``index``: whole, and without their zeros where the engine can
    and it is known how many there are. Raises PlanError for frequencies that are no
    shares, are not sorted, or do not add up to the experts that a token takes."""
    layer, machine = inputs.shape.layers[index], inputs.machine
    frequencies = expert_frequencies(index, layer, inputs)
    movable = machine.gpu is not None and "ffn" in options.engine.placeable
    choices = _choices(layer) if movable else _Choices(*np.zeros((2, 1), dtype=np.int64))
    active = expected(frequencies)
    share = active[choices.hot] / active[-1]
    whole = np.full(len(choices.hot), _cpu_seconds(layer.ffn, layer, machine))
    seconds = _expert_seconds(layer, choices, share, machine, whole)
    ways = [_way(layer, choices, "dense", seconds)]
    inside = inputs.inside[index] if inputs.inside else None
    # Experts that are read from disk are computed whole, and so are all others then.
    if inside is not None and inputs.shape.picks_in_experts and not options.from_disk:
        picked = _picked_seconds(layer, _cold_density(frequencies, inside)[choices.hot], machine)
        ways.append(
            _way(layer, choices, "gate-first", _expert_seconds(layer, choices, share, machine, picked))
        )

    def sync_seconds(way: FFNWay, block_hot: bool) -> Vector:
        if not layer.routed:  # nothing is chosen
            return ffn_sync(layer, way.hot, machine, options.home, block_hot, predictor_hot=False)
        return _sync(layer, choices, seconds, machine, options, block_hot)

    return LayerWays(ways, frequencies, _router_seconds(layer, machine), sync_seconds)


def _way(layer: LayerShape, choices: _Choices, mode: Mode, seconds: _Seconds) -> FFNWay:
    """One way, for all ``choices``."""
    none = np.zeros(len(choices.hot), dtype=np.int64)
    cold = experts_of(layer).count - choices.hot
    return FFNWay(
        hot=choices.hot * layer.up.rows,
        mode=np.full(len(none), MODES.index(mode)),
        predictor_hot=False,
        predictor_seconds=np.zeros(len(none)),
        hot_seconds=seconds.hot,
        cold_seconds=seconds.cold,
        vram=none,
        ram=none,
        shared_hot=choices.shared,
        uneven_seconds=seconds.uneven,
        padding=cold * picked_padding(layer) if mode == "gate-first" else none,
    )


def _cold_density(frequencies: Vector, inside: Vector) -> Vector:
    """The mean share of an expert's neurons that is active for a token that takes it, over the experts from
    the k-th on, k = 0 … experts; ``inside`` of each expert."""
    taken, active = expected(frequencies), expected(frequencies * inside)
    cold = taken[-1] - taken
    return np.where(cold > 0, (active[-1] - active) / np.where(cold > 0, cold, 1.0), 0.0)


def _picked_seconds(layer: LayerShape, density: Vector, machine: Machine) -> Vector:
    """Time of the CPU for one expert of whose neurons a share ``density`` [levels] is active: its first
    matrix, and of the others the rows and columns of active neurons. The scales of all columns of the down
    projection are read."""
    first, *rest = layer.ffn
    scales = layer.down.packed_nbytes - down_codes(layer)
    skippable = sum(matrix.packed_nbytes for matrix in rest) - scales
    nbytes = first.packed_nbytes + scales + skippable * density
    every = float(sum(matrix.packed_nbytes for matrix in layer.ffn))
    return _cpu_seconds(layer.ffn, layer, machine) * nbytes / (every * _PICKED_RATE)


def expert_frequencies(index: int, layer: LayerShape, inputs: Inputs) -> Vector:
    """The share of tokens that takes each expert of layer ``index``, descending; all alike where that is not
    known. Raises PlanError as :func:`expert_ways`."""
    experts = experts_of(layer)
    if inputs.frequencies is None:
        return np.full(experts.count, experts.used / experts.count)
    shares = inputs.frequencies[index]
    check_frequencies(index, shares, experts.count)
    if abs(float(shares.sum()) - experts.used) > _TOLERANCE * experts.count:
        raise PlanError(
            f"layer {index}: experts are taken {shares.sum():.4f} times a token, and the model says "
            f"{experts.used}; the profile is of another model, or damaged"
        )
    return shares


def _choices(layer: LayerShape) -> _Choices:
    """Hot counts ascending, first with the shared expert hot, then with it cold."""
    experts = experts_of(layer)
    counts = np.arange(experts.count + 1, dtype=np.int64)
    if not experts.shared:
        return _Choices(counts, np.zeros(len(counts), dtype=np.int64))
    hot = np.concatenate([[0], counts, counts[1:]])
    shared = np.concatenate([[0], np.ones(len(counts), dtype=np.int64), np.zeros(experts.count, np.int64)])
    return _Choices(hot, shared)


def _router_seconds(layer: LayerShape, machine: Machine) -> BlockSeconds:
    """The router is beside attention: no expert can begin before."""
    router, gpu = router_bytes(layer), machine.gpu
    if not layer.routed:
        return BlockSeconds(0.0, 0.0)
    on_gpu = math.inf if gpu is None else router.vram / gpu.bandwidth + gpu.launch_seconds
    return BlockSeconds(router.ram / machine.bandwidth, on_gpu)


def mean_seconds(layer: LayerShape, hot: int, share: float, machine: Machine) -> tuple[float, float, float]:
    """Expected seconds of a token on the hot and on the cold side, and the probability that it waits for the
    hot one, where ``hot`` experts, which have the ``share`` of what the router chooses, are there, and the
    shared one is not."""
    choices = _Choices(np.array([hot]), np.zeros(1, dtype=np.int64))
    whole = np.array([_cpu_seconds(layer.ffn, layer, machine)])
    seconds = _expert_seconds(layer, choices, np.array([share]), machine, whole)
    return float(seconds.hot[0]), float(seconds.cold[0]), float(seconds.some_hot[0])


def _expert_seconds(
    layer: LayerShape, choices: _Choices, share: Vector, machine: Machine, on_cpu: Vector
) -> _Seconds:
    """Expected times where a draw of the router is hot with probability ``share`` [levels], and the CPU takes
    ``on_cpu`` [levels] for a cold expert."""
    experts, gpu = experts_of(layer), machine.gpu
    drawn = np.arange(experts.used + 1)
    probability = _binomial(experts.used, np.clip(share, 0.0, 1.0))
    cold = (experts.used - drawn) * _column(on_cpu) + _column(1 - choices.shared) * _cpu_seconds(
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
