"""make_plan: a shape, a profile, a machine and budgets in; a placement with its memory, speed and verdict
out.

Pure: reads no files and measures nothing. Equal inputs give equal outcomes, byte for byte once written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from powerinfer_formats.block_types import TensorType
from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.counting import KVType
from powerinfer_tools.model.device_memory import budget_for, overhead
from powerinfer_tools.model.shapes import ModelShape, NeuronBytes, neuron_bytes
from powerinfer_tools.stages.plan import memory
from powerinfer_tools.stages.plan.capabilities import THIS_VERSION, Capabilities
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.disk_levels import DISK_UNKNOWN, NO_LOCALITY, buffer_bytes
from powerinfer_tools.stages.plan.ffn_units import ffn_units
from powerinfer_tools.stages.plan.frequencies import Frequencies
from powerinfer_tools.stages.plan.levels import Inputs, LevelOptions
from powerinfer_tools.stages.plan.memory import RequestSize, Workload, router_bytes, unit_bytes
from powerinfer_tools.stages.plan.milp import SolverOptions
from powerinfer_tools.stages.plan.placement import (
    Capacities,
    DoesNotFit,
    Objective,
    Placement,
    best_placement,
)

Vector = npt.NDArray[np.float64]
#: Left free when no budget is given: VRAM for the display, the CUDA context and what the engine leaves free
#: by itself (:data:`powerinfer_tools.model.device_memory.MARGIN`, a quarter of this); RAM for the system.
VRAM_MARGIN = 1 << 30
RAM_MARGIN_SHARE = 0.1
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Budgets:
    """What the user grants, bytes; None: what the machine has, less a margin."""

    vram: int | None = None
    ram: int | None = None


@dataclass(frozen=True)
class PlanOptions:
    """How to plan. ``context`` None: 4,096 or the trained context, whichever is less. ``down_type``: row type
    of the transposed down projection, None for convert's default. ``max_ppl_increase``: what predictors or
    thresholds may cost, a share of the perplexity; the caller leaves out those that cost more. ``engine``:
    what the engine can do. ``prompt``, ``generate``: tokens of the requests that are to be fast."""

    objective: Objective = "time"
    prompt: int = 0
    generate: int = 1
    group: int = 64
    context: int | None = None
    batch: int = 512
    kv_type: KVType = "f16"
    max_ppl_increase: float = 0.0
    engine: Capabilities = THIS_VERSION
    down_type: TensorType | None = None
    solver: SolverOptions = field(default_factory=SolverOptions)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on both sides, in all and by unit; capacities are the budgets. ``disk_used``: bytes that would be
    in RAM and are on disk alone."""

    vram_used: int
    vram_capacity: int
    ram_used: int
    ram_capacity: int
    vram_units: Mapping[str, int]
    ram_units: Mapping[str, int]
    disk_used: int = 0


@dataclass(frozen=True)
class Outcome:
    """Everything about one plan."""

    shape: ModelShape
    machine: Machine
    options: PlanOptions
    workload: Workload
    frequencies: Frequencies
    sizes: tuple[NeuronBytes, ...]
    placement: Placement
    memory: MemoryUse
    fits_whole: bool


