"""The solver against brute force, its bounds, and what it refuses."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plan_cases import problems
from powerinfer_tools.errors import PlanError
from powerinfer_tools.stages.plan.hull import hopeless_levels, relax
from powerinfer_tools.stages.plan.levels import undominated
from powerinfer_tools.stages.plan.milp import SolverOptions, solve
from powerinfer_tools.stages.plan.problem import Problem, Unit, check_problem

EXACT = SolverOptions(gap=0.0)


def best_by_trying_all(problem: Problem) -> float:
    choices = itertools.product(*(range(len(unit.value)) for unit in problem.units))
    return min(problem.value(choice) for choice in choices if problem.fits(choice))


def first_levels(problem: Problem) -> tuple[int, ...]:
    return (0,) * len(problem.units)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(problems())
def test_solver_finds_what_trying_everything_finds(problem: Problem) -> None:
    solution = solve(problem, first_levels(problem), EXACT)
    assert problem.fits(solution.choice)
    assert solution.value == problem.value(solution.choice)
    # Values are whole numbers, so that HiGHS' tolerances cannot hide another optimum.
    assert solution.value == best_by_trying_all(problem)
    assert solution.bound <= solution.value
    assert solution.status == "optimal"


@settings(max_examples=100, derandomize=True, deadline=None)
@given(problems(levels=4), st.integers(2, 3))
def test_equal_units_are_counted_and_told_apart_again(problem: Problem, times: int) -> None:
    tripled = replace(problem, units=problem.units[:2] * times)
    assert solve(tripled, first_levels(tripled), EXACT).value == best_by_trying_all(tripled)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(problems())
def test_relaxation_bounds_the_optimum_from_below(problem: Problem) -> None:
    unlimited = replace(problem, ram_capacity=10**6)
    relaxed = relax(unlimited)
    assert relaxed is not None
    optimum = best_by_trying_all(unlimited)
    rounding = 1e-12 * len(problem.units) * 1000
    assert relaxed.bound <= optimum + rounding
    assert unlimited.fits(relaxed.choice)
    assert optimum <= unlimited.value(relaxed.choice)
    assert relaxed.bound <= best_by_trying_all(problem) + rounding
    assert relaxed.price >= 0


@settings(max_examples=200, derandomize=True, deadline=None)
@given(problems(), st.floats(0, 50))
def test_no_level_of_a_better_choice_is_called_hopeless(problem: Problem, price: float) -> None:
    best = best_by_trying_all(problem)
    masks = hopeless_levels(problem, price, best)
    for choice in itertools.product(*(range(len(unit.value)) for unit in problem.units)):
        if problem.fits(choice) and problem.value(choice) <= best:
            assert not any(mask[k] for mask, k in zip(masks, choice, strict=True))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(problems(units=1, levels=9), st.booleans())
def test_undominated_keeps_one_at_least_as_good_as_each_level(problem: Problem, limited: bool) -> None:
    unit = problem.units[0]
    kept = undominated(unit.value, unit.vram, unit.ram if limited else None)

    def beats(a: int, b: int) -> bool:
        ram = not limited or unit.ram[a] <= unit.ram[b]
        return bool(unit.value[a] <= unit.value[b] and unit.vram[a] <= unit.vram[b] and ram)

    for level in range(len(unit.value)):
        assert any(beats(int(k), level) for k in kept)
    for one, other in itertools.permutations(kept, 2):
        assert not beats(int(one), int(other))


def test_a_budget_is_filled_to_the_last_byte_and_never_beyond() -> None:
    size = 123_456_789_012
    unit = Unit("u", np.array([2.0, 1.0]), np.array([0, size]), np.array([0, 0]))
    exact = Problem((unit, unit), 2 * size, 10)
    assert solve(exact, (0, 0), EXACT).choice == (1, 1)
    short = replace(exact, vram_capacity=2 * size - 1)
    solution = solve(short, (0, 0), EXACT)
    assert sorted(solution.choice) == [0, 1]
    assert short.fits(solution.choice)


def test_bound_holds_when_the_search_is_cut_short() -> None:
    random = np.random.default_rng(5)
    units = tuple(
        Unit(f"u{i}", np.sort(random.uniform(1, 2, 30))[::-1].copy(), np.sort(random.integers(0, 1000, 30)),
             np.zeros(30, dtype=np.int64))
        for i in range(12)
    )  # fmt: skip
    units = tuple(replace(u, vram=np.concatenate([[0], u.vram[1:]])) for u in units)
    problem = Problem(units, 3000, 10)
    cut = solve(problem, first_levels(problem), SolverOptions(gap=0.0, nodes=0))
    whole = solve(problem, first_levels(problem), EXACT)
    assert cut.bound <= whole.value + 1e-9
    assert cut.value >= whole.value - 1e-9
    assert cut.value <= problem.value(first_levels(problem))


def test_time_limit_is_told_apart_and_keeps_the_start() -> None:
    problem = Problem(
        tuple(
            Unit(f"u{i}", np.array([5.0 + i, 1.0]), np.array([0, 7 + i]), np.array([0, 0])) for i in range(9)
        ),
        30,
        10,
    )
    solution = solve(problem, first_levels(problem), SolverOptions(gap=0.0, seconds=0.0))
    assert solution.status == "time limit"
    assert problem.fits(solution.choice)
    assert solution.value <= problem.value(first_levels(problem))
    assert solution.bound <= solve(problem, first_levels(problem), EXACT).value


def test_equal_problems_give_equal_choices() -> None:
    random = np.random.default_rng(3)
    units = tuple(
        Unit(
            f"u{i}",
            random.uniform(0, 1, 20),
            np.append(0, random.integers(1, 99, 19)),
            np.zeros(20, np.int64),
        )
        for i in range(10)
    )
    problem = Problem(units, 300, 10)
    assert solve(problem, (0,) * 10) == solve(problem, (0,) * 10)


@pytest.mark.parametrize(
    ("value", "vram", "ram", "says"),
    [
        ([1.0, np.nan], [0, 1], [0, 0], "not a finite number"),
        ([1.0, np.inf], [0, 1], [0, 0], "not a finite number"),
        ([1.0, 2.0], [0, -1], [0, 0], "negative number of bytes"),
        ([1.0, 2.0], [0, 1], [0, -1], "negative number of bytes"),
        ([1.0, 2.0], [0], [0, 0], "empty or uneven"),
        ([], [], [], "empty or uneven"),
    ],
)
def test_bad_tables_are_refused(value: list[float], vram: list[int], ram: list[int], says: str) -> None:
    unit = Unit("layer 7", np.array(value), np.array(vram, dtype=np.int64), np.array(ram, dtype=np.int64))
    with pytest.raises(PlanError, match=f"layer 7.*{says}"):
        solve(Problem((unit,), 10, 10), (0,))


def test_bad_budgets_starts_and_emptiness_are_refused() -> None:
    unit = Unit("u", np.array([1.0]), np.array([5]), np.array([5]))
    with pytest.raises(PlanError, match="VRAM budget is -1"):
        check_problem(Problem((unit,), -1, 10))
    with pytest.raises(PlanError, match="RAM budget is -1"):
        check_problem(Problem((unit,), 10, -1))
    with pytest.raises(PlanError, match="nothing to place"):
        check_problem(Problem((), 10, 10))
    with pytest.raises(PlanError, match="does not fit"):
        solve(Problem((unit,), 4, 10), (0,))


def test_standard_output_stays_free_for_json(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HiGHS 1.16 prints a banner from its constructor, through C: it must not reach standard output."""
    import ctypes

    import highspy

    libc, quiet = ctypes.CDLL(None), highspy.Highs

    def talkative() -> highspy.Highs:
        libc.puts(b"Running HiGHS")
        return quiet()

    monkeypatch.setattr(highspy, "Highs", talkative)
    unit = Unit("a", np.array([3.0, 1.0]), np.array([0, 8]), np.array([8, 0]))
    problem = Problem((unit,), vram_capacity=8, ram_capacity=8)
    solve(problem, first_levels(problem))
    libc.fflush(None)
    print("only this")
    assert capfd.readouterr().out == "only this\n"
