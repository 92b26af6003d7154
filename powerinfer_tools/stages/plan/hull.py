"""The relaxed problem in closed form: lower convex hulls of the levels, filled in order of gain per byte.

For one budget the linear relaxation of a multiple-choice knapsack is solved by walking each unit's lower
convex hull and taking the steepest steps of all units first (Sinha and Zoltners, Operations Research 27,
1979). The step that no longer fits gives the bound; leaving it out gives a choice that is at most one step
from the bound.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_tools.stages.plan.problem import Problem, Unit

Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Relaxation:
    """``bound``: no choice within the VRAM budget has a lower value (the RAM budget is ignored). ``choice``:
    the level of each unit when the last, partial step is left out. ``price``: what one more byte of VRAM
    would save, at least 0."""

    bound: float
    choice: tuple[int, ...]
    price: float


def relax(problem: Problem) -> Relaxation | None:
    """Solve the relaxation over the VRAM budget; None when not even the smallest levels fit."""
    hulls = _lower_hulls(problem)
    used = sum(int(unit.vram[hull[0]]) for unit, hull in zip(problem.units, hulls, strict=True))
    value = sum(float(unit.value[hull[0]]) for unit, hull in zip(problem.units, hulls, strict=True))
    room = problem.vram_capacity - used
    if room < 0:
        return None
    steps = _steps(problem, hulls)
    reached = [0] * len(hulls)
    bound: float | None = None
    price = 0.0
    stopped = [False] * len(hulls)
    for slope, unit_index, position, nbytes in steps:
        if bound is None:
            if nbytes <= room:
                value += slope * nbytes
            else:
                bound, price = value + slope * room, -slope
        # After the first step that does not fit, smaller steps of other units may still fill the rest.
        if stopped[unit_index] or nbytes > room:
            stopped[unit_index] = True
            continue
        room -= nbytes
        reached[unit_index] = position
    choice = tuple(int(hull[position]) for hull, position in zip(hulls, reached, strict=True))
    return Relaxation(bound=value if bound is None else bound, choice=choice, price=price)


def hopeless_levels(problem: Problem, price: float, best: float) -> list[npt.NDArray[np.bool_]]:
    """Per unit, a mask of the levels that no choice better than ``best`` can hold.

    For any price per byte of VRAM, Σ_l min_k (value + price·vram) − price·capacity is a bound (Lagrange);
    taking another level k in unit l raises it by that level's distance from the unit's minimum.
    """
    priced = [unit.value + price * unit.vram for unit in problem.units]
    distances = [value - value.min() for value in priced]
    bound = sum(float(value.min()) for value in priced) - price * problem.vram_capacity
    # Rounding of the sums above must not drop a level that is worth keeping.
    allowance = best - bound + 1e-9 * abs(best)
    return [distance > allowance for distance in distances]


def _steps(problem: Problem, hulls: list[Integers]) -> list[tuple[float, int, int, int]]:
    """(value per byte, unit, position reached, bytes) of every hull step, steepest first; ties by unit, then
    position, so that equal units fill one after the other."""
    steps = []
    for index, (unit, hull) in enumerate(zip(problem.units, hulls, strict=True)):
        nbytes = np.diff(unit.vram[hull])
        slopes = np.diff(unit.value[hull]) / nbytes
        # Hulls are convex, yet rounding may swap neighbours by an ulp: keep the order within the unit.
        slopes = np.maximum.accumulate(slopes)
        steps += [
            (float(s), index, k + 1, int(b)) for k, (s, b) in enumerate(zip(slopes, nbytes, strict=True))
        ]
    return sorted(steps)


def _lower_hulls(problem: Problem) -> list[Integers]:
    """The hull of every unit; equal units share one."""
    computed: dict[tuple[bytes, bytes], Integers] = {}
    hulls = []
    for unit in problem.units:
        key = (unit.value.tobytes(), unit.vram.tobytes())
        if key not in computed:
            computed[key] = _lower_hull(unit)
        hulls.append(computed[key])
    return hulls


def _lower_hull(unit: Unit) -> Integers:
    """Levels on the lower convex hull of (vram, value), from the smallest to the one of least value."""
    order = np.lexsort((unit.value, unit.vram))
    hull: list[int] = []
    for level in order:
        if hull and unit.value[level] >= unit.value[hull[-1]]:
            continue
        while len(hull) >= 2 and not _turns_up(unit, hull[-2], hull[-1], int(level)):
            hull.pop()
        hull.append(int(level))
    return np.array(hull, dtype=np.int64)


def _turns_up(unit: Unit, first: int, middle: int, last: int) -> bool:
    """Whether the slope grows at ``middle``."""
    left = (unit.value[middle] - unit.value[first]) * float(unit.vram[last] - unit.vram[middle])
    right = (unit.value[last] - unit.value[middle]) * float(unit.vram[middle] - unit.vram[first])
    return bool(left < right)
