"""The multiple-choice knapsack on HiGHS: one thread, fixed seed, stopped by gap or nodes.

Units with equal tables are one class whose levels are counted by integers, so that equal layers bring no
symmetry. HiGHS takes NaN and calls the result optimal, returns codes instead of raising, and gives zeros for
an infeasible model: everything is checked here, before and after.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PlanError
from powerinfer_tools.stages.plan.hull import hopeless_levels, relax
from powerinfer_tools.stages.plan.levels import undominated
from powerinfer_tools.stages.plan.problem import Problem, Unit, check_problem

Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Status = Literal["optimal", "node limit", "time limit", "infeasible"]
#: HiGHS works best with an objective of this size; seconds of a token are far smaller.
_OBJECTIVE_SCALE = 1000.0
_SEED = 20231
#: How far HiGHS may exceed a row of size 1, and what is kept back once it has.
_TOLERANCE = 1e-9
_RESERVE = 1e-7


@dataclass(frozen=True)
class SolverOptions:
    """``gap``: relative distance to the bound at which to stop. ``seconds`` is a safety net only: a plan that
    hits it says so, because another run may end elsewhere."""

    gap: float = 1e-4
    nodes: int = 1000
    seconds: float = 60.0


@dataclass(frozen=True)
class Solution:
    """One level per unit; ``bound``: no choice has a lower value; ``nodes`` of the search tree."""

    choice: tuple[int, ...]
    value: float
    bound: float
    status: Status
    nodes: int

    @property
    def gap(self) -> float:
        """Relative distance from the bound."""
        return max(0.0, self.value - self.bound) / abs(self.value) if self.value else 0.0


@dataclass(frozen=True)
class _Class:
    """Units with equal tables, and the levels worth considering (indexes into the full table, at least
    one)."""

    members: tuple[int, ...]
    unit: Unit
    kept: Integers


def solve(problem: Problem, start: Sequence[int], options: SolverOptions = SolverOptions()) -> Solution:
    """Solve ``problem`` from the feasible choice ``start``; never returns a worse one.

    Raises PlanError for bad numbers, for a start that does not fit, and when HiGHS reports an error.
    """
    check_problem(problem)
    if not problem.fits(start):
        raise PlanError("the starting placement does not fit the budgets")
    classes = _classes(problem, problem.value(start))
    first = _run(classes, problem, start, options, reserve=0.0)
    if first.status == "infeasible":
        raise PlanError("the solver calls the placement problem infeasible, although the start fits")
    solution = first.choice
    if solution is not None and not problem.fits(solution):
        # Rows hold up to a tolerance: the choice is a few bytes too large. Ask again for a little less.
        solution = _run(classes, problem, start, options, reserve=_RESERVE).choice
    candidates = (
        [tuple(start)] if solution is None or not problem.fits(solution) else [solution, tuple(start)]
    )
    choice = min(candidates, key=problem.value)
    value = problem.value(choice)
    return Solution(choice, value, min(first.bound, value), first.status, first.nodes)


@dataclass(frozen=True)
class _Run:
    """What HiGHS found; ``choice`` None: nothing in whole numbers."""

    choice: tuple[int, ...] | None
    bound: float
    status: Status
    nodes: int


def _run(
    classes: list[_Class], problem: Problem, start: Sequence[int], options: SolverOptions, reserve: float
) -> _Run:
    """Run HiGHS with all but a share ``reserve`` of every budget."""
    start_value = problem.value(start)
    scale = _OBJECTIVE_SCALE / start_value if start_value > 0 else 1.0
    highs = _model(classes, problem, scale, options, reserve)
    _give_start(highs, classes, problem, start)
    _check(highs.run(), "solving")
    status, info = _status(highs), highs.getInfo()
    if status == "infeasible":
        return _Run(None, start_value, status, 0)
    choice = _read_choice(np.asarray(highs.getSolution().col_value), classes, start)
    # HiGHS bounds the levels that could beat the start; what was left out cannot.
    return _Run(
        choice, min(float(info.mip_dual_bound) / scale, start_value), status, int(info.mip_node_count)
    )


def _classes(problem: Problem, start_value: float) -> list[_Class]:
    """Equal units together, each with the levels that can be part of anything better than the start."""
    members: dict[tuple[bytes, bytes, bytes], list[int]] = {}
    for index, unit in enumerate(problem.units):
        key = (unit.value.tobytes(), unit.vram.tobytes(), unit.ram.tobytes())
        members.setdefault(key, []).append(index)
    relaxed = relax(problem)
    hopeless = hopeless_levels(problem, relaxed.price if relaxed else 0.0, start_value)
    limited = problem.ram_can_run_out
    result = []
    for indexes in members.values():
        unit = problem.units[indexes[0]]
        kept = undominated(unit.value, unit.vram, unit.ram if limited else None)
        hopeful = kept[~hopeless[indexes[0]][kept]]
        result.append(_Class(tuple(indexes), unit, hopeful))
    return result


def _model(
    classes: list[_Class], problem: Problem, scale: float, options: SolverOptions, reserve: float
) -> Any:
    """The HiGHS model: a column per class and kept level (how many members choose it), a row per class, then
    one row per budget in shares of its capacity."""
    import highspy

    with _standard_output_dropped():
        highs: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    for name, value in (
        ("output_flag", False),
        ("threads", 1),
        ("parallel", "off"),
        ("random_seed", _SEED),
        ("mip_rel_gap", options.gap),
        ("mip_abs_gap", 0.0),
        ("mip_max_nodes", options.nodes),
        ("time_limit", options.seconds),
        ("mip_feasibility_tolerance", _TOLERANCE),
        ("primal_feasibility_tolerance", _TOLERANCE),
    ):
        _check(highs.setOptionValue(name, value), f"option {name}")
    sizes = [len(group.kept) for group in classes]
    counts = np.repeat([len(group.members) for group in classes], sizes).astype(np.float64)
    budgets = _budget_rows(classes, problem)
    columns = int(sum(sizes))
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns, len(classes) + len(budgets)
    lp.col_cost_ = np.concatenate([group.unit.value[group.kept] for group in classes]) * scale
    lp.col_lower_, lp.col_upper_ = np.zeros(columns), counts
    members = np.array([len(group.members) for group in classes], dtype=np.float64)
    lp.row_lower_ = np.concatenate([members, np.full(len(budgets), -highspy.kHighsInf)])
    lp.row_upper_ = np.concatenate([members, np.full(len(budgets), 1.0 - reserve)])
    lp.integrality_ = [highspy.HighsVarType.kInteger] * columns
    _fill_matrix(lp, sizes, budgets)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    _check(highs.passModel(lp), "the model")
    return highs


@contextmanager
def _standard_output_dropped() -> Iterator[None]:
    """Nothing that C code prints meanwhile reaches standard output.

    HiGHS 1.16 prints a banner from its constructor, before any option can be set, and standard output may be
    a JSON document. The descriptor is exchanged, since redirecting ``sys.stdout`` does not reach C.
    """
    sys.stdout.flush()
    flush = ctypes.CDLL(None).fflush
    flush(None)
    try:
        saved = os.dup(1)
    except OSError:  # standard output is closed: there is nothing to protect
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _budget_rows(classes: list[_Class], problem: Problem) -> list[Vector]:
    """Shares of a budget that every column takes, for the budgets that can run out."""
    rows = []
    for side, capacity in (("vram", problem.vram_capacity), ("ram", problem.ram_capacity)):
        nbytes = np.concatenate([getattr(group.unit, side)[group.kept] for group in classes]).astype(
            np.float64
        )
        largest = sum(
            float(getattr(group.unit, side)[group.kept].max()) * len(group.members) for group in classes
        )
        if largest > capacity:
            rows.append(nbytes / max(capacity, 1))
    return rows


def _fill_matrix(lp: Any, sizes: list[int], budgets: list[Vector]) -> None:
    """Column-wise: one 1 in the row of the column's class, then its share of every budget."""
    columns, classes = sum(sizes), len(sizes)
    height = 1 + len(budgets)
    index = np.empty((columns, height), dtype=np.int32)
    value = np.empty((columns, height))
    index[:, 0], value[:, 0] = np.repeat(np.arange(classes), sizes), 1.0
    for k, shares in enumerate(budgets):
        index[:, 1 + k], value[:, 1 + k] = classes + k, shares
    lp.a_matrix_.start_ = np.arange(0, columns * height + 1, height, dtype=np.int32)
    lp.a_matrix_.index_ = index.ravel()
    lp.a_matrix_.value_ = value.ravel()