def plan_outcome(
    shape: ModelShape, frequencies: Frequencies, machine: Machine, budgets: Budgets, options: PlanOptions
) -> Outcome:
    """Place ``shape`` on ``machine`` within ``budgets``.

    Raises PlanError for options out of range and, with the numbers, when there is no plan.
    """
    workload = _workload(shape, options)
    _check_options(options, frequencies)
    vram, ram = _vram_budget(machine, budgets), _ram_budget(machine, budgets)
    sizes = tuple(neuron_bytes(layer, options.down_type) for layer in shape.layers)
    inputs = Inputs(
        shape,
        machine,
        workload,
        frequencies.layers,
        sizes,
        frequencies.predictors,
        frequencies.thresholds,
        frequencies.inside,
    )
    scratch = _hot_scratch(shape, workload, frequencies, options.engine)
    smallest, what = _smallest_unit(shape, sizes, options)
    needed = budget_for(scratch.neurons + smallest)
    if budgets.vram and machine.gpu is not None and options.engine.placeable and vram < needed:
        raise PlanError(
            f"a VRAM budget of {vram:,} bytes is too small: {overhead(needed):,} bytes that are kept for the "
            f"driver, {scratch.neurons:,} bytes of scratch and {smallest:,} bytes for {what} need "
            f"{needed:,}; give more --vram, or --vram 0 to plan without the GPU"
        )
    fixed = memory.fixed_ram_bytes(shape, workload, predicted=any(frequencies.predictors))
    room = ram - sum(fixed.values())
    if room < 0:
        raise PlanError(
            f"a RAM budget of {ram:,} bytes is too small: embedding, scratch and norms alone need "
            f"{sum(fixed.values()):,}"
        )
    capacities = Capacities(max(0, vram - overhead(vram) - scratch.neurons), room, scratch.attention)
    size = RequestSize(options.prompt, options.generate, workload.batch)
    levels = LevelOptions(options.group, options.engine, size=size)
    try:
        placement = best_placement(inputs, capacities, levels, options.objective, options.solver)
    except DoesNotFit as error:
        placement, buffers = _with_disk(inputs, capacities, levels, options, error)
        fixed["disk_buffers"] = buffers
    if not placement.uses_predictors:
        fixed |= memory.fixed_ram_bytes(shape, workload, predicted=False)
    whole = sum(int(table.vram.max()) for table in placement.tables)
    return Outcome(
        shape=shape,
        machine=machine,
        options=options,
        workload=workload,
        frequencies=frequencies,
        sizes=sizes,
        placement=placement,
        memory=_memory_use(placement, inputs, scratch, fixed, vram, ram),
        fits_whole=machine.gpu is not None and 0 < whole <= capacities.beside_attention.vram,
    )


def _with_disk(
    inputs: Inputs, capacities: Capacities, levels: LevelOptions, options: PlanOptions, refusal: DoesNotFit
) -> tuple[Placement, int]:
    """The best placement with experts on disk, and the RAM that reading them takes. Raises PlanError, saying
    why where nothing can be read from disk."""
    shape, disk = inputs.shape, inputs.machine.disk
    if disk is None:
        raise PlanError(f"{refusal}. {DISK_UNKNOWN}")
    if not shape.routed and inputs.machine.gpu is not None and capacities.vram:
        raise PlanError(f"{refusal}. {NO_LOCALITY} Beside an accelerator nothing of it is read from disk")
    buffers = buffer_bytes(shape)
    left = replace(capacities, ram=capacities.ram - buffers)
    if left.ram < 0:
        raise refusal
    levels = replace(levels, from_disk=True)
    return best_placement(inputs, left, levels, options.objective, options.solver), buffers


def _smallest_unit(
    shape: ModelShape, sizes: tuple[NeuronBytes, ...], options: PlanOptions
) -> tuple[int, str]:
    """VRAM of the smallest unit that can be placed, and its name."""
    units = [
        (size.total * min(options.group, layer.neurons), f"one group of {options.group} neurons")
        if layer.experts is None
        else (unit_bytes(layer), "one expert")
        for size, layer in zip(sizes, shape.layers, strict=True)
        if layer.neurons
    ]
    return min(units, key=lambda unit: unit[0])


@dataclass(frozen=True)
class _HotScratch:
    """VRAM that is taken once: for neurons (and predictors, where there are any), and for attention."""

    neurons: int
    attention: int


def _hot_scratch(
    shape: ModelShape, workload: Workload, frequencies: Frequencies, engine: Capabilities
) -> _HotScratch:
    neurons = memory.gpu_scratch_bytes(shape, workload.batch)
    if "predictors" in engine.placeable and any(frequencies.predictors):
        neurons += memory.gpu_predictor_scratch_bytes(shape, workload.batch)
    moved = "attention" in engine.placeable
    return _HotScratch(neurons, memory.gpu_attention_scratch_bytes(shape, workload) if moved else 0)


