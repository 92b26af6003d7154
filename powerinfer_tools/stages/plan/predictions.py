"""What a plan is worth: its speed beside that of other ways to run the same model on the same machine, and
what better hardware would bring.

All three speeds come from one cost model (:mod:`.costs`), so that they differ in the
placement alone.
"""

from dataclasses import replace

import numpy as np

from powerinfer_formats.plan import PlanPrediction
from powerinfer_tools.model.device_memory import overhead
from powerinfer_tools.model.shapes import ModelShape
from powerinfer_tools.stages.plan import costs, memory
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.ffn_units import ffn_units
from powerinfer_tools.stages.plan.frequencies import Frequencies
from powerinfer_tools.stages.plan.memory import router_bytes
from powerinfer_tools.stages.plan.planner import RAM_MARGIN_SHARE, Budgets, Outcome, PlanOptions, plan_outcome
from powerinfer_tools.stages.plan.verdict import cpu_only_parts, limit_of, limited_by, time_parts

GIB = 1 << 30
#: By how much the memory of the second sensitivity is faster: DDR5-5600 to DDR5-7000, say.
FASTER_MEMORY = 1.25


def predictions(outcome: Outcome) -> dict[str, PlanPrediction]:
    """Speed of this plan (``powerinfer``), of whole layers on the accelerator (``layer-offload``) and of the
    CPU alone (``cpu``, in the modes that this plan may use)."""
    placed = outcome.placement
    ours = PlanPrediction(
        1.0 / placed.seconds, limited_by(outcome), time_parts(outcome) | {"total": placed.seconds}
    )
    moved = outcome.machine.gpu is not None
    if outcome.memory.disk_used:  # the others do not fit
        return {"powerinfer": ours}
    return {
        "powerinfer": ours,
        "layer-offload": _prediction(_layer_offload(outcome), moved=moved),
        "cpu": _prediction(cpu_only_parts(outcome), moved=False),
    }


def sensitivity(
    shape: ModelShape,
    frequencies: Frequencies,
    machine: Machine,
    budgets: Budgets,
    options: PlanOptions,
    *,
    from_disk: bool = False,
) -> dict[str, float]:
    """Tokens per second of the best plan with one more GiB of VRAM (where there is a GPU), of RAM (where the
    plan reads ``from_disk``), and with memory of the CPU that is 1.25 times as fast."""
    speeds = {}
    gpu = machine.gpu
    if gpu is not None:
        larger = replace(machine, gpu=replace(gpu, vram_bytes=gpu.vram_bytes + GIB))
        more = replace(budgets, vram=None if budgets.vram is None else budgets.vram + GIB)
        speeds["vram_plus_1_gib"] = _speed(plan_outcome(shape, frequencies, larger, more, options))
    if from_disk:
        ram = int(machine.ram_bytes * (1 - RAM_MARGIN_SHARE)) if budgets.ram is None else budgets.ram
        more = replace(budgets, ram=ram + GIB)
        speeds["ram_plus_1_gib"] = _speed(plan_outcome(shape, frequencies, machine, more, options))
    faster = _with_faster_memory(machine)
    speeds["ram_bandwidth_times_1.25"] = _speed(plan_outcome(shape, frequencies, faster, budgets, options))
    return speeds


def all_in_memory(
    shape: ModelShape, frequencies: Frequencies, machine: Machine, budgets: Budgets, options: PlanOptions
) -> PlanPrediction:
    """The speed that the model would have with RAM enough for all of it."""
    return predictions(plan_outcome(shape, frequencies, machine, replace(budgets, ram=1 << 60), options))[
        "powerinfer"
    ]


def _speed(outcome: Outcome) -> float:
    return 1.0 / outcome.placement.seconds


def _with_faster_memory(machine: Machine) -> Machine:
    def scaled(rates: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(FASTER_MEMORY * rate for rate in rates)

    curves = tuple(
        replace(
            curve,
            dense_bytes_per_s=FASTER_MEMORY * curve.dense_bytes_per_s,
            gate_first_bytes_per_s=scaled(curve.gate_first_bytes_per_s),
            predicted_bytes_per_s=scaled(curve.predicted_bytes_per_s),
        )
        for curve in machine.ffn_curves
    )
    points = tuple((density, FASTER_MEMORY * rate) for density, rate in machine.curve)
    return replace(machine, bandwidth=FASTER_MEMORY * machine.bandwidth, curve=points, ffn_curves=curves)


def _prediction(parts: dict[str, float], *, moved: bool) -> PlanPrediction:
    total = sum(parts.values())
    return PlanPrediction(1.0 / total, limit_of(parts, moved=moved), parts | {"total": total})


def _layer_offload(outcome: Outcome) -> dict[str, float]:
    """Layer-wise offload as llama.cpp does it: as many whole layers (attention, KV cache, FFN) on the
    accelerator as fit beside the scratch, then the head; every neuron is computed; one hand-over a token."""
    shape, machine, workload = outcome.shape, outcome.machine, outcome.workload
    parts = dict.fromkeys(cpu_only_parts(outcome), 0.0)
    room = outcome.memory.vram_capacity - overhead(outcome.memory.vram_capacity)
    room -= memory.gpu_scratch_bytes(shape, workload.batch)
    room -= memory.gpu_attention_scratch_bytes(shape, workload)
    on_gpu = 0
    for layer, size in zip(shape.layers, outcome.sizes, strict=True):
        units, router = ffn_units(layer, size), router_bytes(layer)
        whole = units.whole.vram + router.vram + memory.gpu_attention_bytes(layer)
        whole += memory.gpu_cache_bytes(shape, workload)
        block = costs.attention_seconds(shape, layer, machine, workload)
        if machine.gpu is not None and whole <= room:
            room -= whole
            on_gpu += 1
            parts["attention"] += block.gpu + router.vram / machine.gpu.bandwidth
            launched = costs.FFN_LAUNCHES * units.products * machine.gpu.launch_seconds
            parts["hot"] += units.token.vram / machine.gpu.bandwidth + launched
            continue
        parts["attention"] += block.cpu + router.ram / machine.bandwidth
        curve = machine.ffn_curve(layer.width, size.types, layer.up.rows)
        parts["cold"] += float(costs.dense_seconds(np.array([float(units.token.ram)]), machine, curve)[0])
    head = costs.head_seconds(shape, machine)
    head_there = on_gpu == len(shape.layers) and memory.gpu_head_bytes(shape, workload.batch) <= room
    parts["head"] = head.gpu if head_there else head.cpu
    if machine.gpu is not None and on_gpu:
        parts["sync"] = costs.sync_seconds(machine.gpu, shape.width)
    return parts
