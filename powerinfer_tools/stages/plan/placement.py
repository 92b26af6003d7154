"""From tables of levels to a placement: solve the problem for every home of the residual stream, keep the
best."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.predictor_shapes import PredictorShape
from powerinfer_tools.model.shapes import LayerShape, NeuronBytes
from powerinfer_tools.stages.plan.disk_levels import with_disk
from powerinfer_tools.stages.plan.experts import expert_frequencies, expert_ways
from powerinfer_tools.stages.plan.ffn_units import ffn_units
from powerinfer_tools.stages.plan.greedy import fastest_alike, greedy_choices
from powerinfer_tools.stages.plan.hull import relax
from powerinfer_tools.stages.plan.levels import (
    Home,
    Inputs,
    LevelOptions,
    LevelTable,
    head_levels,
    layer_levels,
    neuron_ways,
)
from powerinfer_tools.stages.plan.milp import Solution, SolverOptions, solve
from powerinfer_tools.stages.plan.problem import Problem, Unit
from powerinfer_tools.stages.plan.prompts import with_prompt

Vector = npt.NDArray[np.float64]


class DoesNotFit(PlanError):
    """RAM and VRAM together do not hold the model."""


Objective = Literal["time", "frequency"]


@dataclass(frozen=True)
class Capacities:
    """Bytes left for the units that the solver places, after what is fixed. ``attention_scratch``: VRAM that
    is taken once as soon as there is an attention block."""

    vram: int
    ram: int
    attention_scratch: int = 0

    @property
    def beside_attention(self) -> "Capacities":
        """What is left where attention may be placed."""
        return replace(self, vram=max(0, self.vram - self.attention_scratch))


@dataclass(frozen=True)
class Placement:
    """A solved placement. ``tables`` and ``solution.choice`` hold the layers in order, then the head.
    ``greedy`` is the value of each simple placement, None where it breaks a budget."""

    tables: tuple[LevelTable, ...]
    solution: Solution
    greedy: dict[str, float | None]
    home: Home

    @property
    def seconds(self) -> float:
        """Time of one token."""
        return sum(float(t.seconds[k]) for t, k in zip(self.tables, self.solution.choice, strict=True))

    @property
    def prompt_seconds(self) -> float:
        """Time of the prompt; 0 where none is counted."""
        return sum(float(t.prompt_seconds[k]) for t, k in zip(self.tables, self.solution.choice, strict=True))

    @property
    def uses_predictors(self) -> bool:
        """Whether some layer is computed in mode predicted."""
        return any(t.predictor_bytes[k] > 0 for t, k in zip(self.tables, self.solution.choice, strict=True))

    @property
    def disk_bytes(self) -> int:
        """Bytes that are on disk alone, as they would be in RAM."""
        return sum(int(t.disk[k]) for t, k in zip(self.tables, self.solution.choice, strict=True))


def best_placement(
    inputs: Inputs,
    capacities: Capacities,
    options: LevelOptions,
    objective: Objective,
    solver: SolverOptions,
) -> Placement:
    """The placement of least value over both homes of the residual stream (the accelerator can only be home
    when attention may be placed there), and without any attention there, which saves its scratch; and with no
    neuron there, as dense layers then have the source's form and speed.

    Raises PlanError with the numbers when the RAM does not hold what the VRAM cannot take.
    """
    engine = options.engine
    without = replace(options, engine=replace(engine, placeable=engine.placeable - {"attention"}))
    tries = [(without, capacities)]
    if "attention" in engine.placeable and inputs.machine.gpu is not None:
        homes: tuple[Home, ...] = ("cpu", "gpu")
        tries += [(replace(options, home=home), capacities.beside_attention) for home in homes]
    if objective == "time" and inputs.machine.gpu is not None and inputs.shape.ffn_layers:
        still = replace(engine, placeable=engine.placeable - {"ffn"})
        tries.append((replace(options, engine=still), tries[-1][1]))
    placements, refusals = list[Placement](), list[PlanError]()
    for tried, left in tries:
        try:
            placements.append(_placement(inputs, left, tried, objective, solver))
        except PlanError as error:
            if "ffn" in tried.engine.placeable or not refusals:  # else it lacks what could have fitted
                refusals.append(error)
    if not placements:
        raise refusals[-1]
    return min(placements, key=lambda placement: placement.solution.value)


def level_tables(inputs: Inputs, options: LevelOptions) -> tuple[LevelTable, ...]:
    """Tables of all layers, then of the head. Equal layers share one table's arrays."""
    computed: dict[tuple[LayerShape, NeuronBytes, bytes, bytes, PredictorShape | None], LevelTable] = {}
    tables = []
    for index, layer in enumerate(inputs.shape.layers):
        frequencies = None if inputs.frequencies is None else inputs.frequencies[index]
        predictor = inputs.predictors[index] if inputs.predictors else None
        counted = b"" if frequencies is None else frequencies.tobytes()
        active = inputs.inside[index] if inputs.inside else None
        inside = b"" if active is None else active.tobytes()
        key = (layer, inputs.sizes[index], counted, inside, predictor)
        if key not in computed:
            ways = neuron_ways if layer.experts is None else expert_ways
            table = layer_levels(index, inputs, options, ways)
            units = ffn_units(layer, inputs.sizes[index])
            computed[key] = with_prompt(table, inputs.shape, layer, units, inputs.machine, options.size)
            disk = inputs.machine.disk if layer.routed or not inputs.shape.routed else None
            if options.from_disk and disk is not None and layer.neurons:
                shares = expert_frequencies(index, layer, inputs) if layer.routed else np.ones(layer.neurons)
                computed[key] = with_disk(computed[key], layer, units, shares, disk, options.size.passes)
        tables.append(replace(computed[key], unit=f"layer {index}"))
    return (*tables, head_levels(inputs.shape, inputs.machine, inputs.workload.batch, options))


