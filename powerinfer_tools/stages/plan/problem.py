"""The placement problem in the form that every solver here takes: one table of levels per unit, two budgets.

    min Σ_l value[l, k_l]   s.t.  Σ_l vram[l, k_l] ≤ vram capacity,  Σ_l ram[l, k_l] ≤ ram capacity

one level k_l per unit: a multiple-choice knapsack.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PlanError

Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Unit:
    """What one unit may choose from; arrays [levels]: the value to minimise, bytes on both sides."""

    name: str
    value: Vector
    vram: Integers
    ram: Integers


@dataclass(frozen=True)
class Problem:
    """Units and capacities, bytes."""

    units: tuple[Unit, ...]
    vram_capacity: int
    ram_capacity: int

    def value(self, choice: Sequence[int]) -> float:
        """Value of choosing level ``choice[l]`` in each unit."""
        return float(sum(float(unit.value[k]) for unit, k in zip(self.units, choice, strict=True)))

    def bytes_used(self, choice: Sequence[int]) -> tuple[int, int]:
        """(VRAM, RAM) of a choice."""
        pairs = list(zip(self.units, choice, strict=True))
        return sum(int(unit.vram[k]) for unit, k in pairs), sum(int(unit.ram[k]) for unit, k in pairs)

    def fits(self, choice: Sequence[int]) -> bool:
        """Whether a choice keeps both budgets."""
        vram, ram = self.bytes_used(choice)
        return vram <= self.vram_capacity and ram <= self.ram_capacity

    @property
    def ram_can_run_out(self) -> bool:
        """Whether some choice would exceed the RAM budget."""
        return sum(int(unit.ram.max()) for unit in self.units) > self.ram_capacity


def check_problem(problem: Problem) -> None:
    """Refuse what a solver would take without complaint: NaN or infinite values, negative bytes, empty or
    uneven tables, capacities below zero. Raises PlanError naming the unit."""
    for name, capacity in (("VRAM", problem.vram_capacity), ("RAM", problem.ram_capacity)):
        if capacity < 0:
            raise PlanError(f"the {name} budget is {capacity} bytes; it must not be negative")
    if not problem.units:
        raise PlanError("there is nothing to place: the model has no layers")
    for unit in problem.units:
        size = len(unit.value)
        if not size or unit.value.shape != (size,) or unit.vram.shape != (size,) or unit.ram.shape != (size,):
            raise PlanError(f"{unit.name}: its levels are empty or uneven")
        if not np.isfinite(unit.value).all():
            raise PlanError(f"{unit.name}: a level's time is not a finite number")
        if unit.vram.min() < 0 or unit.ram.min() < 0:
            raise PlanError(f"{unit.name}: a level takes a negative number of bytes")
