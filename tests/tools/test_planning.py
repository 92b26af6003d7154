"""Plans of shapes: memory to the byte, times against the formulas, verdicts, budgets, determinism."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plan_cases import NEURONS_ONLY, granted, machine, shape, skewed_frequencies
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.hardware import FFNCurve, HardwareProfile
from powerinfer_formats.plan import Plan
from powerinfer_formats.split import SplitLayer
from powerinfer_tools.errors import HardwareError, PlanError
from powerinfer_tools.measure.hardware.presets import PC_HIGH, PC_LOW, PRESETS
from powerinfer_tools.model.device_memory import budget_for, overhead
from powerinfer_tools.model.published import PUBLISHED, published_shape
from powerinfer_tools.model.shapes import ModelShape, neuron_bytes
from powerinfer_tools.stages.plan import PlanRequest, make_plan, render_plan
from powerinfer_tools.stages.plan.capabilities import Capabilities
from powerinfer_tools.stages.plan.costs import Gpu, Machine
from powerinfer_tools.stages.plan.frequencies import Frequencies
from powerinfer_tools.stages.plan.machine import REACHABLE_SHARE, machine_of
from powerinfer_tools.stages.plan.memory import (
    Workload,
    gpu_attention_scratch_bytes,
    gpu_scratch_bytes,
)
from powerinfer_tools.stages.plan.milp import SolverOptions
from powerinfer_tools.stages.plan.planner import Budgets, Outcome, PlanOptions, plan_outcome
from powerinfer_tools.stages.plan.request import make_plan as plan_for
from powerinfer_tools.stages.plan.sparsity import published_frequencies
from powerinfer_tools.stages.plan.verdict import verdict

UNKNOWN = Frequencies(None, "unknown")
# The small shape: Q4_1 rows of 256 are 8 blocks of 20 bytes, Q8_0 rows 8 blocks of 34.
GATE = UP = 160
DOWN = 272
NEURON = GATE + UP + DOWN
# 512 tokens: (2 × 256 in and out + 3 × 512 products) floats each, and 3 × 512 rows of 256 floats.
GPU_SCRATCH = 4 * (512 * (2 * 256 + 3 * 512) + 3 * 512 * 256)


def outcome(
    model: ModelShape,
    vram: int | None = None,
    *,
    frequencies: Frequencies = UNKNOWN,
    on: Machine | None = None,
    ram: int | None = None,
    **options: object,
) -> Outcome:
    chosen = PlanOptions(solver=SolverOptions(gap=0.0), context=1024, engine=NEURONS_ONLY)
    return plan_outcome(
        model,
        frequencies,
        on or machine(),
        granted(vram, ram),
        replace(chosen, **options),  # type: ignore[arg-type]
    )


def known(model: ModelShape, seed: int = 0) -> Frequencies:
    return Frequencies(skewed_frequencies(len(model.layers), model.layers[0].neurons, seed), "made up")


def hot_counts(result: Outcome) -> list[int]:
    tables = result.placement.tables[:-1]
    return [int(table.hot[k]) for table, k in zip(tables, result.placement.solution.choice, strict=False)]


def test_memory_to_the_byte() -> None:
    result = outcome(shape(), GPU_SCRATCH + 700 * NEURON)
    hot = sum(hot_counts(result))
    assert 0 < hot <= 700
    assert result.memory.vram_used == hot * NEURON + GPU_SCRATCH + overhead(result.memory.vram_capacity)
    matrices = (256 + 128 + 128 + 256) * 160
    cache = 2 * 64 * 2 * (1024 + 1024)  # 2 heads of 64 values in half precision, keys and values
    activations = 4 * (1 + 4 * 256 + 2 * 256 + 2 * 128 + 2 * 512)
    quantised = sum(columns + 8 * columns // 32 for columns in (256, 256, 512))
    head_scratch = 32 * (4 * (256 + 1000) + 256 + 8 * 256 // 32)
    assert result.memory.ram_units == {
        "ffn": (4 * 512 - hot) * NEURON,
        "predictors": 0,
        "attention": 4 * (matrices + 8 * 256),
        "kv_cache": 4 * cache,
        "head": 1008 * 272,  # rows are padded to whole tiles of 16
        "embedding": 1000 * 272,
        "output_norm": 1024,
        "rotary_tables": 1024 * 32 * 2 * 4,
        "scratch": 512 * (activations + quantised) + head_scratch,
    }
    assert result.memory.ram_used == sum(result.memory.ram_units.values())


def test_memory_agrees_with_the_engines_own_counts() -> None:
    from powerinfer_tools.engine.hot import placement
    from powerinfer_tools.stages.plan import memory

    layout: Any = SimpleNamespace(row_sizes=(NEURON,))
    none: Any = None
    ffn = SplitLayer(0, "dense", 512, 0, 256, order=none, layout=layout, hot=(), cold=none)
    model: Any = SimpleNamespace(
        hyper=SimpleNamespace(routing=None, width=256, neurons=512, layers=4),
        layers=[SimpleNamespace(feeds=ffn)] * 4,
    )
    size = placement.FFNSizes.of(model, 512).size([512] * 4, [False] * 4, [False] * 4)
    assert size.weights == 4 * 512 * NEURON
    assert size.scratch == memory.gpu_scratch_bytes(shape(), 512) == GPU_SCRATCH


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2200), st.integers(0, 50), st.sampled_from(["time", "frequency"]))
def test_no_plan_exceeds_its_budgets_or_loses_to_a_simple_placement(
    layers: int, groups: int, seed: int, objective: str
) -> None:
    model = shape(layers, 200, activation="relu")
    vram = gpu_scratch_bytes(model, 512) + (16 + groups) * NEURON
    result = outcome(model, vram, frequencies=known(model, seed), objective=objective, group=16)
    assert result.memory.vram_used <= budget_for(vram)
    assert result.memory.ram_used <= result.memory.ram_capacity
    solution = result.placement.solution
    assert solution.bound <= solution.value
    for value in result.placement.greedy.values():
        assert value is None or solution.value <= value


@pytest.mark.parametrize("objective", ["time", "frequency"])
def test_plan_is_the_best_of_all_placements(objective: str) -> None:
    model = shape(3, 192, activation="relu")
    result = outcome(
        model, 300 * NEURON + 4 * (512 * (512 + 3 * 192) + 3 * 192 * 256), frequencies=known(model),
        objective=objective, on=machine(sync=5e-7),
    )  # fmt: skip
    tables = result.placement.tables
    best = np.inf
    for choice in itertools.product(range(4), repeat=3):
        if sum(64 * k for k in choice) > 300:
            continue
        pairs = list(zip(tables, choice, strict=False))
        if objective == "time":
            best = min(best, sum(float(t.seconds[k]) for t, k in pairs) + float(tables[-1].seconds[0]))
        else:
            best = min(best, sum(t.total_activations - float(t.activations[k]) for t, k in pairs))
    assert result.placement.solution.value == pytest.approx(best, rel=1e-12)


def test_times_follow_the_formulas() -> None:
    model = shape(1, 128, activation="relu")
    frequencies = known(model)
    result = outcome(model, frequencies=frequencies, group=64)
    table = result.placement.tables[0]
    curve, gpu = dict(result.machine.curve), result.machine.gpu
    assert gpu is not None
    assert frequencies.layers is not None
    attention = (768 * 160 + 8 * 256 + 2 * 2 * 64 * 2 * 512) / 2e10
    np.testing.assert_allclose(table.block_seconds, attention, rtol=1e-12)
    np.testing.assert_allclose(table.hot_seconds, [0, 64 * NEURON / 5e11 + 3e-7, 128 * NEURON / 5e11 + 3e-7])
    sync = 1e-6 + 2 * (1e-7 + 4 * 256 / 1e10)
    np.testing.assert_allclose(table.sync_seconds, [0, sync, sync], rtol=1e-12)
    for level, cold in ((0, 128), (1, 64)):
        active = float(frequencies.layers[0][128 - cold :].sum())
        density = active / cold
        bandwidth = np.interp(density, list(curve), list(curve.values()))
        gate_first = cold * GATE / curve[1.0] + active * (UP + DOWN) / bandwidth
        assert table.cold_seconds[level] == pytest.approx(
            min(gate_first, cold * NEURON / curve[1.0]), rel=1e-12
        )
    assert table.cold_seconds[2] == 0
    np.testing.assert_allclose(
        table.seconds,
        table.block_seconds + np.maximum(table.hot_seconds, table.cold_seconds) + table.sync_seconds,
    )


def test_a_measured_curve_of_the_shape_takes_the_place_of_the_general_one() -> None:
    """Rows of the same width and types, the nearest number of neurons; anything else is another shape."""
    model = shape(1, 128, activation="relu")
    frequencies = known(model)
    assert frequencies.layers is not None
    right = FFNCurve(256, 100, "Q4_1", "Q4_1", "Q8_0", 4e9, (0.1, 1.0), (1e9, 9e9), (1e9, 1e9))
    others = [
        replace(right, neurons=1000, dense_bytes_per_s=1.0),
        replace(right, width=512, dense_bytes_per_s=1.0),
        replace(right, down_type="Q4_1", dense_bytes_per_s=1.0),
    ]
    alone = replace(machine(vram=None), ffn_curves=(*others, right))
    table = outcome(model, frequencies=frequencies, on=alone).placement.tables[0]
    active = float(frequencies.layers[0].sum())
    rate = np.interp(active / 128, right.densities, right.gate_first_bytes_per_s)
    gate_first = (128 * GATE + active * (UP + DOWN)) / rate
    columns = sum(matrix.nbytes for matrix in model.layers[0].ffn) / 4e9
    assert table.cold_seconds[0] == pytest.approx(min(gate_first, columns), rel=1e-12)
    besides = replace(alone, ffn_curves=(replace(right, overhead_seconds=1e-3),))
    slower = outcome(model, frequencies=frequencies, on=besides).placement.tables[0]
    assert slower.cold_seconds[0] == pytest.approx(table.cold_seconds[0] + 1e-3, rel=1e-12)
    unknown = replace(alone, ffn_curves=tuple(others[1:]))
    cold = [
        outcome(model, frequencies=frequencies, on=on).placement.tables[0].cold_seconds[0]
        for on in (unknown, machine(vram=None))
    ]
    assert cold[0] == cold[1]


def test_smooth_activations_are_never_skipped() -> None:
    model = shape(activation="silu")
    assert not any(table.mode.any() for table in outcome(model, frequencies=known(model)).placement.tables)
    sparse = replace(model, activation="relu")
    assert all(
        table.mode[0] == 1 for table in outcome(sparse, frequencies=known(sparse)).placement.tables[:-1]
    )
    assert not any(table.mode.any() for table in outcome(sparse).placement.tables)


def test_more_vram_is_never_slower() -> None:
    model = shape(4, 512, activation="relu")
    previous = np.inf
    for groups in range(1, 33):
        result = outcome(model, GPU_SCRATCH + groups * 64 * NEURON, frequencies=known(model))
        assert result.placement.solution.value <= previous
        previous = result.placement.solution.value


def test_placing_more_kinds_of_units_is_never_slower_and_keeps_the_budget() -> None:
    model = shape(activation="relu")
    budget = GPU_SCRATCH + gpu_attention_scratch_bytes(model, Workload(1024)) + 1000 * NEURON
    seconds = []
    for placeable in ({"ffn"}, {"ffn", "attention"}, {"ffn", "attention", "head"}):
        engine = Capabilities(frozenset(placeable), sparse_hot=False)
        result = outcome(model, budget, frequencies=known(model), engine=engine)
        assert result.memory.vram_used <= budget_for(budget)
        units = result.memory.vram_units
        assert ("attention" in placeable) or units["attention"] == units["kv_cache"] == 0
        assert ("head" in placeable) or units["head"] == 0
        seconds.append(result.placement.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[2] < seconds[0]


def test_ram_budget_forces_neurons_onto_the_gpu_or_is_refused_with_numbers() -> None:
    model = shape()
    slow_gpu = machine(sync=1.0)
    free = outcome(model, on=slow_gpu)
    assert free.memory.vram_used == 0
    need = free.memory.ram_used
    forced = outcome(model, on=slow_gpu, ram=need - 500 * NEURON)
    assert forced.memory.ram_used <= need - 500 * NEURON
    assert sum(hot_counts(forced)) >= 500
    least = need - 4 * 512 * NEURON
    exact = outcome(model, on=slow_gpu, ram=least)
    assert exact.memory.ram_used == least
    with pytest.raises(PlanError, match="does not fit") as caught:
        outcome(model, on=slow_gpu, ram=least - 1)
    fixed = sum(
        exact.memory.ram_units[name] for name in ("embedding", "output_norm", "rotary_tables", "scratch")
    )
    assert f"{least - fixed:,} bytes of RAM" in str(caught.value)
    assert f"leaves {least - 1 - fixed:,}" in str(caught.value)
    with pytest.raises(PlanError, match=f"{fixed:,}"):
        outcome(model, ram=fixed - 1)


def test_too_small_a_vram_budget_is_refused_with_numbers() -> None:
    least = GPU_SCRATCH + 64 * NEURON
    total = budget_for(least)
    assert outcome(shape(), least).memory.vram_used <= total
    needs = f"{total - 1:,} bytes is too small: {total - least:,} bytes that are kept.*need {total:,}"
    with pytest.raises(PlanError, match=needs):
        outcome(shape(), least - 1)
    with pytest.raises(PlanError, match="negative"):
        outcome(shape(), -1)
    with pytest.raises(PlanError, match="more than the"):
        outcome(shape(), (1 << 32) + 1)


def test_verdicts_say_it_plainly() -> None:
    model = shape(4, 4096)  # FFNs large enough for a synchronisation to pay
    whole = outcome(model)
    assert whole.fits_whole
    assert 0 < sum(hot_counts(whole)) < model.total_neurons
    assert verdict(whole).startswith("Fits whole, yet both sides working at once are faster")
    all_hot = outcome(model, objective="frequency", frequencies=known(model))
    assert sum(hot_counts(all_hot)) == model.total_neurons
    assert verdict(all_hot).startswith("Fits whole: everything that may be placed is on the GPU")
    assert verdict(outcome(model, on=machine(vram=None))).startswith("test machine has no GPU")
    nothing = outcome(model, on=machine(sync=1.0))
    assert nothing.memory.vram_used == 0
    assert verdict(nothing).startswith("The GPU does not help")
    assert verdict(outcome(model, 0)).startswith("No VRAM is granted")
    part = verdict(outcome(model, 4000 * NEURON + 4 * (512 * (512 + 1536) + 1536 * 256)))
    assert "of the neurons are hot" in part
    for result in (whole, nothing):
        assert "attention with its KV cache" in verdict(result).rpartition("always on the CPU")[2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"group": 0}, "group 0"),
        ({"batch": 0}, "batch 0"),
        ({"context": 0}, "context 0"),
        ({"context": 2049}, "context 2049 is not from 1 to 2048"),
        ({"kv_type": "q8_0"}, None),
        ({"objective": "frequency"}, "powerinfer profile"),
        ({"down_type": TensorType.Q4_K}, None),
    ],
)
def test_options_are_checked(options: dict[str, object], says: str | None) -> None:
    if says is None:
        assert outcome(shape(), **options).memory.ram_used > 0
        if "down_type" not in options:
            return
        with pytest.raises(PlanError, match="width 128 is not a multiple of 256"):
            outcome(shape(width=128), **options)
        return
    with pytest.raises(PlanError, match=says):
        outcome(shape(), **options)


def test_units_that_no_engine_can_place_are_refused() -> None:
    with pytest.raises(PlanError, match="cannot place soul"):
        Capabilities(frozenset({"ffn", "soul"}), sparse_hot=False)


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1, np.inf])
def test_frequencies_that_are_no_shares_are_refused(bad: float) -> None:
    model = shape(1, 64)
    values = np.full(64, 0.5)
    values[0 if not bad < 0 else -1] = bad
    with pytest.raises(PlanError, match="numbers from 0 to 1"):
        outcome(model, frequencies=Frequencies((values,), "bad"))
    with pytest.raises(PlanError, match="not sorted"):
        outcome(model, frequencies=Frequencies((np.linspace(0, 1, 64),), "bad"))
    with pytest.raises(PlanError, match="63"):
        outcome(model, frequencies=Frequencies((np.full(63, 0.5),), "bad"))


@pytest.mark.parametrize(
    "change",
    [
        {"bandwidth": np.nan},
        {"bandwidth": 0.0},
        {"ram_bytes": -1},
        {"curve": ()},
        {"curve": ((0.0, 1e9),)},
        {"curve": ((0.5, 1e9), (0.5, 1e9))},
        {"curve": ((0.5, np.nan),)},
        {"gpu": Gpu("g", 0, 1e9, 0, 0, 1e9, 0)},
        {"gpu": Gpu("g", 1, np.inf, 0, 0, 1e9, 0)},
        {"gpu": Gpu("g", 1, 1e9, -1e-6, 0, 1e9, 0)},
        {"gpu": Gpu("g", 1, 1e9, 0, np.nan, 1e9, 0)},
    ],
)
def test_machines_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(HardwareError):
        replace(machine(), **change)  # type: ignore[arg-type]


def test_a_large_plan_is_near_its_bound() -> None:
    model = published_shape("relu-llama-2-70b", "q4_0")
    frequencies = Frequencies(skewed_frequencies(80, 28672), "made up")
    options = PlanOptions(engine=NEURONS_ONLY)
    result = plan_outcome(model, frequencies, machine_of(PC_HIGH), Budgets(), options)
    solution = result.placement.solution
    assert solution.gap <= 1e-3
    assert solution.status == "optimal"
    assert len(result.placement.tables[0]) == 449
    top_k = result.placement.greedy["top-k"]
    assert top_k is not None
    assert solution.value < top_k


def coarse_plan(profile: HardwareProfile, name: str) -> Plan:
    options = PlanOptions(solver=SolverOptions(gap=1e-3))
    return plan_for(published_shape(name, "q4_0"), None, profile, Budgets(), options)


def test_equal_inputs_give_equal_plans() -> None:
    texts = [str(coarse_plan(PC_LOW, "opt-13b").to_document()) for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_shape_has_a_plan_file_or_a_refusal(name: str, preset: str, tmp_path: Path) -> None:
    if (name, preset) == ("opt-175b", "pc-low"):
        with pytest.raises(PlanError, match="does not fit"):
            coarse_plan(PRESETS[preset], name)
        return
    plan = coarse_plan(PRESETS[preset], name)
    plan.save(tmp_path / "a.plan.json")
    assert Plan.load(tmp_path / "a.plan.json") == plan
    assert plan.solver.gap <= 1e-3
    text = render_plan(plan)
    assert plan.verdict in text
    assert max(map(len, text.splitlines()[7:-2])) <= 110


def test_published_sparsity_is_met() -> None:
    for model in PUBLISHED.values():
        if model.sparsity is None:
            continue
        curve = published_frequencies(model.neurons, model.sparsity)
        hot = round(model.sparsity.hot_share * model.neurons)
        assert curve.mean() == pytest.approx(model.sparsity.density, rel=5e-3)
        assert curve[:hot].sum() / curve.sum() == pytest.approx(model.sparsity.hot_activations, rel=5e-3)
        assert np.all(np.diff(curve) <= 0)
        assert curve.max() <= 1


def test_sizes_of_published_models() -> None:
    # Parameters as published, in billions; embeddings and head counted as in the checkpoint.
    for name, billions in (
        ("llama-2-7b", 6.74),
        ("llama-2-70b", 68.98),
        ("mistral-7b", 7.24),
        ("opt-30b", 29.97),
        ("mixtral-8x7b", 46.7),
        ("qwen1.5-moe-a2.7b", 14.3),
        ("qwen3-30b-a3b", 30.53),
    ):
        model = published_shape(name, "f16")
        matrices = [matrix for layer in model.layers for matrix in layer.matrices]
        tables = [model.embedding] if PUBLISHED[name].tied else [model.embedding, model.head]
        count = sum(m.rows * m.columns for m in (*matrices, *tables))
        assert count / 1e9 == pytest.approx(billions, rel=2e-3)
    assert neuron_bytes(published_shape("llama-2-7b", "q4_0").layers[0]).total == 2 * 2304 + 4352


def test_names_that_are_not_there_list_those_that_are() -> None:
    with pytest.raises(PlanError, match="opt-30b"):
        published_shape("opt-31b")
    with pytest.raises(PlanError, match="q4_k"):
        published_shape("opt-30b", "q3")
    with pytest.raises(PlanError, match="whole blocks of 256"):
        published_shape("smollm2-135m", "q4_k")
    with pytest.raises(PlanError, match="either a model"):
        make_plan(PlanRequest())


def test_presets_are_counted_at_a_stated_share() -> None:
    assert machine_of(PC_LOW).bandwidth == REACHABLE_SHARE * PC_LOW.cpu.bandwidth_bytes_per_s
    measured = replace(PC_LOW, machine=replace(PC_LOW.machine, source="measured"))
    assert machine_of(measured).bandwidth == PC_LOW.cpu.bandwidth_bytes_per_s
