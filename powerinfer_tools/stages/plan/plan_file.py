"""From an outcome to the plan file."""

from typing import Literal

from powerinfer_formats import plan as file
from powerinfer_formats.hardware import HardwareProfile
from powerinfer_formats.modes import MODES
from powerinfer_formats.plan import PlanDense, PlanExperts
from powerinfer_formats.profile import Profile
from powerinfer_tools import __version__
from powerinfer_tools.model.shapes import LayerShape, ModelShape
from powerinfer_tools.stages.plan.capabilities import THIS_VERSION
from powerinfer_tools.stages.plan.ffn_units import ffn_units
from powerinfer_tools.stages.plan.memory import experts_of
from powerinfer_tools.stages.plan.planner import Outcome
from powerinfer_tools.stages.plan.verdict import limited_by, time_parts, verdict

#: The unit of the memory count that the file tells layer by layer.
_FFN = "ffn"


def plan_of(outcome: Outcome, hardware: HardwareProfile, profile: Profile | None) -> file.Plan:
    """The plan file's content."""
    shape, options, memory = outcome.shape, outcome.options, outcome.memory
    experts = shape.expert_layers
    neurons = experts[0].neurons if experts else shape.most_neurons
    return file.Plan(
        tool_version=__version__,
        model=file.PlanModel(
            name=shape.name,
            fingerprint=shape.fingerprint,
            architecture=shape.architecture,
            activation=shape.activation,
            layers=len(shape.layers),
            neurons=neurons,
            width=shape.width,
            experts=_experts(outcome),
        ),
        hardware=file.PlanHardware(
            name=hardware.machine.name,
            source=hardware.machine.source,
            cpu=hardware.cpu.name,
            gpu=hardware.gpu.name if hardware.gpu else None,
        ),
        budgets=file.Budgets(
            vram_bytes=memory.vram_capacity,
            ram_bytes=memory.ram_capacity,
            context=outcome.workload.context,
            kv_type=outcome.workload.kv_type,
            max_ppl_increase=options.max_ppl_increase,
        ),
        objective=options.objective,
        group=experts[0].up.rows if experts else min(options.group, neurons),
        layers=tuple(_layer(outcome, index) for index in range(len(shape.layers))),
        units=_units(outcome),
        memory=file.PlanMemory(
            memory.vram_used,
            memory.vram_capacity,
            memory.ram_used,
            memory.ram_capacity,
            memory.disk_used,
        ),
        solver=_solver(outcome),
        predicted=file.PlanPrediction(
            tokens_per_second=1.0 / outcome.placement.seconds,
            limited_by=limited_by(outcome),
            seconds=time_parts(outcome) | {"total": outcome.placement.seconds},
        ),
        verdict=verdict(outcome),
        request=_request(outcome),
        provenance=_provenance(outcome, profile),
    )


def _request(outcome: Outcome) -> file.PlanRequested | None:
    options, placement = outcome.options, outcome.placement
    if not options.prompt:
        return None
    seconds = placement.prompt_seconds + options.generate * placement.seconds
    return file.PlanRequested(options.prompt, options.generate, placement.prompt_seconds, seconds)


def _layer(outcome: Outcome, index: int) -> file.LayerPlan:
    table, k = outcome.placement.tables[index], outcome.placement.solution.choice[index]
    hot, mode, shape = int(table.hot[k]), MODES[int(table.mode[k])], outcome.shape.layers[index]
    units = ffn_units(shape, outcome.sizes[index])
    ffn = table.ffn_bytes(units, int(k))
    has_shared = shape.experts is not None and bool(shape.experts.shared)
    return file.LayerPlan(
        index=index,
        hot_neurons=hot,
        mode=mode,
        attention="gpu" if table.block_hot[k] else "cpu",
        hot_activation_share=table.routed_share(units, int(k)),
        vram_bytes=ffn.vram,
        ram_bytes=ffn.ram,
        seconds=file.LayerSeconds(
            attention=float(table.block_seconds[k]),
            hot=float(table.hot_seconds[k]),
            cold=float(table.cold_seconds[k]),
            sync=float(table.sync_seconds[k]),
            total=float(table.seconds[k]),
            predictor=float(table.predictor_seconds[k]),
        ),
        predictor=None if mode != "predicted" else "gpu" if table.predictor_hot[k] else "cpu",
        disk_bytes=int(table.disk[k]),
        shared_expert=None if not has_shared else "gpu" if table.shared_hot[k] else "cpu",
        neurons=_own_neurons(outcome.shape, shape),
    )


def _own_neurons(shape: ModelShape, layer: LayerShape) -> int | None:
    """Those of a layer with one FFN, where such layers differ, or without FFN."""
    sizes = {other.neurons for other in shape.layers if not other.routed}
    return layer.neurons if not layer.routed and (len(sizes) > 1 or not layer.neurons) else None


def _experts(outcome: Outcome) -> PlanExperts | None:
    shape = outcome.shape
    if not shape.routed:
        return None
    experts = experts_of(shape.expert_layers[0])
    dense = [index for index, layer in enumerate(shape.layers) if not layer.routed and layer.neurons]
    others = None
    if dense:
        neurons = shape.layers[dense[0]].neurons
        group = min(outcome.options.group, neurons) if shape.ffn_layers else neurons
        others = PlanDense(tuple(dense), neurons, group)
    return PlanExperts(experts.count, experts.used, experts.shared_neurons, others)


def _units(outcome: Outcome) -> tuple[file.PlanUnit, ...]:
    sides: tuple[tuple[Literal["gpu", "cpu"], dict[str, int]], ...] = (
        ("gpu", dict(outcome.memory.vram_units)),
        ("cpu", dict(outcome.memory.ram_units)),
    )
    return tuple(
        file.PlanUnit(name, device, nbytes)
        for device, units in sides
        for name, nbytes in units.items()
        if nbytes and name != _FFN
    )


def _solver(outcome: Outcome) -> file.PlanSolver:
    solution = outcome.placement.solution
    return file.PlanSolver(
        status=solution.status,
        objective=solution.value,
        bound=solution.bound,
        gap=solution.gap,
        nodes=solution.nodes,
        greedy={name: value for name, value in outcome.placement.greedy.items() if value is not None},
    )


def _provenance(outcome: Outcome, profile: Profile | None) -> file.PlanProvenance:
    return file.PlanProvenance(
        source=outcome.frequencies.source,
        corpus_hashes=() if profile is None else tuple(corpus.sha256 for corpus in profile.corpus),
        corpus_tokens=0 if profile is None else profile.tokens,
        engine="this version" if outcome.options.engine == THIS_VERSION else "every unit placed",
        counting="" if profile is None else profile.counting,
    )
