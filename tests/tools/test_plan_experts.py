"""Plans for mixtures of experts: experts as units, times against the formulas, memory against the engine."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plan_cases import (
    NEURONS_ONLY,
    expert_shape,
    granted,
    machine,
    routing_frequencies,
    shape,
    skewed_frequencies,
)
from powerinfer_formats.hardware import FFNCurve
from powerinfer_formats.plan import Plan, PlanExperts
from powerinfer_formats.profile import Profile
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.device_memory import budget_for
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.shapes import ModelShape, neuron_bytes, shape_of_model
from powerinfer_tools.stages.plan import PlanRequest, make_plan, memory, render_plan
from powerinfer_tools.stages.plan.capabilities import ALL_PLACED, Capabilities
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.experts import expert_ways
from powerinfer_tools.stages.plan.frequencies import Frequencies, model_frequencies
from powerinfer_tools.stages.plan.levels import Inputs, LevelOptions, layer_levels
from powerinfer_tools.stages.plan.memory import (
    Workload,
    gpu_attention_scratch_bytes,
    gpu_scratch_bytes,
    unit_bytes,
)
from powerinfer_tools.stages.plan.milp import SolverOptions
from powerinfer_tools.stages.plan.planner import Budgets, Outcome, PlanOptions, plan_outcome
from powerinfer_tools.stages.plan.predictions import predictions
from powerinfer_tools.stages.plan.verdict import activation_share, time_parts, verdict
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from tiny_models import CASES, make_tiny_model

# Q4_1: 20 bytes for 32 values. Two matrices of 128 rows of 256, and one of 256 rows of 128.
EXPERT = 2 * 128 * 160 + 256 * 80
SHARED = 2 * 64 * 160 + 256 * 40  # 64 neurons
TEXT = "the cat sat on the mat and the dog sat on the log; a quick brown fox jumps over the lazy dog. " * 20


def outcome(
    model: ModelShape, vram: int | None = None, *, seed: int = 0, on: Machine | None = None, **options: object
) -> Outcome:
    chosen = PlanOptions(solver=SolverOptions(gap=0.0), context=1024, batch=16, engine=NEURONS_ONLY)
    return plan_outcome(
        model,
        Frequencies(routing_frequencies(model, seed), "made up"),
        on or machine(),
        granted(vram),
        replace(chosen, **options),  # type: ignore[arg-type]
    )


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0, 50),
    st.sampled_from(["time", "frequency"]),
    st.sampled_from([0, 64, 640]),
    st.sampled_from([NEURONS_ONLY, ALL_PLACED]),
)
def test_no_plan_exceeds_its_budgets_or_loses_to_a_simple_placement(
    layers: int, units: int, seed: int, objective: str, shared: int, engine: Capabilities
) -> None:
    model = expert_shape(layers, shared=shared)
    vram = gpu_scratch_bytes(model, 16) + units * EXPERT
    if engine == ALL_PLACED:
        vram += gpu_attention_scratch_bytes(model, Workload(1024, 16))
    result = outcome(model, vram, seed=seed, objective=objective, engine=engine)
    assert result.memory.vram_used <= budget_for(vram)
    assert result.memory.ram_used <= result.memory.ram_capacity
    solution = result.placement.solution
    assert solution.bound <= solution.value
    assert len(result.placement.greedy) == 6
    for value in result.placement.greedy.values():
        assert value is None or solution.value <= value


@pytest.mark.parametrize("shared", [0, 64])
@pytest.mark.parametrize("objective", ["time", "frequency"])
def test_plan_is_the_best_of_all_placements(objective: str, shared: int) -> None:
    model = expert_shape(3, experts=4, shared=shared)
    units = 5
    result = outcome(
        model, gpu_scratch_bytes(model, 16) + units * EXPERT, objective=objective, on=machine(sync=5e-7)
    )
    tables, best = result.placement.tables, np.inf
    levels = [[(k, int(t.vram[k])) for k in range(len(t))] for t in tables[:-1]]
    assert len(levels[0]) == (1 + 4 if not shared else 2 * (1 + 4))
    for choice in itertools.product(*levels):
        if sum(nbytes for _, nbytes in choice) > units * EXPERT:
            continue
        pairs = [(table, k) for table, (k, _) in zip(tables, choice, strict=False)]
        if objective == "time":
            best = min(best, sum(float(t.seconds[k]) for t, k in pairs) + float(tables[-1].seconds[0]))
        else:
            best = min(best, sum(t.total_activations - float(t.activations[k]) for t, k in pairs))
    assert result.placement.solution.value == pytest.approx(best, rel=1e-12)


def test_times_are_the_expectation_over_what_a_token_takes() -> None:
    """Every draw of hot and cold experts by itself, with its probability."""
    model = expert_shape(1, experts=6, used=3, shared=64)
    result = outcome(model, on=machine(sync=5e-7))
    frequencies, table = routing_frequencies(model)[0], result.placement.tables[0]
    router = (16 + 16) * 4 * 256  # rows are padded to whole tiles
    attention = (768 * 160 + 8 * 256 + 2 * 2 * 64 * 2 * 512 + router) / 2e10
    np.testing.assert_allclose(table.block_seconds, attention, rtol=1e-12)
    sync = 5e-7 + 2 * (1e-7 + 4 * 256 / 1e10)
    assert table.hot.tolist() == [128 * k for k in (0, 0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6)]
    assert table.shared_hot.tolist() == [0] + [1] * 7 + [0] * 6
    for level in range(len(table)):
        hot, shared = int(table.hot[level]) // 128, int(table.shared_hot[level])
        share = frequencies[:hot].sum() / 3
        means = {"hot": 0.0, "cold": 0.0, "both": 0.0, "sync": 0.0}
        for draws in itertools.product([True, False], repeat=3):
            j = sum(draws)
            p = share**j * (1 - share) ** (3 - j)
            there = j * (EXPERT / 5e11 + 3e-7) + shared * (SHARED / 5e11 + 3e-7)
            here = ((3 - j) * EXPERT + (1 - shared) * SHARED) / 2e10
            means["hot"] += p * there
            means["cold"] += p * here
            means["both"] += p * max(there, here)
            means["sync"] += p * sync * (there > 0)
        assert table.hot_seconds[level] == pytest.approx(means["hot"], rel=1e-9, abs=1e-18)
        assert table.cold_seconds[level] == pytest.approx(means["cold"], rel=1e-9, abs=1e-18)
        assert table.sync_seconds[level] == pytest.approx(means["sync"], rel=1e-9, abs=1e-18)
        want = attention + means["both"] + means["sync"]
        assert table.seconds[level] == pytest.approx(want, rel=1e-9)
        neurons = frequencies[:hot].sum() * 128 + shared * 64
        assert table.activations[level] == pytest.approx(neurons, rel=1e-12)
    assert max(table.uneven_seconds) > 0
    assert sum(time_parts(result).values()) == pytest.approx(result.placement.seconds, rel=1e-12)


@pytest.mark.parametrize("home", ["cpu", "gpu"])
@pytest.mark.parametrize("shared", [0, 64])
def test_hand_overs_are_those_of_the_engine(home: str, shared: int) -> None:
    """By a machine whose copies cost nothing but what the formula counts. With attention on the accelerator
    every layer waits for its router, and a sum goes there where a token takes a cold expert."""
    model = expert_shape(1, experts=6, used=3, shared=shared)
    frequencies = routing_frequencies(model)
    on = machine(sync=5e-7)
    sizes = tuple(neuron_bytes(layer) for layer in model.layers)
    inputs = Inputs(model, on, Workload(1024, 16), frequencies, sizes, ())
    options = LevelOptions(64, ALL_PLACED, home)  # type: ignore[arg-type]
    table = layer_levels(0, inputs, options, expert_ways)
    copy = 1e-7 + 4 * 256 / 1e10
    whole = 5e-7 + 2 * copy
    assert set(table.block_hot) == {0, 1}
    for level in range(len(table)):
        hot, shared_hot = int(table.hot[level]) // 128, bool(table.shared_hot[level])
        share = frequencies[0][:hot].sum() / 3
        some_hot = 1.0 if shared_hot else 1 - (1 - share) ** 3
        some_cold = 1.0 if shared and not shared_hot else 1 - share**3
        if table.block_hot[level]:
            scores, routes = 6 + 1, 2 * (3 + 1)
            values = scores + routes + 256 * (some_cold > 0)
            want = 5e-7 + 2e-7 + 4 * values / 1e10 + some_cold * copy + whole * (home == "cpu")
        else:
            want = some_hot * whole + whole * (home == "gpu")
        assert table.sync_seconds[level] == pytest.approx(want, rel=1e-9, abs=1e-18)
    there = np.flatnonzero(table.block_hot)
    router = (6 + bool(shared)) * 4 * 256  # no tiles on the accelerator
    assert table.vram[there[0]] == 768 * 160 + 8 * 256 + 1024 * 2 * 2 * 64 * 2 + router
    assert table.ram[there[0]] == 6 * EXPERT + bool(shared) * SHARED


def test_a_measured_curve_of_an_experts_shape_counts() -> None:
    model = expert_shape(1)
    curve = FFNCurve(256, 128, "Q4_1", "Q4_1", "Q4_1", 1e9, (0.1, 1.0), (1e9, 1e9), (1e9, 1e9))
    on = replace(machine(vram=None), ffn_curves=(curve,))
    assert outcome(model, on=on).placement.tables[0].cold_seconds[0] == pytest.approx(2 * EXPERT / 1e9)


def test_memory_counts_experts_router_and_scratch() -> None:
    model = expert_shape(2, shared=64)
    result = outcome(model, gpu_scratch_bytes(model, 16) + 7 * EXPERT + SHARED)
    used = result.memory
    pairs = list(zip(result.placement.tables[:2], result.placement.solution.choice, strict=False))
    hot = sum(int(table.hot[k]) // 128 for table, k in pairs)
    shared = sum(int(table.shared_hot[k]) for table, k in pairs)
    assert hot > 0
    assert shared > 0
    assert used.vram_units["ffn"] == hot * EXPERT + shared * SHARED
    assert used.ram_units["ffn"] == (16 - hot) * EXPERT + (2 - shared) * SHARED
    assert used.ram_units["router"] == 2 * 2 * 16 * 4 * 256
    assert used.vram_used == sum(used.vram_units.values())
    # 16 tokens: input and output, an expert's input, two products of 128, three choices, a chunk's products;
    # 3 × 256 unpacked rows of 256.
    assert gpu_scratch_bytes(model, 16) == 4 * (16 * (3 * 256 + 2 * 128 + 2 * 3 + 256) + 3 * 256 * 256)


@pytest.mark.parametrize("case", ["mixtral-Q4_0", "qwen2moe", "qwen3moe"])
def test_memory_is_what_the_engine_takes(case: str, tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path, CASES[case]).path)
    shape = shape_of_model(model)
    engine = Engine(model, threads=1, context=64, batch=8)
    try:
        taken = engine.report().memory
    finally:
        engine.close()
    hot_out = 8 * 4 * shape.width
    planned = memory.cpu_scratch_bytes(shape, 8) + memory.rotary_bytes(shape, 64)
    assert taken.scratch == planned - hot_out
    # Everything in RAM: what a plan without VRAM counts, less the mapped embedding, norms and biases.
    result = plan_outcome(shape, Frequencies(None, "unknown"), machine(), Budgets(0), PlanOptions(context=64))
    units = result.memory.ram_units
    vectors = sum(layer.vector_bytes for layer in shape.layers)
    assert taken.weights == sum(units[name] for name in ("ffn", "router", "attention", "head")) - vectors


def test_more_vram_is_never_slower_and_experts_beat_whole_layers() -> None:
    model = expert_shape(4, experts=8, shared=64)
    previous = np.inf
    for units in range(1, 34):
        result = outcome(model, gpu_scratch_bytes(model, 16) + units * EXPERT)
        assert result.placement.solution.value <= previous
        previous = result.placement.solution.value
        made = predictions(result)
        assert made["powerinfer"].tokens_per_second >= made["cpu"].tokens_per_second


def test_placing_attention_too_is_never_slower() -> None:
    model = expert_shape(3, shared=64)
    attention = gpu_attention_scratch_bytes(model, Workload(1024, 16))
    budget = gpu_scratch_bytes(model, 16) + attention + 14 * EXPERT
    seconds = []
    for placeable in ({"ffn"}, {"ffn", "attention"}, {"ffn", "attention", "head"}):
        engine = Capabilities(frozenset(placeable), sparse_hot=True)
        result = outcome(model, budget, engine=engine)
        assert result.memory.vram_used <= budget_for(budget)
        seconds.append(result.placement.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[2] < seconds[0]


def test_verdicts_count_experts() -> None:
    model = expert_shape(3, neurons=1024, width=512, shared=64)
    some = outcome(model, gpu_scratch_bytes(model, 16) + 9 * (2 * 1024 * 320 + 512 * 640))
    # Small shared experts are not worth a launch and a wait for every token.
    assert "9 of 24 experts and 0 of 3 shared ones are hot, with" in verdict(some)
    assert "of what the routers choose" in verdict(some)
    assert "routers, norms" in verdict(some)
    assert 0 < activation_share(some) < 1
    every = outcome(model, objective="frequency")
    assert activation_share(every) == pytest.approx(1)
    assert verdict(every).startswith("Fits whole: everything that may be placed is on the GPU")
    nothing = outcome(model, on=machine(sync=1.0))
    assert nothing.memory.vram_used == 0
    assert "the experts of a token take the CPU" in verdict(nothing)


def test_too_small_a_budget_names_an_expert() -> None:
    model = expert_shape(shared=64)
    least = gpu_scratch_bytes(model, 16) + SHARED
    with pytest.raises(PlanError, match=f"for one expert need {budget_for(least):,}"):
        outcome(model, least - 1)
    assert outcome(model, least).memory.vram_used <= budget_for(least)


def test_frequencies_must_be_those_of_the_models_experts() -> None:
    model = expert_shape(1, experts=4)

    def plan(*shares: float) -> None:
        plan_outcome(
            model, Frequencies((np.array(shares),), "bad"), machine(), Budgets(), PlanOptions(context=64)
        )

    plan(1.0, 0.5, 0.5, 0.0)
    with pytest.raises(PlanError, match=r"taken 1\.5000 times a token, and the model says 2"):
        plan(0.5, 0.5, 0.25, 0.25)
    with pytest.raises(PlanError, match="not sorted"):
        plan(0.5, 1.0, 0.5, 0.0)
    with pytest.raises(PlanError, match="numbers from 0 to 1"):
        plan(math.nan, 1.0, 0.5, 0.5)
    with pytest.raises(PlanError, match=r"\(3,\) frequencies for 4"):
        plan(1.0, 0.5, 0.5)


@pytest.fixture(scope="module", params=["mixtral-Q4_0", "qwen2moe", "qwen3moe"])
def profiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("profiled")
    model = make_tiny_model(folder, CASES[request.param]).path
    (folder / "text.txt").write_text(TEXT)
    profile = folder / "tiny.profile.safetensors"
    run_profile(ProfileOptions(model, (folder / "text.txt",), profile, window=64, threads=1))
    return model, profile


def test_the_stage_plans_from_routing_counts_and_writes_the_same_bytes_again(
    profiled: tuple[Path, Path], tmp_path: Path
) -> None:
    path, profile_path = profiled
    model, profile = load_model(path), Profile.load(profile_path)
    shape, routing = shape_of_model(model), model.hyper.routing
    assert routing is not None
    vram = budget_for(1 << 22)
    request = PlanRequest(
        model=path, profile=profile_path, hardware="pc-low", vram_bytes=vram, objective="frequency"
    )
    for name in ("a.json", "b.json"):
        make_plan(request).save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    plan = Plan.load(tmp_path / "a.json")
    assert plan.version == 2
    assert plan.model.experts == PlanExperts(routing.experts, routing.used, routing.shared_neurons)
    assert (plan.group, plan.model.neurons) == (model.hyper.neurons, model.hyper.neurons * routing.experts)
    room = 5 * unit_bytes(shape.layers[0])
    units = make_plan(replace(request, vram_bytes=budget_for(gpu_scratch_bytes(shape, 256) + room)))
    text = render_plan(units)
    assert f"layers of {routing.experts} experts of {model.hyper.neurons} neurons, {routing.used} for" in text
    assert max(map(len, text.splitlines()[7:-2])) <= 110
    for layer in units.layers:
        counts = np.sort(profile.counts(layer.index))[::-1]
        hot = layer.hot_neurons // plan.group
        assert layer.hot_activation_share == pytest.approx(counts[:hot].sum() / counts.sum(), rel=1e-9)
    assert any(0 < layer.hot_neurons < plan.model.neurons for layer in units.layers)


def test_profiles_of_the_other_kind_are_refused(profiled: tuple[Path, Path]) -> None:
    shape_of = shape_of_model(load_model(profiled[0]))
    profile = Profile.load(profiled[1])
    with pytest.raises(PlanError, match=r"counts neurons, .* has experts"):
        model_frequencies(shape_of, replace(profile, activation="relu"))
    with pytest.raises(PlanError, match="counts experts, small has neurons"):
        model_frequencies(shape(), profile)
    with pytest.raises(PlanError, match=r"layers of up to .* experts"):
        model_frequencies(shape_of, replace(profile, sums=profile.sums[:-1]))


def test_what_plan_cannot_do_with_experts_is_said(profiled: tuple[Path, Path], tmp_path: Path) -> None:
    path, profile = profiled
    request = PlanRequest(model=path, profile=profile, hardware="pc-low", predictors=tmp_path / "p")
    with pytest.raises(PlanError, match="has experts, which its router names"):
        make_plan(request)


def test_uneven_dense_layers_stay_as_they_were() -> None:
    """Nothing of the above is in the tables of neurons."""
    model = shape(1, 128, activation="relu")
    known = Frequencies(skewed_frequencies(1, 128), "made up")
    table = plan_outcome(model, known, machine(), Budgets(), PlanOptions(context=64)).placement.tables[0]
    assert not table.shared_hot.any()
    assert not table.uneven_seconds.any()
