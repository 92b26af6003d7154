"""Mode predicted in plans: its bytes and seconds on either side, and when it is worth it."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plan_cases import NEURONS_ONLY, granted, machine, shape, skewed_frequencies
from powerinfer_formats.block_types import TensorType
from powerinfer_formats.errors import OtherModel
from powerinfer_formats.hardware import CpuInfo, FFNCurve, HardwareProfile, MachineInfo
from powerinfer_formats.modes import MODES
from powerinfer_formats.plan import Plan
from powerinfer_formats.predictors import PredictionCost, Predictors
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import PlanError
from powerinfer_tools.model.device_memory import budget_for
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.predictor_shapes import PredictorShape, low_rank, predicted_frequencies
from powerinfer_tools.model.shapes import ModelShape
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.plan import PlanRequest, make_plan
from powerinfer_tools.stages.plan.capabilities import ALL_PLACED, Capabilities
from powerinfer_tools.stages.plan.costs import Machine
from powerinfer_tools.stages.plan.frequencies import Frequencies
from powerinfer_tools.stages.plan.levels import Inputs, LevelOptions
from powerinfer_tools.stages.plan.memory import (
    Workload,
    gpu_attention_scratch_bytes,
    gpu_predictor_scratch_bytes,
    gpu_scratch_bytes,
)
from powerinfer_tools.stages.plan.milp import SolverOptions
from powerinfer_tools.stages.plan.placement import level_tables
from powerinfer_tools.stages.plan.planner import Outcome, PlanOptions, plan_outcome
from powerinfer_tools.stages.profile import ProfileOptions, run_profile
from powerinfer_tools.stages.train import TrainOptions, run_train
from tiny_models import FAMILY_CASES, make_tiny_model

# Q4_1 gate and up rows of 256 and a Q8_0 down row.
GATE = 160
NEURON = GATE + 160 + 272
#: Rank 32 in Q8_0 for a width of 256: 32 rows of 272 bytes; 34 and a threshold of 4 for each neuron; a float
#: and a byte for each of 32 values and two floats for their block, per token.
SHARED, EACH, TOKEN = 32 * 272, 38, 32 * 4 + 32 + 8
PREDICTOR = low_rank(32, TensorType.Q8_0, 256, 1.25)


def outcome(
    model: ModelShape,
    predictors: tuple[PredictorShape | None, ...],
    vram: int | None = None,
    *,
    on: Machine | None = None,
    seed: int = 0,
    **options: object,
) -> Outcome:
    known = Frequencies(
        skewed_frequencies(len(model.layers), model.layers[0].neurons, seed), "made up", predictors
    )
    chosen = PlanOptions(solver=SolverOptions(gap=0.0), context=1024, engine=NEURONS_ONLY)
    chosen = replace(chosen, **options)  # type: ignore[arg-type]
    return plan_outcome(model, known, on or machine(), granted(vram), chosen)


def modes(result: Outcome) -> list[str]:
    layers = zip(result.placement.tables[:-1], result.placement.solution.choice, strict=False)
    return [MODES[int(table.mode[k])] for table, k in layers]


def test_bytes_of_a_low_rank_predictor_are_those_of_its_rows() -> None:
    assert (PREDICTOR.shared_bytes, PREDICTOR.neuron_bytes, PREDICTOR.token_bytes) == (SHARED, EACH, TOKEN)
    assert PREDICTOR.nbytes(np.array([0, 1, 512])).tolist() == [0, SHARED + EACH, SHARED + 512 * EACH]
    floats = low_rank(17, TensorType.F32, 100, 1.0)
    assert (floats.shared_bytes, floats.neuron_bytes, floats.token_bytes) == (32 * 400, 68 + 4, 68)


@pytest.mark.parametrize("overshoot", [0.5, 1.0, 1.4, 3.0, 1000.0])
def test_predicted_frequencies_have_the_mean_that_is_asked_for(overshoot: float) -> None:
    for frequencies in skewed_frequencies(3, 331):
        named = predicted_frequencies(frequencies, overshoot)
        assert named.max() <= 1
        assert np.all(np.diff(named) <= 0)
        assert named.mean() == pytest.approx(min(1.0, overshoot * frequencies.mean()), rel=1e-9)
    np.testing.assert_array_equal(predicted_frequencies(np.zeros(5), overshoot), np.zeros(5))


def test_a_predictor_on_the_cpu_predicts_for_cold_neurons_alone() -> None:
    """Cold seconds: the predictor's stream, then the gate rows of the named share and the other rows of the
    active share, gathered."""
    model = shape(1, 128, activation="relu")
    result = outcome(model, (PREDICTOR,))
    table, curve = result.placement.tables[0], dict(result.machine.curve)
    assert result.frequencies.layers is not None
    named = predicted_frequencies(result.frequencies.layers[0], 1.25)
    level = int(np.flatnonzero((table.mode == 2) & (table.hot == 64))[0])
    active = float(result.frequencies.layers[0][64:].mean())
    density = (GATE * float(named[64:].mean()) + (NEURON - GATE) * active) / NEURON
    rows = 64 * NEURON * density / np.interp(density, list(curve), list(curve.values()))
    stream = (SHARED + 64 * EACH) / 2e10
    assert table.predictor_seconds[level] == pytest.approx(stream, rel=1e-12)
    assert table.cold_seconds[level] == pytest.approx(stream + rows, rel=1e-12)
    assert table.hot_seconds[level] == table.hot_seconds[1]  # this version computes all hot neurons
    assert table.predictor_bytes[level] == SHARED + 64 * EACH + 512 * TOKEN
    assert table.ram[level] - table.ram[1] == table.predictor_bytes[level]
    assert table.vram[level] == table.vram[1]
    all_hot = int(np.flatnonzero((table.mode == 2) & (table.hot == 128))[0])
    assert table.cold_seconds[all_hot] == table.predictor_bytes[all_hot] == 0
    assert not table.predictor_hot.any()


def test_a_predictor_on_the_gpu_comes_first_and_spares_both_sides() -> None:
    model = shape(1, 128, activation="relu")
    result = outcome(model, (PREDICTOR,), engine=ALL_PLACED)
    table = result.placement.tables[0]
    assert result.frequencies.layers is not None
    named = predicted_frequencies(result.frequencies.layers[0], 1.25)
    there = (table.mode == 2) & (table.predictor_hot == 1) & (table.hot == 64)
    nbytes = SHARED + 128 * EACH
    for level in np.flatnonzero(there):
        first = nbytes / 5e11 + 2e-7
        assert table.predictor_seconds[level] == pytest.approx(first, rel=1e-12)
        hot = float(named[:64].sum()) * NEURON / 5e11 + 3e-7
        assert table.hot_seconds[level] == pytest.approx(hot, rel=1e-12)
        expected = table.block_seconds[level] + first + table.sync_seconds[level]
        expected += max(table.hot_seconds[level], table.cold_seconds[level])
        assert table.seconds[level] == pytest.approx(expected, rel=1e-12)
        assert table.predictor_bytes[level] == nbytes + 512 * TOKEN
    assert there.sum() == 2  # attention on either side


def test_predictors_are_used_where_they_pay_and_only_there() -> None:
    """Gate-first reads every gate row; a predictor that costs more than those never pays."""
    model = shape(4, 512, activation="relu")
    on = machine(vram=None)
    cheap = replace(PREDICTOR, shared_bytes=0, neuron_bytes=1)
    dear = replace(PREDICTOR, shared_bytes=1 << 20)
    assert modes(outcome(model, (cheap,) * 4, on=on)) == ["predicted"] * 4
    assert modes(outcome(model, (dear,) * 4, on=on)) == ["gate-first"] * 4
    assert modes(outcome(model, (cheap, None, dear, cheap), on=on)) == [
        "predicted",
        "gate-first",
        "gate-first",
        "predicted",
    ]
    assert modes(outcome(replace(model, activation="silu"), (cheap,) * 4, on=on)) == ["dense"] * 4


def test_a_measured_curve_decides_between_the_modes() -> None:
    model = shape(1, 128, activation="relu")
    curve = FFNCurve(256, 128, "Q4_1", "Q4_1", "Q8_0", 1e9, (0.01, 1.0), (1e9, 1e9), (1e7, 1e7))
    slow = replace(machine(vram=None), ffn_curves=(curve,))
    fast = replace(slow, ffn_curves=(replace(curve, predicted_bytes_per_s=(1e9, 1e9)),))
    assert modes(outcome(model, (PREDICTOR,), on=slow)) == ["gate-first"]
    assert modes(outcome(model, (PREDICTOR,), on=fast)) == ["predicted"]


def test_memory_of_predictors_is_counted_to_the_byte() -> None:
    model = shape(2, 128, activation="relu")
    cheap = replace(PREDICTOR, neuron_bytes=4)
    without = outcome(model, (), on=machine(vram=None)).memory
    used = outcome(model, (cheap, cheap), on=machine(vram=None)).memory
    predictor = SHARED + 128 * 4 + 512 * TOKEN
    scores = 4 * 512 * 128
    assert used.ram_units["predictors"] == 2 * predictor
    assert used.ram_used == without.ram_used + 2 * predictor + scores
    dear = replace(PREDICTOR, shared_bytes=1 << 20)
    assert outcome(model, (dear, dear), on=machine(vram=None)).memory == without


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(0, 900),
    st.integers(0, 50),
    st.sampled_from(["time", "frequency"]),
    st.sampled_from(
        [NEURONS_ONLY, ALL_PLACED, Capabilities(frozenset({"ffn", "attention"}), sparse_hot=True)]
    ),
)
def test_with_predictors_no_budget_is_broken_and_no_simple_placement_is_better(
    layers: int, groups: int, seed: int, objective: str, engine: Capabilities
) -> None:
    model = shape(layers, 200, activation="relu")
    once = gpu_scratch_bytes(model, 512) + gpu_predictor_scratch_bytes(model, 512)
    vram = once + (16 + groups) * NEURON
    small = replace(PREDICTOR, shared_bytes=100 * (seed % 9), neuron_bytes=seed % 40 + 1)
    result = outcome(model, (small,) * layers, vram, seed=seed, objective=objective, group=16, engine=engine)
    assert result.memory.vram_used <= budget_for(vram)
    assert result.memory.ram_used <= result.memory.ram_capacity
    solution = result.placement.solution
    for value in result.placement.greedy.values():
        assert value is None or solution.value <= value


def test_with_predictors_the_plan_is_the_best_of_all_placements() -> None:
    model = shape(2, 128, activation="relu")
    once = gpu_scratch_bytes(model, 512) + gpu_predictor_scratch_bytes(model, 512)
    attention = gpu_attention_scratch_bytes(model, Workload(1024))
    budget = once + attention + 150 * NEURON
    result = outcome(model, (PREDICTOR,) * 2, budget, engine=ALL_PLACED)
    best = np.inf
    without = replace(ALL_PLACED, placeable=ALL_PLACED.placeable - {"attention"})
    tries = [("cpu", without, 0), ("cpu", ALL_PLACED, attention), ("gpu", ALL_PLACED, attention)]
    for home, engine, taken in tries:
        inputs = Inputs(
            model, result.machine, result.workload, result.frequencies.layers, result.sizes, (PREDICTOR,) * 2
        )
        tables = level_tables(inputs, LevelOptions(64, engine, home))  # type: ignore[arg-type]
        for choice in itertools.product(*(range(len(table)) for table in tables)):
            pairs = list(zip(tables, choice, strict=True))
            if sum(int(table.vram[k]) for table, k in pairs) <= budget - once - taken:
                best = min(best, sum(float(table.seconds[k]) for table, k in pairs))
    assert result.placement.seconds == pytest.approx(best, rel=1e-12)


def test_a_q8_0_cache_takes_its_own_bytes() -> None:
    model = shape(2, 128)
    half, eighth = (outcome(model, (), kv_type=kind).memory.ram_units["kv_cache"] for kind in ("f16", "q8_0"))
    assert half == 2 * 2 * 2 * 64 * (1024 + 1024)
    assert eighth * 32 == half * 17


class Staged:
    """A tiny ReLU model after profile and train, and a machine on which predictors pay."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_tiny_model(folder, replace(FAMILY_CASES["llama-relu"], seed=5)).path
        text = folder / "text.txt"
        text.write_text("the cat sat on the mat and the dog sat on the log; a quick brown fox jumps. " * 40)
        self.profile, self.trace = folder / "t.profile.safetensors", folder / "t.trace.zst"
        run_profile(
            ProfileOptions(
                self.model, (text,), self.profile, window=64, threads=1, trace=600, trace_output=self.trace
            )
        )
        self.predictors = folder / "t.predictors.safetensors"
        run_train(
            TrainOptions(self.model, self.trace, self.predictors, recall=0.95, row_type="F32", budget=1.0)
        )
        rates = ((0.01, 1.0), (1e9, 1e9), (1e12, 1e12))
        curve = FFNCurve(64, 160, "F32", "F32", "F32", 1e9, *rates)
        cpu = CpuInfo("a CPU", 1, "scalar", 1e12, 1 << 34, (1.0,), (1e12,))
        self.hardware = folder / "hardware.toml"
        HardwareProfile(MachineInfo("m", "measured", "2026-11-25"), cpu, ffn=(curve,)).save(self.hardware)

    def judged(self, increase: float | None, *, without: int | None = None) -> Path:
        """The predictors with this measured cost, and none for layer ``without``."""
        made = Predictors.load(self.predictors)
        cost = None
        if increase is not None:
            cost = PredictionCost(None, 20.0, 20.0 * (1 + increase), 0.01, 1000, 64, "ef" * 32)
        infos, layers = list(made.header.layers), list(made.layers)
        if without is not None:
            infos[without] = replace(infos[without], kind="none", rank=0, nbytes=0)
            layers[without] = None
        path = self.folder / "judged.predictors.safetensors"
        Predictors(replace(made.header, layers=tuple(infos), cost=cost), tuple(layers)).save(path)
        return path

    def plan(self, predictors: Path | None, allowed: float, **changes: object) -> Plan:
        request = PlanRequest(
            self.model,
            profile=self.profile,
            predictors=predictors,
            max_ppl_increase=allowed,
            hardware=str(self.hardware),
        )
        return make_plan(replace(request, **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Staged:
    return Staged(tmp_path_factory.mktemp("staged"))


@pytest.mark.parametrize(
    ("cost", "allowed", "says"),
    [
        (0.01, 0.0, "max-ppl-increase is 0"),
        (None, 0.5, "not been measured"),
        (0.02, 0.01, r"\+2.00 %, more than the 1 %"),
    ],
)
def test_predictors_that_cost_more_than_is_allowed_are_left_out_and_it_is_said(
    staged: Staged, cost: float | None, allowed: float, says: str
) -> None:
    plan = staged.plan(staged.judged(cost), allowed)
    assert {layer.mode for layer in plan.layers} == {"gate-first"}
    assert re.search(says, plan.provenance.predictors)
    left_out = staged.plan(None, allowed, no_predictors=True)
    assert left_out.layers == plan.layers
    assert "--no-predictors" in left_out.provenance.predictors


def test_the_split_file_runs_the_modes_that_the_plan_chose(staged: Staged) -> None:
    """profile, train, plan with a quality budget, convert, run: predicted where there is a predictor."""
    predictors = staged.judged(0.01, without=1)
    plan = staged.plan(predictors, 0.02)
    modes = ["predicted", "gate-first", "predicted"]
    assert [layer.mode for layer in plan.layers] == modes
    assert [layer.predictor for layer in plan.layers] == ["cpu", None, "cpu"]
    assert plan.budgets.max_ppl_increase == 0.02
    made = Predictors.load(predictors)
    taken = sum(
        4 * (16 * -(-info.rank // 16) * 64 + 160 * (info.rank + 1)) + 256 * 4 * info.rank
        for info in made.header.layers
        if info.kind != "none"
    )
    assert {unit.name: unit.bytes for unit in plan.units}["predictors"] == taken
    assert "In 2 of 3 layers predictors name" in plan.verdict
    plan.save(staged.folder / "t.plan.json")
    assert Plan.load(staged.folder / "t.plan.json") == plan
    split = staged.folder / "t.powerinfer.gguf"
    chosen = staged.folder / "t.plan.json"
    convert(ConvertOptions(staged.model, staged.profile, chosen, split, predictors=predictors))
    model = load_model(split)
    try:
        assert model.split is not None
        assert list(model.split.modes) == modes
        engine = Engine(model, threads=1, context=64)
        engine.prefill([1, 2, 3])
        assert np.isfinite(engine.decode(4)).all()
        assert engine.report().mode == "mixed"
        engine.close()
    finally:
        model.close()


def test_predictors_of_another_model_are_refused(staged: Staged, tmp_path: Path) -> None:
    made = Predictors.load(staged.predictors)
    Predictors(replace(made.header, fingerprint="00" * 32), made.layers).save(tmp_path / "o.st")
    with pytest.raises(OtherModel, match="not for"):
        staged.plan(tmp_path / "o.st", 0.1)
    with pytest.raises(PlanError, match="share from 0"):
        staged.plan(staged.predictors, 1.5)