def _workload(shape: ModelShape, options: PlanOptions) -> Workload:
    context = min(DEFAULT_CONTEXT, shape.trained_context) if options.context is None else options.context
    if not 1 <= context <= shape.trained_context:
        raise PlanError(
            f"context {context} is not from 1 to {shape.trained_context}, what {shape.name} was trained for"
        )
    if options.batch < 1:
        raise PlanError(f"batch {options.batch} is not a positive number of tokens")
    if options.kv_type == "q8_0" and shape.head_dim % 32:
        raise PlanError(
            f"a q8_0 KV cache needs heads of a multiple of 32 values, those of {shape.name} have "
            f"{shape.head_dim}; take f16"
        )
    return Workload(context=context, batch=min(options.batch, context), kv_type=options.kv_type)


def _check_options(options: PlanOptions, frequencies: Frequencies) -> None:
    if options.prompt < 0 or options.generate < 1:
        raise PlanError(
            f"a request of {options.prompt} tokens and {options.generate} generated ones cannot be priced: a "
            "prompt may be empty, and one token must be generated"
        )
    if options.group < 1:
        raise PlanError(f"group {options.group} is not a positive number of neurons")
    if options.objective == "frequency" and frequencies.layers is None:
        raise PlanError(
            "--objective frequency needs activation frequencies; make them with powerinfer profile"
        )


def _vram_budget(machine: Machine, budgets: Budgets) -> int:
    if budgets.vram is not None and budgets.vram < 0:
        raise PlanError(f"a VRAM budget of {budgets.vram} bytes is negative")
    if machine.gpu is None:
        return 0
    if budgets.vram is None:
        return max(0, machine.gpu.vram_bytes - VRAM_MARGIN)
    if budgets.vram > machine.gpu.vram_bytes:
        raise PlanError(
            f"a VRAM budget of {budgets.vram:,} bytes is more than the {machine.gpu.vram_bytes:,} of "
            f"{machine.gpu.name}"
        )
    return budgets.vram


def _ram_budget(machine: Machine, budgets: Budgets) -> int:
    if budgets.ram is None:
        return int(machine.ram_bytes * (1 - RAM_MARGIN_SHARE))
    if budgets.ram < 0:
        raise PlanError(f"a RAM budget of {budgets.ram} bytes is negative")
    return budgets.ram


def _memory_use(
    placement: Placement,
    inputs: Inputs,
    scratch: _HotScratch,
    fixed: Mapping[str, int],
    vram: int,
    ram: int,
) -> MemoryUse:
    """Count what the chosen levels take, unit by unit."""
    shape, workload = inputs.shape, inputs.workload
    on_gpu = {"ffn": 0, "predictors": 0, "attention": 0, "kv_cache": 0, "head": 0}
    on_cpu = dict(on_gpu)
    moved = 0
    for index, (table, k) in enumerate(zip(placement.tables, placement.solution.choice, strict=True)):
        block_hot = bool(table.block_hot[k])
        if index == len(shape.layers):
            on_gpu["head"] += int(table.vram[k])
            on_cpu["head"] += int(table.ram[k])
            continue
        layer = shape.layers[index]
        ffn = table.ffn_bytes(ffn_units(layer, inputs.sizes[index]), int(k))
        on_gpu["ffn"] += ffn.vram
        on_cpu["ffn"] += ffn.ram
        moved += block_hot
        if block_hot:
            on_gpu["attention"] += memory.gpu_attention_bytes(layer)
            on_gpu["kv_cache"] += memory.gpu_cache_bytes(shape, workload)
        else:
            on_cpu["attention"] += memory.attention_bytes(layer)
            on_cpu["kv_cache"] += memory.kv_cache_bytes(shape, workload)
        if layer.experts is not None:
            side, router = on_gpu if block_hot else on_cpu, router_bytes(layer)
            side["router"] = side.get("router", 0) + (router.vram if block_hot else router.ram)
        (on_gpu if table.predictor_hot[k] else on_cpu)["predictors"] += int(table.predictor_bytes[k])
    if any(on_gpu.values()):
        on_gpu["scratch"] = scratch.neurons + (scratch.attention if moved else 0)
        on_gpu["reserve"] = overhead(vram)
    on_cpu |= fixed
    used = sum(on_gpu.values()), vram, sum(on_cpu.values()), ram
    return MemoryUse(*used, on_gpu, on_cpu, placement.disk_bytes)