def _give_start(highs: Any, classes: list[_Class], problem: Problem, start: Sequence[int]) -> None:
    """Hand over ``start`` with each level replaced by a kept one that is at least as good."""
    import highspy

    limited = problem.ram_can_run_out
    counts = []
    for group in classes:
        column = np.zeros(len(group.kept))
        for member in group.members:
            column[_kept_position(group, start[member], limited)] += 1.0
        counts.append(column)
    solution = highspy.HighsSolution()
    solution.col_value = np.concatenate(counts).tolist()
    _check(highs.setSolution(solution), "the starting placement")


def _kept_position(group: _Class, level: int, limited: bool) -> int:
    unit, kept = group.unit, group.kept
    allowed = unit.vram[kept] <= unit.vram[level]
    if limited:
        allowed &= unit.ram[kept] <= unit.ram[level]
    return int(np.argmin(np.where(allowed, unit.value[kept], np.inf)))


def _status(highs: Any) -> Status:
    import highspy

    status = highs.getModelStatus()
    names: dict[Any, Status] = {
        highspy.HighsModelStatus.kOptimal: "optimal",
        highspy.HighsModelStatus.kSolutionLimit: "node limit",
        highspy.HighsModelStatus.kIterationLimit: "node limit",
        highspy.HighsModelStatus.kTimeLimit: "time limit",
        highspy.HighsModelStatus.kInfeasible: "infeasible",
    }
    if status not in names:
        raise PlanError(
            f"the solver gave up: {highs.modelStatusToString(status)} (this is a fault of the planner, "
            "a placement that fits is known)"
        )
    return names[status]


def _read_choice(values: Vector, classes: list[_Class], start: Sequence[int]) -> tuple[int, ...] | None:
    """The choice in HiGHS' columns: members of a class take its levels in descending order. None when there
    is no whole-numbered solution."""
    if not len(values):
        return None
    choice, offset = list(start), 0
    for group in classes:
        counts = np.rint(values[offset : offset + len(group.kept)]).astype(np.int64)
        offset += len(group.kept)
        if counts.min() < 0 or counts.sum() != len(group.members):
            return None
        for member, level in zip(group.members, np.repeat(group.kept, counts)[::-1], strict=True):
            choice[member] = int(level)
    return tuple(choice)


def _check(status: Any, what: str) -> None:
    """HiGHS answers with a status and never raises; a warning (a limit was reached) is no error."""
    import highspy

    if status == highspy.HighsStatus.kError:
        raise PlanError(f"the solver refused {what}")