def as_problem(
    tables: Sequence[LevelTable], capacities: Capacities, objective: Objective, generate: int = 1
) -> Problem:
    """The tables as a problem: values are seconds of a generated token and of its share of the prompt, or
    active neurons that are left to the CPU."""
    units = []
    for table in tables:
        seconds = table.seconds + table.prompt_seconds / generate
        value = seconds if objective == "time" else table.total_activations - table.activations
        units.append(Unit(table.unit, value, table.vram, table.ram))
    return Problem(tuple(units), capacities.vram, capacities.ram)


def _placement(
    inputs: Inputs, capacities: Capacities, options: LevelOptions, objective: Objective, solver: SolverOptions
) -> Placement:
    tables = level_tables(inputs, options)
    problem = as_problem(tables, capacities, objective, options.size.generate)
    choices = greedy_choices(tables, problem)
    greedy = {
        name: problem.value(choice) if problem.fits(choice) else None for name, choice in choices.items()
    }
    starts = [choice for choice in choices.values() if problem.fits(choice)]
    if not starts:
        starts = [_least_ram(problem)]
    solution = solve(problem, min(starts, key=problem.value), solver)
    if objective == "frequency":
        # Which neurons are hot is settled; how they are computed is still a matter of time.
        quick = fastest_alike(tables, solution.choice)
        solution = replace(solution, choice=quick if problem.fits(quick) else solution.choice)
    return Placement(tables, solution, greedy, options.home)


def _least_ram(problem: Problem) -> tuple[int, ...]:
    """The placement that leaves least in RAM; PlanError with the numbers when that is still too much."""
    units = tuple(replace(unit, value=unit.ram.astype(np.float64)) for unit in problem.units)
    relaxed = relax(replace(problem, units=units))
    if relaxed is None:
        raise PlanError(f"the VRAM budget leaves {problem.vram_capacity} bytes, too little for any placement")
    vram, ram = problem.bytes_used(relaxed.choice)
    if ram > problem.ram_capacity:
        raise DoesNotFit(
            f"the model does not fit: with {vram:,} bytes in VRAM it needs {ram:,} bytes of RAM for layers "
            f"and head, and the budget leaves {problem.ram_capacity:,}; give more --ram or --vram, or a "
            "smaller --ctx"
        )
    return relaxed.choice
